"""Training and decoding see the same: what a trainee predicts at an anchor is what the loaded method drafts there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench import CAPACITY, lesson, load, sampler, text, trainee, write
from tiny import ARCHITECTURES, VOCAB, tiny
from torch import Tensor

from harness import method
from harness.target import Target
from harness.trunk import Trunk

SUBSET = torch.arange(VOCAB)[1::2]  # a draft vocabulary of every second token


def at_anchor(made: Any, trunk: Trunk, tokens: list[int], anchor: int) -> Tensor:
    """(K, V') logits of the trainee at `anchor`, with a second sequence and two more anchors in the batch."""
    ids_BT = torch.tensor([tokens, text(len(tokens), VOCAB, seed=99)])
    anchors_BA = torch.tensor([[anchor, 3, 9], [5, 2, 8]])
    with torch.no_grad():
        return made.logits(lesson(trunk, ids_BT, anchors_BA, made.taps))[0, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["s3d", "eagle", "draft-model"])
@pytest.mark.parametrize("subset", [None, SUBSET], ids=["full", "subset"])
def test_trainee_predicts_what_the_method_draws_from(
    name: str, architecture: str, subset: Tensor | None, tmp_path: Path
) -> None:
    """q of a sampled draft, at every depth, against the trainee's softmax on the text that the draft makes."""
    model = tiny(architecture)
    made = trainee(name, model, vocabulary_V=subset, **{"k": 3, "rank": 4, "keep": "1+2"} if name == "s3d" else {})
    path = write(tmp_path / "drafter.safetensors", made)
    target = Target(model, capacity=CAPACITY)
    drafting = load(name, target, path, sampler(temperature=1.0))
    prompt = text(21, VOCAB)
    drafting.start(prompt, target.prefill(prompt[:-1]))
    target.begin(prompt[-1])
    draft = drafting.propose(prompt)
    assert draft.q_PV is not None
    whole = [*prompt, *draft.tokens_N.tolist(), *text(6, VOCAB, seed=5)]
    expected_KV = torch.softmax(at_anchor(made, target.trunk, whole, len(prompt) - 1), dim=-1)
    depths = min(len(expected_KV), len(draft.q_PV))
    assert depths == 4 or (name == "eagle" and depths == 5)
    torch.testing.assert_close(draft.q_PV[:depths], expected_KV[:depths], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_eagle_learns_from_a_shallow_target_what_it_drafts_from(layers: int, tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=layers)
    made = trainee("eagle", model)
    target = Target(model, capacity=CAPACITY)
    drafting = load("eagle", target, write(tmp_path / "drafter.safetensors", made), sampler(temperature=1.0))
    prompt = text(21, VOCAB)
    drafting.start(prompt, target.prefill(prompt[:-1]))
    target.begin(prompt[-1])
    q_KV = drafting.propose(prompt).q_PV
    assert q_KV is not None
    expected_KV = torch.softmax(at_anchor(made, target.trunk, [*prompt, *text(9, VOCAB)], len(prompt) - 1), dim=-1)
    torch.testing.assert_close(q_KV[0], expected_KV[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("subset", [None, SUBSET], ids=["full", "subset"])
def test_medusa_heads_predict_what_they_were_trained_on(
    architecture: str, subset: Tensor | None, tmp_path: Path
) -> None:
    model = tiny(architecture)
    made = trainee("medusa", model, vocabulary_V=subset)
    target = Target(model, capacity=CAPACITY)
    drafting = load("medusa", target, write(tmp_path / "drafter.safetensors", made), nodes=0)
    prompt = text(21, VOCAB)
    drafting.start(prompt, target.prefill(prompt[:-1]))
    whole = [*prompt, *text(8, VOCAB, seed=5)]
    expected_KV = at_anchor(made, target.trunk, whole, len(prompt) - 1)
    drafted_HV = drafting.heads(drafting.hidden_D, drafting.head)  # type: ignore[attr-defined]
    torch.testing.assert_close(drafted_HV, expected_KV, rtol=1e-4, atol=1e-4)
    best = expected_KV.argmax(-1)
    target.begin(prompt[-1])
    assert drafting.propose(prompt).tokens_N.tolist() == (best if subset is None else subset[best]).tolist()


def test_shared_weights_draft_what_they_were_trained_to(tmp_path: Path) -> None:
    """The trainee runs the target with its LoRA on; decoding runs the merged weights."""
    model, merged = tiny("llama"), tiny("llama")
    made = trainee("s3d", model, std=0.1, mode="shared", k=3, rank=4, keep="1+2")
    path = write(tmp_path / "drafter.safetensors", made)
    for name, delta in method.find("s3d").deltas(path, 4).items():
        merged.model.get_parameter(name).add_(delta)
    target = Target(merged, capacity=CAPACITY)
    drafting = load("s3d", target, path, sampler(temperature=1.0), mode="shared")
    prompt = text(21, VOCAB)
    drafting.start(prompt, target.prefill(prompt[:-1]))
    target.begin(prompt[-1])
    q_KV = drafting.propose(prompt).q_PV
    expected_KV = torch.softmax(at_anchor(made, Trunk(model), [*prompt, *text(9, VOCAB)], len(prompt) - 1), dim=-1)
    torch.testing.assert_close(q_KV, expected_KV, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["s3d", "medusa", "eagle", "draft-model"])
def test_training_in_half_precision_reaches_every_parameter_and_leaves_the_target_alone(name: str) -> None:
    model = tiny("llama").to(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    made = trainee(name, model, **{"keep": "1+2"} if name == "s3d" else {})
    taught = lesson(Trunk(model), torch.tensor([text(40, VOCAB)] * 2), torch.tensor([[5, 9], [4, 20]]), made.taps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made.loss(taught).backward()
    for parameter in made.module.parameters():
        assert parameter.dtype is torch.float32
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    for key, tensor in model.state_dict().items():
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor, before[key])


def test_a_new_adapter_and_new_heads_predict_as_their_target_does(tmp_path: Path) -> None:
    """What training starts from: Medusa's heads are the target's own head, a LoRA changes nothing."""
    model = tiny("llama")
    tokens = text(24, VOCAB)
    heads = trainee("medusa", model, std=0.0)
    trunk = Trunk(model)
    taught = lesson(trunk, torch.tensor([tokens]), torch.tensor([[7]]), heads.taps)
    own_V = trunk.head(taught.hidden[trunk.depth][0, 6])
    torch.testing.assert_close(heads.logits(taught)[0, 0], own_V.expand(4, -1))
    everything = trainee("s3d", model, std=0.0, keep="2+2", k=1)
    torch.testing.assert_close(
        everything.logits(taught)[0, 0, 0], trunk.head(taught.hidden[trunk.depth][0, 7]), rtol=1e-4, atol=1e-4
    )
