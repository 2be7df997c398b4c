"""What a method drafted and did not get accepted, for the page that shows it. Only the first round pays for it.

The drafts stay on the device until the trial is over: a small copy a round, and nothing that waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from harness.decode import Step
from harness.draft import Draft
from harness.method import Method


class Watched:
    """A method, and the tokens of its drafts since it was last asked."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._drafts: list[Tensor] = []

    def propose(self, tokens: Sequence[int]) -> Draft:
        draft = self._method.propose(tokens)
        self._drafts.append(draft.tokens_N.clone())  # a captured draft's buffer is used again
        return draft

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def rejected(self, steps: Sequence[Step]) -> list[list[int]]:
        """Of each verify pass, the drafted tokens that did not enter the text, in the order of the draft."""
        drafts, self._drafts = [draft.tolist() for draft in self._drafts], []
        return [_without(draft, step.committed[: step.accepted]) for draft, step in zip(drafts, steps, strict=True)]


def _without(draft: Sequence[int], accepted: Sequence[int]) -> list[int]:
    entered = Counter(accepted)
    left = []
    for token in draft:
        if entered[token]:
            entered[token] -= 1
        else:
            left.append(token)
    return left
