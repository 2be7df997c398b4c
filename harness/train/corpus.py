"""Text to learn from, written by the target itself: dialogues with sampled user turns and greedy answers.

No data set is needed, and what a drafter sees is what it will have to guess: the target's own greedy answers. Every
second dialogue starts with a few words of a request (`harness.train.openings`), the others are the model's from the
first word. A file of prompts gives the first user turns instead where the user has one. All sequences are written in
lockstep, one token of each a step, so nothing is padded. Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from harness import dialogue, meters
from harness.attention import CacheView
from harness.errors import UserError
from harness.paths import cache_dir, save_tensors
from harness.sampling import Sampler
from harness.train.openings import openings
from harness.trunk import Trunk

USER_TURN = 96
"longest sampled user turn, tokens"
USER_TEMPERATURE = 0.8
"of the sampled user turns: at 1 a small model's are often no language at all"
ANSWER = 128
"longest greedy answer, tokens: a small model's greedy text repeats itself when it goes on"


@dataclass(frozen=True)
class Corpus:
    """ids_RT: the text, R sequences of T tokens; greedy_RT: true where the token was the target's own first choice."""

    ids_RT: Tensor
    greedy_RT: Tensor
    seconds: float
    "what writing it took"
    device: str

    @property
    def tokens(self) -> int:
        return self.ids_RT.numel()


@dataclass(frozen=True)
class Template:
    """A chat template as token ids: what opens a dialogue, and what stands between the turns."""

    opening: list[int]
    to_answer: list[int]
    to_user: list[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Template:
        """Cut the tokenizer's chat template at its contents. Raises UserError where it has none, or cannot be cut."""
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "this model has no chat template, so it cannot write dialogues to learn from: name an instruct model"
            )
        turns = [("user", "\x01"), ("assistant", "\x02"), ("user", "\x03")]
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = dialogue.filled(tokenizer, messages)
        except TemplateError as error:
            raise UserError(
                f"this model's chat template refuses a plain dialogue ({error}): name another model"
            ) from error
        if [mark for mark in text if mark in "\x01\x02\x03"] != ["\x01", "\x02", "\x03"]:
            raise UserError(
                "this model's chat template does not print every turn once and in order, so it cannot be cut at its "
                "turns: name another model"
            )
        opening, to_answer, to_user, _ = re.split("[\x01-\x03]", text)
        made = cls(*(tokenizer.encode(piece, add_special_tokens=False) for piece in (opening, to_answer, to_user)))
        if not made.to_answer or not made.to_user:
            raise UserError("this model's chat template has nothing between two turns: name another model")
        return made


@torch.no_grad()
def write(
    trunk: Trunk,
    template: Template,
    end_ids: Sequence[int],
    *,
    sequences: int,
    length: int,
    seed: int,
    first_turns: Sequence[Sequence[int]] | None = None,
    begun: Sequence[Sequence[int]] | None = None,
    on_step: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, Tensor]:
    """Write `sequences` dialogues of `length` tokens at once: (ids_BT, greedy_BT), on the CPU.

    `first_turns` are token ids of user turns to begin with, `begun` those of first turns that the model goes on with in
    every second dialogue; both are repeated as often as needed, and cut where they would leave an answer no room.
    Raises UserError where the template alone takes half of `length`, or where there is nothing to begin with.
    """
    if not (template.opening or first_turns):
        raise UserError(
            "this model's chat template prints nothing before the first turn: give first turns with --data, or name "
            "another model"
        )
    device = trunk.device
    opened = [list(template.opening)] * sequences
    around = len(template.opening) + (len(template.to_answer) if first_turns else 0)
    room = length // 2 - around
    if room < 1:
        raise UserError(
            f"--length {length} has no room for a dialogue in this model's chat template: give {2 * around + 2} or more"
        )
    if first_turns:
        opened = [
            [*template.opening, *first_turns[i % len(first_turns)][:room], *template.to_answer]
            for i in range(sequences)
        ]
    elif begun:
        opened[::2] = [[*template.opening, *begun[i % len(begun)][:room]] for i in range(len(opened[::2]))]
    forced_B = torch.tensor([len(opening) for opening in opened], device=device)
    longest = max(map(len, opened))
    opening_BT = torch.tensor([opening + [0] * (longest - len(opening)) for opening in opened], device=device)
    bridges = [template.to_answer, template.to_user]
    width = max(map(len, bridges))
    bridge_2W = torch.tensor([bridge + [0] * (width - len(bridge)) for bridge in bridges], device=device)
    bridge_length_2 = torch.tensor([len(bridge) for bridge in bridges], device=device)
    turn_limit_2 = torch.tensor([USER_TURN, ANSWER], device=device)
    ends = torch.tensor(sorted(end_ids), device=device)
    sampler = Sampler(USER_TEMPERATURE, 1.0, torch.Generator(device).manual_seed(seed))

    # speaker: 0 user, 1 assistant. at: place in the bridge that ends the speaker's turn, or -1 while the turn lasts.
    speaker_B = torch.full((sequences,), 1 if first_turns else 0, device=device)
    at_B = torch.full_like(speaker_B, -1)
    turn_B = torch.zeros_like(speaker_B)
    ids_BT = torch.empty(sequences, length, dtype=torch.long, device=device)
    greedy_BT = torch.zeros(sequences, length, dtype=torch.bool, device=device)
    cache = trunk.cache(length, batch=sequences)
    ids_BT[:, 0] = opening_BT[:, 0]
    for step in range(1, length):
        positions = torch.tensor([step - 1], device=device)
        view = CacheView(cache, step - 1, positions, None, trunk.windows)
        hidden_B1D, _ = trunk.run(trunk.embed(ids_BT[:, step - 1 : step]), positions, view)
        logits_BV = trunk.head(hidden_B1D[:, 0])
        chosen_B = logits_BV.argmax(-1)
        said_B = torch.where(speaker_B == 1, chosen_B, sampler.draw(sampler.distribution(logits_BV)))

        opening_now_B = forced_B > step
        bridging_B = (at_B >= 0) & ~opening_now_B
        talking_B = ~bridging_B & ~opening_now_B
        ending_B = talking_B & (torch.isin(said_B, ends) | (turn_B >= turn_limit_2[speaker_B]))
        place_B = torch.where(ending_B, 0, at_B).clamp_min(0)
        token_B = torch.where(bridging_B | ending_B, bridge_2W[speaker_B, place_B], said_B)
        token_B = torch.where(opening_now_B, opening_BT[:, min(step, longest - 1)], token_B)
        ids_BT[:, step] = token_B
        greedy_BT[:, step] = talking_B & (speaker_B == 1) & (token_B == chosen_B)

        turn_B = torch.where(talking_B & ~ending_B, turn_B + 1, 0)
        at_B = torch.where(bridging_B | ending_B, place_B + 1, -1)
        over_B = at_B >= bridge_length_2[speaker_B]
        speaker_B = torch.where(over_B, 1 - speaker_B, speaker_B)
        at_B = torch.where(over_B, -1, at_B)
        if step % 16 == 0:
            on_step(step)
    return ids_BT.cpu(), greedy_BT.cpu()


