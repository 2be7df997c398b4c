"""House rules that a machine can check: lint, format, types, import directions, and what the README promises."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN, ON_A_GPU = ROOT / "docs" / "quick-cpu", ROOT / "docs" / "h200" / "default-model"
"the runs whose figures the README shows"
SCRIPTS = Path(sysconfig.get_path("scripts"))


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("lint-imports",)],
    ids=lambda command: " ".join(command),
)
def test_tool_finds_nothing(command: tuple[str, ...]) -> None:
    run(str(SCRIPTS / command[0]), *command[1:])


def blocks() -> list[str]:
    """Code blocks of the README."""
    return re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_readme_commands_parse() -> None:
    """Every `python -m harness` line of the README is accepted by the command line (planned, not measured)."""
    from harness.cli import app

    lines = [line.strip() for block in blocks() for line in block.splitlines()]
    found = [re.split(r"-m harness\s+", line, maxsplit=1)[1].split("#")[0] for line in lines if "-m harness " in line]
    assert len(found) >= 4
    for arguments in found:
        app.parse_args(arguments.split(), print_error=False, exit_on_error=False)


@pytest.mark.parametrize("mark", ["methods", "results"])
def test_readme_tables_are_the_programs_own(mark: str) -> None:
    """What stands between the marks is what the methods, and the committed run, say of themselves."""
    written = re.search(rf"<!-- {mark} -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert written is not None
    assert written[1].strip() == made()[mark].strip(), "run `python tests/test_house.py`, which writes them anew"


@pytest.mark.parametrize(
    ("directory", "picture"), [(RUN, "docs/speed-against-memory.svg"), (ON_A_GPU, "docs/h200/speed-up-against-tau.svg")]
)
def test_readme_pictures_are_made_from_the_committed_runs(directory: Path, picture: str) -> None:
    assert f"]({picture})" in (ROOT / "README.md").read_text()
    points = (ROOT / picture).read_text()
    for row in _rows(directory):
        assert row.cell.label in points


def made() -> dict[str, str]:
    """The README's generated parts."""
    from harness.method import find, installed
    from reports import tables

    methods = ["| method | what it does | source |", "|---|---|---|"]
    methods += [f"| `{name}` | {find(name).summary} | {find(name).source} |" for name in installed()]
    return {"methods": "\n".join(methods), "results": tables.markdown(_rows(RUN))}


def _rows(directory: Path) -> list[Any]:
    from harness.metrics import summary
    from harness.results import read_run

    return summary(read_run(directory))


def write_readme() -> None:
    """Put the generated parts, and the pictures, where they belong."""
    from harness.results import read_run
    from reports import export

    path = ROOT / "README.md"
    text = path.read_text()
    for mark, content in made().items():
        block = f"<!-- {mark} -->\n{content.strip()}\n<!-- end -->"
        text = re.sub(rf"<!-- {mark} -->\n.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL)
    path.write_text(text)
    for directory, name, picture in (
        (RUN, "scatter", "docs/speed-against-memory.svg"),
        (ON_A_GPU, "tau", "docs/h200/speed-up-against-tau.svg"),
    ):
        with tempfile.TemporaryDirectory() as made_in:
            export.pictures(read_run(directory), _rows(directory), Path(made_in))
            shutil.copy(Path(made_in) / f"{name}.svg", ROOT / picture)


def test_the_decoder_that_contributing_shows_works(tmp_path: Path) -> None:
    """Its code is run as it stands there, and its text is the target's own."""
    import bench
    from tiny import tiny

    from harness.decode import Limits
    from harness.target import Target

    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    kind = names["Bigram"]
    target = Target(tiny("llama"), capacity=bench.CAPACITY)
    prompt = bench.text(24, 64, seed=3) * 2
    limits = Limits(40)
    method = kind.load(target, kind.Options(), None, bench.sampler())
    text, steps = bench.decoded(target, method, prompt, limits)
    assert text == target.generate(prompt, 40, frozenset())
    assert any(step.drafted for step in steps), "it drafts something"


def test_no_weights_but_safetensors_and_none_too_large() -> None:
    weights = [path for path in ROOT.glob("methods/drafters/**/*") if path.is_file()]
    assert weights, "the default model's drafters are part of the repository"
    assert {path.suffix for path in weights} == {".safetensors"}
    assert max(path.stat().st_size for path in weights) < 16 * 10**6
    assert sum(path.stat().st_size for path in weights) < 40 * 10**6


if __name__ == "__main__":
    write_readme()
