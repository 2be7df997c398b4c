"""The page: whole, self-contained, honest about what is missing, and deaf to what a model or a prompt says."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from factory import cell, failed, run, trial
from rich.console import Console

from harness.errors import UserError
from harness.metrics import GIB, summary
from harness.results import Cell, Memory, Run, Training, Trial
from harness.stats import PROMPTS_LIKE_THESE
from reports import charts, draw, parts, tables, texts, words
from reports.page import render, write
from reports.tables import markdown, rich_table, table
from reports.texts import token_view
from reports.words import answers, fitting

TIMES = "\N{MULTIPLICATION SIGN}"
HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>{{ 7*7 }}&amp;</style>|`*_"""
SECTIONS = [
    *("Results", "Speed against memory", "Speed-up by category", "Where a pass's time goes", "Memory by its parts"),
    *("Acceptance by depth", "Tokens per pass against speed-up", "What training cost, and gained"),
    *("What was written, pass by pass", "Is it still the target's text?", "Where and how it ran"),
    "How every number is defined",
]


class Page(HTMLParser):
    """Tags with their attributes, text by tag, and that every tag is closed by its own end."""

    VOID = frozenset(("meta", "br", "img", "link", "input"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.captions: list[str] = []
        self.titles: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)
        for tag, kept in (("h2", self.headings), ("figcaption", self.captions), ("title", self.titles)):
            if self.open and self.open[-1] == tag:
                kept.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.text))


def method_run(rounds: int = 3, method_seconds: float = 0.05, **changes: object) -> Run:
    trials = [
        trial(
            cell(name),
            committed,
            seconds * (1 + 0.001 * index),
            round=index,
            prompt_id=prompt,
            category=category,
            token_texts=[f" t{n}" for n in range(sum(committed) + 1)] if index == 0 else None,
            rejected=[[" no", "\n", " never"] for _ in committed] if index == 0 and name != "ar" else None,
            phase_seconds={"draft": 0.01, "verify": 0.2, "host": 0.02},
            memory=Memory(
                peak_allocated_bytes=GIB // 2,
                load_bytes=GIB * 3 // 8,
                weights_bytes=GIB // 4,
                drafter_bytes=0,
                cache_bytes=GIB // 8,
            ),
        )
        for index in range(rounds)
        for prompt, category in (("p0", "writing"), ("p1", "code"))
        for name, committed, seconds in (("ar", [1] * 6, 0.1), ("s3d", [3, 1, 2], method_seconds * 2))
    ]
    return run(*trials, **changes)


def training(**changes: object) -> Training:
    fields = {"method": "s3d", "drafter": "s3d.safetensors", "device": "toy", "tokens_seen": 10, "data_tokens": 10}
    fields |= {"steps": 1, "seconds": 50.0, "shared_seconds": 5.0, "data_seconds": 1.0, "flops": 1e15}
    return Training(**fields | {"parameters": 1000, "file_bytes": 4000, "held_out_tau": 2.5} | changes)


def test_the_sections_stand_in_order() -> None:
    assert Page(render([method_run(training=[training(), training(method="eagle")])])).headings == SECTIONS


