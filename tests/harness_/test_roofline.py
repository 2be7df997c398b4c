"""The roofline: bytes counted by hand, figures kept and found again, forwards of every size on a tiny model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench
import msgspec
import pytest
import torch
from tiny import HEAD_DIM, HIDDEN, KV_HEADS, LAYERS, VOCAB, WINDOW, tiny

from harness import child, cli, forwards, prepare, roofline, runtime, weights
from harness.results import Roofline
from harness.target import Target
from harness.weights import weight_bytes

CPU = torch.device("cpu")
SLOT = 2 * KV_HEADS * HEAD_DIM * 4
"bytes of keys and values, a token and layer"
FOUND = Roofline(
    device_name="toy", torch="2", measured="then", buffer_bytes=1, copy_bytes_per_second=2.0, read_bytes_per_second=4.0
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own, and buffers that show nothing of the device but that something is timed."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roofline, "BUFFER_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(roofline, "MATRIX_SIDE", {"cpu": 16})
    monkeypatch.setattr(forwards, "SECONDS_A_POINT", 0.0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_pass_reads_every_weight_but_the_rows_of_an_untied_embedding(tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    target, size = Target(model, capacity=100), weight_bytes(model)
    unread = 0 if tied else VOCAB * HIDDEN * 4
    assert roofline.pass_bytes(target, size, 0) == size - unread
    assert roofline.pass_bytes(target, size, 50) == size - unread + 50 * LAYERS * SLOT


def test_a_layer_with_a_window_reads_no_more_than_that() -> None:
    target = Target(tiny("gemma2"), capacity=100)
    assert roofline.context_read(target, 50) == (LAYERS // 2) * SLOT * (50 + WINDOW)


def test_bandwidths_are_measured_and_kept_by_device() -> None:
    assert roofline.known(CPU) is None
    found = roofline.keep(CPU, roofline.measure(CPU, matrices=True))
    assert roofline.known(CPU) == found
    assert found.buffer_bytes == 2**20
    assert min(found.copy_bytes_per_second, found.read_bytes_per_second, *found.matrix_flops.values()) > 0
    assert "float32" in found.matrix_flops
    assert roofline.measure(CPU).matrix_flops == {}


def test_what_another_version_wrote_is_measured_again() -> None:
    path = roofline.path_of(*roofline.identity(CPU))
    path.parent.mkdir(parents=True)
    path.write_text('{"speed": 3}')
    assert roofline.known(CPU) is None


def test_bytes_are_those_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy reads and writes its buffer; of two ways to read, the faster counts."""
    times = iter((0.5, 0.25, 0.125))
    monkeypatch.setattr(roofline, "median_seconds", lambda work, device, together: (work(), next(times))[1])
    found = roofline.measure(CPU)
    assert found.copy_bytes_per_second == 2 * 2**20 / 0.5
    assert found.read_bytes_per_second == 2**20 / 0.125


