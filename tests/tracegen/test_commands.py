"""The lines that a trace's metadata give make that trace again, to the byte, whichever command made it."""

import json
import shlex
import sys
import types

import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tracegen.cli import app
from tracegen.commands import commands_of
from tracegen.durations import exact_duration, parse_duration_ns
from tracegen.importers.burstgpt import HEADER
from tracegen.schema import file_sha256, read_metadata, read_trace, write_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{s:02}.5000000,{100 + s},{10 + s}\n" for s in range(60)
)
MOONCAKE = {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
BAILIAN = {
    "chat_id": 1, "parent_chat_id": -1, "timestamp": 1.5, "input_length": 20, "output_length": 5, "type": "text",
    "turn": 1, "hash_ids": [7, 8],
}  # fmt: skip
USAGE = {"gen_ai.usage.input_tokens": "12", "gen_ai.usage.output_tokens": "8"}
SPAN = {
    "traceId": "5b", "spanId": "ee", "name": "chat", "startTimeUnixNano": "1000", "endTimeUnixNano": "2000",
    "attributes": [
        {"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}},
        *({"key": key, "value": {"intValue": value}} for key, value in USAGE.items()),
    ],
}  # fmt: skip
CHAT = {"conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}]}
FILES = {
    "azure.csv": AZURE,
    "burst.csv": f"{HEADER}\n5,ChatGPT,472,18,490,Conversation log\n9,GPT-4,41,27,68,API log\n",
    "kimi.jsonl": "".join(json.dumps(MOONCAKE | {"timestamp": 3000 * k}) + "\n" for k in range(5)),
    "qwen.jsonl": json.dumps(BAILIAN) + "\n",
    "spans.jsonl": json.dumps({"resourceSpans": [{"scopeSpans": [{"scope": {}, "spans": [SPAN]}]}]}) + "\n",
    "prompts.jsonl": json.dumps({"prompt": [1, 2, 3], "output_tokens": 4}) + "\n",
    "chats.json": json.dumps([CHAT, CHAT]),
    "-odd name.csv": AZURE,
    "curve.csv": "time,rate\n0,1\n30,3\n",
    "model/tokenizer.json": "{}",
    "pool/chunk-0-trace.csv": "".join(f"{600 * k},2.5,0.8,Gamma,1.5,0.26\n" for k in range(3)),
    "pool/chunk-0-dataset.json": json.dumps({"0": {"input_tokens": "{10: 1.0}", "output_tokens": "{100: 1.0}"}}),
}
FIRST = "synth --rate 2 --duration 60s --turns 3 --think 2500ms --system-prompts 3:200 --clients 4"
MAPPED = "arrival=TIMESTAMP,input=ContextTokens,output=GeneratedTokens"
# Of each command that writes a trace lines that end in OUT.parquet; all run in one folder, one after the other.
MADE = {
    "synth": [
        FIRST,
        "synth --mix chat:0.7,code:0.3 --rate 1..5 --duration 90s --profile chat-day@14h --shard 1/2 --seed 3",
        "synth --arrivals log-ou:sigma=0.5 --duration 90s --turns 2 --max-context 9000 --block-tokens 32",
        "synth --mix chat --arrivals production --duration 5m --seed 2",
        "synth --mix code --rate curve.csv --duration 1.5m",
    ],
    "import auto": ["import auto azure.csv"],
    "import azure": ["import azure azure.csv --skip-bad --sort --limit 9 --label=-x", "import azure './-odd name.csv'"],
    "import burstgpt": ["import burstgpt burst.csv --limit 1"],
    "import mooncake": ["import mooncake kimi.jsonl --dequantize --seed 5"],
    "import bailian": ["import bailian qwen.jsonl --label 'a b'"],
    "import table": [f"import table azure.csv --map {MAPPED} --time-unit iso --limit 50"],
    "import servegen": ["import servegen pool", "import servegen pool --start 100ms --duration 61.5s --rate 3"],
    "import sharegpt": ["import sharegpt chats.json --rate 2.5 --tokenizer model --seed 9"],
    "import vllm-bench": ["import vllm-bench prompts.jsonl --rate 0.1"],
    "import otel": ["import otel spans.jsonl"],
    "scale": [f"{FIRST} -o a.parquet; scale a.parquet --rate 9.25 --seed 4", "scale a.parquet --rate 0.5"],
    "warp": ["warp a.parquet --time-scale 0.3"],
    "slice": ["slice a.parquet --duration 20s", "slice a.parquet --start 1500ms --duration 0.5m"],
    "clamp": ["clamp a.parquet --max-context 2000 --drop", "clamp a.parquet --max-context 900 --clip"],
    "sample": ["sample a.parquet -n 50 --seed 2"],
    "relabel": ["relabel a.parquet --label x", "relabel a.parquet --only chat --label 'y z'"],
    "repeat": ["repeat a.parquet --times 3 --seed 8"],
    "merge": [
        "warp a.parquet --time-scale 2 -o other/a.parquet; merge a.parquet other/a.parquet a.parquet",
        # As long as the way back gets: a name that comes twice, and the output's own among the inputs.
        "sample a.parquet -n 9 -o OUT.parquet; merge OUT.parquet a.parquet -o c.parquet; scale c.parquet --rate 5",
    ],
}  # fmt: skip
WRITE_OTHERS = {"fit", "plot", "export", "fetch"}


class Words:
    """A tokenizer at the package's boundary: words are tokens."""

    @staticmethod
    def from_file(path):  # noqa: ARG004 - the package's own signature
        return Words()

    @staticmethod
    def encode_batch_fast(texts, *, add_special_tokens):  # noqa: ARG004
        return [text.split() for text in texts]


def begin(folder, monkeypatch):
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)


def do(line):
    done = CliRunner().invoke(app, shlex.split(line, comments=True))
    assert done.exit_code == 0, (line, done.output, done.exception)


def every_command(group=None, words=()):
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, (*words, name))
        elif any(option.name == "output" for option in command.params):
            yield " ".join((*words, name))


def test_every_command_that_writes_a_trace_is_tried_here():
    assert set(every_command()) == MADE.keys() | WRITE_OTHERS


def test_what_any_command_made_is_made_again_to_the_byte(tmp_path, monkeypatch):
    module = types.ModuleType("tokenizers")
    module.Tokenizer = Words
    monkeypatch.setitem(sys.modules, "tokenizers", module)
    then, now = tmp_path / "then", tmp_path / "now"
    begin(then, monkeypatch)
    begin(now, monkeypatch)
    for lines in (lines for made in MADE.values() for lines in made):
        monkeypatch.chdir(then)
        *before, last = lines.split(";")
        for line in before:
            do(line.replace("OUT", "out"))
        do(f"{last} -o out.parquet --force")
        again = commands_of(read_metadata("out.parquet"), "out.parquet")
        wanted = (then / "out.parquet").read_bytes()
        monkeypatch.chdir(now)
        for path in now.rglob("*.parquet"):
            path.unlink()
        assert again, lines
        for line in again:
            assert line.startswith("tracegen ")
            do(line.removeprefix("tracegen "))
        assert (now / "out.parquet").read_bytes() == wanted, (lines, again)


def test_the_line_has_all_that_was_recorded_in_the_helps_order(tmp_path, monkeypatch):
    begin(tmp_path, monkeypatch)
    do(f"{FIRST} -o a.parquet")
    (line,) = commands_of(read_metadata("a.parquet"), "b.parquet")
    assert line == (
        "tracegen synth --mix chat --rate 2.0 --duration 60s --arrivals poisson --clients 4 --turns 3.0 "
        "--think 2500ms --system-prompts 3:200 --seed 1 -o b.parquet"
    )


def test_a_file_that_is_gone_or_another_is_named_behind_its_line(tmp_path, monkeypatch):
    begin(tmp_path, monkeypatch)
    do("import azure azure.csv -o far/a.parquet")
    do("synth --mix code --rate curve.csv --duration 1m -o curve.parquet")
    azure, curve = (read_metadata(name) for name in ("far/a.parquet", "curve.parquet"))
    short = file_sha256("azure.csv")[:12]
    assert commands_of(azure, "far/a.parquet")[0].startswith("tracegen import azure azure.csv --label")
    assert "#" not in commands_of(azure, "a.parquet")[0] + commands_of(curve, "b.parquet")[0]
    (tmp_path / "azure.csv").rename(tmp_path / "far" / "azure.csv")
    (found,) = commands_of(azure, "far/a.parquet")
    assert found.startswith("tracegen import azure far/azure.csv ")
    assert "#" not in found
    (gone,) = commands_of(azure, "a.parquet")
    assert gone.endswith(f" -o a.parquet  # azure.csv is not here (sha256 {short}...)")
    (tmp_path / "azure.csv").write_text("something else")
    (tmp_path / "curve.csv").write_text("something else")
    assert commands_of(azure, "a.parquet")[0].endswith(f"  # azure.csv is another file now (sha256 {short}...)")
    assert "  # curve.csv is another file now (sha256 " in commands_of(curve, "b.parquet")[0]
    url = {"file": "https://a.org/azure.csv", "sha256": None}
    (line,) = commands_of({**azure, "source": url}, "a.parquet")
    assert line.startswith("tracegen import azure https://a.org/azure.csv ")
    assert line.endswith("  # https://a.org/azure.csv had sha256 not known")


def test_a_mix_that_was_fitted_is_fitted_again_where_it_is_gone(tmp_path, monkeypatch):
    begin(tmp_path, monkeypatch)
    do("import azure azure.csv -o a.parquet")
    do("fit a.parquet -o my.toml --seeds 2 --seed 3")
    do("synth --mix my.toml:3,chat:1 --rate 2 --duration 1m -o t.parquet")
    before = {name: (tmp_path / name).read_bytes() for name in ("my.toml", "t.parquet")}
    assert len(commands_of(read_metadata("t.parquet"), "t.parquet")) == 1
    again = commands_of(read_metadata("t.parquet"), "again.parquet")
    (tmp_path / "my.toml").unlink()
    (tmp_path / "t.parquet").rename(tmp_path / "u.parquet")
    fit, synth = commands_of(read_metadata("u.parquet"), "t.parquet")
    assert fit == "tracegen fit a.parquet --seeds 2 --seed 3 -o my.toml"
    assert again == [synth.replace("t.parquet", "again.parquet")]
    for line in (fit, synth):
        do(line.removeprefix("tracegen "))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_trace_that_somebody_made_is_an_origin(tmp_path, monkeypatch):
    begin(tmp_path, monkeypatch)
    do("import azure azure.csv -o a.parquet")
    write_trace(read_trace("a.parquet"), "mine.parquet", {"generator": "mine"})
    do("warp mine.parquet --time-scale 2 -o w.parquet")
    assert commands_of(read_metadata("w.parquet"), "x.parquet") == [
        "tracegen warp mine.parquet --time-scale 2.0 -o x.parquet"
    ]
    for metadata in ({}, {"generator": "mine"}, {"generator": "tracegen"}, {"generator": "tracegen warp"}):
        assert commands_of(metadata, "trace.parquet") == []


@given(st.integers(1, 10**15))
def test_durations_are_written_to_the_nanosecond(ns):
    assert parse_duration_ns(exact_duration(ns)) == ns
