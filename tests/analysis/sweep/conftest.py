"""Sweeps to ask: tables made up figure by figure, and a small one that was really simulated."""

import json
import shutil
import sys
from pathlib import Path

import polars as pl
import pytest

from analysis.cli import main
from analysis.slo import DEFAULT_SLO
from analysis.sweep import CELLS, GROUPS, SweepTable, settings_of

FIGURES = {
    "requests": 100, "served": 100, "ttft_mean_ms": 50.0, "ttft_p50_ms": 50.0, "ttft_p99_ms": 100.0,
    "tbt_mean_ms": 20.0, "tbt_p99_ms": 30.0, "e2e_mean_ms": 1000.0, "e2e_p99_ms": 2000.0,
    "energy_per_request_j": 100.0, "energy_per_output_token_j": 1.0, "slo_attainment": 1.0,
    "slo_attainment_ttft": 1.0, "slo_attainment_tbt": 1.0, "power_w": 500.0, "gpu_s_per_request": 2.0,
}  # fmt: skip
SETTING = {"tp": 2, "freq_mhz": 1200.0, "rate_rps": 1.0, "batch_cap": None, "power_cap_w": None, "repeat": 0}


@pytest.fixture(scope="session")
def table_of():
    """A `SweepTable` of cells that are told by what is not as usual in them; groups likewise, with their setting."""

    def table_of(cells, groups=(), by="bucket", slo=DEFAULT_SLO):
        named = [_named({**SETTING, **FIGURES, "state": "complete", "standing": "sound", **cell}) for cell in cells]
        parts = [_named({**SETTING, **FIGURES, "standing": "sound", **group}) for group in groups]
        cell_rows = pl.DataFrame([{n: row.get(n) for n in CELLS} for row in named], schema=CELLS)
        group_rows = pl.DataFrame([{n: row.get(n) for n in GROUPS} for row in parts], schema=GROUPS)
        return SweepTable(
            Path("made-up"), True, "virtual", "m", "simulated", by, "gpu", slo, cell_rows, group_rows,
            settings_of(cell_rows, group_rows), [], [],
        )  # fmt: skip

    return table_of


def _named(row):
    name = f"tp{row['tp']}-{row['freq_mhz']}-{row['rate_rps']}-r{row['repeat']}"
    return {"cell": name, "run": f"cells/{name}", **row}


@pytest.fixture(scope="session")
def _swept(virtual_run, tmp_path_factory):
    """A sweep of TP 2 and 4 at two clocks, two repeats of one rate, simulated once."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    cells = []
    for repeat in (0, 1):
        trace = _trace(repeat)
        for tp in (2, 4):
            for clock_mhz in (1005, 1500):
                name = f"tp{tp}-{clock_mhz}MHz-1rps-r{repeat}"
                virtual_run(folder / "cells" / name, trace, tp=tp, freq_mhz=clock_mhz, seed=repeat)
                cells.append(
                    {
                        "cell": name, "tp": tp, "freq_mhz": clock_mhz, "rate_rps": 1.0, "batch_cap": None,
                        "power_cap_w": None, "repeat": repeat, "state": "complete", "run": f"cells/{name}", "why": None,
                    }
                )  # fmt: skip
    document = {
        "schema_version": 1, "state": "complete", "simulated": True, "clock": "virtual", "model": "llama-2-70b",
        "engine": "simulated", "cells": cells,
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(document))
    return folder


def _trace(seed):
    """Twenty-four requests, one a second; short and medium ones in turn."""
    rows = pl.int_range(24, eager=True)
    return pl.DataFrame(
        {
            "request_id": rows,
            "arrival_ns": rows * 10**9 + seed * 10**8,
            "input_tokens": 200 + 400 * (rows % 2) + 10 * seed,
            "output_tokens": 30 + 15 * (rows % 3),
            "client_id": rows % 4,
            "label": ["one", "two", "two"] * 8,
        },
        schema={
            "request_id": pl.UInt64, "arrival_ns": pl.Int64, "input_tokens": pl.UInt32, "output_tokens": pl.UInt32,
            "client_id": pl.UInt64, "label": pl.String,
        },
    )  # fmt: skip


@pytest.fixture(scope="session")
def _analysed(_swept):
    """The same with the energies of its runs, so that no test waits for them again."""
    from analysis.sweep import load_sweep

    load_sweep(_swept)
    return _swept


@pytest.fixture
def sweep_dir(_analysed, tmp_path):
    """A copy of a simulated sweep, to be changed at will."""
    shutil.copytree(_analysed, tmp_path / "sweep")
    return tmp_path / "sweep"


@pytest.fixture
def change():
    """Change a sweep's file by a function of its document."""

    def change(folder, edit):
        path = folder / "sweep.json"
        document = json.loads(path.read_text())
        path.write_text(json.dumps(edit(document) or document))
        return folder

    return change


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run `analysis ARGS`; gives exit code, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["analysis", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run
