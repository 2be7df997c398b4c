"""Several runs: one table for what is alike, and a reason for everything else."""

from __future__ import annotations

import msgspec
import pytest
from factory import cell, run, trial

from harness.errors import UserError
from harness.metrics import summary
from harness.results import Run
from reports.leaderboard import Board, boards
from reports.page import render


def of(pace: float = 0.1, device_name: str = "card", **changes: object) -> Run:
    trials = [
        trial(cell("ar"), [1] * 4, pace, device_name=device_name),
        trial(cell("s3d"), [2, 2], pace, device_name=device_name),
    ]
    return run(*trials, **changes)


def found(*runs: Run) -> list[Board]:
    return boards(runs, [summary(each) for each in runs])


def test_like_runs_share_a_table_and_the_fastest_stands_first() -> None:
    (board,) = found(of(0.1, run="slow"), of(0.06, run="fast"))
    assert board.differs == ()
    order = [(entry.row.cell.label, entry.run, entry.anchor) for entry in board.entries]
    assert order == [("s3d", "fast", "r1"), ("s3d", "slow", "r0"), ("ar", "fast", "r1"), ("ar", "slow", "r0")]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device_name": "other card"}, "device: other card, there card"),
        ({"host": {"cpu": "other"}}, "cpu: other, there not recorded"),
        ({"versions": {"torch": "9"}}, "version of torch: 9, there not recorded"),
        ({"model": "larger"}, "model: larger, there toy"),
        ({"prompt_set_sha256": "1"}, "prompts' content: 1, there 000000000000…"),
        ({"max_new_tokens": 7}, "new tokens: 7, there 128"),
        ({"temperature": 1.0}, "temperature: 1.0, there 0.0"),
        ({"acceptance": "tau:4.0"}, "drawn acceptance: tau:4.0, there not recorded"),
        ({"device_map": "auto"}, "device map: auto, there not recorded"),
        ({"host": {"instruction_sets": "avx2"}}, "instruction_sets: avx2, there not recorded"),
    ],
)
def test_unlike_runs_stand_apart_and_say_in_what_they_differ(changes: dict[str, object], told: str) -> None:
    first, second = found(of(), of(**changes))
    assert first.differs == ()
    assert told in second.differs
    page = render([of(), of(**changes)])
    assert page.count("NOT COMPARABLE") == 1


def test_another_seed_is_another_task_only_where_it_is_drawn_with() -> None:
    assert len(found(of(seed=1), of(seed=2))) == 1
    _, second = found(of(seed=1, temperature=1.0), of(seed=2, temperature=1.0))
    assert second.differs == ("seed: 2, there 1",)


def test_runs_of_other_memory_budgets_stand_apart() -> None:
    _, second = found(of(), of(vram_budget_bytes=2**30))
    assert second.differs == ("memory budget in bytes: 1073741824, there not recorded",)


def test_synthetic_runs_of_other_acceptance_stand_apart() -> None:
    drawn = [
        run(*(msgspec.structs.replace(each, synthetic=True) for each in of().rows), acceptance=acceptance)
        for acceptance in ("tau:2.0", "tau:4.0")
    ]
    _, second = found(*drawn)
    assert second.differs == ("drawn acceptance: tau:4.0, there tau:2.0",)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"runtime": "graph"}, {"32 bits, eager", "32 bits, graph"}),
        ({"context": 4096}, {"32 bits, prompts as they are", "32 bits, 4,096 tokens of context"}),
    ],
)
def test_targets_of_one_board_are_told_apart_by_name(changes: dict[str, object], names: set[str]) -> None:
    (board,) = found(of(), run(trial(cell("ar", **changes), device_name="card")))
    assert {entry.target for entry in board.entries} == names


def test_synthetic_runs_never_stand_beside_real_ones() -> None:
    made_up = run(*(msgspec.structs.replace(each, synthetic=True) for each in of().rows))
    with pytest.raises(UserError, match="never put together"):
        render([of(), made_up])


def test_one_run_needs_no_leaderboard() -> None:
    assert "Leaderboard" not in render([of()])
