"""From what the user asked for to what will be run. Values in, values out: nothing is loaded, measured or written here.

A `Request` is the command line, a TOML file or the arguments of `harness.run`; a `Plan` names every cell, and for those
that cannot run the reason. The baseline of every target is always planned.
"""

from __future__ import annotations

import difflib
import random
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import torch

from harness import acceptance, drafter, method, shapes, weights
from harness import runtime as launching
from harness.acceptance import Acceptance, Profile
from harness.errors import UserError
from harness.results import BASELINE, Cell, Outcome, Trial
from harness.weights import Bits, ModelSource
from prompts import Prompt, PromptSet

DEFAULT_METHODS = "ar,s3d,medusa,eagle,layerskip,prompt-lookup,draft-model"
PUBLISHABLE_ROUNDS = 3
AUTO_ROUNDS = (5, 100)
"fewest and most rounds of `--rounds auto`: an interval that is narrow by luck is rare from five on"
AUTO_PRECISION, AUTO_SECONDS = 0.02, 3600.0
FEW_PROMPTS = 24
SMALLEST_BUDGET = 2**20
"bytes: less is a number without its unit"

Positive = Annotated[int, msgspec.Meta(ge=1)]
FindDrafter = Callable[[str, str | None, str], Path | None]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for; None where the device or the model decides."""

    methods: str | list[str | dict[str, Any]] = DEFAULT_METHODS
    "`s3d:k=4,eagle`, or a list of such and of tables: a name, options, and a label if wanted"
    bits: str | int | list[str | int] | None = None
    runtime: str | list[str] = "eager"
    model: str | None = None
    prompts: str = "quick"
    limit: Positive | None = None
    max_new_tokens: Positive | None = None
    rounds: Positive | Literal["auto"] | None = None
    precision: Annotated[float, msgspec.Meta(gt=0)] | None = None
    time_budget: str | int | float | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    acceptance: str | list[float] | None = None
    "draw how much is accepted instead of asking the target: `0.7,0.6`, `tau:2.5`, `published:NAME`, `from:RUN`"
    context: str | int | list[str | int] | None = None
    "prefill so many tokens before each answer: `1k,4k`; None: the prompts as they are, and 512 for a shape"
    device_map: Literal["auto", "balanced"] | None = None
    "spread the target over all GPUs, as accelerate does"
    vram_budget: str | int | None = None
    "cap what each cell may allocate: `8GiB`"
    roofline: bool = False
    "measure the device's bandwidths before the first cell"
    device: str = "auto"
    dtype: str | None = None
    system: str | None = None
    raw: bool = False
    trust_remote_code: bool = False
    out: str | None = None
    isolation: Literal["round", "cell", "run"] = "round"
    "what has a process of its own: every cell in every round, every cell, or only the run"


class Merge(msgspec.Struct, frozen=True):
    """A drafter that becomes part of the target's own weights before anything runs."""

    method: str
    drafter: str


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """A cell and what it needs."""

    cell: Cell
    drafter: str | None = None
    "path of the trained weights"
    merge: Merge | None = None
    "what makes the target of `cell.weights`; None for the base"
    profile: Profile | None = None
    "what its acceptance is drawn from; None: the target decides"
    unsupported: str | None = None
    "why it cannot run"


