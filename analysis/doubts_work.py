"""Doubts about the work that the energy was shared over: steps, requests, who was in the engine, what was cached."""

from typing import Any

import polars as pl

from analysis.evidence import CONCERNED, DOUBT, ERROR, OK, UNKNOWN, Doubt, Evidence
from analysis.summary import CLIENT, WITHOUT_ENERGY
from replay.rundir import MANIFEST, Run
from tracegen.console import format_si, plural
from tracegen.schema import read_metadata

LAG_BOUND_MS = 10.0  # where the run has no verdict of its own; a fiftieth of the tightest usual TTFT objective
MANY_HASHES = 30_000_000  # above, who asked for a cached prefix is told by its length alone, which takes no memory
# Verdicts of the run that no row here looks at for itself, with what they mean for energies.
_VERDICTS = {
    "loop_stall": "the client was late with what it sent and what it timed",
    "open_loop": "requests were held back, so the load was not the trace's",
    "saturated": "latency measures the queue, and energy an engine that is always full",
    "error_rate": "part of the work was for nothing",
}
_INSTEAD = {
    "unread": "read power before the first and after the last request",
    "idle": "see idle_baseline",
    "unrecorded": "see steps_missing, and the run's server.log",
}


def attribution(case: Evidence) -> Doubt:
    """Whether there are figures at all."""
    if case.why:
        return Doubt("attribution", DOUBT, f"no energy: {case.why}", do="mend what it names, or replay")
    conserved_j = abs(float(case.summary["residual_j"]))
    why = f"{case.summary['method']}, scope {case.summary['scope']}; requests + idle + other = measured"
    return case.sized("attribution", conserved_j, ERROR, why, "report a bug: the lines must add up")


def model_residual(case: Evidence) -> Doubt:
    """What the step model missed between blocks of time: that does not average out within a request."""
    name = "model_residual"
    known = [fit for fit in case.fits if fit.get("model")]
    if not known or not case.measured_j:
        return Doubt(name, UNKNOWN, "no step model was fitted")
    busy_rel = 1 - float(case.summary["idle_j"]) / case.measured_j
    off_j = sum(float(fit.get("block_misfit_rel") or 0.0) * fit["measured_j"] for fit in known) * busy_rel
    said = [
        f"instance {fit['instance']}: {fit['model']} model, {_percent(fit.get('block_misfit_rel'))} between blocks, "
        f"{_percent(fit.get('duration_rel_rms'))} of a step's time, {_percent(fit.get('power_rel_rms'))} of a reading"
        for fit in known
    ]
    do = "run longer, at a steady clock; look at clocks_off and throttled first"
    return case.sized(name, off_j, ERROR, "; ".join(said), do)


def request_errors(case: Evidence) -> Doubt:
    """What the requests' standard errors come to if all erred the same way; the total stays what was measured."""
    name = "request_errors"
    known = None if case.requests is None else case.requests.drop_nulls("energy_se_j").filter(pl.col("energy_j") > 0)
    if known is None or known.is_empty():
        return Doubt(name, UNKNOWN, "no request has a standard error", counted=False)
    median = known.select((pl.col("energy_se_j") / pl.col("energy_j")).median()).item()
    why = f"standard error of the median request {_percent(median)} of its joules"
    return Doubt(name, OK, why, float(known["energy_se_j"].sum()), ERROR, counted=False)


def membership(case: Evidence) -> Doubt:
    """Whether it was recorded who was in which step."""
    name = "membership"
    guessed = [fit for fit in case.fits if fit.get("membership") == CLIENT]
    if not case.fits:
        return Doubt(name, UNKNOWN, "no energy is attributed")
    why = str(case.run.manifest.get("no_steps") or "the run has no step records")
    if not guessed:
        return Doubt(name, OK, "from step records", 0.0, CONCERNED)
    joules = sum(float(fit["measured_j"]) for fit in guessed)
    do = "record the engine's steps (replay vllm-args); until then prefer means over many requests"
    return case.sized(name, joules, CONCERNED, f"guessed from client timestamps: {why}", do)


