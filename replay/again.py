"""The command that repeats a run, rebuilt from its manifest; that of its trace is in `tracegen.commands`."""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import msgspec

from replay.plan import RunOptions
from replay.rundir import Run
from tracegen.durations import exact_duration
from tracegen.errors import RunError
from tracegen.schema import file_sha256

# Of each argument its option; two names: what turns it on and what turns it off.
OPTIONS: dict[str, str | tuple[str | None, str | None]] = {
    "engine": "--engine",
    "model": "--model",
    "tp": "--tp",
    "replicas": "--replicas",
    "router": "--router",
    "virtual": ("--virtual", None),
    "freq_mhz": "--freq",
    "power_cap_w": "--power-cap",
    "power": "--power",
    "with_cpu": ("--with-cpu", None),
    "allow_busy": ("--allow-busy", None),
    "gpus": "--gpus",
    "port": "--port",
    "hardware": "--hardware",
    "vllm_python": "--vllm-python",
    "vllm_args": "--vllm-arg",
    "record_steps": ("--record-steps", "--no-record-steps"),
    "steps": "--steps",
    "num_warmups": "--num-warmups",
    "duration_ns": "--duration",
    "num_prompts": "--num-prompts",
    "time_scale": "--time-scale",
    "ramp_ns": "--ramp",
    "warmup_ns": "--warmup",
    "overlong": "--overlong",
    "exact": ("--ignore-eos", "--no-ignore-eos"),
    "max_concurrency": "--max-concurrency",
    "max_rate_rps": "--max-rate",
    "workers": "--workers",
    "endpoint": "--endpoint",
    "stream": ("--stream", "--no-stream"),
    "think_time": ("--think-time", None),
    "idle_ns": "--idle",
    "ready_timeout_s": "--ready-check-timeout-sec",
    "request_timeout_s": "--request-timeout-sec",
    "seed": "--seed",
    "save_chunks": ("--save-chunks", "--no-save-chunks"),
    "truth": ("--truth", "--no-truth"),
    "metadata": "--metadata",
}
# What says where things are, or is never written down; a repetition has its own.
PLACES = {"trace", "output", "resume", "api_key"}
# A run's own trace.parquet is what was left after these.
_CUT = {"duration_ns", "num_prompts", "time_scale", "ramp_ns", "overlong"}


def options_of(manifest: Mapping[str, Any]) -> RunOptions:
    """The options that a run was asked with, but for its keys. Raises `RunError` when the manifest does not tell."""
    arguments = manifest.get("arguments")
    unknown = sorted(set(arguments or ()) - {field.name for field in fields(RunOptions)})
    if unknown:
        raise RunError(f"the manifest's arguments have {', '.join(unknown)}, which this program does not know")
    try:
        return msgspec.convert(arguments, RunOptions, dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as error:
        raise RunError(f"the manifest's arguments do not tell how the run was asked for ({error})") from None


def find_trace(run: Run, options: RunOptions) -> Path | None:
    """The trace that was replayed, byte for byte: as it was named, from here or from where the run was started."""
    place = run.path.resolve()
    up = 2 if options.output is None else len(options.output.parts)  # the default is under runs/
    started = place.parents[up - 1] if up <= len(place.parents) else place
    for path in (options.trace, started / options.trace):
        if path.is_file() and file_sha256(path) == run.manifest["trace_sha256"]:
            return path
    return None


def replay_command(options: RunOptions, output: Path, own_trace: Path | None = None) -> str:
    """The `replay run` line that asks for `options`, quoted for a shell; what has its default is left out.

    `own_trace`: the run's own trace.parquet, where that must stand in for the trace that it was cut from.
    """
    words = ["replay", "run", str(own_trace or options.trace)]
    for field in fields(RunOptions):
        value = getattr(options, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name not in PLACES and value != default and not (own_trace and field.name in _CUT):
            words += _words(field.name, value)
    return shlex.join([*words, "-o", str(output)])


def _words(name: str, value: Any) -> list[str]:
    """One argument as the command takes it."""
    option = OPTIONS[name]
    if isinstance(option, tuple):
        switch = option[0] if value else option[1]
        assert switch is not None, f"{name} has no option for {value}"
        return [switch]
    if name.endswith("_ns"):
        return [option, exact_duration(value)]
    if name == "gpus":
        return [option, ",".join(map(str, value))]
    if isinstance(value, Mapping):
        return [word for key, text in value.items() for word in (option, f"{key}={text}")]
    if isinstance(value, tuple):
        return [f"{option}={text}" for text in value]  # a text may itself begin with hyphens
    return [option, str(value)]
