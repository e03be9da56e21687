"""Import a published trace: read, refuse or drop bad rows, order, number, write; in bounded memory."""

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl

from tracegen.console import plural
from tracegen.errors import TraceError
from tracegen.importers.ahead import ahead
from tracegen.importers.base import OWN, Batches, Format, Options, Report, bad_row
from tracegen.importers.formats import find_format, recognised
from tracegen.importers.sorting import sort_batches
from tracegen.schema import check_output
from tracegen.sources import Source
from tracegen.writer import TraceWriter

ROW_GROUP_ROWS = 1 << 20
ROW_GROUP_BYTES = 64 << 20  # where rows are large, as with prefix hashes
Progress = Callable[[Report, Source], None]


def import_trace(
    location: str | Path,
    output: str | Path | None = None,
    *,
    format: str = "auto",  # noqa: A002 - the word that its users know
    options: Options | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
) -> Report:
    """Import the file or https URL at `location`, of a format by name or `auto`, to the trace file `output`.

    `output` is by default LABEL.parquet, in the working directory. Arrivals count from the first row's time, exactly
    to the nanosecond where the source has it; ids count rows. A bad row is one that is malformed, has a value that is
    no such thing (a token count of zero, say), or, where the format is in order of time, is earlier than a row before
    it. With `options.skip_bad` bad rows are dropped and counted by reason. `on_progress` is called for each batch.

    Raises `TraceError` for a missing or damaged source, another format, no rows, an output that may not be
    overwritten, and the first bad row, with its line.
    """
    asked = options or Options()
    if asked.limit is not None and asked.limit < 1:
        raise TraceError(f"--limit {asked.limit}: is less than one row")
    with Source(location) as source:
        form = recognised(source) if format == "auto" else find_format(format)
        label = asked.label or source.name.split(".")[0] or form.name
        output = Path(output or f"{label}.parquet")
        check_output(output, force=force, source=source.path)
        report = Report(form.name, output, metadata=_metadata(form, asked, label))
        batches = _usable(form.read(source, asked), form, asked, source, report)
        if on_progress is not None:
            batches = _watched(batches, source, report, on_progress)
        if asked.sort or not form.in_order:
            batches = sort_batches(batches)
        if form.stage is not None:
            batches = form.stage(_numbered(batches), asked, source, report)
        else:
            batches = _numbered(batches)
        with TraceWriter(output, report.metadata) as writer:
            rows = ahead(_row_groups(_trace_rows(batches, label, report)))
            with closing(rows):
                for frame in rows:
                    writer.write(frame)
            if not writer.rows:
                raise TraceError(
                    f"{source.location}: has no rows to import ({report.rows_read} read, {report.rows_dropped} dropped)"
                )
            report.rows, report.span_ns = writer.rows, writer.last_ns
            report.input_tokens, report.output_tokens = writer.input_tokens, writer.output_tokens
            end = {"source": _source_metadata(source, report)}
            writer.add_metadata(end)
        report.metadata |= end
    return report


def _metadata(form: Format, asked: Options, label: str) -> dict[str, Any]:
    """What is known of the trace before its source is read; parameters that were not given are left out."""
    parameters: dict[str, Any] = {"label": label, "skip_bad": asked.skip_bad}
    given = {
        "limit": asked.limit,
        "sort": asked.sort,
        "dequantize": asked.dequantize,
        "map": dict(asked.map),
        "time_unit": asked.time_unit,
        "rate_rps": asked.rate_rps,
        "tokenizer": asked.tokenizer,
    }
    parameters |= {key: value for key, value in given.items() if value}
    seed = {"seed": asked.seed} if asked.dequantize or asked.rate_rps else {}
    return {"generator": f"tracegen import {form.name}", "parameters": parameters, **seed, **form.metadata}


def _source_metadata(source: Source, report: Report) -> dict[str, Any]:
    """Where the trace comes from, and what of it was not taken."""
    return {
        "file": source.said,
        "sha256": source.sha256(),
        "first_arrival": report.first_arrival,
        "rows_read": report.rows_read,
        "rows_dropped": report.rows_dropped,
        "dropped": report.dropped,
        **({"remarks": report.remarks} if report.remarks else {}),
    }


