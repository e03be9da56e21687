"""The report on a sweep: the answer first, how sure, what is missing, and how to do it again."""

import re

import pytest

from analysis.objectives import Wanted, parse_wanted
from analysis.recommend import recommend
from analysis.report_page import render_page
from analysis.report_sweep import sweep_page

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'


def page_of(table, wanted=None, pairs=lambda a, b, group: "none"):
    return sweep_page(table, recommend(table, wanted or Wanted(), pairs=pairs), "A title")


def two_clocks(table_of, *, apart=20.0, **change):
    cells = [
        {"freq_mhz": clock, "repeat": repeat, "energy_per_request_j": 100.0 + k * apart + repeat * (1 + k), **change}
        for k, clock in enumerate((1200.0, 1980.0))
        for repeat in range(3)
    ]
    return table_of(cells, [{**cell, "group": "SS"} for cell in cells])


def test_the_answer_stands_first_and_says_what_it_saves(table_of):
    page = page_of(two_clocks(table_of))
    assert page.answer[0].text.startswith("At 1 requests/s: TP2 1200 MHz, ")
    assert "1980 MHz" in page.answer[0].more
    assert "Saves 17.2 %" in page.answer[0].more
    html = render_page(page)
    body = html[html.index("<main>") :]
    assert body.index("TP2 1200 MHz") < body.index("<svg")


def test_settings_that_data_does_not_tell_apart_have_no_winner(table_of):
    page = page_of(two_clocks(table_of, apart=0.0))
    assert page.answer[0].text.startswith("Not enough data to name a winner at 1 requests/s")


def test_simulated_is_said_at_the_top_and_with_each_figure(table_of):
    html = render_page(page_of(two_clocks(table_of)))
    top = html.index("SIMULATED: no GPU was measured")
    assert top < html.index("<main>")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html, re.DOTALL)
    assert len(captions) > 2
    assert all("SIMULATED" in caption for caption in captions)


def test_what_is_missing_is_told_above_the_answer_and_with_its_reason(table_of):
    cells = [{"tp": 2}, {"tp": 1, "standing": "missing", "state": "failed", "why": "does not fit", "served": None}]
    html = render_page(page_of(table_of(cells)))
    assert html.index("1 setting missing") < html.index('id="answer"')
    assert "does not fit" in html


def test_markup_in_names_and_reasons_stays_text(table_of):
    cells = [{"tp": 2}, {"tp": 4, "standing": "missing", "state": "failed", "why": EVIL, "cell": EVIL}]
    table = table_of(cells, [{"tp": 2, "group": EVIL}], by="label")
    html = render_page(page_of(table))
    assert html.count("<script") == 1, "the page's own"
    assert "<img" not in html


def test_the_commands_ask_the_same_again(table_of):
    wanted = parse_wanted("ttft:100,200,300,tbt:50,tbt_p99:80", 0.9)
    table = two_clocks(table_of)
    found = recommend(_asked(table, wanted), wanted, pairs=lambda a, b, group: "none")
    text = "\n".join(sweep_page(found.table, found, "t").sections[-1].commands)
    assert "--slo ttft:100,200,300,tbt:50,tbt_p99:80 --attainment 0.9 --objective energy" in text
    assert parse_wanted(re.search(r"--slo (\S+)", text)[1], 0.9) == wanted


def _asked(table, wanted):
    from dataclasses import replace

    return replace(table, slo=wanted.slo)


def test_a_simulated_sweeps_page_shows_where_the_joules_went(sweep_dir, cli, tmp_path):
    (sweep_dir / "plan.toml").write_text(f'mix = "chat"  # {EVIL}\n')
    code, out, err = cli("report", str(sweep_dir), "-o", str(tmp_path / "r.html"), "--slo", "ttft:9s,tbt:9s")
    assert (code, "wrote" in out) == (0, True), err
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    for heading in (
        "How sure",
        "Where the joules went",
        "Every setting",
        "Whether to trust the runs",
        "How to repeat it",
    ):
        assert f">{heading}</h2>" in html
    assert "replay sweep --plan plan.toml -o DIR" in html
    assert html.count("<script>") == 1


@pytest.mark.parametrize("others", [1, 2])
def test_a_sweep_is_reported_on_alone(sweep_dir, cli, tmp_path, others):
    code, _, err = cli("report", *[str(sweep_dir)] * (others + 1), "-o", str(tmp_path / "r.html"))
    assert code == 2
    assert "is a sweep; a report is about one sweep or about runs" in err
    assert not (tmp_path / "r.html").exists()
