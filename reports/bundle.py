"""A run as others get it: page, trials, manifest, numbers, a README with the table, a badge, and a list of SHA-256.

Whoever has the bundle can check that it is whole and that its numbers follow from its trials (`verify`), and make the
page again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec

from harness.errors import UserError
from harness.metrics import Row, summary
from harness.results import Run, read_run
from reports import draw, page, tables, told, words

SUMS = "SHA256SUMS"
COPIED = ("trials.jsonl", "manifest.json", "first_answers.json", "judged.jsonl")
CLOSE = 1e-6
"relative: another library's last digits"


class Claimed(msgspec.Struct):
    """What is checked of a run in `results.json`."""

    rows: list[dict[str, Any]]


def is_bundle(directory: Path) -> bool:
    return (directory / SUMS).is_file()


def publish(run: Run, directory: Path) -> Path:
    """Write the bundle into a new or empty directory; it. Raises UserError for others, and for runs without results."""
    if not any(trial.outcome == "ok" for trial in run.rows):
        raise UserError(f"{run.directory} has no trial that succeeded: there is nothing to publish")
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty: give another --to")
    directory.mkdir(parents=True, exist_ok=True)
    rows = summary(run)
    for name in COPIED:
        if (run.directory / name).is_file():
            shutil.copyfile(run.directory / name, directory / name)
    page.write([run], directory / "report.html", [rows])
    (directory / "results.json").write_text(told.as_json([run], [rows]) + "\n", encoding="utf-8")
    (directory / "badge.svg").write_text(badge(rows), encoding="utf-8")
    (directory / "README.md").write_text(card(run, rows), encoding="utf-8")
    files = sorted(path for path in directory.iterdir() if path.name != SUMS)
    (directory / SUMS).write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in files), encoding="utf-8")
    return directory


def verify(directory: Path) -> list[str]:
    """What is wrong with a bundle, in sentences; nothing for a whole one. Raises UserError for what is no bundle."""
    if not is_bundle(directory):
        raise UserError(
            f"{directory} is no bundle: it has no {SUMS}; `python -m harness publish RUN --to DIR` makes one"
        )
    wrong = _files(directory)
    if wrong:
        return wrong
    run = read_run(directory)
    try:
        (claimed,) = msgspec.json.decode((directory / "results.json").read_bytes(), type=tuple[Claimed])
    except ValueError as error:
        return [f"results.json is not as published: {error}"]
    (found,) = msgspec.json.decode(told.as_json([run], [summary(run)]), type=tuple[Claimed])
    return list(_differences(claimed.rows, found.rows))


def _files(directory: Path) -> list[str]:
    """How the files are not those of the list."""
    listed: dict[str, str] = {}
    for line in (directory / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or not re.fullmatch(r"[\w-][\w.-]*", name):
            return [f"{SUMS} has a line that is no SHA-256 and name of a file: {tables.plain(line)[:80]!r}"]
        listed[name] = digest
    # What begins with a dot is not ours: hubs and Git put such files beside a bundle's own.
    present = {path.name for path in directory.iterdir() if not path.name.startswith(".")} - {SUMS}
    wrong = [f"{name} is missing" for name in ("trials.jsonl", "manifest.json", "results.json") if name not in listed]
    wrong += [f"{name} is missing" for name in sorted(listed.keys() - present)]
    wrong += [f"{tables.plain(name)} is not in {SUMS}" for name in sorted(present - listed.keys())]
    files = sorted(name for name in listed.keys() & present if (directory / name).is_file())
    wrong += [f"{name} is not a file" for name in sorted((listed.keys() & present) - set(files))]
    changed = [name for name in files if _sha256(directory / name) != listed[name]]
    return wrong + [f"{name} has another SHA-256 than {SUMS} says: it was changed" for name in changed]


def _differences(claimed: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> Sequence[str]:
    """Where the numbers are not those that the trials give."""
    if [row.get("method") for row in claimed] != [row["method"] for row in found]:
        return ["results.json has other methods, or another order, than the trials give"]
    return [
        f"results.json says {name} {before.get(name)!r} of {tables.plain(after['method'])}, the trials give {value!r}"
        for before, after in zip(claimed, found, strict=True)
        for name, value in after.items()
        if not _same(before.get(name), value)
    ]


def _same(one: object, two: object) -> bool:
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=CLOSE)
    return one == two


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what people see first --------------------------------------------------------------------------------------------


def card(run: Run, rows: Sequence[Row]) -> str:
    """README, which on the Hugging Face hub is the data set's card."""
    m, where = run.manifest, words.device(run)
    title = f"Speculative decoding: {m.model} on {where}"
    head = [
        "---",
        f"pretty_name: {json.dumps(tables.plain(title), ensure_ascii=False)}",
        "tags: [speculative-decoding, benchmark, spec-harness]",
        "configs:",
        "- config_name: trials",
        "  data_files: trials.jsonl",
        "---",
    ]
    notes = ["**PRELIMINARY**: a small subset, good for a first look."] * m.preliminary
    notes += ["**SYNTHETIC**: random weights, or acceptance that was drawn."] * any(row.synthetic for row in rows)
    sampling = "greedy" if m.temperature == 0 else f"temperature {m.temperature:g}"
    how = (
        f"{m.prompts} prompts from {m.prompt_set}, at most {m.max_new_tokens} new tokens, {sampling}, {m.rounds} "
        f"round{'s' * (m.rounds != 1)}, batch one, {m.created[:10]}."
    )
    text = [
        f"# {tables.markdown_text(tables.plain(title))}",
        "![the answer](badge.svg)",
        *notes,
        *(tables.markdown_text(line) for line in words.answers(rows, where)),
        tables.markdown_text(tables.plain(how)),
        tables.markdown(rows).rstrip(),
        *(f"- {tables.markdown_text(tables.plain(line))}" for line in tables.warnings(run, rows)),
        "`report.html` is the whole page, `trials.jsonl` every trial (a JSON object a line), `manifest.json` the plan, "
        "the host and the versions, `results.json` the numbers of the table.",
        f"To check the files against {SUMS} and the numbers against the trials, and to make the page again:",
        "```sh\npython -m harness verify-bundle .\npython -m harness report . --out ../page.html\n```",
    ]
    return "\n".join(head) + "\n\n" + "\n\n".join(text) + "\n"


