"""The command line: quick help, one line for a mistake, a traceback for a bug."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import factory
import msgspec
import pytest

from harness import cli

HEAVY = ("torch", "transformers", "pandas", "altair", "scipy", "huggingface_hub")


def modules_after(*arguments: str) -> set[str]:
    """What is imported once this command line is done, in a fresh process."""
    then = "print('\\n', *sys.modules, file=sys.stderr)"
    code = f"import sys; from harness.cli import main; main({list(arguments)!r}); {then}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split("\n ")[-1].split())


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong command line gives."""
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harness: ")
    return line


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help")])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert not modules_after(*arguments).intersection(HEAVY)


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    run = factory.run(factory.trial(factory.cell()), factory.trial(factory.cell("echo")))
    return factory.written(run, tmp_path / "run")


def test_what_only_reads_results_needs_no_torch(run_directory: Path, tmp_path: Path) -> None:
    run = str(run_directory)
    assert "torch" not in modules_after("report", run)
    assert (run_directory / "report.html").is_file()
    assert "torch" not in modules_after("compare", run, run, "--out", str(tmp_path / "compared"))
    assert (tmp_path / "compared" / "junit.xml").is_file()


def test_report_tells_the_answer_without_colour_in_a_pipe(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(run_directory)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("In 32 bits on cuda, nothing is clearly faster than plain decoding")
    assert shown.rstrip().endswith("report.html")
    assert "\x1b" not in shown


def test_report_for_a_program_is_json_and_writes_nothing(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(run_directory), "--json"]) == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)[0]["rows"]] == ["ar", "echo"]
    assert not (run_directory / "report.html").exists()


