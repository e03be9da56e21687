"""Whole runs: what is attributed, how near it is to the truth, and what partial or foreign runs come to."""

import json
import os

import numpy as np
import polars as pl
import pytest

from analysis.energy import attribute, attribute_methods
from analysis.evaluate import BASELINE, evaluate, judge
from analysis.saved import ensure_energy, save
from analysis.split import METHODS
from replay.rundir import PartWriter, Run
from tracegen.console import format_si
from tracegen.errors import AnalysisError


def assert_conserved(energy) -> None:
    summary = energy.summary
    total_j = energy.requests["energy_j"].sum() + summary["idle_j"] + summary["other_j"]
    assert total_j == pytest.approx(summary["measured_j"], rel=1e-9)
    assert summary["measured_j"] > 0
    assert energy.requests["energy_j"].min() >= 0
    parts = energy.requests["prefill_j"] + energy.requests["decode_j"]
    assert (parts - energy.requests["energy_j"]).abs().max() <= 1e-9
    assert (energy.requests["shared_j"] <= energy.requests["energy_j"] * (1 + 1e-9) + 1e-9).all()


@pytest.mark.parametrize(
    ("law", "rate", "bound"), [("soft", 0.5, 0.01), ("soft", 2.0, 0.01), ("kink", 2.0, 0.015), ("kink", 3.5, 0.025)]
)
def test_error_against_the_truth_is_a_small_part_of_an_equal_split(run_of, law, rate, bound):
    run = run_of(law=law, rate=rate, duration_s=60.0, noise_rel=0.02)
    ours, equal = evaluate(run)
    assert ours.median_rel < bound
    assert ours.median_rel < equal.median_rel / 5
    assert ours.p99_rel < equal.p99_rel / 5
    assert ours.worst_bucket_rel < 0.06
    assert ours.truth_over_attributed == pytest.approx(1, abs=0.02)


def test_standard_errors_are_of_the_size_of_the_errors(run_of):
    for law, rate in (("kink", 3.5), ("soft", 2.0)):
        run = run_of(name=law, law=law, rate=rate, duration_s=60.0, noise_rel=0.02)
        truth = run.scan("truth").select("request_id", truth_j="energy_j").collect()
        table = attribute(run).requests.join(truth, on="request_id")
        scale = table["truth_j"].sum() / table["energy_j"].sum()
        z = (table["energy_j"] - table["truth_j"] / scale) / table["energy_se_j"]
        assert 0.1 < float(np.sqrt((z**2).mean())) < 3.0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_conserves(run_of, method):
    assert_conserved(attribute(run_of(), method))


def test_the_meter_and_the_fit_are_reported(run_of):
    summary = attribute(run_of(noise_rel=0.02)).summary
    (fit,) = summary["fit"]
    assert fit["energy_source"] == "counter"
    assert abs(fit["samples_over_counter_rel"]) < 0.02
    assert fit["idle_power_w"] == {"before": 200.0, "after": 200.0, "source": "counter"}
    assert 0 < fit["duration_rel_rms"] < 0.05
    assert 0 < fit["power_rel_rms"] < 0.05
    assert summary["membership"] == "step records"
    assert summary["simulated"] is True
    assert summary["notes"] == []


def test_silence_is_idle_at_idle_power(run_of):
    run = run_of(rate=1.0, silent_s=(12.0, 30.0), duration_s=50.0)
    summary = attribute(run).summary
    steps = run.scan("steps").collect()
    gaps_s = (steps["start_ns"].to_numpy()[1:] - steps["end_ns"].to_numpy()[:-1]) / 1e9
    before_s = (steps["start_ns"][0] - run.manifest["measure_start_ns"]) / 1e9
    silent_s = before_s + gaps_s[gaps_s > 0.01].sum() + 0.5
    assert silent_s > 5
    assert summary["idle_j"] == pytest.approx(200 * silent_s, rel=0.03)


def test_without_a_counter_samples_do_and_without_samples_the_counter_does(run_of):
    both = attribute(run_of("both")).requests["energy_j"].to_numpy()
    for name, source in (("counter", "instant"), ("instant", "counter")):
        energy = attribute(run_of(name, **{name: False}))
        assert_conserved(energy)
        assert energy.summary["fit"][0]["energy_source"] == source
        assert energy.summary["fit"][0]["samples_over_counter_rel"] is None
        assert np.median(np.abs(energy.requests["energy_j"].to_numpy() / both - 1)) < 0.05


