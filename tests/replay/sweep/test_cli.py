"""`replay sweep` as typed: bad input is one line and leaves nothing behind; a dry run tells the truth."""

import json

import pytest

from replay.cli import main
from tracegen.schema import write_trace
from tracegen.synthesize import synthesize

MIX = ("--mix", "chat", "--virtual")


@pytest.fixture
def run_cli(monkeypatch, capsys, tmp_path):
    """Run `replay sweep ARGUMENTS` in this process: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["replay", "sweep", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ((), "give -o and the folder"),
        (("-o", "s"), "s: has no plan.toml to go on with; give a trace, --mix or --plan"),
        (MIX, "give -o and the folder"),
        (("none.parquet", "--virtual", "-o", "s"), "none.parquet: no such file"),
        (("t.parquet", *MIX, "-o", "s"), "give either a trace to replay or --mix"),
        ((*MIX, "--tp", "", "-o", "s"), "--tp '': has an empty place"),
        ((*MIX, "--tp", "1,,2", "-o", "s"), "--tp '1,,2': has an empty place"),
        ((*MIX, "--tp", "1", "-o", "s"), "no cell can run: llama-2-70b on dgx-h100 cannot run at tensor parallelism 1"),
        ((*MIX, "--tp", "8", "--replicas", "2", "-o", "s"), "takes 16 GPUs, and the node has 8"),
        ((*MIX, "--tp", "2", "--power-cap", "9", "-o", "s"), "--power-cap 9: a simulated"),
        ((*MIX, "--freq", "1980:800:200", "-o", "s"), "--freq 1980:800:200: begins above its end"),
        ((*MIX, "--freq", "9000", "-o", "s"), "--freq 9000: GPU 0 supports SM clocks from 210 to 1980 MHz"),
        ((*MIX, "--rate", "fast", "-o", "s"), "--rate fast: is not a number"),
        ((*MIX, "--until-ci", "5 percent", "-o", "s"), "--until-ci 5 percent: is no share"),
        ((*MIX, "--max-repeats", "2", "-o", "s"), "--max-repeats 2: must be at least 3"),
        ((*MIX, "--duration", "0s", "-o", "s"), "--duration '0s' is not a duration"),
        ((*MIX, "--model", "gpt-9", "-o", "s"), "--model gpt-9"),
        (("--mix", "tea", "--virtual", "--rate", "1", "-o", "s"), "tea"),
        ((*MIX, "--engine", "http://127.0.0.1:9", "-o", "s"), "only the simulated engine runs in virtual time"),
        (("--mix", "chat", "--engine", "http://127.0.0.1:9", "--tp", "1,2", "-o", "s"), "--tp 1,2 with a URL"),
        (
            ("--mix", "chat", "--engine", "http://127.0.0.1:9", "--batch-cap", "8", "-o", "s"),
            "--batch-cap 8 with a URL",
        ),
        (("--plan", "none.toml", "-o", "s"), "none.toml: cannot be read (No such file or directory)"),
        (("--plan", "p.toml", "--rate", "1", "-o", "s"), "--rate with --plan: the plan says what the cells are"),
        ((*MIX, "-o", "full"), "full: holds something else than a sweep; give another -o"),
        ((*MIX, "-o", "full/file"), "full/file: holds something else"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(run_cli, tmp_path, arguments, fragment):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, _, err = run_cli(*arguments, "--quiet")
    assert code == 2
    assert err.startswith("error: ")
    assert fragment in err
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_dry_run_shows_the_true_order_and_writes_nothing(run_cli, tmp_path):
    write_trace(synthesize("chat", 2.0, 10 * 10**9, 1)[0], tmp_path / "t.parquet", {"generator": "test"})
    asked = ("t.parquet", "--tp", "1,2", "--freq", "1200,1395", "--rate", "0.5,2", "--repeats", "2", "--idle", "1s")
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run_cli(*asked, "--virtual", "--dry-run", "--json")
    assert code == 0
    told = json.loads(out)
    assert sorted(tmp_path.rglob("*")) == before
    runs = [cell for cell in told["cells"] if cell["state"] == "planned"]
    assert (len(told["cells"]), len(runs)) == (16, 8)
    assert told["seconds"] == pytest.approx(sum(cell["seconds"] for cell in runs))
    assert told["energy"]["joules_per_request"] > 0
    assert "SIMULATED" in told["energy"]["why"]
    code, _, _ = run_cli(*asked, "--virtual", "-o", "s", "--quiet", "--jobs", "1")
    assert code == 0
    cells = json.loads((tmp_path / "s" / "sweep.json").read_text())["cells"]
    assert [cell["cell"] for cell in cells] == [cell["cell"] for cell in told["cells"]]
    code, _, err = run_cli("t.parquet", "--tp", "2", "--virtual", "-o", "s", "--quiet")
    assert code == 2
    assert "tp is 2, and was 1,2" in err
    code, out, _ = run_cli("-o", "s", "--quiet", "--json")
    assert json.loads(out)["cells"] == cells


def test_a_dry_run_in_wall_time_counts_traces_rest_and_starts(run_cli):
    asked = ("--mix", "chat", "--tp", "2,8", "--freq", "1200", "--repeats", "1", "--duration", "60s", "--idle", "5s")
    _, out, _ = run_cli(*asked, "--engine", "sim", "--dry-run", "--json")
    told = json.loads(out)
    assert [cell["seconds"] for cell in told["cells"]] == [71.0, 71.0]
    assert told["blocks"] == 2
    assert told["seconds"] > 142
    assert any("until idle power is back" in note for note in told["notes"])


def test_a_sweep_goes_on_by_itself_with_more_repeats(run_cli, tmp_path):
    asked = ("--mix", "chat", "--tp", "2", "--freq", "1200", "--rate", "1", "--duration", "10s", "--virtual")
    assert run_cli(*asked, "--repeats", "1", "--quiet", "-o", "s")[0] == 0
    code, out, err = run_cli("--repeats", "2", "--quiet", "--json", "-o", "s")
    assert code == 0, err
    assert [cell["repeat"] for cell in json.loads(out)["cells"]] == [0, 1]
    code, _, err = run_cli("--tp", "4", "--quiet", "-o", "s")
    assert (code, err.count("\n")) == (2, 1)
    assert "--tp with going on: the plan says what the cells are" in err
