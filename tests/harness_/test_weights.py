"""Loading: what a name resolves to, what every precision stores, and what is refused in one clear line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, VOCAB, tiny

from harness import smollm2, weights
from harness.errors import UserError
from harness.target import Target
from harness.weights import Bits, ModelSource

TOKENS = torch.arange(3, 35)[None]


@pytest.fixture(autouse=True)
def hashes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test leaves remembered hashes in the user's cache; the default model stays where it is."""
    monkeypatch.setattr(weights, "cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer, as `save_pretrained` writes it."""
    return save(tiny("llama"), tmp_path / "tiny-llama")


def save(model: Any, directory: Path, **options: Any) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(directory, **options)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    return directory


def load(directory: Path, bits: str = "32", **options: Any) -> weights.LoadedModel:
    return weights.load(weights.resolve(str(directory)), Bits.parse(bits), device="cpu", **options)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(of: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        of()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "default", "smollm2", smollm2.LABEL])
def test_no_name_means_the_embedded_model(name: str | None) -> None:
    assert weights.resolve(name) == ModelSource(smollm2.LABEL, str(smollm2.location()), "default")


def test_a_directory_comes_before_a_hub_id(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parent)
    assert weights.resolve("tiny-llama") == ModelSource("tiny-llama", str(directory.resolve()), "local")
    assert weights.resolve("org/tiny-llama") == ModelSource("org/tiny-llama", "org/tiny-llama", "hub")
    assert weights.resolve("gpt2").kind == "hub"


def test_paths_that_are_no_model_are_refused(directory: Path, tmp_path: Path) -> None:
    assert "no config.json" in refusal(lambda: weights.resolve(str(tmp_path)))
    assert "is a file" in refusal(lambda: weights.resolve(str(directory / "config.json")))
    assert "neither a directory nor a hub id" in refusal(lambda: weights.resolve("./nowhere/model"))


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("32", "32"),
        ("16", "16"),
        ("8", "int8:t6"),
        ("int8", "int8:t6"),
        ("8:t0", "int8:t0"),
        ("int8:t0", "int8:t0"),
        ("INT8:t6.0", "int8:t6"),
        ("8:t4.5", "int8:t4.5"),
        ("4", "nf4"),
        ("nf4", "nf4"),
    ],
)
def test_precision_has_an_identity_that_parses_to_itself(text: str, identity: str) -> None:
    assert Bits.parse(text).id == identity
    assert Bits.parse(identity) == Bits.parse(text)


@given(st.from_regex(r"[0-9]{1,9}(\.[0-9]{1,9})?", fullmatch=True))
@example("1000000.0")
@example("0.00001")
@example("6.1234567")
def test_every_threshold_survives_its_identity(threshold: str) -> None:
    bits = Bits.parse(f"8:t{threshold}")
    assert bits.threshold == float(threshold)
    assert Bits.parse(bits.id) == bits


@pytest.mark.parametrize("text", ["", "7", "8:6", "8:t", "8:t-1", "8:t1e3", f"8:t{10**400}", "16:t6", "fp8", "nf4:t0"])
def test_unknown_precision_is_answered_with_the_choices(text: str) -> None:
    assert "choose 32, 16, 8" in refusal(lambda: Bits.parse(text))


