"""The report in a real browser: it sorts, filters and zooms, by mouse, finger and key; it fits a phone and prints."""

import re

import polars as pl
import pytest
from axe_playwright_python.sync_playwright import Axe

from analysis.objectives import Wanted
from analysis.recommend import recommend
from analysis.report import run_page
from analysis.report_page import write_page
from analysis.report_sweep import sweep_page
from analysis.saved import ensure_energy
from analysis.sweep import CELLS, GROUPS, SweepTable, settings_of
from benchmarks.made_runs import Load, make_run
from replay.rundir import Run, write_manifest

pytestmark = pytest.mark.browser
EVIL = '</script><script>alert("x")</script><img src="http://evil.example/a.png" onerror="alert(1)">\'"&<!--{{ 7*7 }}'
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def sweep_report(tmp_path_factory):
    """A page about a made-up sweep of two sizes, with markup in what a sweep's file and its runs say."""
    figures = dict.fromkeys((n for n, dtype in CELLS.items() if dtype.is_numeric()), 1) | {"slo_attainment": 1.0}
    rows = [
        {
            **figures, "cell": f"{tp}-{mhz}-{repeat}", "run": "cells/none", "state": "complete", "standing": "sound",
            "tp": tp, "freq_mhz": mhz, "rate_rps": 1.0, "batch_cap": None, "power_cap_w": None, "repeat": repeat,
            "energy_per_request_j": tp * mhz / 10 + repeat * mhz / 100, "ttft_p99_ms": 1e6 / (tp * mhz),
        }
        for tp in (2, 8) for mhz in (800.0, 1200.0, 1980.0) for repeat in (0, 1)
    ]  # fmt: skip
    failed = {**dict.fromkeys(CELLS), **{n: rows[0][n] for n in ("rate_rps", "freq_mhz", "repeat")}, "tp": 1}
    failed |= {"cell": EVIL, "state": "failed", "why": EVIL, "standing": "missing"}
    groups = [{**row, "group": group} for row in rows for group in ("small", EVIL)]
    cells = pl.DataFrame([{n: row.get(n) for n in CELLS} for row in [failed, *rows]], schema=CELLS)
    grouped = pl.DataFrame([{n: row[n] for n in GROUPS} for row in groups], schema=GROUPS)
    wanted, folder = Wanted(), tmp_path_factory.mktemp("sweep")
    (folder / "plan.toml").write_text(f'mix = "{EVIL}"', encoding="utf-8")
    table = SweepTable(
        folder, True, "virtual", EVIL, "simulated", "label", "gpu", wanted.slo, cells, grouped,
        settings_of(cells, grouped), [(EVIL, "failed", EVIL)], [EVIL],
    )  # fmt: skip
    path = folder / "sweep.html"
    write_page(sweep_page(table, recommend(table, wanted), EVIL), path)
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page about two runs, one of which has markup wherever a run can bring a text of its own."""
    folder = tmp_path_factory.mktemp("report")
    made = [make_run(folder / f"run-{law}", Load(duration_s=30.0, law=law)) for law in ("soft", "kink")]
    verdicts = [{"name": EVIL, "ok": False, "value": EVIL, "bound": None, "why": EVIL}]
    instances = [{**made[1].manifest["instances"][0], "model": EVIL}]
    write_manifest(made[1].path, {**made[1].manifest, "verdicts": verdicts, "instances": instances})
    hostile = made[1].path.rename(folder / "<img src=x onerror=alert(1)>")
    runs = [made[0], Run.open(hostile)]
    path = folder / "report.html"
    write_page(run_page(runs, [ensure_energy(run) for run in runs], EVIL), path)
    return path


def column(page, table, name):
    """The cells of a table's column, from the top down, without those of rows that are hidden."""
    headings = [text.strip() for text in table.locator("thead th").all_inner_texts()]
    rows = table.locator("tbody tr:visible").all()
    return [row.locator("td").nth(headings.index(name)).inner_text() for row in rows]


