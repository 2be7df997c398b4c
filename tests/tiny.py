"""Tiny random models of the architectures the harness claims, made in a moment, with well separated argmaxes."""

from __future__ import annotations

from typing import Any

import torch

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB, WINDOW = 64, 4, 4, 2, 16, 128, 16
ALTERNATING = ("gemma2", "gemma3")  # every other layer sees only WINDOW tokens back
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3", *ALTERNATING)


def tiny(architecture: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A float32 causal language model on the CPU, in eval mode, the same for the same seed; overrides go to its config.

    `tiny("mistral", sliding_window=8)` has a window; gemma2 and gemma3 have one in every other layer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    causal_lm: Any = AutoModelForCausalLM
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # logits of unit features spread by 0.3 * sqrt(HIDDEN) = 2.4
        "tie_word_embeddings": False,  # tied random models repeat their last token for ever
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if architecture not in ("phi3", "qwen2"):  # these two derive it
        fields["head_dim"] = HEAD_DIM
    if architecture == "mistral":
        fields["sliding_window"] = None
    if architecture in ALTERNATING:
        layers = overrides.get("num_hidden_layers", LAYERS)
        kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
        fields |= {"sliding_window": WINDOW, "layer_types": kinds, "query_pre_attn_scalar": HEAD_DIM}
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    config = AutoConfig.for_model(model_type, **fields | overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = causal_lm.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)
