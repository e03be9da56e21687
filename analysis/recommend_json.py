"""A recommendation as JSON, and its schedule for a router (docs/answers.md has both)."""

from dataclasses import asdict
from typing import Any

from analysis.groups import ALL
from analysis.pareto import FRONTS, with_fronts
from analysis.recommend import KNOBS, Answer, Loser, Option, Recommendation, Versus
from analysis.recommend_text import thousand_cost
from tracegen.buckets import INPUT_EDGES, OUTPUT_EDGES

SCHEMA_VERSION = 1
SCHEDULE = "wattrace-schedule"


def document(found: Recommendation, price: float | None = None) -> dict[str, Any]:
    """All answers, the Pareto fronts, and the schedule where answers are by group."""
    table = found.table
    return {
        **_head(found, "wattrace-recommendation"),
        "sweep": str(table.path),
        **({} if price is None else {"gpu_hour_price": price}),
        "answers": [_answer(answer, price) for answer in found.answers],
        "pareto": _fronts(found),
        **({"schedule": schedule(found)} if any(answer.group != ALL for answer in found.answers) else {}),
        "missing": [{"cell": cell, "state": state, "why": why} for cell, state, why in table.missing],
        "remarks": table.remarks,
    }


def schedule(found: Recommendation) -> dict[str, Any]:
    """Which setting a router sends each group's requests to, by rate.

    `difference_percent` is the runner-up's against the setting; `verdict` says whether data tells them apart. Where no
    setting keeps to the objectives `tp` is null.
    """
    by = found.table.by
    rates: dict[float | None, dict[str, Any]] = {}
    for answer in found.answers:
        rates.setdefault(answer.rate_rps, {})[answer.group] = _entry(answer)
    edges = {"input_edges_tokens": INPUT_EDGES, "output_edges_tokens": OUTPUT_EDGES} if by == "bucket" else {}
    return {
        **_head(found, SCHEDULE),
        "by": by,
        **edges,
        "rates": [{"rate_rps": rate, "groups": groups} for rate, groups in rates.items()],
    }


def _head(found: Recommendation, kind: str) -> dict[str, Any]:
    table, wanted = found.table, found.wanted
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "simulated": table.simulated,
        "model": table.model,
        "engine": table.engine,
        "scope": table.scope,
        "objective": {"name": found.objective.name, "unit": found.objective.unit},
        "slo": {
            "bounds_ms": {("tbt" if m == "tpot" else m): list(b) for m, b in wanted.slo.bounds_ms.items()},
            "tbt_p99_ms": wanted.tbt_p99_ms,
            "attainment": wanted.attainment,
        },
    }


def _entry(answer: Answer) -> dict[str, Any]:
    best = answer.best
    rival = answer.runner_up
    figures: dict[str, Any] = {} if best is None else dict(best.figures)
    half = figures.get("energy_per_request_j_half")
    joules = figures.get("energy_per_request_j")
    return {
        **(dict.fromkeys(KNOBS) if best is None else _knobs(best)),
        "energy_per_request_j": joules,
        "energy_interval_j": None if half is None or joules is None else [max(joules - half, 0.0), joules + half],
        "ttft_mean_ms": figures.get("ttft_mean_ms"),
        "ttft_p99_ms": figures.get("ttft_p99_ms"),
        "tbt_mean_ms": figures.get("tbt_mean_ms"),
        "slo_attainment": figures.get("slo_attainment"),
        "verdict": answer.verdict,
        "runner_up": None if rival is None else _knobs(rival.option),
        "difference_percent": None if rival is None or rival.apart is None else asdict(rival.apart),
    }


def _knobs(option: Option) -> dict[str, Any]:
    return {name: _whole(getattr(option, name)) for name in KNOBS}


def _whole(value: float | None) -> float | None:
    """MHz and watts as they are written: 1200, not 1200.0."""
    return int(value) if value is not None and value == int(value) else value


def _option(option: Option, price: float | None) -> dict[str, Any]:
    cost = {} if price is None or option.value is None else {"cost_per_1000_requests": thousand_cost(option, price)}
    return {
        "setting": option.name,
        **_knobs(option),
        "standing": option.standing,
        "clock_held": option.clock_held,
        "repeats": option.repeats,
        "planned": option.planned,
        "value": option.value,
        "half_interval": option.half,
        **cost,
        "eligible": option.eligible,
        "unfit": option.unfit,
        "misses": [asdict(miss) for miss in option.misses],
        "figures": dict(option.figures),
    }


def _loser(loser: Loser, price: float | None) -> dict[str, Any]:
    return {**_option(loser.option, price), "against_best": None if loser.apart is None else asdict(loser.apart)}


def _versus(versus: Versus, price: float | None) -> dict[str, Any]:
    difference = None if versus.apart is None else asdict(versus.apart)
    return {"what": versus.what, "option": _option(versus.option, price), "best_against_it": difference}


def _answer(answer: Answer, price: float | None) -> dict[str, Any]:
    return {
        "rate_rps": answer.rate_rps,
        "group": answer.group,
        "verdict": answer.verdict,
        "best": None if answer.best is None else _option(answer.best, price),
        "runner_up": None if answer.runner_up is None else _loser(answer.runner_up, price),
        "not_told_apart": list(answer.tied),
        "saves": [_versus(versus, price) for versus in answer.against],
        "others": [_loser(loser, price) for loser in answer.losers],
    }


def _fronts(found: Recommendation) -> list[dict[str, Any]]:
    """The settings on a front, with what they are on it for."""
    rates = {answer.rate_rps for answer in found.answers}
    groups = {answer.group for answer in found.answers}
    fronts = with_fronts(found.table.settings)
    return [
        {
            "rate_rps": row["rate_rps"],
            "group": row["group"],
            **{name: _whole(row[name]) for name in KNOBS},
            "energy_per_request_j": row["energy_per_request_j"],
            **{latency: row[latency] for latency in FRONTS.values()},
            "on": [latency for name, latency in FRONTS.items() if row[f"pareto_{name}"]],
        }
        for row in fronts.iter_rows(named=True)
        if row["rate_rps"] in rates and row["group"] in groups and any(row[f"pareto_{name}"] for name in FRONTS)
    ]
