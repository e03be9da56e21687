"""The `tracegen datasets` and `tracegen fetch` commands: parse, call one function, print."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracegen.console import format_si, note, print_json, print_table, progress_bar, prose, say
from tracegen.options import AsJson

if TYPE_CHECKING:
    from tracegen.datasets import Dataset


def datasets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show all that is known of one.", show_default=False)
    ] = None,
    json: AsJson = False,
) -> None:
    """List public traces of LLM requests.

    Licence, size, span, citation and URL of each, and which `tracegen import` reads it. What is not known is a dash.

    \b
    Examples:
      tracegen datasets
      tracegen datasets burstgpt-3
    """
    from dataclasses import asdict

    from tracegen.datasets import all_datasets, find_dataset

    found = all_datasets() if name is None else [find_dataset(name)]
    if json:
        print_json([asdict(dataset) for dataset in found])
        return
    print_table(
        ["dataset", "import", "licence", "rows", "span", "size"],
        [
            [
                dataset.name,
                dataset.format,
                dataset.license,
                "-" if dataset.rows is None else f"{dataset.rows:,}",
                _span(dataset.span_s),
                "-" if dataset.bytes is None else format_si(dataset.bytes / 1e6, " MB"),
            ]
            for dataset in found
        ],
        left=3,
    )
    if name is None:
        say()
        prose(_sources(found))
        say("\n'tracegen datasets NAME' shows the URL of one, 'tracegen fetch NAME' downloads it.")
    else:
        say()
        prose(_facts(found[0]))


def _span(span_s: float | None) -> str:
    """How long a trace is, for people."""
    from tracegen.durations import NS_PER_S, format_duration

    return "-" if span_s is None else format_duration(round(span_s * NS_PER_S))


def _sources(found: "list[Dataset]") -> list[str]:
    """Each source once: whose it is, and where."""
    names: dict[tuple[str, str], list[str]] = {}
    for dataset in found:
        names.setdefault((dataset.citation, dataset.page), []).append(dataset.name)
    return [f"{', '.join(group)}: {citation}; {page}" for (citation, page), group in names.items()]


def _facts(dataset: "Dataset") -> list[str]:
    """All that is known of one, a line each."""
    measured = {"here": "measured here, at that commit", "others": "as public projects pin it", None: ""}
    return [
        f"title     {dataset.title}",
        f"citation  {dataset.citation}",
        f"page      {dataset.page}",
        f"URL       {dataset.url or '- (not one file)'}",
        f"SHA-256   {dataset.sha256 or '- (not published)'} {measured[dataset.sha256_by]}".rstrip(),
    ]


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A dataset of `tracegen datasets`.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="in ~/.cache/wattrace/datasets")
    ] = None,
    checksum: Annotated[bool, typer.Option(help="Compare with the published SHA-256, where there is one.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is there.")] = False,
) -> None:
    """Download a public trace.

    A download that broke off goes on where it stopped, in the same call or the next. The file is there once it is
    whole and has the published hash.

    \b
    Examples:
      tracegen fetch azure-2023-conv
      tracegen fetch mooncake-conversation -o conversation_trace.jsonl
    """
    from rich.progress import DownloadColumn, TransferSpeedColumn

    from tracegen.datasets import find_dataset
    from tracegen.fetch import fetch_dataset

    dataset = find_dataset(name)
    with progress_bar(DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task(name, total=None)

        def on_progress(have: int, size: int | None) -> None:
            progress.update(task, completed=have, total=size)

        fetched = fetch_dataset(name, output, checksum=checksum, force=force, on_progress=on_progress)
    done = "is there already" if fetched.was_there else "fetched"
    unchecked = "no published hash to compare with" if checksum else "not compared"
    say(f"{done}: {fetched.path}, {fetched.bytes:,} bytes")
    say(f"  SHA-256 {fetched.sha256}, {'as in the catalogue' if fetched.checked else unchecked}")
    say(f"  {dataset.license}; cite {dataset.citation}")
    extra = " --rate 1 --tokenizer DIR" if dataset.format == "sharegpt" else ""
    note(f"next: tracegen import {dataset.format} {shlex.quote(str(fetched.path))}{extra}")