def make(
    trunk: Trunk,
    tokenizer: Any,
    end_ids: Sequence[int],
    *,
    identity: str,
    tokens: int,
    length: int,
    batch: int,
    seed: int,
    first_turns: Sequence[str] | None = None,
    on_progress: Callable[[str, float | None], None] = lambda step, fraction: None,
) -> Corpus:
    """The corpus of `tokens` tokens, read from the cache where it was written before, or written now and kept.

    `identity` is the model's (its weights' SHA-256): another model writes another text.
    """
    path = place(identity, tokens, length, seed, first_turns)
    if (kept := read(path)) is not None:
        return kept
    template = Template.of(tokenizer)
    texts = first_turns or openings()
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    sequences = max(2, round(tokens / length))
    parts: dict[Path, Corpus] = {}
    for first in range(0, sequences, batch):
        size = min(batch, sequences - first)
        own = path.with_name(f"{path.stem}-{batch}-{first}{path.suffix}")  # what a run that was stopped goes on from
        if (part := read(own)) is not None:
            parts[own] = part
            continue
        started = time.perf_counter()
        next_text = (first if first_turns else first // 2) % len(encoded)
        share = encoded[next_text:] + encoded[:next_text]

        def tell(step: int, first: int = first, size: int = size, started: float = started) -> None:
            rate = size * step / (time.perf_counter() - started)
            on_progress(
                f"writing text to learn from ({rate:,.0f} tokens/s)", (first + size * step / length) / sequences
            )

        batch_ids, batch_greedy = write(
            trunk,
            template,
            end_ids,
            sequences=size,
            length=length,
            seed=(seed + first) % 2**63,
            first_turns=share if first_turns else None,
            begun=None if first_turns else share,
            on_step=tell,
        )
        seconds, device = time.perf_counter() - started, meters.device_name(trunk.device)
        parts[own] = Corpus(batch_ids, batch_greedy, seconds, device)
        if size < sequences:
            save(own, parts[own])
    written = list(parts.values())
    ids_RT, greedy_RT = torch.cat([part.ids_RT for part in written]), torch.cat([part.greedy_RT for part in written])
    corpus = Corpus(ids_RT, greedy_RT, sum(part.seconds for part in written), meters.device_name(trunk.device))
    save(path, corpus)
    for own in parts:
        own.unlink(missing_ok=True)
    return corpus


def place(identity: str, tokens: int, length: int, seed: int, first_turns: Sequence[str] | None = None) -> Path:
    """Where a corpus is kept, named by all that decides its text."""
    said = [USER_TURN, USER_TEMPERATURE, ANSWER, list(first_turns or openings())]
    if first_turns:
        said.append("whole headers")  # not the texts kept from when a long first turn lost its answer's header
    key = json.dumps([identity, tokens, length, seed, *said])
    return cache_dir() / "corpora" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def save(path: Path, corpus: Corpus) -> None:
    """Write a corpus atomically; ids as 16 bits where they fit."""
    ids = corpus.ids_RT.to(torch.uint16 if int(corpus.ids_RT.max()) < 2**16 else torch.int32)
    tensors = {"ids": ids, "greedy": corpus.greedy_RT.to(torch.uint8)}
    save_tensors(path, tensors, {"seconds": str(corpus.seconds), "device": corpus.device})


def read(path: Path) -> Corpus | None:
    """What `save` wrote; None where it wrote nothing, or its file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            ids, greedy = file.get_tensor("ids"), file.get_tensor("greedy")
    except (FileNotFoundError, SafetensorError):
        return None
    return Corpus(ids.long(), greedy.bool(), float(metadata["seconds"]), metadata["device"])
