"""What a setting is asked for: latency objectives on a command line, and what is to be least."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from analysis.slo import DEFAULT_SLO, Bounds, Slo
from tracegen.errors import AnalysisError

DEFAULT_ATTAINMENT = 0.99
TAIL = "tbt_p99"
# Names on the command line, and those of `analysis.slo.METRICS`.
NAMES = {"ttft": "ttft", "tbt": "tpot", "tpot": "tpot", "e2e": "e2el", "e2el": "e2el"}
_USAGE = "give NAME:MS, for example ttft:250,tbt:100, or by size of input ttft:250,400,2000"
_VALUE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s)?")
_MS = {None: 1.0, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Wanted:
    """What a setting must keep to: `slo` by the share `attainment` of all requests, and a bound on a percentile.

    `tbt_p99_ms` bounds the 99th percentile of all gaps between tokens; None: it is free.
    """

    slo: Slo = DEFAULT_SLO
    tbt_p99_ms: float | None = None
    attainment: float = DEFAULT_ATTAINMENT

    def __post_init__(self) -> None:
        if not 0 < self.attainment <= 1:
            raise AnalysisError(f"--attainment {self.attainment:g}: give a share of requests in (0, 1], such as 0.99")

    def __str__(self) -> str:
        tail = [] if self.tbt_p99_ms is None else [f"99 % of gaps between tokens within {self.tbt_p99_ms:g} ms"]
        met = [f"{bounds_text(self.slo)} for {100 * self.attainment:g} % of requests"] if self.slo.bounds_ms else []
        return ", ".join([*met, *tail])


def bounds_text(slo: Slo) -> str:
    """The bounds of `slo` for people: one each, or three for short, medium and long inputs."""
    names = {"ttft": "TTFT", "tpot": "TBT", "e2el": "E2E"}
    return " and ".join(
        f"{names[metric]} {'/'.join(f'{b:g}' for b in (bounds if len(set(bounds)) > 1 else bounds[:1]))} ms"
        for metric, bounds in slo.bounds_ms.items()
    )


def parse_wanted(text: str | None, attainment: float = DEFAULT_ATTAINMENT) -> Wanted:
    """`Wanted` from `ttft:250,tbt:100`; None: DESIGN's (`analysis.slo.DEFAULT_SLO`). Raises `AnalysisError`.

    Values are ms, or carry their unit (`0.25s`); three of them are for short, medium and long inputs.
    """
    if text is None:
        return Wanted(attainment=attainment)
    values: dict[str, list[str]] = {}
    name = ""
    for part in text.replace("/", ",").split(","):
        head, colon, value = (word.strip() for word in part.rpartition(":"))
        if colon:
            name = head.lower()
            if name not in {*NAMES, TAIL}:
                raise AnalysisError(f"--slo '{text}': '{head}' is not one of {', '.join(NAMES)}, {TAIL}; {_USAGE}")
            if name in values:
                raise AnalysisError(f"--slo '{text}': '{head}' is given twice; {_USAGE}")
        elif not name:
            raise AnalysisError(f"--slo '{text}': {_USAGE}")
        values.setdefault(name, []).append(value)
    tail = values.pop(TAIL, None)
    if tail is not None and len(tail) != 1:
        raise AnalysisError(f"--slo '{text}': {TAIL} takes one value, for it is of a run's gaps and not of a request's")
    bounds = {NAMES[name]: _bounds(words, name, text) for name, words in values.items()}
    if len(bounds) < len(values):
        raise AnalysisError(f"--slo '{text}': tbt and tpot, e2e and e2el are the same; give one of each")
    return Wanted(Slo(bounds), None if tail is None else _ms(tail[0], TAIL, text), attainment)


def _bounds(words: list[str], name: str, text: str) -> Bounds:
    values = [_ms(word, name, text) for word in words]
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise AnalysisError(f"--slo '{text}': {name} has {len(values)} values; {_USAGE}")
    return values[0], values[1], values[2]


def _ms(word: str, name: str, text: str) -> float:
    found = _VALUE.fullmatch(word.lower())
    value = 0.0 if found is None else float(found[1]) * _MS[found[2]]
    if value <= 0:
        raise AnalysisError(f"--slo '{text}': {name} is '{word}', not a positive number of ms; {_USAGE}")
    return value


@dataclass(frozen=True)
class Objective:
    """What is to be least: a value of each row of `SweepTable.cells`, or of `groups` where it is of requests alone."""

    name: str
    unit: str
    noun: str  # what there is more or less of
    text: str
    value: pl.Expr
    of_groups: bool  # a meter and GPUs held know nothing of groups


_JOULES, _E2E_MS = pl.col("energy_per_request_j"), pl.col("e2e_mean_ms")
OBJECTIVES: Mapping[str, Objective] = {
    o.name: o
    for o in (
        Objective("energy", "J/request", "J/request", "joules a request", _JOULES, of_groups=True),
        Objective("power", "W", "mean power", "mean power", pl.col("power_w"), of_groups=False),
        Objective(
            "cost", "GPU-s/request", "GPU time", "GPU time held a request", pl.col("gpu_s_per_request"), of_groups=False
        ),
        Objective("performance", "ms", "mean E2E", "mean end-to-end latency", _E2E_MS, of_groups=True),
        Objective(
            "edp",
            "J s",
            "J/request x E2E",
            "joules a request times mean end-to-end latency",
            _JOULES * _E2E_MS / 1e3,
            of_groups=True,
        ),
    )
}


def check_price(price: float | None, what: Objective) -> None:
    """Raise `AnalysisError` for a price of a GPU-hour that is none, or that is not asked about."""
    if price is None:
        return
    if not 0 < price < float("inf"):
        raise AnalysisError(f"--gpu-hour-price {price:g}: give a positive price, for example 2.5")
    if what.name != "cost":
        raise AnalysisError(f"--gpu-hour-price {price:g}: goes with --objective cost, not {what.name}")


def objective(name: str) -> Objective:
    """The objective of that name. Raises `AnalysisError`."""
    if name not in OBJECTIVES:
        raise AnalysisError(f"--objective '{name}' is unknown; use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
