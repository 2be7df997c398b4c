"""The command line, and the only module that knows methods and reports. Heavy imports wait until they are needed."""

from __future__ import annotations

import errno
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from harness.errors import UserError

if TYPE_CHECKING:
    from harness.plan import Plan, Request

NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

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
        result = app(arguments, exit_on_error=False, print_error=False)
    except (UserError, CycloptsError) as error:
        print("harness:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in NO_DISK:
            raise
        where = f"cannot use {error.filename or 'the disk'} ({error.strerror})"
        print(f"harness: {where}: make room there, or name another place", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("harness:", stop if str(stop) else "interrupted", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


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
    trust_remote_code: Annotated[bool | None, _flag("Run code that comes with the model.")] = None,
) -> int:
    """Measure decoders and write a report."""
    asked = {name: value for name, value in locals().items() if name not in ("config", "dry_run")}
    from harness import terminal
    from harness.plan import read_request

    from_file = {} if config is None else _toml(config)
    read_request(from_file, str(config))
    given = {name: value for name, value in asked.items() if value is not None}
    request = read_request(from_file | given | _whole(given, "rounds"))
    plan = make_plan(request)
    terminal.show_plan(plan)
    return 0 if dry_run else _show_result(carry_out(plan, request.out))


@app.command(group_parameters="Options")
def report(
    directory: Annotated[Path, Parameter(name="RUN", help="Directory of a run.")],
    /,
    *,
    judge_export: Annotated[Path | None, Parameter(help="Folder for answers in FastChat's format, instead.")] = None,
) -> None:
    """Write the HTML page of a run anew."""
    if judge_export is None:
        print(write_report(directory))
        return
    from harness.results import read_run
    from reports import judging

    for path in judging.write(read_run(directory), judge_export):
        print(path)


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

    print(timeline.write(kept.series(file), out or file.with_suffix(".html")))


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


app.command("harness.verify_command:verify", name="verify", group_parameters="Options")


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
    length: Annotated[int, _at_least(1, "Tokens a sequence.")] = 512,
    batch: Annotated[int, _at_least(1, "Sequences a step.")] = 64,
    anchors: Annotated[int, _at_least(1, "Places a sequence where each method drafts.")] = 48,
    learning_rate: Annotated[float, _at_least(0, "Peak of the schedule.")] = 1e-3,
    seed: int = 0,
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
        again = said if "--out" in said or command is not None else [*said, "--out", str(directory)]
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

    return page.write(read_run(directory))


def _show_result(directory: Path) -> int:
    """Table and paths; exit status 1 where nothing could be measured, or a method's text surely is not the target's."""
    from harness import metrics, terminal
    from harness.results import read_run
    from reports import tables, words

    run = read_run(directory)
    rows = metrics.summary(run)
    for line in words.fitting(rows, run.manifest.vram_budget_bytes):
        print(line)
    notes = [*words.changed_targets(run), *words.against_itself(rows)]
    terminal.show_result(run, tables.rich_table(rows), notes, tables.warnings(run, rows))
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
