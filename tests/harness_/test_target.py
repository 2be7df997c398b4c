"""The target against transformers' own forward and `generate`, in float32, for every architecture it claims."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench import CAPACITY, Rehearsal, decoded, keep, load, sampler, score, text
from tiny import ARCHITECTURES, VOCAB, WINDOW, tiny
from torch import Tensor, nn

from harness.attention import INTERFACE, CacheView
from harness.decode import Limits
from harness.draft import Draft, dynamic_tree, tree
from harness.target import Target
from harness.trunk import Layers, Trunk, horizon, unsupported
from harness.verify import verify_greedy

CPU = torch.device("cpu")
WINDOWED = {
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
}
# A window narrower than a draft is deep: then the scratch slots themselves fall out of it.
MODELS = [*((name, {}) for name in ARCHITECTURES), *WINDOWED.items(), ("mistral", {"sliding_window": 3})]
every_model = pytest.mark.parametrize(
    ("architecture", "overrides"), MODELS, ids=["-".join([name, *map(str, extra.values())]) for name, extra in MODELS]
)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


@torch.inference_mode()
def logits(target: Target, tokens: list[int]) -> Tensor:
    """(T, V) of transformers' own forward, without a cache."""
    with target.lent() as model:
        return model(torch.tensor([tokens]), use_cache=False).logits[0]  # type: ignore[no-any-return]