def test_the_truth_is_never_read_by_attribution(run_of, rewrite):
    run = run_of()
    with_truth = attribute(run).requests
    truth = run.scan("truth").collect()
    rewrite(run, truth=truth.with_columns(pl.col("energy_j") * 7))
    assert attribute(run).requests.equals(with_truth)
    rewrite(run, truth=None)
    assert attribute(run).requests.equals(with_truth)


def test_the_order_of_rows_does_not_matter(run_of, rewrite):
    run = run_of()
    before = attribute(run).requests.sort("request_id")
    tables = {
        n: run.scan(n).collect().sample(fraction=1, shuffle=True, seed=3) for n in ("requests", "steps", "segments")
    }
    after = attribute(rewrite(run, **tables)).requests.sort("request_id")
    np.testing.assert_allclose(after["energy_j"].to_numpy(), before["energy_j"].to_numpy(), rtol=1e-9)


def test_work_that_is_not_ours_is_other(run_of, rewrite):
    run = run_of()
    plain = attribute(run)
    segments = run.scan("segments").collect()
    mine = pl.col("request_id") < 110
    foreign = segments.with_columns(pl.when(pl.col("request_id") < 115).then("request_id").alias("request_id"))
    energy = attribute(rewrite(run, segments=foreign, requests=run.scan("requests").filter(mine).collect()))
    assert_conserved(energy)
    expected_j = plain.requests.filter(~mine)["energy_j"].sum()
    assert energy.summary["other_j"] == pytest.approx(expected_j, rel=1e-6)
    kept = plain.requests.filter(mine)["energy_j"].to_numpy()
    np.testing.assert_allclose(energy.requests["energy_j"].to_numpy(), kept, rtol=1e-6)


def test_lost_segments_are_other_and_their_requests_null(run_of, rewrite):
    run = run_of()
    plain = attribute(run)
    segments = run.scan("segments").filter(pl.col("request_id") != 105).collect()
    energy = attribute(rewrite(run, segments=segments))
    assert_conserved(energy)
    lost = energy.requests.filter(pl.col("request_id") == 105)
    assert lost["energy_j"].to_list() == [None]
    expected_j = plain.requests.filter(pl.col("request_id") == 105)["energy_j"][0]
    assert energy.summary["other_j"] == pytest.approx(expected_j, rel=1e-6)
    assert "1 request left no record" in energy.summary["notes"][0]


def test_a_request_that_failed_before_any_step_cost_nothing(run_of, rewrite):
    run = run_of()
    requests = run.scan("requests").collect()
    times = [pl.lit(None, pl.Int64).alias(c) for c in ("headers_ns", "first_token_ns", "last_token_ns")]
    failed = requests.head(1).with_columns(
        *times,
        pl.lit(9999, pl.UInt64).alias("request_id"),
        status=pl.lit("http_error"),
        output_tokens=pl.lit(None, pl.UInt32),
    )
    energy = attribute(rewrite(run, requests=pl.concat([requests, failed])))
    assert energy.requests.filter(pl.col("request_id") == 9999)["energy_j"].to_list() == [0.0]
    assert_conserved(energy)


def test_without_step_records_membership_comes_from_the_client_with_wider_errors(run_of, rewrite):
    run = run_of(rate=1.0)
    exact = attribute(run)
    energy = attribute(rewrite(run, steps=None, segments=None))
    assert_conserved(energy)
    assert energy.summary["membership"] == "client timestamps"
    assert energy.summary["attributed_j"] == pytest.approx(exact.summary["attributed_j"], rel=0.05)
    assert energy.requests["energy_se_j"].median() > 2 * exact.requests["energy_se_j"].median()
    ours, equal = judge(run, attribute_methods(run, ["shapley", BASELINE]))
    assert ours.median_rel < equal.median_rel


