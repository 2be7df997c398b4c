"""The command line, and the only module that knows methods and reports. Heavy imports wait until they are needed."""

from __future__ import annotations

import errno
import gc
import os
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from harness.errors import UserError
from harness.paths import may_be_file
from harness.signals import STOPS, handled

if TYPE_CHECKING:
    from harness.metrics import Row
    from harness.plan import Plan, Request
    from harness.results import Run

NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
WRONG_PATH = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)

app = App(
    name="python -m harness",
    help="Measure speculative decoders: speed, memory, acceptance, and whether the output is still the target's.",
    version=lambda: version("spec-harness"),
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit status. A user's mistake is one line on stderr, a bug keeps its traceback."""
    try:
        with _stoppable():
            result = app(arguments, exit_on_error=False, print_error=False)
    except (UserError, CycloptsError) as error:
        print("harness:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in NO_DISK and not (error.errno in WRONG_PATH and error.filename):
            raise
        where = f"cannot use {error.filename or 'the disk'} ({error.strerror})"
        print(f"harness: {where}: make room there, or name another place", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("harness:", stop if str(stop) else "interrupted", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


@contextmanager
def _stoppable() -> Iterator[None]:
    """A polite request to end, or a closed terminal, is what Ctrl-C is: children are stopped, and a run can go on."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with handled(STOPS, stop):
        yield


def _at_least(least: float, help: str) -> Parameter:
    return Parameter(help=help, validator=Number(gte=least))


def _flag(help: str) -> Parameter:
    return Parameter(help=help, negative="")


@app.command(group_parameters="Options")
def run(
    *,
    methods: Annotated[str | None, Parameter(help="Decoders with options: `s3d:k=4:keep=3+7,eagle`.")] = None,
    bits: Annotated[str | None, Parameter(help="Precisions: 32, 16, 8 (8:t0 sets LLM.int8's threshold), 4.")] = None,
    model: Annotated[
        str | None, Parameter(help="Hub id, directory, or shape:NAME (no weights); default: a small chat model.")
    ] = None,
    prompts: Annotated[str | None, Parameter(help="standard, quick, a JSONL file, or hf:org/name.")] = None,
    limit: Annotated[int | None, Parameter(help="So many prompts, spread over the categories.")] = None,
    max_new_tokens: Annotated[int | None, Parameter(help="Length of an answer; 32 on a CPU, else 128.")] = None,
    rounds: Annotated[str | None, Parameter(help="Fresh processes for each cell, or auto; 1 on a CPU, else 3.")] = None,
    precision: Annotated[float | None, Parameter(help="Auto rounds end at intervals this narrow; 0.02 is 2 %.")] = None,
    time_budget: Annotated[str | None, Parameter(help="And after this time: 600, 20m, 2h; default 1h.")] = None,
    temperature: Annotated[float | None, Parameter(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, Parameter(help="Sample from this much of the probability mass.")] = None,
    seed: Annotated[int | None, Parameter(help="Of sampling and of the order of cells.")] = None,
    out: Annotated[str | None, Parameter(help="Directory of the run; an unfinished one goes on.")] = None,
    config: Annotated[Path | None, Parameter(help="TOML file with these options; the command line wins.")] = None,
    context: Annotated[str | None, Parameter(help="Tokens prefilled before each answer: `1k,4k`.")] = None,
    vram_budget: Annotated[
        str | None, Parameter(help="Cap each cell's memory: 8GiB. What does not fit is a row that says so.")
    ] = None,
    acceptance: Annotated[
        str | None, Parameter(help="SYNTHETIC: draw it: 0.7,0.6 by depth, tau:2.5, published:NAME, from:RUN.")
    ] = None,
    roofline: Annotated[
        bool | None, _flag("Measure the device's bandwidth first, unless `doctor --bench` has: what share is reached?")
    ] = None,
    device: Annotated[str | None, Parameter(help="auto, cuda, xpu, mps or cpu.")] = None,
    device_map: Annotated[str | None, Parameter(help="auto or balanced: spread the target over all GPUs.")] = None,
    dtype: Annotated[str | None, Parameter(help="What activations are computed in, such as float16.")] = None,
    system: Annotated[str | None, Parameter(help="System message.")] = None,
    raw: Annotated[bool | None, _flag("Give prompts as they are, without the chat template.")] = None,
    runtime: Annotated[str | None, Parameter(help="eager, graph (CUDA graphs), compile, or several.")] = None,
    isolation: Annotated[
        str | None, Parameter(help="Fresh process for each round of a cell (round), each cell, or the run.")
    ] = None,
    dry_run: Annotated[bool, _flag("Print the plan and stop.")] = False,
    json: Annotated[bool, _flag("Print the result for a program.")] = False,
    trust_remote_code: Annotated[bool | None, _flag("Run code that comes with the model.")] = None,
) -> int:
    """Measure decoders and write a report."""
    asked = {name: value for name, value in locals().items() if name not in ("config", "dry_run", "json")}
    from harness import terminal
    from harness.plan import read_request

    from_file = {} if config is None else _toml(config)
    read_request(from_file, str(config))
    given = {name: value for name, value in asked.items() if value is not None}
    request = read_request(from_file | given | _whole(given, "rounds"))
    plan = make_plan(request)
    if dry_run or not json:
        terminal.show_plan(plan)
    return 0 if dry_run else _show_result(carry_out(plan, request.out), json)


@app.command(group_parameters="Options")
def report(
    *runs: Annotated[Path, Parameter(name="RUN", help="Directories of runs, or of published bundles.")],
    out: Annotated[Path | None, Parameter(help="The page; default for one run: report.html in it.")] = None,
    export: Annotated[Path | None, Parameter(help="Folder for charts and tables as files.")] = None,
    judge_export: Annotated[Path | None, Parameter(help="Folder for answers in FastChat's format, instead.")] = None,
    json: Annotated[bool, _flag("Print numbers for a program, and write nothing else that is not asked for.")] = False,
) -> None:
    """Write the HTML page of runs; several make one page, each by itself."""
    from harness.results import read_run
    from reports import bundle

    if not runs:
        raise UserError("which run? give its directory: `python -m harness report out/RUN`")
    if out is not None:
        may_be_file(out)
    if judge_export is not None:
        _judge_export([read_run(directory) for directory in runs], judge_export)
        return
    if out is None and len(runs) > 1 and not json:
        raise UserError("several runs make one page: say where, with --out page.html")
    if out is None and not json and bundle.is_bundle(runs[0]):
        raise UserError(f"{runs[0]} is a published bundle, which stays as it is: say where, with --out page.html")
    from harness.metrics import summary
    from reports import page, told

    read = [read_run(directory) for directory in runs]
    gc.freeze()  # a large run is millions of objects that all stay: looking through them for waste takes time
    summaries = [summary(run) for run in read]
    if export is not None:
        _export(read, summaries, export)
    if out is not None or not json:
        written = page.write(read, out or runs[0] / "report.html", summaries)
    if json:
        print(told.as_json(read, summaries))
        return
    for run, rows in zip(read, summaries, strict=True):
        told.show(run, rows)
    print(written)


def _export(runs: Sequence[Run], summaries: Sequence[list[Row]], folder: Path) -> None:
    """Charts and tables of one run into `folder`, of several into a folder each in it."""
    from reports.export import export

    for run, rows, own in zip(runs, summaries, _folders(runs, folder), strict=True):
        for line in export(run, rows, own):
            print(f"harness: {line}", file=sys.stderr)


def _judge_export(runs: Sequence[Run], folder: Path) -> None:
    from reports import judging

    for run, own in zip(runs, _folders(runs, folder), strict=True):
        for path in judging.write(run, own):
            print(path)


def _folders(runs: Sequence[Run], folder: Path) -> list[Path]:
    """One run's files go into the folder itself, several into a folder each in it."""
    from harness.results import file_safe

    if len(runs) == 1:
        return [folder]
    return [folder / f"{index}-{file_safe(run.manifest.run)}" for index, run in enumerate(runs, start=1)]


@app.command(group_parameters="Options")
def claims(
    run: Annotated[Path, Parameter(name="RUN", help="Directory of a run, or of a published bundle.")],
    /,
    *,
    json: Annotated[bool, _flag("Print it for a program.")] = False,
) -> None:
    """Set a run beside published figures: first which settings differ, then the numbers."""
    from harness.metrics import summary
    from harness.results import read_run
    from reports import claims as published

    read = read_run(run)
    found = published.compare(read, summary(read))
    if json:
        print(published.as_json(found))
    else:
        published.show(found)


@app.command(group_parameters="Options")
def publish(
    run: Annotated[Path, Parameter(name="RUN", help="Directory of a run.")],
    /,
    *,
    to: Annotated[str, Parameter(help="A new directory, or hf:org/name for a data set on the Hugging Face hub.")],
) -> None:
    """Make a bundle that others can verify and report on: page, trials, manifest, README, badge, SHA-256 list."""
    from harness.results import read_run
    from reports import bundle, hub

    read = read_run(run)
    if to.startswith(hub.PREFIX):
        print(hub.push(read, to.removeprefix(hub.PREFIX)))
    else:
        print(bundle.publish(read, Path(to).expanduser()))


@app.command(group_parameters="Options")
def verify_bundle(directory: Annotated[Path, Parameter(name="DIR", help="A published bundle.")], /) -> int:
    """Check that a bundle is whole and that its numbers follow from its trials; exit status 1 where they do not."""
    from reports import bundle

    wrong = bundle.verify(directory)
    for line in wrong:
        print(line)
    if not wrong:
        print(f"whole: every file is as {bundle.SUMS} says, and results.json has the numbers that the trials give")
    return 1 if wrong else 0


@app.command(group_parameters="Options")
def compare(
    base: Annotated[Path, Parameter(name="BASE", help="A run, a directory of runs, or a trials.jsonl.")],
    new: Annotated[Path, Parameter(name="NEW", help="What is held against it.")],
    /,
    *,
    fail_on: Annotated[
        tuple[str, ...],
        Parameter(help="Gates: 'tau<-1%' (relative change), lossless, output.", negative=""),
    ] = (),
    out: Annotated[Path | None, Parameter(help="Folder for Markdown, JUnit XML and JSON.")] = None,
    markdown: Annotated[bool, _flag("Print Markdown instead of a table.")] = False,
) -> int:
    """Say what changed between two results; exit status 1 where a gate is surely crossed.

    A difference counts only where its whole 95 % interval is beyond the threshold. Without --fail-on the gates are
    tau<-1%, speedup<-5%, peak_bytes>+2%, lossless and output.
    """
    from harness import compare as comparing
    from harness import gates, results
    from reports import comparison

    wanted = [gates.parse_gate(text) for text in fail_on or gates.DEFAULT_GATES]
    before, after = (comparing.gather(str(path), results.read_runs(path)) for path in (base, new))
    found = comparing.compare(before, after, wanted)
    if markdown:
        print(comparison.markdown(found), end="")
    else:
        comparison.show(found)
    if out is not None:
        comparison.write(found, out)
    return found.exit_status


history = App(name="history", help="Keep runs in one file, and show what changed over commits.")
app.command(history)
HistoryFile = Annotated[Path, Parameter(help="SQLite file.")]


@history.command(name="add")
def history_add(
    runs: Annotated[list[Path], Parameter(name="RUN", help="Directories of runs.")],
    /,
    *,
    file: HistoryFile = Path("history.sqlite"),
) -> None:
    """Put runs into the history; one that is there already is kept once."""
    from harness import history as kept

    new = kept.add(file, runs)
    print(f"{file}: {new} new of {len(runs)}")


@history.command(name="show")
def history_show(
    *,
    file: HistoryFile = Path("history.sqlite"),
    out: Annotated[Path | None, Parameter(help="The page; default: beside the file.")] = None,
) -> None:
    """Write a page of tau, speed-up and memory over commits, with the steps marked from ten runs on."""
    from harness import history as kept
    from reports import timeline

    page = may_be_file(out or file.with_suffix(".html"))
    print(timeline.write(kept.series(file), page))


@app.command(name="list")
def list_() -> None:
    """Show methods with their options, prompt sets and models."""
    import prompts
    from harness import terminal

    terminal.show_list(prompts.available())


@app.command
def doctor(
    *,
    hub: Annotated[bool, _flag("Ask whether the Hugging Face hub can be reached.")] = False,
    bench: Annotated[bool, _flag("Measure bandwidths and the target's forwards instead; kept for later runs.")] = False,
    model: Annotated[str | None, Parameter(help="With --bench: whose forwards, as for `run`.")] = None,
    bits: Annotated[str | None, Parameter(help="With --bench: 32, 16, 8 or 4.")] = None,
    runtime: Annotated[str | None, Parameter(help="With --bench: eager, graph or compile.")] = None,
    fresh: Annotated[bool, _flag("With --bench: measure again what is known.")] = False,
) -> None:
    """Say what this machine can run, and why not; or how fast it is at best."""
    from harness import host, terminal

    if bench:
        from harness import forwards

        tell = terminal.Telling()
        terminal.show_bench(
            *forwards.bench(model, bits, runtime or "eager", fresh=fresh, tell=lambda step: tell.stage(step, None))
        )
        return
    if fresh or any(option is not None for option in (model, bits, runtime)):
        raise UserError("doctor looks at the machine; --model, --bits, --runtime and --fresh need --bench")
    terminal.show_checks(host.checks(ask_hub=hub))


app.command(
    "harness.verify_command:verify",
    name="verify",
    group_parameters="Options",
    help="""Say of every method whether its output is still the target's own. Exit status 1 where one diverged.

    Greedy text is compared token by token; at a temperature above 0 sampled text is tested against the target's own
    distribution, with a p-value. A correct method fails the second test in one of 1000 runs.
    """,
)


@app.command(group_parameters="Options")
def train(
    *,
    methods: Annotated[str, Parameter(help="What to train: `s3d:keep=4+8,eagle`.")] = "s3d,medusa,eagle",
    model: Annotated[str | None, Parameter(help="Hub id or directory; default: a small chat model.")] = None,
    tokens: Annotated[int, _at_least(1, "Tokens seen in training, all epochs together.")] = 20_000_000,
    corpus_tokens: Annotated[
        int | None, _at_least(1, "Tokens written to learn from; default: at most 5 million.")
    ] = None,
    data: Annotated[Path | None, Parameter(help="Prompts to begin with (JSONL), instead of sampled ones.")] = None,
    draft_vocabulary: Annotated[int, _at_least(0, "Most frequent tokens a drafter can say; 0: all.")] = 8192,
    length: Annotated[int, _at_least(1, "Tokens a sequence, 16 or more.")] = 512,
    batch: Annotated[int, _at_least(1, "Sequences a step.")] = 64,
    anchors: Annotated[int, _at_least(1, "Places a sequence where each method drafts.")] = 48,
    learning_rate: Annotated[float, _at_least(0, "Peak of the schedule.")] = 1e-3,
    seed: Annotated[int, Parameter(validator=Number(gte=0, lte=2**63 - 1))] = 0,
    device: Annotated[str, Parameter(help="auto, cuda, xpu, mps or cpu.")] = "auto",
    out: Annotated[Path | None, Parameter(help="Folder of the drafters; default: where `run` finds them.")] = None,
    stop_after: Annotated[float | None, _at_least(0, "Seconds of training, to go on later.")] = None,
    restart: Annotated[bool, _flag("Forget an unfinished training with the same options.")] = False,
) -> int:
    """Make drafters for a model that has none, from text that the model itself writes."""
    given = {name: value for name, value in locals().items() if name not in ("stop_after", "restart", "device")}
    from harness import host, terminal
    from harness.train import command

    settings = command.Settings(device=host.choose_device(device), **given)
    paths = command.train(settings, terminal.Telling(), restart=restart, stop_after_seconds=stop_after)
    terminal.show_drafters(paths)
    return 0


# --- the pieces, put together -----------------------------------------------------------------------------------------


def make_plan(request: Request) -> Plan:
    """Raises UserError."""
    import prompts
    from harness import host, shapes, weights
    from harness.plan import plan

    device, source = host.choose_device(request.device), weights.resolve(request.model)
    if source.kind != "shape":
        prompt_set = prompts.load(request.prompts, limit=request.limit)
    elif request.prompts in ("quick", "synthetic"):
        prompt_set = shapes.prompt_set(request.limit)
    else:
        raise UserError(
            "a shape has no tokenizer, so its prompts are random ids: drop --prompts (--limit says how many)"
        )
    return plan(request, source=source, device=device, prompt_set=prompt_set)


def carry_out(plan: Plan, out: str | None, command: Sequence[str] | None = None) -> Path:
    """Run a plan with live progress, and write its report; the directory."""
    from harness import runner, terminal

    said = ["python", "-m", "harness", *sys.argv[1:]] if command is None else list(command)
    directory = Path(out).expanduser() if out is not None else runner.default_directory(plan)
    try:
        with terminal.progress(plan) as on_event:
            runner.execute(plan, directory, on_event, command=said)
    except KeyboardInterrupt:
        named = any(word == "--out" or word.startswith("--out=") for word in said)
        again = said if named or command is not None else [*said, "--out", str(directory)]
        raise KeyboardInterrupt(f"interrupted; `{shlex.join(again)}` goes on where it stopped") from None
    write_report(directory)
    return directory


def measure(given: Mapping[str, Any]) -> Path:
    """`harness.run`: options by name to the directory of a finished run."""
    from harness.plan import read_request

    values = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    request = read_request(values, "harness.run")
    return carry_out(make_plan(request), request.out, [f"harness.run(**{dict(given)!r})"])


def write_report(directory: Path) -> Path:
    """Write `report.html` into a run; its path."""
    from harness.results import read_run
    from reports import page

    return page.write([read_run(directory)], directory / "report.html")


def _show_result(directory: Path, json: bool) -> int:
    """Answer, table and paths, or all of it in JSON.

    Exit status 1 where nothing could be measured, or a method's text surely is not the target's.
    """
    from harness.metrics import summary
    from harness.results import read_run
    from reports import told

    run = read_run(directory)
    rows = summary(run)
    if json:
        print(told.as_json([run], [rows]))
    else:
        told.show(run, rows)
        for name in ("report.html", "trials.jsonl"):
            print(directory / name)
    diverged = any(row.verdict.kind == "diverged" for row in rows)
    return 0 if any(row.outcome == "ok" for row in run.rows) and not diverged else 1


def _whole(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An option that is a number or a word, as a number where it is one."""
    text = str(given.get(name, ""))
    return {name: int(text)} if text.lstrip("+-").isdigit() else {}


def _toml(path: Path) -> dict[str, Any]:
    try:
        return {key.replace("-", "_"): value for key, value in tomllib.loads(path.read_text()).items()}
    except FileNotFoundError:
        raise UserError(f"no file {path}: give the path of a TOML file") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
