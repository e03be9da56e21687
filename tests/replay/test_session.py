"""Runs from beginning to end on the simulated engine, and what their directories then say."""

import asyncio
import errno
import os
import re
from itertools import pairwise

import polars as pl
import pytest

from analysis.energy import attribute
from analysis.evaluate import evaluate
from replay.caps import Caps
from replay.live import QuietProgress
from replay.plan import RunOptions
from replay.rundir import PartWriter, Run
from replay.session import run
from replay.show import lines
from replay.summary import summarize
from replay.tables import STATUSES, TABLES
from replay.workers import WorkerBugError
from tracegen.errors import ReplayError
from tracegen.schema import file_sha256, read_trace

MS = 1_000_000

# DESIGN.md's keys; `clock_anchors` and the like are lists of these.
MANIFEST_KEYS = {
    "schema_version", "state", "engine", "run_id", "measure_start_ns", "measure_end_ns", "instances", "gpus", "hosts",
    "workers", "clock_anchors", "trace_sha256", "arguments", "seed", "versions", "verdicts",
}  # fmt: skip
INSTANCE_KEYS = {"instance", "host", "gpus", "tp", "freq_mhz", "power_cap_w", "model", "max_model_len"}
OF_EVERY_RUN = set(TABLES) - {"cpu_energy", "warmup"}  # these are asked for
GPU_KEYS = {"host", "gpu", "uuid", "name", "idle_power_w", "idle_power_after_w", "sensors"}


@pytest.fixture(scope="module")
def simulated(sim_run):
    return Run.open(sim_run)


@pytest.fixture(scope="module")
def requests(simulated):
    return simulated.scan("requests").collect()


def test_a_complete_run_has_every_table_as_one_file_and_nothing_else(simulated):
    assert {path.name for path in simulated.path.iterdir()} == {
        *(f"{table}.parquet" for table in OF_EVERY_RUN), "manifest.json", "server.log"
    }  # fmt: skip
    assert all((simulated.path / f"{table}.parquet").is_file() for table in OF_EVERY_RUN)


def test_the_manifest_has_every_key_of_the_design(simulated):
    manifest = simulated.manifest
    assert set(manifest) >= MANIFEST_KEYS
    (instance,) = manifest["instances"]
    assert set(instance) >= INSTANCE_KEYS
    assert (instance["gpus"], instance["tp"], instance["freq_mhz"]) == (list(range(8)), 8, 1200)
    assert instance["max_model_len"] == 16384
    assert [gpu["gpu"] for gpu in manifest["gpus"]] == list(range(8))
    for gpu in manifest["gpus"]:
        assert set(gpu) >= GPU_KEYS
        assert gpu["name"].startswith("Simulated ")
        assert set(gpu["sensors"]) == {"instant", "average"}
        for idle in (gpu["idle_power_w"], gpu["idle_power_after_w"]):
            assert set(idle) == {"instant", "counter"}
            assert idle["instant"] == pytest.approx(idle["counter"], rel=0.05), "nothing of the work is in it"
    assert (manifest["state"], manifest["engine"], manifest["metadata"]) == ("complete", "simulated", {"why": "test"})
    assert set(manifest["hosts"][0]) == {"host", "offset_ns", "offset_error_ns"}
    anchors = manifest["clock_anchors"]
    assert all(set(anchor) == {"monotonic_ns", "unix_ns"} for anchor in anchors)
    assert anchors[0]["monotonic_ns"] < manifest["measure_start_ns"] < manifest["measure_end_ns"]
    assert manifest["requests"] == {"planned": 24, "sent": 24, "ended": 24}
    assert all(set(v) == {"name", "ok", "value", "bound", "why"} for v in manifest["verdicts"])


def test_the_trace_that_was_replayed_is_kept(simulated):
    source = simulated.manifest["arguments"]["trace"]
    assert simulated.manifest["trace_sha256"] == file_sha256(source)
    assert read_trace(simulated.path / "trace.parquet").equals(read_trace(source))


