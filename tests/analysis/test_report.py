"""The report stands alone, says what it is, and lets no text of a run become markup."""

from dataclasses import replace
from html.parser import HTMLParser

import polars as pl
import pytest

from analysis.report import headlines, run_page, subjects_of
from analysis.report_page import render_page, write_page
from analysis.saved import ensure_energy
from tracegen.errors import AnalysisError

FETCHING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """What a browser would make of a page: tags, what they fetch, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetches: list[str] = []
        self.labels: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name.startswith("on"):
                self.handlers.append(f"{tag} {name}={value}")
            if name in FETCHING and value and not value.startswith(("#", "data:")):
                self.fetches.append(f"{tag} {name}={value}")
            if name == "aria-label" and dict(attrs).get("role") == "img" and tag == "div":
                self.labels.append(value)

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def rendered(*runs, title="A title") -> str:
    return render_page(page_of(*runs, title=title))


def page_of(*runs, title="A title"):
    return run_page(runs, [ensure_energy(run) for run in runs], title)


def test_the_page_fetches_nothing(run_of):
    html = rendered(run_of())
    page = Page(html)
    assert page.fetches == []
    assert not {"link", "iframe", "img", "object"} & set(page.tags)
    assert "default-src 'none'" in html, "nor may it"
    assert "@import" not in html
    assert "url(http" not in html.replace(" ", "")
    assert len(html) < 5_000_000


def test_every_figure_has_words_and_numbers_behind_it(run_of):
    page = Page(rendered(run_of("a"), run_of("b", seed=4)))
    figures = page.tags.count("figure")
    assert figures == 7  # joules, twice power and close-up, buckets, latency
    assert len(page.labels) == figures
    assert page.tags.count("details") == figures
    assert page.tags.count("svg") == figures


def test_simulated_is_said_on_its_face_and_only_where_it_is_so(run_of, rewrite):
    simulated = run_of("made-up")
    measured = rewrite(run_of("metered"), {"engine": "vllm"})
    assert "SIMULATED: no GPU was measured" in Page(rendered(simulated)).text
    assert "SIMULATED in part: made-up" in Page(rendered(simulated, measured)).text
    assert "SIMULATED" not in Page(rendered(measured)).text


def test_failed_verdicts_and_doubts_stand_above_the_answer(run_of, rewrite):
    run = run_of()
    assert "verdict of its own" not in Page(rendered(run)).text
    late = {"name": "dispatch_lag", "ok": False, "value": 33.25, "bound": 10.0, "why": "p99 33.25 ms after schedule"}
    agree = {"name": "counter_agrees", "ok": True, "value": 0.0123, "bound": 0.05, "why": ""}
    high = {"counter": 300.0, "instant": 300.0}
    gpus = [{**gpu, "idle_power_w": high} for gpu in run.manifest["gpus"]]
    text = Page(rendered(rewrite(run, {"verdicts": [late, agree], "gpus": gpus}))).text
    failed, doubt, answer = (
        text.index(said)
        for said in (
            "run failed 1 verdict of its own: dispatch_lag (p99 33.25 ms after schedule)",
            "run: the attribution is in doubt, by more than 5 % of the measured energy: ",
            "A request cost",
        )
    )
    assert failed < doubt < answer
    assert "idle_drift (" in text[doubt:answer]
    assert "33.25 ms 10 ms" in text, "value and bound of a verdict have units"
    assert "1.23 % 5 %" in text


def test_hostile_texts_stay_texts(run_of, rewrite):
    evil = '<script>alert("x")</script><img src="http://evil.example/a.png">'
    run = run_of("plain")
    verdicts = [{"name": evil, "ok": False, "value": evil, "bound": None, "why": evil}]
    run = rewrite(run, {"verdicts": verdicts, "instances": [{**run.manifest["instances"][0], "model": evil}]})
    hostile = run.path.rename(run.path.with_name("<img src=x onerror=alert(1)>&amp;"))
    page = Page(rendered(type(run).open(hostile), title=evil))
    assert page.tags.count("script") == 2, "the zoom's data and the page's own"
    assert "img" not in page.tags
    assert page.handlers == []
    assert page.fetches == []
    assert 'alert("x")' in page.text
    assert "failed" in page.text


def test_headlines_follow_from_the_tables(run_of):
    run = run_of()
    known = ensure_energy(run)
    text = " ".join(headlines(subjects_of([run], [known])))
    mean_j = known.requests["energy_j"].mean()
    assert f"A request cost {mean_j:.3g} J on average" in text
    share = known.requests["prefill_j"].sum() / known.requests["energy_j"].sum()
    assert f"{100 * share:.1f} % of it prefill" in text


def test_two_runs_are_compared_in_the_headline(run_of):
    a, b = run_of("a"), run_of("b", law="soft")
    dear = ensure_energy(a)
    summary = dear.summary | {"measured_j": 1.5 * dear.summary["measured_j"]}
    dear = replace(dear, requests=dear.requests.with_columns(pl.col("energy_j") * 1.5), summary=summary)
    text = " ".join(headlines(subjects_of([a, b], [dear, ensure_energy(b)])))
    assert "b used least" in text
    assert "one run each, with 95 % intervals: J/request" in text


def test_runs_that_cannot_be_told_apart_are_not_ranked(run_of):
    for other in ({}, {"law": "soft"}):  # the same again; and another that differs by less than chance
        runs = [run_of(f"a{len(other)}"), run_of(f"b{len(other)}", **other)]
        text = " ".join(headlines(subjects_of(runs, [ensure_energy(run) for run in runs])))
        assert "cannot be told apart by their energy" in text
        assert "used least" not in text


def test_a_run_without_energy_is_reported_with_the_reason(run_of, rewrite):
    page = Page(rendered(rewrite(run_of(), power=None)))
    assert "no energy" in page.text
    assert "has no power samples" in page.text
    assert page.tags.count("figure") == 1


def test_kept_energy_outlives_the_readings_without_a_picture_of_power(run_of, rewrite):
    run = run_of()
    known = ensure_energy(run)
    (run.path / "power.parquet").unlink()
    page = Page(rendered(run))
    assert f"A request cost {known.requests['energy_j'].mean():.3g} J on average" in page.text
    assert "power over time is not shown: " in page.text
    assert "has no power samples" in page.text
    assert page.tags.count("figure") == 3  # joules, buckets, latency


def test_latency_curves_leave_out_what_failed(run_of, rewrite):
    run = run_of()
    requests = run.scan("requests").with_columns(pl.lit("aborted").alias("status")).collect()
    page = Page(rendered(rewrite(run, requests=requests)))
    assert "that took at most so long" not in page.text


def test_an_attached_server_has_no_close_up(run_of, rewrite):
    run = rewrite(run_of(), {"engine": "attached"}, steps=None, segments=None, truth=None)
    page = Page(rendered(run))
    assert page.tags.count("figure") == 4
    assert "client timestamps" in page.text


def test_a_page_that_cannot_be_written_leaves_nothing(run_of, tmp_path):
    run = run_of()
    with pytest.raises(AnalysisError, match="cannot be written"):
        write_page(page_of(run), tmp_path / "nowhere" / "r.html")
    write_page(page_of(run), tmp_path / "r.html")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["r.html"]


def test_no_runs_no_headlines():
    assert headlines([]) == []
