import re

import numpy as np
import polars as pl
import pytest

from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.plot import panels, plot_traces
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
