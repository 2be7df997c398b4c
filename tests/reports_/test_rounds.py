"""Where a round's time goes, as people read it."""

from __future__ import annotations

import io

import factory
import msgspec
from factory import cell, trial
from rich.console import Console

from harness.metrics import summary
from harness.results import Roofline
from reports import rounds
from reports.tables import NOTHING, rich_table, times

BASE = {"draft": 0.001, "verify": 0.008, "host": 0.001}
OWN = {"draft": 0.004, "verify": 0.010, "accept": 0.002, "commit": 0.002, "host": 0.002}
DEVICE = Roofline(
    device_name="card", torch="2", measured="then", buffer_bytes=1, copy_bytes_per_second=1.0,
    read_bytes_per_second=1e6,
)  # fmt: skip
RUN = factory.run(
    trial(cell(), [1] * 10, 0.01, phase_seconds={name: 10 * seconds for name, seconds in BASE.items()}),
    trial(
        cell("s3d", label="s3d|x"), [3, 3], 0.02, phase_seconds={name: 2 * seconds for name, seconds in OWN.items()},
        device_name="card", pass_bytes=5000,
    ),
    trial(cell("silent"), prompt_id="p1"),
    roofline=DEVICE,
)  # fmt: skip


def shown(rows: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(rows)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_row_tells_its_phases_and_what_follows() -> None:
    own, base = rounds.table(summary(RUN))
    assert own["method"] == "s3d|x"
    assert (own["round ms"], own["draft"], own["verify"], own["accept"]) == ("20.00", "4.00", "10.00", "2.00")
    assert (own["τ"], own["steps"], own["measured speed-up"]) == ("3.00", "2.00", times(1.5))
    assert own["τ / steps (against measured)"] == f"{times(1.5)} (+0.0%)"
    assert own["bandwidth floor reached"] == "50%"
    assert (base["steps"], base["accept"], base["bandwidth floor reached"]) == ("1.00", NOTHING, NOTHING)


def test_what_does_not_add_up_is_marked() -> None:
    rows = summary(factory.run(trial(cell(), [1], 0.02, phase_seconds=BASE)))
    (base,) = rounds.table(rows)
    assert base["unattributed"] == "10.00 (more than 3 %)"


def test_markdown_keeps_labels_text() -> None:
    lines = rounds.markdown(summary(RUN)).splitlines()
    assert len(lines) == 4
    assert "s3d\\|x" in lines[2]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert rounds.markdown(summary(factory.run(trial(cell())))) == ""


def test_the_terminal_shows_it_under_the_result() -> None:
    text = shown(rich_table(summary(RUN)), 80)
    assert "where a round's ms go" in text
    assert times(1.5) in text.partition("where a round's ms go")[2]
    assert max(map(len, text.splitlines())) <= 80
    assert "where a round" not in shown(rich_table(summary(factory.run(trial(cell())))))


def test_synthetic_rows_say_so_here_too() -> None:
    made = factory.run(*(msgspec.structs.replace(row, synthetic=True) for row in RUN.rows))
    assert "SYNTHETIC: where a round's ms go" in shown(rich_table(summary(made)))