def test_each_requests_times_are_in_order_and_follow_the_trace(simulated, requests):
    times = ["scheduled_ns", "sent_ns", "headers_ns", "first_token_ns", "last_token_ns", "done_ns"]
    assert requests.select(times).null_count().sum_horizontal().item() == 0
    for before, after in pairwise(times):
        assert (requests[before] <= requests[after]).all(), f"{before} <= {after}"
    trace = simulated.scan("trace").collect()
    joined = requests.join(trace, on="request_id", suffix="_asked")
    assert joined.height == trace.height == requests.height
    start_ns = simulated.manifest["measure_start_ns"]
    assert (joined["scheduled_ns"] == start_ns + joined["arrival_ns"]).all()
    assert (joined["input_tokens"] == joined["input_tokens_asked"]).all()
    assert (joined["output_tokens"] == joined["output_tokens_asked"]).all()
    assert requests["status"].unique().to_list() == ["ok"]
    assert (requests["done_ns"] <= simulated.manifest["measure_end_ns"]).all()


def test_chunks_add_up_to_the_output(requests):
    assert (requests["chunk_tokens"].list.sum() == requests["output_tokens"]).all()
    assert (requests["chunk_ns"].list.first() == requests["first_token_ns"]).all()
    assert (requests["chunk_ns"].list.last() == requests["last_token_ns"]).all()
    assert (requests["chunk_ns"].list.len() == requests["chunk_tokens"].list.len()).all()


def test_segments_account_for_every_token_of_every_request(simulated, requests):
    tokens = (pl.col("last_step") - pl.col("first_step") + 1) * pl.col("tokens_per_step")
    segments = simulated.scan("segments").with_columns(tokens=tokens).collect()
    assert set(segments["request_id"]) == set(requests["request_id"])
    by_kind = {
        kind: requests.join(
            segments.filter(pl.col("kind") == kind).group_by("request_id").agg(pl.col("tokens").sum()), on="request_id"
        )
        for kind in ("prefill", "decode")
    }
    assert (by_kind["prefill"]["tokens"] == by_kind["prefill"]["input_tokens"]).all()
    assert (by_kind["decode"]["tokens"] == by_kind["decode"]["output_tokens"] - 1).all()
    steps = simulated.scan("steps").collect()
    assert steps["decode_tokens"].sum() == requests["output_tokens"].sum() - requests.height
    assert steps["prefill_tokens"].sum() == requests["input_tokens"].sum()
    assert steps["step"].to_list() == list(range(steps.height))
    assert (steps["start_ns"][1:] >= steps["end_ns"][:-1]).all()


def test_truth_adds_up_to_the_energy_of_the_steps(simulated):
    """The true shares against an independent measure: the counters, less idle power between the steps."""
    truth = simulated.scan("truth").collect()
    assert truth["energy_j"].to_list() == pytest.approx((truth["prefill_j"] + truth["decode_j"]).to_list())
    steps = simulated.scan("steps").collect()
    start_ns, end_ns = steps["start_ns"].min(), steps["end_ns"].max()
    power = simulated.scan("power").filter(pl.col("t_ns").is_between(start_ns, end_ns)).collect()
    counter_j = sum((f["energy_mj"].max() - f["energy_mj"].min()) / 1e3 for f in power.partition_by("gpu"))
    busy_s = (steps["end_ns"] - steps["start_ns"]).sum() / 1e9
    idle_w = sum(gpu["idle_power_w"]["counter"] for gpu in simulated.manifest["gpus"])
    idle_j = idle_w * ((end_ns - start_ns) / 1e9 - busy_s)
    assert truth["energy_j"].sum() == pytest.approx(counter_j - idle_j, rel=0.05)


def test_power_covers_the_whole_run_at_the_locked_clock(simulated):
    power = simulated.scan("power").collect()
    assert power["sm_clock_mhz"].unique().to_list() == [1200]
    assert power["gpu"].unique().sort().to_list() == list(range(8))
    assert power["t_ns"].min() < simulated.manifest["measure_start_ns"]
    assert power["t_ns"].max() > simulated.manifest["measure_end_ns"]
    assert power["t_ns"].is_sorted()


