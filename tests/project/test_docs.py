"""The documents tell the truth: their examples run, their tables and commands are the code's."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import polars as pl
import pytest

from replay import tables
from tracegen.schema import TRACE, TRACE_OPTIONAL

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
COMMANDS = ("tracegen", "replay", "analysis")
TABLES = {
    "trace": {**TRACE, **TRACE_OPTIONAL},
    "requests": {**tables.REQUESTS, **tables.REQUESTS_OPTIONAL},
    "steps": tables.STEPS,
    "segments": tables.SEGMENTS,
    "arrivals": tables.ARRIVALS,
    "power": tables.POWER,
    "cpu_energy": tables.CPU_ENERGY,
    "server_metrics": tables.SERVER_METRICS,
    "truth": tables.TRUTH,
}


def blocks(page: Path, languages: tuple[str, ...]) -> list[tuple[str, str]]:
    """(language, text) of each fenced block of one of `languages`."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found if language in languages]


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_the_tutorial_runs_as_written(tmp_path):
    for language, text in blocks(DOCS / "tutorial.md", ("sh", "python")):
        command = ["sh", "-euc", text] if language == "sh" else [sys.executable, "-W", "error", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip(), text
    assert (tmp_path / "report.html").stat().st_size > 10_000
    energy = pl.read_parquet(tmp_path / "slow" / "energy" / "requests.parquet")
    requests = pl.read_parquet(tmp_path / "slow" / "requests.parquet")
    assert energy.join(requests, on="request_id", how="inner").height == requests.height > 0


def test_the_workload_page_runs_as_written(tmp_path):
    page = DOCS / "workload.md"
    for _, text in blocks(page, ("sh",)):
        done = subprocess.run(
            ["sh", "-euc", text], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    for picture in re.findall(r"\(images/(.*?)\)", page.read_text(encoding="utf-8")):
        assert (tmp_path / picture).read_text(encoding="utf-8").startswith("<svg")
    assert tomllib.loads((tmp_path / "to-share.toml").read_text(encoding="utf-8"))["privacy"]["epsilon"] == 1
    assert not (tmp_path / "damaged.parquet").exists()


def test_the_page_on_sweeps_runs_as_written(tmp_path):
    for _, text in blocks(DOCS / "sweep.md", ("sh",)):
        done = subprocess.run(
            ["sh", "-euc", text], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        assert "SIMULATED" in done.stdout, text
    for sweep, cells in (("sweep", 24), ("planned", 14)):
        document = json.loads((tmp_path / sweep / "sweep.json").read_text())
        assert [cell["state"] for cell in document["cells"]] == ["complete"] * cells


def test_the_queries_run_as_written(virtual_run, tmp_path, monkeypatch, capfd):
    import duckdb

    trace = synthesize_for_queries()
    for name, clock_mhz in (("fast", 1830), ("slow", 1200)):
        virtual_run(tmp_path / "runs" / name, trace, freq_mhz=clock_mhz)
    monkeypatch.chdir(tmp_path)
    for language, text in blocks(DOCS / "queries.md", ("sh", "python", "sql")):
        if language == "sh":
            subprocess.run(["sh", "-euc", text], env=environment(), check=True)
        elif language == "python":
            exec(compile(text, "queries.md", "exec"), {})
        else:
            sys.stdout.write(str(duckdb.sql(text)))
        said = capfd.readouterr().out
        assert said.strip(), text
        assert "0 rows" not in said, text  # as DuckDB and
        assert "shape: (0," not in said, text  # Polars say it
    assert pl.read_csv("energy.csv").height == 40


def synthesize_for_queries() -> pl.DataFrame:
    """Forty requests, two a second, of one label."""
    rows = pl.int_range(40, eager=True)
    return pl.DataFrame(
        {
            "request_id": rows,
            "arrival_ns": rows * 500_000_000,
            "input_tokens": 50 + rows * 37,
            "output_tokens": 20 + rows * 5,
            "label": ["chat"] * 40,
        }
    )


def test_the_readme_names_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        target
        for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
        for _, text in blocks(page, ("sh",))
        for target in re.findall(r"^make (\w+)", text, re.MULTILINE)
    }
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), *ROOT.glob("*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_described_with_its_type(table):
    text = (DOCS / "tables.md").read_text(encoding="utf-8")
    section = text.split(f"{table}.parquet\n", 1)[1].split("\n#", 1)[0]
    rows = [line for line in section.splitlines() if "`" in line]
    for name, dtype in TABLES[table].items():
        kind = f"List({dtype.inner!r})" if isinstance(dtype, pl.List) else str(dtype)
        mentioned = [row for row in rows if f"`{name}`" in row]
        assert mentioned, name
        assert any(kind.replace("()", "") in row for row in mentioned) or kind in section, (name, kind)


def test_the_command_reference_is_current():
    done = subprocess.run(
        [sys.executable, DOCS / "make_reference.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_command_and_option_says_what_it_does():
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    for section in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]:
        heading = section.split("\n", 1)[0]
        assert heading.split()[0] in COMMANDS
        is_group = "COMMAND [ARGS]" in section
        assert is_group or "Examples:" in section, heading
        options = section.split("\nOptions:\n", 1)[1]
        for line in re.findall(r"^  (-\S.*)$", options, re.MULTILINE):
            # An option without help is a line that ends with its name; long names put the help on the next line.
            following = options.split(line, 1)[1].split("\n")[1]
            assert re.search(r"\S\s{2,}\S", line) or following.startswith("      "), (heading, line)


def test_the_changelog_has_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_lock_pins_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
        *project["build-system"]["requires"],
    ]
    pins = dict(
        line.split(";")[0].strip().lower().replace("_", "-").split("==")
        for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    for requirement in asked:
        name = re.match(r"[\w.-]+", requirement)
        assert name, requirement
        assert name[0].lower().replace("_", "-") in pins, requirement
