"""The Azure LLM inference traces of 2023 and 2024 and the multimodal one of 2024, as published: CSV.

Formats (AzureLLMInferenceDataset2023.md, -2024.md and AzureLMMInferenceDataset2025.md in
github.com/Azure/AzurePublicDataset): columns as in `HEADER`, multimodal with NumImages behind the time; rows in order
of time. Times are `2023-11-16 18:15:46.6805900` (2023, in steps of 100 ns), `2024-05-10 00:00:00.009930+00:00` (2024;
pandas leaves out a fraction of zero) or `2024-10-15T12:00:00.269Z` (multimodal); a file may mix them.
"""

from tracegen.importers.base import Batches, Format, Options, columns_of, first_line
from tracegen.importers.columns import COUNT, ISO, TOKENS, Column, parsed
from tracegen.importers.textfiles import csv_rows
from tracegen.sources import Source

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
MULTIMODAL_HEADER = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens"
_COLUMNS = (
    Column("TIMESTAMP", "_time_ns", ISO),
    Column("NumImages", "images", COUNT),
    Column("ContextTokens", "input_tokens", TOKENS),
    Column("GeneratedTokens", "output_tokens", TOKENS),
)


def _recognises(start: bytes) -> bool:
    return first_line(start) in {HEADER, MULTIMODAL_HEADER}


def _read(source: Source, options: Options) -> Batches:
    names = columns_of(source, HEADER, MULTIMODAL_HEADER)
    columns = [column for column in _COLUMNS if column.source in names]
    for rows in csv_rows(source, names):
        yield parsed(rows, columns).with_columns(rows["TIMESTAMP"].alias("_said"))


FORMAT = Format(
    name="azure",
    title="Azure LLM inference traces of 2023 and 2024, multimodal too (CSV)",
    recognises=_recognises,
    read=_read,
)
