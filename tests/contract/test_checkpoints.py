"""Other people's drafters: the same tensors under each format's names draft alike, and as a slow reference drafts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import CAPACITY, load, sampler, text, trainee, write
from safetensors.torch import save_file
from tiny import VOCAB, tiny
from torch import Tensor

from harness import drafter
from harness.target import Target
from harness.trunk import Trunk
from methods.eagle import load_layer

PROMPT = text(17, VOCAB)
DRAFT_IDS = torch.arange(5, VOCAB, 3)
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (1.0 + 0.1 * torch.randn(shape, generator=generator))
        if "norm" in name
        else torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }


def directory(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def proposal(path: Path, model: Any, name: str = "eagle", **given: Any) -> tuple[list[int], Tensor]:
    """(tokens, q) that the loaded drafter gives after PROMPT."""
    target = Target(model, capacity=CAPACITY)
    method = load(name, target, path, sampler(temperature=1.0), **given)
    with torch.inference_mode():
        method.start(PROMPT, target.prefill(PROMPT[:-1]))
        target.begin(PROMPT[-1])
        draft = method.propose(PROMPT)
    assert draft.q_PV is not None
    return draft.tokens_N.tolist(), draft.q_PV


@torch.no_grad()
def slowly(
    model: Any,
    taps: list[int],
    tokens: list[int],
    step: Callable[[Tensor, Tensor], Tensor],
    fuse: Callable[[Tensor], Tensor],
) -> Tensor:
    """Features of the last position at each depth, from scratch at each depth: no cache, plain positions."""
    with Target(model, capacity=1).lent() as own:
        hidden = own(torch.tensor([PROMPT[:-1]]), use_cache=False, output_hidden_states=True).hidden_states
        embed = own.model.embed_tokens
        g = fuse(torch.cat([hidden[tap][0] for tap in taps], dim=-1))
        out = []
        for depth in range(len(tokens)):
            e = embed(torch.tensor([*PROMPT[1:], *tokens[:depth]]))
            out.append(step(e, g)[-1])
            g = torch.cat((g, out[-1][None]))
    return torch.stack(out)


# --- EAGLE-1 ----------------------------------------------------------------------------------------------------------

ATTENTION = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64}


def eagle1_tensors(bias: bool) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (64, 128), "embed_tokens.weight": (VOCAB, 64)}
    shapes |= {f"layers.0.self_attn.{name}.weight": (rows, 64) for name, rows in ATTENTION.items()}
    shapes |= {f"layers.0.mlp.{name}.weight": (96, 64) for name in ("gate_proj", "up_proj")}
    shapes |= {"layers.0.mlp.down_proj.weight": (64, 96), "layers.0.post_attention_layernorm.weight": (64,)}
    return random_tensors(shapes | ({"fc.bias": (64,)} if bias else {}))


@pytest.mark.parametrize("bias", [False, True])
def test_eagle1_drafts_as_one_llama_layer_without_its_first_norm(bias: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    model, tensors = tiny("llama"), eagle1_tensors(bias)
    reference = LlamaModel(LlamaConfig(**SIZES, vocab_size=VOCAB, num_hidden_layers=1)).eval()
    reference.load_state_dict({n: t for n, t in tensors.items() if not n.startswith("fc")}, strict=False)
    reference.layers[0].input_layernorm = reference.norm = torch.nn.Identity()

    def step(e: Tensor, g: Tensor) -> Tensor:
        x = torch.nn.functional.linear(torch.cat((e, g), dim=-1), tensors["fc.weight"], tensors.get("fc.bias"))
        return reference(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]  # type: ignore[no-any-return]

    tokens, q = proposal(directory(tmp_path / "eagle1", tensors, SIZES), model)
    expected = torch.softmax(model.lm_head(slowly(model, [-1], tokens, step, lambda g: g)), dim=-1)
    torch.testing.assert_close(q, expected, rtol=1e-3, atol=1e-5)


# --- EAGLE-3 ----------------------------------------------------------------------------------------------------------


def eagle3_tensors() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (64, 192),
        "norm.weight": (64,),
        "lm_head.weight": (len(DRAFT_IDS), 64),
    }
    shapes |= {f"midlayer.self_attn.{name}.weight": (rows, 128) for name, rows in ATTENTION.items() if name != "o_proj"}
    shapes |= {"midlayer.self_attn.o_proj.weight": (64, 64), "midlayer.mlp.down_proj.weight": (64, 96)}
    shapes |= {f"midlayer.mlp.{name}.weight": (96, 64) for name in ("gate_proj", "up_proj")}
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    shapes |= {f"midlayer.{name}.weight": (64,) for name in norms}
    tensors = random_tensors(shapes)
    known = torch.zeros(VOCAB, dtype=torch.bool)
    known[DRAFT_IDS] = True
    return tensors | {"d2t": DRAFT_IDS - torch.arange(len(DRAFT_IDS)), "t2d": known}


def speculators_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}


def eagle3_step(tensors: dict[str, Tensor], normed_residual: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """EAGLE-3's layer, a position at a time."""
    w = {name.removeprefix("midlayer.").removesuffix(".weight"): tensor for name, tensor in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return w[name] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turn(x: Tensor, position: int) -> Tensor:
        angles = position * 10000.0 ** (-torch.arange(8) / 8)
        first, second = x[..., :8], x[..., 8:]
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
        )

    def step(e: Tensor, g: Tensor) -> Tensor:
        out, keys, values = [], [], []
        for position, (embedded, feature) in enumerate(zip(e, g, strict=True)):
            x = torch.cat((norm(embedded, "input_layernorm"), norm(feature, "hidden_norm")))
            q = turn((w["self_attn.q_proj"] @ x).view(2, 2, 16), position)
            keys.append(turn((w["self_attn.k_proj"] @ x).view(2, 16), position))
            values.append((w["self_attn.v_proj"] @ x).view(2, 16))
            share = torch.softmax(torch.einsum("hgd,thd->hgt", q, torch.stack(keys)) / 4, dim=-1)
            attended = torch.einsum("hgt,thd->hgd", share, torch.stack(values)).flatten()
            y = (norm(feature, "hidden_norm") if normed_residual else feature) + w["self_attn.o_proj"] @ attended
            z = norm(y, "post_attention_layernorm")
            gate = torch.nn.functional.silu(w["mlp.gate_proj"] @ z)
            out.append(y + w["mlp.down_proj"] @ (gate * (w["mlp.up_proj"] @ z)))
        return torch.stack(out)

    return step


