"""A tiny random chat model in a directory: what `--model` takes, loaded in a moment."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import tiny

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|start|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def save(directory: Path, *, chat: bool = True, seed: int = 0, architecture: str = "llama") -> Path:
    """A Llama (or another) of four layers over bytes, with a chat template if `chat`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE if chat else None
    tiny(architecture, seed=seed, vocab_size=len(alphabet)).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def prompts(path: Path) -> Path:
    """Three prompts, the second with a second turn: four answers."""
    lines = [
        {"id": "one", "category": "writing", "turns": ["Hi."]},
        {"id": "two", "category": "math", "turns": ["Count to four.", "And on to eight."]},
        {"id": "three", "category": "writing", "turns": ["Name a bird, a tree and a river."]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
