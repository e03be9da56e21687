"""What a finished run says of itself, for people and for machines; every figure comes from its tables."""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from replay.clock import NS_PER_MS, NS_PER_S
from replay.rundir import REQUESTS, Run

_NEEDED = ("status", "sent_ns", "first_token_ns", "last_token_ns", "output_tokens")
_EDGE_NS = NS_PER_S // 5  # what a counter may miss at either edge of the window
Ints = npt.NDArray[np.int64]


def summarize(run_dir: Path) -> dict[str, Any]:
    """Counts, latencies in ms, power in W and energy in J of the run in `run_dir`; None where nothing was measured."""
    run = Run.open(run_dir)
    manifest = run.manifest
    ok = _answered(run)
    start_ns, end_ns = manifest["measure_start_ns"], manifest["measure_end_ns"]
    seconds = (end_ns - start_ns) / NS_PER_S
    output_tokens = ok["output_tokens"].sum() if ok["output_tokens"].null_count() < ok.height else None
    gpus = [gpu for instance in manifest["instances"] for gpu in instance["gpus"]]
    energy_j, energy_why = _counter_j(run, gpus, start_ns, end_ns)
    return {
        "run": str(run_dir),
        "state": manifest["state"],
        "simulated": run.simulated,
        "seconds": seconds,
        "requests_planned": manifest["requests"]["planned"],
        "requests_sent": manifest["requests"]["sent"],
        "requests_ok": ok.height,
        "output_tokens": output_tokens,
        "output_tokens_per_s": None if output_tokens is None else output_tokens / seconds,
        "ttft_ms": _percentiles(ok["ttft_ns"]),
        "e2el_ms": _percentiles(ok["e2el_ns"]),
        "tpot_ms": _percentiles(ok["tpot_ns"]),
        "gpus": gpus,
        "freq_mhz": manifest["instances"][0]["freq_mhz"],
        "freq_asked_mhz": manifest["instances"][0]["freq_asked_mhz"],
        "energy_j": energy_j,
        "energy_why": energy_why,
        "mean_power_w": None if energy_j is None else energy_j / seconds,
        "verdicts": manifest["verdicts"],
    }


def _answered(run: Run) -> pl.DataFrame:
    """Of each request that was answered in full: `output_tokens`, `ttft_ns`, `e2el_ns`, `tpot_ns`.

    Read in batches, as all tables here: a run in virtual time can have millions of rows.
    """
    decoding_ns = pl.col("last_token_ns") - pl.col("first_token_ns")
    figures = [
        "output_tokens",
        (pl.col("first_token_ns") - pl.col("sent_ns")).alias("ttft_ns"),
        (pl.col("last_token_ns") - pl.col("sent_ns")).alias("e2el_ns"),
        (decoding_ns / (pl.col("output_tokens").cast(pl.Int64) - 1)).alias("tpot_ns"),
    ]
    none = REQUESTS.to_frame().select(_NEEDED)
    batches = chain([none], run.batches("requests", _NEEDED))
    return pl.concat([batch.filter(pl.col("status") == "ok").select(figures) for batch in batches])


def _percentiles(ns: pl.Series) -> dict[str, float] | None:
    """p50, p90 and p99 in ms; None without a value. A TPOT of a single token is no number and is left out."""
    ms = (ns.cast(pl.Float64) / NS_PER_MS).drop_nulls()
    ms = ms.filter(ms.is_finite())
    if ms.is_empty():
        return None
    return {f"p{q}": float(ms.quantile(q / 100, "linear") or 0.0) for q in (50, 90, 99)}


@dataclass
class _Counter:
    """One GPU's energy counter: of its readings, only those kept that tell what it stood at when the run's edges were.

    Readings come in order of time, from batch to batch.
    """

    start_ns: int
    end_ns: int
    t_ns: list[Ints] = field(default_factory=list)
    energy_mj: list[Ints] = field(default_factory=list)
    last_mj: int = -1  # of the readings around the run
    fell_back: bool = False

    def add(self, t_ns: Ints, energy_mj: Ints) -> None:
        """More readings, at least one."""
        around = energy_mj[(t_ns >= self.start_ns - NS_PER_S) & (t_ns <= self.end_ns + NS_PER_S)]
        if around.size:
            self.fell_back |= bool((np.diff(around, prepend=self.last_mj) < 0).any())
            self.last_mj = int(around[-1])
        beyond = np.searchsorted(t_ns, [self.start_ns, self.end_ns])
        kept = np.unique(np.clip([0, *(beyond - 1), *beyond, t_ns.size - 1], 0, t_ns.size - 1))
        self.t_ns.append(t_ns[kept])
        self.energy_mj.append(energy_mj[kept])


