"""The `replay sim` commands: parse, call one function, print."""

from pathlib import Path
from typing import Annotated

import typer

from tracegen.console import make_app, note, print_json, print_table, prose
from tracegen.errors import ReplayError

sim_app = make_app("What the simulated engine can simulate.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@sim_app.callback()
def sim() -> None:
    """What the simulated engine can simulate."""


@sim_app.command()
def profiles(as_json: AsJson = False) -> None:
    """List the nodes and models that come with the simulated engine, and the tensor-parallel sizes that fit.

    A node of your own is a TOML file (`--hardware FILE.toml`), a model any folder with a Hugging Face config.json
    (`--model FOLDER`).

    \b
    Examples:
      replay sim profiles
      replay run trace.parquet --engine sim --hardware dgx-h200 --model llama-3-8b --tp 1
    """
    from replay.sim.profile import combinations

    rows = combinations()
    if as_json:
        print_json(rows)
        return
    names = ["hardware", "model", "TP", "weights", "context", ""]
    print_table(
        names,
        [
            [
                row["hardware"],
                row["model"],
                ", ".join(map(str, row["tp_sizes"])) or "none",
                f"{row['weights_gb']:.1f} GB",
                f"{row['max_model_len']:,}",
                "calibrated" if row["calibrated"] else "",
            ]
            for row in rows
        ],
        left=[True, True, True, False, False, True],
    )
    prose(["Without 'calibrated', constants are carried over from other models or hardware; --json says which."])


@sim_app.command()
def calibrate(
    points: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="CSV file of measured points, or a run directory (may be repeated).",
            show_default=False,
        ),
    ],
    hardware: Annotated[str, typer.Option(help="Constants to start from: a node, or a TOML file.")] = "dgx-h100",
    model: Annotated[str, typer.Option(help="Model that was served, or a folder with config.json.")] = "llama-2-70b",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the constants to this new TOML file.", show_default=False)
    ] = None,
    holdout: Annotated[
        float, typer.Option(help="Share of the data that the fit must not see.", min=0.0, max=0.8)
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Draws what is held out.")] = 0,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit/--no-fit",
            help="Fit, or only compare the constants as they are, by what a fit of this share and seed holds out.",
        ),
    ] = True,
    leave_clocks_out: Annotated[
        bool, typer.Option("--leave-clocks-out", help="Also fit without each clock, and compare at it.")
    ] = False,
    input_tokens: Annotated[
        str, typer.Option(help="Prompt tokens of the points' S, M and L.", metavar="S,M,L")
    ] = "467,1010,4085",
    output_tokens: Annotated[
        str, typer.Option(help="Output tokens of the points' S, M and L.", metavar="S,M,L")
    ] = "96,256,600",
    max_model_len: Annotated[int, typer.Option(help="Context at which the points' requests ended.", min=2)] = 4096,
    arrivals_s: Annotated[float, typer.Option(help="How long requests arrived, s.", min=0.001)] = 20.0,
    arrivals_seed: Annotated[int, typer.Option(help="Seed of the arrivals (numpy's RandomState).", min=0)] = 100,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw the residuals into this folder.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit the simulator's constants to measurements, and say what is left over.

    Points are a CSV file with the columns load_rps, tp, sm_clock_mhz, bucket (SS to LL), power_like (mean power of the
    group, any unit) and ttft_s (P99); each is simulated. The arrivals' defaults are those of the published points that
    the shipped DGX-H100 was fitted to. Or run directories of your own, made at several clocks and TP sizes: durations
    and power of their steps are fitted without simulating. Some minutes for a thousand points.

    \b
    Examples:
      replay sim calibrate --points points.csv -o mine.toml --plots residuals
      replay sim calibrate --points runs/a --points runs/b -o mine.toml
      replay sim calibrate --points points.csv --no-fit
    """
    from replay.sim.calibrate import calibrate as fit_constants
    from replay.sim.calibrate import read_data
    from replay.sim.calibration_report import hardware_file, plain, print_calibration, summary
    from replay.sim.node_file import check_new, write_node
    from replay.sim.points import Load
    from replay.sim.profile import load_profile

    if out is not None:
        check_new(out)
        if not fit:
            raise ReplayError("-o with --no-fit: nothing is fitted that could be written; leave one of them out")
    load = Load(
        _three(input_tokens, "--input-tokens"), _three(output_tokens, "--output-tokens"), max_model_len, arrivals_s,
        arrivals_seed,
    )  # fmt: skip
    profile = load_profile(hardware, model)
    data = read_data(points, profile, load, holdout=holdout, seed=seed)
    if plots is not None:
        from replay.sim.residual_plots import check_drawable, draw

        check_drawable(data, plots)

    def progress(what: str, number: int, cost: float) -> None:
        note(f"fitting, {what}: round {number}, cost {cost:.1f}")

    found = fit_constants(
        profile, data, holdout=holdout, seed=seed, refit=fit, leave_clocks_out=leave_clocks_out, progress=progress
    )
    if as_json:
        print_json(plain(summary(found)))
    else:
        print_calibration(found)
    if out is not None:
        write_node(out, hardware_file(found))
        note(f"constants written to {out}; use them with --hardware {out}")
    if plots is not None:
        for path in draw(found, plots):
            note(f"drawn: {path}")


def _three(text: str, option: str) -> tuple[int, int, int]:
    """Three token counts, as typed."""
    try:
        small, medium, large = (int(part) for part in text.split(","))
    except ValueError:
        raise ReplayError(f"{option} {text}: give three numbers, such as 467,1010,4085") from None
    if min(small, medium, large) < 1:
        raise ReplayError(f"{option} {text}: each must be at least 1")
    return small, medium, large
