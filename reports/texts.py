"""What the methods wrote: the token view, pass by pass, and where a text parts from the target's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.metrics import Row, first_difference
from harness.results import Run, Trial
from reports.tables import grouped, plain

MOST_TRIALS = 200
MOST_TOKENS = 40_000
MOST_REJECTED = 12
CONTEXT_TOKENS = 16
AFTER_TOKENS = 10
DEEPEST_SHADE = 6

Answers = Mapping[tuple[str, str, int], Trial]
"(cell, prompt, turn) to the trial of its first round that has a text"


@dataclass(frozen=True)
class Token:
    text: str
    depth: int
    "of the accepted draft that it was, from 1; 0: the target's own"


@dataclass(frozen=True)
class Pass:
    """Tokens that entered the text together; pass 0 is the prompt's own, which gives the first token."""

    tokens: tuple[Token, ...]
    told: str
    "what was drafted, accepted and rejected, in words"


@dataclass(frozen=True)
class Answer:
    label: str
    note: str
    passes: tuple[Pass, ...]
    text: str
    "the whole text, for a file that does not hold the text of each token"


@dataclass(frozen=True)
class PromptView:
    title: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class TokenView:
    target: str
    prompts: tuple[PromptView, ...]
    left_out: int
    "prompts"
    other_targets: tuple[str, ...]


@dataclass(frozen=True)
class Divergence:
    """The first place where a method's text is not the baseline's; the texts are None where the file has none."""

    label: str
    prompt: str
    position: int
    "tokens before it that agree"
    before: str | None
    expected: str | None
    written: str | None


def answers(run: Run) -> Answers:
    found: dict[tuple[str, str, int], Trial] = {}
    for trial in run.rows:
        if trial.outcome == "ok" and trial.text is not None:
            found.setdefault((trial.cell.id, trial.prompt_id, trial.turn), trial)
    return found


def token_view(run: Run, rows: Sequence[Row], texts: Answers) -> TokenView | None:
    """The target that most methods finished, prompt by prompt up to the limits; None where no trial has a text."""
    cells = {cell for cell, _, _ in texts}
    groups = [(target, [row for row in group if row.cell.id in cells]) for target, group in grouped(rows)]
    target, group = max(groups, key=lambda pair: len(pair[1]), default=("", []))
    ids = [row.cell.id for row in group]
    prompts = dict.fromkeys((prompt, turn) for cell, prompt, turn in texts if cell in ids)
    views: list[PromptView] = []
    trials = tokens = 0
    for prompt, turn in prompts:
        told = [(row, trial) for row in group if (trial := texts.get((row.cell.id, prompt, turn)))]
        trials, tokens = trials + len(told), tokens + sum(len(trial.new_tokens or ()) for _, trial in told)
        if views and (trials > MOST_TRIALS or tokens > MOST_TOKENS):
            break
        title = f"{prompt}, {told[0][1].category}" + (f", turn {turn + 1}" if run.manifest.turns > 1 else "")
        views.append(PromptView(plain(title), tuple(_answer(row, trial) for row, trial in told)))
    others = tuple(name for name, _ in groups if name != target)
    return TokenView(target, tuple(views), len(prompts) - len(views), others) if views else None


def _answer(row: Row, trial: Trial) -> Answer:
    tokens, count = len(trial.new_tokens or ()), len(trial.committed or ())
    tau = f", τ {(tokens - 1) / count:.2f}" if count else ""
    note = f"{tokens} tokens in {count} passes{tau}"
    return Answer(plain(row.cell.label), note, tuple(_passes(trial)), trial.text or "")


def _passes(trial: Trial) -> list[Pass]:
    """Nothing for a trial that does not hold the text of each token, or whose counts do not add up to it."""
    pieces, committed = trial.token_texts or [], trial.committed or []
    if not pieces or sum(committed) + 1 != len(pieces):
        return []
    passes = [Pass((Token(pieces[0], 0),), "the prompt's own pass: 1 token")]
    at = 1
    for number, size in enumerate(committed):
        if not size:
            continue
        accepted = trial.accepted[number] if trial.accepted else 0
        tokens = tuple(
            Token(piece, depth if depth <= accepted else 0) for depth, piece in enumerate(pieces[at : at + size], 1)
        )
        passes.append(Pass(tokens, _told(trial, number, size, accepted)))
        at += size
    return passes


def _told(trial: Trial, number: int, size: int, accepted: int) -> str:
    text = f"pass {number + 1}: {size} token{'s' * (size != 1)}"
    if trial.drafted and trial.drafted[number]:
        text += f"; {trial.drafted[number]} drafted, {accepted} accepted"
    if trial.rejected and trial.rejected[number]:
        pieces = trial.rejected[number]
        more = f" and {len(pieces) - MOST_REJECTED} more" if len(pieces) > MOST_REJECTED else ""
        text += f"; rejected: {' '.join(f'«{visible(piece)}»' for piece in pieces[:MOST_REJECTED])}{more}"
    return text


def divergences(rows: Sequence[Row], texts: Answers) -> list[Divergence]:
    """For each row that parts from its baseline, the answer that parts first; sampled and drawn texts tell nothing."""
    found = []
    for row in rows:
        if row.temperature > 0 or row.verdict.kind == "drawn":
            continue
        pairs = [
            (position, key, trial, base)
            for key, trial in texts.items()
            if row.baseline and key[0] == row.cell.id and (base := texts.get((row.baseline, *key[1:])))
            if (position := first_difference(trial.new_tokens or (), base.new_tokens or ())) is not None
        ]
        if pairs and not row.is_baseline:
            position, key, trial, base = min(pairs, key=lambda pair: pair[0])
            found.append(_divergence(row, key, position, trial, base))
    return found


def _divergence(row: Row, key: tuple[str, str, int], position: int, trial: Trial, base: Trial) -> Divergence:
    own, target = trial.token_texts, base.token_texts
    whole = bool(own and target)
    return Divergence(
        label=plain(row.cell.label),
        prompt=plain(f"{key[1]}, turn {key[2] + 1}" if key[2] else key[1]),
        position=position,
        before=_joined(target, max(position - CONTEXT_TOKENS, 0), position) if whole else None,
        expected=_joined(target, position, position + AFTER_TOKENS) if whole else None,
        written=_joined(own, position, position + AFTER_TOKENS) if whole else None,
    )


def _joined(pieces: Sequence[str] | None, start: int, end: int) -> str:
    return visible("".join((pieces or ())[start:end]))


def visible(text: str) -> str:
    """A token's text with its line ends shown."""
    return plain(text.replace("\n", "↵").replace("\t", "⇥"))
