"""The command: every option explained, every wrong input one line on stderr, exit code 2, and nothing left behind."""

import json
import socket
from dataclasses import fields

import polars as pl
import pytest
import typer

from replay.cli import _parse_metadata, app, main
from replay.gpu.cli import parse_gpus
from replay.plan import RunOptions
from replay.rundir import Run
from tracegen.errors import ReplayError


def commands(command, path=()):
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


ALL = list(commands(typer.main.get_command(app)))


@pytest.mark.parametrize(("path", "command"), ALL, ids=[" ".join(path) or "replay" for path, _ in ALL])
def test_every_command_and_option_has_help(path, command):
    assert command.help
    if not getattr(command, "commands", None):
        assert "Examples:" in command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{path} {parameter.name}"


def test_the_library_takes_what_the_command_takes():
    """Each option has its field in RunOptions, but for those that say how to print."""
    (run,) = [command for path, command in ALL if path == ("run",)]
    renamed = {
        "freq": "freq_mhz", "duration": "duration_ns", "ramp": "ramp_ns", "warmup": "warmup_ns",
        "ignore_eos": "exact",
        "max_rate": "max_rate_rps", "idle": "idle_ns", "vllm_arg": "vllm_args", "power_cap": "power_cap_w",
        "ready_check_timeout_sec": "ready_timeout_s", "request_timeout_sec": "request_timeout_s",
    }  # fmt: skip
    printing = {"quiet", "prometheus_port", "as_json", "help"}
    names = {renamed.get(parameter.name, parameter.name) for parameter in run.params} - printing
    from_environment = {"api_key"}
    assert names == {field.name for field in fields(RunOptions)} - from_environment


