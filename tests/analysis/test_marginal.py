"""What requests add: the method `marginal`, and predictions that a meter can check."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from analysis import split
from analysis.added import added_energy, predict_requests
from analysis.blocks import cut_blocks
from analysis.energy import attribute, attribute_methods
from analysis.model import Model, linear_model, pace_of
from analysis.pricing import price_steps
from analysis.split import METHODS, share, share_marginal
from analysis.steps import DECODE, PREFILL, Segments, Steps, sum_segments
from replay.rundir import Run
from replay.sim.hardware import Hardware, Work, load_profile
from tracegen.errors import AnalysisError
from tracegen.synthesize import synthesize

IDLE_W = 200.0
STEPS = 12
NOTHING = np.zeros(6)
OVERLAPPING = Model(
    np.array([0.002, 0, 1e-5, 0, 0, 0]),
    np.array([0.003, 1e-4, 1e-4, 0, 1e-8, 0]),
    np.array([0.018, 0, 0, 3e-7, 0, 0]),
    3.0,
    0.0,
    np.array([20.0, 150, 80, 60, 40, 0, 0, 30, 0.1, 0, 0, 0, 0]),
)
# Time grows faster than work (compute hides behind memory until it does not); power is the same whatever goes on.
CONVEX = Model(
    NOTHING, np.array([0, 1e-4, 1e-4, 0, 0, 0]), np.array([0.02, 0, 0, 0, 0, 0]), 4.0, 0.0, np.eye(13)[0] * 300
)
# Compute hides behind memory, and power levels off with it: the first work is the dearest.
CONCAVE = Model(
    NOTHING, np.array([0, 4e-4, 4e-4, 0, 0, 0]), np.array([0.1, 0, 0, 0, 0, 0]), 30.0, 0.0, np.eye(13)[3] * 300
)
LINEAR = linear_model(np.array([0.02, 1e-4, 3e-5, 2e-7, 1e-8]), np.array([60.0, 0.05, 0.02, 1e-5, 1e-6]))


def layout(rows) -> tuple[Steps, Segments]:
    """Steps of 50 ms, without pauses; rows of (request, first, last, kind, tokens, context)."""
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    tokens, prefill = table[:, 4].astype(float), table[:, 3] == PREFILL
    segments = Segments(
        request=table[:, 0],
        first=table[:, 1],
        last=table[:, 2],
        kind=table[:, 3],
        tokens=tokens,
        reads=np.where(prefill, tokens, 1.0),
        context=table[:, 5] + np.where(prefill, tokens / 2, 0.0),
        growth=tokens,
        q_start=table[:, 1].astype(float),
    )
    q = np.arange(STEPS) * 1.0
    count, work = sum_segments(segments, np.ones(STEPS), q)
    end_s, none = (q + 1) * 0.05, np.zeros(STEPS)
    steps = Steps(
        end_s - 0.05,
        end_s,
        np.full(STEPS, 0.05),
        np.ones(STEPS),
        q,
        count,
        work,
        none,
        np.zeros((STEPS, 4)),
        timed=True,
    )
    return steps, segments


MIXED = [
    (0, 0, 0, PREFILL, 400, 0),
    (0, 1, 11, DECODE, 1, 400),
    (1, 3, 5, PREFILL, 128, 0),
    (1, 6, 9, DECODE, 1, 384),
    (-1, 7, 11, DECODE, 1, 2000),
]
ALIKE = [(r, 0, 11, DECODE, 40, 0) for r in range(5)]


def marginal(model, steps, segments) -> split.Shares:
    idle_w = np.full(STEPS, IDLE_W)
    return share_marginal(model, steps, segments, idle_w, price_steps(model, steps, idle_w).total)


@pytest.mark.parametrize(
    "model", [OVERLAPPING, CONVEX, CONCAVE, LINEAR], ids=["overlap", "convex", "concave", "linear"]
)
def test_a_lone_request_pays_its_whole_steps(model):
    steps, segments = layout([(0, 0, 0, PREFILL, 300, 0), (0, 1, 11, DECODE, 1, 300)])
    shares = marginal(model, steps, segments)
    step_j = price_steps(model, steps, np.full(STEPS, IDLE_W)).total
    np.testing.assert_allclose(shares.energy_j, [step_j[0], step_j[1:].sum()], rtol=1e-12)
    assert shares.unlisted_j == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("model", [OVERLAPPING, LINEAR], ids=["activity", "linear"])
def test_it_is_the_step_with_the_request_less_the_step_without_at_the_steps_own_pace(model):
    steps, segments = layout(MIXED)
    shares = marginal(model, steps, segments)
    idle_w, pace = np.full(STEPS, IDLE_W), pace_of(model, steps)
    step_j = price_steps(model, steps, idle_w).total
    for i in range(len(segments)):
        expected_j = 0.0
        for k in range(int(segments.first[i]), int(segments.last[i]) + 1):
            _, _, _, kind, tokens, context = MIXED[i]
            had = context + tokens * (k - segments.first[i])
            own = [tokens, 0, 0, tokens * (had + tokens / 2)] if kind == PREFILL else [0, tokens, had, 0]
            rest = (steps.work[k] - own)[None, :]
            alone = steps.requests[k] == 1
            expected_j += step_j[k] - (0.0 if alone else model.energy_j(rest, idle_w[:1], pace[k : k + 1])[0])
        # What steps cost is looked up between nodes (`analysis.game.NODES_PER_OCTAVE`).
        assert shares.energy_j[i] == pytest.approx(expected_j, rel=1e-6)
    assert shares.energy_j.sum() + shares.unlisted_j == pytest.approx(step_j.sum(), rel=1e-12)


def test_the_time_that_work_adds_is_paid_at_idle_power_and_more():
    steps, segments = layout(ALIKE)
    no_power = replace(CONVEX, power=np.zeros(13))
    pace = pace_of(no_power, steps)
    less = no_power.predict_s(steps.work * 0.8)
    np.testing.assert_allclose(marginal(no_power, steps, segments).energy_j, (IDLE_W * (0.05 - pace * less)).sum())


def test_it_is_above_the_shapley_price_where_cost_grows_faster_than_work_and_below_where_slower():
    steps, segments = layout(ALIKE)
    idle_w = np.full(STEPS, IDLE_W)
    blocks = cut_blocks(steps, 1.0)

    def both(model):
        shares = share(price_steps(model, steps, idle_w), steps, segments, blocks)
        return marginal(model, steps, segments).energy_j, shares.energy_j - shares.shared_j

    convex, price = both(CONVEX)
    assert np.all(convex > 1.1 * price)
    concave, price = both(CONCAVE)
    assert np.all(concave < 0.9 * price)
    linear, price = both(LINEAR)
    np.testing.assert_allclose(linear, price, rtol=1e-9)


def test_what_is_left_over_can_be_less_than_nothing():
    steps, segments = layout([(r, 0, 11, DECODE, 100, 0) for r in range(5)])
    steep = Model(
        NOTHING, np.array([0, 1e-4, 1e-4, 0, 0, 0]), np.array([1e-4, 0, 0, 0, 0, 0]), 4.0, 0.0, np.eye(13)[5] * 9
    )
    shares = marginal(steep, steps, segments)
    assert shares.energy_j.sum() + shares.unlisted_j == pytest.approx(12 * 0.05 * (IDLE_W + 9), rel=1e-3)
    steps, segments = layout(ALIKE)
    assert marginal(CONVEX, steps, segments).unlisted_j > 0


def test_no_work_beside_others_costs_nothing():
    steps, segments = layout([*ALIKE, (7, 0, 11, DECODE, 0, 0)])
    shares = marginal(OVERLAPPING, steps, segments)
    assert shares.energy_j[-1] == 0
    assert shares.energy_j[:-1].min() > 0


def test_unrolling_in_pieces_changes_nothing(monkeypatch):
    steps, segments = layout(MIXED)
    whole = marginal(OVERLAPPING, steps, segments)
    monkeypatch.setattr(split, "ROWS_AT_ONCE", 4)
    pieces = marginal(OVERLAPPING, steps, segments)
    np.testing.assert_allclose(pieces.energy_j, whole.energy_j, rtol=1e-12)
    assert [k.size for _, k in split.each_step(segments)] == [1, 11, 3, 4, 5]


def assert_conserved(energy) -> None:
    summary = energy.summary
    total_j = energy.requests["energy_j"].sum() + summary["idle_j"] + summary["other_j"]
    assert total_j == pytest.approx(summary["measured_j"], rel=1e-9)
    parts = energy.requests["prefill_j"] + energy.requests["decode_j"]
    assert (parts - energy.requests["energy_j"]).abs().max() <= 1e-9
    assert energy.requests["energy_j"].min() >= 0


def test_a_run_is_conserved_and_prefill_and_decode_are_apart(run_of):
    run = run_of(noise_rel=0.02)
    both = attribute_methods(run, ["shapley", "marginal"])
    energy, shapley = both["marginal"], both["shapley"]
    assert_conserved(energy)
    assert energy.summary["other_j"] > 0.1 * energy.summary["measured_j"]
    assert energy.summary["notes"][-1].endswith(
        "has what no single request adds to a step: marginal costs do not add up"
    )
    assert energy.requests["prefill_j"].min() > 0
    long = run.scan("requests").select(pl.col("output_tokens") > 1).collect().to_series()
    assert energy.requests.filter(long)["decode_j"].min() > 0
    assert energy.requests["shared_j"].sum() == 0
    assert energy.summary["idle_j"] == shapley.summary["idle_j"]
    # Prompts fill steps that would be there anyway; an answer's token mostly rides along with others'.
    ratio = [energy.summary[key] / shapley.summary[key] for key in ("prefill_j", "decode_j")]
    assert 1.2 > ratio[0] > ratio[1] > 0


def test_client_timestamps_and_foreign_work_are_conserved_too(run_of, rewrite):
    run = rewrite(run_of(rate=1.0), steps=None, segments=None)
    energy = attribute(run, "marginal")
    assert energy.summary["membership"] == "client timestamps"
    assert_conserved(energy)
    relative = energy.requests["energy_se_j"] / energy.requests["energy_j"]
    exact = attribute(run_of("exact", rate=1.0), "marginal").requests
    assert relative.median() > 2 * (exact["energy_se_j"] / exact["energy_j"]).median()
    run = run_of("foreign")
    requests = run.scan("requests").filter(pl.col("request_id") < 110).collect()
    assert_conserved(attribute(rewrite(run, requests=requests), "marginal"))


def test_null_means_no_record_whatever_the_method(run_of, rewrite):
    run = run_of()
    run = rewrite(run, segments=run.scan("segments").filter(pl.col("request_id") != 105).collect())
    for method, energy in attribute_methods(run, [*METHODS, "marginal"]).items():
        assert energy.requests.filter(pl.col("energy_j").is_null())["request_id"].to_list() == [105], method


def test_slow_first_steps_of_a_warm_up_teach_the_model_nothing(run_of, rewrite):
    run = run_of(rate=1.0)
    plain = attribute_methods(run, ["shapley", "marginal"])
    steps, segments = run.scan("steps").collect(), run.scan("segments").collect()
    warm = steps.head(10).with_columns(
        start_ns=run.manifest["measure_start_ns"] - (10 - pl.col("step").cast(pl.Int64)) * 10**9,
        waiting=pl.when(pl.col("step") < 9).then(3).otherwise(0).cast(pl.UInt32),
    )
    warm = warm.with_columns(end_ns=pl.col("start_ns") + 9 * 10**8)
    foreign = segments.filter(pl.col("last_step") < 10).with_columns(request_id=pl.lit(None, pl.UInt64))
    run = rewrite(
        run,
        steps=pl.concat([warm, steps.with_columns(pl.col("step") + 10)]),
        segments=pl.concat([foreign, segments.with_columns(pl.col("first_step", "last_step") + 10)]),
    )
    for method, energy in attribute_methods(run, ["shapley", "marginal"]).items():
        np.testing.assert_allclose(energy.requests["energy_j"], plain[method].requests["energy_j"], rtol=1e-9)
    ids = energy.requests["request_id"].to_list()[:20]
    added = added_energy(run, ids)
    assert added.why is None
    assert added.played_rel == pytest.approx(0, abs=0.02)


def test_an_unknown_method_is_told_of_all(run_of):
    with pytest.raises(AnalysisError, match="use one of shapley, equal-time, tokens, work, marginal"):
        attribute(run_of(), "average")


@pytest.fixture(scope="module")
def virtual(virtual_run, tmp_path_factory):
    """Make runs of the simulated engine in virtual time, once for each name."""
    made: dict[str, Run] = {}

    def make(name: str, trace: pl.DataFrame, **options) -> Run:
        if name not in made:
            made[name] = virtual_run(tmp_path_factory.mktemp("virtual") / name, trace, **options)
        return made[name]

    return make


def chat(rate: float, seed: int, first_id: int = 0) -> pl.DataFrame:
    frame, _ = synthesize("chat", rate, 90 * 10**9, seed)
    return frame.with_columns(pl.col("request_id") + first_id)


def true_marginal_j(run: Run, tp: int, clock_mhz: int) -> pl.DataFrame:
    """What each request truly added to its steps, by the simulator's own step energy."""
    hardware = Hardware(load_profile(), tp)
    steps = run.scan("steps").collect()
    rows = (
        run.scan("segments")
        .with_columns(step=pl.int_ranges("first_step", pl.col("last_step") + 1, dtype=pl.UInt64))
        .explode("step")
        .with_columns(had=pl.col("context_start") + pl.col("tokens_per_step") * (pl.col("step") - pl.col("first_step")))
        .join(steps.lazy(), on="step")
        .collect()
    )
    prefill, tokens, had = (
        (rows["kind"] == "prefill").to_numpy(),
        rows["tokens_per_step"].to_numpy(),
        rows["had"].to_numpy(),
    )
    own = [tokens * prefill, tokens * ~prefill, had * ~prefill, tokens * prefill * (had + tokens / 2)]
    names = ("prefill_tokens", "decode_tokens", "context_tokens", "prefill_attention")
    whole = [rows[name].to_numpy().astype(float) for name in names]
    rest = [np.maximum(w - o, 0.0) for w, o in zip(whole, own, strict=True)]
    alone = (rows["requests"] == 1).to_numpy()
    rest_j = np.where(alone, 0.0, hardware.step_j(Work(*rest), float(clock_mhz)))
    added = rows.with_columns(true_j=pl.Series(hardware.step_j(Work(*whole), float(clock_mhz)) - rest_j))
    return added.group_by("request_id").agg(pl.col("true_j").sum())


