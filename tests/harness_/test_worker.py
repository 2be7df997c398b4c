"""One cell on a tiny model, in this process: what a row says, and that it adds up."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench
import msgspec
import pytest
import tiny_chat
import torch
from tiny import tiny

import prompts
from harness import child, dialogue, drafter, host, meters, prepare, runner, weights, worker
from harness.errors import UserError
from harness.memory import attribute
from harness.plan import Job, Merge, Plan, Turn, plan, read_request
from harness.results import Trial, append_trial, read_trials
from harness.runtime import CaptureError
from harness.weights import Bits, ModelSource

NEW_TOKENS = 24


class Ready(msgspec.Struct):
    """A prepared run."""

    directory: Path
    plan: Plan
    prepared: child.Prepared

    def job(self, label: str, round: int = 0) -> Job:
        index = next(i for i, one in enumerate(self.plan.cells) if one.cell.label == label)
        return Job(
            run="toy",
            plan=str(self.directory / "plan.json"),
            trials=str(self.directory / f"{index}.jsonl"),
            first_answers=str(self.directory / "first_answers.json"),
            source=self.prepared.sources[self.plan.cells[index].cell.weights],
            cell=index,
            round=round,
            order=0,
        )


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ready]:
    directory = tmp_path_factory.mktemp("worker")
    model = tiny_chat.save(directory / "toy")
    made = bench.trainee("s3d", weights.load(weights.resolve(str(model)), Bits(32), device="cpu").model, mode="shared")
    bench.write(directory / "shared.safetensors", made)
    request = read_request(
        {
            "methods": f"ar,prompt-lookup,s3d:mode=shared:drafter={directory / 'shared.safetensors'}",
            "bits": 32,
            "max_new_tokens": NEW_TOKENS,
        }
    )
    prompt_set = prompts.load(str(tiny_chat.prompts(directory / "prompts.jsonl")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(directory / "cache"))
        planned = plan(request, source=weights.resolve(str(model)), device="cpu", prompt_set=prompt_set)
        (directory / "plan.json").write_bytes(msgspec.json.encode(planned))
        events: list[child.Event] = []
        prepare.prepare(directory, events.append)
        assert isinstance(events[-1], child.Prepared)
        yield Ready(directory, planned, events[-1])


@pytest.fixture(scope="module")
def rows(ready: Ready) -> dict[str, list[Trial]]:
    found = {}
    for one in ready.plan.cells:
        job = ready.job(one.cell.label)
        worker.work(job, ready.plan, lambda event: None)
        found[one.cell.label.partition(":drafter")[0]] = [row[0] for row in read_trials(Path(job.trials)) if row]
    return found


def test_every_turn_is_measured(rows: dict[str, list[Trial]]) -> None:
    turns = [("one", 0), ("two", 0), ("two", 1), ("three", 0)]
    for label, trials in rows.items():
        assert [(t.prompt_id, t.turn) for t in trials] == turns, label
        assert {(t.outcome, t.reason) for t in trials} == {("ok", None)}, label


def test_a_process_warms_up_until_its_steps_get_no_faster(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever faster steps are given up on after WARM_UP_PASSES, and the rows say so."""
    took = iter((1.0, 0.5, 0.49, 0.48))
    reading = meters.measure([1, 2], meters.Gauges())[1]

    def measure(steps: object, gauges: object) -> object:
        return [], dataclasses.replace(reading, round_seconds=[next(took)])

    bench_ = worker.set_up(ready.job("ar"), ready.plan)
    assert bench_.passes <= worker.WARM_UP_PASSES
    monkeypatch.setattr(meters, "measure", measure)
    bench_.passes, bench_.settled = 0, False
    bench_.warm_up()
    assert (bench_.passes, bench_.settled) == (3, True)
    took = iter(2.0**-n for n in range(20))
    bench_.passes, bench_.settled = 0, False
    bench_.warm_up()
    assert (bench_.passes, bench_.settled) == (worker.WARM_UP_PASSES, False)


