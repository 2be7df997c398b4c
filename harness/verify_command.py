"""`python -m harness verify`: decode prompts with the target alone and with each method, and compare token by token.

The reference at 32 bits is transformers' own greedy `generate` with its own attention and cache, TF32 off; at fewer
bits it is `ar` through the loop that all methods share. A second turn follows the reference's first answer.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness import chat, dialogue, distribution, host, lossless, method, prepare, weights
from harness.decode import Limits, decode
from harness.draft import point_chain
from harness.errors import UserError
from harness.metrics import NEAR_TIE
from harness.paths import may_be_file
from harness.plan import DEFAULT_METHODS, Plan, Planned, plan, read_request
from harness.rescore import Float64
from harness.sampling import Sampler
from harness.target import Target
from harness.trunk import unsupported
from harness.weights import Bits, LoadedModel, ModelSource
from harness.worker import exact_float32, seat
from prompts import Prompt, load

Key = tuple[str, str, str, int]

WIDE_COLUMNS = 100
"of a terminal that has room for acceptance by depth"
CHUNK = 8
"tokens that the control scores at a time"


def verify(
    *,
    methods: str = DEFAULT_METHODS,
    prompts: str = "quick",
    limit: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 2,
    bits: str = "32",
    model: str | None = None,
    device: str = "auto",
    shard: str | None = None,
    out: Path | None = None,
    read: tuple[Path, ...] = (),
    system: str | None = None,
    raw: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """`verify`: what it says of itself is in `harness.cli`, for this module is loaded when it is called.

    Parameters
    ----------
    methods
        Decoders with options: `s3d:k=4,eagle`; all: whatever is installed and can run.
    prompts
        standard, quick, a JSONL file, or hf:org/name.
    limit
        So many prompts, spread over the categories.
    max_new_tokens
        Length of an answer.
    temperature
        Above 0: sample, and test the distribution.
    top_p
        Sample from this much of the probability mass.
    samples
        Texts drawn for each turn when sampling.
    bits
        32 compares with transformers' generate; 16, 8 and 4 with `ar` in the same bits.
    model
        Hub id or directory; default: a small chat model.
    device
        auto, cuda, xpu, mps or cpu.
    shard
        `1/8` takes every eighth prompt from the first on, for eight machines at once.
    out
        File of greedy texts' findings; an unfinished one goes on. Default: verify.jsonl, with the shard in its name.
    read
        Decode nothing, and show these files of findings together.
    system
        System message.
    raw
        Give prompts as they are, without the chat template.
    trust_remote_code
        Run code that comes with the model.
    """
    if read:
        return show(*lossless.read(read), lossless.read_controls(read))
    if samples < 1:
        raise UserError(f"--samples {samples} draws nothing: give 1 or more")
    path = may_be_file(out or Path(f"verify{'' if shard is None else '-' + shard.replace('/', '-of-')}.jsonl"))
    everything = methods.strip() == "all"
    request = read_request(
        {
            "methods": ",".join(method.installed()) if everything else methods, "bits": bits,
            "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "system": system, "raw": raw,
            "trust_remote_code": trust_remote_code,
        }
    )  # fmt: skip
    source = weights.resolve(model)
    if source.kind == "shape":
        raise UserError(f"{model} has random weights and no tokenizer, so no text to verify: name a model with weights")
    prompt_set = load(prompts, limit=limit)
    planned = plan(request, source=source, device=host.choose_device(device), prompt_set=prompt_set)
    if len({one.cell.bits for one in planned.cells}) > 1:
        raise UserError(f"one precision at a time, not {bits}: each has a file of findings of its own")
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if everything:
        planned = runnable(planned, console.print)
    mine = share(prompt_set.prompts, shard)
    if temperature > 0:
        return show_sampled(list(sampled(planned, mine, samples, console.print)))
    check(planned, mine, path, console.print)
    heading, references, findings = lossless.read([path])
    cells = {(one.cell.label, one.cell.weights) for one in planned.cells}
    asked = [finding for finding in findings if (finding.method, finding.weights) in cells]
    return show(heading, references, asked, lossless.read_controls([path]))


def runnable(planned: Plan, tell: Callable[[str], None]) -> Plan:
    """The plan without the cells that cannot run, each with its reason."""
    for one in planned.cells:
        if one.unsupported:
            tell(f"{one.cell.label}: left out: {one.unsupported}")
    return msgspec.structs.replace(planned, cells=tuple(one for one in planned.cells if not one.unsupported))


def share(prompts: Sequence[Prompt], shard: str | None) -> Sequence[Prompt]:
    """The prompts of shard `i/n`, counted from 1. Raises UserError."""
    if shard is None:
        return prompts
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"no shard {shard!r}: write 1/8 for the first of eight, 8/8 for the last")
    mine = prompts[int(match[1]) - 1 :: int(match[2])]
    if not mine:
        raise UserError(f"shard {shard} of {len(prompts)} prompts is empty: make at most {len(prompts)} shards")
    return mine


def check(planned: Plan, prompts: Sequence[Prompt], path: Path, tell: Callable[[str], None]) -> None:
    """Decode what `path` does not have yet, one line a turn and method. Raises UserError."""
    refuse_unsupported(planned)
    exact_float32()
    base = _load(planned, planned.model)
    references, done = _resume(path, _heading(planned, base.sha256))
    controls = lossless.read_controls([path])
    for name, loaded, cells in _targets(planned, base):
        known = {ref.key: ref for ref in references}
        own = list(_references(planned, name, loaded, prompts, known, path, tell))
        if cells[0].cell.bits not in NEAR_TIE and name not in controls and own:
            lossless.append(path, control(name, loaded, own))
        for one in cells:
            code = made_with(one)
            left = [ref for ref in own if done.get((one.cell.label, *ref.key)) != code]
            for finding in _findings(planned, one, loaded, left, code):
                lossless.append(path, finding)
                where = f"{finding.prompt_id} turn {finding.turn + 1}"
                tell(f"{finding.method}: {where}: {finding.outcome} ({finding.compared} tokens)")


def refuse_unsupported(planned: Plan) -> None:
    if refused := {one.cell.label: one.unsupported for one in planned.cells if one.unsupported}:
        raise UserError("; ".join(f"{label}: {reason}" for label, reason in refused.items()))


def _targets(planned: Plan, base: LoadedModel) -> Iterator[tuple[str, LoadedModel, list[Planned]]]:
    """Each target's name, its model and the cells on it."""
    for name in dict.fromkeys(one.cell.weights for one in planned.cells):
        cells = [one for one in planned.cells if one.cell.weights == name]
        yield name, base if name == "base" else _load(planned, _merged(planned, cells, base.sha256)), cells