def steps_missing(case: Evidence) -> Doubt:
    """Engine steps that no row tells of, at the mean energy of a step."""
    name = "steps_missing"
    if not case.run.has("steps"):
        return Doubt(name, UNKNOWN, "the run has no step records")
    count, missing = _count_steps(case.run)
    told = [i.get("recorder") or {} for i in case.run.manifest.get("instances") or []]
    missing = max(missing, sum(int(recorder.get("missing") or 0) for recorder in told))
    if not count or case.measured_j is None:
        return Doubt(name, UNKNOWN, "no step was recorded")
    busy_j = case.measured_j - float(case.summary.get("idle_j", 0.0))
    why = f"{missing:,} of {count + missing:,} step numbers have no row"
    do = "see the run's server.log: the recorder was held up or killed"
    return case.sized(name, busy_j * missing / (count + missing), ERROR, why, do)


def recorder_overhead(case: Evidence) -> Doubt:
    """What recording steps cost the engine itself, at mean power."""
    name = "recorder_overhead"
    told = [i.get("recorder") or {} for i in case.run.manifest.get("instances") or []]
    known = [r for r in told if r.get("overhead_us_mean") is not None and r.get("steps") is not None]
    if not known or case.mean_w is None:
        why = "simulated steps cost nothing to record" if case.run.simulated else f"{MANIFEST} does not tell it"
        return Doubt(name, OK if case.run.simulated else UNKNOWN, why)
    lasted_s = sum(float(r["overhead_us_mean"]) * int(r["steps"]) for r in known) / 1e6
    share = case.mean_w / max(len(told), 1)
    why = f"{lasted_s:.2f} s of the scheduler's time, at the mean power of an instance"
    return case.sized(name, lasted_s * share, ERROR, why, "compare with a run with --no-record-steps")


def not_ours(case: Evidence) -> Doubt:
    """Work of requests that are neither in requests.parquet nor of the run's own warm-up."""
    if not case.summary:
        return Doubt("not_ours", UNKNOWN, "no energy is attributed")
    warmup_j = float(case.summary.get("warmup_j") or 0.0)
    other_j = max(float(case.summary["other_j"]) - warmup_j, 0.0)
    why = "work of requests that are not in requests.parquet: --num-warmups, foreign traffic" if other_j else "none"
    do = "keep others off the server while a run goes on"
    if other_j and len(case.run.manifest.get("stretches") or []) > 1:
        why += ", and what was cut off and sent again with --resume"
        do += "; a run that was not cut off has none of what is sent again"
    if warmup_j:
        why += f"; {format_si(warmup_j, ' J', 4)} beside it are the run's own warm-up, and in no figure"
    return case.sized("not_ours", other_j, CONCERNED, why, do)


def no_record(case: Evidence) -> Doubt:
    """Requests of whose work nothing is known: what they took is on the bill of the others."""
    name = "no_record"
    if case.requests is None or not case.summary:
        return Doubt(name, UNKNOWN, "no energy is attributed")
    lost = case.requests["energy_j"].null_count()
    if not lost:
        return Doubt(name, OK, "every request's work is known", 0.0, ERROR)
    reasons = case.summary.get("requests_without_energy") or {"unrecorded": lost}
    why = ", ".join(f"{number:,} {WITHOUT_ENERGY[reason]}" for reason, number in reasons.items())
    why = f"of {plural(case.requests.height, 'request')} {why}"
    do = [text for reason, text in _INSTEAD.items() if reason in reasons]
    mean_j = case.requests["energy_j"].mean()
    if not isinstance(mean_j, float):
        why += ", so that nobody has energy: steps or times may be on another clock than power is"
        do.append(f"compare start_ns and sent_ns with {MANIFEST}'s measure_start_ns")
        return Doubt(name, DOUBT, why, case.measured_j, ERROR, "; ".join(do))
    return case.sized(name, mean_j * lost, ERROR, f"{why}; at the mean of the others", "; ".join(do))


