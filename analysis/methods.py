"""How much the choice of method moves: J/request of each bucket by every method, beside the default."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis.energy import Energy, attribute_methods
from analysis.evaluate import judge
from analysis.latency import answered
from analysis.requests import CORE, request_table
from analysis.split import DEFAULT_METHOD, MARGINAL, METHOD_NAMES
from replay.rundir import Run
from tracegen.buckets import BUCKETS
from tracegen.console import format_si

ALL = "all"


@dataclass(frozen=True)
class Methods:
    """Every method on one run.

    `buckets`: one row a bucket in order of size, then `all`: `bucket`, `requests`, and for each method M `M_j`
    (J/request), `M_rel` (over the default's, minus 1) and `M_rank` (1: the cheapest bucket; null for `all`).
    `methods`: one document a method: where its joules are, how far its requests are from the default's, and for a
    simulated run its error against the truth.
    """

    run: Run
    default: str
    scope: str
    buckets: pl.DataFrame
    methods: tuple[dict[str, Any], ...]

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "run": self.run.name,
            "simulated": self.run.simulated,
            "default": self.default,
            "scope": self.scope,
            "methods": list(self.methods),
            "buckets": self.buckets.to_dicts(),
        }


def compare_methods(run: Run, scope: str = "gpu") -> Methods:
    """Attribute `run` by every method and set them side by side, over the answered requests whose energy is known.

    Raises `AnalysisError` or `RunError` as `analysis.energy.attribute` does.
    """
    energies = attribute_methods(run, METHOD_NAMES, scope)
    errors = {error.method: error for error in judge(run, energies)} if run.has("truth") else {}
    known = request_table(run, None, CORE).filter(answered())
    known = known.select("request_id", pl.col("bucket").cast(pl.String))
    for name, energy in energies.items():
        of_method = energy.requests.select("request_id", pl.col("energy_j").alias(f"{name}_j"))
        known = known.join(of_method, on="request_id", how="left", maintain_order="left")
    known = known.drop_nulls(f"{DEFAULT_METHOD}_j")
    documents = [_document(energy, name, known) for name, energy in energies.items()]
    for document in documents:
        error = errors.get(document["method"])
        if error is not None:
            document["simulated_truth"] = {
                "median_rel": error.median_rel,
                "p99_rel": error.p99_rel,
                "worst_bucket_rel": error.worst_bucket_rel,
            }
    return Methods(run, DEFAULT_METHOD, scope, _buckets(known), tuple(documents))


def _document(energy: Energy, name: str, known: pl.DataFrame) -> dict[str, Any]:
    """One method: its sums, whether they add up, and how far its requests are from the default's."""
    summary = energy.summary
    measured_j = summary["measured_j"]
    own, reference = known[f"{name}_j"], known[f"{DEFAULT_METHOD}_j"]
    moved = ((own / reference) - 1).filter(reference > 0).drop_nulls().abs().to_numpy()
    return {
        "method": name,
        **{key: summary[key] for key in ("measured_j", "attributed_j", "idle_j", "other_j", "residual_j")},
        "residual_rel": summary["residual_j"] / measured_j if measured_j else None,
        "requests": moved.size,
        "moved_median_rel": float(np.median(moved)) if moved.size else None,
        "moved_p99_rel": float(np.quantile(moved, 0.99)) if moved.size else None,
        "rank_correlation": _rank_correlation(own, reference),
    }


def _rank_correlation(own: pl.Series, reference: pl.Series) -> float | None:
    """Spearman's: 1 where both order the requests alike; null below two requests or where one orders none."""
    value = pl.DataFrame({"a": own, "b": reference}).select(pl.corr("a", "b", method="spearman")).item()
    return float(value) if value is not None and np.isfinite(value) else None


def _buckets(known: pl.DataFrame) -> pl.DataFrame:
    """`Methods.buckets`."""
    rows = known.drop_nulls("bucket")
    means = [pl.len().alias("requests"), *(pl.col(f"{name}_j").mean() for name in METHOD_NAMES)]
    order = {name: i for i, name in enumerate(BUCKETS)}
    by_bucket = rows.group_by("bucket").agg(means).sort(pl.col("bucket").replace_strict(order, return_dtype=pl.Int64))
    ranks = [pl.col(f"{name}_j").rank("ordinal").cast(pl.Int64).alias(f"{name}_rank") for name in METHOD_NAMES]
    whole = known.select(pl.lit(ALL).alias("bucket"), *means)
    table = pl.concat([by_bucket.with_columns(ranks), whole], how="diagonal_relaxed")
    reference = pl.col(f"{DEFAULT_METHOD}_j")
    others = [
        pl.when(reference > 0).then(pl.col(f"{name}_j") / reference - 1).alias(f"{name}_rel") for name in METHOD_NAMES
    ]
    return table.with_columns(others)


def bucket_rows(found: Methods) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of `Methods.buckets`: J/request by the default, then each method's difference.

    Before it, in brackets, by how many places the method moves the bucket in the order of J/request.
    """
    others = [name for name in METHOD_NAMES if name != found.default]

    def moved(row: dict[str, Any], name: str) -> str:
        if row[f"{name}_rel"] is None:
            return "-"
        rank, usual = row[f"{name}_rank"], row[f"{found.default}_rank"]
        place = "" if rank == usual else f"({rank - usual:+d}) "
        return f"{place}{100 * row[f'{name}_rel']:+z.1f} %"

    rows = [
        [row["bucket"], f"{row['requests']:,}", format_si(row[f"{found.default}_j"], digits=4)]
        + [moved(row, name) for name in others]
        for row in found.buckets.iter_rows(named=True)
    ]
    return ["", "requests", f"{found.default}\nJ/request", *others], rows


def method_rows(found: Methods) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of `Methods.methods`."""
    judged = any("simulated_truth" in document for document in found.methods)

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f} %"

    rows = []
    for document in found.methods:
        truth = document.get("simulated_truth", {})
        cells = [document["method"], *(format_si(document[key] / 1e3, digits=4) for key in ("attributed_j", "other_j"))]
        cells += [percent(document[key]) for key in ("moved_median_rel", "moved_p99_rel")]
        cells.append(format_si(document["rank_correlation"], digits=4))
        cells += [percent(truth.get(key)) for key in ("median_rel", "p99_rel", "worst_bucket_rel")] if judged else []
        rows.append(cells)
    headings = ["", "requests\nkJ", "other\nkJ", "moved\nmedian", "p99", "rank\ncorrelation"]
    headings += ["SIMULATED\nerror\nmedian", "p99", "worst\nbucket"] if judged else []
    return headings, rows


def remarks(found: Methods) -> list[str]:
    """What to know when reading the tables."""
    whole = found.methods[0]
    idle, measured = (format_si(whole[key], digits=4) for key in ("idle_j", "measured_j"))
    most = format_si(max(abs(document["residual_j"]) for document in found.methods), digits=2)
    said = [
        f"differences are to {found.default}, over answered requests; in brackets: places moved in their order",
        f"beside requests and other: {idle} J idle by every method; at most {most} J of {measured} J are left over",
    ]
    if MARGINAL in METHOD_NAMES:
        said.append(f"{MARGINAL}: what no single request adds to its steps is in other, so its requests cost less")
    return said
