"""The `tracegen import` commands: parse, call `import_trace`, print."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracegen.console import make_app, note, plural, progress_bar, say
from tracegen.options import Force

if TYPE_CHECKING:
    from tracegen.importers.base import Options, Report
    from tracegen.sources import Source

import_app = make_app("Turn a published trace, or any table of requests, into a trace file.")

File = Annotated[
    str,
    typer.Argument(metavar="FILE", help="A path or an https URL; plain, gz, xz or zst.", show_default=False),
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="File to write.", show_default="LABEL.parquet")]
Label = Annotated[str | None, typer.Option(help="Label of each row.", show_default="the file's name without suffixes")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Drop and count bad rows instead of stopping.")]
Limit = Annotated[int | None, typer.Option(help="Stop after that many good rows.", show_default="all")]
Sort = Annotated[bool, typer.Option("--sort", help="Sort rows by time; without it one out of order is bad.")]


@import_app.command()
def auto(
    file: File,
    output: Output = None,
    label: Label = None,
    skip_bad: SkipBad = False,
    limit: Limit = None,
    force: Force = False,
) -> None:
    """Import a trace of whichever known format.

    The format is recognised by the file's content, not by its name.

    \b
    Examples:
      tracegen import auto AzureLLMInferenceTrace_conv_1week.csv
      tracegen import auto conversation_trace.jsonl.xz -o kimi.parquet
    """  # fmt: skip
    _run("auto", file, output, _options(label=label, skip_bad=skip_bad, limit=limit), force=force)


@import_app.command()
def azure(
    file: File,
    output: Output = None,
    label: Label = None,
    skip_bad: SkipBad = False,
    limit: Limit = None,
    sort: Sort = False,
    force: Force = False,
) -> None:
    """Import an Azure LLM trace of 2023 or 2024.

    Columns TIMESTAMP,ContextTokens,GeneratedTokens; the multimodal trace's NumImages is kept as `images`. The files
    are at https://github.com/Azure/AzurePublicDataset.

    \b
    Examples:
      tracegen import azure AzureLLMInferenceTrace_conv.csv -o conv.parquet
      tracegen import azure AzureLLMInferenceTrace_code.csv.xz --label code
    """  # fmt: skip
    _run("azure", file, output, _options(label=label, skip_bad=skip_bad, limit=limit, sort=sort), force=force)


@import_app.command()
def burstgpt(
    file: File,
    output: Output = None,
    label: Label = None,
    skip_bad: SkipBad = False,
    limit: Limit = None,
    force: Force = False,
) -> None:
    """Import BurstGPT, version 1 or 3.

    Requests that failed (0,0,0) are dropped and counted. Version 3 has sessions: the turn before, and the think time
    from its answer's end (Elapsed time). The files are at https://github.com/HPMLL/BurstGPT.

    \b
    Examples:
      tracegen import burstgpt BurstGPT_1.csv
      tracegen import burstgpt BurstGPT_3.csv --limit 100000 -o burst.parquet
    """  # fmt: skip
    _run("burstgpt", file, output, _options(label=label, skip_bad=skip_bad, limit=limit), force=force)


@import_app.command()
def mooncake(
    file: File,
    output: Output = None,
    label: Label = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Spread arrivals evenly over the source's grid of 3 s.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of --dequantize.")] = 1,
    skip_bad: SkipBad = False,
    limit: Limit = None,
    sort: Sort = False,
    force: Force = False,
) -> None:
    """Import a Mooncake trace (JSON Lines).

    Hash ids become `prefix_hashes`, of 512 tokens a block. The files are at https://github.com/kvcache-ai/Mooncake
    under FAST25-release/traces.

    \b
    Examples:
      tracegen import mooncake conversation_trace.jsonl --dequantize
      tracegen import mooncake toolagent_trace.jsonl -o tools.parquet
    """
    options = _options(label=label, skip_bad=skip_bad, limit=limit, sort=sort, dequantize=dequantize, seed=seed)
    _run("mooncake", file, output, options, force=force)


@import_app.command()
def bailian(
    file: File,
    output: Output = None,
    label: Label = None,
    skip_bad: SkipBad = False,
    limit: Limit = None,
    force: Force = False,
) -> None:
    """Import a Qwen-Bailian trace (JSON Lines).

    Chats with the same first chat become a session; hash ids become `prefix_hashes`, of 16 tokens a block. The files
    are at https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon.

    \b
    Examples:
      tracegen import bailian qwen_traceA_blksz_16.jsonl
    """  # fmt: skip
    _run("bailian", file, output, _options(label=label, skip_bad=skip_bad, limit=limit), force=force)


@import_app.command()
def table(
    file: File,
    columns: Annotated[
        str,
        typer.Option(
            "--map",
            metavar="KEY=COLUMN,...",
            help="Which column is what: arrival, input and output; client, session, model and label if there.",
            show_default=False,
        ),
    ],
    time_unit: Annotated[
        str | None,
        typer.Option(help="What arrivals count: s, ms, us, ns, or iso for dates.", show_default="iso for dates"),
    ] = None,
    output: Output = None,
    label: Label = None,
    skip_bad: SkipBad = False,
    limit: Limit = None,
    force: Force = False,
) -> None:
    """Import any CSV, JSON Lines or Parquet.

    Rows are sorted by time. A column of JSON may be a path with dots. Clients and sessions that are no numbers become
    numbers: 64 bits of their BLAKE2b hash.

    \b
    Examples:
      tracegen import table log.csv --map arrival=sent,input=prompt_tokens,output=completion_tokens --time-unit ms
      tracegen import table log.jsonl --map arrival=ts,input=usage.prompt_tokens,output=usage.completion_tokens
    """
    from tracegen.importers.table import parse_map

    options = _options(label=label, skip_bad=skip_bad, limit=limit, map=parse_map(columns), time_unit=time_unit)
    _run("table", file, output, options, force=force)


@import_app.command()
def servegen(
    file: Annotated[
        str,
        typer.Argument(
            metavar="POOL", help="A folder, or a path or https URL of a tar, plain or packed.", show_default=False
        ),
    ],
    duration: Annotated[str | None, typer.Option(help="Length of the trace.", show_default="to the pool's end")] = None,
    start: Annotated[str, typer.Option(help="Where it starts, from the pool's start.")] = "0",
    rate: Annotated[
        float | None, typer.Option(help="Mean requests/s, by one factor for all clients.", show_default="the pool's")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 1,
    output: Output = None,
    label: Label = None,
    force: Force = False,
) -> None:
    """Draw requests from a ServeGen client pool.

    A pool has no requests but clients: rates and CVs of gaps in stretches of ten minutes, and lengths every six hours.
    They are drawn anew, input and output independently. Pools are folders of data/ in
    https://github.com/alibaba/ServeGen; chunk-N becomes `client_id` N.

    \b
    Examples:
      tracegen import servegen data/reason/deepseek-r1 --start 12h --duration 1h
      tracegen import servegen deepseek-r1.tar.xz --start 12h --duration 1h --rate 5 --seed 7 -o reason.parquet
    """  # fmt: skip
    from tracegen.durations import parse_duration_ns
    from tracegen.importers.servegen import import_servegen

    start_ns = parse_duration_ns(start, zero_ok=True)
    duration_ns = None if duration is None else parse_duration_ns(duration)
    _say_imported(
        import_servegen(
            file,
            output,
            start_ns=start_ns,
            duration_ns=duration_ns,
            rate_rps=rate,
            seed=seed,
            label=label,
            force=force,
        )
    )


Rate = Annotated[float, typer.Option(help="Poisson arrivals per second: the source has no times.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of the arrivals.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder of the tokenizer.json that counts tokens.", show_default=False),
]


@import_app.command()
def sharegpt(
    file: File,
    rate: Rate,
    tokenizer: Tokenizer = None,
    seed: Seed = 1,
    output: Output = None,
    label: Label = None,
    skip_bad: SkipBad = False,
    limit: Limit = None,
    force: Force = False,
) -> None:
    """Import ShareGPT conversations (JSON).

    Each answer is a request of its conversation's session. Conversations start at --rate; a later turn is due when the
    turn before has been answered and thought about, as in synthesized sessions. Tokens are counted by a tokenizer.json
    (pip install 'wattrace[tokenizer]').

    \b
    Examples:
      tracegen import sharegpt ShareGPT_V3_unfiltered_cleaned_split.json --rate 2 --tokenizer Llama-3.1-8B/
    """  # fmt: skip
    texts = {"rate_rps": rate, "tokenizer": tokenizer, "seed": seed}
    _run("sharegpt", file, output, _options(label=label, skip_bad=skip_bad, limit=limit, **texts), force=force)


@import_app.command("vllm-bench")
def vllm_bench(
    file: File,
    rate: Rate,
    tokenizer: Tokenizer = None,
    seed: Seed = 1,
    output: Output = None,
    label: Label = None,
    skip_bad: SkipBad = False,
    limit: Limit = None,
    force: Force = False,
) -> None:
    """Import prompts of vllm bench (JSON Lines).

    Lines of `prompt`, a text or token ids, and `output_tokens`, as `vllm bench serve --dataset-name custom` takes them.

    \b
    Examples:
      tracegen import vllm-bench prompts.jsonl --rate 2 --tokenizer Llama-3.1-8B/
    """
    texts = {"rate_rps": rate, "tokenizer": tokenizer, "seed": seed}
    _run("vllm-bench", file, output, _options(label=label, skip_bad=skip_bad, limit=limit, **texts), force=force)


@import_app.command()
def otel(
    file: File,
    output: Output = None,
    label: Label = None,
    skip_bad: SkipBad = False,
    limit: Limit = None,
    force: Force = False,
) -> None:
    """Import OpenTelemetry spans of generative AI.

    OTLP JSON, as the collector's file exporter writes it. A request is a span of a chat or completion with its usage:
    its arrival is the span's start, its session is gen_ai.conversation.id. Other spans, and requests that failed, are
    dropped and counted.

    \b
    Examples:
      tracegen import otel traces.jsonl -o production.parquet
    """
    _run("otel", file, output, _options(label=label, skip_bad=skip_bad, limit=limit), force=force)


def _options(**asked: object) -> "Options":
    """What an import is asked for."""
    from tracegen.importers.base import Options

    return Options(**asked)  # type: ignore[arg-type]


def _run(name: str, file: str, output: Path | None, options: "Options", *, force: bool) -> None:
    """Import with a bar of progress, and say what was done."""
    from tracegen.importers.formats import find_format
    from tracegen.importers.run import import_trace

    with progress_bar() as progress:
        task = progress.add_task(file, total=None)

        def on_progress(report: "Report", source: "Source") -> None:
            done = f"{plural(report.rows_read, 'row')} read"
            progress.update(task, completed=source.bytes_read, total=source.size_bytes, description=done)

        report = import_trace(file, output, format=name, options=options, force=force, on_progress=on_progress)
    if name == "auto":
        say(f"{report.metadata['source']['file']}: {find_format(report.format).title}")
    _say_imported(report)


def _say_imported(report: "Report") -> None:
    """Say what was read, written and dropped, and what to type next."""
    from tracegen.render import headline

    say(f"wrote {report.output}: {headline(report.summary())}")
    if report.rows_read:
        say(f"  read {plural(report.rows_read, 'row')}, dropped {report.rows_dropped:,}")
    for why, count in report.dropped.items():
        say(f"  dropped {count:,}: {why}")
    for remark in report.remarks:
        say(f"  {remark}")
    note(f"next: replay run {shlex.quote(str(report.output))} --tp 2 --freq 1200")
