"""One screen of a run: what was run, how it ended, and beside each latency what the client itself may have added."""

import json
import shutil
import sys
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import replay.cli
from replay.counters import counted_j
from replay.gaps import GapHistogram
from replay.hold import hold
from replay.rundir import Run, write_manifest
from replay.show import lines
from replay.summary import summarize
from replay.tables import REQUESTS_OPTIONAL
from replay.whole import check
from tracegen.errors import RunError
from tracegen.schema import write_parquet

S = 1_000_000_000
ERROR = {"ttft_ms": {"p50": 0.004, "p99": 0.021, "max": 1.5}, "source": "kernel stamps"}


@pytest.fixture
def copy(sim_run, tmp_path):
    return Run.open(shutil.copytree(sim_run, tmp_path / "run"))


def shown(run, **changes):
    write_manifest(run.path, {**run.manifest, **changes})
    return lines(summarize(run.path))


def test_the_screen_says_what_was_run_and_ends_with_whether_it_is_valid(copy):
    good = [{"name": "open_loop", "ok": True, "value": None, "bound": None, "why": "kept"}]
    text = shown(copy, verdicts=good, client_error=ERROR)
    assert text[0].startswith("SIMULATED  complete: 24 of 24 requests ok in ")
    assert text[1].startswith("run     trace.parquet on llama-2-70b; 20")
    assert text[2] == "node    dgx-h100, TP 8, GPUs 0-7, 1200 MHz"
    assert text[3] == "status  24 ok"
    assert text[4].startswith("rate    asked for 7.692 requests/s, sent ")
    assert max(map(len, text)) <= 100
    beside = {line.split()[0] for line in text if line.endswith("±0.02 ms")}
    assert beside == {"TTFT", "ITL"}
    late = "p50 0.004 ms, p99 0.021 ms, max 1.500 ms"
    assert f"client  adds at most {late} to TTFT and ITL (kernel stamps)" in text
    unknown = shown(copy, verdicts=good, client_error={"ttft_ms": None, "source": "kernel stamps"})
    assert not any(line.startswith("client") for line in unknown)
    assert text[-2:] == ["  ok    open_loop       kept", "valid: no bound is broken"]
    bad = [*good, {"name": "saturated", "ok": False, "value": 0.2, "bound": 0.05, "why": "saturated: it grew"}]
    assert shown(copy, verdicts=bad)[-1] == "invalid: saturated: saturated: it grew"


def test_a_run_that_was_killed_is_shown_as_far_as_it_is_on_record(copy):
    requests = copy.scan("requests").collect().sort("done_ns")[:10]
    write_parquet(requests.to_arrow(compat_level=pl.CompatLevel.oldest()), copy.path / "requests.parquet")
    keep = {
        key: value for key, value in copy.manifest.items() if key not in {"measure_end_ns", "requests", "stretches"}
    }
    write_manifest(copy.path, {**keep, "state": "running", "verdicts": []})
    summary, last_ns = summarize(copy.path), copy.scan("steps").collect()["end_ns"].max()
    assert (summary["requests_planned"], summary["requests_ok"], summary["valid"]) == (24, 10, None)
    assert summary["seconds"] == pytest.approx((last_ns - copy.manifest["measure_start_ns"]) / S)
    text = lines(summary)
    assert text[0].startswith("SIMULATED  killed: 10 of 24 requests ok in ")
    assert text[3] == "status  10 ok, 14 without a record"
    again = f"'replay run --resume {copy.path}' goes on"
    assert text[-1] == f"not judged: the run was killed (state: running); {again}"
    with hold(copy.path):
        text = lines(summarize(copy.path))
    assert text[0].startswith("SIMULATED  running: 10 of 24 requests ok in ")
    assert text[-1] == "not judged: the run goes on (state: running)"


def test_an_answer_of_another_length_is_in_the_latencies(copy):
    whole = summarize(copy.path)
    other = pl.when(pl.col("request_id") > 110).then(pl.lit("length_mismatch")).otherwise("status")
    requests = copy.scan("requests").with_columns(status=other).collect()
    write_parquet(requests.to_arrow(compat_level=pl.CompatLevel.oldest()), copy.path / "requests.parquet")
    summary = summarize(copy.path)
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2el_ms", "output_tokens"):
        assert summary[name] == whole[name]
    assert summary["requests_ok"] == 11
    assert "status  13 length_mismatch (answered: in the latencies), 11 ok" in lines(summary)


