"""What a model's text begins and ends with."""

from __future__ import annotations

from typing import Any


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a text, by the generation config, the config and the tokenizer."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return frozenset(found)
