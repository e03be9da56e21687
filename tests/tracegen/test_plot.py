import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.plot import draw, panels, plot_traces
from tracegen.schema import write_trace
from tracegen.synthesize import synthesize


@pytest.fixture(scope="module")
def traces():
    return {mix: synthesize(mix, 5.0, 300 * NS_PER_S, 1)[0] for mix in ("chat", "code")}


def test_panels_hold_every_request_once(traces):
    parts = panels(traces)
    for name, frame in traces.items():
        own = {panel: part.filter(pl.col("trace") == name) for panel, part in parts.items()}
        width_s = own["rate"]["t_s"][1]
        assert own["rate"]["rate_rps"].sum() * width_s == pytest.approx(frame.height, rel=0.02)
        for side in ("input", "output"):
            widths = np.log2(own[side]["to"] / own[side]["from"])
            assert (own[side]["density"] * widths).sum() == pytest.approx(1)
        joint = own["joint"]
        area = np.log2(joint["to"] / joint["from"]) * np.log2(joint["output_to"] / joint["output_from"])
        assert (joint["density"] * area).sum() == pytest.approx(1)
        assert own["buckets"]["share"].sum() == pytest.approx(1)


def test_a_shorter_trace_ends_where_it_ends(traces, make_frame):
    parts = panels({"long": traces["chat"], "short": make_frame([0, 10**9, 100 * 10**9])})
    assert parts["rate"].filter(pl.col("trace") == "short")["t_s"].max() < 100


def test_a_trace_of_one_request_is_drawn_too(make_frame):
    parts = panels({"one": make_frame([0])})
    assert parts["rate"]["rate_rps"].to_list() == [1.0]
    assert parts["dispersion"].is_empty()


def _drawn(trace):
    """The Vega-Lite of a trace's picture, and the rows behind its chart at a place of the layout."""
    chart = draw(panels({"t": trace})).to_dict()
    return chart, lambda part: chart["datasets"][part["data"]["name"]]


def test_steps_are_drawn_to_the_end_of_their_last_bin(make_frame):
    chart, rows = _drawn(make_frame([0, 10**9, 2 * 10**9]))
    course = rows(chart["vconcat"][0])
    assert course[-1]["t_s"] == 2.0
    assert course[-1]["rate_rps"] == course[-2]["rate_rps"] > 0
    outline = rows(chart["vconcat"][1]["hconcat"][0])
    assert outline[-1]["density"] == 0
    assert outline[-1]["from"] > outline[-2]["from"]


@pytest.mark.parametrize(
    ("last_ns", "unit"),
    [(7 * 86400 * 10**9, "days"), (86400 * 10**9, "hours"), (3600 * 10**9, "minutes"), (10**9, "seconds"),
     (10**6, "milliseconds"), (10, "microseconds"), (0, "seconds")],
)  # fmt: skip
def test_time_has_the_unit_of_its_span(make_frame, last_ns, unit):
    assert _drawn(make_frame([0, last_ns]))[0]["vconcat"][0]["encoding"]["x"]["title"] == unit


def test_a_trace_whose_times_are_dates_begins_where_it_begins(make_frame):
    first_s = 1_700_000_000
    rate = panels({"dated": make_frame([(first_s + k) * 10**9 for k in range(100)])})["rate"]
    assert rate["t_s"][0] == first_s
    assert rate["rate_rps"].sum() * (rate["end_s"][0] - first_s) == pytest.approx(100, abs=0.01)


@pytest.mark.parametrize("tokens", [1, 100, 2**32 - 1])
def test_lengths_have_labels_where_all_are_one(make_frame, tokens):
    frame = make_frame([0, 1]).with_columns(pl.lit(tokens, pl.UInt32).alias("input_tokens"))
    axis = _drawn(frame)[0]["vconcat"][2]["hconcat"][0]["encoding"]["x"]
    low, high = axis["scale"]["domain"]
    assert low <= tokens < high
    assert sum(low <= mark <= high for mark in axis["axis"]["values"]) >= 2


def test_too_short_for_dispersion_is_said(make_frame):
    assert "too few full windows" in str(_drawn(make_frame([0, 1]))[0])


def test_a_picture_that_cannot_be_made_leaves_nothing_behind(make_frame, tmp_path, monkeypatch):
    write_trace(make_frame([0, 1]), tmp_path / "t.parquet", {})
    (tmp_path / "p.svg").write_text("the one before")

    def broken(_self, path, **_):
        Path(path).write_text("<svg half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("altair.VConcatChart.save", broken)
    with pytest.raises(TraceError, match=r"p\.svg: cannot be written"):
        plot_traces([tmp_path / "t.parquet"], tmp_path / "p.svg")
    assert {path.name for path in tmp_path.iterdir()} == {"t.parquet", "p.svg"}
    assert (tmp_path / "p.svg").read_text() == "the one before"


def test_pictures_by_their_ending(traces, tmp_path):
    for name, frame in traces.items():
        write_trace(frame, tmp_path / f"{name}.parquet", {})
    paths = [tmp_path / "chat.parquet", tmp_path / "code.parquet"]
    for suffix in (".png", ".svg", ".html"):
        plot_traces(paths, tmp_path / f"p{suffix}")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "p.svg").read_text()
    assert all(word in svg for word in ("chat", "code", "Arrival rate", "Index of dispersion", "Buckets"))
    # All of it is inside: the page loads nothing.
    assert not re.search(r'<(script|link)[^>]+(src|href)="http', (tmp_path / "p.html").read_text())


def test_what_cannot_be_drawn_is_said(tmp_path):
    with pytest.raises(TraceError, match="a picture ends in"):
        plot_traces([tmp_path / "a"], tmp_path / "p.pdf")
    with pytest.raises(TraceError, match="7 traces are too many"):
        plot_traces([tmp_path / "a"] * 7, tmp_path / "p.svg")
