"""How likely drafted tokens are accepted where no target can tell: given, published, or measured in another run.

`--acceptance 0.7,0.6,0.5` gives P(depth i accepted | depth i - 1 accepted) for depths 1, 2, 3, and the last holds for
all deeper ones. A figure of tokens per round becomes a profile by one rule: the same chance at every depth, such that
the tokens per round over the depths that the method drafts are that figure (a dynamic tree that is shallower in a round
gives less). Values only: the verdicts themselves are drawn in `harness.drawn`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from harness.errors import UserError

SPEC_BENCH = {
    "eagle-2": 4.34,
    "eagle-1": 3.58,
    "hydra": 3.26,
    "medusa": 2.31,
    "draft-model": 2.28,
    "prompt-lookup": 1.75,
    "lookahead": 1.64,
}
"""Mean tokens per round, Vicuna-7B, greedy, fp16, batch one: Spec-Bench's leaderboard, commit fd2c1cd, 2025-04-22."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Either the chances by depth, or the tokens per round that a constant chance shall give."""

    chances: tuple[float, ...] = ()
    tau: float | None = None

    def by_depth(self, depths: int) -> tuple[float, ...]:
        """P(depth accepted | the one above accepted) for depths 1 .. `depths`."""
        if self.tau is not None:
            return (constant_chance(self.tau, depths) or 0.0,) * depths
        return tuple(self.chances[min(depth, len(self.chances) - 1)] for depth in range(depths))


def expected_tau(chances: Sequence[float]) -> float:
    """Tokens per round: 1 + the sum over depths of the chance that all depths down to it are accepted."""
    total = reached = 1.0
    for chance in chances:
        reached *= chance
        total += reached
    return total


def constant_chance(tau: float, depths: int) -> float | None:
    """The chance at each of `depths` depths that gives `tau` tokens per round; 1 where none does, None for no depth."""
    if depths < 1:
        return None
    found = even_chance(tau, {depths: 1})
    return 1.0 if found is None else found


def even_chance(tau: float, passes: Mapping[int, int]) -> float | None:
    """The chance at every depth that gives `tau` over passes by the depth that they draft; None where none does."""
    count = sum(passes.values())
    deepest = max(passes, default=0)

    def given(chance: float) -> float:
        return sum(many * expected_tau([chance] * depth) for depth, many in passes.items()) / count

    if not deepest or given(1.0) < tau:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if given(middle) < tau else (low, middle)
    return high


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """What `--acceptance` says, for each method."""

    said: str
    common: Profile | None = None
    by_label: dict[str, Profile] = {}
    "by label, then by method"

    def of(self, label: str, method: str, options: Mapping[str, Any]) -> Profile | None:
        """None where nothing is known of this method."""
        return self.common or self.by_label.get(label) or self.by_label.get(_kind(method, options))


def _kind(method: str, options: Mapping[str, Any]) -> str:
    """Published EAGLE figures are of trees, Spec-Bench's EAGLE-2 of dynamic ones; no tree's are a chain's."""
    if method == "eagle":
        return "eagle-2" if options.get("nodes") else "eagle chain"
    if method == "s3d" and options.get("nodes"):
        return f"s3d {options.get('tree', 'static')} tree"
    return method


def read(said: str | Sequence[float]) -> Acceptance:
    """`0.7,0.6`, `tau:2.5`, `published:NAME` or `from:RUN`. Raises UserError."""
    text = said if isinstance(said, str) else ",".join(map(str, said))
    kind, colon, rest = text.partition(":")
    match kind if colon else "":
        case "tau":
            return Acceptance(said=text, common=Profile(tau=_number(rest, text, least=1.0, most=float("inf"))))
        case "published":
            return _published(rest, text)
        case "from":
            return _measured(Path(rest).expanduser(), text)
    chances = tuple(_number(part, text, least=0.0, most=1.0) for part in text.split(","))
    return Acceptance(said=text, common=Profile(chances=chances))


def _number(part: str, text: str, *, least: float, most: float) -> float:
    try:
        value = float(part)
    except ValueError:
        value = float("nan")
    if not least <= value <= most or math.isinf(value):
        raise UserError(
            f"acceptance {text!r}: {part.strip()!r} is no chance; give 0.7,0.6,0.5 (by depth), tau:2.5 (tokens a "
            "round, from 1), published:NAME or from:RUN"
        )
    return value


def _published(name: str, text: str) -> Acceptance:
    if name == "spec-bench":
        return Acceptance(said=text, by_label={row: Profile(tau=tau) for row, tau in SPEC_BENCH.items()})
    if name not in SPEC_BENCH:
        raise UserError(
            f"nothing published as {name!r} is known: there is spec-bench (each method its own), or, for all methods "
            f"alike, {', '.join(SPEC_BENCH)}"
        )
    return Acceptance(said=text, common=Profile(tau=SPEC_BENCH[name]))


def _measured(directory: Path, text: str) -> Acceptance:
    """A finished run's acceptance by depth. Raises UserError where it is none, or was drawn itself."""
    from harness.metrics import summary
    from harness.results import read_run

    run = read_run(directory)
    if any(trial.synthetic for trial in run.rows):
        raise UserError(f"{directory} is synthetic itself: its acceptance was drawn; name a run of a real model")
    found: dict[str, Profile] = {}
    for row in summary(run):
        chances = [depth.probability for depth in row.acceptance]
        known = tuple(chance for chance in chances if chance is not None)
        if known:
            for name in (row.cell.label, _kind(row.cell.method, row.cell.options)):
                found.setdefault(name, Profile(chances=known))
    if not found:
        raise UserError(f"in {directory} no method drafted anything: there is no acceptance to draw from")
    return Acceptance(said=text, by_label=found)