def random_tree(nodes: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(int(torch.randint(node + 1, (), generator=generator)) for node in range(nodes))


# --- greedy text ------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("length", [5, 2 * WINDOW + 5], ids=["short", "beyond-window"])
def test_one_token_at_a_time_is_generate(architecture: str, overrides: dict[str, Any], length: int) -> None:
    target = Target(tiny(architecture, **overrides), capacity=CAPACITY)
    prompt = text(length, VOCAB)
    tokens, _ = decoded(target, load("ar", target, None), prompt, Limits(40))
    assert tokens == target.generate(prompt, 40)


@pytest.mark.parametrize("architecture", WINDOWED)
def test_the_windows_and_caps_of_these_tests_change_the_text(architecture: str) -> None:
    """Otherwise the tests with windows would prove nothing."""
    prompt = text(2 * WINDOW + 5, VOCAB)
    plain = dict.fromkeys(WINDOWED["gemma2"]) if architecture == "gemma2" else {}
    with_window, without = tiny(architecture, **WINDOWED[architecture]), tiny(architecture, **plain)
    texts = [logits(Target(model, capacity=CAPACITY), prompt) for model in (with_window, without)]
    assert float((texts[0] - texts[1])[-1].abs().max()) > 0.05


@every_model
def test_trees_with_the_right_path_among_wrong_ones_decode_the_targets_text(
    architecture: str, overrides: dict[str, Any]
) -> None:
    """Random trees that hold the true continuation down to a random depth: accepted paths of every shape."""
    target = Target(tiny(architecture, **overrides), capacity=CAPACITY)
    prompt = text(12, VOCAB)
    truth = target.generate(prompt, 48)
    target.prefill(prompt)
    said, rounds = truth[:1], 0
    dice = torch.Generator().manual_seed(0)
    while len(said) < 36:
        rounds += 1
        parents = random_tree(12, seed=rounds)
        tokens = torch.randint(3, VOCAB, (12,), generator=dice)
        at = 0
        for node, parent in enumerate(parents, start=1):  # the first child of the true path carries on the truth
            depth = int(tree(parents, CPU).depth_M[node])
            if parent == at:
                tokens[node - 1], at = truth[len(said) + depth - 1], node
        built = tree(parents, CPU) if rounds % 2 else dynamic_tree(torch.tensor(parents), 12)
        draft = Draft(tokens, built)
        verdict = verify_greedy(draft, score(target, said[-1], draft).logits_MV)
        keep(target, verdict, draft)
        _, accepted, bonus, deepest = verdict.host()
        assert deepest == int(tree(parents, CPU).depth_M.max())
        assert int(verdict.last) >= at
        said += [*accepted, bonus]
    assert said == truth[: len(said)]
    assert rounds < 25


# --- one pass ---------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("length", [5, 2 * WINDOW + 5], ids=["short", "beyond-window"])
def test_a_tree_scored_at_once_equals_its_paths_scored_one_by_one(
    architecture: str, overrides: dict[str, Any], length: int
) -> None:
    target = Target(tiny(architecture, **overrides), capacity=CAPACITY)
    prompt, parents = text(length, VOCAB), random_tree(14, seed=3)
    draft = Draft(torch.tensor(text(14, VOCAB, seed=4)), tree(parents, CPU))
    target.prefill(prompt[:-1])
    scores = score(target, prompt[-1], draft)
    for node in range(len(draft) + 1):
        path = [i for i in range(1, node + 1) if draft.shape.ancestors_MM[node, i]]
        alone = logits(target, [*prompt, *draft.tokens_N[[i - 1 for i in path]].tolist()])
        close(scores.logits_MV[node], alone[-1])


@every_architecture
def test_taps_are_transformers_hidden_states(architecture: str) -> None:
    target = Target(tiny(architecture), capacity=CAPACITY)
    prompt = text(2 * WINDOW + 5, VOCAB)
    target.tap([*range(target.depth), -1])
    scores = target.prefill(prompt)
    with target.lent() as model, torch.inference_mode():
        expected = model(torch.tensor([prompt]), use_cache=False, output_hidden_states=True).hidden_states
    assert len(expected) == target.depth + 1 == len(scores.hidden)
    for index, hidden in enumerate(expected):
        close(scores.hidden[index], hidden[0])
    draft = Draft(torch.tensor([3, 4, 5]), tree((0, 0, 1), CPU))
    target.prefill(prompt[:-1])
    scored = score(target, prompt[-1], draft)
    for index, hidden in enumerate(expected):
        close(scored.hidden[index][0], hidden[0, -1])


@every_model
def test_extending_equals_a_prefill_of_the_whole(architecture: str, overrides: dict[str, Any]) -> None:
    target, other = (Target(tiny(architecture, **overrides), capacity=CAPACITY) for _ in range(2))
    tokens = text(2 * WINDOW + 5, VOCAB)
    whole = target.prefill(tokens)
    other.prefill(tokens[:9])
    other.extend(tokens[9:10])
    parts = other.extend(torch.tensor(tokens[10:]))
    assert other.length == target.length == len(tokens)
    close(parts.logits_MV, whole.logits_MV)
    same_cache(target, other)


def same_cache(one: Target, other: Target) -> None:
    assert one.length == other.length
    for layer in one.cache.keys:
        close(one.cache.keys[layer][:, :, : one.length], other.cache.keys[layer][:, :, : one.length])
        close(one.cache.values[layer][:, :, : one.length], other.cache.values[layer][:, :, : one.length])


# --- what a pass leaves behind ----------------------------------------------------------------------------------------


@every_architecture
def test_a_rejected_branch_leaves_no_trace(architecture: str) -> None:
    """After any verdict, the cache is that of a target that has only ever seen the text."""
    model = tiny(architecture)
    target, other = Target(model, capacity=CAPACITY), Target(model, capacity=CAPACITY)
    tokens = text(14, VOCAB)
    target.prefill(tokens[:-1])
    for seed in range(5):
        draft = Draft(torch.tensor(text(9, VOCAB, seed=50 + seed)), tree(random_tree(9, seed=seed), CPU))
        logits_MV = score(target, tokens[-1], draft).logits_MV.clone()
        # Make the target want the path down to a node of our choice.
        node = 2 * seed + 1
        for below in (i for i in range(1, node + 1) if draft.shape.ancestors_MM[node, i]):
            logits_MV[draft.shape.parents_M[below], draft.tokens_N[below - 1]] = 1e9
        verdict = verify_greedy(draft, logits_MV)
        assert int(draft.shape.depth_M[node]) <= int(verdict.count)
        keep(target, verdict, draft)
        tokens += [*verdict.host().tokens, verdict.host().bonus]
        other.prefill(tokens[:-1])
        same_cache(target, other)


@every_architecture
def test_a_peek_leaves_nothing_behind(architecture: str) -> None:
    target = Target(tiny(architecture), capacity=CAPACITY)
    prompt = text(20, VOCAB)
    draft = Draft(torch.tensor([3, 4, 5, 6]), tree((0, 0, 1, 1), CPU))
    target.prefill(prompt[:-1])
    before = {layer: keys[:, :, : target.length].clone() for layer, keys in target.cache.keys.items()}
    expected = score(target, prompt[-1], draft).logits_MV.clone()
    target.peek(prompt[-1:], layers=Layers.ends(1, 2, target.depth))
    target.peek(torch.randn(3, target.trunk.width), at=1)
    assert target.length == len(prompt) - 1
    for layer, keys in before.items():
        assert torch.equal(target.cache.keys[layer][:, :, : target.length], keys)
    assert torch.equal(score(target, prompt[-1], draft).logits_MV, expected)


@every_architecture
def test_a_drafter_that_goes_on_by_peeking_reads_what_it_would_read_at_once(architecture: str) -> None:
    target = Target(tiny(architecture), capacity=CAPACITY)
    target.prefill(text(20, VOCAB))
    ids = text(5, VOCAB, seed=1)
    at_once = target.peek(ids)
    one_by_one = torch.cat([target.peek(ids[place : place + 1], at=place) for place in range(5)])
    close(one_by_one, at_once)
    close(target.trunk.head(at_once), logits(target, [*text(20, VOCAB), *ids])[-5:])


# --- layer subsets ----------------------------------------------------------------------------------------------------


def reduced(model: Any, layers: list[int]) -> Any:
    """transformers' model with only these layers left."""
    small = copy.deepcopy(model)
    small.model.layers = nn.ModuleList(small.model.layers[index] for index in layers)
    small.config.num_hidden_layers = len(layers)
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = [small.config.layer_types[index] for index in layers]
    return small


@every_model
@pytest.mark.parametrize("kept", [(0, 3), (0, 1, 3), (2,)])
def test_a_subset_of_layers_is_the_model_without_the_others(
    architecture: str, overrides: dict[str, Any], kept: tuple[int, ...]
) -> None:
    model = tiny(architecture, **overrides)
    small = Target(reduced(model, list(kept)), capacity=CAPACITY)
    prompt = text(2 * WINDOW + 5, VOCAB)
    found = Target(model, capacity=CAPACITY).peek(prompt, layers=Layers.of(kept))
    close(small.trunk.head(found), logits(small, prompt))


@every_architecture
def test_a_skipped_sublayer_adds_nothing(architecture: str) -> None:
    """Attention and MLP skipped apart, against transformers' model with those output projections set to zero."""
    model = tiny(architecture)
    muted = copy.deepcopy(model)
    for layer in (1, 2):
        muted.model.layers[layer].self_attn.o_proj.weight.zero_()
    muted.model.layers[3].mlp.down_proj.weight.zero_()
    prompt = text(2 * WINDOW + 5, VOCAB)
    target = Target(model, capacity=CAPACITY)
    chosen = Layers.of(range(4)).without(attention=(1, 2), mlp=(3,))
    close(target.trunk.head(target.peek(prompt, layers=chosen)), logits(Target(muted, capacity=CAPACITY), prompt))


def test_layer_sets_name_what_they_keep() -> None:
    assert Layers.ends(1, 2, 6).indices == [0, 4, 5]
    assert Layers.of(range(3)).without((0, 1), (1,)).indices == [0, 2]


# --- batches ----------------------------------------------------------------------------------------------------------


@every_architecture
def test_three_sequences_at_once_equal_three_alone(architecture: str) -> None:
    trunk = Trunk(tiny(architecture))
    ids_BT = torch.tensor([text(30, VOCAB, seed) for seed in range(3)])
    positions_T = torch.arange(30)

    def run(rows_BT: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        cache = trunk.cache(30, batch=len(rows_BT))
        view = CacheView(cache, 0, positions_T, None, trunk.windows)
        return trunk.run(trunk.embed(rows_BT), positions_T, view, taps=(1, 4))

    together, tapped = run(ids_BT)
    for row in range(3):
        alone, tapped_alone = run(ids_BT[row : row + 1])
        close(together[row], alone[0])
        for tap in (1, 4):
            close(tapped[tap][row], tapped_alone[tap][0])


# --- borders ----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_lent_is_transformers_own_and_comes_back() -> None:
    model, untouched = tiny("gemma2"), tiny("gemma2")
    target = Target(model, capacity=CAPACITY)
    prompt = text(20, VOCAB)
    ids = torch.tensor([prompt])
    own = untouched.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert target.generate(prompt, 20) == own[0, 20:].tolist()
    with contextlib.suppress(KeyboardInterrupt), target.lent():
        assert model.config._attn_implementation != INTERFACE
        raise KeyboardInterrupt
    assert model.config._attn_implementation == INTERFACE


def test_what_cannot_be_walked_says_why() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=16)
    with pytest.raises(ValueError, match=r"'gpt2' is not supported; these are: .*llama"):
        Target(AutoModelForCausalLM.from_config(config), capacity=8)
    recurrent = SimpleNamespace(model_type="qwen3", layer_types=["full_attention", "linear_attention"])
    assert "linear_attention" in str(unsupported(recurrent))
    both_ways = SimpleNamespace(model_type="gemma3_text", layer_types=None, use_bidirectional_attention=True)
    assert "token by token" in str(unsupported(both_ways))
    assert unsupported(tiny("llama").config) is None


def test_long_rotations_are_refused_where_they_would_change_the_past() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=64, max_position_embeddings=256)
    assert horizon(model.config) == 64
    assert horizon(tiny("gemma3").config) is None
    elsewhere = tiny(
        "llama", rope_parameters=rope | {"original_max_position_embeddings": 128}, max_position_embeddings=256
    )
    assert horizon(elsewhere.config) == 128
    with pytest.raises(ValueError, match="64 positions"):
        Target(model, capacity=65)
    target = Target(model, capacity=64)
    tokens, _ = decoded(target, load("ar", target, None), text(10, VOCAB), Limits(30))
    assert tokens == target.generate(text(10, VOCAB), 30)


