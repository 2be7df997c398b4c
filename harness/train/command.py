"""`python -m harness train`: from a model's name to drafters on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from harness import chat, drafter, meters, weights
from harness.errors import UserError
from harness.lesson import Trainee
from harness.method import Method, Spec, find, options_of, parse
from harness.paths import cache_dir, save_tensors
from harness.train import corpus as corpora
from harness.train.loop import Classroom, Pupil, Recipe, Report, draft_vocabulary
from harness.trunk import Trunk

SHORTEST = 16
"sequence, tokens"


@dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out."""

    methods: str = "s3d,medusa,eagle"
    model: str | None = None
    tokens: int = 20_000_000
    corpus_tokens: int | None = None
    data: Path | None = None
    draft_vocabulary: int = 8192
    length: int = 512
    batch: int = 64
    anchors: int = 48
    learning_rate: float = 1e-3
    seed: int = 0
    device: str = "cpu"
    out: Path | None = None

    def recipe(self) -> dict[str, str]:
        """What decides the weights: all but where they are made and put."""
        return {key: str(value) for key, value in asdict(self).items() if key not in ("out", "device")}


class Narrator(Protocol):
    """Who is told what is going on."""

    def stage(self, step: str, fraction: float | None) -> None: ...

    def report(self, report: Report) -> None: ...


def train(
    settings: Settings,
    narrator: Narrator,
    *,
    restart: bool = False,
    stop_after_seconds: float | None = None,
) -> list[Path]:
    """Train and write the drafters; returns their paths, or nothing where the time was up before the end.

    Calling it again with the same settings goes on where it stopped. Raises UserError.
    """
    specs = parse(settings.methods)
    if idle := [spec.name for spec in specs if not _trains(find(spec.name))]:
        raise UserError(f"method {idle[0]!r} has nothing to train: leave it out of --methods")
    _refuse_twins(specs)
    if settings.length < SHORTEST:
        raise UserError(f"--length {settings.length} has no room for a dialogue: give {SHORTEST} or more")
    source = weights.resolve(settings.model)
    if source.kind == "shape":
        raise UserError(f"{settings.model} has random weights and no tokenizer, so no text to learn from: name a model")
    folder = settings.out or cache_dir() / "drafters" / drafter.slug(source.name)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: give another --out")
    # Drafters keep float32 weights beside a bfloat16 target; that their norms cannot be fused then is no news.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    bits = weights.Bits(32 if settings.device == "cpu" else 16)
    loaded = weights.load(source, bits, device=settings.device)
    try:
        trunk = Trunk(loaded.model)
    except ValueError as error:  # an architecture that cannot be walked
        raise UserError(str(error)) from error
    for spec in specs:  # options that do not fit the model are refused here, and not after hours of writing
        _trainee(spec, trunk, None, torch.zeros(1, dtype=torch.long, device=trunk.device))
    end_ids = chat.end_ids(loaded.model, loaded.tokenizer)
    first_turns = _first_turns(settings.data)
    tokens = settings.corpus_tokens or min(settings.tokens, 5_000_000)
    corpus = corpora.make(
        trunk, loaded.tokenizer, sorted(end_ids), identity=loaded.sha256, tokens=tokens,
        length=settings.length, batch=256 if settings.device == "cpu" else 2304, seed=settings.seed,
        first_turns=first_turns, on_progress=narrator.stage,
    )  # fmt: skip
    vocabulary_V = draft_vocabulary(corpus, settings.draft_vocabulary, trunk.vocabulary, end_ids)
    seed_ids = corpus.ids_RT[:16].flatten().to(trunk.device)
    torch.manual_seed(settings.seed)
    trainees = {spec.label: _trainee(spec, trunk, vocabulary_V, seed_ids) for spec in specs}
    recipe = Recipe(settings.tokens, settings.batch, settings.anchors, settings.learning_rate, seed=settings.seed)
    room = Classroom(trunk, corpus, trainees, vocabulary_V, recipe)
    text = corpora.place(loaded.sha256, tokens, settings.length, settings.seed, first_turns).stem
    unfinished = _unfinished(settings, loaded.sha256, text)
    if unfinished.is_file() and not restart:
        try:
            room.resume(drafter.tensors(unfinished))
        except SafetensorError as error:
            raise UserError(f"the unfinished training {unfinished} is damaged ({error}): add --restart") from error
        narrator.stage(f"going on from step {room.step} of {room.steps}", room.step / room.steps)
    finished = room.run(
        on_report=narrator.report,
        save=lambda: save_tensors(unfinished, room.state()),
        stop_after_seconds=stop_after_seconds,
    )
    if not finished:
        return []
    paths = _write(room, specs, folder, settings, source.name, loaded.sha256)
    unfinished.unlink(missing_ok=True)
    return paths


