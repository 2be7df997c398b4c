"""Is a method's greedy text the target's own? What is compared, how a difference is judged, and the file of findings.

A text that parts from the reference is judged at its first differing token, by how far both tokens are below the best
one in float64: so close that rounding can explain it (NEAR_TIE) and it is a near-tie, else the method DIVERGED. In 8
and 4 bits the target disagrees with itself between one token and several at a time, so a difference says nothing there
(`untestable`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from scipy import stats as scipy_stats

from harness.decode import Step
from harness.errors import UserError
from harness.metrics import NEAR_TIE, depth_counts, first_difference
from harness.results import UNREADABLE, append_line

VERSION = 1
TESTABLE = 0.01
"share of argmaxes that a quantised target may flip against itself before a difference means nothing"
CHANCE = 0.01
"p-value below which a method parts from a quantised target more often than that target from itself"

OPENING = b'{"type":"heading"'
Outcome = Literal["identical", "near-tie", "DIVERGED", "untestable"]
Word = Literal["identical", "near-tie", "DIVERGED", "not testable in these bits", "lossy by design"]
Gap = Callable[[int], float]
"position of the first differing token -> how far the worse of the two tokens is below the best logit, in float64"


class Heading(msgspec.Struct, frozen=True, kw_only=True, tag="heading"):
    """What all lines of a file have in common; files with unlike headings are not merged."""

    version: int = VERSION
    model: str
    weights_sha256: str
    bits: str
    prompts_sha256: str
    max_new_tokens: int
    reference: Literal["generate", "ar"]
    "transformers' own generate, or at less than 32 bits the same loop's `ar`"
    system: str | None = None
    raw: bool = False


class Reference(msgspec.Struct, frozen=True, kw_only=True, tag="reference"):
    """The target's own answer to one turn."""

    weights: str
    "`base`, or what was merged into the target"
    prompt_id: str
    turn: int
    prompt_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.weights, self.prompt_id, self.turn)


class Finding(msgspec.Struct, frozen=True, kw_only=True, tag="finding"):
    """One method's answer to one turn, compared."""

    method: str
    "as the user wrote it"
    weights: str
    prompt_id: str
    turn: int
    outcome: Outcome
    compared: int
    "tokens that agree with the reference, from the first on"
    margin: float | None
    "of a difference, in logits; None where there is none, or where one text ends early"
    new_tokens: tuple[int, ...]
    rounds: int
    "verify passes"
    drafted: tuple[int, ...]
    "by depth, rounds that drafted so deep and had all before it accepted"
    accepted: tuple[int, ...]
    "by depth, rounds that accepted it"
    lossless: bool = True
    "what the method promises"
    made_with: str | None = None
    "code, drafter and libraries, as a hash: others may write another text"

    @property
    def key(self) -> tuple[str, str, str, int]:
        return (self.method, self.weights, self.prompt_id, self.turn)


class Control(msgspec.Struct, frozen=True, kw_only=True, tag="control"):
    """A quantised target against itself: its own text, scored several tokens at a time instead of one."""

    weights: str
    positions: int
    flips: int
    "positions whose argmax is another token"


Line = Heading | Reference | Finding | Control


class Judgement(msgspec.Struct, frozen=True):
    outcome: Outcome
    compared: int
    margin: float | None


def judge(reference: Sequence[int], text: Sequence[int], bits: str, gap: Gap) -> Judgement:
    """Compare two texts; `gap` is asked at most once."""
    place = first_difference(reference, text)
    if place is None:
        return Judgement("identical", len(reference), None)
    if bits not in NEAR_TIE:
        return Judgement("untestable", place, None)
    if place >= min(len(reference), len(text)):
        return Judgement("DIVERGED", place, None)
    margin = gap(place)
    return Judgement("near-tie" if margin < NEAR_TIE[bits] else "DIVERGED", place, margin)


def acceptance(steps: Iterable[Step]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(drafted, accepted) by depth, as in a `Finding`."""
    passes = Counter((step.drafted_depth, step.accepted) for step in steps if step.drafted)
    deepest = max((depth for depth, _ in passes), default=0)
    counts = [depth_counts(passes, depth) for depth in range(1, deepest + 1)]
    return tuple(drafted for drafted, _ in counts), tuple(accepted for _, accepted in counts)


# --- the file ---------------------------------------------------------------------------------------------------------


def append(path: Path, line: Line) -> None:
    """Add one line, durably: a run that is killed loses nothing that it had finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, line)