def test_several_instances_are_accounted_apart(run_of, rewrite):
    one, two = run_of("one"), run_of("two", seed=5)
    shift = pl.col("request_id") + 10_000
    tables = {}
    for name in ("requests", "steps", "segments"):
        other = two.scan(name).with_columns(pl.lit(1, pl.UInt16).alias("instance"))
        other = other.with_columns(shift) if "request_id" in other.collect_schema() else other
        tables[name] = pl.concat([one.scan(name), other]).collect()
    power = pl.concat([one.scan("power"), two.scan("power").with_columns(pl.col("gpu") + 2)]).collect()
    instances = [{**one.manifest["instances"][0], "instance": i, "gpus": [2 * i, 2 * i + 1]} for i in (0, 1)]
    gpus = [{**one.manifest["gpus"][0], "gpu": g} for g in range(4)]
    end_ns = min(one.manifest["measure_end_ns"], two.manifest["measure_end_ns"])
    manifest = {"instances": instances, "gpus": gpus, "measure_end_ns": end_ns}
    both = attribute(rewrite(one, manifest, power=power, trace=None, **tables))
    assert_conserved(both)
    assert [fit["instance"] for fit in both.summary["fit"]] == [0, 1]
    alone = attribute(rewrite(two, {"measure_end_ns": end_ns})).requests
    again = both.requests.filter(pl.col("request_id") >= 10_000)
    np.testing.assert_allclose(again["energy_j"].to_numpy(), alone["energy_j"].to_numpy(), rtol=1e-9)


