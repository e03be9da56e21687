import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tracegen.describe import describe
from tracegen.schema import read_metadata, read_trace

FOLDER = Path(__file__).parents[2] / "traces"
# One row each in the table of traces/README.md: file, requests, command.
ROWS = re.findall(r"^\| (\S+\.parquet) \| (\d+) \| `(.+)` \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)


def test_the_readme_tells_of_every_sample():
    assert {name for name, _, _ in ROWS} == {path.name for path in FOLDER.glob("*.parquet")} != set()


@pytest.mark.parametrize(("name", "requests", "command"), ROWS)
def test_each_sample_is_what_its_command_writes(run_cli, tmp_path, monkeypatch, name, requests, command):
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    assert program == "tracegen"
    assert run_cli(*arguments)[0] == 0
    kept, made = FOLDER / name, tmp_path / "traces" / name
    assert read_trace(made).equals(read_trace(kept))
    assert read_metadata(made) == read_metadata(kept)
    assert describe(read_trace(kept), {})["requests"] == int(requests)
    # Another Parquet library may pack the same rows into other bytes.
    if pq.read_metadata(kept).created_by == pq.read_metadata(made).created_by:
        assert made.read_bytes() == kept.read_bytes()
