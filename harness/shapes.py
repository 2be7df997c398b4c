"""Models without weights: configurations as facts, and random weights made where they are needed, a layer at a time.

A shape costs what the real model costs in time and memory and says nothing: which tokens it would accept has to be
drawn (`harness.acceptance`). Weights are normal with standard deviation 1 / sqrt(fan in), the matrices that write into
the residual stream smaller by sqrt(2 L), so that activations stay finite however deep the model is. Six features of
every layer's input are large, as in real models of 7 billion parameters (LLM.int8, arXiv 2208.07339, section 4), so
that an outlier threshold finds work.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.paths import cache_dir

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.method import Spec
    from harness.weights import Bits, ModelSource
    from prompts import PromptSet

PREFIX = "shape:"
SEED = 0
CONTEXT, PROMPTS = 512, 4
"tokens of a prompt, and prompts of a run, where the user says nothing"
OUTLIER_FEATURES, OUTLIER_SCALE = 6, 20.0
SHARPNESS = 8.0
"standard deviation of the logits: the likeliest token gets most of the mass, as in a trained model"
DRAFT_ROWS = 32_000
"rows of a random drafter's output head at most, as in the checkpoints that EAGLE-3 published; smaller ones are whole"


def _llama(width: int, inner: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    } | others


def _qwen3(width: int, inner: int, *, tied: bool) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1_000_000.0}
    others = {"vocab_size": 151_936, "max_position_embeddings": 40_960, "rope_parameters": rope}
    others |= {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied}
    return _llama(width, inner, 36, 32, model_type="qwen3", **others)


SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 11_008, 32, 32),
    "llama-2-13b": _llama(5120, 13_824, 40, 40),
    "llama-3.1-8b": _llama(
        *(4096, 14_336, 32, 32),
        vocab_size=128_256,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "phi-3-mini": _llama(3072, 8192, 32, 32, model_type="phi3", vocab_size=32_064, sliding_window=2047),
    "qwen3-4b": _qwen3(2560, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, tied=False),
    "tiny": _llama(64, 128, 8, 4, vocab_size=256, num_key_value_heads=2),
}
"name -> what its config.json says; `tiny` is nobody's, for tests and for a look at the command line"


def source(model: str) -> ModelSource:
    """`shape:NAME` or `shape:path/to/config.json`. Raises UserError."""
    from harness.weights import ModelSource

    name = model.removeprefix(PREFIX)
    if name in SHAPES:
        return ModelSource(model, name, "shape")
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no shape {name!r}: give {', '.join(SHAPES)}, or the path of a config.json")
    found = ModelSource(f"{PREFIX}{path.resolve().parent.name}", str(path.resolve()), "shape")
    configuration(found)
    return found


def facts(of: ModelSource) -> dict[str, Any]:
    """The configuration as written. Raises UserError for a file that holds none."""
    if of.location in SHAPES:
        return SHAPES[of.location]
    try:
        read = json.loads(Path(of.location).read_text(encoding="utf-8"))
        return {key: value for key, value in read.items() if key not in ("quantization_config", "auto_map")}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{of.location} is no config.json of a model: {error}") from error


def configuration(of: ModelSource) -> Any:
    """As transformers has it. Raises UserError for an architecture that cannot be decoded here."""
    from transformers import CONFIG_MAPPING

    from harness.trunk import ARCHITECTURES, unsupported

    fields = facts(of)
    kind = fields.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{of.name} has the architecture {kind!r}; these can be decoded: {', '.join(ARCHITECTURES)}")
    try:
        made = CONFIG_MAPPING[kind].from_dict(fields)
    except Exception as error:  # each architecture checks its own fields in its own way
        raise UserError(f"{of.name} has a configuration that transformers refuses: {error}") from error
    if reason := unsupported(made):
        raise UserError(f"{of.name}: {reason}")
    return made


def prompt_set(limit: int | None) -> PromptSet:
    """Prompts without words: each stands for random ids of its own."""
    from prompts import Prompt, PromptSet

    named = [Prompt(id=f"random-{index:02}", category="random", turns=("",)) for index in range(limit or PROMPTS)]
    return PromptSet(name="synthetic", prompts=tuple(named), source="random token ids")


def random_ids(prompt: str, length: int, vocabulary: int) -> list[int]:
    """The same for the same prompt's name and length."""
    draw = random.Random(f"{SEED}/{prompt}/{length}")
    return [draw.randrange(vocabulary) for _ in range(length)]


def identity(of: ModelSource) -> str:
    """SHA-256 of what the weights are made from."""
    return hashlib.sha256(json.dumps([facts(of), SEED], sort_keys=True).encode()).hexdigest()


# --- weights ---------------------------------------------------------------------------------------------------------


