"""What may not get worse: gates, and how a change is held against one.

A gate fails only where the whole interval of the change is beyond its threshold. What cannot be judged is said, with
the reason, and is neither a pass nor a failure.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from harness.errors import UserError
from harness.stats import Interval

DEFAULT_GATES = ("tau<-1%", "speedup<-5%", "peak_bytes>+2%", "lossless", "output")

Status = Literal["ok", "regressed", "not judged"]


@dataclass(frozen=True)
class Metric:
    kind: Literal["absolute", "ratio", "deterministic"]
    better: Literal["more", "less"]
    unit: str
    meaning: str


METRICS = {
    "tau": Metric("deterministic", "more", "tokens/pass", "tokens per verify pass"),
    "speedup": Metric("ratio", "more", "x", "decode speed over that of plain decoding in the same rounds"),
    "pass_cost": Metric("ratio", "less", "x", "an undisturbed pass, in passes of plain decoding in the same rounds"),
    "per_gib": Metric("ratio", "more", "x", "decode speed per peak byte, over that of plain decoding"),
    "held_bytes": Metric("deterministic", "less", "bytes", "weights, drafter and cache"),
    "speed": Metric("absolute", "more", "tok/s", "decode speed"),
    "first_token_seconds": Metric("absolute", "less", "s", "time to the first token, mean"),
    "peak_bytes": Metric("absolute", "less", "bytes", "peak memory"),
    "joules_per_token": Metric("absolute", "less", "J", "energy per new token"),
}


@dataclass(frozen=True)
class Gate:
    """`tau<-1%`: fails where the change is surely below -1 %. `lossless` and `output` have no threshold."""

    text: str
    metric: str
    below: bool = False
    threshold: float = 0.0
    "a relative change: -0.01"


@dataclass(frozen=True)
class Change:
    """One metric of one cell on both sides."""

    metric: str
    base: float
    new: float
    change: Interval | None
    "new / base; None where it must not be taken"
    reason: str | None = None
    "why not, or why it has no interval"


@dataclass(frozen=True)
class Judgement:
    """What one gate says of one cell."""

    gate: str
    cell: str
    status: Status
    reason: str


def parse_gate(text: str) -> Gate:
    """Raises UserError saying how a gate is written."""
    plain = text.replace(" ", "")
    if plain in ("lossless", "output"):
        return Gate(plain, plain)
    match = re.fullmatch(r"(\w+)([<>])([+-]?\d+(?:\.\d+)?)%", plain)
    if match is None:
        raise UserError(f"no gate {text!r}: write 'tau<-1%', 'peak_bytes>+2%', lossless or output")
    name, sign, percent = match.groups()
    if name not in METRICS:
        close = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"gate {text!r}: no metric {name!r}{hint}; there are {', '.join(METRICS)}")
    return Gate(plain, name, sign == "<", float(percent) / 100)


def judge(gate: Gate, change: Change | None) -> tuple[Status, str]:
    """A threshold against a change; `regressed` only where the whole interval is beyond it."""
    if change is None:
        return "not judged", "one side has no such figure"
    if change.change is None:
        return "not judged", change.reason or "not comparable"
    interval = change.change
    told = f"{percent(interval.value - 1)}{between(interval)}"
    if interval.low is None or interval.high is None:
        return "not judged", change.reason or "no interval"
    limit = 1 + gate.threshold
    beyond = interval.high < limit if gate.below else interval.low > limit
    if beyond:
        return "regressed", told
    past = interval.value < limit if gate.below else interval.value > limit
    return "ok", f"{told}: too uncertain to count" if past else told


def percent(share: float) -> str:
    """`-1.25 %`, and `0 %` for what is nothing."""
    return f"{100 * share:+.2f} %" if round(100 * share, 2) else "0 %"


def between(interval: Interval) -> str:
    if interval.low is None or interval.high is None or interval.low == interval.high:
        return ""
    return f" ({percent(interval.low - 1)} to {percent(interval.high - 1)})"