def read_out(tensors: dict[str, Tensor], features: Tensor) -> Tensor:
    normed = tensors["norm.weight"] * features / (features.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return torch.softmax(normed @ tensors["lm_head.weight"].T, dim=-1)


@pytest.mark.parametrize("normed_residual", [False, True])
def test_eagle3_drafts_as_its_paper_says(normed_residual: bool, tmp_path: Path) -> None:
    model, tensors = tiny("llama"), eagle3_tensors()
    config = SIZES | {"norm_before_residual": normed_residual}
    tokens, q = proposal(directory(tmp_path / "eagle3", tensors, config), model)
    assert set(tokens) <= set(DRAFT_IDS.tolist())
    features = slowly(
        model, [2, 2, 1], tokens, eagle3_step(tensors, normed_residual), lambda tapped: tapped @ tensors["fc.weight"].T
    )
    torch.testing.assert_close(q, read_out(tensors, features), rtol=1e-3, atol=1e-5)


def test_the_dynamic_tree_holds_the_likeliest_paths_of_eagle2s_search(tmp_path: Path) -> None:
    """Against the search written down: every path's features from scratch, no masks, no slots."""
    model, tensors, (depth, branch, nodes) = tiny("llama"), eagle3_tensors(), (3, 3, 12)
    step, fuse = eagle3_step(tensors), lambda tapped: tapped @ tensors["fc.weight"].T
    leaves: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    found: list[tuple[tuple[int, ...], float]] = []
    for _ in range(depth):
        children = []
        for path, chance in leaves:
            log_q = read_out(tensors, slowly(model, [2, 2, 1], [*path, 0], step, fuse)[-1]).log()
            best = log_q.topk(branch)
            children += [
                ((*path, int(DRAFT_IDS[row])), chance + value)
                for row, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        leaves = sorted(children, key=lambda child: -child[1])[:branch]
        found += children
    expected = {path for path, _ in sorted(found, key=lambda child: -child[1])[:nodes]}
    target = Target(model, capacity=CAPACITY)
    method = load(
        "eagle", target, directory(tmp_path / "eagle3", tensors, SIZES), depth=depth, branch=branch, nodes=nodes
    )
    with torch.inference_mode():
        method.start(PROMPT, target.prefill(PROMPT[:-1]))
        target.begin(PROMPT[-1])
        draft = method.propose(PROMPT)
    above = draft.shape.ancestors_MM[1:, 1:]
    assert {tuple(draft.tokens_N[row].tolist()) for row in above} == expected


def test_eagle3_under_speculators_names_drafts_alike(tmp_path: Path) -> None:
    """Both conventions of the tapped layers: inputs of layers, or the layers themselves where the first id is 1."""
    model, tensors = tiny("llama", num_hidden_layers=6), eagle3_tensors()
    layer = {name: value for name, value in SIZES.items() if name != "rope_theta"}
    layer["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    native = proposal(directory(tmp_path / "native", tensors, SIZES), model)
    for number, ids in enumerate(([2, 3, 3], [1, 2, 2])):
        config = {
            "speculators_model_type": "eagle3", "transformer_layer_config": layer, "norm_before_residual": False,
            "eagle_aux_hidden_state_layer_ids": ids,
        }  # fmt: skip
        found = proposal(directory(tmp_path / str(number), speculators_names(tensors), config), model)
        assert found[0] == native[0]
        torch.testing.assert_close(found[1], native[1])


def test_taps_may_be_named_in_a_configuration_within_the_configuration(tmp_path: Path) -> None:
    trunk, tensors = Trunk(tiny("llama", num_hidden_layers=6)), eagle3_tensors()
    nested = SIZES | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}
    assert load_layer(directory(tmp_path / "nested", tensors, nested), trunk)[2] == (0, 1, 2)
    two = SIZES | {"eagle_aux_hidden_state_layer_ids": [0, 1]}
    with pytest.raises(ValueError, match="reads 2 hidden states"):
        load_layer(directory(tmp_path / "two", tensors, two), trunk)


def test_a_configuration_without_a_base_means_the_authors_and_not_the_targets(tmp_path: Path) -> None:
    trunk = Trunk(tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}))
    silent = {name: value for name, value in SIZES.items() if name != "rope_theta"}
    for number, (config, base) in enumerate(((silent, 1e4), (silent | {"rope_theta": None}, 1e4), (SIZES, 1e4))):
        layer, _, _ = load_layer(directory(tmp_path / str(number), eagle3_tensors(), config), trunk)
        assert layer.base == base
    assert SIZES["rope_theta"] == 1e4