@torch.inference_mode()
def control(name: str, loaded: LoadedModel, references: Sequence[lossless.Reference]) -> lossless.Control:
    """The target's own texts, scored CHUNK tokens at a time instead of one: how many argmaxes are other tokens."""
    room = max(len(ref.prompt_tokens) + len(ref.new_tokens) for ref in references) + CHUNK
    target = Target(loaded.model, capacity=room)
    positions = flips = 0
    for ref in references:
        target.prefill(ref.prompt_tokens)
        for start in range(0, len(ref.new_tokens) - 1, CHUNK):
            tokens = ref.new_tokens[start : start + CHUNK]
            expected = torch.tensor(ref.new_tokens[start + 1 : start + 1 + CHUNK], device=target.device)
            target.begin(tokens[0])
            scores = target.score(point_chain(tokens[1:], target.device))
            flips += int((scores.logits_MV[: len(expected)].argmax(-1) != expected).sum())
            positions += len(expected)
            target.extend(tokens)
    return lossless.Control(weights=name, positions=positions, flips=flips)


def _load(planned: Plan, source: ModelSource) -> LoadedModel:
    """Raises UserError for an architecture that no decoder here can walk."""
    cell = planned.cells[0].cell
    loaded = weights.load(
        source, Bits.parse(cell.bits), device=cell.device, dtype=cell.dtype, trust_remote_code=planned.trust_remote_code
    )
    if reason := unsupported(loaded.model.config):
        raise UserError(reason)
    return loaded


def _merged(planned: Plan, cells: Sequence[Planned], base_sha256: str) -> ModelSource:
    merge = next(one.merge for one in cells if one.merge is not None)
    return prepare.merged(
        planned.model, base_sha256, merge, lambda _: None, trust_remote_code=planned.trust_remote_code
    )


def _heading(planned: Plan, weights_sha256: str) -> lossless.Heading:
    bits = planned.cells[0].cell.bits
    return lossless.Heading(
        model=planned.model.name,
        weights_sha256=weights_sha256,
        bits=bits,
        prompts_sha256=planned.prompt_set.sha256,
        max_new_tokens=planned.max_new_tokens,
        reference="generate" if bits == "32" else "ar",
        system=planned.system,
        raw=planned.raw,
    )


def _resume(path: Path, heading: lossless.Heading) -> tuple[list[lossless.Reference], dict[Key, str | None]]:
    """References that `path` has, and what its findings were made with. Raises UserError for other settings' files."""
    if path.exists():
        lossless.cut_torn_line(path)
    if not path.exists() or path.stat().st_size == 0:
        lossless.append(path, heading)
    found, references, findings = lossless.read([path])
    if found != heading:
        raise UserError(f"{path} was made with other settings: give another --out, or remove it")
    return references, {finding.key: finding.made_with for finding in findings}


