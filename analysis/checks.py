"""What a run's tables must keep to before they are believed: that they fit each other, and can be at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from replay.rundir import MANIFEST, Run
from replay.tables import STATUSES
from tracegen.errors import RunError

MOST_STEP = 2**62  # no engine gets that far; beyond 2^63 a number fits no signed integer
MOST_TOKENS = 2**24  # in a step or a context; the longest contexts of models are 10 million tokens
BACKWARDS_NS = 10_000_000  # steps may overlap; one that begins or ends earlier by more is out of order
LONGEST_NS = 3_600_000_000_000  # of a step: no engine works an hour on one
AHEAD, OVERLAP_NS = 2, 1_000_000_000  # engines schedule one step ahead, so two at most are in flight; but for jitter
# No time before another; each may be null, and all of a row are of one clock.
_TIMES_IN_ORDER = (
    ("first_token_ns", "sent_ns"), ("last_token_ns", "first_token_ns"), ("last_token_ns", "sent_ns"),
    ("done_ns", "sent_ns"), ("done_ns", "first_token_ns"), ("done_ns", "last_token_ns"),
)  # fmt: skip
MOST_IN_STEP = {
    "prefill_tokens": MOST_TOKENS,
    "decode_tokens": MOST_TOKENS,
    "requests": MOST_TOKENS,
    "context_tokens": MOST_TOKENS**2,
    "prefill_attention": MOST_TOKENS**2,
}


def check_requests(run: Run, requests: pl.DataFrame) -> None:
    """Raise `RunError` where `requests` have an id twice, an unknown instance or status, or times out of order.

    Times of one row may be on any one clock.
    """
    source = run.path / "requests.parquet"
    _no_nulls(requests, ("request_id",), source)
    ids = requests["request_id"]
    if not (ids.is_sorted() and (ids.diff() != 0).all()) and ids.n_unique() < requests.height:
        row = int((~requests["request_id"].is_first_distinct()).arg_max() or 0)
        raise RunError(f"{source}: row {row}, column 'request_id': {requests['request_id'][row]} occurs twice")
    _known_instances(run, requests.with_row_index("row"), source)
    wrong = {
        f"column '{name}': is before {since} (request {{request_id}})": pl.col(name) < pl.col(since)
        for name, since in _TIMES_IN_ORDER
    }
    wrong[f"column 'status': '{{status}}' is none of {', '.join(STATUSES)}"] = ~pl.col("status").is_in(STATUSES)
    found = _first_wrong(requests, wrong)
    if found is not None:
        raise RunError(f"{source}: row {found[0]}, {found[1]}")


def check_steps(run: Run, steps: pl.DataFrame) -> None:
    """Raise `RunError` where `steps`, in order of instance and step, are no engine's.

    That is where they end before they begin, come twice, belong to no instance, go back in time, last for hours, lie
    one on the other, or do more work than any engine.
    """
    source = run.path / "steps.parquet"
    if steps["instance"].null_count():
        _no_nulls(run.scan("steps", ["instance"]).collect(), ("instance",), source)  # whose rows are in their own order
    _known_instances(run, steps.with_row_index("row"), source, rows_are_sorted=True)

    def before(name: str, steps_ago: int = 1) -> pl.Expr:
        same = pl.col("instance") == pl.col("instance").shift(steps_ago)
        return pl.when(same).then(pl.col(name).shift(steps_ago))

    wrong = {
        ": end_ns is before start_ns": pl.col("end_ns") < pl.col("start_ns"),
        " occurs twice": pl.col("step") == before("step"),
        f": column 'step' is beyond {MOST_STEP}": pl.col("step") > MOST_STEP,
        ": start_ns is before that of step {last}; an engine's steps follow each other": (
            pl.col("start_ns") < before("start_ns") - BACKWARDS_NS
        ),
        ": end_ns is before that of step {last}; an engine's steps follow each other": (
            pl.col("end_ns") < before("end_ns") - BACKWARDS_NS
        ),
        ": end_ns is more than an hour after start_ns": pl.col("end_ns") - LONGEST_NS > pl.col("start_ns"),
        ": start_ns is more than 1 s before the end of the step before the last; an engine's steps follow each other": (
            pl.col("start_ns") < before("end_ns", AHEAD) - OVERLAP_NS
        ),
    } | {
        f": column '{name}' is {{{name}}}, more than any engine does in a step": pl.col(name) > most
        for name, most in MOST_IN_STEP.items()
        if name in steps.columns
    }
    found = _first_wrong(steps, wrong, last=before("step"))
    if found is not None:
        row = steps.row(found[0], named=True)
        raise RunError(f"{source}: instance {row['instance']}, step {row['step']}{found[1]}")


def check_members(run: Run, rows: pl.DataFrame, before: int, most_step: int) -> None:
    """Raise `RunError` where one of `rows` of segments.parquet, of which `before` come first, cannot be by itself."""
    source = run.path / "segments.parquet"
    for name in rows.columns:
        if name != "request_id" and rows[name].null_count():
            row = before + int(rows[name].is_null().arg_max() or 0)
            raise RunError(f"{source}: column '{name}' has a null in row {row}")
    wrong = {
        "column 'kind': '{kind}' is neither prefill nor decode": ~pl.col("kind").is_in(["prefill", "decode"]),
        "request {request_id}: last_step is before first_step": pl.col("last_step") < pl.col("first_step"),
        "column 'last_step': {last_step} is 2^31 steps after the first": pl.col("last_step") > most_step,
        "column 'tokens_per_step' is 0; who has no token in a step is not in it": pl.col("tokens_per_step") == 0,
    }
    instances = [i for i in run.manifest["instances"] if i.get("max_model_len") is not None]
    for name in ("tokens_per_step", "context_start"):
        wrong[f"column '{name}': {{{name}}} is more than any model's context"] = pl.col(name) > MOST_TOKENS
        for entry in instances:
            # Others' work may be summed up in one row.
            mine = (pl.col("instance") == int(entry["instance"])) & pl.col("request_id").is_not_null()
            why = (
                f"column '{name}': {{{name}}} is more than the {entry['max_model_len']} of max_model_len in {MANIFEST}"
            )
            wrong[f"{why}, instance {entry['instance']}"] = mine & (pl.col(name) > entry["max_model_len"])
    found = _first_wrong(rows, wrong)
    if found is not None:
        raise RunError(f"{source}: row {before + found[0]}, {found[1]}")


def check_chunks(run: Run, rows: pl.DataFrame) -> None:
    """Raise `RunError` where `rows` of requests.parquet have times of chunks out of order, or not a count for each."""
    source = run.path / "requests.parquet"
    lengths = rows.select(pl.col("chunk_ns", "chunk_tokens").list.len())
    odd = lengths["chunk_ns"] != lengths["chunk_tokens"]
    if odd.any():
        row = int(odd.arg_max() or 0)
        counts = " values, chunk_ns ".join(map(str, reversed(lengths.row(row))))
        raise RunError(f"{source}: column 'chunk_tokens' has {counts} (request {rows['request_id'][row]})")
    some = rows.select("request_id", "chunk_ns").filter(pl.col("chunk_ns").list.len() > 1)
    flat = some.explode("chunk_ns", empty_as_null=False)
    same = flat["request_id"] == flat["request_id"].shift()
    back = same & (flat["chunk_ns"] < flat["chunk_ns"].shift())
    if back.any():
        request = flat["request_id"][int(back.arg_max() or 0)]
        raise RunError(f"{source}: column 'chunk_ns' goes back in time (request {request})")


def _first_wrong(rows: pl.DataFrame, wrong: Mapping[str, pl.Expr], **more: pl.Expr) -> tuple[int, str] | None:
    """The first row at which one of the conditions holds, and its text, filled in with the row and `more`; else None.

    A null holds nowhere.
    """
    if rows.is_empty():
        return None
    holds = rows.select(condition.any().alias(text) for text, condition in wrong.items()).row(0, named=True)
    for text, condition in wrong.items():
        if holds[text]:
            row = int(rows.select(condition.fill_null(value=False).arg_max()).item())
            extra = rows.select(**more)[row].row(0, named=True) if more else {}
            return row, text.format(**{**rows.row(row, named=True), **extra})
    return None


def _known_instances(run: Run, rows: pl.DataFrame, source: Path, *, rows_are_sorted: bool = False) -> None:
    """Raise where column `instance` has a number that the manifest does not have; null is for who reads it to judge."""
    known = sorted(int(i["instance"]) for i in run.manifest.get("instances") or [] if i.get("instance") is not None)
    strange = rows.filter(~pl.col("instance").is_in(known))
    if strange.height and known:
        row, instance = strange.select("row", "instance").row(0)
        where = "" if rows_are_sorted else f"row {row}, "
        raise RunError(
            f"{source}: {where}column 'instance': {instance} is none of {MANIFEST}'s instances "
            f"({', '.join(map(str, known))})"
        )


def _no_nulls(rows: pl.DataFrame, names: Sequence[str], source: Path) -> None:
    """Raise naming the first row that has a null in one of `names`."""
    for name in names:
        if rows[name].null_count():
            raise RunError(f"{source}: column '{name}' has a null in row {rows[name].is_null().arg_max()}")


def check_segments(run: Run, segments: pl.DataFrame, steps: pl.DataFrame) -> None:
    """Raise `RunError` where `segments` contradict themselves or a complete run's `steps`.

    Of a run that was cut off, segments may reach beyond the last step written.
    """
    source = run.path / "segments.parquet"
    _no_nulls(segments, ("instance",), source)
    _known_instances(run, segments.with_row_index("row"), source)
    rows = segments.with_row_index("row").sort("instance", "request_id", "first_step", "row")
    before = pl.col("last_step").shift().over("instance", "request_id")
    twice = rows.filter(pl.col("request_id").is_not_null() & (pl.col("first_step") <= before)).sort("row")
    if twice.height:
        row = twice.row(0, named=True)
        raise RunError(
            f"{source}: row {row['row']}, column 'first_step': request {row['request_id']} is in step "
            f"{row['first_step']} by another row already; a request has at most one segment a step"
        )
    last = steps.group_by("instance").agg(pl.col("step").max().alias("end"))
    beyond = rows.join(last, on="instance").filter(pl.col("last_step") > pl.col("end")).sort("row")
    if beyond.height and run.manifest.get("state") == "complete":
        row = beyond.row(0, named=True)
        raise RunError(
            f"{source}: row {row['row']}, column 'last_step': {row['last_step']} is beyond the last step "
            f"{row['end']} in steps.parquet of instance {row['instance']}, though the run is complete: rows of "
            "steps.parquet were lost; replay again"
        )