def test_a_row_adds_up(rows: dict[str, list[Trial]]) -> None:
    for trial in (trial for trials in rows.values() for trial in trials):
        assert trial.new_tokens is not None
        assert trial.committed is not None
        assert trial.round_seconds is not None
        assert trial.token_texts is not None
        assert sum(trial.committed) == len(trial.new_tokens) - 1
        assert sum(trial.round_seconds) == pytest.approx(trial.decode_seconds)
        assert len(trial.round_seconds) == len(trial.drafted or ()) == len(trial.accepted or ()) == trial.host_syncs
        assert "".join(trial.token_texts) == trial.text
        assert len(trial.token_texts) == len(trial.new_tokens) <= NEW_TOKENS
        assert set(trial.phase_seconds or ()) == {"draft", "verify", "accept", "commit", "host"}
        assert trial.memory is not None
        assert 0 < (trial.pass_bytes or 0) < (trial.memory.weights_bytes or 0) + (trial.memory.cache_bytes or 0)
        assert trial.memory.peak_rss_bytes is not None
        assert trial.memory.peak_allocated_bytes is None
        told = attribute(trial.memory)
        assert told is not None
        assert told.adds_up
        assert told.parts["weights"] > 0 < told.parts["program"]
        assert (trial.device_before, trial.device_after) == (None, None)
        assert trial.energy_joules is None


def test_what_was_drafted_is_accepted_or_told_as_rejected(rows: dict[str, list[Trial]]) -> None:
    told = 0
    for trial in (trial for trials in rows.values() for trial in trials):
        counts = zip(trial.rejected or (), trial.drafted or (), trial.accepted or (), strict=True)
        for rejected, drafted, accepted in list(counts)[:-1]:
            assert len(rejected) == drafted - accepted
            told += len(rejected)
        assert all(not passes for passes in trial.rejected or ()) or trial.cell.method != "ar"
    assert told > 0


def test_the_greedy_text_does_not_depend_on_the_method(rows: dict[str, list[Trial]]) -> None:
    def texts(label: str) -> list[list[int] | None]:
        return [trial.new_tokens for trial in rows[label]]

    assert texts("prompt-lookup") == texts("ar")
    assert texts("s3d:mode=shared") == texts("ar:weights=s3d-shared")
    assert texts("s3d:mode=shared") != texts("ar")


def test_a_later_turn_follows_the_same_first_answer_everywhere(ready: Ready, rows: dict[str, list[Trial]]) -> None:
    answers = msgspec.json.decode((ready.directory / "first_answers.json").read_bytes())
    assert list(answers) == ["two"]
    assert answers["two"] == [rows["ar"][1].text]
    assert len({trials[2].prompt_tokens for trials in rows.values()}) == 1


def test_what_is_in_the_file_is_not_measured_again(ready: Ready) -> None:
    job = msgspec.structs.replace(ready.job("ar"), trials=str(ready.directory / "resumed.jsonl"), round=1)
    first, second, *_ = ready.plan.turns()
    append_trial(Path(job.trials), job.row(ready.plan, first, "ok", text="kept"))
    append_trial(Path(job.trials), job.row(ready.plan, second, "killed", reason="killed by SIGKILL"))
    events: list[child.Event] = []
    worker.work(job, ready.plan, events.append)
    trials = [row[0] for row in read_trials(Path(job.trials)) if row]
    assert len(events) == 3
    assert [t.prompt_id for t in trials] == ["one", "two", "two", "two", "three"]
    assert [t.text for t in trials if t.prompt_id == "one"] == ["kept"]
    assert all(t.token_texts is None for t in trials), "pieces are stored in round 0 only"


