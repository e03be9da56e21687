import subprocess
import sys

import pytest

from tracegen import console
from tracegen.errors import TraceError


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an app with the commands `fail` and `count`: its exit code, stdout and stderr."""
    app = console.make_app("A test.")

    @app.command()
    def fail():
        """Fail."""
        raise TraceError("what is wrong,\n  where")

    @app.command()
    def count(n: int = 1):
        """Count."""
        console.say("x" * n)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["test", *arguments])
        with pytest.raises(SystemExit) as stop:
            console.run_app(app)
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_a_command_that_works(run):
    assert run("count", "--n", "3") == (0, "xxx\n", "")


def test_an_error_is_one_line_and_exit_code_2(run):
    assert run("fail") == (2, "", "error: what is wrong, where\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["count", "--n", "x"], "Invalid value for '--n'"),
        (["count", "--m", "1"], "No such option: --m"),
        (["count", "--n"], "Option '--n' requires an argument"),
        (["count", "extra"], "unexpected extra argument"),
        (["nope"], "No such command 'nope'"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(run, arguments, says):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("error: ")
    assert err.endswith("see --help\n")
    assert err.count("\n") == 1


def test_no_arguments_show_the_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "A test." in out
    assert "count" in out


def test_a_bug_keeps_its_traceback(monkeypatch):
    app = console.make_app("A test.")
    app.command()(lambda: None)

    @app.command()
    def broken():
        """Break."""
        raise ZeroDivisionError

    monkeypatch.setattr("sys.argv", ["test", "broken"])
    with pytest.raises(ZeroDivisionError):
        console.run_app(app)


def test_print_json_refuses_nan():
    with pytest.raises(ValueError, match="JSON"):
        console.print_json({"x": float("nan")})


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (float("nan"), "-"), (0.0, "0 W"), (1.2345, "1.23 W"), (12345.6, "12,346 W"), (999.7, "1,000 W")],
)
def test_format_si(value, text):
    assert console.format_si(value, " W" if text != "-" else "") == text


def test_a_wide_table_is_whole_without_a_terminal(capsys):
    console.print_table(["name", "value"], [["n" * 100, "1" * 100]])
    assert "n" * 100 in capsys.readouterr().out


def test_bars_do_not_stop_a_command_on_an_ascii_terminal():
    script = (
        "from tracegen import console\n"
        "app = console.make_app('x')\n"
        "app.command()(lambda: None)\n"
        "@app.command()\n"
        "def show():\n"
        "    console.say('\\u2588')\n"
        "console.run_app(app)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "show"],
        env={"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "?\n", "")
