"""The page in a browser: it sorts, filters and explains, asks nothing of anybody, and shuts nobody out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chromium
import msgspec
import pytest
from axe_playwright_python.sync_playwright import Axe
from factory import cell, failed, run, trial

from harness.history import Point, Series
from harness.metrics import GIB
from harness.results import Memory, Run, Training
from reports import timeline
from reports.page import write

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

TIMES = "\N{MULTIPLICATION SIGN}"
HOSTILE = """<script>hacked=1</script>"'><img src=x onerror=hacked=2><svg onload=hacked=3>"""
METHODS = {"ar": ([1] * 6, 0.1), "s3d": ([3, 1, 2], 0.15), "eagle": ([2, 2, 2], 0.12)}
TRAINING: dict[str, Any] = {"device": "toy", "tokens_seen": 10**6, "data_tokens": 10, "steps": 1, "seconds": 50.0}
TRAINING |= {"shared_seconds": 5.0, "data_seconds": 1.0, "flops": 1e15, "parameters": 10**6, "file_bytes": 4 * 10**6}


def full_run() -> Run:
    """Two targets, two runtimes, two categories, three rounds; every section has something to show."""
    trials = [
        trial(
            cell(name, bits=bits, runtime=runtime),
            committed,
            seconds * (1 + 0.01 * index) * (1.5 if category == "code" and name == "s3d" else 1),
            round=index,
            prompt_id=prompt,
            category=category,
            tokens=[*range(6), 99 if name == "eagle" else 6],
            token_texts=[HOSTILE if prompt == "p1" and n == 3 else f" t{n}" for n in range(7)],
            rejected=[[" no", " never"]] * len(committed) if name != "ar" else None,
            phase_seconds={"draft": 0.02, "verify": 0.2, "commit": 0.01, "host": 0.03},
            memory=Memory(
                peak_allocated_bytes=GIB + peak,
                peak_reserved_bytes=GIB + 2 * peak,
                load_bytes=GIB * 5 // 8 + peak // 2,
                weights_bytes=GIB // 2,
                drafter_bytes=peak // 2,
                cache_bytes=GIB // 8,
            ),
        )
        for bits, runtime in (("32", "eager"), ("nf4", "graph"))
        for index in range(3)
        for prompt, category in (("p0", "writing"), ("p1", "code"))
        for peak, (name, (committed, seconds)) in zip((0, 10**7, 10**8), METHODS.items(), strict=True)
    ]
    return run(
        *trials,
        failed(cell("medusa", label=f"medusa{HOSTILE}"), reason=HOSTILE),
        training=[Training(method=name, drafter=f"{name}.safetensors", **TRAINING) for name in ("s3d", "eagle")],
        warnings=[HOSTILE],
        preliminary=True,
        rounds=3,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.browser() as running:
        yield running


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write([full_run()], tmp_path_factory.mktemp("page") / "page.html").as_uri()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with visit(browser, address) as opened:
        yield opened


@contextmanager
def visit(browser: Browser, address: str) -> Iterator[Page]:
    """A page, opened; at the end nothing has gone wrong and nothing else was asked for."""
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        opened = context.new_page()
        wrong: list[str] = []
        asked: list[str] = []
        opened.on("console", lambda message: wrong.append(message.text))
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(address)
        yield opened
        assert wrong == []
        assert asked == [address]


def test_a_history_obeys_its_own_policy_and_is_drawn(browser: Browser, tmp_path: Path) -> None:
    points = [Point(f"r{day}", f"2026-11-{day:02}", f"{day:07x}", 2.0 + day / 9, None, None, False) for day in (1, 2)]
    path = timeline.write([Series("tau", HOSTILE, "16", "", tuple(points))], tmp_path / "history.html")
    with visit(browser, path.as_uri()) as opened:
        assert "unsafe" not in opened.locator("meta[http-equiv]").get_attribute("content")
        assert opened.locator("figure svg").bounding_box()["width"] > 300
        assert opened.locator("body").evaluate("body => getComputedStyle(body).margin") == "0px", "the style is applied"
        assert opened.evaluate("() => window.hacked") is None


def methods(page: Page) -> list[list[str]]:
    """Of the results table, the methods shown, target by target."""
    return page.evaluate(
        """[...document.querySelectorAll("table.results tbody")].map(body => [...body.rows]
        .filter(row => !row.classList.contains("target") && row.checkVisibility())
        .map(row => row.cells[0].firstChild.textContent.trim().slice(0, 6)))"""
    )


def choice(page: Page, name: str) -> Locator:
    return page.locator(f"form.filters [data-filter={name}]")


def test_a_heading_sorts_within_each_target_and_says_so(page: Page) -> None:
    assert methods(page) == [["eagle", "s3d", "ar", "medusa"], ["eagle", "s3d", "ar"]], "the fastest first"
    head = page.locator("table.results thead th", has_text="peak")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending", "less memory is better"
    assert methods(page) == [["ar", "s3d", "eagle", "medusa"], ["ar", "s3d", "eagle"]], "no value comes last"
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert methods(page) == [["eagle", "s3d", "ar", "medusa"], ["eagle", "s3d", "ar"]]
    page.get_by_role("button", name="method", exact=True).click()
    assert head.get_attribute("aria-sort") is None
    assert methods(page)[1] == ["ar", "eagle", "s3d"]


def test_filters_leave_what_was_asked_for(page: Page) -> None:
    told = page.locator("form.filters output")
    assert told.text_content() == "7 of 7 rows"
    choice(page, "method").fill("EA")
    assert methods(page) == [["eagle"], ["eagle"]]
    choice(page, "runtime").select_option("graph")
    assert methods(page) == [[], ["eagle"]]
    assert told.text_content() == "1 of 7 rows"
    choice(page, "method").fill("")
    choice(page, "runtime").select_option("all")
    choice(page, "bits").select_option("32 bits")
    assert len(methods(page)[0]) == 4
    assert methods(page)[1] == []


def test_a_category_has_its_own_numbers(page: Page) -> None:
    row = "table.results tbody:first-of-type tr:visible:has-text('s3d')"
    assert page.locator(row).locator("td").nth(1).text_content() == f"1.07{TIMES}"
    choice(page, "category").select_option("code")
    assert page.locator(row).locator("td").nth(1).text_content() == f"0.89{TIMES}"
    choice(page, "category").select_option("writing")
    assert page.locator(row).locator("td").nth(1).text_content() == f"1.33{TIMES}"
    assert len(methods(page)[0]) == 3, "what failed has no category"


def test_pointing_at_a_pass_tells_what_was_drafted_and_rejected(page: Page) -> None:
    text, tip = page.get_by_role("group", name="text of s3d, pass by pass").first, page.locator("#tip")
    assert tip.is_hidden()
    text.locator("span").nth(1).hover()
    assert tip.text_content() == "pass 1: 3 tokens; 4 drafted, 2 accepted; rejected: « no» « never»"
    assert tip.is_visible()
    page.mouse.move(0, 0)
    assert tip.is_hidden()
    shades = text.locator("span").nth(1).locator("i").evaluate_all("all => all.map(i => i.className)")
    assert shades == ["d1", "d2"], "two accepted drafts; the third token is the target's own"


def test_a_text_is_read_pass_by_pass_with_the_keyboard(page: Page) -> None:
    text, tip = page.get_by_role("group", name="text of eagle, pass by pass").first, page.locator("#tip")
    text.focus()
    for key, told in (("ArrowRight", "the prompt"), ("ArrowRight", "pass 1:"), ("End", "pass 3:"), ("Home", "the pr")):
        page.keyboard.press(key)
        assert (tip.text_content() or "").startswith(told)
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_the_same_text_of_all_methods_stands_side_by_side(page: Page) -> None:
    tops = page.locator("details:has(.answers)[open] .said").evaluate_all("all => all.map(a => a.offsetTop)")
    assert len(tops) == 3
    assert len(set(tops)) == 1


def test_hostile_text_stays_text(page: Page) -> None:
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("p.tokens", has_text="<script>hacked=1</script>").count() == 3
    assert page.locator("ul.warnings", has_text=HOSTILE).count() == 1
    assert page.locator("script").count() == 1


def test_the_policy_stops_what_would_slip_in(browser: Browser, address: str) -> None:
    with browser.new_context() as context:
        opened = context.new_page()
        opened.goto(address)
        opened.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", HOSTILE + "<b style=color:red>b")
        opened.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 4'}))")
        opened.wait_for_timeout(50)
        assert opened.evaluate("typeof hacked") == "undefined"
        assert opened.locator("b").last.evaluate("b => getComputedStyle(b).color") != "rgb(255, 0, 0)"


def test_in_the_dark_nothing_is_drawn_for_the_light(page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(20, 23, 27)"
    inks = page.locator("figure svg text").evaluate_all("all => all.map(t => getComputedStyle(t).fill)")
    assert len(inks) > 50
    assert "rgb(31, 35, 40)" not in inks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    assert serious(page) == []


def test_several_runs_share_a_page_that_shuts_nobody_out(browser: Browser, tmp_path: Path) -> None:
    one = full_run()
    other = Run(one.directory, msgspec.structs.replace(one.manifest, model="larger"), one.rows, 0)
    with browser.new_context() as context:
        opened = context.new_page()
        opened.goto(write([one, other], tmp_path / "page.html").as_uri())
        assert opened.get_by_text("NOT COMPARABLE").is_visible()
        opened.locator("#r1-table thead button").first.click()
        assert opened.locator("#r0-table [aria-sort]").count() == 0, "each run's table is sorted by itself"
        assert opened.locator("#r1-table [aria-sort]").count() == 1
        assert serious(opened) == []


def serious(page: Page) -> list[tuple[str, str]]:
    """What axe finds that shuts somebody out, with a place each."""
    found = [each for each in Axe().run(page).response["violations"] if each["impact"] in ("serious", "critical")]
    return [(each["id"], each["nodes"][0]["html"][:90]) for each in found]


def test_it_prints_on_light_paper_without_what_only_a_screen_can_do(page: Page) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").first.is_hidden()
    assert page.locator("form.filters").is_hidden()
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF-")
    assert pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") + pdf.count(b"/Type /Page/") >= 3


def test_a_telephone_scrolls_one_way_only(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    shown = page.get_by_role("group", name="text of s3d, pass by pass").first.locator("span").last
    shown.hover()
    tip, box = page.locator("#tip").bounding_box(), shown.bounding_box()
    assert tip is not None
    assert box is not None
    assert tip["y"] + tip["height"] <= box["y"] or tip["y"] >= box["y"] + box["height"], "the note hides no text"
    assert tip["x"] >= 0
    assert tip["x"] + tip["width"] <= 360


def test_without_scripts_the_page_only_stands_still(browser: Browser, address: str) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        opened = context.new_page()
        opened.goto(address)
        assert opened.locator("form.filters").is_hidden()
        assert opened.locator("table.results tbody tr:visible").count() == 9
        assert opened.locator("table.results thead button").count() == 0
