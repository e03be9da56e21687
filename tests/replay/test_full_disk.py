"""A disk that fills up while a run goes on: a real one, a small file system in memory that the run has to itself."""

import os
import shutil
import subprocess
import sys

import pytest

from replay.rundir import Run
from replay.whole import check

ALONE = ["unshare", "--user", "--map-root-user", "--mount"]
# A run on a disk of 100 MiB, which is filled to the last byte once a part is on record. What is left is copied away.
SCRIPT = """
set -u
mount -t tmpfs -o size=100m tmpfs "$DISK" || exit 77
"$@" -o "$DISK/run" & run=$!
while kill -0 $run 2>/dev/null && ! ls "$DISK"/run/requests.parquet/worker*.parquet >/dev/null 2>&1; do sleep 0.1; done
cat /dev/zero > "$DISK/ballast" 2>/dev/null
wait $run; status=$?
rm "$DISK/ballast"
cp -a "$DISK/run" "$LEFT"
exit $status
"""


@pytest.fixture
def alone():
    """What runs a command among mounts of its own."""
    if shutil.which("unshare") is None or subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here (unshare --user --mount is not allowed)")
    return ALONE


def test_a_disk_that_fills_up_ends_the_run_in_order_and_it_goes_on_when_there_is_room(
    alone, make_trace, replay, sim_server, tmp_path
):
    trace = make_trace(tmp_path / "trace.parquet", [(40 * i, 20, 2) for i in range(200)])
    (disk := tmp_path / "disk").mkdir()
    left = tmp_path / "left"
    run = [sys.executable, "-m", "replay.cli", "run", trace, "--engine", sim_server, "--quiet"]
    ended = subprocess.run(
        [*alone, "sh", "-c", SCRIPT, "sh", *map(str, run)],
        env={**os.environ, "DISK": str(disk), "LEFT": str(left)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "cannot be written (No space left on device); the run ended early" in ended.stderr.splitlines()[-1]

    assert Run.open(left).manifest["state"] == "failed"
    found = {finding["name"]: finding for finding in check(left)["wholeness"]}
    assert found["state"]["ok"] is False
    assert "could not be written (No space left on device)" in found["state"]["why"]
    assert found["tables"]["ok"], found["tables"]["why"]
    assert not [path for path in left.rglob("*") if "partial" in path.name or "whole" in path.name]
    recorded = Run.open(left).scan("requests").collect()["request_id"]
    assert 0 < recorded.n_unique() == recorded.len() < 200

    replay(trace.parent / "none", resume=left)
    again = check(left)
    assert again["whole"], again["wholeness"]
    assert Run.open(left).scan("requests").collect().height == 200