def test_reading_buffers_touches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed gives the sum of the whole buffer, both ways."""
    said: list[Any] = []
    monkeypatch.setattr(roofline, "median_seconds", lambda work, device, together: (said.append(work()), 1.0)[1])
    roofline.measure(CPU)
    _, total, rows = said
    assert float(total) == float(rows.sum()) == 2**20 / 4


def test_a_run_knows_what_was_measured_before_and_measures_only_if_asked() -> None:
    said: list[child.Event] = []
    plans: list[Any] = [SimpleNamespace(device="cpu", roofline=asked) for asked in (False, True, False)]
    first, second, third = (prepare.device_at_best(plan, said.append) for plan in plans)
    assert first is None
    assert second is not None
    assert third == second
    assert said == [child.Preparing("measuring the device's bandwidth")]
    assert forwards.bench("shape:tiny", "32", "eager", fresh=False, tell=lambda step: None)[0].matrix_flops


def test_every_forward_is_measured_once() -> None:
    said: list[str] = []
    first, known = forwards.bench("shape:tiny", "32", "eager", fresh=False, tell=said.append)
    assert list(known.score_seconds) == [1, 2, 4, 8, 16, 32, 64]
    assert list(known.batch_seconds) == [1, 4, 8, 32]
    assert known.context == forwards.CONTEXT
    assert known.left_out == ()
    said.clear()
    again = forwards.bench("shape:tiny", "32", "eager", fresh=False, tell=said.append)
    assert again[0] == first
    assert again[1].times == known.times
    assert not any("measuring" in line for line in said)
    assert forwards.bench("shape:tiny", "32", "eager", fresh=True, tell=said.append)[1].times != known.times


def test_a_capturing_runtime_holds_scores_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = bench.Rehearsal()
    monkeypatch.setattr(runtime, "make", lambda name, device: rehearsal)
    loaded = weights.load(weights.resolve("shape:tiny"), weights.Bits(32), device="cpu")
    found = forwards.measure(loaded, "graph", None, lambda step: None)
    assert len(found.score_seconds) + len(found.batch_seconds) == len(forwards.ORDER) == rehearsal.captures


def test_what_time_did_not_allow_is_measured_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = weights.load(weights.resolve("shape:tiny"), weights.Bits(32), device="cpu")
    monkeypatch.setattr(forwards, "BUDGET_SECONDS", -1.0)
    before = forwards.measure(loaded, "eager", None, lambda step: None)
    assert before.times == {forwards.SCORE: {}, forwards.BATCH: {}}
    assert len(before.left_out) == len(forwards.ORDER)
    monkeypatch.setattr(forwards, "BUDGET_SECONDS", 100.0)
    before = msgspec.structs.replace(before, score_seconds={8: 7.0})
    after = forwards.measure(loaded, "eager", before, lambda step: None)
    assert after.score_seconds[8] == 7.0
    assert len(after.score_seconds) + len(after.batch_seconds) == len(forwards.ORDER)


def test_memory_that_runs_out_is_said_and_nothing_after_it_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("80 GiB")

    monkeypatch.setattr(forwards, "_batch", full)
    loaded = weights.load(weights.resolve("shape:tiny"), weights.Bits(32), device="cpu")
    found = forwards.measure(loaded, "eager", None, lambda step: None)
    assert list(found.score_seconds) == [1, 8]
    assert found.batch_seconds == {}
    assert found.left_out == ("1 sequences with a token each and what comes after: out of memory",)


def test_a_batch_scores_every_sequence() -> None:
    target = Target(tiny("llama"), capacity=40)
    for size in (1, 3):
        with torch.inference_mode():
            logits_B1V: Any = forwards._batch(target, 8, size)()
        assert logits_B1V.shape == (size, 1, VOCAB)
        assert torch.isfinite(logits_B1V).all()


def test_a_short_model_has_a_short_context() -> None:
    assert forwards.longest(tiny("llama", max_position_embeddings=128).config) == 128


def test_the_floor_of_a_batch_reads_the_weights_once() -> None:
    known = forwards.Forwards(
        model="toy", weights_sha256="", bits="32", dtype="float32", runtime="eager", context=1, weights_read=100,
        context_read=10, score_seconds={}, batch_seconds={}, measured="then",
    )  # fmt: skip
    assert [known.floor_seconds(size, FOUND) for size in (1, 4)] == [110 / 4, 140 / 4]


def test_doctor_shows_the_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--bench", "--model", "shape:tiny", "--bits", "32"]) == 0
    shown = capsys.readouterr().out
    for text in ("GB/s", "TFLOP/s", "shape:tiny in 32", "64 tokens of one sequence", "32 sequences", "of the floor"):
        assert text in shown.replace("  ", " ")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--bits", "4"), "need --bench"),
        (("--bench", "--runtime", "fast"), "no runtime 'fast'"),
        (("--bench", "--runtime", "graph", "--model", "shape:tiny"), "--runtime compile"),
        (("--bench", "--bits", "3"), "unknown precision '3'"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert hint in line