@pytest.mark.parametrize(
    ("device", "features", "width"),
    [
        ("cuda", {}, 16),
        ("cuda:1", {}, 16),
        ("mps", {}, 16),
        ("auto", {}, 16),
        ("cpu", {"avx2": True, "avx512_bf16": False}, 32),
        ("cpu", {"avx512_bf16": True}, 16),
        ("cpu", {"amx_bf16": True}, 16),
        ("cpu", {"neon": True, "bf16": True}, 16),
        ("cpu", {"neon": True}, 32),
    ],
)
def test_sixteen_bits_by_default_where_the_hardware_multiplies_them(
    monkeypatch: pytest.MonkeyPatch, device: str, features: dict[str, bool], width: int
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert weights.default_bits(device) == Bits(width)


@pytest.mark.parametrize(("bits", "dtype"), [("32", torch.bfloat16), ("16", torch.float32)])
def test_a_dtype_that_contradicts_the_bits_is_refused(directory: Path, bits: str, dtype: torch.dtype) -> None:
    assert f"not {dtype}" in refusal(lambda: load(directory, bits, dtype=dtype))


# --- loading ---------------------------------------------------------------------------------------------------------


def test_32_bits_are_the_saved_model(directory: Path) -> None:
    loaded = load(directory)
    assert (loaded.dtype, loaded.source.name, loaded.model.training) == (torch.float32, "tiny-llama", False)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert torch.equal(loaded.model(TOKENS).logits, tiny("llama")(TOKENS).logits)
    assert loaded.tokenizer.encode("w5") == [5]
    assert loaded.weight_bytes == 4 * sum(parameter.numel() for parameter in loaded.model.parameters())
    assert loaded.sha256 == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def test_16_bits_are_bfloat16_or_float16_by_name(directory: Path) -> None:
    loaded, half = load(directory, "16"), load(directory, "16", dtype="float16")
    assert (loaded.dtype, half.dtype) == (torch.bfloat16, torch.float16)
    assert loaded.model.lm_head.weight.dtype == torch.bfloat16
    assert half.model.lm_head.weight.dtype == torch.float16
    assert loaded.weight_bytes == load(directory).weight_bytes // 2


@pytest.mark.parametrize(("bits", "bits_a_weight"), [("8", 8), ("8:t0", 8), ("4", 4)])
def test_quantised_layers_take_their_bits_and_compute_in_float32_on_a_cpu(
    directory: Path, bits: str, bits_a_weight: int
) -> None:
    reference, loaded = load(directory), load(directory, bits)
    linear = sum(p.numel() for n, p in reference.model.named_parameters() if "_proj" in n)
    rows = sum(p.shape[0] for n, p in reference.model.named_parameters() if "_proj" in n)
    layers = 7 * reference.model.config.num_hidden_layers
    # int8 keeps a float32 scale a row; nf4 one for 64 weights, and a table of 16 values for each layer
    scales = 4 * rows if bits_a_weight == 8 else 4 * linear // 64 + layers * 16 * 4
    assert loaded.weight_bytes == reference.weight_bytes - 4 * linear + linear * bits_a_weight // 8 + scales
    assert loaded.sha256 == reference.sha256, "the identity is the file's, the bits are told apart by their own"
    assert loaded.model(TOKENS).logits.dtype == loaded.dtype == torch.float32
    features = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    found, expected = (m.model.model.layers[0].mlp.up_proj(features) for m in (loaded, reference))
    similarity = torch.cosine_similarity(found, expected, dim=-1)
    assert similarity.min() > 0.98
    assert similarity.max() < 0.999999


@pytest.mark.parametrize("device_map", ["auto", "balanced"])
def test_a_device_map_over_one_device_changes_nothing(directory: Path, device_map: str) -> None:
    plain, mapped = (
        weights.load(weights.resolve(str(directory)), Bits(32), device="cpu", device_map=each)
        for each in (None, device_map)
    )
    prompt = list(range(3, 20))
    texts = [Target(loaded.model, capacity=64).generate(prompt, 12) for loaded in (plain, mapped)]
    scores = [Target(loaded.model, capacity=64).prefill(prompt).logits_MV for loaded in (plain, mapped)]
    assert texts[0] == texts[1]
    assert torch.equal(*scores)


def test_a_model_that_does_not_fit_its_devices_is_refused() -> None:
    model = tiny("llama")
    weights._refuse_offloading("toy", model, "cpu")
    model.model.layers[3].to("meta")
    with pytest.raises(UserError, match="fewer --bits"):
        weights._refuse_offloading("toy", model, "cpu")


def test_the_threshold_reaches_every_quantised_layer(directory: Path) -> None:
    for text, threshold in (("8", 6.0), ("8:t0", 0.0), ("8:t3", 3.0)):
        assert load(directory, text).model.model.layers[0].mlp.up_proj.state.threshold == threshold


def test_loading_and_running_are_quiet(
    directory: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    load(directory, "8").model(TOKENS)
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_claimed_architecture_loads(architecture: str, tmp_path: Path) -> None:
    loaded = load(save(tiny(architecture), tmp_path / architecture))
    assert torch.equal(loaded.model(TOKENS).logits, tiny(architecture)(TOKENS).logits)


def test_the_default_model_answers() -> None:
    loaded = weights.load(weights.resolve(None), Bits.parse("32"), device="cpu")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = loaded.model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert loaded.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert loaded.weight_bytes == 538_060_032


# --- identity --------------------------------------------------------------------------------------------------------


def test_a_file_is_hashed_once_and_again_when_it_changes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = directory / "model.safetensors"
    first = weights.weights_sha256([file])
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert weights.weights_sha256([file]) == first
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    os.utime(file, ns=(0, 0))
    assert weights.weights_sha256([file]) == hashlib.sha256(file.read_bytes()).hexdigest() != first


def test_sharded_weights_are_one_identity_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    whole = save(tiny("llama"), tmp_path / "sharded", max_shard_size="200KB")
    shards = sorted(whole.glob("*.safetensors"))
    assert len(shards) > 1
    listing = "".join(f"{hashlib.sha256(shard.read_bytes()).hexdigest()}  {shard.name}\n" for shard in shards)
    assert load(whole).sha256 == hashlib.sha256(listing.encode()).hexdigest()
    shards[1].unlink()
    assert shards[1].name in refusal(lambda: load(whole))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_pickled_weights_are_never_loaded(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "pickled weights, which are never loaded" in refusal(lambda: load(directory))
    (directory / "pytorch_model.bin").unlink()
    assert "no model.safetensors" in refusal(lambda: load(directory))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a causal language model"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "not a causal language model"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a causal language model"),
        ({"model_type": "novel"}, "does not know the architecture 'novel'"),
        ({"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "code.Novel"}}, "--trust-remote-code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised (gptq)"),
    ],
)
def test_a_configuration_that_cannot_be_a_target_is_refused(
    directory: Path, changes: dict[str, Any], reason: str
) -> None:
    edit(directory / "config.json", **changes)
    assert reason in refusal(lambda: load(directory))


def test_a_checkpoint_without_its_head_is_refused_rather_than_made_up(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file, {"format": "pt"})
    assert "lm_head.weight" in refusal(lambda: load(directory))


def test_a_truncated_file_is_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cannot be read" in refusal(lambda: load(directory))


def test_weights_of_another_shape_are_refused(directory: Path) -> None:
    edit(directory / "config.json", intermediate_size=32)
    assert "other shapes than its config.json says" in refusal(lambda: load(directory))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "[]", "is not JSON"),
        ("model.safetensors.index.json", "{", "is damaged"),
        ("model.safetensors.index.json", "{}", "is damaged"),
        ("model.safetensors.index.json", "[1]", "is damaged"),
    ],
)
def test_a_damaged_description_is_refused(name: str, content: str, said: str, directory: Path) -> None:
    if "index" in name:
        (directory / "model.safetensors").unlink()
    (directory / name).write_text(content)
    assert said in refusal(lambda: load(directory))


