"""Columns of text, as CSV files have them, turned into values; and why a text is none, in words.

A kind of column is a pair: `parse` maps a String series to values, null where a text is no such value, and `why` says
of one such text what is wrong with it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

MAX_TOKENS = 2**32 - 1  # UInt32, the schema's
MAX_TIME_NS = 2**62  # 146 years on either side of 1970, so that no sum or difference of times can wrap
NS_PER_UNIT = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}

# Years are those of 64 bits of nanoseconds, with room. The seconds end at 59: what polars would take for a leap second
# would move the row by a second.
_ISO = (
    r"^(?:19|20)[0-9]{2}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-5][0-9]"
    r"(?:\.[0-9]{1,9})?(?:Z|[+-](?:0[0-9]|1[0-4]):[0-5][0-9])?$"
)
_ZONE = r"([+-])([0-9]{2}):([0-9]{2})$"


@dataclass(frozen=True)
class Kind:
    """How a column's texts are read, and why one cannot be."""

    parse: Callable[[pl.Series], pl.Series]
    why: Callable[[str], str]


@dataclass(frozen=True)
class Column:
    """A column of a file, by its name there, and what it is in a batch; an `optional` one may be blank."""

    source: str
    name: str
    kind: Kind
    optional: bool = False


def parsed(
    rows: pl.DataFrame, columns: Sequence[Column], wrong: pl.Expr | None = None, separator: str = ","
) -> pl.DataFrame:
    """`rows` (`_line`, `_text`, `_why`, and columns of text by their names in the file) with the values of `columns`.

    `_why` names the first column of each row that has no value and should have one; else it is what `wrong` says of
    the values, null where they are right. `_text`, where there is none, is the fields of a bad row with `separator`.
    """
    why = rows["_why"]
    values: list[pl.Series] = []
    for column in columns:
        texts = rows[column.source]
        values.append(column.kind.parse(texts).alias(column.name))
        missing = values[-1].is_null() & why.is_null()  # where a row is bad already its columns are not its own
        if column.optional:
            missing &= (texts != "").fill_null(value=False)
        if missing.any():
            found = [
                f"{column.source} {column.kind.why(text or '')}" if bad else None
                for text, bad in zip(texts, missing, strict=True)
            ]
            why = why.zip_with(~missing, pl.Series(found, dtype=pl.String))
    if wrong is not None:
        why = why.zip_with(why.is_not_null(), pl.DataFrame(values).select(wrong).to_series())
    text = rows["_text"]
    if text.null_count() and why.null_count() < rows.height:
        fields = pl.concat_str(pl.exclude("_line", "_text", "_why"), separator=separator)
        text = text.fill_null(rows.select(fields).to_series())
    return rows.select("_line", text, why.alias("_why"), *values)


def _whole(texts: pl.Series, dtype: pl.DataType) -> pl.Series:
    """Whole numbers; blanks around them and a fraction of nothing (`12.0`, as tables with gaps are saved) are none."""
    value = texts.cast(dtype, strict=False)
    if value.null_count() > texts.null_count():
        again = texts.str.strip_chars().str.replace(r"\.0*$", "").cast(dtype, strict=False)
        value = pl.select(pl.coalesce(value, again)).to_series()
    return value


def _parse_tokens(texts: pl.Series) -> pl.Series:
    value = _whole(texts, pl.UInt32())
    return value.set(value == 0, None) if value.min() == 0 else value


def _why_blank(_: str) -> str:
    return "is blank"


def _why_count(text: str) -> str:
    """Why `text` is no count that fits."""
    text = text.strip()
    if not text:
        return "is blank"
    digits = text.removeprefix("-").partition(".")
    if not digits[0].isascii() or not digits[0].isdigit() or digits[2].strip("0"):
        return "is not a whole number"
    return "is negative" if text.startswith("-") else f"is too large (over {MAX_TOKENS})"


def _why_tokens(text: str) -> str:
    digits = text.strip().replace(".", "", 1)
    return "is zero" if digits and not digits.strip("0") else _why_count(text)


