import io
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


TABLE = (["", "one", "two\nms", "three", "why"], [["a", "1" * 20, "2.5", "3" * 20, "for some reason or other"]])


def test_a_table_fits_the_terminal_and_loses_no_figure(terminal):
    """Columns move together first; then they come in blocks, each with the first column."""
    for columns in (100, 72, 60, 30):
        lines = terminal(lambda: console.print_table(*TABLE), columns)
        assert max(map(len, lines)) <= columns
        text = "\n".join(lines)
        assert [text.count(word) for word in ("1" * 20, "3" * 20, "2.5", "for some reason or other")] == [1, 1, 1, 1]
        assert sum(line.startswith("a ") for line in lines) == {100: 1, 72: 1, 60: 2, 30: 3}[columns]


def test_text_in_the_last_column_is_broken_at_its_words_under_itself(terminal):
    reason = "for some reason or other that goes on and on"
    rows = [["a", "1.5", reason]]
    lines = terminal(lambda: console.print_table(["", "J", "why"], rows, left=[True, False, True], wrap=True), 40)
    assert max(map(len, lines)) <= 40
    begin = lines[1].index("for")
    assert lines[1].startswith("a 1.5")
    assert " ".join(line[begin:] for line in lines[1:]).strip() == reason
    assert all(not line[:begin].strip() for line in lines[2:])


def test_headings_of_several_lines_end_on_one(capsys):
    console.print_table(["", "energy\nJ", "n"], [["a", "1", "2"]])
    assert capsys.readouterr().out.splitlines() == ["   energy", "        J  n", "a       1  2"]


def test_prose_is_broken_in_a_terminal_and_whole_without(terminal, capsys):
    line = "  a sentence that is longer than what fits"
    console.prose([line])
    assert capsys.readouterr().out == f"{line}\n"
    assert terminal(lambda: console.prose([line]), 20) == ["  a sentence that is", "  longer than what", "  fits", ""]
    named = ["  ok    name  why it is", "              so"]
    assert terminal(lambda: console.prose(["  ok    name  why it is so"]), 23) == [*named, ""], "under itself"


def test_a_name_with_brackets_is_shown_as_it_is_beside_the_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress_bar() as progress:
        progress.update(progress.add_task("runs[/b]/a[red].parquet", total=2), completed=1)
        progress.refresh()
    assert "runs[/b]/a[red].parquet" in sys.stderr.getvalue()


def test_one_is_no_plural():
    assert [console.plural(n, "GPU") for n in (0, 1, 2000)] == ["0 GPUs", "1 GPU", "2,000 GPUs"]


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