def made_with(one: Planned) -> str:
    """Hash of what else decides a text: the method's code and this package's, its drafter, device and libraries."""
    modules = (inspect.getmodule(each) for each in method.find(one.cell.method).__mro__)
    own = [Path(file) for module in modules if (file := getattr(module, "__file__", None))]
    drafter = [] if one.drafter is None else [Path(one.drafter)]
    files = [path for each in drafter for path in (sorted(each.rglob("*")) if each.is_dir() else [each])]
    trained = weights.weights_sha256([path for path in files if path.is_file()])
    digest = hashlib.sha256(repr((one.cell.device, host.versions(), trained)).encode())
    for path in (*own, *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _references(
    planned: Plan,
    name: str,
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    known: Mapping[tuple[str, str, int], lossless.Reference],
    path: Path,
    tell: Callable[[str], None],
) -> Iterator[lossless.Reference]:
    """The target's own answer to every turn, from the file or made now."""
    limits = _limits(planned, loaded)
    for prompt in prompts:
        answers: list[str] = []
        for turn in range(len(prompt.turns)):
            reference = known.get((name, prompt.id, turn))
            if reference is None:
                asked = dialogue.encode(
                    loaded.tokenizer, prompt.turns[: turn + 1], answers, system=planned.system, raw=planned.raw
                )
                said = _answer(planned, loaded, asked, limits)
                reference = lossless.Reference(
                    weights=name, prompt_id=prompt.id, turn=turn, prompt_tokens=tuple(asked), new_tokens=tuple(said)
                )
                lossless.append(path, reference)
                tell(f"reference: {prompt.id} turn {turn + 1}: {len(said)} tokens")
            answers.append(dialogue.decode(loaded.tokenizer, reference.new_tokens))
            yield reference


def _answer(planned: Plan, loaded: LoadedModel, prompt: list[int], limits: Limits) -> list[int]:
    if planned.cells[0].cell.bits != "32":
        return prepare.greedy(loaded.model, prompt, limits)
    return Target(loaded.model, capacity=1).generate(prompt, limits.max_new_tokens, limits.end_ids)


def _limits(planned: Plan, loaded: LoadedModel) -> Limits:
    return Limits(planned.max_new_tokens, chat.end_ids(loaded.model, loaded.tokenizer))


def _findings(
    planned: Plan, one: Planned, loaded: LoadedModel, references: Sequence[lossless.Reference], code: str
) -> Iterator[lossless.Finding]:
    """Decode the prompts of `references` with one method, whose `made_with` is `code`, and compare."""
    if not references:
        return
    cell, limits, sampler = one.cell, _limits(planned, loaded), Sampler()
    room = max(len(ref.prompt_tokens) for ref in references) + planned.max_new_tokens
    target, decoder = _seat(one, loaded, sampler, room)
    scale = Float64(loaded.model)
    for ref in references:
        _, *steps = rounds = list(decode(target, decoder, ref.prompt_tokens, limits, sampler))
        text = [token for step in rounds for token in step.committed]
        verdict = lossless.judge(ref.new_tokens, text, cell.bits, partial(_gap, scale, ref, text))
        drafted, accepted = lossless.acceptance(steps)
        yield lossless.Finding(
            method=cell.label,
            weights=cell.weights,
            prompt_id=ref.prompt_id,
            turn=ref.turn,
            outcome=verdict.outcome,
            compared=verdict.compared,
            margin=verdict.margin,
            new_tokens=tuple(text),
            rounds=len(steps),
            drafted=drafted,
            accepted=accepted,
            lossless=decoder.lossless,
            made_with=code,
        )


def _gap(scale: Float64, ref: lossless.Reference, text: Sequence[int], place: int) -> float:
    """In float64, of the two tokens at `place`, after the text that both share."""
    return scale.gap([*ref.prompt_tokens, *ref.new_tokens[:place]], ref.new_tokens[place], text[place])


def _seat(one: Planned, loaded: LoadedModel, sampler: Sampler, room: int) -> tuple[Target, method.Method]:
    """Raises UserError."""
    drafter = None if one.drafter is None else Path(one.drafter)
    spec = method.Spec(one.cell.method, one.cell.options, one.cell.label)
    try:
        return seat(loaded.model, spec, drafter, sampler, room)
    except ValueError as error:  # a method or the target refuses what the user asked for, and says why
        raise UserError(f"{one.cell.label}: {error}") from error


# --- sampling --------------------------------------------------------------------------------------------------------


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """One method's sampled text against the target's own distribution."""

    method: str
    lossless: bool
    texts: int
    tokens: int
    p_value: float
    testable: bool
    "whether the target gives one distribution however many tokens it scores at once"

    @property
    def word(self) -> str:
        if not self.lossless:
            return "lossy by design"
        if not self.testable:
            return "not testable in these bits"
        return "DIVERGED" if self.p_value < distribution.FALSE_ALARM else "as the target"


def sampled(planned: Plan, prompts: Sequence[Prompt], samples: int, tell: Callable[[str], None]) -> Iterator[Sampled]:
    """Draw `samples` texts for the first turn of every prompt with each method. Raises UserError."""
    refuse_unsupported(planned)
    exact_float32()
    base = _load(planned, planned.model)
    for _, loaded, cells in _targets(planned, base):
        asked = [
            dialogue.encode(loaded.tokenizer, prompt.turns[:1], [], system=planned.system, raw=planned.raw)
            for prompt in prompts
        ]
        for one in cells:
            yield _sampled(planned, one, loaded, [ids for ids in asked for _ in range(samples)])
            tell(f"{one.cell.label}: {len(asked) * samples} texts drawn")


def _sampled(planned: Plan, one: Planned, loaded: LoadedModel, asked: Sequence[list[int]]) -> Sampled:
    limits = _limits(planned, loaded)
    sampler = Sampler(planned.temperature, planned.top_p, torch.Generator(one.cell.device).manual_seed(planned.seed))
    noise = torch.Generator().manual_seed(planned.seed)
    target, decoder = _seat(one, loaded, sampler, max(map(len, asked)) + planned.max_new_tokens)
    places: list[float] = []
    for prompt in asked:
        text = [token for step in decode(target, decoder, prompt, limits, sampler) for token in step.committed]
        if len(text) > 1:
            places += distribution.placed(target, prompt, text, sampler, noise)
    try:
        p_value = distribution.p_value(places)
    except ValueError as error:
        raise UserError(f"{one.cell.label}: {error}") from error
    return Sampled(
        method=one.cell.label,
        lossless=decoder.lossless,
        texts=len(asked),
        tokens=len(places),
        p_value=p_value,
        testable=one.cell.bits in NEAR_TIE,
    )


def show_sampled(rows: Sequence[Sampled]) -> int:
    """Print what was found; the exit status, 1 where a method diverged."""
    table = Table(title="Sampled text against the target's own distribution", title_justify="left", pad_edge=False)
    for header in ("method", "texts", "tokens", "p-value", "verdict"):
        table.add_column(header, justify="left" if header in ("method", "verdict") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, (row.method, str(row.texts), str(row.tokens), f"{row.p_value:.2g}", row.word)))
    Console(highlight=False, markup=False).print(table)
    return 1 if any(row.word == "DIVERGED" for row in rows) else 0


