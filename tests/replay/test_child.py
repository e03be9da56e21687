"""Processes beside a run end when their parent has gone, and nothing is left of one that never began."""

import asyncio
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from replay.gpu.sampler import Sampler
from replay.gpu.settings import GpuSettings
from replay.steplog import StepFollower

NOWHERE = Path("none")


@pytest.mark.parametrize(
    ("beside", "child"),
    [
        (GpuSettings("sim:none", [0], 1200), "_holder"),
        (Sampler("sim:none", [0], NOWHERE, "here"), "_child"),
        (StepFollower(NOWHERE, NOWHERE, 0, 0, "run"), "_child"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_cancelled_while_it_starts_leaves_no_process(beside, child):
    child = getattr(beside, child)
    child.argv = [sys.executable, "-c", "import sys; sys.stdin.read()"]

    async def main():
        entering = asyncio.create_task(beside.__aenter__())
        while child.process is None:
            await asyncio.sleep(0.01)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering

    asyncio.run(main())
    assert not child.alive
    assert child.process.returncode == 0, "it ended by itself"


@pytest.fixture
def start():
    """Start a process whose parent we are."""
    with ExitStack() as stack:

        def start(script):
            script = "from replay.child import parent_left, say\nfrom replay.clock import NS_PER_S, now_ns\n" + script
            pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", script], text=True, **pipes))
            stack.callback(process.kill)
            return process

        yield start


def test_a_parent_has_left_when_its_end_of_the_pipe_is_closed_and_not_when_it_is_silent_or_speaks(start):
    wait = "say({'left': parent_left(now_ns() + 600 * NS_PER_S)})\n"
    process = start("say({'left': parent_left(now_ns())})\n" + 2 * wait)
    assert json.loads(process.stdout.readline()) == {"left": False}
    process.stdin.write("word\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"left": False}
    process.stdin.close()
    assert json.loads(process.stdout.readline()) == {"left": True}


def test_telling_a_parent_that_has_gone_is_no_error(start):
    process = start("parent_left(now_ns() + 600 * NS_PER_S)\nfor i in range(3):\n    say({'message': i})")
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0