def test_several_runs_make_one_page_and_a_folder_each(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, folder = tmp_path / "page.html", tmp_path / "files"
    runs = [str(run_directory)] * 2
    assert cli.main(["report", *runs, "--out", str(page), "--export", str(folder)]) == 0
    assert page.read_text().count("<article") == 2
    assert sorted(path.name for path in folder.iterdir()) == ["1-synthetic", "2-synthetic"]
    assert "--out" in mistake(capsys, "report", *runs)


def test_the_name_of_somebody_elses_run_leads_nowhere(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run_directory / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"run": "x/../../victim"}))
    folder = tmp_path / "files"
    assert cli.main(["report", *[str(run_directory)] * 2, "--judge-export", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["1-x-..-..-victim", "2-x-..-..-victim"]
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("run", "--mehods", "ar"), "Did you mean --methods?"),
        (("run", "--rounds", "many"), "rounds"),
        (("run", "--rounds", "0"), "rounds: expected a whole number >= 1"),
        (("run", "--precision", "0.01"), "`--rounds auto`"),
        (("run", "--rounds", "auto", "--time-budget", "soon", "--methods", "ar"), "write seconds, or 20m"),
        (("run", "ar"), "ar"),
        (("run", "--methods", "prompt-lokup"), "did you mean 'prompt-lookup'"),
        (("run", "--methods", "prompt-lookup:gama=3"), "gamma"),
        (("run", "--prompts", "qick"), "did you mean 'quick'"),
        (("run", "--device", "gpu"), "choose auto, cuda"),
        (("run", "--model", "/nowhere/at/all"), "/nowhere/at/all"),
        (("run", "--config", "/nowhere.toml"), "no file /nowhere.toml"),
        (("run", "--config", "/"), "cannot read /"),
        (("run", "--methods", "ar", "--limit", "1", "--out", "/dev/null/x"), "give another --out"),
        (("run", "--methods", "s3d:drafter=/nowhere"), "no drafter at /nowhere"),
        (("train", "--batch", "0"), "--batch"),
        (("verify", "--bits", "16,32"), "one precision at a time"),
        (("verify", "--max-new-tokens", "-3"), "expected a whole number >= 1"),
        (("report", "/nowhere"), "is not a run"),
        (("report",), "which run?"),
        (("history", "add", "/nowhere"), "is not a run"),
        (("history", "show", "--file", "/nowhere"), "no history /nowhere"),
        (("verify", "--samples", "0"), "--samples 0 draws nothing"),
        (("compare", "/nowhere", "/nowhere"), "no /nowhere: give a run"),
        (("compare", "/", "/", "--fail-on", "taw<-1%"), "did you mean 'tau'"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in mistake(capsys, *arguments)


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("report RUN --out DIR", "dir is a directory: name a file"),
        ("report RUN --out .", ". is a directory: name a file"),
        ("report RUN --out FILE/page.html", "file"),
        ("report RUN --export FILE", "file"),
        ("report RUN --judge-export FILE", "file"),
        ("publish RUN --to FILE", "file"),
        ("publish RUN --to FILE/bundle", "file"),
        ("compare RUN RUN --out FILE", "file"),
        ("history add RUN --file DIR", "dir"),
        ("history show --file HISTORY --out DIR", "dir is a directory: name a file"),
        ("history show --file HISTORY --out FILE/page.html", "file"),
        ("verify --out DIR", "dir is a directory: name a file"),
    ],
)
def test_a_place_of_the_wrong_kind_is_one_line_and_stays_as_it_is(
    command: str, hint: str, run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history, file, directory = tmp_path / "history.sqlite", tmp_path / "file", tmp_path / "dir"
    assert cli.main(["history", "add", str(run_directory), "--file", str(history)]) == 0
    file.write_text("mine")
    directory.mkdir()
    before = sorted(tmp_path.rglob("*"))
    places = {"RUN": run_directory, "HISTORY": history, "FILE": file, "DIR": directory}
    for name, path in places.items():
        command = command.replace(name, str(path))
    assert hint in mistake(capsys, *command.split())
    assert sorted(tmp_path.rglob("*")) == before
    assert file.read_text() == "mine"


def test_a_page_makes_the_folder_it_goes_into(run_directory: Path, tmp_path: Path) -> None:
    history, page = str(tmp_path / "history.sqlite"), tmp_path / "new" / "page.html"
    assert cli.main(["history", "add", str(run_directory), "--file", history]) == 0
    assert cli.main(["history", "show", "--file", history, "--out", str(page)]) == 0
    assert page.is_file()


def test_an_absent_device_is_a_mistake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.host.present", lambda device: device == "cpu")
    assert "no mps here: torch sees cpu" in mistake(capsys, "run", "--device", "mps")


def test_a_config_file_is_the_command_line_in_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(
        'bits = [32, 8]\nmax-new-tokens = 5\n[[methods]]\nname = "prompt-lookup"\ngamma = 3\nlabel = "short"\n'
    )
    assert cli.main(["run", "--config", str(config), "--max-new-tokens", "7", "--dry-run", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "short" in shown
    assert "int8:t6" in shown
    assert "up to 7 new tokens" in shown


@pytest.mark.parametrize(
    ("text", "hint"),
    [("metods = 'ar'", "did you mean 'methods'"), ("bits = ", "is not TOML"), ("rounds = 0", "rounds")],
)
def test_a_mistake_in_a_config_file_names_the_file(
    text: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(text)
    line = mistake(capsys, "run", "--config", str(config))
    assert hint in line
    assert "mine.toml" in line


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "make_plan", lambda request: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run"])


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(request: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_plan", interrupt)
    assert cli.main(["run"]) == 130
    assert capsys.readouterr().err == "harness: interrupted\n"


@pytest.mark.parametrize(
    ("given", "named"), [((), True), (("--out", "there"), False), (("--out=there",), False), (("--output",), True)]
)
def test_what_goes_on_after_ctrl_c_names_its_directory_once(
    given: tuple[str, ...], named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness import runner, terminal

    plan: Any = None

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "progress", lambda plan: contextlib.nullcontext(print))
    monkeypatch.setattr(runner, "execute", interrupt)
    monkeypatch.setattr(sys, "argv", ["harness", "run", *given])
    with pytest.raises(KeyboardInterrupt) as stop:
        cli.carry_out(plan, "there")
    asked = shlex.join(["python", "-m", "harness", "run", *given]) + " --out there" * named
    assert str(stop.value) == f"interrupted; `{asked}` goes on where it stopped"


def test_list_shows_every_option_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    from harness import method, terminal

    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in method.installed():
        assert f"  {name}: " in shown
        kind = method.find(name)
        described = terminal.options(kind)
        assert set(described) == {field.name for field in msgspec.structs.fields(kind.Options)}
        assert all(text for _, text in described.values()), name
    assert "standard: " in shown


def test_doctor_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in ("torch", "device", "disk", "default model", "s3d drafter"):
        assert name in shown
