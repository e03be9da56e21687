"""Prompts as `vllm bench serve --dataset-name custom` takes them: JSON Lines of `prompt` and `output_tokens`.

Format (docs.vllm.ai, Benchmark CLI, and CustomDataset in vllm/benchmarks/datasets): `{"prompt": "...",
"output_tokens": 100}`. A prompt may also be a list of token ids, which needs no tokenizer. There are no times: each
request has one of a Poisson process of the rate that is asked for.
"""

from collections.abc import Iterator
from typing import Annotated

import msgspec
import polars as pl

from tracegen.importers.base import Batches, Format, Options, first_line
from tracegen.importers.mooncake import Tokens
from tracegen.importers.textfiles import JsonRows, json_rows
from tracegen.importers.texts import PoissonTimes, check_options, remark_times, token_counter
from tracegen.sources import Source

NAME = "vllm-bench"
NO_TOKENS = "prompt has no token"


class Row(msgspec.Struct):
    """A line of the file."""

    output_tokens: Tokens
    prompt: str | Annotated[list[int], msgspec.Meta(min_length=1)]


def _recognises(start: bytes) -> bool:
    """By the keys of the first object."""
    try:
        keys = msgspec.json.decode(first_line(start))
    except msgspec.MsgspecError:
        return False
    return isinstance(keys, dict) and "prompt" in keys and "timestamp" not in keys


def _read(source: Source, options: Options) -> Batches:
    check_options(source, options, NAME, tokenizer=False)
    assert options.rate_rps is not None  # checked above
    times = PoissonTimes(options.rate_rps, options.seed)
    for rows in json_rows(source, msgspec.json.Decoder(Row).decode):
        counts = _counted(rows, source, options)
        batch = rows.frame(
            {
                "_said": (pl.String(), lambda _: ""),
                "input_tokens": (pl.UInt32(), lambda _, counts=counts: next(counts)),  # type: ignore[misc]
                "output_tokens": (pl.UInt32(), lambda row: row.output_tokens),
            }
        )
        empty = (pl.col("input_tokens") == 0).fill_null(value=False)
        yield batch.with_columns(
            _why=pl.coalesce("_why", pl.when(empty).then(pl.lit(NO_TOKENS))),
            _time_ns=pl.Series(times.next(batch.height)),
        )


def _counted(rows: JsonRows, source: Source, options: Options) -> Iterator[int]:
    """How many tokens the prompt of each usable row has."""
    prompts = [row.prompt for row in rows.found if row is not None]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    of_texts: Iterator[int] = iter(())
    if texts:
        check_options(source, options, NAME, tokenizer=True)
        assert options.tokenizer is not None
        of_texts = iter(token_counter(options.tokenizer)(texts))
    return (next(of_texts) if isinstance(prompt, str) else len(prompt) for prompt in prompts)


FORMAT = Format(
    name=NAME,
    title="prompts for vllm bench serve (JSON Lines)",
    recognises=_recognises,
    read=_read,
    stage=remark_times,
    metadata={"arrivals": "Poisson, made: the source has no times"},
)
