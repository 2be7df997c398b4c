"""Where a round's time goes, and how that explains a speed-up. Values only.

A round gives tau tokens and costs so many steps of the baseline, which gives one token a step, so that
speed-up = tau / cost. The cost is taken from the phases, the speed-up from the stopwatch: that both say the same shows
that nothing happens outside the phases, in the method's rounds or in the baseline's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from harness.results import Roofline, Trial

ADDS_UP = 0.03
"share of the measured time that may lie outside the phases"
QUIET = 10
"percentile"


class RoundCost(msgspec.Struct, frozen=True, kw_only=True):
    """A cell's mean round, over the trials whose phases are known."""

    phase_seconds: dict[str, float]
    "by phase, in the order of a round"
    measured_seconds: float
    "decode time a round"
    in_steps: dict[str, float] = {}
    "the phases in steps of the baseline, over the trials that both sides finished; empty without a baseline"
    explained_speedup: float | None = None
    "tau / cost over those trials"
    difference: float | None = None
    "of that from the measured speed-up, relative to it"

    @property
    def unattributed_seconds(self) -> float:
        """Time outside the phases; negative where they overlap."""
        return self.measured_seconds - sum(self.phase_seconds.values())

    @property
    def attributed_share(self) -> float:
        """Of the measured time, what the phases account for."""
        return sum(self.phase_seconds.values()) / self.measured_seconds

    @property
    def adds_up(self) -> bool:
        return abs(self.attributed_share - 1) <= ADDS_UP

    @property
    def steps(self) -> float | None:
        """Cost of a round in steps of the baseline."""
        return sum(self.in_steps.values()) or None


def round_cost(trials: Sequence[Trial], base: Sequence[Trial] = (), speedup: float | None = None) -> RoundCost | None:
    """Of good trials, held against the baseline's where there are such; None where no trial tells its phases.

    `speedup` is the measured one, over the same pairs of trials.
    """
    told = [trial for trial in trials if _tells(trial)]
    rounds = _rounds(told)
    if not rounds:
        return None
    cost = RoundCost(
        phase_seconds=_phases(told), measured_seconds=sum(trial.decode_seconds or 0.0 for trial in told) / rounds
    )
    partners = {_pair(trial): trial for trial in base if _tells(trial)}
    paired = [trial for trial in told if _pair(trial) in partners]
    step_seconds = sum(_phases([partners[_pair(trial)] for trial in paired]).values())
    if not step_seconds:
        return cost
    cost = msgspec.structs.replace(
        cost, in_steps={name: seconds / step_seconds for name, seconds in _phases(paired).items()}
    )
    if speedup is None or cost.steps is None:
        return cost
    explained = sum(sum(trial.committed or ()) for trial in paired) / _rounds(paired) / cost.steps
    return msgspec.structs.replace(cost, explained_speedup=explained, difference=explained / speedup - 1)


def quiet_pass_seconds(trials: Iterable[Trial]) -> float | None:
    """What a pass costs while nothing disturbs the machine; None where no trial tells its passes.

    Passes that draft equally many tokens do nearly the same work, and what disturbs one only adds to it: of each such
    kind the 10th percentile, weighted by how many there are. A cost that fewer than nine passes in ten have is not
    seen, one that grows with the context is seen at the short end, and a kind of a few passes has no quiet one.
    """
    kinds: dict[int, list[float]] = {}
    for trial in trials:
        for drafted, seconds in zip(trial.drafted or (), trial.round_seconds or (), strict=False):
            kinds.setdefault(drafted, []).append(seconds)
    count = sum(map(len, kinds.values()))
    return sum(len(each) * float(np.percentile(each, QUIET)) for each in kinds.values()) / count if count else None


def _tells(trial: Trial) -> bool:
    return bool(trial.phase_seconds and trial.committed and trial.decode_seconds)


def _pair(trial: Trial) -> tuple[str, int, int]:
    return (trial.prompt_id, trial.turn, trial.round)


def _rounds(trials: Iterable[Trial]) -> int:
    return sum(len(trial.committed or ()) for trial in trials)


def _phases(trials: Sequence[Trial]) -> dict[str, float]:
    """Seconds a round, by phase; empty for no rounds."""
    sums: dict[str, float] = {}
    for trial in trials:
        for name, seconds in (trial.phase_seconds or {}).items():
            sums[name] = sums.get(name, 0.0) + seconds
    return {name: seconds / _rounds(trials) for name, seconds in sums.items()}


def floor_share(trials: Iterable[Trial], device: Roofline | None) -> float | None:
    """How near verifying is to what the bandwidth allows: the floor of a baseline step over a pass's measured time.

    Over the good trials on that very device; None where it, the bytes or the phases are unknown.
    """
    floor = verify = 0.0
    for trial in trials:
        seconds = (trial.phase_seconds or {}).get("verify", 0.0)
        here = device is not None and (trial.device_name, trial.device_uuid) == (device.device_name, device.device_uuid)
        if device is not None and here and trial.pass_bytes is not None and trial.committed and seconds:
            floor += len(trial.committed) * trial.pass_bytes / device.read_bytes_per_second
            verify += seconds
    return floor / verify if verify else None
