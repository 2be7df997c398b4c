"""`python -m harness verify`: decode prompts with the target alone and with each method, and compare token by token.

The reference at 32 bits is transformers' own greedy `generate` with its own attention and cache, TF32 off; at fewer
bits it is `ar` through the loop that all methods share. A second turn follows the reference's first answer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness import chat, dialogue, host, lossless, method, prepare, weights
from harness.decode import Limits, decode
from harness.errors import UserError
from harness.plan import DEFAULT_METHODS, Plan, Planned, plan, read_request
from harness.sampling import Sampler
from harness.target import Target
from harness.weights import Bits, LoadedModel, ModelSource
from harness.worker import exact_float32, seat
from prompts import Prompt, load


def verify(
    *,
    methods: str = DEFAULT_METHODS,
    prompts: str = "standard",
    limit: int | None = None,
    max_new_tokens: int = 128,
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
    """Compare every method's greedy text with the target's own, token by token. Exit status 1 where one diverged.

    Parameters
    ----------
    methods
        Decoders with options: `s3d:k=4,eagle`.
    prompts
        standard, quick, a JSONL file, or hf:org/name.
    limit
        So many prompts, spread over the categories.
    max_new_tokens
        Length of an answer.
    bits
        32 compares with transformers' generate; 16, 8 and 4 with `ar` in the same bits.
    model
        Hub id or directory; default: a small chat model.
    device
        auto, cuda, xpu, mps or cpu.
    shard
        `1/8` takes every eighth prompt from the first on, for eight machines at once.
    out
        File of findings; an unfinished one goes on. Default: verify.jsonl, with the shard in its name.
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
        return show(*lossless.read(read))
    request = read_request(
        {
            "methods": methods, "bits": bits, "max_new_tokens": max_new_tokens, "system": system, "raw": raw,
            "trust_remote_code": trust_remote_code,
        }
    )  # fmt: skip
    prompt_set = load(prompts, limit=limit)
    planned = plan(request, source=weights.resolve(model), device=host.choose_device(device), prompt_set=prompt_set)
    if len({one.cell.bits for one in planned.cells}) > 1:
        raise UserError(f"one precision at a time, not {bits}: each has a file of findings of its own")
    mine = share(prompt_set.prompts, shard)
    path = out or Path(f"verify{'' if shard is None else '-' + shard.replace('/', '-of-')}.jsonl")
    console = Console(stderr=True, highlight=False, markup=False)
    check(planned, mine, path, console.print)
    return show(*lossless.read([path]))


def share(prompts: Sequence[Prompt], shard: str | None) -> Sequence[Prompt]:
    """The prompts of shard `i/n`, counted from 1. Raises UserError."""
    if shard is None:
        return prompts
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"no shard {shard!r}: write 1/8 for the first of eight, 8/8 for the last")
    return prompts[int(match[1]) - 1 :: int(match[2])]


def check(planned: Plan, prompts: Sequence[Prompt], path: Path, tell: Callable[[str], None]) -> None:
    """Decode what `path` does not have yet, one line a turn and method. Raises UserError."""
    if refused := {one.cell.label: one.unsupported for one in planned.cells if one.unsupported}:
        raise UserError("; ".join(f"{label}: {reason}" for label, reason in refused.items()))
    exact_float32()
    base = _load(planned, planned.model)
    references, done = _resume(path, _heading(planned, base.sha256))
    for name in dict.fromkeys(one.cell.weights for one in planned.cells):
        cells = [one for one in planned.cells if one.cell.weights == name]
        loaded = base if name == "base" else _load(planned, _merged(planned, cells, base.sha256))
        known = {ref.key: ref for ref in references}
        own = list(_references(planned, name, loaded, prompts, known, path, tell))
        for one in cells:
            left = [ref for ref in own if (one.cell.label, *ref.key) not in done]
            for finding in _findings(planned, one, loaded, left):
                lossless.append(path, finding)
                where = f"{finding.prompt_id} turn {finding.turn + 1}"
                tell(f"{finding.method}: {where}: {finding.outcome} ({finding.compared} tokens)")


def _load(planned: Plan, source: ModelSource) -> LoadedModel:
    cell = planned.cells[0].cell
    return weights.load(
        source, Bits.parse(cell.bits), device=cell.device, dtype=cell.dtype, trust_remote_code=planned.trust_remote_code
    )


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


