"""The training loop: one forward of the frozen target a batch, shared by all methods; then each method learns from it.

So every method sees the same tokens, anchors and teacher, and what each costs on top of the shared forward is measured
apart. Shape letters: `harness.lesson`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from harness.attention import CacheView
from harness.cache import KVCache
from harness.errors import UserError
from harness.lesson import Lesson, Trainee
from harness.signals import STOPS, handled
from harness.train.corpus import Corpus
from harness.trunk import DraftHead, Trunk

REPEATED = 4
"a token that ends this long a piece of text for the second time is a repetition"
REPEAT_WEIGHT = 0.1
"weight of a place where the text repeats itself: half of a small model's greedy text does, and it is easy"
RANKS = 10
"how many of a drafter's guesses the evaluation ranks (Medusa's tree is built from them)"


@dataclass(frozen=True)
class Recipe:
    """How to train; the same for every method."""

    tokens: int
    "seen in training, all epochs together"
    batch: int = 64
    anchors: int = 48
    "places in each sequence where the methods draft"
    learning_rate: float = 1e-3
    warmup: int = 50
    "steps"
    clip: float = 1.0
    seed: int = 0
    held_out: int = 128
    "sequences kept apart, at most a tenth of the text"

    def steps(self, length: int) -> int:
        return max(1, round(self.tokens / (self.batch * length)))


@dataclass
class Cost:
    """What one method, or the shared forward, has taken so far."""

    seconds: float = 0.0
    flops: float = 0.0
    peak_allocated_bytes: int | None = None


@dataclass
class Pupil:
    """A method in training."""

    trainee: Trainee
    optimizer: torch.optim.Optimizer
    cost: Cost = field(default_factory=Cost)
    loss: float = float("nan")


@dataclass(frozen=True)
class Report:
    """Progress: the step just done, and the newest losses and held-out figures."""

    step: int
    steps: int
    losses: Mapping[str, float]
    taus: Mapping[str, float]


@dataclass(frozen=True)
class Agreement:
    """Held-out: how often the r-th guess at depth j is the target's choice, (K, RANKS); tokens a round of a chain."""

    rank_accuracy: list[list[float]]
    tau: float


