"""Lines of JSON whose rows are the fields of a `msgspec.Struct`, as columns, block by block.

A block is decoded at once; one in which anything is not as it should be is read again line by line, which says what
and where.
"""

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa

from tracegen.importers.textfiles import json_rows_of, nothing
from tracegen.sources import Source

_POLARS: dict[type, pl.DataType] = {
    msgspec.inspect.IntType: pl.Int64(),
    msgspec.inspect.FloatType: pl.Float64(),
    msgspec.inspect.StrType: pl.String(),
}


def struct_rows(source: Source, row: type[msgspec.Struct]) -> Iterator[pl.DataFrame]:
    """Frames of `_line`, `_text`, `_why` and a column for each field of `row`: Int64, Float64, String, or List(Int64).

    `_text` and `_why` are null where a line is such a row, `_text` also where all lines of its block are.
    """
    fields = msgspec.inspect.type_info(row).fields  # type: ignore[attr-defined]
    types = {field.name: _dtype(field.type) for field in fields}
    decoder = msgspec.json.Decoder(row)
    first = 1
    for block in source.blocks():
        found = _clean_rows(block, decoder)
        if found is None:
            read = json_rows_of(block, first, decoder.decode)
            rows = read.frame({name: (dtype, attrgetter(name)) for name, dtype in types.items()})
        else:
            columns = [_column(name, dtype, list(map(attrgetter(name), found))) for name, dtype in types.items()]
            lines = pl.int_range(first, first + len(found), eager=True).alias("_line")
            none = nothing(len(found))
            rows = pl.DataFrame([lines, none.alias("_text"), none.alias("_why"), *columns])
        yield rows
        first += rows.height


def _clean_rows(block: bytes, decoder: "msgspec.json.Decoder[Any]") -> list[Any] | None:
    """The rows of a block of which each line is one row; None for any other block."""
    block = block.replace(b"\r\n", b"\n").removesuffix(b"\n")
    lines = block.count(b"\n") + 1
    # No object goes over a line's end, and none begins or ends elsewhere: the decoder would not mind.
    if not block.isascii() or block.count(b"}\n{") != lines - 1:
        return None
    try:
        found = decoder.decode_lines(block)
    except msgspec.MsgspecError:
        return None
    return found if len(found) == lines else None


def _column(name: str, dtype: pl.DataType, values: list[Any]) -> pl.Series:
    """`values` as a column; lists in one piece, which is several times as quick as one by one."""
    if not isinstance(dtype, pl.List):
        return pl.Series(name, values, dtype=dtype)
    ends = np.cumsum([0, *map(len, values)])
    flat = np.fromiter(chain.from_iterable(values), np.int64, ends[-1])
    return pl.Series(name, pa.LargeListArray.from_arrays(ends, flat), dtype=dtype)


def _dtype(found: Any) -> pl.DataType:
    """The column's type of a field, or of what it is where it is there."""
    if isinstance(found, msgspec.inspect.UnionType):
        (found,) = (each for each in found.types if not isinstance(each, msgspec.inspect.NoneType))
    if isinstance(found, msgspec.inspect.ListType):
        return pl.List(_dtype(found.item_type))
    return _POLARS[type(found)]