@pytest.mark.parametrize(("rate", "seed"), [(0.1, 1), (0.5, 1), (0.8, 2)])
def test_it_is_near_what_the_simulator_says_that_requests_truly_add(virtual, rate, seed):
    run = virtual(f"true-{rate}-{seed}", chat(rate, seed))
    both = attribute_methods(run, ["shapley", "marginal"])
    shares = both["shapley"].requests.select("request_id", share_j="energy_j")
    table = both["marginal"].requests.join(true_marginal_j(run, 2, 1980), on="request_id").join(shares, on="request_id")
    assert table.height == run.scan("requests").collect().height
    # A small difference of two steps' energies: its error is judged by what the request took part in.
    off = ((table["energy_j"] - table["true_j"]) / table["share_j"]).abs()
    assert off.median() < 0.02
    assert off.max() < 0.06
    assert table["energy_j"].sum() == pytest.approx(table["true_j"].sum(), rel=0.06)
    assert (table["share_j"] / table["true_j"] - 1).abs().median() > 4 * off.median()


def metered_j(run: Run, seconds: float) -> float:
    """Measured energy, the window stretched at idle power to `seconds`."""
    summary = attribute(run, "equal-time").summary
    serving = run.manifest["instances"][0]["gpus"]
    idle_w = sum(gpu["idle_power_w"]["counter"] for gpu in run.manifest["gpus"] if gpu["gpu"] in serving)
    return summary["measured_j"] + idle_w * (seconds - summary["window"]["duration_s"])


