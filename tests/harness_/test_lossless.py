"""`verify`: finds a planted bug, forgives a tie, resumes, merges shards, and fails when something diverged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny_chat
import torch
from bench import steady
from factory import cell
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from harness import decode, lossless, verify_command, weights
from harness.decode import Step
from harness.errors import UserError
from harness.lossless import Finding, Heading, acceptance, first_difference, judge, summary
from harness.plan import Planned
from harness.target import Target
from harness.verify import Verdict
from harness.verify_command import share, verify
from methods.layerskip import LayerSkip

PLANTED = decode.verify


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of `verify` for a tiny model and three prompts, four turns."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    return {
        "model": str(tiny_chat.save(tmp_path / "model")),
        "prompts": str(tiny_chat.prompts(tmp_path / "prompts.jsonl")),
        "methods": "ar,prompt-lookup,layerskip",
        "max_new_tokens": 24,
        "device": "cpu",
        "out": tmp_path / "found.jsonl",
    }


def outcomes(path: Path) -> dict[str, list[str]]:
    _, _, findings = lossless.read([path])
    return {
        name: [f.outcome for f in findings if f.method == name] for name in dict.fromkeys(f.method for f in findings)
    }


# --- the command ------------------------------------------------------------------------------------------------------


def test_methods_that_are_right_are_found_identical(chat: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(**chat) == 0
    heading, references, findings = lossless.read([chat["out"]])
    assert heading.reference == "generate"
    assert heading.bits == "32"
    assert len(references) == 4
    assert outcomes(chat["out"]) == dict.fromkeys(("ar", "prompt-lookup", "layerskip"), ["identical"] * 4)
    assert {f.rounds for f in findings if f.method == "ar"} == {len(references[0].new_tokens) - 1}
    printed = capsys.readouterr().out
    assert "layerskip" in printed
    assert "DIVERGED" in printed


def test_the_second_turn_follows_the_references_first_answer(chat: dict[str, Any]) -> None:
    verify(**chat)
    _, references, _ = lossless.read([chat["out"]])
    loaded = weights.load(weights.resolve(chat["model"]), weights.Bits(32), device="cpu")
    (first, second) = (ref for ref in references if ref.prompt_id == "two")
    assert list(second.prompt_tokens[: len(first.prompt_tokens)]) == list(first.prompt_tokens)
    own = Target(loaded.model, capacity=1).generate(second.prompt_tokens, 24, [2])
    assert list(second.new_tokens) == own


def plant(monkeypatch: pytest.MonkeyPatch, every: int, token: int) -> None:
    """Every so many rounds, the loop commits a wrong token."""
    rounds = 0

    def verdict(*arguments: Any) -> Verdict:
        nonlocal rounds
        rounds += 1
        found = PLANTED(*arguments)
        if rounds % every == 0:
            found.bonus.fill_(token)
        return found

    monkeypatch.setattr(decode, "verify", verdict)


def test_a_wrong_token_now_and_then_is_found(
    chat: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, every=17, token=9)
    assert verify(**chat) == 1
    assert "DIVERGED" in outcomes(chat["out"])["ar"]
    _, _, findings = lossless.read([chat["out"]])
    assert all(f.margin is None or f.margin > 2e-4 for f in findings if f.outcome == "DIVERGED")
    assert "logits apart in float64" in capsys.readouterr().out


class Planted:
    """Accepts one wrong token in 200: every 200th round of a method's own decoding ends in a wrong token."""

    def __init__(self, every: int) -> None:
        self.every, self.rounds = every, 0

    def verify(self, draft: Any, *arguments: Any) -> Verdict:
        self.rounds += 1
        found = PLANTED(draft, *arguments)
        if self.rounds % self.every == 0:
            wrong = (found.bonus + 1) % 200 + 6
            found.bonus.copy_(torch.where(wrong == found.bonus, wrong + 1, wrong))
        return found


