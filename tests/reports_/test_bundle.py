"""A published run: whole or not, and the same numbers in other hands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import factory
import pytest
from factory import cell, run, trial
from hub_server import hub

from harness import cli
from harness.errors import UserError
from harness.metrics import summary
from harness.results import read_run
from reports import bundle, page, told

ROOT = Path(__file__).parents[2]
HOSTILE = "<b>|x\n- y"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    trials = [
        trial(
            cell(name),
            committed,
            pace * (1 + index / 100),
            round=index,
            prompt_id=prompt,
            token_texts=list("abcdef"),
            synthetic=True,
        )
        for index in range(3)
        for prompt in ("p0", "p1")
        for name, committed, pace in (("ar", [1] * 5, 0.1), ("s3d", [3, 2], 0.13))
    ]
    source = factory.written(run(*trials, model=HOSTILE, rounds=3), folder / "run")
    return bundle.publish(read_run(source), folder / "bundle")


@pytest.fixture
def published(made: Path, tmp_path: Path) -> Path:
    """A copy of the one bundle, to spoil."""
    return shutil.copytree(made, tmp_path / "bundle")


def test_a_bundle_verifies_and_gives_the_same_page_and_numbers(published: Path) -> None:
    assert bundle.verify(published) == []
    read = read_run(published)
    assert page.render([read]) == (published / "report.html").read_text(encoding="utf-8")
    assert told.as_json([read], [summary(read)]) == (published / "results.json").read_text(encoding="utf-8").strip()


def test_a_bundle_is_checked_by_sha256sum_too(published: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", bundle.SUMS], cwd=published, check=True)


@pytest.mark.parametrize("name", ["report.html", "trials.jsonl", "manifest.json", "README.md", "badge.svg"])
def test_a_changed_file_is_named(published: Path, name: str) -> None:
    with (published / name).open("a") as file:
        file.write("\n")
    (line,) = bundle.verify(published)
    assert line.startswith(f"{name} has another SHA-256")


def test_a_missing_and_an_added_file_are_named(published: Path) -> None:
    (published / "badge.svg").unlink()
    (published / "more.txt").touch()
    assert bundle.verify(published) == ["badge.svg is missing", "more.txt is not in SHA256SUMS"]


def summed(directory: Path) -> None:
    """Make the list anew, as a cheat would."""
    files = [file for file in directory.iterdir() if file.is_file() and file.name != bundle.SUMS]
    (directory / bundle.SUMS).write_text("".join(f"{bundle._sha256(file)}  {file.name}\n" for file in files))


def test_what_hubs_and_git_put_beside_the_files_is_not_the_bundles(published: Path) -> None:
    (published / ".gitattributes").touch()
    (published / ".cache").mkdir()
    assert bundle.verify(published) == []


def test_the_commands_of_the_readme_leave_the_bundle_whole(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = (published / "README.md").read_text().split("```sh\n")[1].split("```")[0]
    monkeypatch.chdir(published)
    for line in told.splitlines() * 2:
        assert cli.main(line.removeprefix("python -m harness ").split()) == 0


@pytest.mark.parametrize("content", ["{}", "[]", "nonsense", "[{}]", "[1]", '[{"rows": [1, 2]}]', '[{"rows": []}]'])
def test_results_of_another_form_are_named(published: Path, content: str) -> None:
    (published / "results.json").write_text(content)
    summed(published)
    (line,) = bundle.verify(published)
    assert line.startswith(("results.json is not as published: ", "results.json has other methods"))


def test_results_that_are_no_text_are_named(published: Path) -> None:
    (published / "results.json").write_bytes(b'[{"rows": [{"a": "\xff"}]}]')
    summed(published)
    assert bundle.verify(published)[0].startswith("results.json is not as published: ")


@pytest.mark.parametrize("content", ["[]", "3", '{"schema": "x"}', '{"schema": null}', "nonsense", "{}"])
def test_a_manifest_of_another_form_is_one_line(
    published: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (published / "manifest.json").write_text(content)
    summed(published)
    assert cli.main(["verify-bundle", str(published)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "manifest.json" in line


def test_a_directory_in_the_list_is_named(published: Path) -> None:
    (published / "badge.svg").unlink()
    (published / "badge.svg").mkdir()
    assert bundle.verify(published) == ["badge.svg is not a file"]


def test_a_run_without_a_result_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to publish"):
        bundle.publish(run(factory.failed(cell("ar"))), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_numbers_that_do_not_follow_from_the_trials_are_named(published: Path) -> None:
    path = published / "results.json"
    told = json.loads(path.read_text())
    told[0]["rows"][0]["speedup"] *= 1.5
    path.write_text(json.dumps(told))
    summed(published)
    (line,) = bundle.verify(published)
    assert line.startswith("results.json says speedup")


@pytest.mark.parametrize("line", ["not a sum", f"{'0' * 64}  ../../etc/passwd", f"{'0' * 64}  /etc/passwd"])
def test_a_list_that_leads_elsewhere_is_refused(published: Path, line: str) -> None:
    (published / bundle.SUMS).write_text(line + "\n")
    assert "no SHA-256 and name" in bundle.verify(published)[0]


def test_readme_and_badge_take_a_hostile_name_as_text(published: Path) -> None:
    readme = (published / "README.md").read_text()
    assert "\n# Speculative decoding: \\<b\\>\\|x - y on cuda\n" in readme
    assert "SYNTHETIC" in readme
    words = "".join(ElementTree.parse(published / "badge.svg").getroot().itertext())
    assert "SYNTHETIC: s3d" in words


def test_what_is_there_is_not_overwritten(published: Path) -> None:
    with pytest.raises(UserError, match="is not empty"):
        bundle.publish(read_run(published), published)


def test_the_command_line_publishes_verifies_and_leaves_a_bundle_as_it_is(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["publish", str(published), "--to", str(tmp_path / "again")]) == 0
    assert cli.main(["verify-bundle", str(tmp_path / "again")]) == 0
    assert "SHA256SUMS says, and results.json has the numbers" in capsys.readouterr().out
    assert cli.main(["report", str(published), "--out", str(tmp_path / "page.html")]) == 0
    assert cli.main(["report", str(published)]) == 2
    assert "stays as it is" in capsys.readouterr().err
    (published / "report.html").unlink()
    assert cli.main(["verify-bundle", str(published)]) == 1
    assert cli.main(["verify-bundle", str(tmp_path)]) == 2


def push(run: Path, name: str, address: str, token: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "harness", "publish", str(run), "--to", f"hf:{name}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_hub_gets_the_bundle_as_a_data_set(published: Path, tmp_path: Path) -> None:
    with hub() as server:
        done = push(published, "org/name", server.address, server.token)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{server.address}/datasets/org/name"
        assert server.repositories == {"datasets/org/name"}
    for name, content in server.files.items():
        (tmp_path / "got").mkdir(exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    assert bundle.verify(tmp_path / "got") == []


def test_a_data_set_that_holds_something_else_is_left_alone(published: Path) -> None:
    with hub() as server:
        server.repositories.add("datasets/org/name")
        server.files = {".gitattributes": b"", "poems.txt": b"mine"}
        done = push(published, "org/name", server.address, server.token)
        assert done.returncode == 2
        assert "org/name holds something else" in done.stderr
        assert set(server.files) == {".gitattributes", "poems.txt"}


def test_a_hub_that_says_no_is_one_line(published: Path) -> None:
    with hub() as server:
        refused = push(published, "org/name", server.address, "hf_wrong")
    nobody = push(published, "org/name", "http://127.0.0.1:9", "hf_wrong")
    misnamed = push(published, "name", "http://127.0.0.1:9", "hf_wrong")
    odd = push(published, "org/-x", "http://127.0.0.1:9", "hf_wrong")
    hints = ((refused, "allowed to write"), (nobody, "cannot reach"), (misnamed, "hf:org/name"), (odd, "no data set"))
    for done, hint in hints:
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert hint in done.stderr
