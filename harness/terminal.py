"""What a person sees at the terminal: the plan, live progress on stderr, the result, lists and checks."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from harness import child
from harness.results import PRELIMINARY

if TYPE_CHECKING:
    from harness.forwards import Forwards
    from harness.host import Check
    from harness.method import Method
    from harness.plan import Plan
    from harness.results import Roofline
    from harness.train.loop import Report


def show_plan(plan: Plan) -> None:
    """The cells, in columns only what tells them apart, and what each of them will do."""
    cells = [one.cell for one in plan.cells]
    told = {name: [str(getattr(cell, name)) for cell in cells] for name in ("bits", "dtype", "weights", "runtime")}
    told["context"] = ["as the prompts" if cell.context is None else str(cell.context) for cell in cells]
    columns = {name: values for name, values in told.items() if len(set(values)) > 1}
    if any(one.unsupported for one in plan.cells):
        columns["note"] = ["unsupported" if one.unsupported else "" for one in plan.cells]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("method", *columns):
        table.add_column(header, overflow="fold")
    for row in zip((cell.label for cell in cells), *columns.values(), strict=True):
        table.add_row(*map(Text, row))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{plan.model.name} on {plan.device}{', SYNTHETIC' * plan.synthetic}", style="bold")
    console.print(table, soft_wrap=False)
    for label, reason in dict.fromkeys((one.cell.label, one.unsupported) for one in plan.cells if one.unsupported):
        console.print(f"{label}: {reason}")
    alike = [f"{name} {values[0]}" for name, values in told.items() if name not in columns]
    how = "greedy" if plan.temperature == 0 else f"temperature {plan.temperature:g}, top-p {plan.top_p:g}"
    prompts, turns = len(plan.prompt_set.prompts), len(list(plan.turns()))
    console.print(f"every cell: {', '.join([*alike, how, f'up to {plan.max_new_tokens} new tokens'])}")
    console.print(
        f"prompts: {prompts} ({plan.prompt_set.name}), turns: {turns}; rounds: {rounds(plan)}; seed: {plan.seed}; "
        f"trials: {len(cells) * turns * plan.fewest_rounds}{'' if plan.precision is None else ' or more'}"
    )
    if plan.preliminary:
        console.print(PRELIMINARY)


def rounds(plan: Plan) -> str:
    if plan.precision is None or plan.time_budget_seconds is None:
        return str(plan.rounds)
    return (
        f"{plan.fewest_rounds} or more, until every speed-up's interval is narrower than {plan.precision:.2%} of it, "
        f"or {duration(plan.time_budget_seconds)} are over"
    )


# --- progress --------------------------------------------------------------------------------------------------------


class Tally:
    """What has happened so far, in words."""

    def __init__(self, plan: Plan, now: float) -> None:
        self.rounds = str(plan.rounds) if plan.precision is None else "auto"
        self.cells = len(plan.cells)
        self.total = self.done = 0
        self.began = self.began_measuring = now
        self._start(child.Started("", "", 0, 0, 0))

    def _start(self, cell: child.Started) -> None:
        self.cell, self.cell_done, self.decode_tokens, self.decode_seconds = cell, 0, 0, 0.0

    def take(self, event: child.Event, now: float) -> str | None:
        """A line worth showing, or None."""
        match event:
            case child.Preparing(step, fraction):
                return step if fraction is None else f"{step}: {fraction:.0%}"
            case child.Left(trials):
                self.total = self.done + trials
                self.began_measuring = self.began_measuring if self.done else now
            case child.Started():
                self._start(event)
                return f"{self._where()}: loading"
            case child.Decoded():
                return self._decoded(event)
            case child.Warned(warning):
                return f"warning: {warning}"
        return None

    def _decoded(self, event: child.Decoded) -> str:
        self.cell_done += event.trials
        self.done += event.trials
        if event.outcome != "ok":
            return f"{self._where()}: {event.outcome}: {event.reason}"
        self.decode_tokens += event.decode_tokens
        self.decode_seconds += event.decode_seconds
        speed = f", {self.decode_tokens / self.decode_seconds:.1f} tok/s" if self.decode_seconds > 0 else ""
        return f"{self._where()}: prompt {self.cell_done}/{self.cell.trials}{speed}"

    def _where(self) -> str:
        cell = self.cell
        return f"round {cell.round + 1}/{self.rounds}, cell {cell.order + 1}/{self.cells} {cell.label} in {cell.bits}"

    def left(self, now: float) -> str:
        """Expected time, from the mean of the trials so far; nothing before the first."""
        if not self.done:
            return ""
        return f"about {duration((now - self.began_measuring) / self.done * (self.total - self.done))} left"


@contextmanager
def progress(plan: Plan) -> Iterator[child.Emit]:
    """A live line on a terminal, plain lines elsewhere; both on stderr."""
    console, tally = Console(stderr=True), Tally(plan, time.monotonic())

    def say(event: child.Event) -> None:
        now = time.monotonic()
        if text := tally.take(event, now):
            left = f", {left}" if (left := tally.left(now)) else ""
            print(f"[{duration(now - tally.began)}{left}] {text}", file=sys.stderr, flush=True)

    if not console.is_terminal:
        yield say
        return
    words = (TextColumn("{task.description}", markup=False), TextColumn("{task.fields[left]}"))
    with Progress(BarColumn(20), TimeElapsedColumn(), *words, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, left="")

        def show(event: child.Event) -> None:
            now = time.monotonic()
            text = tally.take(event, now)
            if text and isinstance(event, child.Warned):
                bar.console.print(Text(text, "yellow"))
            elif text:
                total = tally.total or None
                bar.update(task, description=text, completed=tally.done, total=total, left=tally.left(now))

        yield show


class Telling:
    """`harness.train`'s narrator: one line at a time, at most one a second unless the step is new."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()
        self.last = ""

    def stage(self, step: str, fraction: float | None) -> None:
        now = time.monotonic()
        head = step.split("(")[0]
        if head == self.last and now - self.said < 5.0:
            return
        self.last, self.said = head, now
        self._say(step if fraction is None else f"{step}: {fraction:.0%}")

    def report(self, report: Report) -> None:
        now = time.monotonic()
        if report.step != report.steps and now - self.said < 5.0:
            return
        self.said = now
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in report.losses.items())
        taus = ", ".join(f"{name} {tau:.2f}" for name, tau in report.taus.items())
        held_out = f"; held-out tau: {taus}" if taus else ""
        self._say(f"step {report.step} of {report.steps}; loss: {losses}{held_out}")

    def _say(self, text: str) -> None:
        print(f"[{duration(time.monotonic() - self.began)}] {text}", file=sys.stderr, flush=True)