def _resume(path: Path, heading: lossless.Heading) -> tuple[list[lossless.Reference], set[tuple[str, str, str, int]]]:
    """References that `path` has, and keys of its findings. Raises UserError where it was made with other settings."""
    if path.exists():
        lossless.cut_torn_line(path)
    if not path.exists() or path.stat().st_size == 0:
        lossless.append(path, heading)
    found, references, findings = lossless.read([path])
    if found != heading:
        raise UserError(f"{path} was made with other settings: give another --out, or remove it")
    return references, {finding.key for finding in findings}


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
    planned: Plan, one: Planned, loaded: LoadedModel, references: Sequence[lossless.Reference]
) -> Iterator[lossless.Finding]:
    """Decode the prompts of `references` with one method, and compare."""
    if not references:
        return
    cell, limits, sampler = one.cell, _limits(planned, loaded), Sampler()
    room = max(len(ref.prompt_tokens) for ref in references) + planned.max_new_tokens
    drafter = None if one.drafter is None else Path(one.drafter)
    spec = method.Spec(cell.method, cell.options, cell.label)
    try:
        target, decoder = seat(loaded.model, spec, drafter, sampler, room)
    except ValueError as error:  # a method or the target refuses what the user asked for, and says why
        raise UserError(f"{cell.label}: {error}") from error
    scale = Float64(target)
    for ref in references:
        _, *steps = rounds = list(decode(target, decoder, ref.prompt_tokens, limits, sampler))
        text = [token for step in rounds for token in step.committed]
        verdict = lossless.judge(ref.new_tokens, text, cell.bits, partial(scale.gap, ref, text))
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
        )


class Float64:
    """A float64 copy of a target's model, made when the first difference has to be judged.

    transformers keeps a few steps in float32 (norms, rotations), so logits are right to about 1e-6 of their size.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.copy: Target | None = None

    @torch.inference_mode()
    def gap(self, reference: lossless.Reference, text: Sequence[int], place: int) -> float:
        """How far the worse of the two tokens at `place` is below the best logit, after the text that both share."""
        if self.copy is None:
            self.copy = Target(copy.deepcopy(self.target.trunk.model).double(), capacity=1)
        ids_T = [*reference.prompt_tokens, *reference.new_tokens[:place]]
        with self.copy.lent() as model:
            logits_V = model(torch.tensor([ids_T], device=self.target.device), use_cache=False).logits[0, -1]
        worse = logits_V[[reference.new_tokens[place], text[place]]].min()
        return float(logits_V.max() - worse)


def show(
    heading: lossless.Heading, references: Sequence[lossless.Reference], findings: Sequence[lossless.Finding]
) -> int:
    """Print what was found; the exit status, 1 where a method diverged."""
    console = Console(highlight=False, markup=False)
    title = f"{heading.model}, {heading.bits} bits, {heading.max_new_tokens} new tokens, against {heading.reference}"
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for header in ("turns", "tokens", "identical", "near-tie", "DIVERGED", "tau"):
        table.add_column(header, justify="right")
    table.add_column("accepted by depth", overflow="fold")
    for row in lossless.summary(findings):
        label = row.method if row.weights == "base" else f"{row.method} ({row.weights})"
        counts = [str(row.outcomes.get(outcome, 0)) for outcome in ("identical", "near-tie", "DIVERGED")]
        tau = "" if row.tau is None else f"{row.tau:.2f}"
        shares = " ".join(f"{share:.2f}" for share in row.acceptance)
        table.add_row(*map(Text, (label, str(row.turns), str(row.tokens), *counts, tau, shares)))
    console.print(table)
    parted = [finding for finding in findings if finding.outcome != "identical"]
    for finding in parted:
        apart = "" if finding.margin is None else f", {finding.margin:.2g} logits apart in float64"
        where = f"{finding.prompt_id} turn {finding.turn + 1}"
        console.print(
            f"{finding.method}: {where}: {finding.outcome} after {finding.compared} tokens{apart}", soft_wrap=True
        )
    if any(finding.outcome == "untestable" for finding in parted):
        console.print(
            "In these bits the target differs from itself between one token and several at a time: see 32 bits."
        )
    return 1 if any(finding.outcome == "DIVERGED" for finding in parted) else 0
