"""Write a trace in the formats that other tools replay; what each can hold, and how exactly, is in `EXPORTS`.

Formats: Mooncake (FAST25-release/traces in github.com/kvcache-ai/Mooncake), Azure 2023 (AzureLLMInferenceDataset2023.md
in github.com/Azure/AzurePublicDataset), AIPerf's `mooncake_trace` (its page "Trace Replay with Mooncake Traces", and
MooncakeTrace in aiperf/dataset/loader/models.py), and `timed_trace` of `vllm bench serve` (vLLM pull requests
39795 and 45423). The last three make a prompt from its hash ids, so every block of a prompt needs one: blocks that the
trace has no hash for get ids that no other block has, and an id is always of one size. Hash ids are numbered anew from
0, in order of appearance, as published traces have them; equal stay equal, different stay different.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl

from tracegen.errors import TraceError
from tracegen.schema import read_metadata, read_trace_parts
from tracegen.writer import written_whole

ORIGIN = "2000-01-01 00:00:00"  # where a format wants dates and the trace has none; whole years stay recognisable
MOONCAKE_BLOCK_TOKENS = 512  # of the published traces
VLLM_BLOCK_TOKENS = 16  # the default of --timed-trace-chunk-hash-size
_NS_PER_MS = 10**6
_PART_ROWS = 1 << 14  # read at a time: where prompts are long, a row has a thousand hashes
_LIST_ROWS = 1 << 10  # of them, whose hashes are Python numbers at a time


@dataclass
class ExportReport:
    """What an export did: rows written, columns that the format has no place for, remarks, and how to run it."""

    format: str
    output: Path
    rows: int
    resolution_ns: int
    left_out: list[str]
    remarks: list[str] = field(default_factory=list)
    run_with: str | None = None


@dataclass(frozen=True)
class Export:
    """A format: its title, the resolution of its times, the columns it holds, the file's suffix, and its writer.

    `lines` gives the file's lines; `run_with` the command that takes it.
    """

    title: str
    resolution_ns: int
    columns: frozenset[str]
    suffix: str
    lines: Callable[[pl.DataFrame, "Blocks", datetime], Iterator[str]]
    run_with: str | None = None


@dataclass
class Blocks:
    """The hash ids of prompts in blocks of `block_tokens`, from hashes of blocks of `have_tokens`; null: none."""

    block_tokens: int
    have_tokens: int | None
    known: dict[Hashable, int] = field(default_factory=dict)
    count: int = 0

    def of(self, input_tokens: int, hashes: Sequence[int] | None) -> list[int]:
        """One id for each block of a prompt, the last of which may not be full."""
        needed = -(-input_tokens // self.block_tokens)
        keys = list(self._keys(input_tokens, hashes or ())[:needed]) if self.have_tokens else []
        if len(keys) == needed and (rest := input_tokens % self.block_tokens):
            keys[-1] = (keys[-1], rest)  # another block than a full one: AIPerf refuses an id of two sizes
        ids = [self._number(key) for key in keys]
        ids += range(self.count, self.count + needed - len(ids))
        self.count += needed - len(keys)
        return ids

    def _keys(self, input_tokens: int, hashes: Sequence[int]) -> Sequence[Hashable]:
        """What tells the blocks apart, as far as the hashes go."""
        have = self.have_tokens or self.block_tokens
        if have == self.block_tokens:
            return hashes
        if have > self.block_tokens:
            return [(each, part) for each in hashes for part in range(have // self.block_tokens)]
        ratio = self.block_tokens // have
        # A block is known where all its parts are; the last one, at the prompt's end, has fewer.
        whole = len(hashes) if len(hashes) * have >= input_tokens else len(hashes) // ratio * ratio
        return [tuple(hashes[k : k + ratio]) for k in range(0, whole, ratio)]

    def _number(self, key: Hashable) -> int:
        number = self.known.setdefault(key, self.count)
        self.count += number == self.count
        return number


def export_trace(
    path: str | Path,
    output: str | Path | None = None,
    *,
    format: str,  # noqa: A002 - the word that its users know
    origin: str = ORIGIN,
    force: bool = False,
) -> ExportReport:
    """Write the trace at `path` in a format of `EXPORTS` to `output`, by default beside its name with the suffix.

    Arrivals are rounded to the format's resolution, halves up, so their order stays; each is off by half of it at most.
    `origin` is the date, in UTC, of the trace's start, for Azure's format, which has dates. The trace is read and
    written part by part, in memory for one; with hash ids some 120 bytes for each different block that the trace has.

    Raises `TraceError` for a trace that cannot be read, a format that there is none of, an output that exists (unless
    `force`) or cannot be written, and blocks of a size from which the format's cannot be made.
    """
    if format not in EXPORTS:
        raise TraceError(f"there is no format '{format}' to export to; the formats are {', '.join(EXPORTS)}")
    form = EXPORTS[format]
    start = _origin(origin)
    parts = read_trace_parts(path, _PART_ROWS)
    first = next(parts)
    blocks = _blocks(format, first.columns, read_metadata(path), path)
    output = Path(output or f"{Path(path).stem}{form.suffix}")
    if output.exists() and not force:
        raise TraceError(f"{output}: exists; choose another output, or overwrite it with --force")
    left_out = [name for name in first.columns if name not in form.columns]
    report = ExportReport(format, output, 0, form.resolution_ns, left_out)
    if format == "azure":
        report.remarks.append(f"dates are made: the trace's start is {start.replace(tzinfo=None)} UTC")
    if format == "vllm-bench" and "prefix_hashes" not in first.columns:
        report.remarks.append("hash ids are made: no two blocks of prompts are the same")

    def lines() -> Iterator[str]:
        for part in chain([first], parts):
            report.rows += part.height
            yield from form.lines(part, blocks, start)

    _write(output, lines(), form)
    if form.run_with is not None:
        report.run_with = form.run_with.format(output=output, block_tokens=blocks.block_tokens, rows=report.rows)
    return report


def _origin(text: str) -> datetime:
    """The date that `text` says, in UTC."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise TraceError(f"--origin {text}: is not a date and time such as {ORIGIN}") from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _blocks(name: str, columns: Sequence[str], metadata: Mapping[str, Any], path: str | Path) -> Blocks:
    """How the format's hash ids are made from the trace's hashes."""
    have: int | None = metadata.get("block_tokens") if "prefix_hashes" in columns else None
    if name == "mooncake":
        want = MOONCAKE_BLOCK_TOKENS
        if have is not None and want % have and have % want:
            raise TraceError(
                f"{path}: its prefix hashes are of blocks of {have} tokens, which do not make up Mooncake's {want}; "
                "export to aiperf or vllm-bench, which take any size"
            )
    else:
        want = have or (VLLM_BLOCK_TOKENS if name == "vllm-bench" else MOONCAKE_BLOCK_TOKENS)
    return Blocks(want, have)