def test_server_metrics_are_kept(simulated):
    metrics = simulated.scan("server_metrics").collect()
    assert any("num_requests_running" in name for name in metrics["name"].unique())
    assert (metrics["instance"] == 0).all()


def test_the_engines_log_says_that_it_is_simulated(simulated):
    assert "SIMULATED" in (simulated.path / "server.log").read_text()


def test_attribution_conserves_and_is_far_better_than_equal_shares_of_time(simulated):
    summary = attribute(simulated).summary
    total_j = sum(summary[key] for key in ("attributed_j", "idle_j", "other_j"))
    assert total_j == pytest.approx(summary["measured_j"], rel=1e-9)
    shapley, equal = evaluate(simulated)
    assert (shapley.requests, equal.requests) == (24, 24)
    assert shapley.median_rel < equal.median_rel / 3


def test_the_summary_is_computed_from_the_tables(simulated, requests):
    summary = summarize(simulated.path)
    assert summary["simulated"] is True
    assert (summary["requests_ok"], summary["output_tokens"]) == (24, requests["output_tokens"].sum())
    ttft_ms = ((requests["first_token_ns"] - requests["sent_ns"]) / MS).to_numpy()
    assert summary["ttft_ms"]["p50"] == pytest.approx(float(pl.Series(ttft_ms).median()))
    assert summary["energy_j"] == pytest.approx(attribute(simulated).summary["measured_j"], rel=0.1)
    text = lines(summary)
    assert text[0].startswith("SIMULATED  complete: 24 of 24 requests ok in ")
    assert any(re.fullmatch(r"energy  .*, by the energy counters of 8 GPUs", line) for line in text)


def attached(make_trace, replay, tmp_path, url, rows, **options):
    trace = make_trace(tmp_path / "trace.parquet", rows)
    return Run.open(replay(trace, engine=url, output=tmp_path / "run", **options))


def test_an_attached_server_without_gpus_gives_a_run_without_power(make_trace, replay, tmp_path, plain_server):
    run = attached(make_trace, replay, tmp_path, plain_server, [(i * 20, 20, 3) for i in range(6)], save_chunks=False)
    assert (run.manifest["engine"], run.manifest["gpus"], run.manifest["state"]) == ("attached", [], "complete")
    assert not run.has("power")
    assert not run.has("truth")
    assert "chunk_ns" not in run.scan("requests").collect().columns
    verdicts = {verdict["name"]: verdict["ok"] for verdict in run.manifest["verdicts"]}
    assert {name for name, ok in verdicts.items() if ok is None} == {
        "saturated", "steps_complete", "clocks_held", "sensor_alive", "counter_agrees", "idle_measured"
    }  # fmt: skip
    summary = summarize(run.path)
    assert summary["energy_j"] is None
    assert summary["mean_power_w"] is None
    assert "energy  not measured: no power was read" in lines(summary)
    assert not lines(summary)[0].startswith("SIMULATED")


def test_an_attached_server_that_is_simulated_makes_a_simulated_run(make_trace, replay, tmp_path, sim_server):
    run = attached(make_trace, replay, tmp_path, sim_server, [(0, 20, 3)])
    assert (run.manifest["engine"], run.simulated) == ("simulated", True)
    assert lines(summarize(run.path))[0].startswith("SIMULATED  ")


