"""What a prompt set is: values only, nothing here touches the world."""

import hashlib
import json
from collections.abc import Sequence
from itertools import chain, zip_longest

import msgspec


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """What a user says, turn by turn; the answers in between are not part of a prompt."""

    id: str
    category: str
    turns: tuple[str, ...]


class PromptSet(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts with distinct ids, in the order in which a run decodes them.

    `source` says where they came from, in words; `license` is None where nobody told us.
    """

    name: str
    prompts: tuple[Prompt, ...]
    source: str
    license: str | None = None

    @property
    def sha256(self) -> str:
        """Hex digest of the prompts as canonical JSON (sorted keys, no spaces, UTF-8); name and source do not count."""
        canonical = json.dumps(
            msgspec.to_builtins(self.prompts), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def categories(self) -> tuple[str, ...]:
        """Each category once, in order of appearance."""
        return tuple(dict.fromkeys(prompt.category for prompt in self.prompts))


def take(prompts: Sequence[Prompt], limit: int) -> tuple[Prompt, ...]:
    """`limit` prompts chosen in turns over the categories, so that a small limit still covers many of them.

    The chosen prompts keep their order: a limit that leaves nothing out changes nothing, the hash included.
    """
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    in_turns = [prompt for prompt in chain.from_iterable(zip_longest(*by_category.values())) if prompt is not None]
    chosen = {prompt.id for prompt in in_turns[:limit]}
    return tuple(prompt for prompt in prompts if prompt.id in chosen)
