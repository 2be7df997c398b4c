"""A run's charts and tables as files of their own: SVG and PNG; Markdown, LaTeX (booktabs), CSV and Parquet."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from harness.metrics import Row, trial_frame
from harness.results import Run
from reports import draw, page, rounds, tables, told, words

NO_PARQUET = "no Parquet: it needs pyarrow; `pip install 'spec-harness[parquet]'` and export again"
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "τ": r"$\tau$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{EN DASH}": "--",
    "…": r"\ldots{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}


def export(run: Run, rows: Sequence[Row], directory: Path) -> list[str]:
    """Write everything into `directory`; what could not be written, in sentences."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures(run, rows, directory)
    (directory / "results.md").write_text(tables.markdown(rows), encoding="utf-8")
    if told_rounds := rounds.markdown(rows):
        (directory / "rounds.md").write_text(told_rounds, encoding="utf-8")
    (directory / "results.tex").write_text(latex(rows, run), encoding="utf-8")
    parquet = importlib.util.find_spec("pyarrow") is not None
    for name, frame in frames(run, rows).items():
        frame.to_csv(directory / f"{name}.csv", index=False)
        if parquet:
            frame.to_parquet(directory / f"{name}.parquet", index=False)
    return [] if parquet else [NO_PARQUET]


def pictures(run: Run, rows: Sequence[Row], directory: Path) -> None:
    """Each chart of the page as SVG and PNG, on white."""
    drawn, _ = page.drawings(run, rows)
    for name, (title, chart, takeaway) in drawn.items():
        if chart is not None:
            picture = draw.alone(draw.svg(chart, name, title, takeaway()))
            (directory / f"{name}.svg").write_text(picture, encoding="utf-8")
            (directory / f"{name}.png").write_bytes(draw.png(chart))


def frames(run: Run, rows: Sequence[Row]) -> dict[str, pd.DataFrame]:
    """Numbers, not texts: `results`, `categories` and `acceptance` by cell, and every trial."""
    named = [(told.numbers(row), row) for row in rows]
    cells = [({name: each[name] for name in ("method", "bits", "weights", "runtime")}, row) for each, row in named]
    categories = [
        cell | {"category": part.category, "prompts": part.prompts} | told.interval("speedup", part.speedup)
        for cell, row in cells
        for part in row.speedup_by_category
    ]
    acceptance = [
        cell | {name: getattr(depth, name) for name in ("depth", "passes", "drafted", "reached", "accepted")}
        for cell, row in cells
        for depth in row.acceptance
    ]
    trials = trial_frame(run)
    return {
        "results": pd.DataFrame([each for each, _ in named]),
        "categories": pd.DataFrame(categories),
        "acceptance": pd.DataFrame(acceptance),
        "trials": trials,
    }


def latex(rows: Sequence[Row], run: Run) -> str:
    r"""A `table` for a paper that uses \usepackage{booktabs}: a rule between targets, the baseline in its place."""
    groups = tables.grouped(rows)
    headers = ["method", "tok/s", "speed-up", "95 % interval", "τ", "peak GiB", "tok/s per GiB", "the target's text"]
    width = len(headers)
    body = []
    for target, group in groups:
        body.append(rf"\multicolumn{{{width}}}{{l}}{{\textit{{{_tex(target)}}}}} \\")
        body += [" & ".join(map(_tex, _latex_cells(row))) + r" \\" for row in group]
        body.append(r"\midrule")
    m = run.manifest
    rounds = f"{run.measured_rounds} round{'s' * (run.measured_rounds != 1)}"
    how = f"{m.prompts} prompts ({m.prompt_set}), {m.max_new_tokens} new tokens, {rounds}, batch one"
    caption = f"{m.model} on {words.device(run)}; {how}. Speed-up: over autoregressive decoding through the same loop."
    synthetic = " SYNTHETIC: random weights, or acceptance that was drawn." * any(row.synthetic for row in rows)
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        rf"\caption{{{_tex(tables.plain(caption + synthetic))}}}",
        r"\begin{tabular}{lrrlrrrl}",
        r"\toprule",
        " & ".join(map(_tex, headers)) + r" \\",
        r"\midrule",
        *body[:-1],
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cells(row: Row) -> list[str]:
    one = "1 by definition" if row.is_baseline else tables.NOTHING
    return [
        tables.method(row),
        tables.number(row.decode_tokens_per_second, 1),
        tables.times(row.speedup.value) if row.speedup else one,
        tables.span(row.speedup).strip("()"),
        tables.number(row.tau, 2),
        tables.number(tables.gib(row.peak_bytes), 3),
        tables.number(row.tokens_per_second_per_gib, 1),
        tables.verdict(row),
    ]


def _tex(text: str) -> str:
    """Text that TeX sets as it stands."""
    return re.sub(".", lambda found: _LATEX.get(found[0], found[0]), text)