def test_our_own_checkpoint_and_its_native_form_draft_alike(tmp_path: Path) -> None:
    """Ours indexes the target's head; a native one has the same rows as a head of its own, and d2t."""
    model = tiny("llama")
    made = trainee("eagle", model, vocabulary_V=DRAFT_IDS)
    ours = proposal(write(tmp_path / "ours.safetensors", made), model)
    tensors = {name: tensor.float() for name, tensor in made.tensors().items() if name != "vocabulary"}
    tensors |= {"lm_head.weight": model.lm_head.weight[DRAFT_IDS], "d2t": DRAFT_IDS - torch.arange(len(DRAFT_IDS))}
    found = proposal(directory(tmp_path / "native", tensors, made.config()), model)
    assert found[0] == ours[0]
    torch.testing.assert_close(found[1], ours[1])


def test_an_eagle_checkpoint_that_does_not_fit_says_what_is_wrong(tmp_path: Path) -> None:
    model, tensors = tiny("llama"), eagle3_tensors()
    target = Target(model, capacity=CAPACITY)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "fc.weight"}
    with pytest.raises(ValueError, match=r"fc\.weight"):
        load("eagle", target, directory(tmp_path / "lacking", lacking, SIZES))
    normed = tensors | {"midlayer.self_attn.q_norm.weight": torch.ones(16)}
    with pytest.raises(ValueError, match="not known here"):
        load("eagle", target, directory(tmp_path / "normed", normed, SIZES))
    headless = tensors | {"lm_head.weight": tensors["lm_head.weight"][:-1]}
    with pytest.raises(ValueError, match="output head is 40 x 64, where 41 tokens x 64 features"):
        load("eagle", target, directory(tmp_path / "headless", headless, SIZES))
    beyond = tensors | {"d2t": tensors["d2t"] + VOCAB}
    with pytest.raises(ValueError, match="ids outside the target's 128"):
        load("eagle", target, directory(tmp_path / "beyond", beyond, SIZES))
    scaled = SIZES | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    with pytest.raises(ValueError, match="scaled rotary"):
        load("eagle", target, directory(tmp_path / "scaled", tensors, scaled))
    with pytest.raises(ValueError, match="knows 41 tokens: branch=42 is out of range"):
        load("eagle", target, directory(tmp_path / "narrow", tensors, SIZES), nodes=4, branch=42)