def _write(output: Path, lines: Iterator[str], form: Export) -> None:
    """Write `lines` to `output`, whole or not at all."""
    with written_whole(output) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_HEADERS.get(form.suffix, []))
        file.writelines(lines)


def _rows(frame: pl.DataFrame) -> Iterator[tuple[int, int, int, Sequence[int] | None]]:
    """Arrival, lengths and hashes of each row."""
    names = ["arrival_ns", "input_tokens", "output_tokens"]
    hashes = pl.col("prefix_hashes") if "prefix_hashes" in frame.columns else pl.lit(None).alias("prefix_hashes")
    for part in frame.select(*names, hashes).iter_slices(_LIST_ROWS):
        yield from zip(*(column.to_list() for column in part), strict=True)


def _mooncake_lines(frame: pl.DataFrame, blocks: Blocks, start: datetime) -> Iterator[str]:
    for arrival_ns, inputs, outputs, hashes in _rows(frame):
        at_ms = (arrival_ns + _NS_PER_MS // 2) // _NS_PER_MS
        yield _line(str(at_ms), inputs, outputs, blocks.of(inputs, hashes))


def _aiperf_lines(frame: pl.DataFrame, blocks: Blocks, start: datetime) -> Iterator[str]:
    for arrival_ns, inputs, outputs, hashes in _rows(frame):
        ids = None if blocks.have_tokens is None else blocks.of(inputs, hashes)
        yield _line(_decimal(arrival_ns, 6), inputs, outputs, ids)


def _vllm_lines(frame: pl.DataFrame, blocks: Blocks, start: datetime) -> Iterator[str]:
    for arrival_ns, inputs, outputs, hashes in _rows(frame):
        yield _line(_decimal(arrival_ns, 9), inputs, outputs, blocks.of(inputs, hashes))


def _line(timestamp: str, inputs: int, outputs: int, ids: list[int] | None) -> str:
    """A line of Mooncake's format."""
    hashes = "" if ids is None else f', "hash_ids": {ids}'
    return f'{{"timestamp": {timestamp}, "input_length": {inputs}, "output_length": {outputs}{hashes}}}\n'


def _decimal(value: int, places: int) -> str:
    """`value` with the point `places` digits from its end, without zeros at the end: exact, as no float is."""
    whole, rest = divmod(value, 10**places)
    return f"{whole}.{rest:0{places}}".rstrip("0").rstrip(".") if rest else str(whole)


def _azure_lines(frame: pl.DataFrame, blocks: Blocks, start: datetime) -> Iterator[str]:
    whole_s = int(start.replace(microsecond=0).timestamp())
    ticks = (pl.col("arrival_ns") + 50) // 100 + start.microsecond * 10
    date = pl.from_epoch(whole_s + ticks // 10**7, time_unit="s").dt.strftime("%Y-%m-%d %H:%M:%S")
    fraction = (ticks % 10**7).cast(pl.String).str.zfill(7)
    yield from frame.select(pl.format("{}.{},{},{}\n", date, fraction, "input_tokens", "output_tokens")).to_series()


_LENGTHS = frozenset({"request_id", "arrival_ns", "input_tokens", "output_tokens"})
_HEADERS = {".csv": ["TIMESTAMP,ContextTokens,GeneratedTokens\n"]}
EXPORTS: dict[str, Export] = {
    "mooncake": Export(
        "Mooncake JSON Lines: times in ms, hash ids of 512 tokens",
        _NS_PER_MS,
        _LENGTHS | {"prefix_hashes"},
        ".jsonl",
        _mooncake_lines,
    ),
    "azure": Export("Azure 2023 CSV: dates in steps of 100 ns", 100, _LENGTHS, ".csv", _azure_lines),
    "aiperf": Export(
        "AIPerf's mooncake_trace: times in ms with decimals, the trace's own blocks",
        1,
        _LENGTHS | {"prefix_hashes"},
        ".aiperf.jsonl",
        _aiperf_lines,
        "aiperf profile --model MODEL --input-file {output} --custom-dataset-type mooncake_trace --fixed-schedule "
        "--isl-block-size {block_tokens}",
    ),
    "vllm-bench": Export(
        "vllm bench serve's timed_trace: times in s with decimals, the trace's own blocks",
        1,
        _LENGTHS | {"prefix_hashes"},
        ".vllm.jsonl",
        _vllm_lines,
        "vllm bench serve --model MODEL --dataset-name timed_trace --dataset-path {output} --self-timed "
        "--timed-trace-chunk-hash-size {block_tokens} --num-prompts {rows}",
    ),
}