class Turn(msgspec.Struct, frozen=True):
    """One thing to answer."""

    prompt: Prompt
    index: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run will do: every cell decodes every turn in every round."""

    model: ModelSource
    prompt_set: PromptSet
    cells: tuple[Planned, ...]
    rounds: int
    seed: int
    max_new_tokens: int
    temperature: float
    top_p: float
    system: str | None
    raw: bool
    trust_remote_code: bool
    preliminary: bool
    isolation: str = "round"
    precision: float | None = None
    "rounds end when every speed-up's interval is narrower than this share of it; None: after `rounds`"
    time_budget_seconds: float | None = None
    "and no round begins that would not end within it"
    acceptance: str | None = None
    "where drawn acceptance comes from, as the user wrote it"
    vram_budget_bytes: int | None = None
    device_map: str | None = None
    roofline: bool = False
    "measure the device's bandwidths in the prepare step"

    @property
    def synthetic(self) -> bool:
        """Random weights or drawn acceptance: every row says so."""
        return self.model.kind == "shape" or self.acceptance is not None

    @property
    def contexts(self) -> list[int | None]:
        return list(dict.fromkeys(one.cell.context for one in self.cells))

    @property
    def fewest_rounds(self) -> int:
        return self.rounds if self.precision is None else AUTO_ROUNDS[0]

    def order(self, round: int) -> list[int]:
        """Indices of the cells as this round runs them."""
        indices = list(range(len(self.cells)))
        random.Random(f"{self.seed}/{round}").shuffle(indices)
        return indices

    def turns(self) -> Iterator[Turn]:
        return (Turn(prompt, index) for prompt in self.prompt_set.prompts for index in range(len(prompt.turns)))

    @property
    def device(self) -> str:
        return self.cells[0].cell.device

    @property
    def drafters(self) -> dict[Path, str]:
        """Trained weights that some cell needs, and the method that they are of."""
        return {Path(one.drafter): one.cell.method for one in self.cells if one.drafter is not None}

    def warnings(self) -> list[str]:
        """Sentences on what a plan of this size cannot show."""
        prompts, lines = len(self.prompt_set.prompts), []
        if self.rounds < 2:
            lines.append("One round: no interval over rounds can be given, and no method is ranked. Add --rounds 3.")
        if self.synthetic:
            lines.append(self._synthetic())
        if prompts < FEW_PROMPTS and self.model.kind != "shape":
            lines.append(
                f"{_count(prompts, 'prompt')}, fewer than {FEW_PROMPTS}: how fast a drafter is depends on the text, so "
                "other prompts may rank the methods differently. `--prompts standard` has 96."
            )
        return lines

    def _synthetic(self) -> str:
        weights_ = "random weights and prompts" if self.model.kind == "shape" else "real weights"
        if self.acceptance is not None:
            drawn = f"how much of a draft is accepted was drawn ({self.acceptance})"
        else:
            drawn = "random drafters guess nothing, so nearly nothing is accepted: --acceptance draws it"
        return f"SYNTHETIC: {weights_}; {drawn}. Times and memory were measured; speeds follow from the draws."


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One cell in one round: what a worker is given. Paths are absolute."""

    run: str
    plan: str
    trials: str
    first_answers: str
    source: ModelSource
    "the target's weights, merged already where the cell wants that"
    cell: int
    round: int
    order: int

    def row(self, plan: Plan, turn: Turn, outcome: Outcome, **measured: Any) -> Trial:
        """The result line of one turn."""
        return Trial(
            run=self.run,
            cell=plan.cells[self.cell].cell,
            round=self.round,
            order=self.order,
            prompt_set=plan.prompt_set.name,
            prompt_id=turn.prompt.id,
            category=turn.prompt.category,
            turn=turn.index,
            outcome=outcome,
            temperature=plan.temperature,
            top_p=plan.top_p,
            seed=plan.seed,
            max_new_tokens=plan.max_new_tokens,
            synthetic=plan.synthetic,
            **measured,
        )


class RunJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a step about a whole run is given: its directory, and where the weights of each `Cell.weights` are."""

    directory: str
    sources: dict[str, ModelSource]


# --- what the user wrote ---------------------------------------------------------------------------------------------


def read_request(given: Mapping[str, Any], where: str = "the command line") -> Request:
    """Check names and values. Raises UserError naming what is close to a misspelt key."""
    known = {field.name for field in msgspec.structs.fields(Request)}
    values = {key.replace("-", "_"): value for key, value in given.items()}
    for key in values:
        if key not in known:
            raise UserError(f"{where} has an unknown key {key!r}{_close(key, known)}; it may have {_listed(known)}")
    try:
        return msgspec.convert(values, Request)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at ")
        key = path.strip("`$.").partition("[")[0]
        if words := _words(key, problem):
            raise UserError(f"{where}: {key}: expected {words}, not {values.get(key)!r}") from None
        wanted = problem.replace("`int`", "a whole number").replace("`float`", "a number").replace("`", "")
        raise UserError(f"{where}: {key}: {wanted[0].lower()}{wanted[1:]}, not {values.get(key)!r}") from None


def _words(key: str, problem: str) -> str:
    """What a key that takes certain words may be; nothing for another key, or a number out of range."""
    hint = get_type_hints(Request).get(key)
    kinds = (hint, *get_args(hint))
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if not words or ">=" in problem:
        return ""
    known = ["a whole number"] * (int in kinds) + words
    return f"{', '.join(known[:-1])} or {known[-1]}"


def specs(methods: str | Sequence[str | Mapping[str, Any]]) -> list[method.Spec]:
    """Methods with their options, as text or as tables."""
    if isinstance(methods, str):
        return method.parse(methods)
    found: list[method.Spec] = []
    for entry in methods:
        found += method.parse(entry) if isinstance(entry, str) else [_from_table(dict(entry))]
    if not found:
        raise UserError("no method named: try `--methods s3d,eagle`; `python -m harness list` shows all")
    return found


def _from_table(table: dict[str, Any]) -> method.Spec:
    if "name" not in table:
        raise UserError(f"a [[methods]] table needs a name, like `name = 's3d'`; it has {_listed(table) or 'nothing'}")
    name, label = table.pop("name"), table.pop("label", None)
    if not isinstance(name, str) or not isinstance(label, str | None):
        raise UserError(
            f"a [[methods]] table's name and label are texts, like `name = 's3d'`, and not {name!r}, {label!r}"
        )
    known = {field.name for field in msgspec.structs.fields(method.find(name).Options)}
    options = {key.replace("-", "_"): value for key, value in table.items()}
    for key in options:
        if key not in known and (close := _close(key, known)):
            raise UserError(f"method {name!r} has no option {key!r}{close}")
    return method.configure(name, options, label=label)


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _close(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _bits(wanted: str | int | list[str | int]) -> list[Bits]:
    parts = wanted if isinstance(wanted, list) else str(wanted).split(",")
    return [Bits.parse(str(part)) for part in parts if str(part).strip()]


def _runtimes(wanted: str | list[str]) -> list[str]:
    runtimes = [part.strip() for part in (wanted if isinstance(wanted, list) else wanted.split(","))]
    for runtime in runtimes:
        if runtime not in launching.NAMES:
            raise UserError(f"no runtime {runtime!r}: there is {_listed(launching.NAMES)}")
    return runtimes


def _contexts(wanted: str | int | list[str | int] | None, source: ModelSource) -> list[int | None]:
    if wanted is None:
        return [shapes.CONTEXT] if source.kind == "shape" else [None]
    parts = wanted if isinstance(wanted, list) else str(wanted).split(",")
    return [_tokens(str(part)) for part in parts]


def _tokens(text: str) -> int:
    """`4k` is 4096."""
    found = re.fullmatch(r"(\d+)([kK]?)", text.strip())
    if found is None or not int(found[1]):
        raise UserError(f"a context of {text!r} tokens means nothing: give 512 or 4k, or several: 1k,4k")
    return int(found[1]) * (1024 if found[2] else 1)


def _budget(wanted: str | int, device: str) -> int:
    """`8GiB`, `8GB`, `512MiB`, or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(wanted).strip(), re.IGNORECASE)
    size = (
        0
        if found is None
        else int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))
    )
    if not size:
        raise UserError(f"a memory budget of {wanted!r} means nothing: give 8GiB, 8GB or 512MiB")
    if found is not None and size < SMALLEST_BUDGET:
        raise UserError(f"a memory budget of {wanted!r} is {_count(size, 'byte')}: did you mean {found[1]}GiB?")
    if device not in ("cuda", "cpu"):
        raise UserError(f"the allocator of {device} cannot be capped: --vram-budget works on cuda, and on a CPU")
    return size


# --- what will be run ------------------------------------------------------------------------------------------------


