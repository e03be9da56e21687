"""A run that goes on, or was killed, is read as far as its tables are whole; what is left out is named."""

import pytest

from analysis.buckets import bucket_table
from analysis.energy import attribute
from analysis.requests import request_table
from analysis.saved import ensure_energy
from analysis.tables import Runs
from replay.rundir import PartWriter, Run
from tracegen.errors import RunError

TABLES = ("requests", "steps", "segments", "power")


@pytest.fixture
def in_parts(run_of, rewrite):
    """A run whose tables are in three parts, the last of each torn, in `state`; and of how many bytes these are."""

    def in_parts(state, left=0.5):
        run = run_of(duration_s=20.0)
        for name in TABLES:
            frame = run.scan(name).collect()
            (run.path / f"{name}.parquet").unlink()
            writer = PartWriter(run.path, name)
            for rows in frame.iter_slices(frame.height // 3 + 1):
                writer.append(rows)
            last = run.path / f"{name}.parquet" / "part-000002.parquet"
            last.write_bytes(last.read_bytes()[: int(left * last.stat().st_size)])
        return rewrite(run, {"state": state, "measure_end_ns": None})

    return in_parts


@pytest.mark.parametrize("left", [0.0, 0.5])
def test_what_is_whole_is_accounted_for_and_the_rest_is_named(in_parts, left):
    run = in_parts("running", left)
    names = [f"{name}.parquet/part-000002.parquet" for name in sorted(TABLES)]
    assert run.torn() == names
    summary = attribute(run).summary
    parts_j = summary["attributed_j"] + summary["idle_j"] + summary["other_j"]
    assert parts_j == pytest.approx(summary["measured_j"], rel=1e-9)
    assert summary["requests_with_energy"] > 0
    assert f"left out, for they were not written to their ends: {', '.join(names)}" in summary["notes"]
    known = ensure_energy(run)
    assert ", ".join(names) in known.remark(run)
    whole = run.scan("requests").collect().height
    assert bucket_table(run, known.requests)["requests"][-1] == request_table(run, None).height == whole > 0
    assert Runs.of([run]).requests().collect().height == whole


@pytest.mark.parametrize("state", ["complete", "interrupted", "failed"])
def test_of_a_run_that_has_ended_a_torn_part_is_an_error(in_parts, state):
    with pytest.raises(RunError, match=r"part-000002\.parquet: not readable as a \w+ table \(torn\), though"):
        attribute(in_parts(state))


def test_a_table_of_torn_parts_alone_is_none(in_parts):
    run = in_parts("running")
    for number in (0, 1):
        (run.path / "power.parquet" / f"part-{number:06d}.parquet").write_bytes(b"")
    assert not Run.open(run.path).has("power")
    assert "has no power samples" in ensure_energy(run).why