def _counters(run: Run, gpus: list[int], start_ns: int, end_ns: int) -> dict[int, _Counter]:
    """The energy counters of `gpus`."""
    counters = {gpu: _Counter(start_ns, end_ns) for gpu in gpus}
    known = pl.col("gpu").is_in(gpus) & pl.col("energy_mj").is_not_null()
    for batch in run.batches("power", ["gpu", "t_ns", "energy_mj"]):
        for readings in batch.filter(known).sort("t_ns").partition_by("gpu"):
            energy_mj = readings["energy_mj"].cast(pl.Int64).to_numpy()
            counters[readings["gpu"][0]].add(readings["t_ns"].to_numpy(), energy_mj)
    return counters


def _counter_j(run: Run, gpus: list[int], start_ns: int, end_ns: int) -> tuple[float | None, str | None]:
    """What the energy counters of `gpus` gained from `start_ns` to `end_ns`, or why it is unknown.

    Readings before and after the window count too: between two readings a counter is taken as steady. A counter that
    fell back, or of which the readings do not reach the window's edges, tells nothing of the whole window.
    """
    if not gpus or not run.has("power"):
        return None, "no power was read"
    gained_mj = 0.0
    for gpu, counter in _counters(run, gpus, start_ns, end_ns).items():
        t_ns = np.concatenate([*counter.t_ns, np.zeros(0, np.int64)])
        if t_ns.size < 2:
            return None, f"GPU {gpu} has no energy counter that was read"
        if t_ns[0] - start_ns > _EDGE_NS or end_ns - t_ns[-1] > _EDGE_NS:
            since_s, until_s = ((min(max(t, start_ns), end_ns) - start_ns) / NS_PER_S for t in (t_ns[0], t_ns[-1]))
            return (
                None,
                f"the energy counter of GPU {gpu} was read from {since_s:.1f} s to {until_s:.1f} s of the run only",
            )
        if counter.fell_back:
            return None, f"the energy counter of GPU {gpu} fell back (wrap-around or reset)"
        start_mj, end_mj = np.interp([start_ns, end_ns], t_ns, np.concatenate(counter.energy_mj))
        gained_mj += end_mj - start_mj
    return float(gained_mj) / 1e3, None


def lines(summary: dict[str, Any]) -> list[str]:
    """`summary` as lines for people, verdicts last."""
    s = summary
    mark = "SIMULATED  " if s["simulated"] else ""
    clock = f"{s['freq_mhz']} MHz" if s["freq_mhz"] else "the driver's clocks"
    if s["freq_asked_mhz"] != s["freq_mhz"]:
        clock += f" (asked for: {s['freq_asked_mhz']} MHz)"
    result = [
        f"{mark}{s['state']}: {s['requests_ok']:,} of {s['requests_planned']:,} requests ok in {s['seconds']:.1f} s",
        _latency("TTFT", s["ttft_ms"]),
        _latency("TPOT", s["tpot_ms"]),
        _latency("E2EL", s["e2el_ms"]),
    ]
    if s["output_tokens_per_s"] is not None:
        result.append(f"output  {s['output_tokens']:,} tokens, {s['output_tokens_per_s']:,.1f} tokens/s")
    if s["energy_j"] is not None:
        shown = f"{s['energy_j'] / 1e3:,.2f} kJ, mean {s['mean_power_w']:,.0f} W"
        result.append(f"energy  {shown} on {len(s['gpus'])} GPUs at {clock}, by the energy counters")
    else:
        result.append(f"energy  not measured: {s['energy_why']}")
    result.append("verdicts")
    marks = {True: "ok  ", False: "FAIL", None: "-   "}
    result += [f"  {marks[v['ok']]}  {v['name']:<15} {v['why']}" for v in s["verdicts"]]
    failed = [v["name"] for v in s["verdicts"] if v["ok"] is False]
    if failed:
        result.append(f"NOT TO BE TRUSTED without a look at: {', '.join(failed)}")
    return result


def _latency(name: str, ms: dict[str, float] | None) -> str:
    if ms is None:
        return f"{name}    no request got that far"
    return f"{name}    p50 {ms['p50']:,.1f} ms   p90 {ms['p90']:,.1f} ms   p99 {ms['p99']:,.1f} ms"
