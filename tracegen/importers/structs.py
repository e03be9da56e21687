"""Lines of JSON whose rows are the fields of a `msgspec.Struct`, as columns, block by block.

Arrow's reader takes whole blocks at once. It knows no bounds and no line numbers, so they are checked behind it; and a
block in which anything is not as it should be is read again line by line by msgspec, which says what and where.
"""

import io
from collections.abc import Iterator
from typing import Any

import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.json

from tracegen.importers.textfiles import json_rows_of, nothing
from tracegen.sources import Source

_ARROW: dict[type, pa.DataType] = {
    msgspec.inspect.IntType: pa.int64(),
    msgspec.inspect.FloatType: pa.float64(),
    msgspec.inspect.StrType: pa.string(),
}


def struct_rows(source: Source, row: type[msgspec.Struct]) -> Iterator[pl.DataFrame]:
    """Frames of `_line`, `_text`, `_why` and a column for each field of `row`: Int64, Float64, String, or List(Int64).

    `_text` and `_why` are null where a line is such a row, `_text` also where all lines of its block are.
    """
    fields = msgspec.inspect.type_info(row).fields  # type: ignore[attr-defined]
    schema = pa.schema([(field.name, _arrow_type(field.type)) for field in fields])
    types = dict(pl.DataFrame(schema.empty_table()).schema)
    decode = msgspec.json.Decoder(row).decode
    first = 1
    for block in source.blocks():
        rows = _clean_rows(block, schema, fields)
        if rows is None:
            read = json_rows_of(block, first, decode)
            rows = read.frame({name: (dtype, _taker(name)) for name, dtype in types.items()})
        else:
            lines = pl.int_range(first, first + rows.height, eager=True).alias("_line")
            none = nothing(rows.height)
            rows = rows.with_columns(lines, none.alias("_text"), none.alias("_why"))
        yield rows
        first += rows.height


def _taker(name: str) -> Any:
    return lambda row: getattr(row, name)


def _clean_rows(block: bytes, schema: pa.Schema, fields: tuple[Any, ...]) -> pl.DataFrame | None:
    """The rows of a block of which each line is one row and within its bounds; None for any other block."""
    block = block.replace(b"\r\n", b"\n").removesuffix(b"\n")
    lines = block.count(b"\n") + 1
    # No object goes over a line's end, and none begins or ends elsewhere: Arrow would not mind.
    if not block.isascii() or block.count(b"}\n{") != lines - 1:
        return None
    options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = pa.json.read_json(io.BytesIO(block), parse_options=options)
    except pa.ArrowException:
        return None
    if table.num_rows != lines:
        return None
    rows = pl.DataFrame(table)
    return rows if all(_sound(rows[field.name], field) for field in fields) else None


def _sound(column: pl.Series, field: Any) -> bool:
    """Whether all values of a column are what their field may be."""
    kind = _kind(field.type)
    if isinstance(kind, msgspec.inspect.ListType):
        if column.null_count():
            return False
        column, kind = column.explode(empty_as_null=False), kind.item_type
        missing = column.null_count() > 0
    else:
        missing = field.required and column.null_count() > 0
    if missing or isinstance(kind, msgspec.inspect.StrType):
        return not missing
    low, high = kind.ge, kind.le
    return bool(column.drop_nulls().is_between(low, high).all())


def _kind(found: Any) -> Any:
    """A field's type, or what it is where it is there."""
    if isinstance(found, msgspec.inspect.UnionType):
        (found,) = (each for each in found.types if not isinstance(each, msgspec.inspect.NoneType))
    return found


def _arrow_type(found: Any) -> pa.DataType:
    kind = _kind(found)
    if isinstance(kind, msgspec.inspect.ListType):
        return pa.list_(_arrow_type(kind.item_type))
    return _ARROW[type(kind)]