def plan(
    request: Request,
    *,
    source: ModelSource,
    device: str,
    prompt_set: PromptSet,
    find_drafter: FindDrafter = drafter.find,
) -> Plan:
    """The plan of a request on a device. Raises UserError for what cannot be meant."""
    shape = source.kind == "shape"
    if shape and (request.raw or request.system is not None):
        raise UserError("a shape has no tokenizer, so neither --raw nor --system means anything: drop them")
    if request.device_map is not None and shape:
        raise UserError("a shape is made on one device: drop --device-map")
    if request.device_map is not None and _runtimes(request.runtime) != ["eager"]:
        raise UserError("a model spread over several devices runs in the eager runtime only: drop --device-map")
    if request.raw and request.system is not None:
        raise UserError("--system needs the chat template that --raw leaves out: drop one of them")
    wanted = specs(request.methods)
    precisions = [weights.default_bits(device)] if request.bits is None else _bits(request.bits)
    if not precisions:
        raise UserError("no bits named: try --bits 16,8")
    drawn = None if request.acceptance is None else acceptance.read(request.acceptance)
    cells: list[Planned] = []
    for bits in precisions:
        dtype = _dtype_name(bits, device, request.dtype)
        for runtime, context in product(_runtimes(request.runtime), _contexts(request.context, source)):
            group = _Group(source, bits.id, dtype, runtime, device, context, drawn, find_drafter)
            cells += group.with_baselines([group.planned(spec) for spec in wanted])
    _refuse_duplicates(cells)
    _refuse_two_merges_of_one_name(cells)
    on_cpu = device == "cpu"
    automatic = request.rounds == "auto"
    if automatic and request.isolation != "round":
        raise UserError("`--rounds auto` judges by fresh processes: drop --isolation, or give a number of rounds")
    if not automatic and (request.precision is not None or request.time_budget is not None):
        raise UserError("--precision and --time-budget say when `--rounds auto` ends: add it")
    asked = AUTO_ROUNDS[1] if request.rounds == "auto" else request.rounds
    rounds = asked or (1 if on_cpu else PUBLISHABLE_ROUNDS)
    return Plan(
        model=source,
        prompt_set=prompt_set,
        cells=tuple(cells),
        rounds=rounds,
        seed=request.seed,
        max_new_tokens=request.max_new_tokens or (32 if on_cpu else 128),
        temperature=request.temperature,
        top_p=request.top_p,
        system=request.system,
        raw=request.raw,
        trust_remote_code=request.trust_remote_code,
        isolation=request.isolation,
        preliminary=not shape
        and (request.prompts == "quick" or request.limit is not None or rounds < PUBLISHABLE_ROUNDS),
        acceptance=None if drawn is None else drawn.said,
        vram_budget_bytes=None if request.vram_budget is None else _budget(request.vram_budget, device),
        device_map=request.device_map,
        roofline=request.roofline,
        precision=request.precision or AUTO_PRECISION if automatic else None,
        time_budget_seconds=seconds(request.time_budget) if automatic else None,
    )


def seconds(written: str | int | float | None) -> float:
    """`90`, `20m` or `2h`, in seconds; the default for None. Raises UserError."""
    if written is None:
        return AUTO_SECONDS
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(written).strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"no time {written!r}: write seconds, or 20m, or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _dtype_name(bits: Bits, device: str, dtype: str | None) -> str:
    known = ("float32", "bfloat16", "float16")
    if dtype is not None and dtype not in known:
        raise UserError(f"unknown dtype {dtype!r}{_close(dtype, known)}; it may be {_listed(known)}")
    named = None if dtype is None else getattr(torch, dtype)
    return str(weights.compute_dtype(bits, device, named)).removeprefix("torch.")