def test_node_scope_counts_the_idle_gpus_of_the_node(run_of, rewrite):
    run = run_of()
    spare = (
        run.scan("power")
        .filter(pl.col("gpu") == 0)
        .with_columns(
            pl.lit(7, pl.UInt16).alias("gpu"),
            pl.lit(60_000, pl.UInt32).alias("power_instant_mw"),
            (60 * (pl.col("t_ns") - pl.col("t_ns").min()) // 1_000_000).cast(pl.UInt64).alias("energy_mj"),
        )
    )
    run = rewrite(run, power=pl.concat([run.scan("power"), spare]).collect())
    group, node = attribute(run), attribute(run, scope="node")
    assert_conserved(node)
    extra_j = node.summary["idle_j"] - group.summary["idle_j"]
    assert extra_j == pytest.approx(60 * group.summary["window"]["duration_s"], rel=0.01)
    assert node.summary["attributed_j"] == pytest.approx(group.summary["attributed_j"], rel=1e-9)


def test_a_running_or_killed_run_in_parts_can_be_read(run_of, rewrite):
    run = run_of()
    cut_ns = run.manifest["measure_start_ns"] + 20_000_000_000
    keep = {"requests": "sent_ns", "steps": "end_ns", "power": "t_ns"}
    for name, column in keep.items():
        frame = run.scan(name).filter(pl.col(column) < cut_ns).collect()
        if name == "requests":
            reached = [pl.when(pl.col(c) < cut_ns).then(pl.col(c)).alias(c) for c in frame.columns if c.endswith("_ns")]
            frame = frame.with_columns(reached)
        (run.path / f"{name}.parquet").unlink()
        writer = PartWriter(run.path, name)
        for part in frame.iter_slices(max(1, frame.height // 3)):
            writer.append(part)
    energy = attribute(rewrite(run, {"state": "running", "measure_end_ns": None}, truth=None))
    assert_conserved(energy)
    assert any("measure_end_ns is missing" in text for text in energy.summary["notes"])
    assert energy.summary["window"]["duration_s"] < 20.1


def test_an_unfinished_run_says_so_and_whose_work_other_is(run_of, rewrite):
    run = run_of()
    plain = attribute(run).requests
    requests = run.scan("requests").collect()
    kept = requests.head(requests.height - 5)
    verdicts = [{"name": "all_answered", "ok": False}, {"name": "clocks_held", "ok": True}]
    planned = {"planned": requests.height}
    energy = attribute(rewrite(run, {"state": "interrupted", "verdicts": verdicts, "requests": planned}, requests=kept))
    assert_conserved(energy)
    lost_j = plain.filter(~pl.col("request_id").is_in(kept["request_id"].implode()))["energy_j"].sum()
    assert energy.summary["other_j"] == pytest.approx(lost_j, rel=1e-6)
    assert energy.summary["notes"] == [
        f"the run is not complete (state: interrupted): {kept.height} of {requests.height} planned requests recorded",
        "the run failed its verdicts all_answered",
        f"{format_si(lost_j, ' J', 4)} of other are 5 requests of the trace whose end was not recorded",
    ]


def test_a_meter_at_odds_with_itself_is_said_once_for_all_gpus(run_of, rewrite):
    run = run_of()
    doubled = run.scan("power").with_columns(pl.col("power_instant_mw") * 2).collect()
    gpus = "gpu 0 on node, gpu 1 on node"
    (note,) = attribute(rewrite(run, power=doubled)).summary["notes"]
    assert note.startswith(f"{gpus}: power samples come to +")
    middle = run.manifest["measure_start_ns"] + 20_000_000_000
    frozen = pl.when(pl.col("t_ns") < middle).then("energy_mj").forward_fill().over("gpu").alias("energy_mj")
    (note,) = attribute(rewrite(run, power=run.scan("power").with_columns(frozen).collect())).summary["notes"]
    assert note.startswith(f"{gpus}: energy from instant samples: the counter stands still for")


def test_without_measure_times_the_window_is_first_send_to_last_done(run_of, rewrite):
    run = run_of()
    energy = attribute(rewrite(run, {"measure_start_ns": None, "measure_end_ns": None}))
    requests = run.scan("requests").collect()
    window = energy.summary["window"]
    assert window["start_ns"] == requests["sent_ns"].min()
    assert window["end_ns"] == max(requests["done_ns"].max(), run.scan("steps").collect()["end_ns"].max())


def test_idle_power_comes_from_the_run_itself_only_when_it_must(run_of, rewrite):
    run = run_of(rate=1.0, silent_s=(12.0, 30.0), duration_s=50.0)
    gpus = [{k: v for k, v in gpu.items() if not k.startswith("idle")} for gpu in run.manifest["gpus"]]
    summary = attribute(rewrite(run, {"gpus": gpus})).summary
    assert summary["fit"][0]["idle_power_w"]["before"] == pytest.approx(200, rel=0.02)
    assert "measured in" in summary["notes"][0]
    busy = rewrite(run_of("busy", rate=6.0, duration_s=10.0), {"gpus": gpus})
    with pytest.raises(AnalysisError, match="gpu 0 on node has no idle_power_w, and the run has no idle stretch"):
        attribute(busy)


def test_idle_power_is_interpolated_from_before_to_after(run_of, rewrite):
    run = run_of(rate=1.0, silent_s=(12.0, 30.0), duration_s=50.0)
    gpus = [{**gpu, "idle_power_after_w": {"counter": 104.0, "instant": 104.0}} for gpu in run.manifest["gpus"]]
    fit = attribute(rewrite(run, {"gpus": gpus})).summary["fit"][0]
    assert fit["idle_power_w"] == {"before": 200.0, "after": 208.0, "source": "counter"}


def test_hosts_clocks_are_brought_together(run_of, rewrite):
    run = run_of()
    plain = attribute(run)
    offset = 5_000_000_000_000
    steps = run.scan("steps").with_columns(pl.col("start_ns", "end_ns") + offset).collect()
    power = run.scan("power").with_columns(pl.col("t_ns", "sensor_ns") + offset).collect()
    hosts = [{"host": "node", "offset_ns": offset, "offset_error_ns": 0}]
    moved = attribute(rewrite(run, {"hosts": hosts, "workers": []}, steps=steps, power=power))
    np.testing.assert_allclose(moved.requests["energy_j"].to_numpy(), plain.requests["energy_j"].to_numpy(), rtol=1e-6)


def test_what_is_saved_is_what_was_computed(run_of):
    run = run_of()
    energy = attribute(run)
    save(energy)
    requests = pl.read_parquet(run.path / "energy/requests.parquet")
    wanted = ["request_id", "energy_j", "prefill_j", "decode_j", "shared_j", "energy_se_j", "bucket", "label"]
    assert requests.columns == wanted
    assert requests.select(energy.requests.columns).equals(energy.requests)
    assert json.loads((run.path / "energy/summary.json").read_text()) == energy.summary
    buckets = pl.read_parquet(run.path / "energy/buckets.parquet")
    assert buckets.filter(pl.col("group") == "all")["requests"].to_list() == [requests.height]
    assert not list((run.path / "energy").glob(".*"))
    again = ensure_energy(Run.open(run.path))
    assert again.fresh is False
    assert again.requests is not None
    assert again.requests.equals(requests)


def test_energy_older_than_the_manifest_is_computed_anew(run_of, rewrite):
    run = run_of()
    save(attribute(run))
    summary = run.path / "energy/summary.json"
    summary.write_text(summary.read_text().replace('"measured_j": ', '"measured_j": 1'))
    rewrite(run, {})
    later = summary.stat().st_mtime + 5
    os.utime(run.path / "manifest.json", (later, later))
    assert ensure_energy(Run.open(run.path)).fresh is True


def test_energy_of_an_unfinished_run_is_computed_each_time(run_of, rewrite):
    run = rewrite(run_of(), {"state": "running"})
    assert ensure_energy(run).fresh is True
    assert ensure_energy(run).fresh is True
