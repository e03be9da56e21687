from collections.abc import Callable

import polars as pl
import pytest

from tracegen.schema import TRACE


@pytest.fixture
def make_frame() -> Callable[..., pl.DataFrame]:
    """A trace with the given arrivals, one second apart by default; other columns by keyword."""

    def make(arrival_ns=(0, 10**9, 2 * 10**9), **columns):
        n = len(arrival_ns)
        data = {
            "request_id": range(n),
            "arrival_ns": list(arrival_ns),
            "input_tokens": [100 + i for i in range(n)],
            "output_tokens": [10 + i for i in range(n)],
        }
        return pl.DataFrame(data, schema=TRACE).with_columns(**{k: pl.Series(v) for k, v in columns.items()})

    return make


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Run `tracegen ARGUMENTS` in this process: its exit code, stdout and stderr."""
    from tracegen.cli import main

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["tracegen", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run
