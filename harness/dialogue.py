"""From a prompt's turns to token ids, and from new tokens back to text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from itertools import chain, zip_longest
from typing import Any

from harness.errors import UserError

TODAY = datetime(2024, 7, 26)
"""for chat templates that print today's date, so that a prompt is the same tomorrow; the day that Llama 3.1's template
prints where it is told none"""
ASKS_THE_DATE = "strftime_now"


def encode(tokenizer: Any, turns: Sequence[str], answers: Sequence[str], *, system: str | None, raw: bool) -> list[int]:
    """Ids of `turns` with `answers` between them (one less), ready for the next answer.

    `raw` leaves the chat template out. Raises UserError for a tokenizer that has none, or whose template refuses this.
    """
    from jinja2 import TemplateError

    if raw:
        said = chain.from_iterable(zip_longest(turns, answers, fillvalue=""))
        return list(tokenizer("\n\n".join(text for text in said if text)).input_ids)
    if tokenizer.chat_template is None:
        raise UserError("this model's tokenizer has no chat template: add --raw to give it the prompts as they are")
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn, answer in zip_longest(turns, answers):
        messages.append({"role": "user", "content": turn})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    try:
        text = filled(tokenizer, messages, add_generation_prompt=True)
    except TemplateError as error:
        advice = "add --raw" if system is None else "leave --system out, or add --raw"
        reason = " ".join(str(error).split())
        raise UserError(f"this model's chat template refuses the conversation ({reason}): {advice}") from error
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def filled(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> str:
    """The text of a conversation in the tokenizer's chat template, where it is always TODAY."""
    template: str = tokenizer.get_chat_template()
    if ASKS_THE_DATE in template:
        template = _telling_today() + template
    text: str = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    return text


@cache
def _telling_today() -> str:
    """A macro of the name by which templates ask: it comes before transformers' function, which none can replace."""
    days = {letter: TODAY.strftime(f"%{letter}") for letter in "aAbBcdDeFhHIjmMpRSTuUVwWxXyY"}
    told = "".join(
        f".replace('%{letter}', '{day}').replace('%-{letter}', '{day.lstrip('0') or '0'}')"
        for letter, day in days.items()
    )
    return f"{{%- macro {ASKS_THE_DATE}(format) -%}}{{{{ format{told} }}}}{{%- endmacro +%}}"


def padded(tokenizer: Any, ids: list[int], filler: Sequence[str], context: int) -> list[int]:
    """`ids` at the end of exactly `context` tokens, the text before them repeated as often as it takes.

    A first token that begins every text, and nothing within it, stays first. Raises UserError where the ids are too
    many.
    """
    missing = context - len(ids)
    if missing < 0:
        raise UserError(
            f"a prompt of {len(ids)} tokens is longer than a context of {context}: give a larger --context, or leave "
            "long prompts out"
        )
    begin = 1 if ids[:1] == [tokenizer.bos_token_id] and ids.count(ids[0]) == 1 else 0
    said = list(tokenizer("\n\n".join(filler), add_special_tokens=False).input_ids)
    before = said * (missing // len(said) + 1)
    return [*ids[:begin], *before[:missing], *ids[begin:]]


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """One text a token, which join to `decode(tokens)`; a token in the middle of a character gives an empty one."""
    done, text = "", ""
    parts = []
    for count in range(1, len(tokens) + 1):
        text = decode(tokenizer, tokens[:count])
        whole = text.startswith(done) and (count == len(tokens) or not text.endswith("\ufffd"))
        parts.append(text[len(done) :] if whole else "")
        done = text if whole else done
    if done != text:  # a decoder that rewrites what it said before
        return [*[""] * (len(tokens) - 1), text]
    return parts
