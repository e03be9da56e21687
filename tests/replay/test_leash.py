"""Behind the leash nothing outlives the program that holds it."""

import signal
import subprocess
import sys
import textwrap

import pytest

# A server with a child of its own, as an engine has workers; both carry the marker on their command lines.
SERVER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]])
print("up", flush=True)
time.sleep(600)
"""
LEASH = [sys.executable, "-m", "replay.leash", "--"]


@pytest.fixture
def leash(tmp_path, processes):
    """Start a leash around `script`; at the end nothing that carries its marker may live."""
    started = []
    marker = f"marker-{tmp_path.name}"

    def start(script=SERVER, argv=LEASH):
        argv = [*argv, sys.executable, "-c", textwrap.dedent(script), marker]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    start.living = lambda: processes(marker)
    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_closing_stdin_ends_child_and_grandchild(leash, until):
    process = leash()
    assert process.stdout.readline() == "up\n"
    until(lambda: len(leash.living()) == 3)  # leash, server, worker
    process.stdin.close()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert leash.living() == []
    process.stdin = None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_child_and_grandchild(leash, number):
    process = leash()
    process.stdout.readline()
    process.send_signal(number)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert leash.living() == []


def test_killing_the_leashs_parent_ends_all(leash, until):
    holder = """
    import subprocess, sys, time
    leash = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
    time.sleep(600)
    """
    process = leash(argv=[sys.executable, "-c", textwrap.dedent(holder), *LEASH])
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.wait(20)
    until(lambda: not leash.living())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_killing_the_leash_itself_ends_the_server(leash, until):
    process = leash("print('up', flush=True); import time; time.sleep(600)")
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.wait(20)
    until(lambda: not leash.living())


def test_a_server_that_ignores_sigterm_is_killed(leash):
    impatient = "import sys, replay.leash as leash; leash._GRACE_S = 0.2; sys.exit(leash.main(sys.argv[1:]))"
    stubborn = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", flush=True)
    time.sleep(600)
    """
    process = leash(stubborn, argv=[sys.executable, "-c", impatient, "--"])
    assert process.stdout.readline() == "up\n"
    process.stdin.close()
    process.stdin = None
    assert process.wait(20) == 128 + signal.SIGKILL
    assert leash.living() == []


def test_the_exit_code_is_passed_on_and_workers_left_behind_are_killed(leash):
    process = leash(SERVER.replace("time.sleep(600)\n", "sys.exit(7)\n"))
    assert process.wait(20) == 7
    assert leash.living() == []


def test_death_by_signal_is_passed_on_as_shells_do(leash):
    assert leash("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").wait(20) == 128 + signal.SIGKILL


def test_a_wrong_call_prints_its_usage():
    done = subprocess.run([*LEASH[:-1], "echo"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: python -m replay.leash -- COMMAND ...\n")