def test_replicas_share_the_trace_and_each_has_its_own_gpus_and_steps(make_trace, replay, tmp_path):
    trace = make_trace(tmp_path / "trace.parquet", [(i * 60, 200 + 10 * i, 4) for i in range(12)])
    run = Run.open(
        replay(trace, engine="sim", tp=2, replicas=2, gpus=(0, 1, 4, 5), output=tmp_path / "run", idle_ns=700 * MS)
    )
    assert [(i["instance"], i["gpus"]) for i in run.manifest["instances"]] == [(0, [0, 1]), (1, [4, 5])]
    assert {path.name for path in run.path.glob("*.log")} == {"server.log", "server-1.log"}
    requests = run.scan("requests").collect().sort("request_id")
    assert requests["instance"].to_list() == [0, 1] * 6
    segments = run.scan("segments").collect()
    for instance in (0, 1):
        mine = requests.filter(pl.col("instance") == instance)["request_id"]
        assert set(segments.filter(pl.col("instance") == instance)["request_id"]) == set(mine)
    assert set(run.scan("steps").collect()["instance"]) == {0, 1}
    assert set(run.scan("server_metrics").collect()["instance"]) == {0, 1}
    assert set(run.scan("truth").collect()["request_id"]) == set(requests["request_id"])
    verdicts = {verdict["name"]: verdict["ok"] for verdict in run.manifest["verdicts"]}
    assert verdicts["steps_complete"] is True
    summary = attribute(run).summary
    total_j = sum(summary[key] for key in ("attributed_j", "idle_j", "other_j"))
    assert total_j == pytest.approx(summary["measured_j"], rel=1e-9)
    assert summarize(run.path)["gpus"] == [0, 1, 4, 5]


def test_warm_up_requests_are_answered_and_not_counted(make_trace, replay, tmp_path):
    trace = make_trace(tmp_path / "trace.parquet", [(i * 50, 100 * (i + 1), 4) for i in range(8)])
    run = Run.open(replay(trace, engine="sim", num_warmups=3, output=tmp_path / "run", idle_ns=700 * MS))
    assert run.manifest["warmups"] == 3
    assert run.scan("requests").collect().height == 8
    warm = run.scan("segments").filter(pl.col("request_id").is_null()).collect()
    steps = run.scan("steps").collect()
    last = steps.filter(pl.col("step") == warm["last_step"].max())["end_ns"].item()
    assert last < run.manifest["measure_start_ns"], "before the run"
    prefilled = warm.filter(pl.col("kind") == "prefill")
    tokens = (pl.col("last_step") - pl.col("first_step") + 1) * pl.col("tokens_per_step")
    assert prefilled.select(tokens.sum()).item() == 300 + 600 + 800, "of lengths spread over the trace's"
    first, *_ = run.scan("requests").collect().sort("sent_ns").iter_rows(named=True)
    assert first["cached_tokens"] in {0, None}


def test_a_cap_closes_the_loop_and_says_so(make_trace, replay, tmp_path, sim_server):
    run = attached(make_trace, replay, tmp_path, sim_server, [(0, 20, 3)] * 5, max_concurrency=1)
    requests = run.scan("requests").collect().sort("sent_ns")
    assert (requests["sent_ns"][1:] >= requests["done_ns"][:-1]).all(), "one at a time"
    assert requests["scheduled_ns"].n_unique() == 1, "what was held back shows as lag"
    verdict = next(v for v in run.manifest["verdicts"] if v["name"] == "open_loop")
    assert (verdict["ok"], verdict["why"]) == (False, "closed by cap: --max-concurrency 1")


@pytest.mark.parametrize("rate", [0.25, 1.0, 1.5, 2.5, 40.0])
def test_the_cap_on_the_rate_is_exact(rate):
    throttler = Caps(None, rate)._throttler
    assert throttler.rate_limit / throttler.period == pytest.approx(rate)
    assert throttler.period >= 1 or rate > 1


def test_the_cap_on_the_rate_holds_requests_back(make_trace, replay, tmp_path, sim_server):
    run = attached(make_trace, replay, tmp_path, sim_server, [(0, 20, 2)] * 4, max_rate_rps=2.5)
    sent_ns = run.scan("requests").collect()["sent_ns"].sort()
    assert sent_ns[3] - sent_ns[0] >= 3 / 2.5 * 1e9 * 0.99


def test_clipped_and_dropped_requests_are_counted(make_trace, replay, tmp_path, sim_server):
    rows = [(0, 20, 2), (10, 17_000, 2), (20, 20, 3)]
    run = attached(make_trace, replay, tmp_path, sim_server, rows, overlong="drop")
    assert run.manifest["overlong"] == {"rule": "drop", "requests": 1}
    assert run.manifest["requests"]["sent"] == 2
    assert run.scan("trace").collect()["request_id"].to_list() == [100, 102]


