"""What the user asks of a run, and what that comes to on this machine, before anything is started."""

import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from replay.engines.vllm import DEFAULT_MODEL, vllm_installed
from replay.gpu.base import open_gpus
from replay.sim.hardware import load_profile
from tracegen.durations import NS_PER_S
from tracegen.errors import GpuError, ReplayError
from tracegen.schema import read_metadata, read_trace

DEFAULT_PROFILE = "dgx-h100-llama-2-70b"
_SIM_TP = 2  # the smallest that holds Llama-2-70B
OVERLONG = ("refuse", "drop", "clip")


@dataclass(frozen=True)
class RunOptions:
    """Everything that a run can be asked; the command's options have the same names."""

    trace: Path
    engine: str = "auto"  # auto | sim | vllm | URL
    model: str | None = None
    tp: int | None = None
    freq_mhz: int | None = None  # None: the driver's own clocks
    output: Path | None = None
    gpus: tuple[int, ...] | None = None
    port: int | None = None
    profile: str = DEFAULT_PROFILE
    vllm_python: str | None = None
    vllm_args: tuple[str, ...] = ()
    duration_ns: int | None = None  # replay this much of the trace
    num_prompts: int | None = None
    overlong: str = "refuse"
    exact: bool = True
    max_concurrency: int | None = None
    max_rate_rps: float | None = None
    idle_ns: int = 5 * NS_PER_S  # idle power is measured this long, before and after
    ready_timeout_s: float = 600.0
    request_timeout_s: float | None = None
    seed: int = 0
    save_chunks: bool = True
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A run that could be started: everything that does not need the server has been checked."""

    options: RunOptions
    trace: pl.DataFrame
    block_tokens: int  # of the trace's prefix hashes
    engine: str  # sim | vllm | url
    why_engine: str
    tp: int
    gpus: tuple[int, ...]  # those that serve
    model: str | None
    run_dir: Path


def make_plan(options: RunOptions) -> Plan:
    """Check `options` and fill in what they leave open. Raises a `WattraceError` for what cannot be run."""
    if options.overlong not in OVERLONG:
        raise ReplayError(f"--overlong {options.overlong}: use one of {', '.join(OVERLONG)}")
    for name, value in (
        ("--tp", options.tp),
        ("--num-prompts", options.num_prompts),
        ("--max-concurrency", options.max_concurrency),
        ("--max-rate", options.max_rate_rps),
        ("--ready-check-timeout-sec", options.ready_timeout_s),
        ("--request-timeout-sec", options.request_timeout_s),
    ):
        if value is not None and not 0 < value < math.inf:
            raise ReplayError(f"{name} {value:g}: must be above 0")
    if options.seed < 0:
        raise ReplayError(f"--seed {options.seed}: must not be negative")
    trace = _slice(read_trace(options.trace), options)
    block_tokens = read_metadata(options.trace)["block_tokens"] if "prefix_hashes" in trace.columns else 0
    engine, why = _choose_engine(options)
    tp = options.tp or len(options.gpus or ()) or (_SIM_TP if engine == "sim" else 1)
    gpus = _choose_gpus(options, engine, tp)
    if options.freq_mhz is not None and not gpus:
        raise ReplayError("--freq with a URL needs --gpus: which GPUs of this host serve it?")
    if engine == "sim" and options.model not in {None, options.profile}:
        raise ReplayError(
            f"--model {options.model}: the simulated engine serves what its --profile says, {options.profile}"
        )
    model = options.model or {"sim": load_profile(options.profile).name, "vllm": DEFAULT_MODEL}.get(engine)
    return Plan(options, trace, block_tokens, engine, why, tp, gpus, model, _run_dir(options, engine, tp))


def _slice(trace: pl.DataFrame, options: RunOptions) -> pl.DataFrame:
    """The part of the trace that is to be replayed."""
    if options.duration_ns is not None:
        trace = trace.filter(pl.col("arrival_ns") < options.duration_ns)
        if trace.is_empty():
            raise ReplayError(f"{options.trace}: no request arrives within --duration; give a longer one")
    return trace if options.num_prompts is None else trace.head(options.num_prompts)


def _choose_engine(options: RunOptions) -> tuple[str, str]:
    """The engine and, for the first line of output, why."""
    asked = options.engine
    if asked.startswith(("http://", "https://")):
        return "url", f"attached to {asked}"
    if asked == "sim":
        return "sim", "asked for with --engine sim"
    if asked not in {"auto", "vllm"}:
        raise ReplayError(f"--engine {asked}: use auto, sim, vllm, or a server's URL that begins with http://")
    try:
        open_gpus("nvml").close()
    except GpuError as error:
        if asked == "vllm":
            raise
        return "sim", str(error).partition(";")[0]
    if not (vllm_installed() or options.vllm_python):
        raise ReplayError(
            "this machine has a GPU but no vLLM: install it with 'pip install wattrace[vllm]', name an environment "
            "that has it with --vllm-python, or use --engine sim"
        )
    return "vllm", "GPU and vLLM found"


def _choose_gpus(options: RunOptions, engine: str, tp: int) -> tuple[int, ...]:
    """The GPUs that serve: those named, else the first `tp`; none for a URL without --gpus."""
    if options.gpus is not None:
        if len(set(options.gpus)) != len(options.gpus):
            raise ReplayError(f"--gpus {','.join(map(str, options.gpus))}: names a GPU twice")
        if len(options.gpus) != tp:
            raise ReplayError(f"--tp {tp} needs {tp} GPUs, but --gpus names {len(options.gpus)}")
        return options.gpus
    return () if engine == "url" else tuple(range(tp))


def _run_dir(options: RunOptions, engine: str, tp: int) -> Path:
    """Where the run goes; a directory that holds something is never written over."""
    if options.output is not None:
        if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
            raise ReplayError(f"{options.output}: exists already; a run is never overwritten, give another -o")
        return options.output
    clock = f"{options.freq_mhz}MHz" if options.freq_mhz else "unlocked"
    stem = re.sub(r"[^\w.-]+", "-", options.trace.stem)
    base = f"{stem}-{engine}-tp{tp}-{clock}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    candidates = (Path("runs") / f"{base}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(path for path in candidates if not path.exists())


def fit_lengths(trace: pl.DataFrame, max_model_len: int | None, overlong: str) -> tuple[pl.DataFrame, int]:
    """`trace` with every request inside the model's context, and how many were dropped or clipped.

    Raises `ReplayError` with `refuse` when a request is too long. `clip` shortens the input, then the output.
    """
    total = pl.col("input_tokens").cast(pl.Int64) + pl.col("output_tokens")
    if max_model_len is None or not (too_long := trace.filter(total > max_model_len)).height:
        return trace, 0
    count, first = too_long.height, too_long.row(0, named=True)
    if overlong == "drop":
        kept = trace.filter(total <= max_model_len)
        if kept.is_empty():
            raise ReplayError(
                f"every request is longer than the model's {max_model_len} tokens; nothing is left to send"
            )
        return kept, count
    if overlong == "clip":
        output = pl.min_horizontal(pl.col("output_tokens"), pl.lit(max_model_len - 1, pl.UInt32))
        input_ = pl.min_horizontal(pl.col("input_tokens"), (max_model_len - output).cast(pl.UInt32))
        return trace.with_columns(input_.alias("input_tokens"), output.alias("output_tokens")), count
    raise ReplayError(
        f"{count} of {trace.height} requests are longer than the model's {max_model_len} tokens (request_id "
        f"{first['request_id']}: {first['input_tokens']} + {first['output_tokens']}); use --overlong drop or clip"
    )