def test_the_page_asks_for_nothing_and_runs_only_its_own_script() -> None:
    html = render([method_run(training=[training(), training(method="eagle", held_out_tau=3.0)])])
    page = Page(html)
    (policy,) = (
        attrs["content"] or ""
        for tag, attrs in page.tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base", "image"}
    for _, attrs in page.tags:
        assert not {"src", "srcset", "action", "xlink:href", "style"} & set(attrs)
        assert (attrs.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"@import|https?://(?!www\.w3\.org/2000/svg)", html)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", html))


def test_every_link_leads_somewhere() -> None:
    page = Page(render([method_run(), method_run()]))
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {(attrs["href"] or "")[1:] for _, attrs in page.tags if "href" in attrs} <= ids


def test_every_figure_has_both_intervals_and_the_baseline_its_control() -> None:
    words = Page(render([method_run(rounds=4)])).words
    assert "all prompts" in words
    assert f"{PROMPTS_LIKE_THESE} (bootstrap over prompts)" in words
    assert "the baseline against itself, odd rounds over even ones, is 0.999" in words
    assert "one round, so the baseline cannot be set against itself" in Page(render([method_run(rounds=1)])).words


def hostile_run() -> Run:
    texts = [HOSTILE, "</span></p>", "\x1b[31m", " ok"]
    trials = [
        trial(
            cell(name, label=HOSTILE if name == "s3d" else name, device="cpu"),
            [1, 2] if name == "s3d" else [1, 1, 1],
            prompt_id=f"{HOSTILE}{prompt}",
            category=f"{HOSTILE}{prompt}",
            text="".join(texts),
            token_texts=texts if prompt else None,
            rejected=[[HOSTILE]] * (2 if name == "s3d" else 3),
            phase_seconds={HOSTILE: 0.1},
            device_name=HOSTILE,
        )
        for name in ("ar", "s3d")
        for prompt in (0, 1)
    ]
    return run(
        *trials,
        failed(cell("eagle", label=f"e{HOSTILE}", device="cpu"), "error", HOSTILE),
        model=HOSTILE,
        warnings=[HOSTILE],
        system=HOSTILE,
        command=[HOSTILE],
        prompt_set=HOSTILE,
        host={HOSTILE: {HOSTILE: [HOSTILE]}},
        versions={HOSTILE: HOSTILE},
        training=[training(method=HOSTILE, drafter=HOSTILE, device=HOSTILE), training(method=f"2{HOSTILE}")],
    )


def test_hostile_text_stays_text() -> None:
    page = Page(render([hostile_run()]))
    assert sum(tag == "script" for tag, _ in page.tags) == 1, "the page's own"
    assert not {tag for tag, _ in page.tags} & {"img", "iframe"}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "<script>alert(1)</script>" in page.words
    assert "{{ 7*7 }}" in page.words
    assert "49" not in page.words.split()


def test_hostile_labels_break_no_markdown_table_and_no_terminal() -> None:
    rows = summary(hostile_run())
    lines = markdown(rows).splitlines()
    assert sum(line.startswith("- ") for line in lines) == 1, "the failure, under the table"
    for line in (line for line in lines if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", line)) == len(table(rows)[0]) + 1
    assert not re.search(r"(?<!\\)<", markdown(rows))
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(rich_table(summary(run(trial(cell("s3d", label="[red]\x1b[31mx"))))))
    assert "[red] [31mx" in console.export_text()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_terminal_table_cuts_no_figure(width: int) -> None:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    rows = summary(method_run())
    console.print(rich_table(rows))
    told = console.export_text()
    for figure in ("20.0", f"2.00{TIMES} faster", "2.00", "40.0", "identical"):
        assert figure in told
    assert ("0.500" in told) == (width >= 100), "a narrow terminal leaves peak memory out"


def test_charts_are_images_with_a_name_and_a_description() -> None:
    page = Page(render([method_run(training=[training(), training(method="eagle")])]))
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("class") != "strip"]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(charts) == 6, "two methods with a drafter are needed for the seventh"
    assert len(ids) == len(set(ids))
    for attrs in charts:
        assert attrs["role"] == "img"
        assert set((attrs["aria-labelledby"] or "").split()) <= set(ids)


def test_several_runs_stay_apart_and_share_no_id() -> None:
    page = Page(render([method_run(model="one"), method_run(model="two")]))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert page.headings == ["Leaderboard", *SECTIONS[:-1] * 2, SECTIONS[-1]]


def test_an_empty_section_says_so_in_a_line() -> None:
    words = Page(render([run(failed(cell("s3d")), failed(cell("ar")))])).words
    for line in (
        "no speed-up can be given",
        "No cell has both a speed and a peak memory.",
        "No method drafted anything.",
        "No method has a prompt in common with its baseline.",
        "No drafter in this run records what it cost to train.",
        "No trial holds a text.",
        "out of memory",
    ):
        assert line in words


def test_a_run_of_nothing_renders() -> None:
    assert "No cell was planned" in Page(render([run(rounds=1, host={}, versions={})])).words


@pytest.mark.parametrize("preliminary", [True, False])
def test_the_preliminary_banner_follows_the_manifest(preliminary: bool) -> None:
    assert ("PRELIMINARY" in Page(render([method_run(preliminary=preliminary)])).words) == preliminary


def test_synthetic_trials_are_labelled_and_others_are_not() -> None:
    measured = method_run()
    drawn = [msgspec.structs.replace(each, synthetic=True, drawn_acceptance=[0.7]) for each in measured.rows]
    assert "SYNTHETIC" not in Page(render([measured])).words
    page = Page(render([run(*drawn)]))
    assert all("SYNTHETIC: " in line for line in (*page.captions, *page.titles))
    assert len(page.captions) == 6
    with pytest.raises(UserError, match="never put together"):
        render([run(*drawn[::2], *measured.rows[1::2])])


def test_a_budget_is_answered_over_all_bits() -> None:
    def cells(bits: str, seconds: float, gib: int) -> list[Trial]:
        own = [cell(name, bits=bits, context=512) for name in ("ar", "s3d")]
        return [
            trial(own[0], [1] * 4, 0.1, peak_bytes=gib * 2**30),
            trial(own[1], [2, 2], seconds, peak_bytes=gib * 2**30),
        ]

    eagle = failed(cell("eagle", bits="16", context=512))
    told = summary(run(*cells("16", 0.05, 6), *cells("nf4", 0.12, 2), eagle))
    (line,) = fitting(told, 8 * 2**30)
    assert line == (
        "Within 8 GiB fastest is s3d in 16 bits (40.0 tok/s, peak 6.00 GiB), then s3d in 4 bits (nf4) (16.7 tok/s, "
        "peak 2.00 GiB), then ar in 16 bits (10.0 tok/s, peak 6.00 GiB); 1 of 5 cells do not fit."
    )
    assert fitting(told, None) == []
    (nothing,) = fitting(summary(run(eagle)), 2**30)
    assert nothing == "Within 1 GiB nothing that was planned runs; 1 of 1 cells do not fit."
    page = Page(render([run(*cells("16", 0.05, 6), vram_budget_bytes=8 * 2**30)])).words
    assert "Within 8 GiB fastest is s3d in 16 bits" in page


def test_a_budget_is_answered_without_a_context() -> None:
    (line,) = fitting(summary(run(trial(cell(), [1] * 4))), 2**30)
    assert line == "Within 1 GiB fastest is ar in 32 bits (10.0 tok/s, peak 0.50 GiB); every cell fits."


def test_a_cell_that_did_not_run_is_not_said_to_fit() -> None:
    def line(*trials: Trial) -> str:
        return fitting(summary(run(*trials)), 2**30)[0]

    refused = failed(cell("eagle"), "unsupported", "no trained drafter")
    killed, out = failed(cell("s3d"), "killed", "ended by SIGKILL"), failed(cell("medusa"))
    assert line(refused) == "Within 1 GiB nothing that was planned runs; 1 of 1 cells did not run to the end."
    assert line(trial(cell()), trial(cell("s3d"), prompt_id="p1"), killed).endswith(
        "; 1 of 2 cells did not run to the end."
    )
    assert line(refused, killed, out).endswith("; 1 of 3 cells do not fit; 2 of 3 cells did not run to the end.")


def test_the_longest_context_that_fits_is_told() -> None:
    trials = [trial(cell(name, context=context)) for name in ("ar", "s3d") for context in (1024, 4096)]
    out = failed(cell("s3d", context=16384))
    (line,) = fitting(summary(run(*trials, trial(cell(context=16384)), out)), None)
    assert line == "Longest context, of those tried, that fits: ar in 32 bits 16,384; s3d in 32 bits 4,096."


def test_the_longest_context_is_told_for_each_target() -> None:
    def cells(context: int) -> list[Cell]:
        return [cell(context=context), cell(runtime="graph", context=context), cell(weights="s3d", context=context)]

    (line,) = fitting(
        summary(run(*map(trial, cells(1024)), *map(trial, cells(4096)[:1]), *map(failed, cells(4096)[1:]))), None
    )
    assert line.endswith(
        ": ar in 32 bits, eager 4,096; ar in 32 bits, graph 1,024; ar in 32 bits, weights s3d, eager 1,024."
    )


def test_a_run_of_the_baseline_alone_has_nothing_to_compare() -> None:
    alone = answer(run(trial(cell())))
    assert alone == "In 32 bits on toy, only the baseline was planned: no speed-up can be given."
    assert "no method finished" in answer(run(trial(cell()), failed(cell("s3d"))))


def test_the_answer_gives_the_interval_or_says_that_there_is_none() -> None:
    assert re.search(
        rf"s3d is fastest at 2\.00{TIMES} plain decoding \(95 % interval [\d.]+ to [\d.]+\)",
        answer(method_run()),
    )
    assert f"s3d is fastest at 2.00{TIMES} plain decoding (one round: no interval)" in answer(method_run(rounds=1))


def test_what_is_surely_faster_leads_whatever_ran_ahead_of_it_by_luck() -> None:
    paces = {"ar": (0.1, 0.1, 0.1), "eagle": (0.02, 0.05, 0.13), "s3d": (0.08, 0.079, 0.081)}
    told = answer(
        run(
            *(
                trial(cell(name), [1] * 4, pace[index], round=index)
                for index in range(3)
                for name, pace in paces.items()
            )
        )
    )
    assert f"s3d is fastest at 1.25{TIMES} plain decoding" in told
    assert "level with eagle whose interval overlaps" in told


def test_a_slowdown_is_as_plain_as_a_speedup() -> None:
    slow = method_run(method_seconds=0.2)
    assert f"nothing is faster than plain decoding; s3d comes nearest at 0.50{TIMES}" in answer(slow)
    assert "none gives more tok/s per GiB than plain decoding" in answer(slow)
    assert [each["speed-up (95 %, these prompts, this machine)"][-6:] for each in table(summary(slow))][1] == "slower"
    assert "slower" in Page(render([slow])).words


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(("seconds", "said"), [(0.0998, "leads"), (0.1002, "comes nearest")])
def test_what_reads_as_one_is_neither_faster_nor_slower(rounds: int, seconds: float, said: str) -> None:
    close = method_run(rounds=rounds, method_seconds=seconds)
    assert f"nothing is clearly faster than plain decoding; s3d {said} at 1.00{TIMES}" in answer(close)
    assert "none clearly gives more tok/s per GiB than plain decoding" in answer(close)
    speedups = [each["speed-up (95 %, these prompts, this machine)"] for each in table(summary(close))]
    (told,) = (each for each in speedups if each != "1 by definition")
    assert told.startswith(f"1.00{TIMES}")
    assert "no clear difference" in told
    assert "slower" not in told


def test_a_lossy_or_diverged_method_never_wins_the_headline() -> None:
    fast = trial(cell("medusa"), [2, 2, 2], 0.01, lossless=False)
    diverged = trial(cell("eagle"), [2, 2, 2], 0.02, tokens=[9] * 7)
    told = answer(run(trial(cell("ar"), [1] * 6), trial(cell("s3d"), [3, 3]), fast, diverged))
    assert told.startswith(f"In 32 bits on toy, s3d is fastest at 3.00{TIMES}")
    ahead = f"medusa (20.00{TIMES}) and eagle (10.00{TIMES})"
    assert f"{ahead} ran faster but did not keep the target's text" in told


def test_speed_per_gib_is_left_open_where_memory_does_not_add_up() -> None:
    more = Memory(peak_allocated_bytes=GIB // 2, load_bytes=GIB // 2, weights_bytes=GIB // 4, cache_bytes=GIB // 8)
    trials = method_run().rows
    leaky = [msgspec.structs.replace(one, memory=more) if one.cell.method == "s3d" else one for one in trials]
    assert "it also gives the most tok/s per GiB" in answer(run(*trials))
    assert answer(run(*leaky)).endswith("tok/s per GiB is left open, for memory does not add up (see the warnings).")
    assert "points lie too far to the right" in Page(render([run(*leaky)])).words


def test_commands_in_warnings_are_code_and_what_is_hostile_stays_text() -> None:
    html = render([method_run(warnings=["use `--rounds 4`", f"`{HOSTILE}"])])
    assert "<li>use <code>--rounds 4</code></li>" in html
    assert "<script>alert(1)" not in html
    assert HOSTILE.replace("`", "") in "".join(Page(html).text)


def answer(of: Run) -> str:
    return answers(summary(of), "toy")[0]


def test_the_token_view_tells_drafts_from_the_targets_own_tokens() -> None:
    view = token_view(of := method_run(), summary(of), texts.answers(of))
    assert view is not None
    assert [answer.label for answer in view.prompts[0].answers] == ["s3d", "ar"], "the fastest first"
    passes = view.prompts[0].answers[0].passes
    assert [[token.depth for token in each.tokens] for each in passes] == [[0], [1, 2, 0], [0], [1, 0]]
    assert passes[1].told == "pass 1: 3 tokens; 4 drafted, 2 accepted; rejected: « no» «↵» « never»"
    assert passes[0].told == "the prompt's own pass: 1 token"
    page = Page(render([of]))
    assert [attrs["data-t"] for _, attrs in page.tags if "data-t" in attrs].count(passes[1].told) == 2
    assert "".join(f" t{n}" for n in range(7)) in page.words


def test_a_clipped_pass_has_no_token_of_the_targets_own() -> None:
    clipped = trial(cell("s3d"), [3, 2], accepted=[2, 4], token_texts=list("abcdef"))
    view = token_view(of := run(clipped), summary(of), texts.answers(of))
    assert view is not None
    assert [token.depth for token in view.prompts[0].answers[0].passes[-1].tokens] == [1, 2]


def test_a_divergence_shows_what_was_agreed_and_both_ways_on() -> None:
    pieces = [" a", " b", " c", " d"]
    base = trial(cell("ar"), tokens=[1, 2, 3, 4], token_texts=pieces)
    other = trial(cell("s3d"), tokens=[1, 2, 9, 4], token_texts=[*pieces[:2], " x", " d"])
    (found,) = texts.divergences(summary(of := run(base, other)), texts.answers(of))
    assert (found.position, found.before, found.expected, found.written) == (2, " a b", " c d", " x d")
    assert "after 2 equal tokens" in Page(render([of])).words


def test_texts_that_were_sampled_or_drawn_part_from_nothing() -> None:
    base, other = trial(cell("ar"), tokens=[1, 2, 3, 4]), trial(cell("s3d"), tokens=[1, 2, 9, 4])
    sampled = run(base, other, temperature=1.0)
    drawn = run(*(msgspec.structs.replace(each, synthetic=True, drawn_acceptance=[0.7]) for each in (base, other)))
    assert [texts.divergences(summary(of), texts.answers(of)) for of in (sampled, drawn)] == [[], []]


def test_parts_of_a_pass_add_up_to_its_time() -> None:
    (row,) = summary(run(trial(cell("s3d"), [2, 2], 0.1, phase_seconds={"draft": 0.05, "verify": 0.1})))
    found = parts.phases(row)
    assert found is not None
    assert found["draft"] == pytest.approx(25.0)
    assert sum(found.values()) == pytest.approx(100.0)


def test_parts_of_memory_are_those_of_the_peak() -> None:
    held = Memory(peak_allocated_bytes=4 * GIB, load_bytes=7 * GIB // 2, weights_bytes=2 * GIB, drafter_bytes=GIB)
    (row,) = summary(run(trial(cell("s3d"), memory=msgspec.structs.replace(held, cache_bytes=GIB // 4))))
    found = parts.memory(row)
    assert found == {
        "weights": 2,
        "drafter": 1,
        "KV cache": 0.25,
        "graphs": 0,
        "activations, workspace": 0.5,
        "unattributed": 0.25,
    }
    assert parts.memory(summary(run(trial(cell("s3d"))))[0]) is None


def test_a_peak_has_no_slack_and_every_part_a_colour_of_its_own() -> None:
    held = {"weights": 2.0, "drafter": 0.5, "KV cache": 0.25, "graphs": 0.1, "activations, workspace": 0.1}
    assert words.memory_line({"eagle": held | {"slack": 1.0}}) == "The largest drafter is eagle's, 0.500 of 2.950 GiB."
    assert len(set(draw.PARTS)) == len({*held, "slack", "unattributed"})
    sheet = (Path(charts.__file__).parent / "page.css").read_text()
    for index, color in enumerate(draw.PARTS):
        assert f"--p{index}: {color};" in sheet
        assert f".p{index} {{ color: var(--p{index}); }}" in sheet


def test_a_sentence_about_several_targets_says_which_it_means() -> None:
    pace = {("ar", "16"): 0.1, ("s3d", "16"): 0.11, ("ar", "nf4"): 0.1, ("s3d", "nf4"): 0.3}
    told = [trial(cell(name, bits=bits), [1 if name == "ar" else 2] * 4, at) for (name, bits), at in pace.items()]
    line = words.tau_line(summary(run(*told)))
    assert "A pass of s3d in 16 bits costs 1.10" in line
    assert line.endswith(" s3d in 4 bits (nf4) put fewer tokens in the text per pass than a pass costs, and lose.")
    assert "A pass of s3d costs" in words.tau_line(summary(run(*told[:2])))


def test_a_run_that_took_nothing_apart_has_no_section_for_it() -> None:
    bare = [msgspec.structs.replace(each, phase_seconds=None, memory=None) for each in method_run().rows]
    headings = Page(render([run(*bare)])).headings
    assert not {"Where a pass's time goes", "Memory by its parts"} & set(headings)


def test_an_interval_that_says_nothing_does_not_flatten_the_charts() -> None:
    """Two rounds that contradict each other give ends at thousands of times the value."""
    paces = {"ar": (0.1, 0.2), "s3d": (0.2, 0.1)}
    of = run(*(trial(cell(name), [1] * 4, paces[name][index], round=index) for index in (0, 1) for name in paces))
    (_, row) = summary(of)
    assert row.speedup is not None
    assert row.speedup.high is not None
    assert row.speedup.high > 1000
    chart = charts.tau([row])
    assert chart is not None
    domains = [
        layer["encoding"]["y"]["scale"]["domain"] for layer in draw.spec(chart)["layer"] if "y" in layer["encoding"]
    ]
    assert max(top for _, top in domains) < 5
    strips = [attrs for tag, attrs in Page(render([of])).tags if tag == "rect" and attrs.get("class") == "bar"]
    assert [(attrs["x"], attrs["width"]) for attrs in strips] == [("0.0%", "100.0%")]


def test_names_of_crowded_points_cover_nothing_and_are_tied_to_them() -> None:
    points, names = [(300.0 + 12 * n, 200.0) for n in range(4)], [f"s3d:nodes={n}:tree=dynamic" for n in range(4)]
    ray = draw.text_box(420.0, 204.0, charts.RAY_NAME, "a pass costs 1.5")
    places = draw.label_places(points, names, 980, 380, [ray])
    boxes = [ray, *(draw.text_box(*at, *rest) for at, *rest in zip(points, places, names, strict=True))]
    assert not any(draw._overlap(one, two) for one, two in itertools.combinations(boxes, 2))

    labels = ["s3d", *(f"s3d:nodes={nodes}:tree=dynamic" for nodes in (32, 48, 64))]
    for crowd in (labels[:1], labels):
        of = run(trial(cell()), *(trial(cell("s3d", label=label), [2, 2], 0.08) for label in crowd))
        chart = charts.tau(summary(of))
        assert chart is not None
        assert any("x2" in layer["encoding"] for layer in draw.spec(chart)["layer"]) is (len(crowd) > 1)


def test_parts_keep_their_order_and_lose_what_nobody_sees() -> None:
    bars = {
        "ar": {"weights": 2.0, "drafter": 0.0, "KV cache": 1.0},
        "s3d": {"weights": 2.0, "drafter": 1.0, "dust": 1e-4},
    }
    assert charts.part_names(bars) == ["weights", "drafter", "KV cache"]


def test_the_pareto_front_is_what_nothing_beats_in_speed_and_memory() -> None:
    each = {"a": (0.1, 1), "b": (0.05, 2), "slower": (0.2, 2), "larger": (0.05, 3), "c": (0.02, 4)}
    trials = [trial(cell(name), [1, 1], pace, peak_bytes=size * GIB) for name, (pace, size) in each.items()]
    rows = summary(run(*trials, trial(cell("ar", runtime="graph"), peak_bytes=9 * GIB)))
    assert [row.cell.label for row in rows if row.cell.id in tables.pareto(rows)] == ["a", "b", "c", "ar"]


def test_a_category_counts_its_own_prompts_only() -> None:
    of = run(
        trial(cell("ar"), [1] * 4, 0.1, prompt_id="a", category="code"),
        trial(cell("ar"), [1] * 4, 0.1, prompt_id="b", category="talk"),
        trial(cell("s3d"), [4], 0.2, prompt_id="a", category="code"),
        trial(cell("s3d"), [1] * 4, 0.2, prompt_id="b", category="talk"),
    )
    code, talk = parts.by_category(parts.good_trials(of)[cell("s3d").id], summary(of)[1])
    assert (code.tau, talk.tau) == (4.0, 1.0)
    assert code.speedup is not None
    assert code.speedup.value == pytest.approx(2.0)
    assert talk.decode_tokens_per_second == pytest.approx(5.0)


def test_a_file_without_token_texts_shows_the_text_unshaded() -> None:
    bare = [msgspec.structs.replace(each, token_texts=None) for each in method_run().rows]
    words = Page(render([run(*bare)])).words
    assert "The file does not hold the text of each token" in words
    assert "0 1 2 3" in words


def test_the_token_view_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MOST_TRIALS", 4)
    trials: list[Trial] = [trial(cell("ar", bits=bits), prompt_id=f"p{n}") for bits in ("32", "nf4") for n in range(6)]
    words = Page(render([run(*trials)])).words
    assert "Left out: 2 more prompts (the page shows at most 4 texts and 40,000 tokens)" in words
    assert "and the texts of 4 bits (nf4)" in words


def test_write_leaves_one_whole_file(tmp_path: Path) -> None:
    path = write([method_run()], tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [each.name for each in path.parent.iterdir()] == ["page.html"]


def test_skipped_lines_and_failures_are_told() -> None:
    words = Page(render([run(trial(cell("ar")), failed(cell("ar"), prompt_id="p9"), skipped_lines=2)])).words
    assert "2 lines of trials.jsonl could not be read" in words
    assert "1 of 2 failed: oom" in words


def test_a_cell_without_figures_says_why_everywhere() -> None:
    rows = summary(run(trial(cell("ar")), failed(cell("eagle"), "unsupported", "no trained drafter")))
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(rich_table(rows))
    line = "eagle in 32 bits: unsupported, 1 of 1 trials: no trained drafter"
    assert line in console.export_text()
    assert f"- {line}" in markdown(rows)
    assert table(rows)[1]["identical to the target?"] == "unsupported"


def test_rendering_never_imports_torch() -> None:
    code = (
        "import sys; from factory import cell, run, trial; from reports.page import render; "
        "render([run(trial(cell('ar')), trial(cell('s3d'), [2, 1]))]); "
        "bad = {'torch', 'transformers', 'methods'} & set(sys.modules); assert not bad, bad"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)


def test_reports_import_of_the_harness_only_what_reads_results() -> None:
    allowed = {"results", "metrics", "stats", "errors", "compare", "gates", "doubts", "history", "intervals", "steps"}
    allowed |= {"likeness"}
    for path in (Path(__file__).parents[2] / "reports").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert set(re.findall(r"^\s*(?:from|import) harness\.?(\w*)", source, re.M)) <= allowed
        assert not re.search(r"^\s*(?:from|import) (?:methods|prompts|torch)\b", source, re.M)


def test_a_cell_without_trials_of_a_synthetic_run_is_synthetic() -> None:
    """And stands in one table with the others, whichever is first."""
    of = run(trial(cell("s3d"), synthetic=True), synthetic=True)
    facts = msgspec.structs.replace(of.manifest, cells=[cell("ar"), *of.manifest.cells])
    rows = summary(replace(of, manifest=facts))
    assert [row.synthetic for row in rows] == [True, True]
    for ordered in (rows, rows[::-1]):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(rich_table(ordered))
        assert "32 bits SYNTHETIC" in console.export_text()
