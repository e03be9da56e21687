import json
import re
from pathlib import Path

import polars as pl
import pytest

from tracegen.schema import read_metadata, read_trace
from tracegen.transform import chain
from tracegen.twin import compare_traces


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fit_synth_compare_plot(run_cli, here):
    run_cli("synth", "--rate", "5", "--duration", "2m", "-o", "a.parquet")
    code, out, err = run_cli("fit", "a.parquet", "-o", "my.toml", "--seeds", "2")
    assert code == 0
    assert out.startswith("wrote my.toml: how 2 synthetic twins of the trace match it")
    assert "  arrivals: " in out
    assert "ks input" in out
    assert err.rstrip().endswith("next: tracegen synth --mix my.toml --arrivals production")

    assert run_cli("synth", "--mix", "my.toml", "--arrivals", "production", "-o", "b.parquet")[0] == 0
    code, out, err = run_cli("compare", "a.parquet", "b.parquet", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {**compare_traces("a.parquet", "b.parquet"), "beyond": []}
    code, out, _ = run_cli("compare", "a.parquet", "b.parquet", "--max-ks", "0.5")
    assert code == 0
    assert "Kolmogorov-Smirnov distance" in out
    code, out, _ = run_cli("compare", "a.parquet", "b.parquet", "--max-ks", "0")
    assert code == 1
    assert "beyond: KS of input_tokens" in out

    code, out, _ = run_cli("plot", "a.parquet", "b.parquet", "-o", "both.svg")
    assert (code, out) == (0, "wrote both.svg: a.parquet, b.parquet\n")
    assert "<svg" in (here / "both.svg").read_text()


def test_a_private_fit_of_too_little_is_refused(run_cli, here):
    run_cli("synth", "--rate", "1", "--duration", "2m", "-o", "a.parquet")
    code, out, err = run_cli("fit", "a.parquet", "--private")
    assert (code, out) == (2, "")
    assert "too few for a private fit" in err
    assert not (here / "a.toml").exists()


def test_a_fit_does_not_replace_a_file(run_cli, here):
    run_cli("synth", "-o", "a.parquet")
    (here / "a.toml").write_text("mine")
    code, _, err = run_cli("fit", "a.parquet")
    assert code == 2
    assert "a.toml: exists; choose another output, or --force" in err
    assert "ends in .toml" in run_cli("fit", "a.parquet", "-o", "a.json")[2]


def test_transforms_in_a_row(run_cli, here):
    run_cli("synth", "--rate", "5", "-o", "a.parquet")
    lines = {
        "warp a.parquet --time-scale 2 -o b.parquet": "wrote b.parquet",
        "clamp b.parquet --max-context 2000 --clip -o c.parquet": "clipped ",
        "clamp c.parquet --max-context 1500 --drop -o d.parquet": "dropped ",
        "sample d.parquet -n 500 -o e.parquet": "wrote e.parquet: 500 requests",
        "relabel e.parquet --label x -o f.parquet": "relabelled 500 requests",
        "repeat f.parquet --times 2 -o g.parquet": "wrote g.parquet",
        "merge a.parquet g.parquet -o h.parquet": "wrote h.parquet",
    }
    for line, said in lines.items():
        code, out, _ = run_cli(*line.split())
        assert code == 0
        assert said in out
    steps = [step["generator"].removeprefix("tracegen ") for step in chain(read_metadata("g.parquet"))]
    assert steps == ["synth", "warp", "clamp", "clamp", "sample", "relabel", "repeat"]
    frame = read_trace("h.parquet")
    assert set(frame["label"]) == {"chat", "x"}
    assert (
        frame.filter(pl.col("label") == "x").select((pl.col("input_tokens") + pl.col("output_tokens")).max()).item()
        <= 1500
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("warp a.parquet --time-scale 0", "time scale 0 is not a positive number"),
        ("clamp a.parquet --max-context 100", "Missing option '--drop'"),
        ("sample a.parquet -n 1000000", "cannot sample 1000000 of"),
        ("merge a.parquet", "a merge takes two traces or more"),
        ("merge a.parquet b.parquet -o a.parquet", "a.parquet: is the input itself"),
        ("repeat a.parquet --times 1", "1 times is no repetition"),
        ("relabel a.parquet --only q --label x", "no request has the label 'q'; the labels are chat"),
        ("compare a.parquet none.parquet", "none.parquet: no such file"),
        ("plot a.parquet -o p.gif", "p.gif: a picture ends in .png, .svg, .html"),
        ("fit none.parquet", "none.parquet: no such file"),
    ],
)
def test_bad_input_is_one_line(run_cli, here, line, says):
    run_cli("synth", "-o", "a.parquet")
    run_cli("synth", "-o", "b.parquet")
    code, out, err = run_cli(*line.split())
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_the_pages_python_runs_as_written(here, capsys):
    page = (Path(__file__).parents[2] / "docs" / "tracegen.md").read_text(encoding="utf-8")
    section = page.split("## Changing a trace", 1)[1].split("\n## ", 1)[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/tracegen.md", "exec"), {})
    said = capsys.readouterr().out
    assert "tracegen scale" in said
    assert "tracegen clamp" in said
    assert (here / "both.svg").exists()
