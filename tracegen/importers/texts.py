"""What formats of texts share: how many tokens a text has, and arrivals for requests that have no time.

Tokens are counted by a `tokenizer.json` with the `tokenizers` package (the extra `tokenizer`), without special tokens
and without a chat template.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.importers.base import Batches, Options, Report
from tracegen.sources import Source
from tracegen.streams import random_stream

Count = Callable[[Sequence[str]], list[int]]


def token_counter(folder: str | Path) -> Count:
    """A function that counts the tokens of each of some texts, by the `tokenizer.json` in `folder`, or that file.

    Raises `TraceError` where it is missing or none, and where the package `tokenizers` is not installed.
    """
    path = Path(folder)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise TraceError(f"--tokenizer {folder}: has no tokenizer.json; name the folder of a model's tokenizer")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise TraceError(
            "--tokenizer: the package tokenizers is not installed; pip install 'wattrace[tokenizer]'"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the package raises bare Exceptions
        raise TraceError(f"{path}: is no tokenizer.json ({str(error).splitlines()[0]})") from None

    def count(texts: Sequence[str]) -> list[int]:
        return [len(found) for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    return count


def check_options(source: Source, options: Options, name: str, *, tokenizer: bool) -> None:
    """Raise `TraceError` where an option is missing that texts need: a rate, and a `tokenizer`."""
    if options.rate_rps is None:
        raise TraceError(f"{source.location}: has no times; say 'tracegen import {name} --rate N' for Poisson arrivals")
    if not 0 < options.rate_rps < float("inf"):
        raise TraceError(f"--rate {options.rate_rps:g}: is not a positive number per second")
    if tokenizer and options.tokenizer is None:
        raise TraceError(
            f"{source.location}: has texts, whose tokens a tokenizer counts; say "
            f"'tracegen import {name} --tokenizer FOLDER', one with a tokenizer.json"
        )


class PoissonTimes:
    """The times of a Poisson process, in nanoseconds from its start, some at a time."""

    def __init__(self, rate_rps: float, seed: int) -> None:
        self._mean_ns = NS_PER_S / rate_rps
        self._stream = random_stream(seed, "arrivals of texts")
        self._last_ns = 0.0

    def next(self, count: int) -> NDArray[np.int64]:
        """The next `count` times; each call draws as many numbers, so parts do not matter."""
        times_ns = self._last_ns + np.cumsum(self._stream.standard_exponential(count)) * self._mean_ns
        self._last_ns = float(times_ns[-1]) if count else self._last_ns
        return times_ns.astype(np.int64)


def remark_times(batches: Batches, options: Options, source: Source, report: Report) -> Batches:
    """A stage that says that the arrivals are made."""
    yield from batches  # which raise where there is no rate
    report.remarks.append(f"the source has no times: Poisson arrivals, {options.rate_rps:g}/s, by seed {options.seed}")