def test_a_run_that_only_starts_is_shown_too(copy):
    for table in copy.path.glob("*.parquet"):
        table.unlink()
    keys = {"measure_start_ns", "measure_end_ns", "requests", "valid", "stretches"}
    kept = {k: v for k, v in copy.manifest.items() if k not in keys}
    write_manifest(copy.path, {**kept, "state": "starting", "verdicts": []})
    text = lines(summarize(copy.path))
    assert text[0] == "SIMULATED  killed: 0 of ? requests ok, the run has not begun"
    assert "energy  not measured: the run has not begun" in text
    anew = f"no request was due yet: 'replay run --resume {copy.path}' begins it anew"
    assert text[-1] == f"not judged: the run was killed (state: starting); {anew}"


def test_what_another_program_made_is_refused_in_one_line(tmp_path):
    write_manifest(tmp_path, {"state": "complete", "engine": "vllm", "instances": []})
    for command in (summarize, check):
        with pytest.raises(RunError, match=r"manifest.json: has no arguments, trace_sha256, gpus, clock_anchors"):
            command(tmp_path)


def test_show_prints_the_screen_or_json(sim_run, monkeypatch, capsys):
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["replay", "show", str(sim_run), *arguments])
        with pytest.raises(SystemExit) as stop:
            replay.cli.main()
        assert stop.value.code == 0
    out = capsys.readouterr().out
    text = lines(summarize(sim_run))
    assert out.splitlines()[: len(text)] == text
    assert json.loads("\n".join(out.splitlines()[len(text) :])) == summarize(sim_run)


CHUNKS = st.lists(st.tuples(st.integers(2_000, 10**11), st.integers(0, 4)), max_size=30)


@given(st.lists(CHUNKS, max_size=8))
def test_percentiles_of_gaps_are_those_of_the_gaps_within_a_thousandth(requests):
    rows, gaps = [], []
    for chunks in requests:
        at_ns = np.cumsum([gap for gap, _ in chunks], dtype=np.int64)
        rows.append((at_ns.tolist(), [tokens for _, tokens in chunks]))
        bearing = [(t, tokens) for t, (_, tokens) in zip(at_ns, chunks, strict=True) if tokens]
        for (before, _), (after, tokens) in pairwise(bearing):
            gaps += [(after - before) / tokens / 1e6] * tokens
    histogram = GapHistogram()
    histogram.add(pl.DataFrame(rows, schema=REQUESTS_OPTIONAL, orient="row"))
    found = histogram.percentiles((50, 99))
    if not gaps:
        assert found is None
    else:
        expected = np.quantile(np.maximum(gaps, 2**10 / 1e6), [0.5, 0.99], method="lower")
        assert [found["p50"], found["p99"]] == pytest.approx(expected, rel=1e-3)


def test_a_counter_that_begins_anew_between_two_stretches_counts_in_each(tmp_path):
    """100 W for 10 s, a pause of 60 s over which the machine slept, then 200 W for 10 s."""
    write_manifest(tmp_path, {})
    t_s = np.concatenate([np.arange(-5, 15, 0.1), np.arange(65, 85, 0.1)]) + 1000
    watts, zero_s = np.where(t_s < 1040, 100, 200), np.where(t_s < 1040, 990, 1060)
    energy_mj = watts * (t_s - zero_s) * 1e3
    columns = {"t_ns": (t_s * S).astype(np.int64), "gpu": [0] * t_s.size, "energy_mj": energy_mj.astype(np.int64)}
    power = pl.DataFrame(columns)
    power.write_parquet(tmp_path / "power.parquet")
    both = [(1000 * S, 1010 * S), (1070 * S, 1080 * S)]
    energy_j, why = counted_j(Run.open(tmp_path), [0], both)
    assert (energy_j, why) == (pytest.approx(3000, rel=1e-3), None)
    energy_j, why = counted_j(Run.open(tmp_path), [0], [(both[0][0], both[1][1])])
    assert energy_j is None
    assert "fell back" in why
