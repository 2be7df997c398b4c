"""The plan: pure, so everything is tested on values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.plan import Plan, plan, read_request, specs
from harness.weights import ModelSource
from prompts import Prompt, PromptSet

PROMPTS = PromptSet(
    name="toy",
    prompts=(
        Prompt(id="a", category="writing", turns=("one", "two")),
        Prompt(id="b", category="math", turns=("three",)),
    ),
    source="this test",
)


def trained(name: str, option: str | None, model: str) -> Path | None:
    return Path(option or f"/drafters/{name}.safetensors")


def untrained(name: str, option: str | None, model: str) -> Path | None:
    return None


def planned(find_drafter: Any = trained, device: str = "cpu", **request: Any) -> Plan:
    source = ModelSource("toy", "/models/toy", "local")
    given = {"bits": "32"} | request
    return plan(read_request(given), source=source, device=device, prompt_set=PROMPTS, find_drafter=find_drafter)


def labels(made: Plan) -> list[tuple[str, str, str]]:
    return [(one.cell.label, one.cell.bits, one.cell.weights) for one in made.cells]


def test_every_target_has_a_baseline() -> None:
    made = planned(methods="prompt-lookup,s3d:mode=shared", bits="32,8")
    for bits in ("32", "int8:t6"):
        assert {("ar", bits, "base"), ("ar:weights=s3d-shared", bits, "s3d-shared")} <= set(labels(made))
    assert len(made.cells) == 8
    targets = {one.cell.target for one in made.cells}
    assert targets == {one.cell.target for one in made.cells if one.cell.method == "ar"}


def test_a_named_baseline_is_not_added_again() -> None:
    assert labels(planned(methods="prompt-lookup,ar")) == [("prompt-lookup", "32", "base"), ("ar", "32", "base")]


def test_a_merged_baseline_runs_on_the_weights_of_its_method() -> None:
    made = planned(methods="s3d:mode=shared:drafter=/mine.safetensors")
    merges = {one.cell.label: one.merge for one in made.cells}
    assert merges["ar"] is None
    merge = merges["ar:weights=s3d-shared"]
    assert merge is not None
    assert merge == merges["s3d:mode=shared:drafter=/mine.safetensors"]
    assert (merge.method, merge.drafter) == ("s3d", "/mine.safetensors")


def test_a_method_without_a_drafter_is_a_row_that_says_how_to_make_one() -> None:
    made = planned(untrained, methods="s3d,prompt-lookup,s3d:mode=shared")
    reasons = {one.cell.label: one.unsupported for one in made.cells}
    assert reasons["s3d"] == (
        "no trained drafter for toy; `python -m harness train --methods s3d --model /models/toy` makes one"
    )
    assert "--methods s3d:mode=shared " in (reasons["s3d:mode=shared"] or "")
    assert reasons["ar"] is None
    assert reasons["prompt-lookup"] is None
    assert "ar:weights=s3d-shared" not in reasons


def test_a_baseline_of_weights_that_nothing_has_is_unsupported() -> None:
    made = planned(methods="ar:weights=s3d-shared")
    (reason,) = [one.unsupported for one in made.cells if one.cell.weights == "s3d-shared"]
    assert reason is not None


def test_the_same_cell_twice_is_refused() -> None:
    with pytest.raises(UserError, match="s3d and s3d:mode=gated in 32: the same cell twice"):
        planned(methods="s3d,s3d:mode=gated")
    with pytest.raises(UserError, match="ar in int8:t6: the same cell twice"):
        planned(methods="ar", bits="8,8:t6")


def test_two_drafters_cannot_become_the_same_weights() -> None:
    with pytest.raises(UserError, match="two runs"):
        planned(methods="s3d:mode=shared:drafter=/a,s3d:mode=shared:drafter=/b")


def test_rounds_are_shuffled_and_the_seed_repeats_them() -> None:
    made = planned(methods="ar,prompt-lookup,layerskip,s3d,medusa", rounds=8)
    orders = [tuple(made.order(round)) for round in range(8)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len(set(orders)) > 1
    assert orders == [
        tuple(planned(methods="ar,prompt-lookup,layerskip,s3d,medusa", rounds=8).order(r)) for r in range(8)
    ]


def test_defaults_suit_the_device() -> None:
    on_cpu, on_gpu = planned(bits=None), planned(bits=None, device="cuda")
    assert (on_cpu.max_new_tokens, on_cpu.rounds) == (32, 1)
    assert (on_gpu.max_new_tokens, on_gpu.rounds) == (128, 3)
    assert {one.cell.bits for one in on_gpu.cells} == {"16"}
    assert {one.cell.method for one in on_cpu.cells} == {
        *("ar", "s3d", "medusa", "eagle", "layerskip", "prompt-lookup", "draft-model")
    }


@pytest.mark.parametrize(
    ("request_", "preliminary"),
    [
        ({"prompts": "quick", "rounds": 5}, True),
        ({"prompts": "standard", "rounds": 5}, False),
        ({"prompts": "standard", "rounds": 2}, True),
        ({"prompts": "standard", "rounds": 5, "limit": 10}, True),
    ],
)
def test_a_small_run_is_preliminary(request_: dict[str, Any], preliminary: bool) -> None:
    assert planned(**request_).preliminary is preliminary


def test_contexts_are_cells_of_their_own_with_their_own_baselines() -> None:
    made = planned(methods="prompt-lookup", context="512,1k")
    assert [(one.cell.label, one.cell.context) for one in made.cells] == [
        *(("ar", 512), ("prompt-lookup", 512), ("ar", 1024), ("prompt-lookup", 1024))
    ]
    assert len({one.cell.id for one in made.cells}) == 4
    assert len({one.cell.target for one in made.cells}) == 2
    assert {one.cell.context for one in planned(methods="ar").cells} == {None}


@pytest.mark.parametrize(
    ("written", "size"),
    [("8GiB", 8 * 2**30), ("8 GB", 8 * 10**9), ("512MiB", 2**29), ("1.5g", 1_500_000_000), (2**20, 2**20)],
)
def test_a_budget_is_bytes(written: str | int, size: int) -> None:
    assert planned(methods="ar", vram_budget=written).vram_budget_bytes == size


def test_a_table_is_the_same_as_its_text() -> None:
    (text,) = specs("s3d:k=4:keep=3+7")
    (table,) = specs([{"name": "s3d", "k": 4, "keep": [3, 7]}])
    assert table.options == text.options
    (labelled,) = specs([{"name": "s3d", "k": 4, "label": "mine"}])
    assert labelled.label == "mine"


def test_a_small_plan_says_what_it_cannot_show() -> None:
    one_round, few_prompts = planned(rounds=1).warnings()
    assert one_round.startswith("One round")
    assert few_prompts.startswith("2 prompts, fewer than 24")
    assert planned(rounds=2).warnings() == [few_prompts]


def test_cells_in_another_dtype_are_another_target() -> None:
    half, brain = (planned(bits="16", dtype=name, device="cuda").cells[0].cell for name in ("float16", "bfloat16"))
    assert half.target != brain.target
    assert half.id != brain.id


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metods": "ar"}, "did you mean 'methods'"),
        ({"max-new-token": 3}, "did you mean 'max_new_tokens'"),
        ({"methods": [{"name": "s3d", "kep": [3, 7]}]}, "did you mean 'keep'"),
        ({"methods": [{"k": 4}]}, "needs a name"),
        ({"methods": [{"name": 3}]}, "name and label are texts"),
        ({"methods": [{"name": "s3d", "label": 3}]}, "name and label are texts"),
        ({"methods": []}, "no method named"),
        ({"rounds": 0}, "rounds: expected a whole number >= 1, not 0"),
        ({"limit": "many"}, "limit: expected"),
        ({"seed": 2**63}, "seed: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"methods": "s3d:k=1:k=2"}, "'k' is given twice"),
        ({"top_p": 0.0}, "top_p: expected a number > 0.0, not 0.0"),
        ({"temperature": float("inf")}, "temperature"),
        ({"runtime": "turbo"}, "no runtime 'turbo': there is compile, eager, graph"),
        ({"dtype": "float61"}, "did you mean 'float16'"),
        ({"dtype": "float16"}, "choose --bits 16"),
        ({"bits": "7"}, "unknown precision"),
        ({"bits": ""}, "no bits named"),
        ({"raw": True, "system": "Be brief."}, "drop one of them"),
        ({"vram_budget": "much"}, "give 8GiB"),
        ({"vram_budget": "0GiB"}, "give 8GiB"),
        ({"vram_budget": "8"}, "a memory budget of '8' is 8 bytes: did you mean 8GiB?"),
        ({"vram_budget": 2**20 - 1}, "is 1048575 bytes"),
        ({"vram_budget": "8GiB", "device": "mps"}, "cannot be capped"),
        ({"device_map": "cuda"}, "device_map: expected auto or balanced, not 'cuda'"),
        ({"isolation": "process"}, "isolation: expected round, cell or run, not 'process'"),
        ({"rounds": "two"}, "rounds: expected a whole number or auto, not 'two'"),
        ({"rounds": 2.5}, "rounds: expected a whole number or auto, not 2.5"),
        ({"context": "0"}, "1k,4k"),
        ({"context": "1k,1024"}, "the same cell twice"),
        ({"acceptance": "most"}, "no chance"),
    ],
)
def test_mistakes_are_told_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        planned(**({"methods": "ar"} | given))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