@pytest.mark.parametrize("broken", [False, True])
def test_after_a_capture_that_failed_nothing_of_the_cell_counts(
    broken: bool, ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = msgspec.structs.replace(ready.job("ar"), trials=str(ready.directory / f"broken-{broken}.jsonl"))
    own, turns = worker.Bench.trial, list(ready.plan.turns())

    def trial(self: worker.Bench, turn: Turn) -> dict[str, Any]:
        if turn != turns[1]:
            return own(self, turn)
        try:
            raise MemoryError("no room to capture")
        except MemoryError as error:
            if broken:
                raise CaptureError("no room") from error
            raise

    monkeypatch.setattr(worker.Bench, "trial", trial)
    with pytest.raises(CaptureError) if broken else nullcontext():
        worker.work(job, ready.plan, lambda event: None)
    rows = [row[0] for row in read_trials(Path(job.trials)) if row]
    assert [row.outcome for row in rows] == ["ok", "oom", *(["oom", "oom"] if broken else ["ok", "ok"])]
    assert not broken or "a capture had failed before in this process" in (rows[-1].reason or "")


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are forgotten by /proc")
def test_a_peak_of_the_resident_set_can_be_forgotten() -> None:
    held = bytearray(os.urandom(1) * (200 << 20))
    before = meters.peak_rss_bytes()
    del held
    meters.forget_peak_rss()
    assert meters.peak_rss_bytes() < before - (150 << 20)


def test_sampling_repeats_for_a_seed_and_differs_between_prompts(ready: Ready) -> None:
    hot = msgspec.structs.replace(ready.plan, temperature=1.0)
    job = ready.job("prompt-lookup")
    made = worker.set_up(job, hot)
    one, two, _, three = hot.turns()
    first = made.trial(one)["new_tokens"]
    made.trial(three)
    assert made.trial(one)["new_tokens"] == first
    assert len({worker.seed_of(0, turn) for turn in (one, two, three)}) == 3


def test_a_merged_target_is_the_base_plus_the_deltas(ready: Ready) -> None:
    from methods.s3d import S3D

    base = weights.load(ready.plan.model, Bits(32), device="cpu").model.state_dict()
    merged = weights.load(ready.prepared.sources["s3d-shared"], Bits(32), device="cpu").model.state_dict()
    deltas = S3D.deltas(ready.directory / "shared.safetensors", 4)
    assert deltas
    for name, tensor in base.items():
        expected = tensor + deltas.get(name.removeprefix("model."), torch.zeros(()))
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mode", "changes", "said"),
    [
        ("gated", {}, "was trained for mode=gated"),
        ("shared", {"num_hidden_layers": 6}, "trained for a model of another depth than this one's 4 layers"),
        ("shared", {"intermediate_size": 96}, "trained for another model than toy, which has no layers"),
        ("shared", {"num_hidden_layers": 3}, "trained for a model of another depth than this one's 4 layers"),
    ],
)
def test_a_drafter_of_another_mode_or_model_is_not_merged(
    mode: str, changes: dict[str, int], said: str, ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    vocabulary = weights.load(ready.plan.model, Bits(32), device="cpu").model.config.vocab_size
    made = bench.trainee("s3d", tiny("llama", vocab_size=vocabulary, **changes), mode=mode, keep="1+2")
    merge = Merge("s3d", str(bench.write(tmp_path / "foreign.safetensors", made)))
    with pytest.raises(UserError, match=said):
        prepare.merged(ready.plan.model, "0" * 64, merge, lambda event: None)
    assert not list((tmp_path / "cache").glob("merged/*"))


def test_first_answers_are_made_once(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "first_answers", lambda *_: pytest.fail("made again"))
    events: list[child.Event] = []
    prepare.prepare(ready.directory, events.append)
    assert events[-1] == ready.prepared


def test_first_answers_are_made_again_for_another_template_tokenizer_or_end(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(plan: Plan, loaded: weights.LoadedModel, emit: child.Emit) -> prepare.Answers:
        times.append(1)
        return {}

    times: list[int] = []
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    monkeypatch.setattr(prepare, "first_answers", made)
    for change in (
        lambda tokenizer, model: None,
        lambda tokenizer, model: setattr(tokenizer, "chat_template", "{{ messages[0].content }}"),
        lambda tokenizer, model: tokenizer.add_tokens(["Count"]),
        lambda tokenizer, model: setattr(model.generation_config, "eos_token_id", [3, 4]),
    ):
        loaded = weights.load(ready.plan.model, Bits(32), device="cpu")
        change(loaded.tokenizer, loaded.model)
        before = len(times)
        for _ in range(2):
            prepare.cached_answers(ready.plan, loaded, lambda event: None)
        assert len(times) == before + 1


def test_a_run_that_measured_nothing_yet_may_change_its_plan(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: str, argument: Path, log: Path, on_event: child.Emit, environment: object) -> int:
        on_event(child.Refused("add --raw"))
        return 2

    monkeypatch.setattr(child, "run", refuse)
    for planned in (ready.plan, msgspec.structs.replace(ready.plan, raw=True)):
        with pytest.raises(UserError, match=r"^add --raw$"):
            runner.execute(planned, ready.directory / "refused", lambda event: None)
    (ready.directory / "refused" / "trials.jsonl").touch()
    with pytest.raises(UserError, match="raw was True, now False"):
        runner.execute(ready.plan, ready.directory / "refused", lambda event: None)


def test_a_run_does_not_go_on_with_another_drafter(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither file says how it was trained. A run that did not record its drafters goes on."""

    def refuse(module: str, argument: Path, log: Path, on_event: child.Emit, environment: object) -> int:
        on_event(child.Refused("prepared"))
        return 2

    monkeypatch.setattr(child, "run", refuse)
    path, run = tmp_path / "medusa.safetensors", tmp_path / "run"
    cells = (msgspec.structs.replace(ready.plan.cells[0], drafter=str(path)),)
    plan, said = msgspec.structs.replace(ready.plan, cells=cells), []
    for value, recorded in ((1.0, True), (1.0, True), (2.0, True), (2.0, False)):
        if len(said) != 1:
            drafter.write(path, {"a": torch.full((1,), value)}, {}, {})
        if not recorded:
            manifest = msgspec.json.decode((run / "manifest.json").read_bytes())
            del manifest["drafters"]
            (run / "manifest.json").write_bytes(msgspec.json.encode(manifest))
        with pytest.raises(UserError) as refused:
            runner.execute(plan, run, lambda event: None)
        said.append(str(refused.value))
        (run / "trials.jsonl").touch()
    assert said[0] == said[1] == said[3] == "prepared"
    assert f"the drafter of cell {cells[0].cell.id} was " in said[2]
    assert said[2].endswith("give another --out")


def test_a_drafter_of_other_weights_is_a_warning(ready: Ready, tmp_path: Path) -> None:
    path = tmp_path / "s3d.safetensors"
    drafter.write(path, {"a": torch.zeros(1)}, {}, {"model": "another", "weights_sha256": "0" * 64})
    cells = tuple(msgspec.structs.replace(one, drafter=str(path)) for one in ready.plan.cells[:1])
    foreign = msgspec.structs.replace(ready.plan, cells=cells)
    (warning,) = prepare.foreign_drafters(foreign, "1" * 64)
    assert "s3d.safetensors was trained for other weights (another)" in warning
    assert prepare.foreign_drafters(foreign, "0" * 64) == []


def test_a_text_longer_than_the_model_is_refused_before_anything_is_decoded(ready: Ready) -> None:
    loaded = prepare.load_precisely(ready.plan)
    endless = msgspec.structs.replace(ready.plan, max_new_tokens=10**6)
    with pytest.raises(UserError, match="lower --max-new-tokens"):
        prepare.refuse_what_does_not_fit(endless, loaded, {})


def test_a_card_too_small_for_16_bits_prepares_in_the_plans_own(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(source: ModelSource, bits: Bits, **_: Any) -> str:
        asked.append(bits.id)
        if bits.width > 8:
            raise torch.OutOfMemoryError
        return bits.id

    monkeypatch.setattr(weights, "load", load)
    cells = [
        msgspec.structs.replace(one, cell=msgspec.structs.replace(one.cell, bits=bits, device="cuda"))
        for one, bits in zip(ready.plan.cells, ("nf4", "int8:t6"), strict=False)
    ]
    plan = msgspec.structs.replace(ready.plan, cells=tuple(cells))
    assert prepare.load_precisely(plan) == "int8:t6"
    assert asked == ["16", "int8:t6"]


def test_a_context_is_filled_to_the_token_with_what_others_say(ready: Ready) -> None:
    loaded = weights.load(ready.plan.model, Bits(32), device="cpu")
    alone, filled = (worker.encoded(ready.plan, loaded, {"two": ["1 2 3 4"]}, context) for context in (None, 300))
    for key, ids in filled.items():
        assert len(ids) == 300
        assert ids[-len(alone[key]) :] == alone[key]
    said = loaded.tokenizer.decode(filled["one", 0])
    assert said.startswith("Count to four.\n\nName a bird")
    assert said.count("Hi.") == 1, "a prompt's own text does not stand before it, for lookup to find"
    with pytest.raises(UserError, match="larger --context"):
        worker.encoded(ready.plan, loaded, {"two": ["1 2 3 4"]}, 4)


def test_a_first_token_that_begins_every_text_stays_first(ready: Ready) -> None:
    tokenizer = weights.load(ready.plan.model, Bits(32), device="cpu").tokenizer
    tokenizer.bos_token = "<|start|>"
    begin = tokenizer.bos_token_id
    assert dialogue.padded(tokenizer, [begin, 9, 8], ["Hi."], 6)[0::5] == [begin, 8]
    assert dialogue.padded(tokenizer, [begin, 9, 8], ["Hi."], 6).count(begin) == 1
    messages = [begin, 9, 8, begin, 7]
    assert dialogue.padded(tokenizer, messages, ["Hi."], 9)[-5:] == messages, "it begins every message"


def test_on_a_cpu_a_cell_over_the_budget_is_a_row(ready: Ready) -> None:
    tight = msgspec.structs.replace(ready.plan, vram_budget_bytes=2**20)
    job = msgspec.structs.replace(ready.job("ar"), trials=str(ready.directory / "tight.jsonl"))
    worker.work(job, tight, lambda event: None)
    trials = [row[0] for row in read_trials(Path(job.trials)) if row]
    assert [trial.outcome for trial in trials] == ["oom"] * 4
    assert all(
        "over the budget" in (trial.reason or "") and "0.001 allowed" in (trial.reason or "") for trial in trials
    )
    assert all(trial.memory is None for trial in trials)


@pytest.mark.parametrize("everywhere", [False, True])
def test_on_an_accelerator_the_allocator_gets_the_budgets_share(
    everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch takes a device with an index, or the index alone, and nothing else: `cuda` has none."""
    shares: list[tuple[float, int]] = []

    def fraction(share: float, device: Any) -> None:
        shares.append((share, torch._utils._get_device_index(device)))

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fraction)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for budget in (8, 100):
        meters.cap(torch.device("cuda"), budget * 2**30, everywhere=everywhere)
    devices = (0, 1) if everywhere else (0,)
    assert shares == [(share, device) for share in (0.1, 1.0) for device in devices]


def test_half_a_line_is_not_continued(tmp_path: Path, ready: Ready) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'{"schema": 1, "ru')
    append_trial(path, ready.job("ar").row(ready.plan, next(ready.plan.turns()), "killed"))
    torn, whole = read_trials(path)
    assert torn is None
    assert whole is not None


@pytest.mark.parametrize("setting", host.SPIN_SETTINGS)
def test_the_users_own_openmp_settings_stay(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in host.SPIN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert host.worker_environment("cpu").keys() == {"GOMP_SPINCOUNT"}
    assert host.worker_environment("cuda") == {}
    monkeypatch.setenv(setting, "7")
    assert host.worker_environment("cpu") == {}


def test_a_chat_template_that_prints_the_date_gives_the_same_prompt_every_day(tmp_path: Path) -> None:
    model = tiny_chat.save(tmp_path / "dated")
    dated = "\n{%- set day = strftime_now(format='%A, %-d %B %Y, %F') %} {{ day }}. {{ messages[0].content }}"
    (model / "chat_template.jinja").write_text(dated)
    tokenizer = weights.load(ModelSource("dated", str(model), "local"), Bits(32), device="cpu").tokenizer
    ids = dialogue.encode(tokenizer, ["Hello."], [], system=None, raw=False)
    assert tokenizer.decode(ids) == " Friday, 26 July 2024, 2024-07-26. Hello."


def test_a_tokenizer_without_a_chat_template_asks_for_raw(tmp_path: Path) -> None:
    model = tiny_chat.save(tmp_path / "plain", chat=False)
    tokenizer = weights.load(ModelSource("plain", str(model), "local"), Bits(32), device="cpu").tokenizer
    with pytest.raises(UserError, match="--raw"):
        dialogue.encode(tokenizer, ["Hello."], [], system=None, raw=False)
    ids = dialogue.encode(tokenizer, ["Hello.", "More."], ["Hi!"], system=None, raw=True)
    assert tokenizer.decode(ids) == "Hello.\n\nHi!\n\nMore."


STRICT = (
    "{% for message in messages %}{% if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('Roles must\nalternate') }}{% endif %}{{ message['content'] }}<|end|>{% endfor %}"
)


def test_later_turns_are_prepared_for_a_template_whose_roles_alternate(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    model = tiny_chat.save(tmp_path / "strict")
    (model / "chat_template.jinja").write_text(STRICT)
    source = ModelSource("strict", str(model), "local")
    cells = tuple(one for one in ready.plan.cells if one.merge is None)
    strict = msgspec.structs.replace(ready.plan, model=source, cells=cells, max_new_tokens=4)
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(strict))
    events: list[child.Event] = []
    prepare.prepare(tmp_path, events.append)
    assert isinstance(events[-1], child.Prepared)
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(strict, system="Be brief.")))
    with pytest.raises(UserError, match=r"refuses the conversation \(Roles must alternate\): leave --system out"):
        prepare.prepare(tmp_path, events.append)


