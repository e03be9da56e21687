"""Arguments and options that several `tracegen` commands take."""

from pathlib import Path
from typing import Annotated

import typer

TraceFile = Annotated[Path, typer.Argument(metavar="FILE", help="A trace file (Parquet).", show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers; the same seed gives the same file.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite whatever file is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with figures in full.")]
