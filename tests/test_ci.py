"""The CI recipe: the workflows and the action parse, and the action's very commands are run here on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import yaml

ROOT = Path(__file__).resolve().parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FAKE_GH = """#!/bin/sh
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in *--paginate*) echo "$COMMENTS";; *PATCH*"comments/9 "*) exit 1;; esac
"""
"finds the comments that the test says are there, and cannot edit comment 9"


class Job:
    """What a runner gives to a step: inputs, files to write to, and the outputs of earlier steps."""

    def __init__(self, folder: Path, **inputs: str) -> None:
        self.folder = folder
        defaults = {name: str(one.get("default", "")) for name, one in ACTION["inputs"].items()}
        assert {name.replace("_", "-") for name in inputs} <= set(defaults)
        self.inputs = defaults | {name.replace("_", "-"): value for name, value in inputs.items()}
        self.calls = folder / "calls"
        gh = folder / "bin" / "gh"
        gh.parent.mkdir(parents=True)
        gh.write_text(FAKE_GH)
        gh.chmod(0o755)
        python = gh.with_name("python")
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)

    def value(self, text: str) -> str:
        """An expression in an `env` of the action, as a runner fills it in."""
        written = (self.folder / "output").read_text().splitlines() if (self.folder / "output").exists() else []
        known = {f"inputs.{name}": value for name, value in self.inputs.items()}
        known |= {
            f"steps.compare.outputs.{name}": value for name, _, value in (line.partition("=") for line in written)
        }
        known |= {"github.token": "secret", "github.event.pull_request.number": "7", "github.repository": "me/it"}
        return re.sub(r"\$\{\{ (.+?) \}\}", lambda match: known[match[1]], text)

    def run(self, name: str, comments: str = "") -> subprocess.CompletedProcess[str]:
        step = STEPS[name]
        given = {key: self.value(text) for key, text in step.get("env", {}).items()}
        files = {name: str(self.folder / name[7:].lower()) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        environment = os.environ | {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CALLS": str(self.calls),
            "COMMENTS": comments,
            "HARNESS_CACHE": str(self.folder.parent / "cache"),
        }
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]  # as `shell: bash` does
        return subprocess.run(command, cwd=self.folder, env=environment | given | files, capture_output=True, text=True)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, and a baseline that the action's own step has measured."""
    folder = tmp_path_factory.mktemp("ci")
    tiny_chat.save(folder / "toy")
    tiny_chat.prompts(folder / "prompts.jsonl")
    done = job(folder, "first", folder / "nothing").run("Measure")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def job(desk: Path, name: str, baseline: Path) -> Job:
    tiny = {"model": str(desk / "toy"), "prompts": str(desk / "prompts.jsonl"), "max_new_tokens": "5", "limit": ""}
    return Job(desk / name, methods="layerskip", baseline=str(baseline), out=str(desk / "measured"), **tiny)


def test_the_same_commit_passes_and_is_told_in_a_comment(desk: Path) -> None:
    mine = job(desk, "same", desk / "measured" / "run")
    assert mine.run("Compare").returncode == 0
    assert (mine.folder / "output").read_text() == "status=0\n"
    assert "no regression in" in (mine.folder / "step_summary").read_text()
    assert mine.run("Comment").returncode == 0
    search, made = mine.calls.read_text().splitlines()
    assert "repos/me/it/issues/7/comments" in search
    assert 'startswith("<!-- spec-harness -->")' in search
    comment = desk / "measured" / "comment.md"
    assert made == f"pr comment 7 --body-file {comment}"
    told = (desk / "measured" / "comparison" / "comparison.md").read_text()
    assert comment.read_text() == f"<!-- spec-harness -->\n{told}"
    assert mine.run("Gate").returncode == 0
    written = {path.name for path in (desk / "measured" / "comparison").iterdir()}
    assert {"comparison.md", "junit.xml", "bencher.json", "benchmark-bigger.json"} <= written


