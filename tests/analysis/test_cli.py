"""The command line: what it prints, what it refuses, and that it refuses in one line."""

import errno
import json
import os
import sys
import time

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from typer.main import get_command

from analysis.cli import app, main
from analysis.energy import attribute
from analysis.query import query

COMMANDS = [
    *("energy", "methods", "check", "buckets", "latency", "query", "compare", "report", "figures"),
    *("sweep", "recommend", "top"),
]


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run `analysis ARGS`; gives exit code, stdout and stderr."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["analysis", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


def test_energy_prints_where_the_joules_went_and_both_errors(cli, run_of):
    run = run_of()
    code, out, _ = cli("energy", run.path)
    assert code == 0
    assert out.startswith("SIMULATED  run: ")
    summary = attribute(run).summary
    for word in ("prefill", "decode", "idle", "other", "measured"):
        assert word in out
    assert f"{summary['measured_j'] / 1e3:,.3f}" in out
    assert "SIMULATED ground truth" in out
    assert "shapley" in out
    assert "equal-time" in out
    assert (run.path / "energy/summary.json").is_file()


def test_energy_of_a_measured_run_claims_no_truth(cli, run_of, rewrite):
    run = rewrite(run_of(), {"engine": "vllm"}, truth=None)
    code, out, _ = cli("energy", run.path)
    assert code == 0
    assert "SIMULATED" not in out
    assert "truth" not in out


def test_json_is_json(cli, run_of):
    a, b = run_of("a"), run_of("b", seed=2)
    energy = json.loads(cli("energy", a.path, "--json")[1])
    assert [e["method"] for e in energy["simulated_ground_truth"]] == ["shapley", "equal-time"]
    assert energy["residual_j"] == pytest.approx(0, abs=1e-9 * energy["measured_j"])
    (buckets, _) = json.loads(cli("buckets", a.path, b.path, "--json")[1])
    assert buckets["simulated"] is True
    assert buckets["buckets"][-1]["group"] == "all"
    differences = json.loads(cli("compare", a.path, b.path, "--json")[1])["differences"]
    assert {d["metric"] for d in differences} == {"energy_j", "ttft_ms", "tpot_ms", "e2el_ms"}


def test_the_tables_for_people(cli, run_of):
    a, b = run_of("a"), run_of("b", law="soft")
    code, out, err = cli("buckets", a.path)
    assert code == 0
    assert "SIMULATED  a" in out
    assert "J/request" in out
    assert "energy attributed and saved" in err
    assert cli("buckets", a.path)[2] == ""
    code, out, _ = cli("compare", a.path, b.path)
    assert code == 0
    assert "lower" in out
    assert "SIMULATED  A: a" in out


def test_everything_fits_a_terminal_of_80_columns_and_is_whole_without_one(cli, run_of, terminal, monkeypatch):
    monkeypatch.chdir(run_of("a").path.parent)  # else paths are wider than anything
    run_of("b", law="soft")
    for args in (
        ["energy", "a"], ["check", "a"], ["buckets", "a"], ["methods", "a"], ["latency", "a", "--by", "bucket"],
        ["latency", "a", "--by", "window", "--window", "10s"], ["compare", "a", "b"],
        ["query", "a", "SELECT * FROM requests LIMIT 1"],
    ):  # fmt: skip
        whole = cli(*args)[1]
        lines = terminal(lambda args=args: cli(*args))
        assert max(map(len, lines)) <= 80, args[0]
        assert set(" ".join(lines).split()) >= set(whole.split()), args[0]  # broken at words, and none is lost
    assert max(map(len, whole.splitlines())) > 200, "one row of all columns"


def test_whose_joules_they_are_is_said_wherever_there_are_joules(cli, run_of):
    a, b = run_of("a"), run_of("b", law="soft")
    for scope in ("gpu", "node"):
        for run in (a, b):
            assert f", scope {scope}" in cli("energy", run.path, "--scope", scope)[1].splitlines()[0]
        assert f"scope {scope}" in cli("buckets", a.path)[1]
        assert f" W (scope {scope})" in cli("latency", a.path)[1]
        assert cli("compare", a.path, b.path)[1].count(f"scope {scope}") == 2
        _, out, err = cli("query", a.path, "SELECT scope, measured_j FROM runs")
        assert scope in out
        assert ("every sampled GPU" in err) == (scope == "node")


def test_what_was_asked_for_by_another_method_is_not_written_over(cli, run_of):
    run = run_of("a")
    assert cli("energy", run.path, "--method", "equal-time")[0] == 0
    kept = (run.path / "energy" / "requests.parquet").read_bytes()
    code, _, err = cli("buckets", run.path)
    assert code == 0
    assert "energy/ is by method equal-time, and stays so" in err
    assert (run.path / "energy" / "requests.parquet").read_bytes() == kept


@pytest.mark.parametrize("name", ["summary.json", "requests.parquet"])
def test_a_saved_attribution_that_is_broken_or_old_is_made_anew(cli, run_of, name):
    run = run_of("a")
    cli("buckets", run.path)
    first = pl.read_parquet(run.path / "energy" / "requests.parquet")
    (run.path / "energy" / name).write_text("{")
    assert "energy attributed and saved" in cli("buckets", run.path)[2]
    assert_frame_equal(pl.read_parquet(run.path / "energy" / "requests.parquet"), first)
    os.utime(run.path / "power.parquet", (time.time() + 5, time.time() + 5))
    assert "energy attributed and saved" in cli("buckets", run.path)[2]