def numbers(texts):
    return [float(text.replace(",", "")) for text in texts if text != "-"]


def view(page):
    """Where the first timeline's view begins and ends, s."""
    group = page.locator(".zoom").first
    return tuple(float(group.get_attribute(f"data-{edge}")) for edge in ("from", "until"))


def test_markup_from_a_run_is_text_in_the_browser_too(opened, report):
    with opened(report) as page:
        assert page.title() == EVIL
        assert EVIL in page.inner_text("h1")
        assert page.locator("img").count() == 0
        assert page.evaluate("[...document.querySelectorAll('script:not([type])')].length") == 1


def test_a_sweeps_settings_sort_and_filter(opened, sweep_report):
    with opened(sweep_report) as page:
        assert EVIL in page.inner_text("#answer ~ section >> nth=-1"), "the plan, as text"
        table = page.get_by_role("table", name="Every setting", exact=True)
        table.get_by_role("columnheader", name="J/request").get_by_role("button").click()
        found = numbers(column(page, table, "J/request"))
        assert found == sorted(found)
        assert column(page, table, "J/request")[-1] == "-", "what has no figure stands last"
        page.get_by_role("searchbox", name="Filter rows of Every setting", exact=True).fill("1980")
        assert set(column(page, table, "MHz")) == {"1980"}
        assert sorted(column(page, table, "TP")) == ["2", "8"]


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 900}, PHONE], ids=["desktop", "phone"])
def test_a_sweeps_page_fits_and_is_read_by_a_screen_reader(opened, sweep_report, viewport):
    with opened(sweep_report, viewport=viewport) as page:
        found = Axe().run(page, context={"exclude": [["svg"]]})
        assert found.violations_count == 0, found.generate_report()
        page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]


def test_a_script_that_slips_in_is_not_run(opened, report, tmp_path):
    opening = "<header>"
    slipped = report.read_text(encoding="utf-8").replace(opening, f"<script>document.title = 'ran'</script>{opening}")
    path = tmp_path / "slipped.html"
    path.write_text(slipped, encoding="utf-8")
    with pytest.raises(AssertionError, match="Content Security Policy"), opened(path) as page:
        assert page.title() == EVIL


def test_headings_sort_by_key_and_say_so(opened, report):
    with opened(report) as page:
        table = page.locator("table.sorts").first
        heading = table.get_by_role("columnheader", name="J/request")
        heading.get_by_role("button").focus()
        page.keyboard.press("Enter")
        up = numbers(column(page, table, "J/request"))
        assert heading.get_attribute("aria-sort") == "ascending"
        assert up == sorted(up)
        page.keyboard.press("Enter")
        assert heading.get_attribute("aria-sort") == "descending"
        assert numbers(column(page, table, "J/request")) == up[::-1]
        table.get_by_role("columnheader", name="size").get_by_role("button").click()
        names = column(page, table, "size")
        assert names == sorted(names)
        assert heading.get_attribute("aria-sort") is None
        assert len(set(up)) > 2


def test_words_filter_rows(opened, report):
    with opened(report) as page:
        table = page.locator("table.sorts").first
        before = column(page, table, "size")
        box = page.get_by_role("searchbox", name="Filter rows of By size of request")
        box.fill("sm RUN-soft")
        assert column(page, table, "size") == ["SM"]
        assert page.get_by_text(f"1 of {len(before)} rows").is_visible()
        box.fill("nothing has this")
        assert column(page, table, "size") == []
        box.fill("")
        assert column(page, table, "size") == before


