"""What every method owes: the target's own text when greedy, its distribution when sampling, no state left over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Rehearsal, decoded, keep, load, sampler, score, text, trainee, write
from scipy.stats import chi2
from tiny import ARCHITECTURES, VOCAB, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from harness import method
from harness.decode import Limits
from harness.draft import Draft
from harness.errors import UserError
from harness.runtime import Runtime
from harness.sampling import Sampler
from harness.target import Target
from harness.verify import Verdict

NEW_TOKENS = 40
PROMPT = text(12, VOCAB)
SUBSET = torch.arange(VOCAB)[1::2]
"a draft vocabulary of every second token"


@dataclass(frozen=True)
class Case:
    """A method with options for training its drafter and for loading it."""

    name: str
    loading: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    vocabulary_V: Tensor | None = None
    std: float = 0.2

    @property
    def draws(self) -> bool:
        """Drafts at random from the whole vocabulary, when sampling."""
        return self.name in ("s3d", "eagle", "layerskip", "draft-model") and self.vocabulary_V is None

    def __str__(self) -> str:
        options = [f"{key}={value}" for key, value in self.loading.items()]
        return ":".join([self.name, *options, *["subset"] * (self.vocabulary_V is not None)])


S3D = {"k": 3, "rank": 4, "keep": "1+2"}
CASES = [
    Case("ar"),
    Case("s3d", training=S3D),
    Case("s3d", {"k": 1}, S3D, SUBSET),
    Case("s3d", {"nodes": 11}, S3D, SUBSET),
    Case("s3d", {"nodes": 11, "tree": "dynamic"}, S3D, SUBSET),
    Case("s3d", {"nodes": 2, "tree": "dynamic"}, S3D),
    # Every layer drafts and no adapter is active: slot 0 is the target itself, so half the drafts are right.
    Case("s3d", {"k": 0}, {"k": 1, "rank": 4, "keep": "2+2"}, std=0.0),
    Case("medusa"),
    Case("medusa", {"nodes": 0}, vocabulary_V=SUBSET),
    Case("medusa", {"nodes": 9, "heads": 2}),
    Case("eagle"),
    Case("eagle", {"depth": 1}, vocabulary_V=SUBSET),
    Case("eagle", {"nodes": 20}),
    Case("eagle", {"nodes": 7, "depth": 3, "branch": 3}, vocabulary_V=SUBSET),
    Case("layerskip"),
    Case("layerskip", {"skip": "", "threshold": 0.0, "gamma": 5}),
    Case("layerskip", {"skip": "", "skip_attention": "1+2", "threshold": 0.0}),
    Case("layerskip", {"skip": "", "skip_mlp": "0+3"}),
    Case("prompt-lookup"),
    Case("prompt-lookup", {"gamma": 2, "ngram": 1}),
    Case("draft-model"),
    Case("draft-model", {"gamma": 1}, vocabulary_V=SUBSET),
]
RIGHT = {"s3d:k=0", "layerskip:skip=:threshold=0.0:gamma=5"}
"cases that draft as the target would, so nearly all is accepted"


@dataclass
class Bench:
    """A tiny target and the cases' drafters, made once."""

    folder: Path
    models: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, list[int]] = field(default_factory=dict)

    def model(self, architecture: str) -> Any:
        if architecture not in self.models:
            self.models[architecture] = tiny(architecture)
        return self.models[architecture]

    def generated(self, architecture: str) -> list[int]:
        """The target's own text after PROMPT."""
        if architecture not in self.texts:
            target = Target(self.model(architecture), capacity=1)
            self.texts[architecture] = target.generate(PROMPT, NEW_TOKENS)
        return self.texts[architecture]

    def drafter(self, case: Case, architecture: str, model: Any | None = None) -> Path | None:
        if not method.find(case.name).needs_drafter:
            return None
        path = self.folder / f"{architecture}-{CASES.index(case) if case in CASES else case}.safetensors"
        if not path.exists():
            model = self.model(architecture) if model is None else model
            write(path, trainee(case.name, model, vocabulary_V=case.vocabulary_V, std=case.std, **case.training))
        return path

    def load(
        self,
        case: Case,
        architecture: str,
        spare: int = 0,
        prompt: int = 12,
        new: int = NEW_TOKENS,
        runtime: Runtime | None = None,
        draws: Sampler | None = None,
    ) -> Any:
        """(target, method), with a cache that holds the text, what the method says it needs beyond it, and no more."""
        path = self.drafter(case, architecture)
        model = self.model(architecture)
        reach = load(case.name, Target(model, capacity=256), path, **case.loading).reach
        # Before the last round all but two tokens of the text are committed: one is pending, one is still to come.
        target = Target(model, capacity=prompt + new - 2 + reach + spare, scratch=reach, runtime=runtime)
        return target, load(case.name, target, path, draws, **case.loading)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("drafters"))