def not_ok(case: Evidence) -> Doubt:
    """Requests that failed, and the joules that went into them."""
    name = "not_ok"
    if case.requests is None:
        return Doubt(name, UNKNOWN, "the run has no requests.parquet")
    failed = case.requests.filter((pl.col("status") != "ok").fill_null(value=True))
    if failed.is_empty():
        return Doubt(name, OK, f"all {case.requests.height:,} requests are ok", 0.0, CONCERNED)
    counts = failed["status"].fill_null("no status").value_counts(sort=True)
    kinds = ", ".join(f"{count:,} {status}" for status, count in counts.iter_rows())
    why = f"{failed.height:,} of {case.requests.height:,} requests ({kinds})"
    return case.sized(name, float(failed["energy_j"].sum()), CONCERNED, why, "see their status and error")


def lengths(case: Evidence) -> Doubt:
    """Answers that are longer or shorter than the trace asked."""
    name = "lengths_exact"
    if case.requests is None:
        return Doubt(name, UNKNOWN, "the run has no requests.parquet")
    told = case.requests.drop_nulls(["output_tokens", "output_tokens_wanted"])
    if told.is_empty():
        return Doubt(name, UNKNOWN, "the server sent no usage, so lengths are unknown")
    wrong = told.filter(pl.col("output_tokens") != pl.col("output_tokens_wanted"))
    why = f"{wrong.height:,} of {told.height:,} answers are not as long as the trace asks"
    do = "serve with ignore_eos and min_tokens, which replay asks for with --exact"
    return case.sized(name, float(wrong["energy_j"].sum()), CONCERNED, why, do)


def dispatch_lag(case: Evidence) -> Doubt:
    """Requests that left later than the trace says."""
    name = "dispatch_lag"
    sent = None if case.requests is None else case.requests.drop_nulls(["sent_ns", "scheduled_ns"])
    if sent is None or sent.is_empty():
        return Doubt(name, UNKNOWN, "no request was sent")
    bound_ms = _number(case.verdict(name).get("bound"), LAG_BOUND_MS)
    lag_ms = (sent["sent_ns"] - sent["scheduled_ns"]) / 1e6
    late = sent.filter(lag_ms > bound_ms)
    why = f"{late.height:,} of {sent.height:,} requests were sent more than {bound_ms:g} ms late, "
    why += f"p99 {lag_ms.quantile(0.99, 'linear'):.2f} ms"
    do = "send from more workers or a machine that is less busy; a cap (--max-concurrency, --max-rate) holds back too"
    return case.sized(name, float(late["energy_j"].sum()), CONCERNED, why, do)


def prefix_cache(case: Evidence) -> Doubt:
    """Tokens from the prefix cache that the trace's prefix_hashes did not ask for: prefill that was not paid.

    The size is an estimate: such tokens times the run's prefill energy per prompt token computed.
    """
    name = "prefix_cache"
    if case.requests is None or case.requests["cached_tokens"].null_count() == case.requests.height:
        return Doubt(name, UNKNOWN, "the server does not tell its cached tokens")
    hit = case.requests.filter(pl.col("cached_tokens") > 0)
    if hit.is_empty():
        return Doubt(name, OK, "no token came from the prefix cache", 0.0, ERROR)
    both = hit.join(_asked(case.run), on="request_id", how="left").with_columns(
        (pl.col("cached_tokens").cast(pl.Int64) - pl.col("asked").fill_null(0)).clip(0).alias("unasked")
    )
    unasked, cached = int(both["unasked"].sum()), int(hit["cached_tokens"].sum())
    why = f"{unasked:,} of {cached:,} cached tokens were hits that the trace's prefix_hashes did not ask for"
    computed = case.requests.drop_nulls(["prefill_j", "input_tokens"]).select(
        pl.col("prefill_j").sum().alias("j"),
        (pl.col("input_tokens").cast(pl.Int64) - pl.col("cached_tokens").fill_null(0)).clip(0).sum().alias("tokens"),
    )
    prefill_j, tokens = computed.row(0)
    if not tokens:
        return Doubt(name, DOUBT if unasked else OK, f"{why}; what a prompt token cost is not known")
    do = "restart the server or reset its prefix cache between runs; salt the prompts"
    why += f"; estimate at {prefill_j / tokens:.3g} J a prompt token"
    return case.sized(name, unasked * prefill_j / tokens, ERROR, why, do)


