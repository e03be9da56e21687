"""What is left between measured operating points and simulated ones: ratios to the top clock, levels, saturation."""

from typing import Any, NamedTuple

import numpy as np
import polars as pl

SATURATED = 3.0  # times the TTFT at the lowest rate of the same TP, bucket and clock
_SETTING = ("tp", "bucket", "load_rps")
_PAIRS = {"power": ("power_like", "sim_power_w"), "ttft": ("ttft_s", "sim_ttft_s")}


class Spread(NamedTuple):
    """Relative errors of a group of points."""

    points: int
    median_abs: float
    p95_abs: float
    median: float  # signed: the lean

    @staticmethod
    def of(errors: pl.Series) -> "Spread | None":
        """The spread of `errors`; none of nothing."""
        if errors.is_empty():
            return None
        values = errors.to_numpy()
        middle, high = np.quantile(np.abs(values), (0.5, 0.95))
        return Spread(len(values), float(middle), float(high), float(np.median(values)))


def steady() -> pl.Expr:
    """Whether a point is below saturation as measured: its TTFT at most `SATURATED` times that of the lowest rate."""
    lowest = pl.col("ttft_s").sort_by("load_rps").first().over("tp", "bucket", "sm_clock_mhz")
    return pl.col("ttft_s") <= SATURATED * lowest


def add_ratios(points: pl.DataFrame) -> pl.DataFrame:
    """The steady ones of simulated `points` that have a steady twin at the highest clock, and their errors.

    `power_error` and `ttft_error` are simulated / measured - 1 of the ratio to the highest clock of the points;
    `power_ratio`, `sim_power_ratio` and so on the ratios themselves. The twins are left out.
    """
    kept = points.filter(steady())
    top_mhz = points["sm_clock_mhz"].max()
    values = [column for pair in _PAIRS.values() for column in pair]
    twins = kept.filter(pl.col("sm_clock_mhz") == top_mhz).select(
        *_SETTING, *(pl.col(v).alias(f"top_{v}") for v in values)
    )
    joined = kept.filter(pl.col("sm_clock_mhz") != top_mhz).join(twins, on=_SETTING, maintain_order="left")
    for name, (measured, simulated) in _PAIRS.items():
        joined = joined.with_columns(
            (pl.col(measured) / pl.col(f"top_{measured}")).alias(f"{name}_ratio"),
            (pl.col(simulated) / pl.col(f"top_{simulated}")).alias(f"sim_{name}_ratio"),
        ).with_columns((pl.col(f"sim_{name}_ratio") / pl.col(f"{name}_ratio") - 1).alias(f"{name}_error"))
    return joined


def spreads(ratios: pl.DataFrame, by: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The errors of power and TTFT ratio, one row a group: its keys, medians of the ratios, `power`, `ttft` spreads."""
    groups = ratios.sort(*by).group_by(*by, maintain_order=True) if by else [((), ratios)]
    return [
        dict(zip(by, key, strict=True))
        | {
            f"{name}_{what}": group[f"{prefix}{name}_ratio"].median()
            for name in _PAIRS
            for what, prefix in _WHAT.items()
        }
        | {name: Spread.of(group[f"{name}_error"]) for name in _PAIRS}
        for key, group in groups
    ]


_WHAT = {"measured": "", "simulated": "sim_"}


def levels(points: pl.DataFrame, by: tuple[str, ...] = ("tp",)) -> list[dict[str, Any]]:
    """Simulated over measured TTFT of the steady points at the highest clock, by TP: `ttft` is the spread."""
    top = points.filter(steady() & (pl.col("sm_clock_mhz") == pl.col("sm_clock_mhz").max()))
    error = top["sim_ttft_s"] / top["ttft_s"] - 1
    return [
        dict(zip(by, key, strict=True)) | {"ttft": Spread.of(group["error"])}
        for key, group in top.with_columns(error=error).sort(*by).group_by(*by, maintain_order=True)
    ]


def knees(points: pl.DataFrame) -> list[dict[str, Any]]:
    """The highest rate that is not saturated, measured and simulated by the same rule, at the highest clock.

    `ended` says that the sweep ended before the measured knee.
    """
    top = points.filter(pl.col("sm_clock_mhz") == pl.col("sm_clock_mhz").max()).sort("tp", "bucket", "load_rps")
    rows = []
    for (tp, bucket), cell in top.group_by("tp", "bucket", maintain_order=True):
        rates = cell["load_rps"].to_numpy()
        row: dict[str, Any] = {"tp": tp, "bucket": bucket}
        for name, column in {"measured_rps": "ttft_s", "simulated_rps": "sim_ttft_s"}.items():
            ttft_s = cell[column].to_numpy()
            row[name] = float(rates[ttft_s <= SATURATED * ttft_s[0]].max())
        rows.append(row | {"ended": bool(row["measured_rps"] == rates[-1])})
    return rows


def watts_per_unit(points: pl.DataFrame) -> tuple[float, float, float]:
    """Simulated W for one unit of `power_like`, steady points: p5, median, p95. Equal if levels fit."""
    kept = points.filter(steady())
    low, middle, high = np.quantile((kept["sim_power_w"] / kept["power_like"]).to_numpy(), (0.05, 0.5, 0.95))
    return float(low), float(middle), float(high)