def test_every_installed_method_is_covered() -> None:
    ours = {"ar", "s3d", "medusa", "eagle", "layerskip", "prompt-lookup", "draft-model"}
    assert ours <= set(method.installed())
    assert {case.name for case in CASES} == ours


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_text_is_the_targets_own(case: Case, architecture: str, bench: Bench) -> None:
    target, decoder = bench.load(case, architecture)
    tokens, steps = decoded(target, decoder, PROMPT, Limits(NEW_TOKENS))
    assert tokens == bench.generated(architecture)
    assert len(tokens) == NEW_TOKENS
    assert all(len(step.committed) <= step.accepted + 1 <= step.drafted_depth + 1 for step in steps)
    if case.name == "ar":
        assert [len(step.committed) for step in steps] == [1] * NEW_TOKENS
    if str(case) in RIGHT:
        assert all(step.accepted == step.drafted_depth for step in steps)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_draft_fits_the_cache_that_its_method_asked_for(case: Case, bench: Bench) -> None:
    target, decoder = bench.load(case, "llama")
    propose, drafts = decoder.propose, []
    decoder.propose = lambda tokens: drafts.append(propose(tokens)) or drafts[-1]
    decoded(target, decoder, PROMPT, Limits(NEW_TOKENS))
    assert max(1 + max(len(draft), draft.shape.longest) for draft in drafts) <= decoder.reach


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_captured_depends_on_nothing_that_changes(
    case: Case, architecture: str, temperature: float, bench: Bench
) -> None:
    texts = []
    for runtime in (Runtime(), Rehearsal()):
        draws = sampler(temperature)
        target, decoder = bench.load(case, architecture, runtime=runtime, draws=draws)
        texts.append([decoded(target, decoder, prompt, Limits(NEW_TOKENS), draws) for prompt in (PROMPT, PROMPT[:7])])
    if temperature == 0.0:
        assert texts[1] == texts[0]
    assert runtime.captures > 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_target_that_drafts_for_itself_is_always_right(architecture: str, bench: Bench, tmp_path: Path) -> None:
    bench.model(architecture).save_pretrained(tmp_path)
    target = Target(bench.model(architecture), capacity=80)
    tokens, steps = decoded(target, load("draft-model", target, tmp_path, gamma=3), PROMPT, Limits(NEW_TOKENS))
    assert tokens == bench.generated(architecture)
    assert [len(step.committed) for step in steps] == [1, *[4] * 9, 3]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_method_stops_where_the_target_stops(case: Case, bench: Bench) -> None:
    """At an end-of-sequence token, and at the limit, without overshoot."""
    target, decoder = bench.load(case, "llama")
    whole = bench.generated("llama")
    for end in (whole[0], whole[7], whole[30]):
        tokens, _ = decoded(target, decoder, PROMPT, Limits(NEW_TOKENS, frozenset({end})))
        assert tokens == whole[: whole.index(end) + 1]
    for limit in (1, 2, 11):
        assert decoded(target, decoder, PROMPT, Limits(limit))[0] == whole[:limit]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_text_does_not_depend_on_the_texts_before_it(case: Case, bench: Bench) -> None:
    target, decoder = bench.load(case, "qwen3")
    first = decoded(target, decoder, PROMPT, Limits(NEW_TOKENS))
    decoded(target, decoder, text(12, VOCAB, seed=7), Limits(9))
    assert decoded(target, decoder, PROMPT, Limits(NEW_TOKENS)) == first


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_beyond_the_target_is_declared(case: Case, bench: Bench) -> None:
    _, decoder = bench.load(case, "llama")
    assert (decoder.drafter_bytes > 0) == decoder.needs_drafter


