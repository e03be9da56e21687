"""Fit a trace from beginning to end: what is in the mix file, and how well its twins match the trace."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tracegen.arrivals.models import Arrivals
from tracegen.describe import span_ns
from tracegen.durations import NS_PER_S, format_duration
from tracegen.errors import TraceError
from tracegen.fit.arrivals import Fitted, Moments, fit_arrivals, measure_moments
from tracegen.fit.lengths import fit_lengths
from tracegen.fit.mixfile import MixFile
from tracegen.fit.private import release
from tracegen.fit.structure import Tied, fit_structure
from tracegen.schema import file_sha256, read_metadata, read_trace
from tracegen.synthesize import synthesize
from tracegen.twin import QUARTILES, Facts, differences, facts
from tracegen.writer import written_whole

SEEDS = 20
TWIN_REQUESTS = 200_000  # at most; of a longer trace, twins are as much shorter
TWIN_SEED = 1000  # twins are of other seeds than what was tried while fitting


@dataclass(frozen=True)
class Fit:
    """A fitted mix: its file's text, how well `seeds` twins match, and what the fit could not do."""

    text: str
    goodness: dict[str, Any]  # see `measure_twins`
    arrivals: tuple[Fitted, ...]  # all models tried, the chosen one first; empty without arrivals
    remarks: tuple[str, ...]


