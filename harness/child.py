"""Child processes that report to their parent in JSON lines: what they say, and both ends of the pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from harness.results import Outcome, Roofline
from harness.weights import ModelSource


class Preparing(msgspec.Struct, frozen=True, tag=True):
    """Something that takes its time before the first cell; the fraction is None where it is not known."""

    step: str
    fraction: float | None = None


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """What workers need is there."""

    weights_sha256: str
    first_answers_sha256: str | None
    sources: dict[str, ModelSource]
    "where the weights of each `Cell.weights` are"
    warnings: tuple[str, ...] = ()
    roofline: Roofline | None = None


class Warned(msgspec.Struct, frozen=True, tag=True):
    """The run goes on, but its figures may mislead."""

    warning: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The user can put this right."""

    message: str


class Started(msgspec.Struct, frozen=True, tag=True):
    """A cell's turn in a round."""

    label: str
    bits: str
    round: int
    order: int
    trials: int
    "how many are left to do in it"


class Left(msgspec.Struct, frozen=True, tag=True):
    """How many trials this run still has to make."""

    trials: int


class Decoded(msgspec.Struct, frozen=True, tag=True):
    """One more trial is in the file, or several that failed together."""

    outcome: Outcome
    trials: int = 1
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    reason: str | None = None


Event = Preparing | Prepared | Warned | Refused | Left | Started | Decoded
Emit = Callable[[Event], None]
WATCHED = "HARNESS_WATCHED"
"where a child finds the end of a pipe that its parent holds"


def to_parent() -> Emit:
    """In the child: take stdout for events; whatever else is printed goes to stderr, which is the log.

    From now on this process, and what it started, ends with its parent, however that ends.
    """
    watched = os.environ.pop(WATCHED, None)
    if watched is not None:
        threading.Thread(target=_end_with_parent, args=(int(watched),), daemon=True).start()
    lines = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        lines.write(msgspec.json.encode(event) + b"\n")

    return emit


def _end_with_parent(watched: int) -> None:
    """Nobody writes to this pipe: what can be read of it is its end, when the parent is gone."""
    os.read(watched, 1)
    os.killpg(0, signal.SIGKILL)  # the group that `run` gave us


def run(module: str, arguments: Sequence[Path], log: Path, on_event: Emit, environment: Mapping[str, str]) -> int:
    """In the parent: run `python -m module arguments` to its end; its exit status, negative for a signal.

    `environment` is added to ours. A child does not see Ctrl-C, which reaches us, and is stopped when we leave.
    """
    watched, held = os.pipe()
    with log.open("wb") as stderr, os.fdopen(held, "wb"):
        with os.fdopen(watched, "rb"):
            process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | environment | {WATCHED: str(watched)},
                start_new_session=True,
                pass_fds=[watched],
            )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                on_event(msgspec.json.decode(line, type=Event))
            return process.wait()
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started: pip, compilers
                process.wait()
            process.stdout.close()
