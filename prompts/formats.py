"""Public prompt formats, told apart by the field that holds the prompt.

turns      ours; MT-Bench and Spec-Bench `question.jsonl` (github.com/lm-sys/FastChat, github.com/hemingkx/Spec-Bench)
messages   chat lines of role and content; the user's messages are the turns, the others are left out
prompt     HumanEval (github.com/openai/human-eval), plain lines; the text is taken as it stands
question   GSM8K (github.com/openai/grade-school-math)

A line may carry more (answers, tests, references): it is left out, unless it looks like a misspelt field of ours.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from harness.errors import UserError
from prompts.prompt import Prompt


class Row(NamedTuple):
    """One decoded line: `where` names it in errors, `number` counts from 1 and makes the id of a row that has none."""

    where: str
    number: int
    value: object


def read(rows: Iterable[Row], *, stem: str) -> tuple[Prompt, ...]:
    """Prompts of any mixture of formats; `stem` names the category and the ids where a row does not.

    Raises UserError, in one line that names the row, where a row holds no prompt or repeats an id.
    """
    prompts: dict[str, Prompt] = {}
    seen_at: dict[str, str] = {}
    for row in rows:
        prompt = _prompt(row, stem=stem)
        if prompt.id in prompts:
            raise UserError(
                f"{row.where}: id {prompt.id!r} was used before, at {seen_at[prompt.id]}; give each prompt its own id"
            )
        prompts[prompt.id] = prompt
        seen_at[prompt.id] = row.where
    return tuple(prompts.values())


def _turns(where: str, value: object) -> tuple[str, ...]:
    """The turns of `turns` or of `prompt`: a list of texts, or one text."""
    turns = (value,) if isinstance(value, str) else value
    if not isinstance(turns, list | tuple) or not turns:
        raise UserError(f"{where}: no turns; give a list with at least one text")
    texts: list[str] = []
    for index, turn in enumerate(turns, start=1):
        if not isinstance(turn, str) or not turn.strip():
            raise UserError(f"{where}: turn {index} is {_kind(turn)}; every turn must be a text that says something")
        texts.append(turn)
    return tuple(texts)


def _user_turns(where: str, value: object) -> tuple[str, ...]:
    turns: list[object] = []
    for message in value if isinstance(value, list | tuple) else ():
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise UserError(f'{where}: a message needs two fields, as in {{"role": "user", "content": "..."}}')
        if message["role"] == "user":
            turns.append(message["content"])
    if not turns:
        raise UserError(f'{where}: no message of the user; give "messages" at least one with the role "user"')
    return _turns(where, turns)


# The first of these fields that a row has holds its prompt.
TURNS: Mapping[str, Callable[[str, object], tuple[str, ...]]] = {
    "turns": _turns,
    "messages": _user_turns,
    "prompt": _turns,
    "question": _turns,
}
IDS = ("id", "question_id", "task_id", "prompt_id")
CATEGORY = "category"


def _prompt(row: Row, *, stem: str) -> Prompt:
    if not isinstance(row.value, Mapping):
        raise UserError(f"{row.where}: {_kind(row.value)}, not a JSON object; write one object on each line")
    fields = {name: value for name, value in row.value.items() if value is not None}
    _reject_misspelt(row.where, fields)
    holder = next((name for name in TURNS if name in fields), None)
    if holder is None:
        raise UserError(
            f"{row.where}: no prompt in the fields {_listed(fields)}; name the field that holds it {_listed(TURNS)}"
        )
    identity = next((fields[name] for name in IDS if name in fields), f"{stem}-{row.number:04d}")
    if isinstance(identity, bool) or not isinstance(identity, int | str) or identity == "":
        raise UserError(f"{row.where}: the id is {_kind(identity)}; it must be a text or a whole number")
    category = fields.get(CATEGORY, stem)
    if not isinstance(category, str) or not category.strip():
        raise UserError(f"{row.where}: the category is {_kind(category)}; it must be a text, or leave the field out")
    return Prompt(id=str(identity), category=category, turns=TURNS[holder](row.where, fields[holder]))


def _reject_misspelt(where: str, fields: Mapping[str, object]) -> None:
    """A misspelt `category` would silently put every prompt into the same one, so ask instead of guessing."""
    missing = [name for group in (IDS, (*TURNS,), (CATEGORY,)) if not fields.keys() & set(group) for name in group]
    for name in fields:
        if close := get_close_matches(name, missing, n=1, cutoff=0.85):
            raise UserError(f"{where}: unknown field {name!r}; did you mean {close[0]!r}?")


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "") if shown else "(none)"


def _kind(value: object) -> str:
    """What a person calls a JSON value: the error says what was found, whatever its size."""
    if isinstance(value, str):
        return "a text" if value.strip() else "an empty text"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"the number {value}"
    return "an object" if isinstance(value, Mapping) else "a list"
