"""The `tracegen` command: parse, call one function, print."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracegen.cli_datasets import datasets, fetch
from tracegen.cli_export import export
from tracegen.cli_fit import compare, fit, plot
from tracegen.cli_import import import_app
from tracegen.cli_transform import COMMANDS as TRANSFORMS
from tracegen.console import format_si, make_app, note, plural, print_json, print_table, progress_bar, run_app, say
from tracegen.options import AsJson, Force, Seed, TraceFile

if TYPE_CHECKING:
    from tracegen.workload import Workload

app = make_app("Make, import and describe traces of LLM requests: arrival times, input and output token lengths.")
app.add_typer(import_app, name="import")


def main() -> None:
    """Run the command."""
    run_app(app)


@app.command()
def synth(
    mix: Annotated[
        str, typer.Option(help="Length mix, a mix file (.toml), or shares: chat:0.7,code:0.3. See `tracegen mixes`.")
    ] = "chat",
    rate: Annotated[
        str | None,
        typer.Option(
            help="Mean requests per second (5); a ramp (1..5); steps (0.5,1,2:60s); a rate curve's or a trace's file.",
            show_default="0.5, or the source's own with --arrivals production",
        ),
    ] = None,
    duration: Annotated[str, typer.Option(help="Length of the trace: 90s, 5m, 1.5h.")] = "5m",
    arrivals: Annotated[
        str, typer.Option(help="poisson, production, or a model with parameters, such as gamma:cv=3 (listed above).")
    ] = "poisson",
    profile: Annotated[
        str | None,
        typer.Option(
            help="Course of the rate: chat-day, chat-week, code-day, code-week, from @14h on; or a curve's file.",
            show_default="none",
        ),
    ] = None,
    clients: Annotated[int, typer.Option(help="So many clients, whose shares follow Zipf's law.")] = 0,
    turns: Annotated[
        float, typer.Option(help="Mean turns of a session; above 1 inputs grow by the turns before.")
    ] = 1.0,
    think: Annotated[
        str, typer.Option(help="Median time from an answer to the next turn (lognormal, sigma 1).")
    ] = "100s",
    max_context: Annotated[int, typer.Option(help="Tokens of input and output at which a session ends.")] = 131_072,
    system_prompts: Annotated[
        str | None,
        typer.Option(
            metavar="N:TOKENS", help="N system prompts of TOKENS, which inputs begin with.", show_default="none"
        ),
    ] = None,
    block_tokens: Annotated[int, typer.Option(help="Tokens of a block of a shared prefix.")] = 64,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only the I-th of N parts of the time; all in turn equal the whole.")
    ] = "1/1",
    seed: Seed = 1,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("trace.parquet"),
    force: Force = False,
) -> None:
    """Synthesize a trace from a length mix.

    Lengths follow a mix that was fitted to a public trace. Arrivals are Poisson, steadier than real ones:
    --arrivals production takes those of the mix's source, with its rate. Memory stays bounded at any length.

    \b
    Arrival models and their parameters (docs/tracegen.md has the defaults):
      poisson, constant   independent arrivals; equal gaps
      gamma, weibull      cv: of the gaps (vLLM's burstiness is 1/cv^2)
      mmpp                levels=1/3, holds=60s/20s: relative rates, mean stays
      log-ou              sigma, tau, cv: a rate that wanders (Azure chat)
      on-off              on, off, on-shape, off-shape, floor, sigma, tau, batch,
                          spacing: bursts and silence, batches (Azure code)
      clients             n, zipf: a sum of clients, each with its own CV

    \b
    Examples:
      tracegen synth --mix chat
      tracegen synth --mix code --rate 2 --duration 10m --seed 7 -o code.parquet
      tracegen synth --mix chat --arrivals production --duration 1h
      tracegen synth --mix chat:0.7,code:0.3 --rate 0.5,1,2:60s --duration 3m
      tracegen synth --rate 20 --profile chat-week --duration 7d --arrivals gamma:cv=2
      tracegen synth --rate 3 --turns 4 --think 30s --system-prompts 10:500 --clients 50
      tracegen synth --rate 1000 --duration 1d --shard 2/8 -o part-2.parquet
    """
    from tracegen.render import headline
    from tracegen.schema import check_output
    from tracegen.workload import parse_workload

    workload = parse_workload(
        mix=mix, rate=rate, duration=duration, seed=seed, arrivals=arrivals, profile=profile, clients=clients,
        turns=turns, think=think, max_context=max_context, system_prompts=system_prompts, block_tokens=block_tokens,
        shard=shard,
    )  # fmt: skip
    check_output(output, force=force)
    figures = _synthesize(output, workload)
    say(f"wrote {output}: {headline(figures)}")
    if (hit_rate := figures["metadata"].get("prefix_hit_rate")) is not None:
        block = figures["metadata"]["block_tokens"]
        say(f"  {hit_rate:.1%} of input tokens are in a cache without limit, in blocks of {block}")
    note(f"next: replay run {shlex.quote(str(output))} --tp 2 --freq 1200")


@app.command()
def describe(file: TraceFile, json: AsJson = False) -> None:
    """Show a trace's rate, lengths and buckets.

    Burstiness, correlation, and histograms too.

    \b
    Examples:
      tracegen describe trace.parquet
      tracegen describe trace.parquet --json
    """
    from tracegen import render
    from tracegen.describe import describe_trace

    document = describe_trace(file)
    if json:
        print_json(document)
    else:
        render.print_description(document)


@app.command()
def validate(file: TraceFile) -> None:
    """Check a trace against the schema.

    A broken rule is named with its row (from 0) and column, and the exit code is 2.

    \b
    Examples:
      tracegen validate trace.parquet
    """
    from tracegen.schema import read_trace

    frame = read_trace(file)
    say(f"{file}: a valid trace, {frame.height:,} requests, columns {', '.join(frame.columns)}")


def _synthesize(output: Path, workload: "Workload") -> dict[str, Any]:
    """`synthesize_file` with a bar of progress."""
    from tracegen.synthesize import synthesize_file

    with progress_bar() as progress:
        task = progress.add_task(str(output), total=None)
        return synthesize_file(
            output,
            workload,
            on_progress=lambda rows, expected: progress.update(
                task, completed=rows, total=expected, description=f"{plural(rows, 'request')} written"
            ),
        )


@app.command()
def mixes(json: AsJson = False) -> None:
    """List the length mixes.

    Each with the public trace it was fitted to, how well it fits, and the arrivals that --arrivals production takes.

    \b
    Examples:
      tracegen mixes
      tracegen mixes --json
    """
    from dataclasses import asdict

    from tracegen.lengths import all_mixes

    found = all_mixes()
    if json:
        print_json([asdict(mix) for mix in found])
        return
    print_table(
        ["mix", "fitted to", "rows", "mean in", "mean out", "KS in", "KS out", "arrivals", "requests/s"],
        [
            [
                mix.name,
                Path(mix.source.get("file", mix.source["dataset"])).name,
                f"{mix.source['rows']:,}" if "rows" in mix.source else "-",
                format_si(mix.source["mean_input_tokens"], digits=4),
                format_si(mix.source["mean_output_tokens"], digits=4),
                *(
                    f"{mix.goodness[key]:.3f}" if key in mix.goodness else "-"
                    for key in ("ks_input_median", "ks_output_median")
                ),
                mix.arrivals.get("model", "-"),
                format_si(mix.arrivals.get("rate_rps")),
            ]
            for mix in found
        ],
        left=[True, True, False, False, False, False, False, True, False],
    )
    say("\nKS: Kolmogorov-Smirnov distance of a sample of as many rows to the source, median over seeds.")
    say("SS to LL: the nine sizes of the papers, one length each way.")


app.command()(fit)
app.command()(compare)
app.command()(plot)
for command_name, command in TRANSFORMS.items():
    app.command(command_name)(command)
app.command()(export)
app.command()(datasets)
app.command()(fetch)


if __name__ == "__main__":
    main()
