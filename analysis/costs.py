"""What a run's joules come to outside the machine room: at the facility's meter, in CO2 and in money.

facility_j = measured_j x PUE (power usage effectiveness, ISO/IEC 30134-2: the facility's energy over that of its
computers); kWh = J / 3.6e6; gCO2e = kWh x the grid's carbon intensity, g/kWh; cost = kWh x price. Carbon and cost are
of the facility's energy. They stand beside the joules and never in them.

Scope is energy in use: what making the hardware emitted is not in it, and neither are hosts' CPUs, fans and network,
which no GPU meter sees, but for what the PUE makes of them.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from analysis.carbon import CarbonSeries, wall_clock_s
from analysis.energy import Energy
from analysis.latency import answered
from analysis.load import NS_PER_S
from analysis.requests import CORE, request_table
from analysis.spread import time_in_system
from analysis.stretches import joules_between, meters
from replay.rundir import Run
from tracegen.buckets import BUCKETS
from tracegen.console import format_si
from tracegen.errors import AnalysisError

J_PER_KWH = 3.6e6
LEAST_PUE, MOST_PUE = 1.0, 5.0  # below 1 no facility is; above 5 it is not a ratio


@dataclass(frozen=True)
class Rates:
    """What a joule stands for elsewhere; None: not asked."""

    pue: float | None = None
    carbon: float | CarbonSeries | None = None  # g/kWh
    price_per_kwh: float | None = None
    currency: str | None = None

    def __post_init__(self) -> None:
        if self.pue is not None and not LEAST_PUE <= self.pue <= MOST_PUE:
            raise AnalysisError(
                f"--pue {self.pue:g}: is facility over IT energy, from {LEAST_PUE:g} to {MOST_PUE:g}; for example 1.2"
            )
        if self.price_per_kwh is not None and not 0 <= self.price_per_kwh < float("inf"):
            raise AnalysisError(f"--price {self.price_per_kwh:g}: give a price per kWh from 0 up, for example 0.30")
        if self.currency is not None and self.price_per_kwh is None:
            raise AnalysisError(f"--currency {self.currency}: names the unit of --price, which is not given")

    @property
    def asked(self) -> bool:
        """Whether there is anything to work out."""
        return any(value is not None for value in (self.pue, self.carbon, self.price_per_kwh))

    @property
    def facility(self) -> float:
        """Facility joules per joule."""
        return 1.0 if self.pue is None else self.pue


def add_costs(energy: Energy, rates: Rates) -> Energy:
    """`energy` with `costs` in its summary and, where asked, the columns `carbon_g` and `cost` of its requests.

    A request's are of its `energy_j`, with `idle_j` where idle energy was spread, at the facility. With a series of
    carbon intensity a request's joules count at the mean over its time in the system, and the run's at the times at
    which its GPUs drew them, by the power readings.

    Raises `AnalysisError` where a series does not cover the run, or the run has no time of day.
    """
    if not rates.asked:
        return energy
    run_g_per_kwh, intensity = _intensities(energy, rates.carbon)
    own_j = pl.col("energy_j") + (pl.col("idle_j") if "idle_j" in energy.requests.columns else 0.0)
    kwh = own_j * rates.facility / J_PER_KWH
    requests = energy.requests
    if intensity is not None:
        requests = requests.with_columns((kwh * intensity).alias("carbon_g"))
    if rates.price_per_kwh is not None:
        requests = requests.with_columns((kwh * rates.price_per_kwh).alias("cost"))
    measured_j = energy.summary["measured_j"]
    run_kwh = measured_j * rates.facility / J_PER_KWH
    whole = {
        "energy_j": measured_j,
        **({} if rates.pue is None else {"facility_j": measured_j * rates.pue}),
        "kwh": run_kwh,
        **({} if run_g_per_kwh is None else {"carbon_g": run_kwh * run_g_per_kwh}),
        **({} if rates.price_per_kwh is None else {"cost": run_kwh * rates.price_per_kwh}),
    }
    document = {
        "inputs": _inputs(rates, run_g_per_kwh),
        "simulated": energy.run.simulated,
        "request_energy": "energy_j + idle_j" if "idle_j" in requests.columns else "energy_j",
        "run": whole,
        **_per_unit(energy.run, requests.with_columns(own_j.alias("own_j")), rates),
    }
    return replace(energy, requests=requests, summary={**energy.summary, "costs": document})


def _intensities(energy: Energy, carbon: float | CarbonSeries | None) -> tuple[float | None, float | pl.Series | None]:
    """g/kWh of the run as a whole, and of each request."""
    if not isinstance(carbon, CarbonSeries):
        return carbon, carbon
    run, window = energy.run, energy.summary["window"]
    window_ns = int(window["start_ns"]), int(window["end_ns"])
    begin_s, end_s = (float(t) for t in wall_clock_s(run, window_ns))
    carbon.check_covers(begin_s, end_s)
    times = time_in_system(run, window_ns)
    times = energy.requests.select("request_id").join(times, on="request_id", how="left", maintain_order="left")
    span = [wall_clock_s(run, times[name].fill_null(window_ns[0]).to_numpy()) for name in ("begin_ns", "end_ns")]
    return _weighted(run, energy.summary["scope"], carbon, window_ns), pl.Series(carbon.mean(span[0], span[1]))


def _weighted(run: Run, scope: str, carbon: CarbonSeries, window_ns: tuple[int, int]) -> float:
    """Mean g/kWh over `window_ns`, weighted by the power that the run's GPUs drew."""
    begin_s, end_s = (float(t) for t in wall_clock_s(run, window_ns))
    inside = carbon.since_s[(carbon.since_s > begin_s) & (carbon.since_s < end_s)]
    moments_s = np.concatenate([[begin_s], inside, [end_s]])
    grams = carbon.at(moments_s[:-1])
    if grams.size == 1:
        return float(grams[0])
    # The wall clock's drift within a run is far below a reading's distance: one offset places the edges.
    edges_ns = [window_ns[0] + round((t - begin_s) * NS_PER_S) for t in moments_s]
    joules = joules_between(run, meters(run, scope), edges_ns)
    return float(np.average(grams, weights=joules if joules.sum() > 0 else np.diff(moments_s)))