def build(of: ModelSource, bits: Bits, *, device: str, dtype: torch.dtype) -> Any:
    """The model with random weights on `device`. No more than one matrix exists in another precision at any time."""
    import torch

    model = hollow(of, dtype)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name in [name for name, _ in model.named_modules()]:  # names: a list of modules would keep all of them
            module = model.get_submodule(name)
            if isinstance(module, torch.nn.Linear) and bits.width < 16 and name.startswith("model.layers."):
                _replace(model, name, _quantised(_filled(model, name, module, device, generator), bits, dtype))
            elif list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
                if name == "lm_head" and model.config.tie_word_embeddings:
                    module.weight = model.model.embed_tokens.weight
                else:
                    _filled(model, name, module, device, generator)
    return model.eval().requires_grad_(False)


def hollow(of: ModelSource, dtype: torch.dtype) -> Any:
    """The model's modules without any memory behind them."""
    import torch
    from transformers import AutoModelForCausalLM

    causal_lm: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return causal_lm.from_config(configuration(of), dtype=dtype).eval()


def _filled(model: Any, name: str, module: nn.Module, device: str, generator: torch.Generator) -> Any:
    """The module's own tensors, made on the device: matrices at random, the others as transformers makes them."""
    module.to_empty(device=device, recurse=False)
    matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
    if not matrices or list(module.buffers(recurse=False)):
        model._init_weights(module)
    for parameter in module.parameters(recurse=False):
        if parameter.dim() > 1:
            parameter.normal_(std=_std(name, parameter.shape[-1], model.config.num_hidden_layers), generator=generator)
        elif matrices:
            parameter.zero_()  # a bias
    weight: Any = module.weight if hasattr(module, "weight") else None
    if name.startswith("model.layers.") and name.rpartition(".")[2] in _readers(model):
        weight[:OUTLIER_FEATURES] += OUTLIER_SCALE - 1
    if name == "model.norm":
        weight += SHARPNESS - 1
    return module


def _std(name: str, fan_in: int, layers: int) -> float:
    writes = name.endswith(("o_proj", "down_proj"))
    return float((fan_in * (2 * layers if writes else 1)) ** -0.5)


def _readers(model: Any) -> tuple[str, ...]:
    """Names of the norms whose outputs attention and MLP read."""
    from harness.trunk import ARCHITECTURES

    before_attention, _, before_mlp, _ = ARCHITECTURES[model.config.model_type]
    return (before_attention, before_mlp)


def _quantised(linear: nn.Linear, bits: Bits, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layer of the same weights, as transformers would have loaded it."""
    import bitsandbytes as bnb
    import torch

    weight = linear.weight.data
    kit: Any = bnb.nn
    with torch.device("meta"):
        if bits.width == 8:
            made = kit.Linear8bitLt(
                *(linear.in_features, linear.out_features, linear.bias is not None),
                has_fp16_weights=False,
                threshold=bits.threshold,
            )
        else:
            made = kit.Linear4bit(
                *(linear.in_features, linear.out_features, linear.bias is not None),
                compute_dtype=dtype,
                compress_statistics=False,
                quant_type="nf4",
            )
    if bits.width == 8:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        made.weight = kit.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    else:
        packed = kit.Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4")
        made.weight = packed.to(weight.device)
    made.bias = linear.bias
    return made  # type: ignore[no-any-return]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# --- drafters --------------------------------------------------------------------------------------------------------


def drafter_path(of: ModelSource, spec: Spec, name: str) -> Path:
    """Where the random drafter `name` of a method with these options lies, or will."""
    from harness.drafter import slug

    options = hashlib.sha256(json.dumps(spec.options, sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir() / "drafters" / slug(f"{of.name}-{identity(of)[:12]}") / f"{name}-{options}.safetensors"


def write_drafter(of: ModelSource, spec: Spec, path: Path) -> None:
    """What `harness train` would write for this method, with random numbers in it. Raises UserError."""
    import torch

    from harness import drafter, method
    from harness.trunk import Trunk

    trunk = Trunk(hollow(of, torch.bfloat16))
    rows = None if trunk.vocabulary <= DRAFT_ROWS * 1.1 else torch.arange(DRAFT_ROWS, device="meta")
    seed_ids = torch.zeros(1, dtype=torch.long, device="meta")
    try:
        with torch.device("meta"):
            trainee = method.find(spec.name).trainee(trunk, method.options_of(spec), rows, seed_ids)
    except ValueError as error:  # what the user asked for does not suit this shape
        raise UserError(f"{spec.label}: {error}") from error
    if trainee is None:
        raise UserError(f"{spec.label} wants a trained drafter and cannot make one: give its drafter= option")
    generator = torch.Generator().manual_seed(SEED)
    tensors = dict(_random(trainee.tensors(), generator))
    if rows is not None:
        tensors["vocabulary"] = torch.arange(DRAFT_ROWS, dtype=torch.int32)
    drafter.write(path, tensors, trainee.config(), {})


def _random(like: dict[str, torch.Tensor], generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for name, tensor in like.items():
        if not tensor.is_floating_point():
            continue
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        if tensor.dim() > 1:
            made.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
        else:
            made.fill_(0.0 if name.endswith("bias") else SHARPNESS if name == "norm.weight" else 1.0)
        yield name, made