def test_rotations_that_read_the_host_cannot_be_captured() -> None:
    model = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert Target(model, capacity=CAPACITY).depth
    with pytest.raises(ValueError, match="use --runtime eager"):
        Target(model, capacity=CAPACITY, runtime=Rehearsal())


def test_llama_has_no_window_whatever_its_configuration_says() -> None:
    """transformers masks none, but would drop keys from the cache of its own `generate`."""
    plain, target = tiny("llama"), Target(tiny("llama", sliding_window=8), capacity=CAPACITY)
    for prompt in (text(4, VOCAB), text(30, VOCAB)):
        tokens, _ = decoded(target, load("ar", target, None), prompt, Limits(20))
        assert tokens == target.generate(prompt, 20)
        assert tokens == Target(plain, capacity=CAPACITY).generate(prompt, 20)


def test_hidden_states_of_layers_that_are_not_there_are_refused() -> None:
    target = Target(tiny("llama"), capacity=CAPACITY)
    target.tap((-1, 4))
    with pytest.raises(ValueError, match="after layer 18, and the target has 4 layers"):
        target.tap((2, 18))


def test_a_draft_model_that_lacks_weights_is_refused(tmp_path: Any) -> None:
    model = tiny("llama")
    kept = {name: t for name, t in model.state_dict().items() if not name.startswith("model.layers.1.mlp.")}
    model.save_pretrained(tmp_path / "torn", state_dict=kept)
    with pytest.raises(ValueError, match=r"lacks weights \(model.layers.1.mlp"):
        Target(model, capacity=CAPACITY).companion(tmp_path / "torn")


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Any) -> None:
    tiny("llama", vocab_size=64).save_pretrained(tmp_path / "small")
    tiny("qwen2").save_pretrained(tmp_path / "same")
    target = Target(tiny("llama"), capacity=CAPACITY)
    with pytest.raises(ValueError, match="64 against 128"):
        target.companion(tmp_path / "small")
    assert target.companion(tmp_path / "same").cache.capacity == CAPACITY


def test_a_cache_that_is_too_small_is_noticed() -> None:
    target = Target(tiny("llama"), capacity=16)
    with pytest.raises(AssertionError, match="too small a cache"):
        target.prefill(text(17, VOCAB))


def test_a_sampled_text_depends_on_its_seed_alone() -> None:
    target = Target(tiny("llama"), capacity=CAPACITY)
    ar = load("ar", target, None)
    texts = [decoded(target, ar, text(9, VOCAB), Limits(20), sampler(1.0, seed))[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