def test_prefix_hashes_are_sent_as_shared_blocks(make_trace, replay, tmp_path, sim_server):
    hashes = pl.Series([[1, 2, 3], [1, 2, 4]], dtype=pl.List(pl.UInt64))
    rows = [(0, 60, 2), (400, 60, 2)]
    trace = make_trace(tmp_path / "t.parquet", rows, {"block_tokens": 16}, prefix_hashes=hashes)
    run = Run.open(replay(trace, engine=sim_server, output=tmp_path / "run"))
    requests = run.scan("requests").collect().sort("request_id")
    assert requests["input_tokens"].to_list() == [60, 60]
    assert requests["cached_tokens"].to_list() == [0, 32], "two blocks are shared, the third is not"


@pytest.mark.parametrize("broken", ["show", "scrape", "_watch"])
def test_a_bug_beside_the_sending_comes_out(make_trace, tmp_path, sim_server, monkeypatch, broken):
    async def bug(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(f"replay.session.{broken}", bug)
    trace = make_trace(tmp_path / "trace.parquet", [(0, 20, 2), (60_000, 20, 2)])
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run(RunOptions(trace, engine=sim_server, output=tmp_path / "run"), QuietProgress()))


@pytest.mark.parametrize("arrival_ms", [0, 60_000])
def test_a_bug_in_a_worker_comes_out(make_trace, tmp_path, sim_server, monkeypatch, arrival_ms):
    """Whether other requests are still to be sent or not."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "sitecustomize.py").write_text("import replay.fastpath as f\nf.FastPath._put = lambda *_: 1 / 0\n")
    monkeypatch.setenv("PYTHONPATH", str(bad))
    trace = make_trace(tmp_path / "trace.parquet", [(0, 20, 2), (arrival_ms, 20, 2)])
    with pytest.raises(WorkerBugError, match="ZeroDivisionError"):
        asyncio.run(run(RunOptions(trace, engine=sim_server, output=tmp_path / "run"), QuietProgress()))


def test_a_second_run_into_the_same_directory_is_refused(simulated, replay):
    manifest = (simulated.path / "manifest.json").read_bytes()
    with pytest.raises(ReplayError, match="exists already; a run is never overwritten"):
        replay(simulated.path / "trace.parquet", engine="sim", output=simulated.path)
    assert (simulated.path / "manifest.json").read_bytes() == manifest


def test_two_runs_that_begin_together_do_not_share_a_directory(make_trace, tmp_path, sim_server):
    trace = make_trace(tmp_path / "trace.parquet", [(0, 20, 2), (300, 20, 2)])
    options = RunOptions(trace, engine=sim_server, output=tmp_path / "run")

    async def both():
        return await asyncio.gather(*(run(options, QuietProgress()) for _ in range(2)), return_exceptions=True)

    ended = asyncio.run(both())
    refused = [error for error in ended if isinstance(error, ReplayError)]
    assert len(refused) == 1
    assert "give another -o" in str(refused[0])
    assert Run.open(tmp_path / "run").scan("requests").collect().height == 2


def test_a_full_disk_ends_the_run_in_one_line_and_what_was_written_stays(make_trace, tmp_path, sim_server, monkeypatch):
    written = []
    append = PartWriter.append

    def fill(self, frame, number=None):
        if self._table == "requests":
            if written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(len(frame))
        append(self, frame, number)

    monkeypatch.setattr(PartWriter, "append", fill)
    trace = make_trace(tmp_path / "trace.parquet", [(500 * i, 20, 2) for i in range(20)])
    with pytest.raises(ReplayError, match=r"cannot be written \(No space left on device\); the run ended early"):
        asyncio.run(run(RunOptions(trace, engine=sim_server, output=tmp_path / "run"), QuietProgress()))
    left = Run.open(tmp_path / "run")
    assert left.manifest["state"] == "failed"
    assert left.scan("requests").collect().height == written[0] > 0


def test_every_status_of_a_record_is_in_the_contract(requests):
    assert set(requests["status"]) <= set(STATUSES)