def _trains(kind: type[Method]) -> bool:
    return any("trainee" in vars(base) for base in kind.__mro__[: kind.__mro__.index(Method)])


def _refuse_twins(specs: Sequence[Spec]) -> None:
    """Raise UserError where two drafters would be written to one file."""
    first: dict[str, str] = {}
    for spec in specs:
        name = _file_name(spec)
        if name in first:
            raise UserError(
                f"{first[name]} and {spec.label} would both be written to {name}: train them one by one, each with its "
                "own --out"
            )
        first[name] = spec.label


def _file_name(spec: Spec) -> str:
    return f"{find(spec.name).drafter_name(options_of(spec))}.safetensors"


def _trainee(spec: Spec, trunk: Trunk, vocabulary_V: torch.Tensor | None, seed_ids: torch.Tensor) -> Trainee:
    """Raises UserError where the options do not fit the model."""
    method: type[Method] = find(spec.name)
    try:
        made = method.trainee(trunk, options_of(spec), vocabulary_V, seed_ids)
    except ValueError as error:
        raise UserError(f"{spec.label}: {error}") from error
    assert made is not None, spec.name
    return made


def _first_turns(data: Path | None) -> list[str] | None:
    if data is None:
        return None
    from prompts import load

    return [prompt.turns[0] for prompt in load(str(data)).prompts]


def _unfinished(settings: Settings, identity: str, text: str) -> Path:
    """Where an interrupted training is kept; `text` is the corpus's name, for a file of `--data` may change."""
    key = hashlib.sha256(json.dumps([identity, text, settings.recipe()], sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "unfinished" / f"{key}.safetensors"


def _write(
    room: Classroom, specs: Sequence[Spec], folder: Path, settings: Settings, model: str, identity: str
) -> list[Path]:
    agreements = room.evaluate()
    paths = []
    for spec in specs:
        pupil, agreement = room.pupils[spec.label], agreements[spec.label]
        path = folder / _file_name(spec)
        config = pupil.trainee.config() | {"rank_accuracy": agreement.rank_accuracy}
        tensors = pupil.trainee.tensors()
        training = _cost(room, pupil, spec, agreement.tau) | {
            "drafter": path.name,
            "file_bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "model": model,
            "weights_sha256": identity,
            "recipe": settings.recipe(),
        }
        drafter.write(path, tensors, config, training)
        paths.append(path)
    return paths


def _cost(room: Classroom, pupil: Pupil, spec: Spec, tau: float) -> dict[str, Any]:
    """What `harness.results.Training` tells of a method, but for its file."""
    peaks = [room.shared.peak_allocated_bytes, pupil.cost.peak_allocated_bytes]
    return {
        "method": spec.name,
        "device": meters.device_name(room.trunk.device),
        "tokens_seen": room.steps * min(room.recipe.batch, room.train_R.numel()) * room.length,
        "data_tokens": room.corpus.tokens,
        "steps": room.steps,
        "seconds": pupil.cost.seconds,
        "shared_seconds": room.shared.seconds,
        "data_seconds": room.corpus.seconds,
        "flops": room.steps * (pupil.cost.flops + room.shared.flops),
        "peak_allocated_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "parameters": sum(p.numel() for p in pupil.trainee.module.parameters()),
        "held_out_tau": tau,
    }
