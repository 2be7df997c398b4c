"""Loading models: the only place that calls `from_pretrained`. From a name to a model whose weights have an identity.

Heavy (imports torch and transformers): nothing else imports this at start-up. Only safetensors are read, and code that
comes with a checkpoint runs only where the user said so.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import nn

from harness import shapes, smollm2
from harness.errors import UserError
from harness.paths import cache_dir

INT8_THRESHOLD = 6.0  # LLM.int8 (arXiv 2208.07339): input features above it are multiplied in 16 bits


class ModelSource(msgspec.Struct, frozen=True):
    """A model as the user named it: what people are shown, and where it is (a directory, or a hub id)."""

    name: str
    location: str
    kind: Literal["default", "local", "hub", "shape"]


class Bits(msgspec.Struct, frozen=True):
    """The precision of the weights; `threshold` is LLM.int8's, and None for the others."""

    width: Literal[32, 16, 8, 4]
    threshold: float | None = None

    def __post_init__(self) -> None:
        assert (self.threshold is None) == (self.width != 8), "8 bits, and no others, have a threshold"

    @property
    def id(self) -> str:
        """`32`, `16`, `int8:t6` or `nf4`: targets whose ids differ have different baselines."""
        match self.width:
            case 8:
                return f"int8:t{Decimal(repr(self.threshold)):f}".removesuffix(".0")
            case 4:
                return "nf4"
            case width:
                return str(width)

    @classmethod
    def parse(cls, text: str) -> Bits:
        """`32`, `16`, `8` (also `int8`, `8:t0`, `int8:t6`) or `4` (also `nf4`). Raises UserError."""
        match text.strip().lower():
            case "32":
                return cls(32)
            case "16":
                return cls(16)
            case "4" | "nf4":
                return cls(4)
            case other if found := re.fullmatch(r"(?:8|int8)(?::t([0-9]{1,9}(?:\.[0-9]{1,9})?))?", other):
                return cls(8, float(found[1] or INT8_THRESHOLD))
        raise UserError(
            f"unknown precision {text!r}: choose 32, 16, 8 (LLM.int8; outlier threshold {INT8_THRESHOLD:g}, or as in "
            "8:t0) or 4 (nf4)"
        )


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in eval mode whose parameters need no gradient, and what it was loaded from.

    `sha256` names the weights as they lie on the disk, so it is the same at all `bits`; `dtype` is what activations are
    computed in; `weight_bytes` counts every tensor once, with the scales of quantised ones, before the first pass.
    """

    model: Any
    tokenizer: Any
    "None for a shape"
    source: ModelSource
    bits: Bits
    dtype: torch.dtype
    sha256: str
    weight_bytes: int


def resolve(model: str | None) -> ModelSource:
    """What `--model` means: nothing or `default` is the embedded one, else a local directory, a hub id or a shape.

    Fetches nothing. Raises UserError for a path that is no model's directory.
    """
    if model is None or model in ("default", "smollm2", smollm2.LABEL):
        return ModelSource(smollm2.LABEL, str(smollm2.location()), "default")
    if model.startswith(shapes.PREFIX):
        return shapes.source(model)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{str(path)!r} has no config.json: give the directory that `save_pretrained` wrote")
        return ModelSource(path.resolve().name, str(path.resolve()), "local")
    if path.exists():
        raise UserError(f"{model} is a file: give the directory that holds it with its config.json")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise UserError(
            f"{model} is neither a directory nor a hub id (org/name); leave --model out for {smollm2.LABEL}"
        )
    return ModelSource(model, model, "hub")


def default_bits(device: str) -> Bits:
    """16 on an accelerator and on a CPU that multiplies bfloat16 in hardware, else 32."""
    if device.partition(":")[0] != "cpu":
        return Bits(16)
    cpu = torch.cpu.get_capabilities()
    return Bits(16 if any(cpu.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")) else 32)


def load(
    source: ModelSource,
    bits: Bits,
    *,
    device: str,
    dtype: torch.dtype | str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The model on `device`, or spread over all of its kind as accelerate's `device_map` says; fetched where need be.

    `dtype` (or its name) replaces what activations are computed in: float16 for bfloat16 at 16 bits; anything at 8 and
    4, where it is float32 on a CPU and bfloat16 elsewhere. The attention implementation is the caller's to set. Raises
    UserError.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    causal_lm: Any = AutoModelForCausalLM  # untyped: what it returns depends on output_loading_info
    compute = compute_dtype(bits, device, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    if source.kind == "shape":
        return _random(source, bits, device, compute)
    directory = _directory(source, trust_remote_code)
    _refuse_what_is_no_causal_lm(source.name, directory, trust_remote_code)
    files = _weight_files(source.name, directory)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        with _quiet():
            model, info = causal_lm.from_pretrained(
                directory,
                dtype=compute,
                device_map=device_map or {"": device},
                quantization_config=_quantization(bits, compute),
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except SafetensorError as error:
        raise UserError(f"the weights of {source.name} cannot be read ({error}): fetch them again") from error
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise UserError(
            f"the weights of {source.name} have other shapes than its config.json says: fetch both again"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"the weights of {source.name} lack {len(missing)} tensors, {missing[0]} the first, which would be made up "
            "at random: give a complete causal language model"
        )
    if device_map is not None:
        _refuse_offloading(source.name, model, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer loads from {source.name} ({_first_line(error)}): add its tokenizer.json"
        ) from error
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, source, bits, compute, weights_sha256(files), weight_bytes(model))


def _random(source: ModelSource, bits: Bits, device: str, compute: torch.dtype) -> LoadedModel:
    with _quiet():
        model = shapes.build(source, bits, device=device, dtype=compute)
    return LoadedModel(model, None, source, bits, compute, shapes.identity(source), weight_bytes(model))


def _refuse_offloading(name: str, model: nn.Module, device: str) -> None:
    """accelerate puts on the CPU, or on the disk, what its device map finds no room for."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    if kinds != {torch.device(device).type}:
        raise UserError(f"{name} does not fit the {device} devices together: choose fewer --bits, or more devices")


