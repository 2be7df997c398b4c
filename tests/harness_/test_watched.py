"""What was drafted and did not enter the text, told after the trial."""

from __future__ import annotations

import torch

from harness.decode import Step
from harness.draft import Draft, chain
from harness.method import Method
from harness.watched import Watched

CPU = torch.device("cpu")


class Drafting(Method):
    """Draws every draft into the same buffer, as a captured graph does."""

    taps = (3,)

    def __init__(self, drafts: list[list[int]]) -> None:
        self.drafts, self.buffer = iter(drafts), torch.zeros(3, dtype=torch.long)

    def propose(self, tokens: object) -> Draft:
        self.buffer.copy_(torch.tensor(next(self.drafts)))
        return Draft(self.buffer, chain(3, CPU))


def step(accepted: int, *committed: int) -> Step:
    return Step(3, 3, accepted, committed, host_syncs=1)


def rejected(drafts: list[list[int]], *steps: Step) -> list[list[int]]:
    watched = Watched(Drafting(drafts))
    for _ in steps:
        watched.propose([])
    return watched.rejected(steps)


def test_a_buffer_that_is_used_again_keeps_no_draft_from_being_told() -> None:
    assert rejected([[1, 2, 3], [4, 5, 6]], step(1, 1, 9), step(0, 9)) == [[2, 3], [4, 5, 6]]


def test_a_bonus_token_that_was_drafted_elsewhere_is_still_a_rejected_draft() -> None:
    assert rejected([[1, 2, 7]], step(1, 1, 7)) == [[2, 7]]


def test_a_token_drafted_twice_is_accepted_once() -> None:
    assert rejected([[1, 1, 2]], step(1, 1, 5)) == [[1, 2]]


def test_what_the_limit_cut_off_did_not_enter_the_text() -> None:
    assert rejected([[1, 2, 3]], step(3, 1, 2)) == [[3]]


def test_everything_else_is_the_methods_own() -> None:
    assert Watched(Drafting([])).taps == (3,)