def fit_trace(
    path: str | Path,
    *,
    private: float | None = None,
    seed: int = 1,
    seeds: int = SEEDS,
    components: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Fit:
    """The mix that resembles the trace at `path`.

    `private` is the epsilon of a private fit, see `tracegen.fit.private`: it leaves out structure, source and goodness,
    and no two are the same. Any other fit is the same for the same arguments. `components` of the mixture; None: chosen
    by likelihood. `progress` is told what is done next. Raises `TraceError` for a trace that cannot be read or fitted.
    """
    frame, metadata = read_trace(path), read_metadata(path)
    if frame.height < 2:
        raise TraceError(f"{path}: has one request, and a fit needs two or more")
    source = facts(frame, metadata)
    tried: list[Fitted] = []
    remarks: list[str] = []
    if private is None:
        tied = fit_structure(frame, metadata.get("block_tokens"))
        file, tried, remarks = _open_file(Path(path), frame, source, tied, seed, components, progress)
    else:
        progress("fitting what noisy counts tell")
        file = _private_file(frame, private, seed, components)
    progress(f"comparing {seeds} twins")
    goodness = measure_twins(file.text(), source, span_ns(frame), seeds)
    if private is None:
        # What `tracegen.commands` fits it again by; the command has no components.
        asked = {"seed": seed, "twins": seeds} if components is None else {}
        found = {"source": {**file.tables["source"], **asked}, "goodness": goodness}
        file = replace(file, tables={**file.tables, **found})
    return Fit(file.text(), goodness, tuple(tried), tuple(remarks))


def save_mix(fit: Fit, path: str | Path) -> None:
    """Write the fit's mix file to `path`. Raises `TraceError` when it cannot be written."""
    with written_whole(Path(path)) as partial:
        partial.write_text(fit.text, encoding="utf-8")


def _open_file(
    path: Path,
    frame: pl.DataFrame,
    source_facts: Facts,
    tied: Tied,
    seed: int,
    components: int | None,
    progress: Callable[[str], None],
) -> tuple[MixFile, list[Fitted], list[str]]:
    """The mix file of a fit that is not private, the models tried, and what it could not do."""
    remarks = list(tied.remarks)
    progress("fitting lengths")
    lengths = fit_lengths(tied.own_tokens, tied.outputs, seed, components)
    arrivals: dict[str, Any] = {}
    tried: list[Fitted] = []
    if tied.starts_ns.size > 1 and tied.starts_ns[-1] > tied.starts_ns[0]:
        progress("choosing an arrival model")
        moments = measure_moments(tied.starts_ns)
        best, tried = fit_arrivals(moments, seed)
        arrivals = _arrivals_table(best.arrivals, float(source_facts.figures["rate_rps"] or 0))
        remarks += _grid(tied)
    else:
        remarks.append("all requests arrive at once, so the mix has no arrivals")
    source = {
        "file": path.name,
        "sha256": file_sha256(path),
        "rows": frame.height,
        "mean_input_tokens": round(float(source_facts.figures["mean_input_tokens"] or 0), 1),
        "mean_output_tokens": round(float(source_facts.figures["mean_output_tokens"] or 0), 1),
        "fit": "tracegen fit: expectation maximization, then least squares on both marginal distributions and buckets",
    }
    tables: dict[str, Mapping[str, Any]] = {
        "source": source,
        "arrivals": arrivals,
        "structure": tied.structure,
        "goodness": {},
        "source_buckets": {name: round(share, 6) for name, share in source_facts.buckets.items()},
    }
    return MixFile(f"Fitted to {path.name}", lengths, tables, _NOTES), tried, remarks


_NOTES = {
    "arrivals": ("What `synth --arrivals production` takes; parameters as in tracegen/arrivals/models.py.",),
    "structure": ("Clients, sessions, shared prefixes, for `--arrivals production` too; see tracegen/sessions.py.",),
    "goodness": (
        "Twins of other seeds beside the source: two-sample Kolmogorov-Smirnov distances, the worst bucket's error,",
        "and [source, 5 %, median, 95 % of the twins] of dispersion, CV of gaps, Spearman's correlation and hit rate.",
    ),
    "source_buckets": ("Shares of the source's rows in each size bucket (see tracegen/buckets.py).",),
}


def _arrivals_table(arrivals: Arrivals, rate_rps: float) -> dict[str, Any]:
    """A model as mix files have it."""
    several = arrivals.kind == "mmpp"
    parameters = {k: list(v) if several else v[0] for k, v in arrivals.parameters.items()}
    return {"model": arrivals.kind, "rate_rps": float(f"{rate_rps:.5g}"), **parameters}


def _grid(tied: Tied) -> list[str]:
    """A remark where arrivals lie on a grid so wide that it is the clock's, not theirs."""
    grid_ns = int(np.gcd.reduce(np.diff(tied.starts_ns)))
    if grid_ns < NS_PER_S / 2:
        return []
    width = format_duration(grid_ns)
    return [f"arrivals lie on a grid of {width}, within which nothing is fitted; import with --dequantize spreads them"]


def _private_file(frame: pl.DataFrame, epsilon: float, seed: int, components: int | None) -> MixFile:
    """The mix file of a private fit: from here on only what `release` returns is looked at."""
    inputs, outputs = (frame[f"{side}_tokens"].cast(pl.Int64).to_numpy() for side in ("input", "output"))
    known = release(inputs, outputs, frame["arrival_ns"].to_numpy(), epsilon)
    lengths = fit_lengths(known.inputs, known.outputs, seed, components)
    arrivals: dict[str, Any] = {}
    if known.moments is not None:
        best, _ = fit_arrivals(_plausible(known.moments), seed)
        arrivals = _arrivals_table(best.arrivals, known.moments.rate_rps)
    privacy = {"epsilon": epsilon, "unit": "one request", "noise": "two-sided geometric", "span_known_to_s": 60}
    head = (
        f"A private fit: epsilon-differentially private for one request, epsilon = {epsilon:g}. All that is in this",
        "file is computed from noisy counts: of lengths in fixed ranges, and of requests per window. Whether any",
        f"one request was in the trace changes the chance of any such file by a factor of exp({epsilon:g}) at most.",
        "Not covered: somebody who sent k requests, or k fits of one trace, have k times epsilon. In which minutes the",
        "trace begins and ends is taken to be known. Clients, sessions, prefixes, source and goodness are left out.",
    )
    notes = {"arrivals": _NOTES["arrivals"]}
    return MixFile("A private fit", lengths, {"arrivals": arrivals, "privacy": privacy}, notes, head)


def _plausible(moments: Moments) -> Moments:
    """`moments` with dispersion of no less than a tenth: noise can take away more than there is."""
    return Moments(moments.rate_rps, moments.span_s, {w: max(d, 0.1) for w, d in moments.dispersion.items()})


def measure_twins(text: str, source: Facts, span: int, seeds: int = SEEDS) -> dict[str, Any]:
    """How far traces synthesized from the mix file `text` are from the `source` that lasts `span` ns.

    Medians and maxima over `seeds` of the distances; for dispersion, CV of gaps, Spearman and hit rate
    [source, 5 %, median, 95 %]. What the source lacks is left out.
    """
    shown = min(1.0, TWIN_REQUESTS / source.requests)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "twin.toml")
        path.write_text(text, encoding="utf-8")
        own = "[arrivals]" in text
        rate, arrivals = (None, "production") if own else (float(source.requests), "poisson")
        duration_ns = max(int(span * shown), NS_PER_S) if own else round(NS_PER_S * shown)
        twins = []
        for k in range(seeds):
            made = synthesize(str(path), rate, duration_ns, TWIN_SEED + k, arrivals=arrivals)
            twins.append(facts(*made))
    apart = [differences(source, twin) for twin in twins]
    goodness: dict[str, Any] = {"seeds": seeds}
    for name, key in (("input", "input_tokens"), ("output", "output_tokens"), *([("gaps", "gaps_s")] if own else [])):
        goodness |= _spread(f"ks_{name}", [d["ks"][key] for d in apart])
    goodness |= _spread("worst_bucket_error", [d["worst_bucket_error"] for d in apart])
    goodness |= _spread("spearman_error", [abs(d["spearman"]) for d in apart if d["spearman"] is not None])
    for side in ("input", "output"):
        goodness[f"mean_{side}_tokens"] = round(float(np.mean([t.figures[f"mean_{side}_tokens"] for t in twins])), 1)
    if own:
        for window, value in source.dispersion.items():
            goodness |= _beside(f"dispersion_{window}", value, [t.dispersion[window] for t in twins])
    for name in ("gap_cv", "spearman", "hit_rate", *(f"hit_share_p{q}" for q in QUARTILES)):
        if own or name != "gap_cv":
            goodness |= _beside(name, source.figures[name], [t.figures[name] for t in twins])
    return goodness


def _spread(name: str, values: list[float]) -> dict[str, float]:
    """Median and maximum."""
    if not values:
        return {}
    return {f"{name}_median": round(float(np.median(values)), 4), f"{name}_max": round(max(values), 4)}


def _beside(name: str, source: float | None, values: list[float | None]) -> dict[str, list[float]]:
    """The source's value, then 5 %, median and 95 % of the twins'."""
    known = [value for value in values if value is not None]
    if source is None or not known:
        return {}
    return {name: [float(f"{value:.4g}") for value in (source, *np.quantile(known, [0.05, 0.5, 0.95]))]}