def cut_torn_line(path: Path) -> None:
    """Drop what a killed run left of its last line. Raises UserError, and changes nothing, for a foreign file."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole:
        _lines(path)
    elif content[: len(OPENING)] != OPENING[: len(content)]:
        raise UserError(f"{path} is no file of `verify`: give another --out")
    if whole != content:
        os.truncate(path, len(whole))


def read(paths: Iterable[Path]) -> tuple[Heading, list[Reference], list[Finding]]:
    """All lines of some files, each key once. Raises UserError where they do not belong together."""
    headings: dict[Heading, Path] = {}
    references: dict[tuple[str, str, int], Reference] = {}
    findings: dict[tuple[str, str, str, int], Finding] = {}
    for path in paths:
        for line in _lines(path):
            match line:
                case Heading():
                    headings.setdefault(line, path)
                case Reference():
                    references[line.key] = line
                case Finding():
                    findings[line.key] = line
                case Control():
                    pass
    if len(headings) != 1:
        names = ", ".join(map(str, headings.values())) or "these files"
        what = "were made with different settings" if headings else "hold no findings"
        raise UserError(f"{names} {what}: give files of one `python -m harness verify`")
    return next(iter(headings)), list(references.values()), list(findings.values())


def read_controls(paths: Iterable[Path]) -> dict[str, Control]:
    """By weights, over all files; empty where the target is not quantised."""
    found: dict[str, Control] = {}
    for line in (line for path in dict.fromkeys(paths) for line in _lines(path)):
        if isinstance(line, Control):
            before = found.get(line.weights, Control(weights=line.weights, positions=0, flips=0))
            found[line.weights] = Control(
                weights=line.weights, positions=before.positions + line.positions, flips=before.flips + line.flips
            )
    return found


def _lines(path: Path) -> Iterable[Line]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a file that `verify` wrote") from None
    whole = content[: content.rfind(b"\n") + 1]
    try:
        return [msgspec.json.decode(line, type=Line) for line in whole.splitlines()]
    except UNREADABLE as error:
        raise UserError(f"{path} is no file of `verify`, or of a newer one ({error})") from None


# --- what it comes to -------------------------------------------------------------------------------------------------


def verdict(findings: Sequence[Finding], bits: str, control: Control | None) -> Word:
    """What all of one method's turns come to."""
    outcomes = {finding.outcome for finding in findings}
    if not all(finding.lossless for finding in findings):
        return "lossy by design"
    if outcomes <= {"identical"}:
        return "identical"
    if bits in NEAR_TIE:
        return "DIVERGED" if "DIVERGED" in outcomes else "near-tie"
    if control is None or control.flips > TESTABLE * control.positions:
        return "not testable in these bits"
    return "DIVERGED" if excess(findings, control) < CHANCE else "near-tie"


def excess(findings: Sequence[Finding], control: Control) -> float:
    """p-value that the method parts from the text more often, a position, than the target does from itself.

    Up to where a text parts every position was decided after the same tokens, so each is one trial.
    """
    parted = sum(finding.outcome != "identical" for finding in findings)
    same = sum(finding.compared for finding in findings)
    table = [[parted, same], [control.flips, control.positions - control.flips]]
    return float(scipy_stats.fisher_exact(table, alternative="greater").pvalue)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One method over all its turns."""

    verdict: Word

    method: str
    weights: str
    turns: int
    tokens: int
    outcomes: dict[str, int]
    "turns by outcome"
    tau: float | None
    "tokens per round: (new tokens - 1) / verify passes, over all turns"
    acceptance: tuple[float, ...]
    "by depth, the share accepted of what was drafted there and had all before it accepted"


def summary(findings: Iterable[Finding], bits: str, controls: Mapping[str, Control]) -> list[Row]:
    """Methods in order of first appearance."""
    grouped: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        grouped.setdefault((finding.method, finding.weights), []).append(finding)
    return [
        _row(method, weights, own, verdict(own, bits, controls.get(weights)))
        for (method, weights), own in grouped.items()
    ]


def _row(method: str, weights: str, own: Sequence[Finding], word: Word) -> Row:
    rounds = sum(finding.rounds for finding in own)
    drafted, accepted = (_added(getattr(finding, name) for finding in own) for name in ("drafted", "accepted"))
    outcomes = [finding.outcome for finding in own]
    return Row(
        verdict=word,
        method=method,
        weights=weights,
        turns=len(own),
        tokens=sum(finding.compared for finding in own),
        outcomes={outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)},
        tau=sum(len(finding.new_tokens) - 1 for finding in own) / rounds if rounds else None,
        acceptance=tuple(a / d for a, d in zip(accepted, drafted, strict=True) if d),
    )


def _added(counts: Iterable[tuple[int, ...]]) -> list[int]:
    total: list[int] = []
    for each in counts:
        total += [0] * (len(each) - len(total))
        for depth, count in enumerate(each):
            total[depth] += count
    return total
