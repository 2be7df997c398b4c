"""Shapes: the right sizes, sound random weights in every precision, drafters that load; and a whole run of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import bench
import pytest
import torch

from harness import cli, drafter, method, shapes, weights
from harness.decode import Limits
from harness.errors import UserError
from harness.metrics import summary
from harness.plan import plan, read_request
from harness.results import Run, read_run
from harness.target import Target
from harness.weights import Bits

ROOT = Path(__file__).resolve().parents[2]
TINY = weights.resolve("shape:tiny")
DRAFTING = ("s3d", "medusa", "eagle", "draft-model")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # as the models' own cards count them, embeddings once where they are tied
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3.1-8b", 8_030_261_248),
        ("phi-3-mini", 3_821_079_552),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_a_shape_has_its_models_size(name: str, parameters: int) -> None:
    hollow = shapes.hollow(weights.resolve(f"shape:{name}"), torch.bfloat16)
    assert sum(parameter.numel() for parameter in hollow.parameters()) == parameters


@pytest.mark.parametrize("bits", ["32", "16", "8", "8:t0", "4"])
def test_random_weights_are_sound_in_every_precision(bits: str) -> None:
    loaded = weights.load(TINY, Bits.parse(bits), device="cpu")
    assert loaded.tokenizer is None
    assert not [name for name, tensor in loaded.model.state_dict().items() if tensor.is_meta]
    kinds = {type(layer.self_attn.q_proj).__name__ for layer in loaded.model.model.layers}
    assert kinds == {{"8": "Linear8bitLt", "4": "Linear4bit"}.get(bits[0], "Linear") if bits != "32" else "Linear"}
    logits_MV = Target(loaded.model, capacity=128).prefill(bench.text(60, 256)).logits_MV.float()
    assert torch.isfinite(logits_MV).all()
    assert 0.5 * shapes.SHARPNESS < float(logits_MV.std()) < 2 * shapes.SHARPNESS


def test_quantised_weights_are_smaller_and_answer_alike() -> None:
    prompt = bench.text(60, 256)
    made = {bits: weights.load(TINY, Bits.parse(bits), device="cpu") for bits in ("32", "8", "4")}
    sizes = {bits: loaded.weight_bytes for bits, loaded in made.items()}
    assert sizes["32"] > sizes["8"] > sizes["4"]
    logits = {bits: Target(loaded.model, capacity=128).prefill(prompt).logits_MV[0] for bits, loaded in made.items()}
    alike = {bits: float(torch.corrcoef(torch.stack((logits["32"], logits[bits])))[0, 1]) for bits in ("8", "4")}
    assert alike["8"] > 0.9
    assert alike["4"] > 0.5


def test_features_above_the_outlier_threshold_exist() -> None:
    loaded = weights.load(TINY, Bits(32), device="cpu")
    layer = loaded.model.model.layers[0]
    read_MD = layer.input_layernorm(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    assert set((read_MD.abs() > weights.INT8_THRESHOLD).any(0).nonzero()[:, 0].tolist()) == set(range(6))


def test_no_more_than_one_matrix_waits_to_be_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    quantised = shapes._quantised

    def watched(linear: torch.nn.Linear, bits: Bits, dtype: torch.dtype) -> torch.nn.Module:
        nonlocal most
        alive.append(weakref.ref(linear.weight))
        most = max(most, sum(each() is not None for each in alive))
        return quantised(linear, bits, dtype)

    monkeypatch.setattr(shapes, "_quantised", watched)
    weights.load(TINY, Bits.parse("8"), device="cpu")
    assert len(alive) == 8 * 7
    assert most <= 2, "the one before may not be collected yet"


def test_a_tied_head_is_one_tensor(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(shapes.SHAPES["tiny"] | {"tie_word_embeddings": True}))
    source = weights.resolve(f"shape:{path}")
    assert (source.name, source.kind) == ("shape:mine", "shape")
    loaded = weights.load(source, Bits(32), device="cpu")
    assert loaded.model.lm_head.weight.data_ptr() == loaded.model.model.embed_tokens.weight.data_ptr()
    assert loaded.sha256 != shapes.identity(TINY) == shapes.identity(weights.resolve("shape:tiny"))


def test_the_same_shape_has_the_same_weights() -> None:
    one, two = (weights.load(TINY, Bits(32), device="cpu").model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", DRAFTING)
def test_a_random_drafter_loads_and_drafts(name: str, tmp_path: Path) -> None:
    spec = method.parse_one(name)
    path = tmp_path / "drafter.safetensors"
    shapes.write_drafter(TINY, spec, path)
    target = Target(weights.load(TINY, Bits(32), device="cpu").model, capacity=bench.CAPACITY)
    made = bench.load(name, target, path)
    prompt = bench.text(40, 256)
    text, steps = bench.decoded(target, made, prompt, Limits(16))
    assert len(text) == 16
    assert all(step.drafted for step in steps[1:])


def test_a_large_vocabulary_gets_a_smaller_drafting_head(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(shapes.SHAPES["tiny"] | {"vocab_size": 40_000}))
    shapes.write_drafter(weights.resolve(f"shape:{config}"), method.parse_one("medusa"), tmp_path / "m.safetensors")
    assert drafter.tensors(tmp_path / "m.safetensors")["vocabulary"].tolist() == list(range(shapes.DRAFT_ROWS))


def test_skipping_layers_does_not_ask_random_weights_how_sure_they_are() -> None:
    request = read_request({"methods": "layerskip", "bits": "32", "acceptance": [0.5]})
    made = plan(request, source=TINY, device="cpu", prompt_set=shapes.prompt_set(2))
    (options,) = (one.cell.options for one in made.cells if one.cell.method == "layerskip")
    assert options["threshold"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--model", "shape:llama-7"), "llama-2-7b"),
        (("--model", "shape:tiny", "--prompts", "standard"), "drop --prompts"),
        (("--model", "shape:tiny", "--raw"), "--raw"),
        (("--model", "shape:tiny", "--context", "many"), "1k,4k"),
        (("--model", "shape:tiny", "--acceptance", "high"), "no chance"),
        (("--model", "shape:tiny", "--context", "8k"), "4096 positions"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(("run", *arguments, "--methods", "ar", "--out", str(tmp_path / "run"))) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("harness: ")
    assert hint in said


def test_no_architecture_but_those_that_decode(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="t5"):
        weights.resolve(f"shape:{config}")


METHODS = "ar,s3d,eagle,medusa,layerskip"


def run_shape(folder: Path, *options: str) -> tuple[Run, str]:
    """A run of the command line, and what it printed."""
    asked = ["--model", "shape:tiny", "--limit", "2", "--context", "64", "--out", "run", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HARNESS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "harness", "run", *asked]
    done = subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return read_run(folder / "run"), done.stdout


def test_a_run_of_a_shape_is_synthetic_everywhere(tmp_path: Path) -> None:
    run, shown = run_shape(tmp_path, "--methods", METHODS, "--acceptance", "0.7,0.5", "--bits", "16")
    assert {row.outcome for row in run.rows} == {"ok"}
    assert {row.cell.method for row in run.rows} == set(METHODS.split(","))
    assert all(row.synthetic and row.prompt_tokens == 64 and row.cell.context == 64 for row in run.rows)
    assert all(len(row.new_tokens or ()) == run.manifest.max_new_tokens for row in run.rows), "no text ends by itself"
    for row in run.rows:
        if row.cell.method == "ar":
            assert row.drawn_acceptance is None
        else:
            assert row.drawn_acceptance == [0.7] + [0.5] * (max(row.drafted_depth or ()) - 1)
    assert (run.manifest.synthetic, run.manifest.acceptance) == (True, "0.7,0.5")
    assert "SYNTHETIC" in shown
    assert "even τ" in shown
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("SYNTHETIC") > 5
    assert "break-even" in page


@pytest.mark.slow
def test_a_shape_runs_in_every_precision_with_what_another_run_measured(tmp_path: Path) -> None:
    measured = ROOT / "docs" / "quick-cpu"
    methods = "eagle:nodes=16,draft-model,s3d:mode=shared"
    run, _ = run_shape(tmp_path, "--methods", methods, "--acceptance", f"from:{measured}", "--bits", "32,8,4")
    assert {row.outcome for row in run.rows} == {"ok"}
    assert {row.cell.bits for row in run.rows} == {"32", "int8:t6", "nf4"}
    known = {row.cell.label: row for row in summary(read_run(measured))}
    for row in run.rows:
        if row.cell.label in known and row.drawn_acceptance:
            expected = [depth.probability for depth in known[row.cell.label].acceptance]
            assert row.drawn_acceptance[:3] == expected[:3]