def _asked(run: Run) -> pl.DataFrame:
    """`request_id` and `asked`: tokens at the prompt's start that an earlier request of the trace had as well."""
    nothing = pl.DataFrame(schema={"request_id": pl.UInt64, "asked": pl.Int64})
    if not run.has("trace") or "prefix_hashes" not in run.scan("trace").collect_schema():
        return nothing
    path = run.path / "trace.parquet"
    block_tokens = read_metadata(path).get("block_tokens") if path.is_file() else None
    if not isinstance(block_tokens, int):
        return nothing  # nobody can have asked for blocks of no size
    trace = run.scan("trace", ["request_id", "prefix_hashes"]).with_row_index("row").collect()
    lengths_ = trace["prefix_hashes"].list.len().fill_null(0)
    if lengths_.sum() > MANY_HASHES:
        return trace.select("request_id", (lengths_.cast(pl.Int64) * block_tokens).alias("asked"))
    blocks = (
        trace.lazy()
        .filter(pl.col("prefix_hashes").list.len() > 0)
        .explode("prefix_hashes", empty_as_null=False)
        .with_columns(pl.col("row").min().over("prefix_hashes").alias("first"))
    )
    seen = (pl.col("first") < pl.col("row")).cast(pl.Int64).cum_min()  # up to the first block that is new
    asked = blocks.group_by("row", maintain_order=True).agg(pl.col("request_id").first(), seen.sum().alias("blocks"))
    return asked.select("request_id", (pl.col("blocks") * block_tokens).alias("asked")).collect()


def verdicts(case: Evidence) -> list[Doubt]:
    """What else the run says of itself; these have no size in joules."""
    said = []
    for name, meaning in _VERDICTS.items():
        verdict = case.verdict(name)
        why = str(verdict.get("why") or "")
        if verdict.get("ok") is None:
            said.append(Doubt(name, UNKNOWN, why or "the run has no such verdict"))
        elif verdict["ok"]:
            said.append(Doubt(name, OK, why))
        else:
            said.append(Doubt(name, DOUBT, f"{why}: {meaning}" if why else meaning, do="see the run's own verdicts"))
    return said


def circumstances(case: Evidence) -> list[Doubt]:
    """What the manifest says of the run as a whole."""
    manifest, said = case.run.manifest, []
    if case.run.simulated:
        why = "SIMULATED: the engine and its meters are models; nothing was measured"
        said.append(Doubt("simulated", DOUBT, why, do="compare with a run on hardware", counted=False))
    if manifest.get("state") != "complete":
        counts: dict[str, Any] = manifest.get("requests") or {}
        recorded = 0 if case.requests is None else case.requests.height
        why = (
            f"state {manifest.get('state')}: {recorded:,} of {counts.get('planned') or 'an unknown number of'} requests"
        )
        said.append(Doubt("incomplete", DOUBT, why, do="go on with it: replay run --resume"))
    shared = manifest.get("gpus_shared_with")
    if shared:
        why = f"others used the GPUs too: {'; '.join(map(str, shared)) if isinstance(shared, list) else shared}"
        said.append(Doubt("gpus_shared", DOUBT, why, do="replay with the GPUs to itself (without --allow-busy)"))
    return said


def _count_steps(run: Run) -> tuple[int, int]:
    """Steps recorded, and numbers between the first and the last of an instance that no row has."""
    known: dict[int, tuple[int, int, int]] = {}
    for rows in run.batches("steps", ["instance", "step"]):
        parts = rows.group_by("instance").agg(
            pl.len().alias("count"), pl.col("step").min().alias("low"), pl.col("step").max().alias("high")
        )
        for instance, count, low, high in parts.iter_rows():
            if low is None:
                continue
            before = known.get(instance, (0, low, high))
            known[instance] = before[0] + count, min(before[1], low), max(before[2], high)
    count = sum(c for c, _, _ in known.values())
    return count, sum(max(high - low + 1 - c, 0) for c, low, high in known.values())


def _number(value: Any, default: float) -> float:
    """A verdict's bound may be of any type."""
    return float(value) if isinstance(value, (int, float)) and value > 0 else default


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


CHECKS = (
    attribution, model_residual, request_errors, membership, steps_missing, recorder_overhead, not_ours, no_record,
    not_ok, lengths, dispatch_lag, prefix_cache,
)  # fmt: skip