@dataclass(frozen=True)
class _Group:
    """Cells that differ in nothing but the method and what it merges into the target."""

    source: ModelSource
    bits: str
    dtype: str
    runtime: str
    device: str
    context: int | None
    drawn: Acceptance | None
    find_drafter: FindDrafter

    def planned(self, spec: method.Spec) -> Planned:
        kind, options = method.find(spec.name), method.options_of(spec)
        if self.source.kind == "shape":
            options = kind.for_random_weights(options)
            spec = msgspec.structs.replace(spec, options=msgspec.to_builtins(options))
        cell = Cell(
            method=spec.name,
            options=spec.options,
            label=spec.label,
            model=self.source.name,
            bits=self.bits,
            dtype=self.dtype,
            weights=kind.target_weights(options),
            runtime=self.runtime,
            device=self.device,
            context=self.context,
        )
        found, reason = None, launching.unsupported(self.runtime, self.bits, self.device)
        reason = reason or kind.unsupported(cell, options)
        profile = None
        if self.drawn is not None and spec.name != BASELINE:
            profile = self.drawn.of(spec.label, spec.name, spec.options)
            reason = reason or (None if profile else f"{self.drawn.said} knows no acceptance of it")
        if kind.needs_drafter:
            found = self._drafter(kind.drafter_name(options), getattr(options, "drafter", None), spec)
            reason = reason or (None if found else self._untrained(spec, kind.drafter_name(options)))
        path = None if found is None else str(found)
        merge = None if cell.weights == "base" or path is None else Merge(spec.name, path)
        return Planned(cell=cell, drafter=path, merge=merge, profile=profile, unsupported=reason)

    def _drafter(self, name: str, option: str | None, spec: method.Spec) -> Path | None:
        """A shape's drafters are random too, and are made in the prepare step."""
        if self.source.kind == "shape" and option is None:
            return shapes.drafter_path(self.source, spec, name)
        return self.find_drafter(name, option, self.source.name)

    def with_baselines(self, named: list[Planned]) -> list[Planned]:
        """`ar` first for every target that has none. Merged weights that nothing can run on get none."""
        merges = {one.cell.weights: one.merge for one in named if one.merge is not None and one.unsupported is None}
        have = {one.cell.weights for one in named if one.cell.method == BASELINE}
        missing = [target for target in ("base", *merges) if target not in have]
        added = [self.planned(method.parse_one(_baseline(target))) for target in missing]
        return [self._on_its_weights(one, merges) for one in (*added, *named)]

    def _on_its_weights(self, one: Planned, merges: Mapping[str, Merge]) -> Planned:
        """A baseline takes its merged weights from the method that it is the baseline of."""
        name = one.cell.weights
        if one.cell.method != BASELINE or name == "base":
            return one
        reason = None if name in merges else f"nothing else in this plan has the weights {name!r}"
        return msgspec.structs.replace(one, merge=merges.get(name), unsupported=reason)

    def _untrained(self, spec: method.Spec, drafter_name: str) -> str:
        model = self.source.location if self.source.kind == "local" else self.source.name
        what = spec.name if drafter_name == spec.name else spec.label
        command = f"python -m harness train --methods {what} --model {shlex.quote(model)}"
        return f"no trained drafter for {self.source.name}; `{command}` makes one"


def _baseline(target: str) -> str:
    return BASELINE if target == "base" else f"{BASELINE}:weights={target}"


def _refuse_duplicates(cells: list[Planned]) -> None:
    seen: dict[str, Cell] = {}
    for cell in (one.cell for one in cells):
        same = msgspec.json.encode(msgspec.structs.replace(cell, label="")).decode()
        if (other := seen.setdefault(same, cell)) is not cell:
            both = cell.label if cell.label == other.label else f"{other.label} and {cell.label}"
            raise UserError(f"{both} in {cell.bits}: the same cell twice; name it once")
    for name, count in Counter(one.cell.id for one in cells).items():
        if count > 1:
            raise UserError(f"{count} cells would be called {name!r}: give their [[methods]] tables different labels")


def _refuse_two_merges_of_one_name(cells: list[Planned]) -> None:
    drafters: dict[str, Merge] = {}
    for one in cells:
        if one.merge is not None and drafters.setdefault(one.cell.weights, one.merge) != one.merge:
            raise UserError(
                f"two {one.cell.weights} drafters would both become the target's weights: measure them in two runs"
            )