# --- Medusa -----------------------------------------------------------------------------------------------------------


def medusa_tensors(
    heads: int, blocks: int, prefix: str = "", *, width: int = 64, vocabulary: int = VOCAB
) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(heads):
        for j in range(blocks):
            shapes |= {f"{prefix}{i}.{j}.linear.weight": (width, width), f"{prefix}{i}.{j}.linear.bias": (width,)}
        shapes[f"{prefix}{i}.{blocks}.weight"] = (vocabulary, width)
    return random_tensors(shapes)


@pytest.mark.parametrize("prefix", ["", "medusa_head."])
@pytest.mark.parametrize("blocks", [1, 2])
def test_medusa_heads_are_counted_from_the_tensors(prefix: str, blocks: int, tmp_path: Path) -> None:
    """The config of the original checkpoints says two heads where five are; each has an output head of its own."""
    model, tensors = tiny("llama"), medusa_tensors(5, blocks, prefix)
    path = directory(tmp_path / "medusa", tensors, {"medusa_num_heads": 2, "medusa_num_layers": blocks})
    target = Target(model, capacity=CAPACITY)
    method = load("medusa", target, path, nodes=0)
    with torch.inference_mode():
        method.start(PROMPT, target.prefill(PROMPT[:-1]))
        target.begin(PROMPT[-1])
        drafted = method.propose(PROMPT).tokens_N.tolist()
        with target.lent() as own:
            hidden = own(torch.tensor([PROMPT[:-1]]), output_hidden_states=True).hidden_states[-1][0, -1]
    expected = []
    for i in range(5):
        x = hidden
        for j in range(blocks):
            name = f"{prefix}{i}.{j}.linear"
            x = x + torch.nn.functional.silu(tensors[f"{name}.weight"] @ x + tensors[f"{name}.bias"])
        expected.append(int((tensors[f"{prefix}{i}.{blocks}.weight"] @ x).argmax()))
    assert drafted == expected
    assert method.drafter_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert len(load("medusa", target, path, nodes=0, heads=3).heads.blocks) == 3  # type: ignore[attr-defined]


def test_what_is_no_medusa_checkpoint_is_refused(tmp_path: Path) -> None:
    path = directory(tmp_path / "eagle", eagle1_tensors(False), {})
    with pytest.raises(ValueError, match="not a Medusa checkpoint"):
        load("medusa", Target(tiny("llama"), capacity=CAPACITY), path)