def show_drafters(paths: Sequence[Path]) -> None:
    """What training has written, or how to go on."""
    for path in paths:
        print(path)
    if not paths:
        print("the time is up before the end: the same command goes on where this one stopped", file=sys.stderr)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


# --- lists and checks ------------------------------------------------------------------------------------------------


def show_list(prompt_sets: Mapping[str, str]) -> None:
    """What `run` can be asked for; `prompt_sets` by name, with a description each."""
    from harness import drafter, method, shapes, smollm2, trunk

    console = Console(highlight=False, soft_wrap=True)
    console.print("Methods, with options and their defaults", style="bold")
    console.print(Text("  as in `python -m harness run --methods ar,eagle:depth=4,layerskip:skip=10+12`"), style="dim")
    for name in method.installed():
        kind = method.find(name)
        source = f" [{kind.source}]" if kind.source else ""
        console.print(Text(f"  {name}: {kind.summary}{source}"))
        for option, (default, text) in options(kind).items():
            console.print(Text(f"      {option}={default}").append(f"  {text}", "dim"))
    console.print("\nPrompt sets, for `--prompts`", style="bold")
    for name, text in prompt_sets.items():
        console.print(Text(f"  {name}: {text}"))
    console.print("  or the path of a JSONL file, or hf:org/name for a data set on the Hugging Face hub")
    console.print("\nModels, for `--model`", style="bold")
    trained = [name for name in method.installed() if drafter.find(name, None, smollm2.LABEL) is not None]
    console.print(Text(f"  {smollm2.LABEL}: the default; has drafters for {', '.join(trained) or 'nothing'}"))
    names = ", ".join(f"{shapes.PREFIX}{name}" for name in shapes.SHAPES)
    console.print(Text(f"  without weights, SYNTHETIC: {names}, or {shapes.PREFIX}path/to/config.json"))
    console.print(Text(f"  or a hub id or a directory; architectures: {', '.join(sorted(trunk.ARCHITECTURES))}"))