# --- where the files are ---------------------------------------------------------------------------------------------

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def _directory(source: ModelSource, trust_remote_code: bool) -> Path:
    match source.kind:
        case "default":
            return smollm2.ensure()
        case "local":
            return Path(source.location)
        case "hub":
            return _from_hub(source.location, [*SMALL_FILES, "model*.safetensors", *["*.py"] * trust_remote_code])
        case "shape":
            raise AssertionError("a shape has no files")


def _from_hub(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except HFValidationError as error:
        raise UserError(f"{repository} is no hub id ({_first_line(error)}): give org/name, or a directory") from error
    except GatedRepoError as error:
        raise UserError(f"{repository} is gated: ask for access on its page, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub shows you no model {repository}: check the name, or `hf auth login`") from error
    except OSError as error:
        raise UserError(
            f"cannot fetch {repository} from the hub ({_first_line(error)}): check the network, or give a directory"
        ) from error


def _weight_files(name: str, directory: Path) -> list[Path]:
    """The safetensors files that transformers will read, by name."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            files = [directory / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"the {index.name} of {name} is damaged ({error}): fetch it again") from error
        if absent := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{name} lacks {absent[0]} ({len(absent)} of {len(files)} weight files): fetch it again")
        return files
    if any(file for pattern in PICKLES for file in directory.glob(pattern)):
        raise UserError(f"{name} has only pickled weights, which are never loaded: convert it to safetensors first")
    raise UserError(f"{name} has no model.safetensors: only safetensors are loaded (pickled weights never are)")


def _refuse_what_is_no_causal_lm(name: str, directory: Path, trust_remote_code: bool) -> None:
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config_file = directory / "config.json"
    if not config_file.is_file():
        raise UserError(f"{name} has no config.json: it is not a transformers model")
    try:
        config: Any = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise UserError(f"the config.json of {name} is not JSON ({error}): fetch it again") from error
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "its method is not named")
        raise UserError(f"{name} is already quantised ({method}): give the unquantised checkpoint and choose --bits")
    brings_code = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    if brings_code and trust_remote_code:
        return
    kind: Any = config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        if brings_code:
            raise UserError(f"{name} runs code of its own ({kind!r}): read it, then allow it with --trust-remote-code")
        version = transformers.__version__
        raise UserError(f"transformers {version} does not know the architecture {kind!r} of {name}: upgrade it")
    try:
        transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"transformers cannot read the config.json of {name} ({reason}): fetch it again") from error
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    classes = config.get("architectures") or [causal]
    generative = (causal, "ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if causal is None or not any(cls.endswith(generative) for cls in classes):
        what = classes[0] or kind
        raise UserError(f"{name} is not a causal language model ({what}): give one that generates text")


# --- how they are loaded ---------------------------------------------------------------------------------------------


def compute_dtype(bits: Bits, device: str, dtype: torch.dtype | None) -> torch.dtype:
    """What activations are computed in: `dtype` where `bits` allow it. Raises UserError where they do not."""
    if bits.width == 32 and dtype not in (None, torch.float32):
        raise UserError(f"32 bits are float32, not {dtype}: choose --bits 16")
    if bits.width == 16 and dtype not in (None, torch.bfloat16, torch.float16):
        raise UserError(f"16 bits are bfloat16 or float16, not {dtype}: choose --bits 32")
    if dtype is not None:
        return dtype
    return torch.float32 if bits.width == 32 or (bits.width < 16 and device == "cpu") else torch.bfloat16


def _quantization(bits: Bits, dtype: torch.dtype) -> Any:
    import transformers

    config: Any = transformers.BitsAndBytesConfig
    match bits.width:
        case 8:
            return config(load_in_8bit=True, llm_int8_threshold=bits.threshold)
        case 4:
            return config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        case _:
            return None


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no advice from transformers while loading; never any from bitsandbytes, which warns at each pass."""
    transformers_logging: Any = importlib.import_module("transformers.utils.logging")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# --- what they are ---------------------------------------------------------------------------------------------------


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the weights take: parameters (tied ones once) and the scales that bitsandbytes keeps beside them."""
    tensors: list[torch.Tensor] = list(model.parameters())
    for module in model.modules():
        weight = getattr(module, "weight", None)
        scales = getattr(weight, "quant_state", None)  # nf4
        beside = [getattr(weight, "SCB", None), getattr(getattr(module, "state", None), "SCB", None)]  # int8
        beside += [getattr(scales, "absmax", None), getattr(scales, "code", None)]
        tensors += [tensor for tensor in beside if isinstance(tensor, torch.Tensor)]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def weights_sha256(files: list[Path]) -> str:
    """SHA-256 of the one file, or of the list of names and hashes where there are several."""
    hashes = {file.name: _sha256(file) for file in files}
    if len(files) == 1:
        return hashes[files[0].name]
    return hashlib.sha256(
        "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items())).encode()
    ).hexdigest()


def _sha256(file: Path) -> str:
    """Of the content; remembered in the cache by path, size and time, because tens of gigabytes take minutes."""
    file = file.resolve()
    status = file.stat()
    key = hashlib.sha256(f"{file}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()
    known = cache_dir() / "sha256" / key
    if known.is_file():
        return known.read_text()
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    known.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=known.parent, delete=False) as partial:
        partial.write(found)
    os.replace(partial.name, known)
    return found