PRECISIONS: dict[str, dict[str, Any]] = {
    "16": {},
    "8": {"load_in_8bit": True},
    "8:t0": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # bitsandbytes
@pytest.mark.parametrize("bits", PRECISIONS)
def test_every_method_runs_on_a_target_of_any_bits(bits: str, tmp_path: Path, bench: Bench) -> None:
    """Drafters are cast to what the target computes in; what the text is worth there is not for this test."""
    bench.model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16 if bits == "16" else torch.float32,
        quantization_config=BitsAndBytesConfig(**PRECISIONS[bits]) if PRECISIONS[bits] else None,
    )
    for case in CASES:
        for draws in (sampler(), sampler(temperature=1.0)):
            target = Target(model.eval(), capacity=96)
            decoder = load(case.name, target, bench.drafter(case, "llama"), draws, **case.loading)
            assert len(decoded(target, decoder, PROMPT, Limits(6), draws)[0]) == 6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_half_precision_target_is_left_as_it_was(case: Case, bench: Bench) -> None:
    """Its rotation's frequencies among the rest: they are a float32 buffer, and shared by whoever rotates alike."""
    model = tiny("llama").to(torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    before = {name: tensor.clone() for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    assert torch.float32 in {tensor.dtype for tensor in before.values()}
    target = Target(model, capacity=256)
    decoder = load(case.name, target, bench.drafter(case, "llama"), **case.loading)
    decoded(target, decoder, PROMPT, Limits(6))
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name


STATEFUL = [case for case in CASES if case.name in ("s3d", "medusa", "eagle", "draft-model")]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("case", STATEFUL, ids=str)
@torch.inference_mode()
def test_state_after_many_rounds_is_the_state_of_a_fresh_start(
    case: Case, temperature: float, architecture: str, bench: Bench
) -> None:
    """Rounds of every kind are forced on the method: whatever it drafts, a random node of the draft is accepted."""
    model, path = bench.model(architecture), bench.drafter(case, architecture)
    draws, fresh_draws = sampler(temperature), sampler(temperature)
    target, other = Target(model, capacity=256), Target(model, capacity=256)
    decoder = load(case.name, target, path, draws, **case.loading)
    tokens = text(12, VOCAB)
    decoder.start(tokens, target.prefill(tokens[:-1]))
    dice = torch.Generator().manual_seed(1)
    for round_ in range(8):
        draws.generator.manual_seed(round_)  # type: ignore[union-attr]
        target.begin(tokens[-1])
        draft = decoder.propose(tokens)
        fresh = load(case.name, other, path, fresh_draws, **case.loading)
        fresh.start(tokens, other.prefill(tokens[:-1]))
        fresh_draws.generator.manual_seed(round_)  # type: ignore[union-attr]
        other.begin(tokens[-1])
        expected = fresh.propose(tokens)
        assert draft.tokens_N.tolist() == expected.tokens_N.tolist()
        assert torch.equal(draft.shape.ancestors_MM, expected.shape.ancestors_MM)
        if draft.q_PV is not None:
            torch.testing.assert_close(draft.q_PV, expected.q_PV, rtol=1e-3, atol=1e-5)
        scores = score(target, tokens[-1], draft)
        verdict = forced(draft, int(torch.randint(len(draft) + 1, (), generator=dice)), 3 + round_)
        decoder.observe(draft, scores, verdict)
        keep(target, verdict, draft)
        decoder.settle(draft, verdict.host())
        tokens += [*verdict.host().tokens, verdict.host().bonus]
        assert target.length == len(tokens) - 1
    assert len(tokens) > 24 or len(draft) < 3


# --- sampling ---------------------------------------------------------------------------------------------------------

FALSE_ALARM = 1e-6
"how often a test of this section fails though nothing is wrong; seeds are fixed, so it always does or never"
SMALL = {"vocab_size": 4, "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.4}
DRAWS = 600
TEMPERATURE = 2.0  # far from 1, so that a draft which forgets the temperature is caught
SAMPLED = [
    Case("ar"),
    Case("s3d", training=S3D, std=0.4),
    Case("s3d", {"k": 2}, S3D, torch.tensor([0, 1, 3])),
    Case("s3d", {"nodes": 6}, S3D, torch.tensor([0, 1, 3])),
    Case("s3d", {"nodes": 6, "tree": "dynamic"}, S3D, torch.tensor([0, 1, 3])),
    Case("medusa", {"nodes": 8}),
    Case("medusa", {"nodes": 30}, vocabulary_V=torch.tensor([0, 1, 3])),
    Case("eagle", {"depth": 2}),
    Case("eagle", {"depth": 2}, vocabulary_V=torch.tensor([0, 2])),
    Case("eagle", {"nodes": 6, "depth": 2, "branch": 2}),
    Case("layerskip", {"threshold": 0.0, "gamma": 3, "skip": "1"}),
    Case("prompt-lookup"),
    Case("draft-model", {"gamma": 2}),
]


def forced(draft: Draft, node: int, bonus: int) -> Verdict:
    """A verdict that accepts the path down to `node`, whatever the target thinks of it."""
    shape = draft.shape
    path = [i for i in range(1, len(draft) + 1) if shape.ancestors_MM[node, i]]
    pad = [0] * (shape.longest - len(path))
    tokens = [int(draft.tokens_N[i - 1]) for i in path]
    packed = [len(path), bonus, int(shape.depth_M.max()), *path, *pad, *tokens, *pad]
    return Verdict.of(torch.tensor(packed, dtype=torch.long), torch.tensor(node))


def exact(target: Target, prompt: list[int], length: int, draws: Sampler) -> Tensor:
    """Probabilities of all texts of `length` tokens after the prompt, flattened, by the target's own passes."""
    p = torch.ones(1)
    texts: list[list[int]] = [[]]
    for _ in range(length):
        rows = torch.cat([draws.distribution(target.prefill([*prompt, *text]).logits_MV) for text in texts])
        p = (p[:, None] * rows).flatten()
        texts = [[*text, token] for text in texts for token in range(rows.shape[1])]
    return p.double()


def p_value(counts: Tensor, p: Tensor) -> float:
    """Pearson's chi-square, rare cells pooled; zero where something impossible was drawn."""
    if counts[p == 0].sum() > 0:
        return 0.0
    expected = p * counts.sum()
    order = expected.argsort()
    counts, expected = counts[order].double(), expected[order]
    pooled = int((expected.cumsum(0) < 8).sum()) + 1
    counts = torch.cat((counts[:pooled].sum().view(1), counts[pooled:]))
    expected = torch.cat((expected[:pooled].sum().view(1), expected[pooled:]))
    statistic = float(((counts - expected).square() / expected).sum())
    return float(chi2.sf(statistic, len(counts) - 1))


def sampled_p_value(case: Case, folder: Path, draws: int, top_p: float = 1.0, spoil: Any = None) -> float:
    """How likely `draws` texts of three tokens are under the target's own distribution."""
    model = tiny("llama", **SMALL)
    target = Target(model, capacity=64)
    path = None
    if method.find(case.name).needs_drafter:
        made = trainee(case.name, model, vocabulary_V=case.vocabulary_V, std=case.std, **case.training)
        path = write(folder / "drafter.safetensors", made)
    chance = sampler(TEMPERATURE, seed=3, top_p=top_p)
    decoder = load(case.name, target, path, chance, **case.loading)
    assert decoder.lossless
    if spoil is not None:
        spoil(decoder)
    prompt = [1, 3, 2, 1, 3, 3, 1, 3, 2]
    p = exact(target, prompt, 3, chance)
    counts = torch.zeros(len(p))
    for _ in range(draws):
        (a, b, c), _ = decoded(target, decoder, prompt, Limits(3), chance)
        counts[16 * a + 4 * b + c] += 1
    return p_value(counts, p)


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_sampled_text_follows_the_targets_own_distribution(case: Case, tmp_path: Path) -> None:
    assert sampled_p_value(case, tmp_path, DRAWS) > FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_sampled_text_follows_the_targets_own_distribution_in_many_draws(
    case: Case, top_p: float, tmp_path: Path
) -> None:
    assert sampled_p_value(case, tmp_path, 4_000, top_p) > FALSE_ALARM


def lying(draw: Callable[[Sampler, Tensor], Tensor]) -> Callable[[Any], None]:
    """Make a method draw otherwise than its q says."""

    def spoil(decoder: Any) -> None:
        honest = decoder.sampler
        decoder.sampler = Sampler(honest.temperature, honest.top_p, honest.generator)
        decoder.sampler.draw = lambda p_MV: draw(honest, p_MV)

    return spoil


def at_temperature_one(honest: Sampler, p_MV: Tensor) -> Tensor:
    sharper_MV = p_MV**TEMPERATURE
    return honest.draw(sharper_MV / sharper_MV.sum(-1, keepdim=True))


@pytest.mark.parametrize("case", [case for case in SAMPLED if case.draws and "nodes" not in case.loading], ids=str)
def test_a_draft_drawn_at_another_temperature_than_it_says_would_be_caught(case: Case, tmp_path: Path) -> None:
    assert sampled_p_value(case, tmp_path, DRAWS, spoil=lying(at_temperature_one)) < FALSE_ALARM


def test_an_argmax_draft_that_claims_to_be_drawn_would_be_caught(tmp_path: Path) -> None:
    argmax = lying(lambda _, p_MV: p_MV.argmax(-1))
    assert sampled_p_value(Case("eagle", {"depth": 2}), tmp_path, DRAWS, spoil=argmax) < FALSE_ALARM


def test_typical_acceptance_says_that_it_is_lossy(bench: Bench) -> None:
    path = bench.drafter(Case("medusa"), "llama")
    target = Target(bench.model("llama"), capacity=64)
    typical = load("medusa", target, path, sampler(temperature=1.0), acceptance="typical")
    assert not typical.lossless
    with pytest.raises(ValueError, match="temperature"):
        load("medusa", target, path, sampler(), acceptance="typical")


def test_a_choice_among_the_nodes_of_a_chain_is_refused() -> None:
    with pytest.raises(UserError, match=r"'s3d': tree=dynamic .* add nodes=32"):
        method.parse("s3d:tree=dynamic")


def test_a_drafter_for_a_deeper_target_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "drafter.safetensors", trainee("s3d", tiny("llama"), keep="1+2"))
    shallow = Target(tiny("llama", num_hidden_layers=2), capacity=64)
    with pytest.raises(ValueError, match=r"the target has 2 layers, so 1\+2 of them cannot draft"):
        load("s3d", shallow, path)