def test_one_wrong_token_in_200_is_called_diverged_at_the_right_position(
    chat: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug is in the decoding of one method; the reference is transformers' own."""
    lines = [{"id": f"p{n}", "category": "writing", "turns": [f"Count to {n}."]} for n in range(8)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    planted = Planted(every=200)
    monkeypatch.setattr(decode, "verify", planted.verify)
    assert verify(**chat | {"methods": "ar", "prompts": str(tmp_path / "many.jsonl"), "max_new_tokens": 90}) == 1
    _, _, findings = lossless.read([chat["out"]])
    begun = 0
    wrong: dict[str, int] = {}
    for finding in findings:  # `ar`: a round a token, and the first token is the prompt's own
        at = -begun % 200 or 200
        if at <= finding.rounds:
            wrong[finding.prompt_id] = at
        begun += finding.rounds
    assert len(wrong) == begun // 200 >= 2
    assert {f.prompt_id: f.compared for f in findings if f.outcome == "DIVERGED"} == wrong
    assert {f.outcome for f in findings if f.prompt_id not in wrong} == {"identical"}
    (row,) = lossless.summary(findings, "32", {})
    assert row.verdict == "DIVERGED"


def test_half_precision_near_ties_are_not_called_diverged(chat: dict[str, Any]) -> None:
    """Logits so close together that bfloat16 decides many positions by rounding, one token at a time or several."""
    file = Path(chat["model"]) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] *= 0.01
    save_file(tensors, file, {"format": "pt"})
    options = {"bits": "16", "methods": "layerskip,prompt-lookup:ngram=1", "max_new_tokens": 60}
    assert verify(**chat | options) == 0
    _, _, findings = lossless.read([chat["out"]])
    assert {finding.outcome for finding in findings} <= {"identical", "near-tie"}
    assert any(finding.outcome == "near-tie" and finding.margin is not None for finding in findings)


def test_what_has_no_text_or_cannot_be_walked_is_refused(chat: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shape:tiny has random weights and no tokenizer"):
        verify(**chat | {"model": "shape:tiny"})
    other = str(tiny_chat.save(tmp_path / "other", architecture="gpt2"))
    for temperature in (0.0, 0.7):
        with pytest.raises(UserError, match="architecture 'gpt2' is not supported"):
            verify(**chat | {"model": other, "temperature": temperature})
    assert not chat["out"].exists()


def test_all_methods_means_those_that_can_run(chat: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(**chat | {"methods": "all"}) == 0
    assert set(outcomes(chat["out"])) == {"ar", "prompt-lookup", "layerskip"}
    shown = capsys.readouterr()
    assert "medusa: left out: no trained drafter" in shown.err


def test_a_token_as_good_as_the_best_is_a_near_tie(chat: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of the head are equal, and the loop takes the second where the target takes the first."""
    verify(**chat | {"out": chat["out"].with_name("before.jsonl"), "methods": "ar"})
    _, (reference, *_), _ = lossless.read([chat["out"].with_name("before.jsonl")])
    likely, twin = sorted((reference.new_tokens[8], 200))
    file = Path(chat["model"]) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][twin] = tensors["lm_head.weight"][likely] = tensors["lm_head.weight"][
        reference.new_tokens[8]
    ]
    save_file(tensors, file, {"format": "pt"})

    def verdict(*arguments: Any) -> Verdict:
        found = PLANTED(*arguments)
        found.bonus.copy_(torch.where(found.bonus == likely, twin, found.bonus))
        return found

    monkeypatch.setattr(decode, "verify", verdict)
    assert verify(**chat | {"methods": "ar"}) == 0
    _, _, findings = lossless.read([chat["out"]])
    ties = [f for f in findings if f.outcome == "near-tie"]
    assert ties
    assert {f.margin for f in ties} == {0.0}
    assert {f.outcome for f in findings} <= {"identical", "near-tie"}


def test_what_was_killed_goes_on_and_repeats_nothing(chat: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    verify(**chat)
    whole = chat["out"].read_bytes().splitlines(keepends=True)
    chat["out"].write_bytes(b"".join(whole[:8]) + whole[8][:20])  # a torn line
    asked: list[int] = []
    own = Target.generate
    monkeypatch.setattr(Target, "generate", lambda *given: asked.append(1) or own(*given))
    assert verify(**chat) == 0
    assert not asked  # all references were there
    assert sorted(chat["out"].read_bytes().splitlines(keepends=True)) == sorted(whole)


def test_what_other_code_wrote_is_decoded_again(chat: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(**chat | {"methods": "ar"}) == 0
    with monkeypatch.context() as patch:
        plant(patch, every=17, token=9)
        assert verify(**chat | {"methods": "ar"}) == 0, "nothing that the file knows of has changed"
        patch.setattr(verify_command, "made_with", lambda one: "edited")
        assert verify(**chat | {"methods": "ar"}) == 1
    assert verify(**chat | {"methods": "layerskip"}) == 0, "another method's verdict is not this one's"
    assert verify(**chat | {"methods": "ar"}) == 0, "mended"


def test_a_finding_names_its_code_and_its_drafter(chat: dict[str, Any], tmp_path: Path) -> None:
    hashes = []
    for name, content in (("ar", None), ("layerskip", None), ("ar", b"one"), ("ar", b"two")):
        (tmp_path / "drafter").write_bytes(content or b"")
        drafter = None if content is None else str(tmp_path / "drafter")
        hashes.append(verify_command.made_with(Planned(cell=cell(name), drafter=drafter)))
    assert len(set(hashes)) == 4


def test_controls_of_shards_add_up(tmp_path: Path) -> None:
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, flips in zip(paths, (3, 9), strict=True):
        lossless.append(path, lossless.Control(weights="base", positions=1000, flips=flips))
    assert lossless.read_controls([*paths, paths[0]]) == {
        "base": lossless.Control(weights="base", positions=2000, flips=12)
    }


def test_another_setting_does_not_mix_into_the_file(chat: dict[str, Any]) -> None:
    verify(**chat | {"methods": "ar"})
    with pytest.raises(UserError, match="other settings"):
        verify(**chat | {"methods": "ar", "max_new_tokens": 5})


def test_shards_together_are_the_whole(
    chat: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(**chat)
    parts = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for number, part in enumerate(parts, start=1):
        assert verify(**chat | {"shard": f"{number}/2", "out": part}) == 0
    _, _, whole = lossless.read([chat["out"]])
    _, _, merged = lossless.read(parts)
    assert sorted(merged, key=lambda f: f.key) == sorted(whole, key=lambda f: f.key)
    assert verify(read=tuple(parts)) == 0
    assert "prompt-lookup" in capsys.readouterr().out


def test_half_precision_is_compared_with_the_same_loop(chat: dict[str, Any]) -> None:
    assert verify(**chat | {"bits": "16", "methods": "ar"}) == 0
    heading, _, _ = lossless.read([chat["out"]])
    assert heading.reference == "ar"
    assert outcomes(chat["out"]) == {"ar": ["identical"] * 4}


def test_an_untrained_method_says_how_to_train_it(chat: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="harness train --methods medusa"):
        verify(**chat | {"methods": "medusa"})


def test_shards_are_disjoint_and_complete() -> None:
    prompts: Any = list(range(10))
    assert sorted(prompt for i in (1, 2, 3) for prompt in share(prompts, f"{i}/3")) == prompts
    for wrong in ("0/3", "4/3", "1-3", "a/b", "11/11"):
        with pytest.raises(UserError, match="shard"):
            share(prompts, wrong)


@pytest.mark.parametrize("content", [b"my notes, one line", b"line 1\nline 2", b"\x00\x01\n\xff", b'{"type":"ref'])
def test_a_file_that_verify_did_not_write_stays_what_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no file of"):
        lossless.cut_torn_line(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("torn", [b"", b'{"ty', b'{"type":"heading","version":1,"mo'])
def test_what_is_left_of_a_heading_is_dropped(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "verify.jsonl"
    path.write_bytes(torn)
    lossless.cut_torn_line(path)
    assert path.read_bytes() == b""


# --- judging ----------------------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, 3), max_size=6)


@steady
@given(tokens, tokens)
def test_the_first_difference_is_where_texts_part(one: list[int], other: list[int]) -> None:
    place = first_difference(one, other)
    if place is None:
        assert one == other
    else:
        assert one[:place] == other[:place]
        assert one[place : place + 1] != other[place : place + 1]


@pytest.mark.parametrize(
    ("text", "bits", "gap", "outcome"),
    [
        ([1, 2, 3], "32", 9.0, "identical"),
        ([1, 2, 4], "32", 1e-4, "near-tie"),
        ([1, 2, 4], "32", 3e-4, "DIVERGED"),
        ([1, 2, 4], "16", 0.2, "near-tie"),
        ([1, 2], "32", 0.0, "DIVERGED"),  # ends early: no tie explains that
        ([1, 2, 4], "int8:t6", 0.0, "untestable"),
    ],
)
def test_a_difference_is_judged_by_its_margin(text: list[int], bits: str, gap: float, outcome: str) -> None:
    assert judge([1, 2, 3], text, bits, lambda _: gap).outcome == outcome


def step(depth: int, accepted: int) -> Step:
    return Step(depth, depth, accepted, tuple(range(accepted + 1)), 1)


def test_acceptance_counts_a_depth_only_where_all_before_it_were_accepted() -> None:
    steps = [step(3, 0), step(3, 2), step(3, 3), step(1, 1), step(0, 0)]
    assert acceptance(steps) == ((4, 2, 2), (3, 2, 1))


def test_the_summary_weighs_by_tokens() -> None:
    def finding(turn: int, new_tokens: int, rounds: int, accepted: tuple[int, ...]) -> Finding:
        return Finding(
            method="s3d", weights="base", prompt_id="p", turn=turn, outcome="identical", compared=new_tokens,
            margin=None, new_tokens=tuple(range(new_tokens)), rounds=rounds, drafted=(rounds, *accepted[:-1]),
            accepted=accepted,
        )  # fmt: skip

    (row,) = summary([finding(0, 11, 5, (5, 0)), finding(1, 31, 10, (10, 10))], "32", {})
    assert row.turns == 2
    assert row.tau == 40 / 15
    assert row.acceptance == (1.0, 10 / 15)
    assert row.outcomes == {"identical": 2}


def told(outcome: str, compared: int, **changes: Any) -> Finding:
    return Finding(
        method="s3d", weights="base", prompt_id=f"p{compared}", turn=0, outcome=outcome, compared=compared, margin=None,
        new_tokens=(), rounds=1, drafted=(), accepted=(), **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "outcomes", "control", "word"),
    [
        ("32", ["identical", "identical"], None, "identical"),
        ("32", ["identical", "near-tie"], None, "near-tie"),
        ("16", ["near-tie", "DIVERGED"], None, "DIVERGED"),
        ("nf4", ["identical"], None, "identical"),
        ("int8:t6", ["identical", "untestable"], None, "not testable in these bits"),
        ("int8:t6", ["identical", "untestable"], (1000, 40), "not testable in these bits"),
        ("nf4", ["untestable"], (1000, 2), "near-tie"),
        ("nf4", ["untestable"] * 8, (1000, 2), "DIVERGED"),
    ],
)
def test_a_methods_verdict(bits: str, outcomes: list[str], control: tuple[int, int] | None, word: str) -> None:
    """In quantised bits it is held against how often the target parts from itself, where that is rare."""
    findings = [told(outcome, 60 + place) for place, outcome in enumerate(outcomes)]
    found = control and lossless.Control(weights="base", positions=control[0], flips=control[1])
    assert lossless.verdict(findings, bits, found) == word
    lossy = [told(outcome, 60, lossless=False) for outcome in outcomes]
    assert lossless.verdict(lossy, bits, found) == "lossy by design"


def test_a_quantised_target_is_held_against_itself(chat: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(**chat | {"bits": "8", "methods": "prompt-lookup"}) == 0
    found = lossless.read_controls([chat["out"]])["base"]
    _, references, _ = lossless.read([chat["out"]])
    assert found.positions == sum(len(ref.new_tokens) - 1 for ref in references)
    assert 0 <= found.flips < found.positions
    assert "Scored 8 tokens at a time instead of one" in capsys.readouterr().out


def test_a_precise_target_scored_in_chunks_is_itself(chat: dict[str, Any]) -> None:
    verify(**chat | {"methods": "ar"})
    _, references, _ = lossless.read([chat["out"]])
    loaded = weights.load(weights.resolve(chat["model"]), weights.Bits(32), device="cpu")
    assert verify_command.control("base", loaded, references).flips == 0


# --- sampling ---------------------------------------------------------------------------------------------------------

SAMPLING = {"temperature": 1.0, "samples": 12, "max_new_tokens": 40}


def test_sampled_text_of_correct_methods_passes(chat: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(**chat | SAMPLING | {"methods": "ar,layerskip,prompt-lookup:ngram=1"}) == 0
    assert capsys.readouterr().out.count("as the target") == 3
    assert not chat["out"].exists()


def test_argmax_drafts_scored_with_their_softmax_are_caught(
    chat: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """layerskip drafts token by token; the planted bug makes each token the argmax and leaves q as it was."""
    own = LayerSkip.propose

    def propose(self: LayerSkip, tokens: list[int]) -> Any:
        draw = self.sampler.draw
        self.sampler.draw = lambda p_MV: p_MV.argmax(-1)  # type: ignore[method-assign]
        try:
            return own(self, tokens)
        finally:
            self.sampler.draw = draw  # type: ignore[method-assign]

    monkeypatch.setattr(LayerSkip, "propose", propose)
    assert verify(**chat | SAMPLING | {"methods": "layerskip:threshold=0.0:gamma=3"}) == 1
    assert "DIVERGED" in capsys.readouterr().out


def test_sampling_is_not_tested_where_the_target_itself_depends_on_the_chunk(
    chat: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(**chat | SAMPLING | {"methods": "ar", "bits": "8", "samples": 2}) == 0
    assert "not testable in these bits" in capsys.readouterr().out


def test_too_few_tokens_to_test_a_distribution_is_a_mistake(chat: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="too few for a test: add prompts, tokens or --samples"):
        verify(**chat | SAMPLING | {"methods": "ar", "max_new_tokens": 4})


def test_files_of_unlike_settings_are_not_merged(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    heading = Heading(
        model="m", weights_sha256="0", bits="32", prompts_sha256="0", max_new_tokens=8, reference="generate"
    )
    lossless.append(one, heading)
    lossless.append(other, msgspec.structs.replace(heading, max_new_tokens=9))
    with pytest.raises(UserError, match="different settings"):
        lossless.read([one, other])
    with pytest.raises(UserError, match="cannot read"):
        lossless.read([tmp_path / "none.jsonl"])
    other.write_text("{}\n")
    with pytest.raises(UserError, match="no file of `verify`"):
        lossless.read([other])