def badge(rows: Sequence[Row]) -> str:
    """The fastest method that keeps the target's text, as a badge of two fields."""
    kept = [row for row in rows if row.speedup and row.verdict.kind not in words.UNFAITHFUL]
    best = max(kept, key=lambda row: row.speedup.value if row.speedup else 0.0, default=None)
    if best is None or best.speedup is None:
        right, color = "not measured", draw.MUTED
    else:
        right, color = f"{tables.plain(best.cell.label)} {tables.times(best.speedup.value)}", draw.SERIES[0]
        color = color if best.speedup.value > 1 else draw.SERIES[1]
    if any(row.synthetic for row in rows):
        right, color = f"SYNTHETIC: {right}", draw.MUTED
    left = "speculative decoding"
    ends = [draw.text_width(left) + 14, draw.text_width(right) + 14]
    size = {"width": f"{sum(ends):.0f}", "height": "20", "xmlns": "http://www.w3.org/2000/svg", "role": "img"}
    root = ElementTree.Element("svg", size)
    ElementTree.SubElement(root, "title").text = f"{left}: {right}"
    at = 0.0
    for text, wide, paper in ((left, ends[0], draw.INK), (right, ends[1], color)):
        ElementTree.SubElement(root, "rect", x=f"{at:.1f}", width=f"{wide:.1f}", height="20", fill=paper)
        place = {"x": f"{at + wide / 2:.1f}", "y": "14", "fill": draw.PAPER, "font-family": draw.FONT}
        ElementTree.SubElement(root, "text", place | {"font-size": "11.5", "text-anchor": "middle"}).text = text
        at += wide
    return ElementTree.tostring(root, encoding="unicode") + "\n"
