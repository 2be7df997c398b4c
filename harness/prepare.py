"""What is made once before any cell runs, in a process of its own: `python -m harness.prepare RUN_DIRECTORY`.

Fetches the model, checks that it can decode these prompts at all, writes the first answers that later turns follow
(with plain `ar` at the highest precision, kept in the cache), merges drafters into targets where a cell wants that, and
looks for what may mislead.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from harness import chat, child, dialogue, drafter, meters, method, roofline, shapes, smollm2, weights
from harness.decode import Limits, decode
from harness.errors import UserError
from harness.paths import cache_dir, write_atomically
from harness.plan import Merge, Plan
from harness.results import Roofline
from harness.sampling import Sampler
from harness.weights import Bits, LoadedModel, ModelSource
from harness.worker import encoded, exact_float32, seat

Answers = dict[str, list[str]]


def main() -> int:
    emit = child.to_parent()
    try:
        prepare(Path(sys.argv[1]), emit)
    except UserError as error:
        emit(child.Refused(str(error)))
        return 2
    return 0


def prepare(directory: Path, emit: child.Emit) -> None:
    """Write `first_answers.json` into the run and tell the parent what the workers need."""
    plan = msgspec.json.decode((directory / "plan.json").read_bytes(), type=Plan)
    device = device_at_best(plan, emit)
    if plan.model.kind == "default":
        smollm2.ensure(in_tenths(emit))
    if plan.model.kind == "shape":
        emit(msgspec.structs.replace(prepare_shape(plan, directory, emit), roofline=device))
        return
    emit(child.Preparing(f"loading {plan.model.name}"))
    exact_float32()
    loaded = load_precisely(plan)
    later = any(len(prompt.turns) > 1 for prompt in plan.prompt_set.prompts)
    unwritten = {prompt.id: [""] * (len(prompt.turns) - 1) for prompt in plan.prompt_set.prompts}
    refuse_what_does_not_fit(plan, loaded, unwritten)  # at once, before answers that would not fit either are written
    kept = write_atomically(directory / "first_answers.json", cached_answers(plan, loaded, emit) if later else b"{}")
    refuse_what_does_not_fit(plan, loaded, msgspec.json.decode(kept, type=Answers))
    merges = {one.cell.weights: one.merge for one in plan.cells if one.merge is not None and one.unsupported is None}
    sources = {
        name: merged(plan.model, loaded.sha256, merge, emit, trust_remote_code=plan.trust_remote_code)
        for name, merge in merges.items()
    }
    emit(
        child.Prepared(
            weights_sha256=loaded.sha256,
            first_answers_sha256=hashlib.sha256(kept).hexdigest() if later else None,
            sources={"base": plan.model} | sources,
            warnings=(*foreign_drafters(plan, loaded.sha256), *company(plan.device)),
            roofline=device,
        )
    )


def prepare_shape(plan: Plan, directory: Path, emit: child.Emit) -> child.Prepared:
    """Random drafters where there are none yet; nothing else, since nothing is said and nothing was trained.

    What a drafter would have merged into the target has the target's shape: random weights stand for both.
    """
    positions = shapes.configuration(plan.model).max_position_embeddings
    for context in plan.contexts:
        _refuse_beyond(positions, context or 0, plan)
    for one in plan.cells:
        path = None if one.drafter is None or one.unsupported is not None else Path(one.drafter)
        if path is not None and not path.exists():
            emit(child.Preparing(f"making a random drafter for {one.cell.label}"))
            shapes.write_drafter(plan.model, method.Spec(one.cell.method, one.cell.options, one.cell.label), path)
    write_atomically(directory / "first_answers.json", b"{}")
    merges = {one.cell.weights for one in plan.cells}
    return child.Prepared(
        weights_sha256=shapes.identity(plan.model),
        first_answers_sha256=None,
        sources=dict.fromkeys(("base", *merges), plan.model),
        warnings=tuple(company(plan.device)),
    )


def device_at_best(plan: Plan, emit: child.Emit) -> Roofline | None:
    """What the device does at best: as it was measured once, or now where the user wants that; else None."""
    device = torch.device(plan.device)
    known = roofline.known(device)
    if known is None and plan.roofline:
        emit(child.Preparing("measuring the device's bandwidth"))
        known = roofline.keep(device, roofline.measure(device))
    return known


def in_tenths(emit: child.Emit) -> smollm2.Progress:
    """Progress in lines that a log can bear."""
    said: list[tuple[str, int | None]] = []

    def tell(step: str, fraction: float | None) -> None:
        tenth = None if fraction is None else int(10 * fraction)
        if (step, tenth) not in said[-1:]:
            said.append((step, tenth))
            emit(child.Preparing(step, fraction))

    return tell


def load_precisely(plan: Plan) -> LoadedModel:
    """32 bits; 16 where the model would not fit an accelerator comfortably; else the plan's own."""

    def load(bits: Bits) -> LoadedModel:
        return weights.load(
            plan.model,
            bits,
            device=plan.device,
            device_map=plan.device_map,
            trust_remote_code=plan.trust_remote_code,
        )

    if plan.device == "cpu":
        return load(Bits(32))
    try:
        loaded = load(Bits(16))
    except torch.OutOfMemoryError:
        return load(max((Bits.parse(one.cell.bits) for one in plan.cells), key=lambda bits: bits.width))
    return loaded if loaded.weight_bytes > memory_bytes(plan.device) / 4 else load(Bits(32))


def memory_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().total)


def refuse_what_does_not_fit(plan: Plan, loaded: LoadedModel, answers: Answers) -> None:
    """Raises UserError where a prompt and its answer are longer than the model can be, or cannot be encoded."""
    longest = max(max(map(len, encoded(plan, loaded, answers, context).values())) for context in plan.contexts)
    _refuse_beyond(getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None), longest, plan)