def _inputs(rates: Rates, run_g_per_kwh: float | None) -> dict[str, Any]:
    """What the figures rest on, and who said so."""
    inputs: dict[str, Any] = {}
    if rates.pue is not None:
        inputs["pue"] = {"value": rates.pue, "source": "--pue"}
    if rates.carbon is not None:
        source = rates.carbon.source if isinstance(rates.carbon, CarbonSeries) else "--carbon"
        inputs["carbon_g_per_kwh"] = {"value": run_g_per_kwh, "source": source}
    if rates.price_per_kwh is not None:
        inputs["price_per_kwh"] = {"value": rates.price_per_kwh, "currency": rates.currency, "source": "--price"}
    return inputs


def _per_unit(run: Run, requests: pl.DataFrame, rates: Rates) -> dict[str, Any]:
    """Means over the answered requests whose energy is known: each, per 1,000 output tokens, and by bucket."""
    table = request_table(run, None, CORE).select("request_id", "bucket", "status", "output_tokens")
    table = table.filter(answered()).join(requests, on="request_id").drop_nulls("own_j")
    sums = [pl.col(name).sum() for name in ("own_j", "carbon_g", "cost") if name in table.columns]
    told = table.drop_nulls("output_tokens")  # or joules would be counted whose tokens are not
    buckets = table.drop_nulls("bucket").group_by("bucket").agg(pl.len().alias("requests"), *sums).to_dicts()
    return {
        "per_request": _unit(table.select(sums).row(0, named=True), table.height, rates) | {"requests": table.height},
        "per_1000_output_tokens": _unit(
            told.select(sums).row(0, named=True), float(told["output_tokens"].sum()) / 1000, rates
        ),
        "buckets": [
            {"bucket": row["bucket"], "requests": row["requests"], **_unit(row, row["requests"], rates)}
            for row in sorted(buckets, key=lambda row: BUCKETS.index(row["bucket"]))
        ],
    }


def _unit(sums: dict[str, Any], units: float, rates: Rates) -> dict[str, float | None]:
    """`sums` of joules, grams and money divided by `units`; null where there are none."""

    def each(value: float) -> float | None:
        return value / units if units else None

    own_j = float(sums["own_j"])
    document = {"energy_j": each(own_j)}
    if rates.pue is not None:
        document["facility_j"] = each(own_j * rates.pue)
    document["kwh"] = each(own_j * rates.facility / J_PER_KWH)
    return document | {name: each(float(sums[name])) for name in ("carbon_g", "cost") if name in sums}


def rows_for_people(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of `summary["costs"]`."""
    price = document["inputs"].get("price_per_kwh", {})
    names = {
        "energy_j": "J",
        "facility_j": "J at the facility",
        "kwh": "kWh",
        "carbon_g": "gCO2e",
        "cost": f"cost, {price['currency']}" if price.get("currency") else "cost",
    }
    lines = [("the run", document["run"]), ("an answered request", document["per_request"])]
    lines.append(("1,000 output tokens", document["per_1000_output_tokens"]))
    lines += [(f"a request of {row['bucket']}", row) for row in document["buckets"]]
    shown = [name for name in names if name in document["run"]]
    cells = [[label, *(format_si(line[name], digits=4) for name in shown)] for label, line in lines]
    return ["", *(names[name] for name in shown)], cells
