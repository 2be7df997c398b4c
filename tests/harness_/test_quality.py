"""Changed targets are held against 32 bits: perplexity and agreement are what they say, measured once, and reported."""

from __future__ import annotations

import math
from pathlib import Path

import factory
import msgspec
import pytest
import tiny_chat
import torch
from factory import cell, trial

import prompts
from harness import child, quality, runner, weights
from harness.errors import UserError
from harness.plan import Plan, RunJob, plan, read_request
from harness.results import Manifest, Quality, read_run, write_manifest
from reports.words import changed_targets


def planned(folder: Path, bits: str) -> Plan:
    request = read_request({"methods": "prompt-lookup", "bits": bits, "max_new_tokens": 4})
    model = weights.resolve(str(tiny_chat.save(folder / "toy")))
    prompt_set = prompts.load(str(tiny_chat.prompts(folder / "prompts.jsonl")))
    return plan(request, source=model, device="cpu", prompt_set=prompt_set)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunJob:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    made = planned(tmp_path, "32,16,8")
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "plan.json").write_bytes(msgspec.json.encode(made))
    manifest = Manifest(
        run="toy", created="", command=[], model="toy", prompt_set="toy", prompt_set_sha256="", prompts=3, turns=2,
        cells=[one.cell for one in made.cells], rounds=1, seed=0, max_new_tokens=4,
    )  # fmt: skip
    write_manifest(directory, manifest)
    return RunJob(directory=str(directory), sources={"base": made.model})


def test_perplexity_and_the_likeliest_tokens_are_the_models_own() -> None:
    """A model that gives token 1 three quarters, whatever came before."""
    logits_V = torch.tensor([0.25, 0.75]).log()
    texts = [[0, 1, 1], [1, 0]]
    scored = quality.score(lambda ids_1T: logits_V.expand(ids_1T.shape[1], 2), texts, torch.device("cpu"))
    assert scored.best == [1, 1, 1]
    assert scored.perplexity == pytest.approx(math.exp(-(2 * math.log(0.75) + math.log(0.25)) / 3))


@pytest.mark.parametrize("best", [float("nan"), 1e4])
def test_a_loss_that_gives_no_perplexity_is_refused_and_not_kept(best: float) -> None:
    logits_V = torch.tensor([0.0, best])
    with pytest.raises(UserError, match="gives no perplexity"):
        quality.score(lambda ids_1T: logits_V.expand(ids_1T.shape[1], 2), [[1, 0, 0]], torch.device("cpu"))


def test_every_changed_target_is_held_against_32_bits(job: RunJob, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[child.Event] = []
    quality.measure(job, events.append)
    found = {one.bits: one for one in read_run(Path(job.directory)).manifest.quality}
    assert set(found) == {"16", "int8:t6"}
    for one in found.values():
        assert one.reference_bits == "32"
        assert one.positions > 1000
        assert one.perplexity == pytest.approx(one.reference_perplexity, rel=0.2)
        assert 0.5 < one.agreement < 1.0
    assert found["16"].agreement > found["int8:t6"].agreement
    assert not any(isinstance(event, child.Warned) for event in events)
    monkeypatch.setattr(quality, "score", None)  # what is known is not measured again
    quality.measure(job, events.append)


def test_a_target_that_cannot_be_scored_is_left_out_and_said(job: RunJob, monkeypatch: pytest.MonkeyPatch) -> None:
    own = weights.load

    def load(source: object, bits: weights.Bits, **given: object) -> object:
        if bits.width == 8:
            raise MemoryError("out of memory")
        return own(source, bits, **given)

    monkeypatch.setattr(weights, "load", load)
    events: list[child.Event] = []
    quality.measure(job, events.append)
    assert [one.bits for one in read_run(Path(job.directory)).manifest.quality] == ["16"]
    assert isinstance(events[-1], child.Warned)
    assert "no perplexity in int8:t6" in events[-1].warning


def test_the_base_at_32_bits_is_no_changed_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    assert quality.changed(planned(tmp_path, "32")) == []
    monkeypatch.setattr(child, "run", None)  # no process is started for nothing
    runner._quality(planned(tmp_path, "32"), tmp_path, {}, lambda event: None)


def test_a_report_says_that_it_is_another_model() -> None:
    one = Quality(
        weights="base", bits="int8:t6", dtype="float32", positions=2000, perplexity=12.5, reference_bits="32",
        reference_perplexity=12.0, agreement=0.931,
    )  # fmt: skip
    run = factory.run(trial(cell("ar", bits="int8:t6")), quality=[one])
    (line,) = changed_targets(run)
    assert "8 bits (int8:t6): another model than the base in 32 bits" in line
    assert "12.50 against 12.00" in line
    assert "93.1% of 2,000 positions" in line
