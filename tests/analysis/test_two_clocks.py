"""Where the clock changes during a run each step follows the law of its own clock."""

import polars as pl
import pytest

from analysis.added import added_energy
from analysis.energy import attribute
from replay.rundir import Run

PAUSE_NS = 2 * 10**9


@pytest.fixture
def in_turn(run_of, rewrite):
    """Two runs of unlike laws, and one that is the first and then, at another clock, the second."""

    def make() -> tuple[Run, Run, Run]:
        fast, slow = run_of("fast", law="fast-kink", rate=2.0), run_of("slow", law="kink", rate=2.0)
        joined = run_of("joined", law="fast-kink", rate=2.0)
        begin_ns, end_ns = (fast.manifest[f"measure_{edge}_ns"] for edge in ("start", "end"))
        later_ns = end_ns - begin_ns + PAUSE_NS
        first = {name: fast.scan(name).collect() for name in ("requests", "steps", "segments", "power")}
        second = {name: slow.scan(name).collect() for name in first}
        moved = {
            "requests": [pl.col("^.*_ns$") + later_ns, pl.col("request_id") + 10_000],
            "steps": [pl.col("^.*_ns$") + later_ns, pl.col("step") + first["steps"].height],
            "segments": [pl.col("first_step", "last_step") + first["steps"].height, pl.col("request_id") + 10_000],
            "power": [pl.col("^.*_ns$") + later_ns],
        }
        after = {name: second[name].with_columns(exprs) for name, exprs in moved.items()}
        cut_ns = end_ns + PAUSE_NS // 2
        first["power"] = clocked(first["power"].filter(pl.col("t_ns") < cut_ns), 1980)
        after["power"] = clocked(after["power"].filter(pl.col("t_ns") >= cut_ns), 1200)
        ends = first["power"].group_by("gpu").agg(pl.col("energy_mj").last().alias("until"))
        begins = after["power"].group_by("gpu").agg(pl.col("energy_mj").first().alias("since"))
        after["power"] = (
            after["power"]
            .join(ends.join(begins, on="gpu"), on="gpu", how="left", maintain_order="left")
            .with_columns(energy_mj=pl.col("energy_mj") - pl.col("since") + pl.col("until") + 2500)
            .drop("since", "until")
        )
        tables = {name: pl.concat([first[name], after[name]]) for name in first}
        end_ns = slow.manifest["measure_end_ns"] + later_ns
        both = rewrite(joined, {"measure_end_ns": end_ns}, **tables, trace=None, truth=None)
        return fast, slow, both

    return make


def clocked(power: pl.DataFrame, clock_mhz: int) -> pl.DataFrame:
    return power.with_columns(pl.lit(clock_mhz, pl.UInt32).alias("sm_clock_mhz"))


def test_what_requests_add_is_by_the_law_of_their_own_clock(in_turn):
    fast, slow, both = in_turn()
    energy = attribute(both, "marginal")
    assert len(energy.summary["fit"][0]["regimes"]) == 2
    table = energy.requests
    for alone, offset in ((fast, 0), (slow, 10_000)):
        known = attribute(alone, "marginal").requests
        mine = table.filter(pl.col("request_id").is_in((known["request_id"] + offset).implode()))
        off = (mine["energy_j"] / known["energy_j"] - 1).abs()
        assert off.median() < 0.03
        ids = known["request_id"].to_list()[5:15]
        here, there = added_energy(both, [i + offset for i in ids]), added_energy(alone, ids)
        assert here.steps_j == pytest.approx(there.steps_j, rel=0.03)
        assert here.freed_s == pytest.approx(there.freed_s, rel=0.05)
        assert here.played_rel == pytest.approx(0, abs=0.05)
