"""The commands `replay probe` and `replay clocks`, and how GPUs are named on a command line."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from tracegen.console import make_app, note, print_json, print_table, prose, say
from tracegen.durations import parse_duration_ns
from tracegen.errors import GpuError, ReplayError

clocks_app = make_app("Show how GPUs run, and give them back to their driver.")

AllGpus = Annotated[str | None, typer.Option("--gpus", help="GPUs, for example 0,1.", show_default="all")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def probe(
    gpus: AllGpus = None,
    seconds: Annotated[float, typer.Option(help="How long each GPU is watched under load, s.", min=2)] = 20.0,
    idle: Annotated[str, typer.Option(help="How long each GPU is watched at rest.")] = "5s",
    load: Annotated[bool, typer.Option(help="Load the GPU on and off; without, windows and lags stay unknown.")] = True,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="where runs look for it")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how this machine's power sensors behave: period, window, lag, counter step, idle power.

    What is found is used by every later run on that GPU, in place of what is published for its model. The GPUs must
    be free.

    \b
    Examples:
      replay probe
      replay probe --gpus 0 --seconds 60
      replay probe --gpus 0 --no-load --json
    """
    from dataclasses import asdict

    from replay.gpu.probe import probe_gpus
    from replay.gpu.sensor_profiles import lines

    idle_s = parse_duration_ns(idle) / 1e9
    found = probe_gpus(
        "nvml", parse_gpus(gpus), with_load=load, idle_s=idle_s, seconds=seconds, output=output, say=note
    )
    if as_json:
        print_json([{**asdict(profile), "file": str(path)} for profile, path in found])
        return
    for profile, path in found:
        prose(lines(profile))
        say(f"wrote {path}")


@clocks_app.command("show")
def clocks_show(as_json: AsJson = False) -> None:
    """Show each GPU's clocks, power, limits and processes.

    Whether a clock is locked no driver tells: see the clock beside its range, and what throttles it.

    \b
    Examples:
      replay clocks show
      replay clocks show --json
    """
    from replay.gpu.base import open_gpus
    from replay.gpu.clocks import show

    with closing(open_gpus("nvml")) as gpus:
        entries = show(gpus)
    if as_json:
        print_json(entries)
        return
    columns = ["GPU", "name", "SM clock", "of", "power", "limit", "temperature", "throttled by", "processes"]
    print_table(columns, [_clock_row(entry) for entry in entries], left=[True] * 2 + [False] * 5 + [True] * 2)


@clocks_app.command("reset")
def clocks_reset(gpus: AllGpus = None) -> None:
    """Unlock the SM clocks and restore the default power limits.

    A run gives back what it set by itself, also when it is killed; this is for what others left.

    \b
    Examples:
      replay clocks reset
      replay clocks reset --gpus 0,1
    """
    from replay.gpu.base import open_gpus
    from replay.gpu.clocks import reset

    with closing(open_gpus("nvml")) as opened:
        indices = parse_gpus(gpus) or tuple(device.gpu for device in opened.devices())
        done, refused = reset(opened, indices)
    prose(done)
    if refused:
        raise GpuError("; ".join(refused))


def _clock_row(entry: dict[str, Any]) -> list[str]:
    """A GPU of `replay clocks show` as cells."""
    if entry["error"] is not None:
        return [str(entry["gpu"]), entry["name"], *["-"] * 5, entry["error"], "-"]

    def number(value: float | None, unit: str) -> str:
        return "-" if value is None else f"{value:,.0f} {unit}"

    clocks = f"{entry['sm_clock_lowest_mhz'] or '?'}-{entry['sm_clock_highest_mhz'] or '?'}"
    processes = [f"{process['pid']} {process['name'] or ''}".strip() for process in entry["processes"]]
    return [
        str(entry["gpu"]), entry["name"], number(entry["sm_clock_mhz"], "MHz"), clocks, number(entry["power_w"], "W"),
        number(entry["power_limit_w"], "W"), number(entry["temperature_c"], "°C"),
        ", ".join(entry["throttled_by"] or []) or "-", ", ".join(processes) or "-",
    ]  # fmt: skip


def parse_gpus(text: str | None) -> tuple[int, ...] | None:
    """Indices as in `0,1` or `0-3`. Raises `ReplayError` for anything else."""
    if text is None:
        return None
    result: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            result += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ReplayError(f"--gpus {text}: give GPU indices, for example 0,1 or 0-3") from None
    return tuple(result)