@pytest.mark.parametrize(("comments", "edited", "made"), [("5\n6", "6", 0), ("9", "9", 1)])
def test_the_actions_own_comment_is_edited_and_no_other(comments: str, edited: str, made: int, tmp_path: Path) -> None:
    mine = Job(tmp_path / "job", out=str(tmp_path))
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "comparison.md").write_text("same\n")
    assert mine.run("Comment", comments).returncode == 0
    _, edit, *others = mine.calls.read_text().splitlines()
    assert edit == f"api --silent -X PATCH repos/me/it/issues/comments/{edited} -F body=@{tmp_path}/comment.md"
    assert others == [f"pr comment 7 --body-file {tmp_path}/comment.md"] * made


def test_what_could_not_be_compared_is_no_comment(tmp_path: Path) -> None:
    mine = Job(tmp_path / "job", out=str(tmp_path))
    assert mine.run("Comment").returncode != 0
    assert not mine.calls.exists()


@pytest.mark.parametrize("step", ["Measure", "Compare"])
def test_the_callers_modules_are_not_taken_for_ours(step: str, tmp_path: Path) -> None:
    mine = Job(tmp_path / "job", baseline="/nowhere", methods="nothing", out=str(tmp_path))
    for name in ("prompts.py", "methods.py", "harness.py"):
        (mine.folder / name).write_text("raise SystemExit('the caller is imported')\n")
    done = mine.run(step)
    assert "the caller is imported" not in done.stdout + done.stderr
    assert "harness: " in done.stderr, "a mistake that our own command line has found"


def test_another_text_on_the_same_machine_fails_the_gate(desk: Path) -> None:
    baseline = desk / "baseline"
    baseline.mkdir()
    for name in ("manifest.json", "trials.jsonl"):
        (baseline / name).write_bytes((desk / "measured" / "run" / name).read_bytes())
    rows = [json.loads(line) for line in (baseline / "trials.jsonl").read_text().splitlines()]
    rows[-1]["new_tokens"][2] += 1
    (baseline / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = job(desk, "other", baseline)
    assert mine.run("Compare").returncode == 0, "the comment comes first"
    assert (mine.folder / "output").read_text() == "status=1\n"
    assert "**REGRESSED**" in (mine.folder / "step_summary").read_text()
    assert mine.run("Gate").returncode == 1


def test_a_baseline_that_is_not_there_is_bad_input(desk: Path) -> None:
    mine = job(desk, "absent", desk / "nowhere")
    assert mine.run("Compare").returncode == 0
    assert mine.run("Gate").returncode == 2


def test_every_step_is_named_has_a_shell_and_takes_inputs_by_its_environment_only() -> None:
    """Text from outside that stands in a script itself could become a command."""
    assert list(STEPS) == ["Install", "Measure", "Compare", "Comment", "Gate"]
    for step in ACTION["runs"]["steps"]:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_what_exists(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert {"name", True, "permissions", "jobs"} <= set(workflow), "YAML reads `on` as true"
    for one in workflow["jobs"].values():
        assert one["timeout-minutes"] <= 60
        for step in one["steps"]:
            if step.get("uses") == "./":
                required = {name for name, each in ACTION["inputs"].items() if each.get("required")}
                assert required <= set(step["with"]) <= set(ACTION["inputs"])
                assert (ROOT / step["with"]["baseline"] / "manifest.json").is_file()
            if "run" in step:
                assert os.access(ROOT / step["run"], os.X_OK)


def test_the_project_gates_its_own_commits_with_options_that_parse() -> None:
    from harness.cli import app

    script = (ROOT / ".ci" / "gate").read_text().replace("\\\n", " ")
    lines = re.findall(r"-m harness (.*)", script)
    assert [line.split()[0] for line in lines] == ["run", "compare"]
    for line in lines:
        app.parse_args(line.replace("'", "").replace('"', "").split(), print_error=False, exit_on_error=False)
    assert ".ci/gate" in (ROOT / ".ci" / "run").read_text()