@pytest.mark.parametrize(("rate", "extra_rate"), [(0.1, 0.1), (0.4, 0.2)])
def test_an_added_stream_raises_measured_energy_by_what_is_predicted(virtual, rate, extra_rate):
    base, extra = chat(rate, 1), chat(extra_rate, 77, 1000)
    alone = virtual(f"alone-{rate}", base)
    both = virtual(f"both-{rate}", pl.concat([base, extra]).sort("arrival_ns"))
    measured_j = metered_j(both, 400) - metered_j(alone, 400)
    added = added_energy(both, extra["request_id"].to_list())
    assert added.requests == extra.height
    assert added.why is None
    assert added.played_rel == pytest.approx(0, abs=0.01)
    assert added.meter_j == pytest.approx(measured_j, rel=0.05)
    # Steps as they were overstate it: an engine that is never idle does more steps in the time that falls free.
    assert added.steps_j - added.freed_j > 1.03 * measured_j


def test_one_request_adds_its_marginal_cost_and_all_add_everything(run_of):
    run = run_of()
    each = attribute(run, "marginal")
    for request_id, energy_j in each.requests.head(5).select("request_id", "energy_j").iter_rows():
        assert added_energy(run, [request_id]).steps_j == pytest.approx(energy_j, rel=1e-9)
    everybody = added_energy(run, each.requests["request_id"].to_list())
    assert everybody.steps_j == pytest.approx(each.summary["measured_j"] - each.summary["idle_j"], rel=1e-9)
    assert everybody.steps_j > 1.05 * each.requests["energy_j"].sum()