def test_pieces_of_a_text_join_to_it(ready: Ready) -> None:
    tokenizer = weights.load(ready.plan.model, Bits(32), device="cpu").tokenizer
    ids = tokenizer("naïve — ça va 🙂<|end|>", add_special_tokens=False).input_ids
    parts = dialogue.pieces(tokenizer, ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == "naïve — ça va 🙂"
    assert "\ufffd" not in "".join(parts)


def test_a_system_message_comes_first(ready: Ready) -> None:
    tokenizer = weights.load(ready.plan.model, Bits(32), device="cpu").tokenizer
    ids = dialogue.encode(tokenizer, ["Hi."], [], system="Be brief.", raw=False)
    assert tokenizer.decode(ids) == "<|system|>Be brief.<|end|><|user|>Hi.<|end|><|assistant|>"


def test_running_out_of_memory_is_told_from_a_bug() -> None:
    assert worker.diagnose(torch.OutOfMemoryError("CUDA out of memory. Tried 80 GiB\nmore")) == (
        "oom",
        "CUDA out of memory. Tried 80 GiB",
    )
    capped = (
        "CUDA out of memory. Tried to allocate 86.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 129.23 GiB "
        "is free. Including non-PyTorch memory, this process has 10.56 GiB memory in use. 10.00 GiB allowed; Of the"
    )
    assert worker.diagnose(torch.OutOfMemoryError(capped)) == (
        "oom",
        "CUDA out of memory. Tried to allocate 86.00 MiB. 10.00 GiB allowed.",
    )
    assert worker.diagnose(RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"))[0] == "oom"
    assert worker.diagnose(UserError("choose 3")) == ("unsupported", "choose 3")
    captured = torch.AcceleratorError("CUDA error: not while capturing\nSearch for `cudaError' in https://docs")
    assert worker.diagnose(captured) == ("error", "AcceleratorError: CUDA error: not while capturing (at )")
    try:
        drafter.tensors(Path("/nowhere.safetensors"))
    except Exception as error:
        outcome, reason = worker.diagnose(error)
    assert outcome == "error"
    assert "nowhere" in reason
    assert "drafter.py" in reason


def test_the_stopwatch_charges_each_round_to_its_own_yield(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 7.0])
    monkeypatch.setattr(meters, "perf_counter", lambda: next(clock))
    steps, reading = meters.measure(iter("abc"), meters.Gauges())
    assert steps == ["a", "b", "c"]
    assert reading.prefill_seconds == 1.0
    assert reading.round_seconds == [2.0, 4.0], "the last round ends when the device is idle"
    assert reading.decode_seconds == 6.0


def test_what_the_device_still_reads_of_the_prompt_is_no_part_of_the_first_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]

    class Waiting(meters.Gauges):
        def synchronize(self) -> None:
            now[0] += 10.0

    def rounds() -> Iterator[None]:
        for _ in range(3):
            now[0] += 1.0
            yield

    monkeypatch.setattr(meters, "perf_counter", lambda: now[0])
    reading = meters.measure(rounds(), Waiting())[1]
    assert reading.prefill_seconds == 11.0
    assert reading.round_seconds == [1.0, 11.0]