@pytest.fixture
def trace(make_trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_trace(tmp_path / "trace.parquet", [(0, 10, 2), (100, 20_000, 2)])


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Run `replay ARGUMENTS` in this process: its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["replay", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


SIM = ("--engine", "sim")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("none.parquet", *SIM), "none.parquet: no such file"),
        (("bad/text.parquet", *SIM), "text.parquet: not a readable Parquet file"),
        (("bad/missing.parquet", *SIM), "missing.parquet: column 'output_tokens' is missing"),
        (("bad/decreasing.parquet", *SIM), "decreasing.parquet: row 1, column 'arrival_ns': 5 is earlier"),
        (("bad/zero.parquet", *SIM), "zero.parquet: row 1, column 'input_tokens': 0 is zero"),
        (("trace.parquet", *SIM), "1 of 2 requests are longer than the model's 16384 tokens (request_id 101"),
        (("trace.parquet", "--engine", "tgi"), "--engine tgi: use auto, sim, vllm, or a server's URL"),
        (("trace.parquet", "--engine", "http://127.0.0.1:9"), "http://127.0.0.1:9 cannot be reached"),
        (("trace.parquet", "--engine", "http://"), "--engine http://: names no host"),
        (("trace.parquet", "--engine", "http://127.0.0.1:9", "--freq", "1200"), "--freq with a URL needs --gpus"),
        (("trace.parquet", *SIM, "--tp", "0"), "--tp 0: must be above 0"),
        (("trace.parquet", *SIM, "--tp", "two"), "Invalid value for '--tp'"),
        (("trace.parquet", *SIM, "--tp", "1"), "cannot run at tensor parallelism 1; use one of 2, 4, 8"),
        (("trace.parquet", *SIM, "--tp", "16"), "cannot run at tensor parallelism 16; use one of 2, 4, 8"),
        (("trace.parquet", *SIM, "--gpus", "0,0"), "--gpus 0,0: names a GPU twice"),
        (("trace.parquet", *SIM, "--gpus", "0,x"), "--gpus 0,x: give GPU indices, for example 0,1 or 0-3"),
        (("trace.parquet", *SIM, "--gpus", "7,8"), "GPU 8 does not exist: this host has 8"),
        (("trace.parquet", *SIM, "--gpus", "0-3", "--tp", "2"), "--tp 2 needs 2 GPUs, but --gpus names 4"),
        (("trace.parquet", *SIM, "--freq", "5000"), "--freq 5000: GPU 0 supports SM clocks from 210 to 1980 MHz"),
        (("trace.parquet", *SIM, "--freq", "0"), "--freq 0: GPU 0 supports SM clocks from 210 to 1980 MHz"),
        (("trace.parquet", *SIM, "--port", "TAKEN"), "Address already in use"),
        (("trace.parquet", *SIM, "--port", "99999"), "--port 99999"),
        (("trace.parquet", *SIM, "--duration", "soon"), "'soon' is not a duration"),
        (("trace.parquet", *SIM, "--duration", "0s"), "--duration '0s' is not a duration"),
        (("trace.parquet", *SIM, "--idle", "-1s"), "--idle '-1s' is not a duration"),
        (("trace.parquet", *SIM, "--warmup", "1m"), "--warmup 1m: the last request is due after 100ms"),
        (("trace.parquet", *SIM, "--num-prompts", "0"), "Invalid value for '--num-prompts'"),
        (("trace.parquet", *SIM, "--max-rate", "0"), "--max-rate 0: must be above 0"),
        (("trace.parquet", *SIM, "--max-rate", "nan"), "--max-rate nan: must be above 0"),
        (("trace.parquet", *SIM, "--request-timeout-sec", "0"), "--request-timeout-sec 0: must be above 0"),
        (("trace.parquet", *SIM, "--overlong", "cut"), "--overlong cut: use one of refuse, drop, clip"),
        (("trace.parquet", *SIM, "--metadata", "note"), "--metadata note: give key=value"),
        (("trace.parquet", *SIM, "--hardware", "abacus"), "--hardware abacus: use dgx-a100, dgx-h100, dgx-h200, or"),
        (("trace.parquet", *SIM, "--hardware", "my.toml"), "--hardware my.toml: cannot be read (No such file"),
        (("trace.parquet", *SIM, "--model", "gpt"), "--model gpt: the simulated engine knows llama-2-13b, "),
        (("trace.parquet", *SIM, "--seed", "-1"), "--seed -1: must not be negative"),
        (("trace.parquet", *SIM, "-o", "trace.parquet"), "trace.parquet: exists already; a run is never overwritten"),
        (("trace.parquet", *SIM, "-o", "trace.parquet/run"), "trace.parquet/run: cannot be made (Not a directory)"),
        (("trace.parquet", *SIM, "--frequency", "1200"), "--frequency"),
        ((), "give either a trace to replay or --resume"),
        (("trace.parquet", "--resume", "runs/first"), "give either a trace to replay or --resume"),
        (("--resume", "runs/none"), "runs/none: no such run directory"),
        (("--resume", "runs/none", "--tp", "2"), "--tp with --resume: a run goes on as it was begun"),
        (("--resume", "runs/none", "-o", "other"), "-o other with --resume: a run goes on in its own directory"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(run_cli, trace, tmp_path, arguments, fragment):
    rows = {"request_id": [1, 2], "arrival_ns": [10, 20], "input_tokens": [1, 1], "output_tokens": [1, 1]}
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "text.parquet").write_text("request_id,arrival_ns")
    pl.DataFrame(rows).drop("output_tokens").write_parquet(bad / "missing.parquet")
    pl.DataFrame(rows | {"arrival_ns": [10, 5]}).write_parquet(bad / "decreasing.parquet")
    pl.DataFrame(rows | {"input_tokens": [1, 0]}).write_parquet(bad / "zero.parquet")
    before = sorted(tmp_path.rglob("*"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, out, err = run_cli("run", *(port if word == "TAKEN" else word for word in arguments))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (2, "", 1), err
    assert fragment in errors[0]
    assert err.splitlines()[-1] == errors[0]
    assert "Traceback" not in err
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert left in ([], [tmp_path / "runs"]), "no run directory is left"


def test_a_run_prints_its_summary_and_where_it_went(run_cli, make_trace, plain_server, tmp_path):
    trace = make_trace(tmp_path / "trace.parquet", [(0, 10, 2), (20, 10, 2)])
    code, out, err = run_cli("run", trace, "--engine", plain_server, "-o", tmp_path / "run", "--metadata", "a=b=c")
    assert code == 0
    assert out.startswith("complete: 2 of 2 requests ok in ")
    assert out.rstrip().endswith(f"wrote {tmp_path / 'run'}; next: analysis buckets {tmp_path / 'run'}")
    assert err.startswith(f"engine: url (attached to {plain_server})\n")
    assert Run.open(tmp_path / "run").manifest["metadata"] == {"a": "b=c"}


def test_json_is_one_document_on_stdout(run_cli, make_trace, sim_server, tmp_path):
    trace = make_trace(tmp_path / "trace.parquet", [(0, 10, 2)])
    code, out, err = run_cli("run", trace, "--engine", sim_server, "-o", tmp_path / "run", "--json", "--quiet")
    summary = json.loads(out)
    assert (code, err) == (0, "")
    assert (summary["run"], summary["state"], summary["requests_ok"]) == (str(tmp_path / "run"), "complete", 1)


def test_everything_fits_a_terminal_of_80_columns(run_cli, sim_run, terminal, monkeypatch):
    monkeypatch.chdir(sim_run.parent)  # else paths are wider than anything
    for arguments in (["show", sim_run.name], ["check", sim_run.name], ["sim", "profiles"]):
        whole = run_cli(*arguments)[1].partition("repeated by")[0]  # what is to be copied stays on one line
        shown = terminal(lambda arguments=arguments: run_cli(*arguments))
        lines = shown[: shown.index("repeated by")] if "repeated by" in shown else shown
        assert max(map(len, lines)) <= 80, arguments
        assert set(" ".join(lines).split()) >= set(whole.split()), arguments


def test_gpus_and_metadata_are_parsed():
    assert parse_gpus("0,2-4,7") == (0, 2, 3, 4, 7)
    assert parse_gpus(None) is None
    assert _parse_metadata(["a=1", "b="]) == {"a": "1", "b": ""}
    for wrong in ("", "1,", "-1", "a-b"):
        with pytest.raises(ReplayError):
            parse_gpus(wrong)
    with pytest.raises(ReplayError):
        _parse_metadata(["=x"])
