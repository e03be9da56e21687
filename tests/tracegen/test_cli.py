import json
import lzma
import subprocess
import sys

import polars as pl
import pytest
import typer

from tracegen.arrivals.models import MODELS
from tracegen.cli import app
from tracegen.describe import describe
from tracegen.durations import NS_PER_S
from tracegen.importers.azure import HEADER
from tracegen.rates import PROFILES
from tracegen.schema import read_metadata, read_trace, write_trace
from tracegen.sessions import Structure
from tracegen.synthesize import synthesize
from tracegen.transform import scale_trace, slice_trace


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_in(where):
    return sorted(path.name for path in where.iterdir())


def commands(group, path=()):
    """Every command below `group` with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_the_commands_are_these():
    assert {" ".join(path) for path in COMMANDS} == {
        "synth",
        "import auto",
        "import azure",
        "import bailian",
        "import burstgpt",
        "import mooncake",
        "import otel",
        "import servegen",
        "import sharegpt",
        "import table",
        "import vllm-bench",
        "export",
        "datasets",
        "fetch",
        "scale",
        "warp",
        "slice",
        "clamp",
        "sample",
        "merge",
        "relabel",
        "repeat",
        "fit",
        "compare",
        "plot",
        "describe",
        "validate",
        "mixes",
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_help_and_an_example(run_cli, path):
    code, out, err = run_cli(*path, "--help")
    assert (code, err) == (0, "")
    assert f"  Examples:\n    tracegen {' '.join(path)}" in out
    for parameter in COMMANDS[path].params:
        assert parameter.help, parameter.name


def test_synth_alone_says_what_it_wrote_and_what_comes_next(run_cli, here):
    code, out, err = run_cli("synth", "--mix", "chat")
    assert code == 0
    frame, metadata = synthesize("chat", 0.5, 300 * NS_PER_S, 1)
    assert out.startswith(f"wrote trace.parquet: {frame.height} requests over ")
    assert err == "next: replay run trace.parquet --tp 2 --freq 1200\n"
    assert read_trace("trace.parquet").equals(frame)
    assert read_metadata("trace.parquet") == {"schema_version": "1.0", **metadata}
    assert names_in(here) == ["trace.parquet"]


def test_synth_takes_all_its_options(run_cli):
    line = (
        "synth --mix chat:0.7,code:0.3 --rate 1..5 --duration 2m --arrivals log-ou:sigma=0.5 --profile chat-day@14h "
        "--clients 5 --turns 3 --think 5s --max-context 9000 --system-prompts 2:300 --block-tokens 32 --shard 1/2"
    )
    code, out, _ = run_cli(*line.split(), "--seed", "3")
    assert code == 0
    structure = Structure(
        clients=5, turns=3, think_s=5, max_context=9000, system_prompts=2, system_tokens=300, block_tokens=32
    )
    frame, metadata = synthesize(
        "chat:0.7,code:0.3", "1..5", 120 * NS_PER_S, 3,
        arrivals="log-ou:sigma=0.5", profile="chat-day@14h", structure=structure, shard=(1, 2),
    )  # fmt: skip
    assert read_trace("trace.parquet").equals(frame)
    assert read_metadata("trace.parquet") == {"schema_version": "1.0", **metadata}
    assert f"  {metadata['prefix_hit_rate']:.1%} of input tokens are in a cache without limit" in out


def test_the_help_names_every_arrival_model_and_parameter(run_cli):
    page = "".join(run_cli("synth", "--help")[1].split())  # a name may be broken at its hyphen
    for kind, defaults in MODELS.items():
        assert kind in page
        assert all(name in page for name in defaults)
    assert all(name in page for name in PROFILES)


def test_synth_twice_is_friendly_and_the_same(run_cli, here):
    run_cli("synth")
    first = (here / "trace.parquet").read_bytes()
    assert run_cli("synth")[0] == 0
    assert (here / "trace.parquet").read_bytes() == first
    assert run_cli("synth", "--seed", "2")[0] == 0
    assert (here / "trace.parquet").read_bytes() != first


def test_a_foreign_file_is_overwritten_by_force_only(run_cli, here):
    (here / "notes.txt").write_text("mine")
    code, out, err = run_cli("synth", "-o", "notes.txt")
    assert (code, out) == (2, "")
    assert err == "error: notes.txt: exists and is no trace made here; choose another output, or --force\n"
    assert (here / "notes.txt").read_text() == "mine"
    assert run_cli("synth", "-o", "notes.txt", "--force")[0] == 0
    assert read_trace("notes.txt").height > 0


def test_import_says_what_it_dropped(run_cli, here):
    rows = [HEADER, "2023-11-16 18:00:00.5,10,20", "2023-11-16 18:00:01,0,20", "2023-11-16 18:00:02,10,1", "x"]
    (here / "conv.csv.xz").write_bytes(lzma.compress("\r\n".join(rows).encode()))
    code, out, err = run_cli("import", "azure", "conv.csv.xz", "--skip-bad")
    assert code == 0
    assert "wrote conv.parquet: 2 requests over 1.5s" in out
    assert "read 4 rows, dropped 2" in out
    assert "dropped 1: ContextTokens is zero" in out
    assert "dropped 1: has too few columns" in out
    assert read_trace("conv.parquet")["arrival_ns"].to_list() == [0, 1_500_000_000]

    code, out, err = run_cli("import", "azure", "conv.csv.xz", "-o", "other.parquet")
    assert (code, out) == (2, "")
    assert err.startswith("error: conv.csv.xz: line 3: ContextTokens is zero")
    assert err.count("\n") == 1
    assert names_in(here) == ["conv.csv.xz", "conv.parquet"]


def test_import_auto_says_which_format_it_is(run_cli, here):
    (here / "b.csv").write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT-4,1,2,3,x\n"
    )
    code, out, err = run_cli("import", "auto", "b.csv")
    assert code == 0
    assert out.startswith("b.csv: BurstGPT, version 1 and version 3 with sessions (CSV)\nwrote b.parquet: 1 request ")
    assert out.endswith("  read 1 row, dropped 0\n")
    assert err == "next: replay run b.parquet --tp 2 --freq 1200\n"
    assert read_metadata("b.parquet")["generator"] == "tracegen import burstgpt"


def test_scale_says_which_way(run_cli):
    run_cli("synth", "--rate", "5")
    code, out, _ = run_cli("scale", "trace.parquet", "--rate", "2", "--seed", "4")
    assert code == 0
    assert "wrote trace-2rps.parquet" in out
    assert "thinning: " in out
    assert read_trace("trace-2rps.parquet").equals(scale_trace("trace.parquet", 2.0, 4)[0])
    assert "superposing: " in run_cli("scale", "trace.parquet", "--rate", "12.5", "-o", "busy.parquet")[1]
    assert read_metadata("busy.parquet")["parameters"]["method"] == "superposing"


def test_scale_does_not_replace_its_input(run_cli, here):
    run_cli("synth", "--rate", "5")
    before = (here / "trace.parquet").read_bytes()
    code, out, err = run_cli("scale", "trace.parquet", "--rate", "2", "-o", "trace.parquet")
    assert (code, out) == (2, "")
    assert "is the input itself" in err
    assert (here / "trace.parquet").read_bytes() == before


def test_slice(run_cli):
    run_cli("synth", "--rate", "5")
    code, out, _ = run_cli("slice", "trace.parquet", "--start", "1m", "--duration", "90s")
    assert code == 0
    assert "wrote trace-1m-90s.parquet" in out
    expected = slice_trace("trace.parquet", 60 * NS_PER_S, 90 * NS_PER_S)[0]
    assert read_trace("trace-1m-90s.parquet").equals(expected)
    assert run_cli("slice", "trace.parquet", "--duration", "1m")[0] == 0


def test_describe_json_is_the_librarys_document(run_cli):
    run_cli("synth")
    code, out, err = run_cli("describe", "trace.parquet", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == describe(read_trace("trace.parquet"), read_metadata("trace.parquet"))
    code, out, err = run_cli("describe", "trace.parquet")
    assert (code, err) == (0, "")
    assert "input tokens" in out


def test_validate(run_cli):
    run_cli("synth")
    code, out, err = run_cli("validate", "trace.parquet")
    assert (code, err) == (0, "")
    assert out.startswith("trace.parquet: a valid trace, 144 requests, ")
    assert out.count("\n") == 1


def test_mixes(run_cli):
    code, out, err = run_cli("mixes")
    assert (code, err) == (0, "")
    assert "AzureLLMInferenceTrace_conv.csv" in out
    listed = json.loads(run_cli("mixes", "--json")[1])
    assert [mix["name"] for mix in listed][:3] == ["chat", "code", "longchat"]
    assert listed[0]["arrivals"]["model"] == "log-ou"
    assert listed[0]["source"]["licence"] == "CC-BY-4.0"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["synth", "--mix", "nope"], "there is no mix 'nope'; the mixes are chat, code"),
        (["synth", "--rate", "0"], "rate 0 is not a positive number"),
        (["synth", "--rate", "x"], "'x' is not a rate"),
        (["synth", "--arrivals", "gamma:cv=x"], "arrival model 'gamma': cv is 'x'"),
        (["synth", "--profile", "x"], "there is no profile 'x'"),
        (["synth", "--shard", "2"], "'2' is not a shard: use I/N"),
        (["synth", "--system-prompts", "5"], "'5' is not a number of system prompts and their tokens"),
        (["synth", "--turns", "0"], "turns is 0.0, not a mean"),
        (["synth", "--think", "x"], "'x' is not a duration"),
        (["synth", "--duration", "5min"], "'5min' is not a duration"),
        (["synth", "--duration", "1ms"], "no request arrived in 1ms"),
        (["synth", "--seed", "-1"], "seed -1 is negative"),
        (["synth", "-o", "old.csv/t.parquet"], "cannot be written"),
        (["import", "azure", "none.csv"], "none.csv: no such file"),
        (["import", "azure", "old.csv"], "old.csv: line 1: the header is 'a,b'"),
        (["import", "auto", "old.csv"], "old.csv: is of no known format; the formats are azure, "),
        (["import", "auto", "http://example.org/a.csv"], "http://example.org: is not an https URL"),
        (["import", "table", "old.csv"], "Missing option '--map'"),
        (["import", "table", "old.csv", "--map", "arrival=a"], "input=COLUMN is missing"),
        (["import", "burstgpt", "old.csv", "--limit", "0"], "--limit 0: is less than one row"),
        (["import"], "Missing command"),
        (["scale", "none.parquet", "--rate", "1"], "none.parquet: no such file"),
        (["scale", "old.csv", "--rate", "1"], "old.csv: not a readable Parquet file"),
        (["scale", "old.csv"], "Missing option '--rate'"),
        (["slice", "old.csv", "--duration", "0"], "'0' is not a duration"),
        (["describe", "old.csv"], "old.csv: not a readable Parquet file"),
        (["validate", "old.csv"], "old.csv: not a readable Parquet file"),
        (["validate", "zero.parquet"], "zero.parquet: row 1, column 'input_tokens': 0 is zero"),
        (["validate", "early.parquet"], "early.parquet: row 2, column 'arrival_ns': 3 is earlier than the row before"),
        (["validate", "narrow.parquet"], "narrow.parquet: column 'output_tokens' is missing"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(run_cli, here, make_frame, arguments, says):
    (here / "old.csv").write_text("a,b\n1,2\n")
    make_frame().with_columns(input_tokens=pl.Series([1, 0, 1])).write_parquet("zero.parquet")
    make_frame().with_columns(arrival_ns=pl.Series([0, 4, 3])).write_parquet("early.parquet")
    make_frame().drop("output_tokens").write_parquet("narrow.parquet")
    before = names_in(here)
    code, out, err = run_cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
    assert names_in(here) == before


def test_as_a_process(here):
    done = subprocess.run(
        [sys.executable, "-m", "tracegen.cli", "validate", "none.parquet"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: none.parquet: no such file")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error(here, make_frame):
    write_trace(make_frame(), "t.parquet", {})
    script = f"{sys.executable} -m tracegen.cli describe t.parquet --json | head -n 1"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")
