"""Large JSON documents of many values, read as a stream: an array's elements, or values one behind another."""

import codecs
import json
from collections.abc import Iterator
from typing import Any

from tracegen.errors import TraceError
from tracegen.sources import LONGEST_LINE_BYTES, Source

_BETWEEN = " \t\r\n,"


def json_values(source: Source) -> Iterator[tuple[int, Any]]:
    """The elements (objects) of the array that `source` is, or the objects in it, each with the line that it begins on.

    Memory is bounded by a piece and by the largest value. Raises `TraceError` for what is no JSON, with its line: what
    comes behind it cannot be told apart.
    """
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    scan = json.JSONDecoder().raw_decode
    text, at, line = "", 0, 1
    begun = array = ended = False
    chunks = source.chunks()
    while True:
        start = at
        while at < len(text) and text[at] in _BETWEEN:
            at += 1
        line += text.count("\n", start, at)
        if at < len(text) and not begun:
            begun, array = True, text[at] == "["
            at += array
            continue
        if array and at < len(text) and text[at] == "]":
            return
        try:
            value, end = scan(text, at)
        except ValueError as error:
            if ended and at == len(text) and not array:
                return
            if ended or len(text) - at > LONGEST_LINE_BYTES:
                why = "the file ends within an array" if at == len(text) else f"is not JSON ({error})"
                raise TraceError(f"{source.location}: line {line}: {why}; fetch it again") from None
            chunk = next(chunks, b"")
            text, at, ended = text[at:] + decode(chunk, final=not chunk), 0, not chunk
            continue
        yield line, value
        line += text.count("\n", at, end)
        at = end
