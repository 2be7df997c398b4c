"""One side of a comparison: the runs that a path named, as one set, and one cell's figures in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import geometric_mean

import pandas as pd

from harness import metrics
from harness.decomposition import quiet_pass_seconds
from harness.metrics import Row, pairs_of, sides_by, standings_of, trial_frame
from harness.results import BASELINE, Cell, Run, Trial
from harness.stats import Ratio


@dataclass(frozen=True)
class Side:
    """One set of results: the runs that a path named, as one."""

    name: str
    runs: tuple[Run, ...]

    @cached_property
    def good(self) -> pd.DataFrame:
        """Good trials; `round` is a process of its own, whichever run it was in."""
        frames = [trial_frame(run).assign(number=index) for index, run in enumerate(self.runs)]
        frame = pd.concat(frames, ignore_index=True)
        frame["round"] = frame.number.astype(str) + "/" + frame["round"].astype(str)
        frame["held_bytes"] = frame.weights_bytes + frame.drafter_bytes + frame.cache_bytes
        return frame[frame.outcome == "ok"]

    @cached_property
    def trials(self) -> dict[tuple[str, str], dict[tuple[str, int], Trial]]:
        """Good ones by cell and round, and there by turn."""
        found: dict[tuple[str, str], dict[tuple[str, int], Trial]] = {}
        for number, run in enumerate(self.runs):
            for trial in run.rows:
                if trial.outcome == "ok":
                    found.setdefault((trial.cell.id, f"{number}/{trial.round}"), {})[trial.prompt_id, trial.turn] = (
                        trial
                    )
        return found

    @cached_property
    def failed(self) -> dict[str, dict[tuple[str, int], str]]:
        """By cell, the turns that failed, and how."""
        found: dict[str, dict[tuple[str, int], str]] = {}
        for run in self.runs:
            for trial in run.rows:
                if trial.outcome != "ok":
                    how = f"{trial.outcome}: {trial.reason or 'no reason recorded'}"
                    found.setdefault(trial.cell.id, {})[trial.prompt_id, trial.turn] = how
        return found

    @cached_property
    def cells(self) -> dict[str, Cell]:
        return {cell.id: cell for run in self.runs for cell in run.manifest.cells}

    @cached_property
    def verdicts(self) -> dict[str, Row]:
        """The row of each cell whose verdict is worst over the runs."""
        rows = [row for run in self.runs for row in metrics.summary(run)]
        return {row.cell.id: row for row in sorted(rows, key=lambda row: row.verdict.kind in metrics.BROKEN)}

    def answers(self, cell: str) -> dict[tuple[str, int], list[int]]:
        """The first text of every turn."""
        found: dict[tuple[str, int], list[int]] = {}
        for run in self.runs:
            for trial in run.rows:
                if trial.cell.id == cell and trial.outcome == "ok" and trial.new_tokens is not None:
                    found.setdefault((trial.prompt_id, trial.turn), trial.new_tokens)
        return found


@dataclass(frozen=True)
class Own:
    """One cell of one side, over the turns that count."""

    side: Side
    id: str
    turns: set[tuple[str, int]] | None
    "None: all of them"

    @cached_property
    def good(self) -> pd.DataFrame:
        return self._of(self.id)

    @cached_property
    def once(self) -> pd.DataFrame:
        """One trial of each turn: what is the same in every round has one weight, however many rounds finished it."""
        return self.good.drop_duplicates(["prompt_id", "turn"])

    def _of(self, id: str) -> pd.DataFrame:
        frame = self.side.good[(self.side.good.cell == id) & (self.side.good.decode_tokens > 0)]
        if self.turns is None:
            return frame
        return frame.loc[[key in self.turns for key in zip(frame.prompt_id, frame.turn, strict=True)]]

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """With the baseline on the same target."""
        return pairs_of(self.good, self._baseline())

    def value(self, name: str) -> float | None:
        """Over all rounds; None where it was not measured, or says nothing."""
        if self.good.empty:
            return None
        match name:
            case "tau":
                return _over(self.once, "decode_tokens", "verify_passes")
            case "speed":
                return _over(self.good, "decode_tokens", "decode_seconds")
            case "joules_per_token":
                return _over(self.good, "energy_joules", "new_tokens")
            case "first_token_seconds":
                return _known(self.good.prefill_seconds.mean())
            case "speedup" | "per_gib":
                return self._relative(name)
            case "pass_cost":
                return geometric_mean(self._pass_costs) if self._pass_costs else None
        return _known(self.good[name].max())

    def _relative(self, name: str) -> float | None:
        if self.pairs.empty or self.side.cells[self.id].method == BASELINE:
            return None
        own, base = sides_by(self.pairs, "round")
        speedup = own.value / base.value
        if name == "speedup":
            return speedup
        peaks = [_known(self.pairs[of].max()) for of in ("peak_bytes", "peak_bytes_base")]
        return speedup * peaks[1] / peaks[0] if peaks[0] and peaks[1] else None

    def _baseline(self) -> pd.DataFrame:
        return self._of(self._baseline_id)

    @property
    def _baseline_id(self) -> str:
        target = self.side.cells[self.id].target
        ids = [id for id, cell in self.side.cells.items() if cell.method == BASELINE and cell.target == target]
        return ids[0] if ids else ""

    @cached_property
    def _pass_costs(self) -> list[float]:
        """What an undisturbed pass costs in passes of the baseline, a round, over the turns that both finished."""
        if self.side.cells[self.id].method == BASELINE:
            return []
        found = []
        for number in dict.fromkeys(round for id, round in self.side.trials if id == self.id):
            own, base = (self.side.trials.get((id, number), {}) for id in (self.id, self._baseline_id))
            turns = [key for key in own.keys() & base.keys() if self.turns is None or key in self.turns]
            costs = [quiet_pass_seconds(each[key] for key in turns) for each in (own, base)]
            if costs[0] and costs[1]:
                found.append(costs[0] / costs[1])
        return found

    def per_round(self, name: str) -> list[float]:
        """One rate a round, of the rounds that have it."""
        match name:
            case "speed":
                return self._rates("decode_tokens", "decode_seconds")
            case "joules_per_token":
                return self._rates("energy_joules", "new_tokens")
            case "first_token_seconds":
                return [float(value) for value in self.good.groupby("round").prefill_seconds.mean().dropna()]
            case "speedup":
                return self._speedups()
            case "pass_cost":
                return self._pass_costs
            case "per_gib":
                peaks = self.pairs.groupby("round")[["peak_bytes_base", "peak_bytes"]].max()
                share = (peaks.peak_bytes_base / peaks.peak_bytes).dropna()
                speedups = dict(zip(sorted(set(self.pairs["round"])), self._speedups(), strict=True))
                return [speedups[round] * float(relative) for round, relative in share.items()]
        return [float(value) for value in self.good.groupby("round")[name].max().dropna()]

    def _speedups(self) -> list[float]:
        own, base = sides_by(self.pairs, "round")
        columns = zip(own.amount, own.per, base.amount, base.per, standings_of(self.pairs), strict=True)
        return [
            (tokens / seconds) / (base_tokens / base_seconds) / standing
            for tokens, seconds, base_tokens, base_seconds, standing in columns
        ]

    def _rates(self, amount: str, per: str) -> list[float]:
        return list(metrics.rate_by_round(self.good, amount, per).values())

    @cached_property
    def tau_by_prompt(self) -> Ratio:
        """Tokens and passes of each prompt, in the order of their names."""
        sums = self.once.groupby("prompt_id")[["decode_tokens", "verify_passes"]].sum()
        return Ratio(sums.decode_tokens.tolist(), sums.verify_passes.tolist())


def _over(frame: pd.DataFrame, amount: str, per: str) -> float | None:
    both = frame[frame[amount].notna() & frame[per].notna()]
    total = float(both[per].sum())
    return float(both[amount].sum()) / total if total > 0 else None


def _known(value: float) -> float | None:
    return None if pd.isna(value) else float(value)