def show(
    heading: lossless.Heading,
    references: Sequence[lossless.Reference],
    findings: Sequence[lossless.Finding],
    controls: Mapping[str, lossless.Control],
) -> int:
    """Print what was found; the exit status, 1 where a method diverged."""
    console = Console(highlight=False, markup=False)
    title = f"{heading.model}, {heading.bits} bits, {heading.max_new_tokens} new tokens, against {heading.reference}"
    table = Table(pad_edge=False, box=None)
    table.add_column("method", no_wrap=True)
    table.add_column("verdict", min_width=12)
    for header in ("turns", "tokens", "identical", "near-tie", "DIVERGED", "tau"):
        table.add_column(header, justify="right", no_wrap=True)
    wide = console.width >= WIDE_COLUMNS
    if wide:
        table.add_column("accepted by depth", overflow="fold")
    rows = lossless.summary(findings, heading.bits, controls)
    for row in rows:
        label = row.method if row.weights == "base" else f"{row.method} ({row.weights})"
        counts = [str(row.outcomes.get(outcome, 0)) for outcome in ("identical", "near-tie", "DIVERGED")]
        tau = "" if row.tau is None else f"{row.tau:.2f}"
        shares = " ".join(f"{share:.2f}" for share in row.acceptance)
        cells = (label, row.verdict, str(row.turns), str(row.tokens), *counts, tau)
        table.add_row(*map(Text, (*cells, shares) if wide else cells))
    console.print(title, soft_wrap=True)
    console.print(table)
    parted = [finding for finding in findings if finding.outcome != "identical"]
    for finding in parted:
        apart = "" if finding.margin is None else f", {finding.margin:.2g} logits apart in float64"
        where = f"{finding.prompt_id} turn {finding.turn + 1}"
        console.print(
            f"{finding.method}: {where}: {finding.outcome} after {finding.compared} tokens{apart}", soft_wrap=True
        )
    for one in controls.values():
        console.print(
            f"Scored {CHUNK} tokens at a time instead of one, the target ({one.weights}) chooses another token at "
            f"{one.flips} of {one.positions} positions: what a method does may not be told from that.",
            soft_wrap=True,
        )
    return 1 if any(row.verdict == "DIVERGED" for row in rows) else 0
