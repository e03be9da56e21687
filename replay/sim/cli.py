"""The `replay sim` commands: parse, call one function, print."""

from typing import Annotated

import typer

from tracegen.console import make_app, print_json, print_table, say

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
    say("Without 'calibrated', constants are carried over from other models or hardware; --json says which.")
