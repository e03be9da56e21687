"""Write docs/cli.md from the commands' own --help; with --check, say whether it is current and change nothing."""

import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

import analysis.cli
import replay.cli
import tracegen.cli

PAGE = Path(__file__).with_name("cli.md")
APPS = {"tracegen": tracegen.cli.app, "replay": replay.cli.app, "analysis": analysis.cli.app}
INTRO = """# Command line

Made from `--help` by `make docs`; do not edit. Every command exits with 0 when it did its work, 2 with one line on
stderr when something is wrong that you can mend, 1 when a run was written but failed, 130 when you stopped it.
Durations are `90s`, `5m`, `1.5h`.
"""


def commands(app: typer.Typer, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The paths of all commands of `app`, groups before their members."""
    found = [path]
    for command in app.registered_commands:
        callback = command.callback
        name = command.name or (callback.__name__.replace("_", "-") if callback else "")
        found.append((*path, name))
    for group in app.registered_groups:
        if group.typer_instance is not None and group.name is not None:
            found += commands(group.typer_instance, (*path, group.name))
    return found


def page() -> str:
    """The whole page."""
    parts = [INTRO]
    # A fixed width: the page must not depend on the terminal of whoever makes it.
    runner = CliRunner(env={"COLUMNS": "110", "TERMINAL_WIDTH": "110", "NO_COLOR": "1"})
    for name, app in APPS.items():
        for path in commands(app, (name,)):
            result = runner.invoke(app, [*path[1:], "--help"], prog_name=name)
            if result.exit_code != 0:
                raise SystemExit(f"{' '.join(path)} --help failed: {result.output}")
            heading = "##" if len(path) == 1 else "###"
            text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
            parts.append(f"{heading} {' '.join(path)}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write or check the page; the exit code."""
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE} is not what --help says; run 'make docs'", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