def test_the_timeline_zooms_by_button_and_key(opened, report):
    with opened(report) as page:
        whole = view(page)
        group = page.locator(".zoom").first
        group.get_by_role("button", name="Zoom in").click()
        half = view(page)
        assert half[1] - half[0] == pytest.approx((whole[1] - whole[0]) / 2)
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert view(page) == pytest.approx((0.0, half[1] - half[0])), "the view stops at the window's start"
        page.keyboard.press("-")
        page.keyboard.press("-")
        assert view(page) == pytest.approx(whole), "nor is there anything beyond it"
        group.get_by_role("button", name="Busiest seconds").click()
        shown = view(page)
        assert shown[1] - shown[0] == pytest.approx(3.0)
        said = group.locator("output").inner_text()
        assert re.search(r"mean [\d,]+ W, at most \d+ requests, [\d,]+ engine steps", said), said
        page.keyboard.press("Home")
        assert view(page) == pytest.approx(whole)


def test_the_timeline_zooms_to_what_a_mouse_marks(opened, report):
    with opened(report) as page:
        whole, canvas = view(page), page.locator(".zoom canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        at = [box["x"] + share * box["width"] for share in (0.4, 0.6)]
        page.mouse.move(at[0], box["y"] + 80)
        page.mouse.down()
        page.mouse.move(at[1], box["y"] + 80, steps=4)
        page.mouse.up()
        marked = view(page)
        assert 0.1 < (marked[1] - marked[0]) / (whole[1] - whole[0]) < 0.3
        assert whole[0] < marked[0] < marked[1] < whole[1]
        canvas.dblclick()
        assert view(page) == pytest.approx(whole)


def test_the_timeline_zooms_by_two_fingers_and_moves_by_one(opened, report):
    with opened(report, viewport=PHONE, has_touch=True, is_mobile=True) as page:
        whole, canvas = view(page), page.locator(".zoom canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        y, touch = box["y"] + 100, page.context.new_cdp_session(page)

        def fingers(kind, *xs):
            points = [{"x": box["x"] + x, "y": y, "id": i} for i, x in enumerate(xs)]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        fingers("touchStart", 120, 180)
        for spread in (10, 20, 30):
            fingers("touchMove", 120 - spread, 180 + spread)
        fingers("touchEnd")
        near = view(page)
        assert (near[1] - near[0]) / (whole[1] - whole[0]) == pytest.approx(0.5, abs=0.15), "twice as far apart"
        fingers("touchStart", 200)
        for x in (180, 160, 140):
            fingers("touchMove", x)
        fingers("touchEnd")
        assert view(page)[0] > near[0], "pushed to the left, later is seen"
        assert view(page)[1] - view(page)[0] == pytest.approx(near[1] - near[0])


def test_nothing_is_wider_than_a_phone(opened, report):
    with opened(report, viewport=PHONE, has_touch=True, is_mobile=True) as page:
        page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        assert page.locator(".scroll[tabindex='0']").count() > 0, "what scrolls is reached by keys"


def test_print_has_the_drawn_figures_and_none_of_the_controls(opened, report):
    with opened(report) as page:
        assert page.locator(".zooms .still").first.is_hidden()
        page.emulate_media(media="print")
        assert page.locator(".zooms .still").first.is_visible()
        assert page.locator(".zoom").first.is_hidden()
        assert page.locator(".filter").first.is_hidden()
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_without_scripts_the_page_is_whole(opened, report):
    with opened(report, java_script_enabled=False) as page:
        assert page.locator(".zooms .still").first.is_visible()
        assert page.locator(".zoom").first.is_hidden()
        assert page.locator("table.sorts").first.is_visible()


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 900}, PHONE], ids=["desktop", "phone"])
def test_a_screen_reader_finds_its_way(opened, report, viewport):
    with opened(report, viewport=viewport) as page:
        # WCAG 2 A and AA and best practices, as https://github.com/dequelabs/axe-core has them; of a drawn figure
        # its label is what is read.
        found = Axe().run(page, context={"exclude": [["svg"]]})
        assert found.violations_count == 0, found.generate_report()
        assert page.get_by_role("main").count() == page.get_by_role("heading", level=1).count() == 1
        assert page.get_by_role("navigation", name="Contents").get_by_role("link").count() > 4