@pytest.mark.parametrize(
    ("tensors", "heads", "said"),
    [
        (medusa_tensors(2, 1, vocabulary=VOCAB + 8), None, "output head is 136 x 64, where 128 tokens x 64 features"),
        (medusa_tensors(2, 1, width=32), None, "heads are 32 features wide and the target is 64"),
        (medusa_tensors(2, 1), 9, "has 2 heads: heads=9 is out of range"),
        ({name: t for name, t in medusa_tensors(2, 1).items() if name != "1.0.linear.bias"}, None, "lacks 1.0.linear"),
        (medusa_tensors(2, 1) | {"vocabulary": DRAFT_IDS}, None, "where 41 tokens x 64 features"),
    ],
)
def test_medusa_heads_of_another_target_are_refused(
    tensors: dict[str, Tensor], heads: int | None, said: str, tmp_path: Path
) -> None:
    path = directory(tmp_path / "medusa", tensors, {})
    with pytest.raises(ValueError, match=said):
        load("medusa", Target(tiny("llama"), capacity=CAPACITY), path, **({} if heads is None else {"heads": heads}))


OTHERS = {"width": {"hidden_size": 128}, "heads": {"num_key_value_heads": 4}, "depth": {"num_hidden_layers": 2}}


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("s3d", "width", "masks have 64 features and the target 128"),
        ("s3d", "heads", r"does not fit the target \(look at its pairs.0/self_attn/k_proj.b\)"),
        ("s3d", "depth", r"does not fit the target \(look at its pairs.1"),
        ("eagle", "width", "has 64 features and the target 128"),
        ("draft-model", "width", r"does not fit the target \(look at its layers.0"),
        ("draft-model", "heads", r"does not fit the target \(look at its layers.0.self_attn.k_proj"),
    ],
)
def test_a_drafter_of_another_target_is_refused(name: str, other: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "drafter.safetensors", trainee(name, tiny("llama")))
    with pytest.raises(ValueError, match=said):
        load(name, Target(tiny("llama", **OTHERS[other]), capacity=CAPACITY), path)


@pytest.mark.parametrize(
    ("name", "said"),
    [("s3d", "is no S3D checkpoint"), ("eagle", "is no EAGLE checkpoint"), ("draft-model", "no draft-model check")],
)
def test_a_drafter_of_another_method_is_refused(name: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "medusa.safetensors", trainee("medusa", tiny("llama")))
    with pytest.raises(ValueError, match=said):
        load(name, Target(tiny("llama"), capacity=CAPACITY), path)


def test_a_torn_draft_model_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.safetensors", trainee("draft-model", tiny("llama")))
    kept = {name: t for name, t in drafter.tensors(whole).items() if not name.startswith("layers.1.")}
    drafter.write(tmp_path / "torn.safetensors", kept, *drafter.metadata(whole))
    with pytest.raises(ValueError, match=r"look at its layers.1"):
        load("draft-model", Target(tiny("llama"), capacity=CAPACITY), tmp_path / "torn.safetensors")


def test_a_draft_model_is_no_deeper_than_its_target() -> None:
    with pytest.raises(ValueError, match="6 layers is deeper than its target of 4"):
        trainee("draft-model", tiny("qwen3"), layers=6)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="never loaded"):
        drafter.tensors(tmp_path)


# --- draft models -----------------------------------------------------------------------------------------------------


def test_a_whole_causal_language_model_may_draft(tmp_path: Path) -> None:
    model = tiny("llama")
    tiny("qwen2", num_hidden_layers=2).save_pretrained(tmp_path / "small")
    tokens, q = proposal(tmp_path / "small", model, "draft-model", gamma=3)
    with Target(tiny("qwen2", num_hidden_layers=2), capacity=1).lent() as small:
        expected = torch.softmax(small(torch.tensor([[*PROMPT, *tokens]])).logits[0, -4:-1], dim=-1)
    torch.testing.assert_close(q, expected, rtol=1e-3, atol=1e-5)