TOKENS = Kind(_parse_tokens, _why_tokens)
COUNT = Kind(lambda texts: _whole(texts, pl.UInt32()), _why_count)
TEXT = Kind(lambda texts: texts.set(texts == "", None), _why_blank)


def _parse_id(texts: pl.Series) -> pl.Series:
    """64 bits for each text: itself where it is a number, else the first of its BLAKE2b hash.

    Two of n texts fall together with probability n²/2⁶⁵: for ten million, 3 in a million.
    """
    value = texts.cast(pl.UInt64, strict=False)
    if value.null_count() > texts.null_count() or (texts == "").any():
        named = texts.filter(value.is_null() & (texts != "")).unique()
        hashed = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") for text in named]
        other = texts.replace_strict(named, pl.Series(hashed, dtype=pl.UInt64), default=None, return_dtype=pl.UInt64)
        value = pl.select(pl.coalesce(value, other)).to_series()
    return value


ID = Kind(_parse_id, _why_blank)


def clock(unit: str) -> Kind:
    """Times that count `unit` (a key of `NS_PER_UNIT`), as decimal numbers; exact to the nanosecond."""
    ns = NS_PER_UNIT[unit]
    places = len(str(ns)) - 1

    def parse(texts: pl.Series) -> pl.Series:
        whole = texts.cast(pl.Int64, strict=False)
        fraction = None
        if whole.null_count() > texts.null_count():
            parts = texts.str.strip_chars().str.extract_groups(r"^([0-9]+)(?:\.([0-9]*))?$")
            whole = parts.struct[0].cast(pl.Int64, strict=False)
            shown = parts.struct[1].fill_null("").str.slice(0, places).str.pad_end(max(places, 1), "0")
            fraction = shown.cast(pl.Int64, strict=False) if places else None
        whole = whole.set((whole < 0) | (whole > MAX_TIME_NS // ns), None)
        return whole * ns if fraction is None else whole * ns + fraction

    def why(text: str) -> str:
        text = text.strip()
        if not text:
            return "is blank"
        digits = text.removeprefix("-").replace(".", "", 1)
        if not (digits.isascii() and digits.isdigit()):
            return f"is not a number of {_UNIT_NAMES[unit]}"
        return "is negative" if text.startswith("-") else "is too large"

    return Kind(parse, why)


_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


def _parse_iso(texts: pl.Series) -> pl.Series:
    """Nanoseconds from 1970, UTC, to each of nine decimals; a time without a zone is taken for UTC."""
    form = texts.str.contains(_ISO)
    if not form.all():
        texts = texts.set(~form, None)
    second = texts.str.slice(0, 19)
    if second.str.contains("T", literal=True).any():
        second = second.str.replace("T", " ", literal=True)
    second_us = second.str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False).cast(pl.Int64)
    rest = texts.str.slice(19).str.strip_suffix("Z").str.strip_suffix("+00:00")
    zoned = rest.str.contains(_ZONE)
    offset_s: pl.Series | int = 0
    if zoned.any():
        zone = rest.str.extract_groups(_ZONE)
        sign = zone.struct[0].replace_strict({"+": 1, "-": -1}, default=0, return_dtype=pl.Int64)
        hours, minutes = (zone.struct[k].cast(pl.Int64).fill_null(0) for k in (1, 2))
        offset_s = sign * (hours * 3600 + minutes * 60)
        rest = rest.str.replace(_ZONE, "")
    fraction = rest.str.strip_prefix(".").str.pad_end(9, "0").cast(pl.Int64, strict=False)
    return second_us * 1000 - offset_s * 10**9 + fraction


def _why_iso(text: str) -> str:
    if not text.strip():
        return "is blank"
    if pl.Series([text]).str.contains(_ISO).item():
        return "is no such date or time"
    return "is not a date and time such as 2023-11-16 18:15:46.6805900"


ISO = Kind(_parse_iso, _why_iso)