def test_of_a_saturated_engine_no_meter_reading_is_predicted(virtual):
    trace = chat(2.0, 3)
    added = added_energy(virtual("saturated", trace), trace["request_id"].to_list()[:20])
    assert added.meter_j is None
    assert "it was saturated" in added.why
    assert added.steps_j > 0


def test_what_cannot_be_predicted_is_one_clear_line(run_of, rewrite):
    run = run_of()
    with pytest.raises(AnalysisError, match="none of the 2 requests was in an engine step"):
        added_energy(run, [1, 2])
    other = rewrite(run_of("other"), {"instances": [{**run.manifest["instances"][0], "tp": 4}]})
    with pytest.raises(AnalysisError, match=r"other: TP 4 differs from 2 of .*run; predict from a run like it"):
        predict_requests(run, other)
    with pytest.raises(AnalysisError, match="has no step records"):
        added_energy(rewrite(run, steps=None, segments=None), [100])


def test_a_model_fitted_on_the_mix_predicts_requests_that_run_alone(virtual):
    fitted = virtual("mix", chat(0.5, 1))
    trace = chat(0.5, 9).head(8)
    singles = trace.with_columns(arrival_ns=pl.Series(np.arange(8) * 40 * 10**9, dtype=pl.Int64))
    table = predict_requests(fitted, virtual("singles", singles))
    assert table["request_id"].to_list() == singles["request_id"].to_list()
    assert table["steps"].to_list() == singles["output_tokens"].to_list()
    for measured, bound in (("measured_j", 0.1), ("measured_wide_j", 0.02)):
        ratio = (table["predicted_j"] / table[measured]).to_numpy()
        assert np.abs(ratio - 1).max() < bound
    assert abs(np.median(table["predicted_s"] / table["seconds"]) - 1) < 0.02


def test_only_requests_that_were_alone_are_compared(virtual):
    sparse = virtual("alone-0.1", chat(0.1, 1))
    alone = predict_requests(virtual("mix", chat(0.5, 1)), sparse)["request_id"].to_list()
    times = sparse.scan("requests").collect()
    for row in times.filter(pl.col("request_id").is_in(alone)).iter_rows(named=True):
        others = times.filter(pl.col("request_id") != row["request_id"])
        inside = (others["sent_ns"] < row["done_ns"] - 10**8) & (others["done_ns"] > row["sent_ns"] + 10**8)
        assert not inside.any()
    assert 0 < len(alone) < times.height
