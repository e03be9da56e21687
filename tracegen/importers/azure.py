"""Import the Azure LLM inference traces of 2023, as published: CSV, plain or compressed with xz or gzip.

Format (AzureLLMInferenceDataset2023.md in github.com/Azure/AzurePublicDataset): three columns as in `HEADER`, times
such as `2023-11-16 18:15:46.6805900` in steps of 100 ns, rows in order of time; lines end with CRLF, the last with
nothing.
"""

import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from tracegen.errors import TraceError
from tracegen.schema import check_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
# Four digits would let in years that 64 bits of nanoseconds cannot hold (beyond 2262), which wrap without a word.
_YEAR = "(?:19|20)[0-9]{2}"
_ROW = rf"^({_YEAR}-[0-9]{{2}}-[0-9]{{2}} [0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}}(?:\.[0-9]{{1,9}})?),([0-9]+),([0-9]+)$"
_TIME = "%Y-%m-%d %H:%M:%S%.f"
_UNPACK: dict[bytes, Callable[[bytes], bytes]] = {b"\xfd7zXZ\x00": lzma.decompress, b"\x1f\x8b": gzip.decompress}


def import_azure(
    path: str | Path, *, label: str | None = None, skip_bad: bool = False
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The trace in the Azure 2023 file at `path`, and the metadata to write with it.

    Arrivals count exact nanoseconds from the first row. `label` is each row's label, by default the file's name
    without suffixes. A bad row is one that is malformed, has a token count that is zero or beyond UInt32, or is
    earlier than a row before it; with `skip_bad` bad rows are dropped and counted by reason in the metadata.

    Raises `TraceError` for a missing or damaged file, another header, no rows, and, without `skip_bad`, the first bad
    row with its line.
    """
    path = Path(path)
    raw = _read(path)
    header, _, body = _text(raw, path).partition("\n")
    if header.rstrip("\r") != HEADER:
        raise TraceError(f"{path}: line 1: the header is {header.rstrip()[:80]!r}, not '{HEADER}'")
    rows = _parse(body)
    bad = rows.filter(pl.col("why").is_not_null())
    if not skip_bad and not bad.is_empty():
        line, text, why = bad.select("line", "text", "why").row(0)
        raise TraceError(f"{path}: line {line}: {why}: {text[:80]!r}; mend the file, or drop such rows with --skip-bad")
    good = rows.filter(pl.col("why").is_null())
    if good.is_empty():
        raise TraceError(f"{path}: has no rows to import ({rows.height} read, {bad.height} dropped)")
    label = label or path.name.split(".")[0] or "azure"
    frame = good.select(
        request_id=pl.int_range(pl.len(), dtype=pl.UInt64),
        arrival_ns=pl.col("time_ns") - pl.col("time_ns").first(),
        input_tokens="input_tokens",
        output_tokens="output_tokens",
        label=pl.lit(label),
    )
    metadata = {
        "generator": "tracegen import azure",
        "parameters": {"label": label, "skip_bad": skip_bad},
        "source": {
            "file": path.name,
            "sha256": hashlib.sha256(raw).hexdigest(),
            "first_arrival": good["text"][0].partition(",")[0],
            "rows_read": rows.height,
            "rows_dropped": bad.height,
            "dropped": dict(bad["why"].value_counts(sort=True).iter_rows()),
        },
    }
    return check_trace(frame, str(path)), metadata


def _read(path: Path) -> bytes:
    """The file's bytes as they are."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror})") from None


def _text(raw: bytes, path: Path) -> str:
    """`raw` unpacked, by what it begins with and not by its name, and decoded; stray bytes spoil only their row."""
    for magic, unpack in _UNPACK.items():
        if raw.startswith(magic):
            try:
                raw = unpack(raw)
            except (lzma.LZMAError, zlib.error, OSError, EOFError) as error:
                raise TraceError(f"{path}: truncated or damaged archive ({error}); fetch it again") from None
            break
    return raw.decode("utf-8-sig", errors="replace")


def _parse(body: str) -> pl.DataFrame:
    """One row a line: `line` (the header's is 1), `text`, `time_ns`, token counts, and `why` it is bad or null."""
    lines = body.removesuffix("\n").split("\n") if body else []
    fields = pl.col("text").str.extract_groups(_ROW).struct.rename_fields(["time", "input", "output"])
    return (
        pl.DataFrame({"text": lines}, schema={"text": pl.String})
        .with_columns(pl.col("text").str.strip_suffix("\r"))
        .with_row_index("line", offset=2)
        .with_columns(fields.alias("field"))
        .with_columns(
            time_ns=pl.col("field").struct["time"].str.to_datetime(_TIME, time_unit="ns", strict=False),
            input_tokens=pl.col("field").struct["input"].cast(pl.UInt32, strict=False),
            output_tokens=pl.col("field").struct["output"].cast(pl.UInt32, strict=False),
        )
        .with_columns(pl.col("time_ns").cast(pl.Int64))
        .with_columns(why=_why_bad())
        .with_columns(why=pl.coalesce("why", _why_early()))
    )


def _why_bad() -> pl.Expr:
    """Why a row cannot be used by itself, or null."""
    return (
        pl.when(pl.col("field").struct["time"].is_null())
        .then(pl.lit(f"not a row of {HEADER}"))
        .when(pl.col("time_ns").is_null())
        .then(pl.lit("no such date or time"))
        .when(pl.col("input_tokens").is_null() | pl.col("output_tokens").is_null())
        .then(pl.lit("a token count is too large"))
        .when((pl.col("input_tokens") == 0) | (pl.col("output_tokens") == 0))
        .then(pl.lit("a token count is zero"))
    )


def _why_early() -> pl.Expr:
    """Why a row, usable by itself, cannot stand where it does, or null."""
    usable_ns = pl.when(pl.col("why").is_null()).then("time_ns")
    latest_before_ns = usable_ns.cum_max().forward_fill().shift(1)
    return pl.when(pl.col("time_ns") < latest_before_ns).then(pl.lit("is earlier than a row before it"))