class Classroom:
    """A target, a corpus and the methods that learn from them."""

    def __init__(
        self, trunk: Trunk, corpus: Corpus, trainees: Mapping[str, Trainee], vocabulary_V: Tensor | None, recipe: Recipe
    ) -> None:
        self.trunk, self.corpus, self.recipe = trunk, corpus, recipe
        self.pupils = {name: Pupil(trainee, _optimizer(trainee, recipe, trunk)) for name, trainee in trainees.items()}
        self.head = DraftHead(trunk, vocabulary_V)
        self.row_of_V = _rows(vocabulary_V, trunk)
        self.taps = frozenset(tap % (trunk.depth + 1) for trainee in trainees.values() for tap in trainee.taps)
        self.depths = max(trainee.depths for trainee in trainees.values())
        self.shared = Cost()
        self.step = 0
        rows, self.length = corpus.ids_RT.shape
        self.steps = recipe.steps(self.length)
        held_out = max(1, min(recipe.held_out, rows // 10))
        self.weight_RT = places(corpus.greedy_RT, self.depths) * novelty(corpus.ids_RT)
        usable = (self.weight_RT > 0).any(1)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(recipe.seed))
        order = order[usable[order]]
        if order.numel() <= held_out:
            raise UserError("too little text to train on: give more `--corpus-tokens`, or a longer answer in your data")
        self.held_out_R, self.train_R = order[:held_out], order[held_out:]
        self._cache: KVCache | None = None

    def run(
        self,
        *,
        on_report: Callable[[Report], None] = lambda report: None,
        evaluate_every: int = 200,
        save: Callable[[], None] = lambda: None,
        save_every_seconds: float = 120.0,
        stop_after_seconds: float | None = None,
    ) -> bool:
        """Train to the end, or until the time is up: True when it is finished.

        Raises KeyboardInterrupt, once what was learned is saved, where somebody asks to stop.
        """
        started = saved = time.perf_counter()
        taus: dict[str, float] = {}
        with asked_to_stop() as stopping:
            while self.step < self.steps:
                self.advance()
                if stopping() and self.step < self.steps:
                    save()
                    told = f"interrupted after step {self.step} of {self.steps}: the same command goes on"
                    raise KeyboardInterrupt(told)
                if self.step % evaluate_every == 0 or self.step == self.steps:
                    taus = {name: agreement.tau for name, agreement in self.evaluate().items()}
                if self.step % 10 == 0 or self.step == self.steps:
                    losses = {name: float(pupil.loss) for name, pupil in self.pupils.items()}
                    on_report(Report(self.step, self.steps, losses, taus))
                now = time.perf_counter()
                if now - saved > save_every_seconds:
                    save()
                    saved = now
                if stop_after_seconds is not None and now - started > stop_after_seconds:
                    save()
                    return self.step == self.steps
        return True

    def advance(self) -> None:
        """One step of every method on one batch."""
        counting = self.step == 0
        generator = torch.Generator().manual_seed((self.recipe.seed * 1_000_003 + self.step) % 2**63)
        pick = torch.randint(self.train_R.numel(), (min(self.recipe.batch, self.train_R.numel()),), generator=generator)
        with self._charge(self.shared, counting):
            lesson = self._lesson(self.train_R[pick], generator)
        for pupil in self.pupils.values():
            with self._charge(pupil.cost, counting):
                self._learn(pupil, lesson)
        self.step += 1

    def _learn(self, pupil: Pupil, lesson: Lesson) -> None:
        scale = self._schedule()
        for group in pupil.optimizer.param_groups:
            group["lr"] = scale * group["scale"] * self.recipe.learning_rate
        with self._precision():
            loss = pupil.trainee.loss(lesson)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in pupil.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], self.recipe.clip)
        pupil.optimizer.step()
        pupil.optimizer.zero_grad(set_to_none=True)
        pupil.loss = loss.detach()  # type: ignore[assignment]

    def _schedule(self) -> float:
        """Linear warm-up, then linear decay to zero."""
        warm = min(1.0, (self.step + 1) / max(1, min(self.recipe.warmup, self.steps // 10)))
        return warm * (1.0 - self.step / self.steps)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Agreement]:
        """Agreement with the target's choices on text that nobody trained on."""
        hits: dict[str, list[Tensor]] = {name: [] for name in self.pupils}
        generator = torch.Generator().manual_seed(self.recipe.seed)
        for rows in torch.split(self.held_out_R, self.recipe.batch):
            lesson = self._lesson(rows, generator)
            for name, pupil in self.pupils.items():
                with self._precision():
                    logits_BAKV = pupil.trainee.logits(lesson)
                guesses_BAKR = logits_BAKV.topk(min(RANKS, logits_BAKV.shape[-1]), dim=-1).indices
                depths = logits_BAKV.shape[2]
                hits[name].append((guesses_BAKR == lesson.choice_BAK[:, :, :depths, None]).flatten(0, 1).cpu())
        return {name: _agreement(torch.cat(parts)) for name, parts in hits.items()}

    @torch.no_grad()
    def _lesson(self, rows_B: Tensor, generator: torch.Generator) -> Lesson:
        device = self.trunk.device
        ids_BT = self.corpus.ids_RT[rows_B].to(device)
        weight_BT = self.weight_RT[rows_B]
        anchors_BA = torch.multinomial(weight_BT, self.recipe.anchors, replacement=True, generator=generator).to(device)
        batch = ids_BT.shape[0]
        if self._cache is None or next(iter(self._cache.keys.values())).shape[0] != batch:
            self._cache = self.trunk.cache(self.length, batch=batch)
        positions_T = torch.arange(self.length, device=device)
        view = CacheView(self._cache, 0, positions_T, None, self.trunk.windows)
        hidden_BTD, tapped = self.trunk.run(self.trunk.embed(ids_BT), positions_T, view, taps=self.taps)
        rows = torch.arange(batch, device=device)[:, None, None]
        spots_BAK = anchors_BA[:, :, None] + torch.arange(self.depths, device=device)
        teacher_BAKV = self.head.logits(hidden_BTD[rows, spots_BAK])
        choice_BAK = self.row_of_V[ids_BT[rows, spots_BAK + 1]]
        return Lesson(ids_BT, anchors_BA, tapped, self._cache, self.trunk, teacher_BAKV, choice_BAK)

    def _precision(self) -> torch.autocast:
        """Drafters keep float32 weights and compute in what the target computes in."""
        half = self.trunk.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.trunk.device.type, dtype=self.trunk.dtype if half else torch.bfloat16, enabled=half)

    @contextmanager
    def _charge(self, cost: Cost, counting: bool) -> Iterator[None]:
        """Add the time, and on the first step count the floating-point operations of every step, to a cost."""
        on_cuda = self.trunk.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        if counting:
            with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
                yield
            cost.flops = float(counter.get_total_flops())
        else:
            yield
        if on_cuda:
            torch.cuda.synchronize()
            cost.peak_allocated_bytes = max(cost.peak_allocated_bytes or 0, torch.cuda.max_memory_allocated())
        cost.seconds += time.perf_counter() - started

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on later, as flat tensors."""
        out = {"step": torch.tensor(self.step), "shared/cost": _cost_tensor(self.shared)}
        for name, pupil in self.pupils.items():
            out[f"{name}/cost"] = _cost_tensor(pupil.cost)
            out |= {f"{name}/module/{key}": value for key, value in pupil.trainee.module.state_dict().items()}
            for index, moments in pupil.optimizer.state_dict()["state"].items():
                out |= {f"{name}/optimizer/{index}/{key}": torch.as_tensor(value) for key, value in moments.items()}
        return {key: value.detach().contiguous().cpu() for key, value in out.items()}

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`. Raises UserError where it belongs to other methods or options."""
        self.step = int(state["step"])
        self.shared = _cost_from(state["shared/cost"])
        for name, pupil in self.pupils.items():
            module = {k.removeprefix(f"{name}/module/"): v for k, v in state.items() if k.startswith(f"{name}/module/")}
            try:
                pupil.trainee.module.load_state_dict(module)
            except RuntimeError as error:
                raise UserError(
                    f"the interrupted training was another one ({error}); start anew with `--restart`"
                ) from None
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                if key.startswith(f"{name}/optimizer/"):
                    index, kind = key.removeprefix(f"{name}/optimizer/").split("/")
                    moments.setdefault(int(index), {})[kind] = value
            groups = pupil.optimizer.state_dict()["param_groups"]
            pupil.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            pupil.cost = _cost_from(state[f"{name}/cost"])


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or a request to end came in the meantime: a step is not cut in half, but the second time it is."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    with handled(("SIGINT", *STOPS), ask):
        yield lambda: bool(asked)


def _attention_flops(query: Tensor, keys: Tensor, *_: Any, **__: Any) -> int:
    """Two products of M x S x d a query head; torch's own count refuses grouped queries."""
    batch, heads, size, width = query
    return int(4 * batch * heads * size * keys[2] * width)


def _attention_backward_flops(_: Tensor, query: Tensor, keys: Tensor, *__: Any, **___: Any) -> int:
    """Five products where forward has two."""
    return _attention_flops(query, keys) * 5 // 2


ATTENTION_FLOPS = {
    getattr(torch.ops.aten, name): flops
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    for name, flops in (
        (f"_scaled_dot_product_{kind}", _attention_flops),
        (f"_scaled_dot_product_{kind}_backward", _attention_backward_flops),
    )
    if hasattr(torch.ops.aten, name)
}


def places(greedy_RT: Tensor, depths: int) -> Tensor:
    """Where a draft can be judged, (R, T) bool: s and the `depths` tokens after it are all the target's own choice."""
    good = greedy_RT.clone()
    for ahead in range(1, depths + 1):
        good[:, :-ahead] &= greedy_RT[:, ahead:]
        good[:, -ahead:] = False
    good[:, 0] = False
    return good


def novelty(ids_RT: Tensor, rows: int = 256) -> Tensor:
    """(R, T): 1 where the token after this one is new text, REPEAT_WEIGHT where it only repeats the sequence's own."""
    weight_RT = torch.ones(ids_RT.shape)
    base = torch.tensor([1_000_003**power % (2**61 - 1) for power in range(REPEATED + 1)])
    for start in range(0, ids_RT.shape[0], rows):
        # Piece i ends with token i + REPEATED; its hash is equal to an earlier piece's where the text repeats.
        hashes_RP = (ids_RT[start : start + rows].unfold(1, REPEATED + 1, 1) * base).sum(-1)
        sorted_RP, order_RP = hashes_RP.sort(dim=1, stable=True)
        again_RP = F.pad(sorted_RP[:, 1:] == sorted_RP[:, :-1], (1, 0))  # all but the first of those that are equal
        seen_RP = torch.zeros_like(again_RP).scatter_(1, order_RP, again_RP)
        weight_RT[start : start + rows, REPEATED - 1 : -1][seen_RP] = REPEAT_WEIGHT
    return weight_RT


def draft_vocabulary(corpus: Corpus, size: int, vocabulary: int, keep: frozenset[int]) -> Tensor | None:
    """Ids of the most frequent greedy tokens, ascending, `keep` always among them; None for the whole vocabulary."""
    if size <= 0 or size >= vocabulary:
        return None
    counts = torch.bincount(corpus.ids_RT[corpus.greedy_RT], minlength=vocabulary)
    # What the greedy text never says may still be said: the rest is filled by what the sampled turns say.
    counts = counts * corpus.tokens + torch.bincount(corpus.ids_RT.flatten(), minlength=vocabulary)
    counts[list(keep)] = counts.max() + 1
    return counts.topk(size).indices.sort().values


def _rows(vocabulary_V: Tensor | None, trunk: Trunk) -> Tensor:
    ids = torch.arange(trunk.vocabulary, device=trunk.device)
    if vocabulary_V is None:
        return ids
    rows = torch.full_like(ids, -100)
    rows[vocabulary_V.to(trunk.device)] = torch.arange(vocabulary_V.numel(), device=trunk.device)
    return rows


def _optimizer(trainee: Trainee, recipe: Recipe, trunk: Trunk) -> torch.optim.Optimizer:
    fused = trunk.device.type == "cuda"
    return torch.optim.AdamW(
        trainee.groups(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
    )


def _agreement(hits_NKR: Tensor) -> Agreement:
    first_NK = hits_NKR[:, :, 0].float()
    tau = 1.0 + float(first_NK.cumprod(1).sum(1).mean())
    return Agreement([[round(float(x), 4) for x in row] for row in hits_NKR.float().mean(0)], tau)


def _cost_tensor(cost: Cost) -> Tensor:
    peak = -1.0 if cost.peak_allocated_bytes is None else float(cost.peak_allocated_bytes)
    return torch.tensor([cost.seconds, cost.flops, peak], dtype=torch.float64)


def _cost_from(tensor: Tensor) -> Cost:
    seconds, flops, peak = tensor.tolist()
    return Cost(seconds, flops, None if peak < 0 else int(peak))