def _usable(batches: Batches, form: Format, asked: Options, source: Source, report: Report) -> Batches:
    """The good rows of `batches`, up to the limit; what is dropped is counted, and a bad row raises."""
    ordered = form.in_order and not asked.sort
    latest_ns: int | None = None
    rest = asked.limit
    for found in batches:
        early = _early(found, latest_ns)
        batch = found
        if ordered and early.any():
            batch = found.with_columns(
                _why=pl.when(early).then(pl.lit("is earlier than a row before it")).otherwise("_why")
            )
        good = batch["_why"].is_null()
        if rest is not None and int(good.sum()) >= rest:
            end = int(good.arg_true()[rest - 1]) + 1
            batch, good, early = batch.head(end), good.head(end), early.head(end)
        bad = batch.filter(~good)
        if not asked.skip_bad:
            unexpected = bad.filter(~pl.col("_why").is_in(list(form.expected)))
            if unexpected.height:
                raise bad_row(source, *unexpected.select("_line", "_why", pl.coalesce("_text", "_said")).row(0))
        report.rows_read += batch.height
        report.drop(bad["_why"])
        report.rows_sorted += 0 if ordered else int(early.sum())
        kept = batch.filter(good).drop("_text", "_why")
        if kept.height:
            newest_ns = int(kept["_time_ns"].max())  # type: ignore[arg-type]
            latest_ns = newest_ns if latest_ns is None else max(newest_ns, latest_ns)
            yield kept
        if rest is not None:
            rest -= kept.height
            if not rest:
                return


def _early(batch: pl.DataFrame, latest_ns: int | None) -> pl.Series:
    """Which rows, usable by themselves, are earlier than a usable one before them, `latest_ns` before the batch."""
    time_ns = batch.select(pl.when(pl.col("_why").is_null()).then("_time_ns")).to_series()
    before_ns = time_ns.cum_max().fill_null(strategy="forward").shift(1)
    if latest_ns is not None:
        before_ns = before_ns.fill_null(latest_ns).clip(lower_bound=latest_ns)
    return (time_ns < before_ns).fill_null(value=False)


def _watched(batches: Batches, source: Source, report: Report, on_progress: Progress) -> Batches:
    """`batches`, each told of."""
    for batch in batches:
        on_progress(report, source)
        yield batch


def _numbered(batches: Batches) -> Batches:
    """`batches` with `request_id`, which counts rows from 0."""
    first = 0
    for batch in batches:
        yield batch.with_columns(request_id=pl.int_range(first, first + batch.height, dtype=pl.UInt64, eager=True))
        first += batch.height


def _trace_rows(batches: Batches, label: str, report: Report) -> Batches:
    """The rows as the trace has them: times from the first row's, and a label for each."""
    origin_ns: int | None = None
    for batch in batches:
        if origin_ns is None:
            origin_ns = int(batch["_time_ns"][0])
            report.first_arrival = batch["_said"][0]
            if report.rows_sorted:
                report.remarks.append(f"{plural(report.rows_sorted, 'row')} stood behind a later one: sorted by time")
        labels = pl.col("label").fill_null(label) if "label" in batch.columns else pl.lit(label)
        yield batch.with_columns(arrival_ns=pl.col("_time_ns") - origin_ns, label=labels).drop(OWN, strict=False)


def _row_groups(frames: Batches) -> Generator[pl.DataFrame, None, None]:
    """The rows of `frames` in parts for the writer; how many does not depend on the parts that they come in.

    But for rows so large that bytes bound the part.
    """
    held: list[pl.DataFrame] = []
    rows, size = 0, 0.0
    for frame in frames:
        held.append(frame)
        rows += frame.height
        size += frame.estimated_size()
        if rows >= ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
            whole = pl.concat(held)
            cut = rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS if size < ROW_GROUP_BYTES else rows
            yield from whole.head(cut).iter_slices(ROW_GROUP_ROWS)
            held = [whole.slice(cut)] if cut < rows else []
            rows, size = rows - cut, sum(rest.estimated_size() for rest in held)
    if held:
        yield pl.concat(held)