def options(kind: type[Method]) -> dict[str, tuple[str, str]]:
    """Of a method: option -> (default as one would write it, the text under the field in its source)."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind.Options))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            texts[field.target.id] = ast.literal_eval(after.value)
    return {
        field.name: (_written(field.default), texts.get(field.name, ""))
        for field in msgspec.structs.fields(kind.Options)
    }


def _written(value: object) -> str:
    if value is None:
        return "auto"
    return "+".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def show_checks(checks: Sequence[Check]) -> None:
    """A line a check, and under it what to do."""
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = ("ok     ", "green") if check.ok else ("missing", "red") if check.needed else ("-      ", "yellow")
        console.print(Text.assemble(mark, f"  {check.name:{width}}  {check.found}"))
        if not check.ok and check.advice:
            console.print(Text(f"{'':9}{'':{width}}  {check.advice}", "dim"))
    if wanting := [check.name for check in checks if check.needed and not check.ok]:
        console.print(f"\nNot ready: see {', '.join(wanting)}.", style="red")
    else:
        console.print("\nReady: `python -m harness run` measures the default model here.", style="green")


def show_bench(device: Roofline, forwards: Forwards) -> None:
    """What the device does at best, and what share of that the target's forwards reach."""
    from harness.forwards import BATCH

    console = Console(highlight=False, soft_wrap=True)
    speeds = [f"copy {device.copy_bytes_per_second / 1e9:,.1f} GB/s", f"read {device.read_bytes_per_second / 1e9:,.1f}"]
    speeds += [f"{name} matrices {flops / 1e12:,.2f} TFLOP/s" for name, flops in device.matrix_flops.items()]
    console.print(Text(f"{device.device_name}: {', '.join(speeds)}", "bold"))
    console.print(Text(f"  buffers of {device.buffer_bytes / 2**20:.0f} MiB, measured {device.measured}", "dim"))
    console.print(Text(f"{forwards.model} in {forwards.bits}, {forwards.dtype}, {forwards.runtime}", "bold"))
    read = forwards.weights_read + forwards.context_read
    console.print(
        Text(
            f"  one token after {forwards.context} reads {read / 2**30:.3f} GiB: "
            f"{forwards.floor_seconds(1, device) * 1000:.3f} ms at best"
        )
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("", "forward", "ms", "relative", "of the floor", "tok/s"):
        table.add_column(header, justify="left" if header == "forward" else "right", no_wrap=True)
    for kind, times in forwards.times.items():
        for size, seconds in times.items():
            relative = f"{seconds / times[1]:.2f}" if 1 in times else ""
            floor = forwards.floor_seconds(size if kind == BATCH else 1, device)
            table.add_row(
                *(str(size), kind, f"{seconds * 1000:.3f}", relative, f"{floor / seconds:.0%}"),
                f"{size / seconds:,.0f}",
            )
    console.print(table, soft_wrap=False)
    for line in forwards.left_out:
        console.print(Text(f"left out: {line}", "yellow"))
    if any("time" in line for line in forwards.left_out):
        console.print("The same command goes on with what was left out.")
    if forwards.runtime == "compile":
        console.print("Batches run uncompiled layers: compiled ones take one sequence.")