def test_where_energy_cannot_be_kept_others_go_on_and_energy_says_so(cli, run_of, tmp_path, monkeypatch):
    run = run_of()

    def full(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("analysis.energy.write_parquet", full)
    sql = "SELECT avg(energy_j) AS j FROM requests"
    for args in (["buckets", run.path], ["query", run.path, sql], ["report", run.path, "-o", tmp_path / "r.html"]):
        code, out, err = cli(*args)
        assert code == 0
        assert out
        assert "energy attributed, but not kept" in err
        assert "Read-only file system" in err
    code, out, err = cli("energy", run.path)
    assert code == 2
    assert err.startswith(f"error: {run.path / 'energy'}: cannot be written (Read-only file system)")
    assert not list((run.path / "energy").iterdir())


def test_text_columns_of_a_query_stand_at_the_left(cli, run_of):
    out = cli("query", run_of().path, "SELECT 1 AS a, 'x' AS a_long_heading, 2 AS another_heading")[1]
    head, row = out.splitlines()
    assert row.index("x") == head.index("a_long_heading")
    assert len(row.rstrip()) == len(head.rstrip())


def test_goodput_is_asked_for_as_of_vllm(cli, run_of):
    run = run_of()
    code, out, _ = cli("latency", run.path, "--goodput", "ttft:200", "tpot:50", "e2el:5000")
    assert code == 0
    assert "SIMULATED  run" in out
    assert "met ttft 200 ms, tpot 50 ms, e2el 5000 ms" in out
    arguments = (
        "--goodput",
        "ttft:200",
        "tpot:50",
        run.path,
        "--by",
        "window",
        "--metric-percentiles",
        "50,99.9",
        "--json",
    )
    (document,) = json.loads(cli("latency", *arguments)[1])
    assert document["slo"]["bounds_ms"] == {"ttft": [200.0] * 3, "tpot": [50.0] * 3}
    assert document["groups"][0]["ttft_ms_p99.9"] > 0
    assert "20-40 s" in cli("latency", run.path, "--by", "window", "--window", "20s")[1]


def test_slo_says_whose_tbt_it_is(cli, run_of):
    out = cli("buckets", run_of().path, "--slo-tbt", "75")[1]
    assert "a request's mean TBT within 75 ms" in out


def test_query_in_every_format(cli, run_of, tmp_path):
    run = run_of()
    sql = "SELECT bucket, avg(energy_j) AS j FROM requests GROUP BY bucket ORDER BY bucket"
    expected = query([run], sql)
    assert_frame_equal(pl.read_csv(cli("query", run.path, sql, "--format", "csv")[1].encode()), expected)
    assert_frame_equal(pl.DataFrame(json.loads(cli("query", run.path, sql, "--format", "json")[1])), expected)
    assert expected["bucket"][0] in cli("query", run.path, sql)[1]
    for kind, read in (("parquet", pl.read_parquet), ("csv", pl.read_csv), ("json", pl.read_json)):
        path = tmp_path / f"out.{kind}"
        assert cli("query", run.path, sql, "--format", kind, "-o", path)[0] == 0
        assert_frame_equal(read(path), expected)


def test_report_writes_a_page(cli, run_of, tmp_path):
    code, out, _ = cli("report", run_of().path, "-o", tmp_path / "r.html", "--title", "Mine & yours")
    assert code == 0
    assert "wrote" in out
    assert "<h1>Mine &amp; yours</h1>" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["energy", "nowhere"], "no such run directory"),
        (["energy", "RUN", "--method", "magic"], "method 'magic' is unknown"),
        (["energy", "NO_POWER"], "has no power samples"),
        (["buckets", "RUN", "--by", "colour"], "cannot group by 'colour'"),
        (["buckets", "RUN", "--slo-ttft", "x"], "three positive numbers"),
        (["buckets", "RUN", "--steady"], "no steady state"),
        (["latency", "RUN", "--goodput", "speed:3"], "'speed' is not one of ttft"),
        (["latency", "RUN", "--by", "window", "--window", "x"], "'x' is not a duration"),
        (["query", "RUN", "SELEC"], "only SELECT, WITH, SHOW"),
        (["query", "SELECT 1"], "at least one run directory"),
        (["query", "RUN", "SELECT 1 AS a", "--format", "xml"], "use one of table, csv, json, parquet"),
        (["query", "RUN", "SELECT 1 AS a", "--format", "parquet"], "needs a file"),
        (["query", "RUN", "SELECT run FROM runs", "--format", "csv", "-o", "no/where.csv"], "cannot be written"),
        (["compare", "RUN"], "1 runs do not say what to compare with what"),
        (["report", "RUN", "-o", "no/where.html"], "cannot be written"),
        (["energy", "RUN", "--nonsense"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cli, run_of, rewrite, args, words):
    run = run_of()
    broken = rewrite(run_of("broken"), power=None)
    code, _, err = cli(*[{"RUN": run.path, "NO_POWER": broken.path}.get(arg, arg) for arg in args])
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in err
    assert not (broken.path / "energy").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_and_every_option_a_text(name):
    commands = get_command(app).commands
    assert sorted(commands) == sorted(COMMANDS)
    assert f"analysis {name} " in commands[name].help.split("Examples:")[1]
    assert all(getattr(p, "help", None) for p in commands[name].params)