def _refuse_beyond(positions: int | None, longest: int, plan: Plan) -> None:
    if positions is not None and longest + plan.max_new_tokens > positions:
        raise UserError(
            f"a prompt of {longest} tokens and {plan.max_new_tokens} new ones do not fit the {positions} positions of "
            f"{plan.model.name}: lower --max-new-tokens or --context, or leave long prompts out"
        )


# --- what may mislead ------------------------------------------------------------------------------------------------


def foreign_drafters(plan: Plan, weights_sha256: str) -> list[str]:
    """A warning for each drafter whose metadata says that it was trained on other weights than these."""
    lines = []
    for path, name in plan.drafters.items():
        _, training = drafter.metadata(path)
        if training.get("weights_sha256", weights_sha256) != weights_sha256:
            lines.append(
                f"The {name} drafter {path.name} was trained for other weights ({training.get('model', 'unnamed')}) "
                f"than those of {plan.model.name}: fewer of its tokens will be accepted. `python -m harness train "
                f"--methods {name}` makes one for these."
            )
    return lines


def company(device: str) -> list[str]:
    """A warning where other processes compute on the accelerator that this one has a context on."""
    count = meters.gauges(torch.device(device)).other_processes()
    what = "another process was" if count == 1 else f"{count} other processes were"
    return [f"As the run began, {what} on the GPU: speeds and free memory suffer. Wait for the end."] if count else []


# --- first answers ---------------------------------------------------------------------------------------------------


def cached_answers(plan: Plan, loaded: LoadedModel, emit: child.Emit) -> bytes:
    """The answers as JSON, written once for these weights, texts, prompts and settings."""
    identity = [
        *(loaded.sha256, loaded.bits.id, tokenizer_sha256(loaded.tokenizer)),
        sorted(chat.end_ids(loaded.model, loaded.tokenizer)),
        *(plan.prompt_set.sha256, plan.system, plan.raw, plan.max_new_tokens),
    ]
    key = hashlib.sha256(msgspec.json.encode(identity)).hexdigest()
    path = cache_dir() / "first_answers" / f"{key}.json"
    if path.is_file():
        return path.read_bytes()
    return write_atomically(path, msgspec.json.encode(first_answers(plan, loaded, emit)))


def tokenizer_sha256(tokenizer: Any) -> str:
    """Of what makes ids of a text: the tokenizer's own file where it has one, its special tokens, the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    parts = [type(tokenizer).__name__, own, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def first_answers(plan: Plan, loaded: LoadedModel, emit: child.Emit) -> Answers:
    """By prompt id, the answers to all turns but the last, greedy."""
    waiting = [prompt for prompt in plan.prompt_set.prompts if len(prompt.turns) > 1]
    limits = Limits(plan.max_new_tokens, chat.end_ids(loaded.model, loaded.tokenizer))
    answers: Answers = {prompt.id: [] for prompt in waiting}
    for count, prompt in enumerate(waiting):
        emit(child.Preparing(f"writing first answers ({count + 1} of {len(waiting)})"))
        for index in range(len(prompt.turns) - 1):
            turns = prompt.turns[: index + 1]
            ids = dialogue.encode(loaded.tokenizer, turns, answers[prompt.id], system=plan.system, raw=plan.raw)
            answers[prompt.id].append(dialogue.decode(loaded.tokenizer, greedy(loaded.model, ids, limits)))
    return answers


def greedy(model: Any, prompt: list[int], limits: Limits) -> list[int]:
    sampler = Sampler()
    try:
        target, decoder = seat(model, method.parse_one("ar"), None, sampler, len(prompt) + limits.max_new_tokens)
    except ValueError as error:  # an architecture that no decoder here can walk
        raise UserError(str(error)) from error
    return [token for step in decode(target, decoder, prompt, limits, sampler) for token in step.committed]


# --- targets with a drafter merged into them --------------------------------------------------------------------------


def merged(
    base: ModelSource, base_sha256: str, merge: Merge, emit: child.Emit, *, trust_remote_code: bool = False
) -> ModelSource:
    """A float32 checkpoint of the base plus the method's deltas, in the cache.

    Raises UserError for a drafter whose deltas are not this target's.
    """
    path = Path(merge.drafter)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    key = hashlib.sha256(f"{base_sha256} {merge.method} {weights.weights_sha256(files)}".encode()).hexdigest()[:32]
    directory = cache_dir() / "merged" / key
    if not directory.is_dir():
        emit(child.Preparing(f"merging {path.name} into the target"))
        loaded = weights.load(base, Bits(32), device="cpu", trust_remote_code=trust_remote_code)
        deltas = method.find(merge.method).deltas(path, loaded.model.config.get_text_config().num_hidden_layers)
        parameters = dict(loaded.model.named_parameters())
        full = {name: name if name in parameters else f"model.{name}" for name in deltas}
        for name, delta in deltas.items():
            if full[name] not in parameters or parameters[full[name]].shape != delta.shape:
                shape = " x ".join(map(str, delta.shape))
                raise UserError(
                    f"the {merge.method} drafter {path} was trained for another model than {base.name}, which has no "
                    f"{name} of shape {shape}: name another drafter"
                )
        for name, delta in deltas.items():
            parameters[full[name]].data += delta
        partial = directory.with_name(f"{key}.{os.getpid()}.partial")
        loaded.model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        partial.rename(directory)
    return ModelSource(f"{base.name} + {merge.method}", str(directory), "local")


if __name__ == "__main__":
    sys.exit(main())
