"""Training: the text a model writes, what is judged in it, and that a drafter learns, resumes and is found again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from tiny import tiny

from harness import chat, drafter, method, weights
from harness.cli import main
from harness.errors import UserError
from harness.paths import save_tensors
from harness.train import command, corpus
from harness.train.loop import (
    REPEAT_WEIGHT,
    REPEATED,
    Classroom,
    Recipe,
    Report,
    draft_vocabulary,
    novelty,
    places,
)
from harness.trunk import Trunk

TRAINED = ("s3d:keep=1+2:k=2:rank=4", "medusa:heads=2", "eagle:depth=2", "draft-model:layers=1")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(directory: Path) -> weights.LoadedModel:
    return weights.load(weights.resolve(str(directory)), weights.Bits(32), device="cpu")


@pytest.fixture(scope="module")
def text(loaded: weights.LoadedModel) -> corpus.Corpus:
    trunk, template = Trunk(loaded.model), corpus.Template.of(loaded.tokenizer)
    ends = sorted(chat.end_ids(loaded.model, loaded.tokenizer))
    asked = [loaded.tokenizer.encode(turn, add_special_tokens=False) for turn in ("Hi", "Why?", "Count.", "Name it")]
    ids, greedy = corpus.write(trunk, template, ends, sequences=24, length=48, seed=0, first_turns=asked)
    return corpus.Corpus(ids, greedy, 1.0, "cpu")


def classroom(loaded: weights.LoadedModel, text: corpus.Corpus, tokens: int = 4 * 48 * 30) -> Classroom:
    torch.manual_seed(0)
    trunk = Trunk(loaded.model)
    vocabulary = draft_vocabulary(text, 200, trunk.vocabulary, frozenset({2}))
    trainees = {}
    for spec in map(method.parse_one, TRAINED):
        made = method.find(spec.name).trainee(trunk, method.options_of(spec), vocabulary, text.ids_RT[0])
        assert made is not None
        trainees[spec.label] = made
    return Classroom(trunk, text, trainees, vocabulary, Recipe(tokens, batch=4, anchors=6, learning_rate=3e-3))


def test_every_dialogue_opens_as_the_template_says(loaded: weights.LoadedModel, text: corpus.Corpus) -> None:
    opening = corpus.Template.of(loaded.tokenizer).opening
    assert (text.ids_RT[:, : len(opening)] == torch.tensor(opening)).all()


def test_tokens_marked_greedy_are_the_models_own_first_choice(loaded: weights.LoadedModel, text: corpus.Corpus) -> None:
    trunk = Trunk(loaded.model)
    trunk._set_attention("sdpa")
    with torch.no_grad():
        choice = loaded.model(text.ids_RT).logits.argmax(-1)
    trunk._set_attention("harness")
    marked = text.greedy_RT[:, 1:]
    assert marked.sum() > 50, "an untrained model answers something"
    assert (choice[:, :-1][marked] == text.ids_RT[:, 1:][marked]).all()


def test_first_turns_given_by_the_user_are_asked(loaded: weights.LoadedModel) -> None:
    trunk, template = Trunk(loaded.model), corpus.Template.of(loaded.tokenizer)
    asked = loaded.tokenizer.encode("Hi", add_special_tokens=False)
    ids, greedy = corpus.write(trunk, template, [2], sequences=2, length=24, seed=0, first_turns=[asked])
    opening = [*template.opening, *asked, *template.to_answer]
    assert ids[0, : len(opening)].tolist() == opening
    assert greedy[0, len(opening)], "the answer begins at once"


def test_a_long_first_turn_is_cut_and_answered(loaded: weights.LoadedModel) -> None:
    trunk, template = Trunk(loaded.model), corpus.Template.of(loaded.tokenizer)
    asked = loaded.tokenizer.encode("Name a bird, a tree and a river.", add_special_tokens=False)
    ids, greedy = corpus.write(trunk, template, [2], sequences=1, length=24, seed=0, first_turns=[asked])
    assert ids[0, :12].tolist() == [*template.opening, *asked[:9], *template.to_answer]
    assert greedy[0].nonzero()[0] == 12
    with pytest.raises(UserError, match=r"--length 6 has no room .* give 8 or more"):
        corpus.write(trunk, template, [2], sequences=1, length=6, seed=0, first_turns=[asked])


def test_a_corpus_is_written_once_and_read_again(
    loaded: weights.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    make = lambda: corpus.make(  # noqa: E731
        Trunk(loaded.model), loaded.tokenizer, [2], identity=loaded.sha256, tokens=64, length=16, batch=3, seed=0
    )
    first = make()
    monkeypatch.setattr(corpus, "write", None)
    again = make()
    assert again.ids_RT.equal(first.ids_RT)
    assert again.greedy_RT.equal(first.greedy_RT)
    assert again.tokens == 64


def test_a_corpus_that_was_interrupted_goes_on_and_a_damaged_one_is_written_anew(
    loaded: weights.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    write, fail_at = corpus.write, [99]

    def watched(*given: Any, **named: Any) -> Any:
        if len(batches) == fail_at[0]:
            raise KeyboardInterrupt
        batches.append(named["seed"])
        return write(*given, **named)

    def make() -> corpus.Corpus:
        trunk = Trunk(loaded.model)
        given = {"identity": loaded.sha256, "tokens": 96, "length": 16, "batch": 2, "seed": 0}
        return corpus.make(trunk, loaded.tokenizer, [2], **given)  # type: ignore[arg-type]

    monkeypatch.setattr(corpus, "write", watched)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "whole"))
    whole = make()
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "parts"))
    fail_at[0] = 5
    with pytest.raises(KeyboardInterrupt):
        make()
    fail_at[0] = 99
    assert make().ids_RT.equal(whole.ids_RT)
    assert batches == [0, 2, 4, 0, 2, 4]
    (kept,) = (tmp_path / "parts" / "corpora").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    assert make().greedy_RT.equal(whole.greedy_RT)
    assert len(batches) == 9


def test_places_have_only_greedy_tokens_after_them() -> None:
    greedy = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1]]).bool()
    assert places(greedy, 2).nonzero()[:, 1].tolist() == [1, 5, 6]


def test_a_place_before_repeated_text_counts_less() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5, 8]])
    weight = novelty(ids)
    # Token 10 (a 5) ends "1 2 3 4 5" for the second time: the place before it is the only one that counts less.
    assert (weight < 1).nonzero()[:, 1].tolist() == [9]


def test_what_repeats_is_found_wherever_it_stood_before() -> None:
    ids = torch.randint(0, 2, (3, 60), generator=torch.Generator().manual_seed(0))
    expected = torch.ones(3, 60)
    for row, text in enumerate(ids.tolist()):
        pieces = [tuple(text[start : start + REPEATED + 1]) for start in range(60 - REPEATED)]
        for place, piece in enumerate(pieces):
            if piece in pieces[:place]:
                expected[row, place + REPEATED - 1] = REPEAT_WEIGHT
    assert (expected < 1).any()
    assert novelty(ids, rows=2).equal(expected)


def test_a_draft_vocabulary_has_what_is_said_most_and_what_must_be_there(text: corpus.Corpus) -> None:
    vocabulary = draft_vocabulary(text, 8, 262, frozenset({261}))
    assert vocabulary is not None
    assert vocabulary.tolist() == sorted(set(vocabulary.tolist()))
    said = torch.bincount(text.ids_RT[text.greedy_RT], minlength=262)
    assert int(said.argmax()) in vocabulary
    assert 261 in vocabulary
    assert draft_vocabulary(text, 0, 262, frozenset()) is None


def test_all_methods_learn_and_the_target_does_not_change(loaded: weights.LoadedModel, text: corpus.Corpus) -> None:
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    room = classroom(loaded, text)
    room.advance()
    first = {name: float(pupil.loss) for name, pupil in room.pupils.items()}
    assert room.run(evaluate_every=1000)
    for name, pupil in room.pupils.items():
        assert float(pupil.loss) < 0.9 * first[name], name
        assert pupil.cost.flops > 0
        assert pupil.cost.seconds > 0
    assert all(parameter.equal(before[name]) for name, parameter in loaded.model.named_parameters())


def test_an_interrupted_training_ends_like_an_uninterrupted_one(
    loaded: weights.LoadedModel, text: corpus.Corpus, tmp_path: Path
) -> None:
    whole, half = classroom(loaded, text), classroom(loaded, text)
    for _ in range(6):
        whole.advance()
    for _ in range(3):
        half.advance()
    save_tensors(tmp_path / "state.safetensors", half.state())
    later = classroom(loaded, text)
    later.resume(drafter.tensors(tmp_path / "state.safetensors"))
    for _ in range(3):
        later.advance()
    for name, pupil in whole.pupils.items():
        for key, tensor in pupil.trainee.module.state_dict().items():
            torch.testing.assert_close(later.pupils[name].trainee.module.state_dict()[key], tensor, msg=f"{name} {key}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whoever_asks_to_stop_gets_what_was_learned_saved(
    number: signal.Signals, loaded: weights.LoadedModel, text: corpus.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, saved = classroom(loaded, text), []
    advance = room.advance

    def interrupted() -> None:
        advance()
        if room.step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(room, "advance", interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted after step 2 of 30: the same command goes on"):
        room.run(save=lambda: saved.append(room.step))
    assert saved == [2]
    assert signal.getsignal(number) is handler


def test_too_little_text_says_what_to_do(loaded: weights.LoadedModel) -> None:
    nothing = corpus.Corpus(torch.zeros(4, 48, dtype=torch.long), torch.zeros(4, 48, dtype=torch.bool), 1.0, "cpu")
    with pytest.raises(UserError, match="corpus-tokens"):
        classroom(loaded, nothing)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    class Bare:
        chat_template = None

    with pytest.raises(UserError, match="no chat template"):
        corpus.Template.of(Bare())


EACH = "{% for message in messages %}"
"how a chat template begins to print"


@pytest.mark.parametrize(
    ("template", "hint"),
    [
        (EACH + "<|user|>{{ message['content'] }}{{ message['content'] }}<|end|>{% endfor %}", "every turn once"),
        ("<|user|>{{ messages[-1]['content'] }}<|end|>", "every turn once"),
        (EACH + "{{ raise_exception('only one turn') }}{% endfor %}", r"refuses a plain dialogue \(only one turn\)"),
        ("<|user|>" + EACH + "{{ message['content'] }}{% endfor %}", "nothing between two turns"),
    ],
)
def test_a_chat_template_that_cannot_be_cut_is_refused(
    template: str, hint: str, loaded: weights.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded.tokenizer is not None
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=f"{hint}.*: name another model"):
        corpus.Template.of(loaded.tokenizer)


def test_a_dialogue_that_opens_with_nothing_needs_first_turns(loaded: weights.LoadedModel) -> None:
    trunk, template = Trunk(loaded.model), corpus.Template([], [4], [2])
    with pytest.raises(UserError, match="give first turns with --data"):
        corpus.write(trunk, template, [2], sequences=2, length=24, seed=0, begun=[[9]])
    ids, _ = corpus.write(trunk, template, [2], sequences=2, length=24, seed=0, first_turns=[[9]])
    assert ids[:, :2].tolist() == [[9, 4]] * 2


def test_the_command_trains_and_run_finds_the_drafters(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    methods = ",".join([*TRAINED, "s3d:mode=shared:keep=1+2:k=2:rank=2"])
    data = tiny_chat.prompts(tmp_path / "data.jsonl")
    small = f"--data {data} --tokens 1152 --corpus-tokens 1152 --length 48 --batch 4 --anchors 4 --device cpu"
    small += " --draft-vocabulary 200"
    assert main(["train", "--model", str(directory), "--methods", methods, *small.split()]) == 0
    name = weights.resolve(str(directory)).name
    for found in ("s3d", "s3d-shared", "medusa", "eagle", "draft-model"):
        path = drafter.find(found, None, name)
        assert path is not None, capsys.readouterr().err
        config, training = drafter.metadata(path)
        assert "rank_accuracy" in config
        assert training["tokens_seen"] == 1152
        assert training["file_bytes"] <= path.stat().st_size
    asked = tiny_chat.prompts(tmp_path / "prompts.jsonl")
    methods = "s3d,s3d:mode=shared,medusa,eagle,eagle:nodes=6,draft-model"
    out = tmp_path / "run"
    measure = ["run", "--model", str(directory), "--methods", methods, "--prompts", str(asked), "--max-new-tokens", "8"]
    assert main([*measure, "--device", "cpu", "--bits", "32", "--out", str(out)]) == 0
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert {trial["outcome"] for trial in trials} == {"ok"}
    texts: dict[tuple[str, str, int], set[str]] = {}
    for trial in trials:
        key = (trial["cell"]["weights"], trial["prompt_id"], trial["turn"])
        texts.setdefault(key, set()).add(str(trial["new_tokens"]))
    assert all(len(said) == 1 for said in texts.values()), "every method says what its own target says"
    assert {weights for weights, _, _ in texts} == {"base", "s3d-shared"}


def test_an_interrupted_training_goes_on_only_with_the_same_data(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))

    class Listening:
        def __init__(self) -> None:
            self.told: list[str] = []

        def stage(self, step: str, fraction: float | None) -> None:
            self.told.append(step)

        def report(self, report: Report) -> None: ...

    data = tiny_chat.prompts(tmp_path / "data.jsonl")
    sizes: dict[str, Any] = {"tokens": 1152, "corpus_tokens": 1152, "length": 48, "batch": 4, "anchors": 4}
    settings = command.Settings("medusa:heads=2", str(directory), data=data, draft_vocabulary=200, **sizes)

    def went_on() -> bool:
        listening = Listening()
        assert command.train(settings, listening, stop_after_seconds=0) == []
        return any(step.startswith("going on") for step in listening.told)

    assert not went_on()
    assert went_on()
    (kept,) = (tmp_path / "cache" / "unfinished").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"is damaged .* add --restart"):
        went_on()
    kept.write_bytes(whole)
    data.write_text(data.read_text().replace("Hi.", "Ho."))
    assert not went_on()


def test_what_cannot_be_trained_is_one_line(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", str(directory), "--methods", "prompt-lookup", "--device", "cpu"]) == 2
    assert "nothing to train" in capsys.readouterr().err


def test_two_drafters_of_one_file_are_refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = "s3d:k=2,s3d:mode=shared,s3d:k=4"
    assert main(["train", "--model", str(directory), "--methods", methods, "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "s3d:k=2 and s3d:k=4 would both be written to s3d.safetensors: train them one by one" in line


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ("--length 4", "--length 4 has no room for a dialogue: give 16 or more"),
        ("--out FILE", "cannot use"),
        ("--out FILE/x", "cannot use"),
        ("--out CLOSED", "closed: give another --out"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_model_is_loaded(
    options: str,
    hint: str,
    directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "closed")
    monkeypatch.setattr(weights, "load", None)
    (tmp_path / "file").write_text("mine")
    given = options.replace("FILE", str(tmp_path / "file")).replace("CLOSED", str(tmp_path / "closed")).split()
    assert main(["train", "--model", str(directory), "--methods", "medusa", "--device", "cpu", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert hint in line


@pytest.mark.parametrize("keep", ["3+6", "3+9", "0+0", "-1+2"])
def test_layers_that_the_model_lacks_are_refused_before_text_is_written(
    keep: str, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "make", None)
    capsys.readouterr()
    assert main(["train", "--model", str(directory), "--methods", f"s3d:keep={keep}", "--device", "cpu"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"s3d:keep={keep}: the target has 4 layers, so {keep} of them cannot draft: keep at least 1" in line


def test_a_model_that_cannot_be_trained_on_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny_chat.save(tmp_path / "other", architecture="gpt2")
    reasons = {"shape:tiny": "random weights and no tokenizer", str(other): "architecture 'gpt2' is not supported"}
    for model, reason in reasons.items():
        arguments = [
            "train",
            "--model",
            model,
            "--methods",
            "medusa",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "out"),
        ]
        assert main(arguments) == 2
        assert reason in capsys.readouterr().err


def test_tiny_models_of_other_architectures_train_too() -> None:
    model = tiny("gemma3").requires_grad_(False)
    trunk = Trunk(model)
    ids = torch.randint(3, 128, (12, 32), generator=torch.Generator().manual_seed(0))
    text = corpus.Corpus(ids, torch.ones_like(ids, dtype=torch.bool), 1.0, "cpu")
    spec = method.parse_one("s3d:keep=1+2:k=2:rank=4")
    made = method.find("s3d").trainee(trunk, method.options_of(spec), None, ids[0])
    assert made is not None
    room = Classroom(trunk, text, {"s3d": made}, None, Recipe(4 * 32 * 4, batch=4, anchors=4))
    assert room.run()
