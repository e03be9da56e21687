"""Run directories to work on: copies of made-up runs (`benchmarks/made_runs.py`), and changed ones."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from benchmarks.made_runs import Load, make_run
from replay.rundir import Run, write_manifest


@pytest.fixture(scope="session")
def _made(tmp_path_factory) -> Callable[..., Path]:
    """A made-up run's directory, made once for each set of arguments."""
    made: dict[str, Path] = {}

    def make(**load: Any) -> Path:
        key = repr(sorted(load.items()))
        if key not in made:
            made[key] = make_run(tmp_path_factory.mktemp("runs") / "run", Load(**load)).path
        return made[key]

    return make


@pytest.fixture
def run_of(_made, tmp_path) -> Callable[..., Run]:
    """A fresh copy of a made-up run, to be changed at will; `name` is its directory's."""

    def copy(name: str = "run", **load: Any) -> Run:
        target = tmp_path / name
        shutil.copytree(_made(**({"duration_s": 40.0} | load)), target)
        return Run.open(target)

    return copy


@pytest.fixture
def rewrite() -> Callable[..., Run]:
    """Change a run's manifest and tables: `rewrite(run, power=frame, manifest={...})`; None removes a table."""

    def change(run: Run, manifest: dict[str, Any] | None = None, **tables: pl.DataFrame | None) -> Run:
        for name, frame in tables.items():
            path = run.path / f"{name}.parquet"
            if frame is None:
                path.unlink()
            else:
                frame.write_parquet(path)
        if manifest is not None:
            document = {**run.manifest, **manifest}
            write_manifest(run.path, {k: v for k, v in document.items() if v is not None})
        return Run.open(run.path)

    return change


@pytest.fixture
def warmed(run_of, rewrite) -> Callable[..., Run]:
    """A made-up run of which what was sent in the first `warmup_s` was its warm-up."""

    def warmed(warmup_s: float, **load: Any) -> Run:
        run = run_of(**load)
        start_ns = run.manifest["measure_start_ns"] + round(warmup_s * 1e9)
        requests, early = run.scan("requests").collect(), pl.col("sent_ns") < start_ns
        tables = {"requests": requests.filter(~early), "warmup": requests.filter(early)}
        return rewrite(run, {"measure_start_ns": start_ns}, **tables)

    return warmed