def test_a_configuration_of_wrong_types_is_refused(directory: Path) -> None:
    edit(directory / "config.json", num_attention_heads="x")
    assert "cannot read the config.json" in refusal(lambda: load(directory))


def test_a_model_without_a_tokenizer_is_refused(directory: Path) -> None:
    for file in directory.glob("*token*"):
        file.unlink()
    assert "tokenizer" in refusal(lambda: load(directory))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "check the name"),
        (GatedRepoError.__new__(GatedRepoError), "is gated"),
        (LocalEntryNotFoundError("no connection\nand more"), "(no connection): check the network"),
        (ConnectionError(), "(ConnectionError): check the network"),
    ],
)
def test_a_hub_that_does_not_give_the_model_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    said = refusal(lambda: weights.load(weights.resolve("org/model"), Bits(32), device="cpu"))
    assert "org/model" in said
    assert advice in said


def test_a_name_that_the_hub_cannot_have_is_explained() -> None:
    said = refusal(lambda: weights.load(weights.resolve("org/my--model"), Bits(32), device="cpu"))
    assert said.startswith("org/my--model is no hub id (")
    assert said.endswith("): give org/name, or a directory")


def test_the_hub_is_asked_for_safetensors_only_and_code_only_where_trusted(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def give(repository: str, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    for trusted in (False, True):
        weights.load(weights.resolve("org/model"), Bits(32), device="cpu", trust_remote_code=trusted)
    assert ["*.py" in patterns for patterns in asked] == [False, True]
    assert not any(pattern in patterns for patterns in asked for pattern in weights.PICKLES)
