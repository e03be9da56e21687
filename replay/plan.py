"""What the user asks of a run, and what that comes to on this machine, before anything is started."""

import itertools
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from replay.engines.model_size import weights_mib
from replay.engines.vllm import DEFAULT_MODEL, check_arguments, check_version, inspect_vllm, vllm_installed
from replay.gpu.base import open_gpus
from replay.router import ROUTERS
from replay.sim.arguments import capped, with_arguments
from replay.sim.models import DEFAULT_MODEL as DEFAULT_SIM_MODEL
from replay.sim.profile import DEFAULT_HARDWARE, Profile, load_profile
from replay.source import NOTHING, Survey, TraceSource
from tracegen.durations import NS_PER_S, format_duration
from tracegen.errors import GpuError, ReplayError
from tracegen.schema import read_metadata

_VLLM_WARMUPS = 8  # one for each of the trace's octiles of input length
OVERLONG = ("refuse", "drop", "clip")
ENDPOINTS = ("completions", "chat")
POWER = ("nvml", "csv:FILE", "prometheus:URL")


@dataclass(frozen=True)
class RunOptions:
    """Everything that a run can be asked; the command's options have the same names."""

    trace: Path
    engine: str = "auto"  # auto | sim | vllm | URL
    model: str | None = None
    tp: int | None = None
    replicas: int = 1
    router: str = "session"  # which replica a request goes to
    virtual: bool = False  # in virtual time, without a server
    freq_mhz: int | None = None  # None: the driver's own clocks
    power_cap_w: float | None = None  # None: the driver's own limit
    power: str = "nvml"  # where power is read: nvml | csv:FILE | prometheus:URL
    with_cpu: bool = False
    allow_busy: bool = False
    output: Path | None = None
    resume: Path | None = None  # go on with the run in this directory; everything else is as it was begun
    gpus: tuple[int, ...] | None = None
    port: int | None = None
    hardware: str | None = None  # that the simulated engine simulates: a name or a TOML file; None: a DGX-H100
    vllm_python: str | None = None
    vllm_args: tuple[str, ...] = ()
    record_steps: bool = True
    steps: Path | None = None  # where an attached server's step recorder logs
    num_warmups: int | None = None  # requests an instance before the run; None: 8 for vllm, else 0
    api_key: str | None = field(default=None, repr=False)  # of an attached server; never written down
    duration_ns: int | None = None  # replay this much of the trace
    num_prompts: int | None = None
    time_scale: float = 1.0  # times this much the trace's distances
    ramp_ns: int = 0  # from no load to the trace's own rate
    warmup_ns: int = 0  # what is due within it is sent and not measured
    overlong: str = "refuse"
    exact: bool = True
    max_concurrency: int | None = None
    max_rate_rps: float | None = None
    workers: int | None = None  # processes that send; None: as many as the load needs
    endpoint: str = "completions"  # one of `ENDPOINTS`
    stream: bool = True
    think_time: bool = False  # turns wait for the one before them
    idle_ns: int = 5 * NS_PER_S  # idle power is measured this long, before and after
    ready_timeout_s: float = 600.0
    request_timeout_s: float | None = None
    seed: int = 0
    save_chunks: bool = True
    truth: bool | None = None  # a simulated run's true costs; None: yes, unless a virtual run is large
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A run that could be started: everything that does not need the server has been checked."""

    options: RunOptions
    source: TraceSource  # of the requests that are to be sent, whatever their lengths
    survey: Survey  # of these; of a run in virtual time nothing yet
    block_tokens: int  # of the trace's prefix hashes
    engine: str  # sim | vllm | url
    why_engine: str
    tp: int
    groups: tuple[tuple[int, ...], ...]  # GPUs of each instance; empty where an attached server's are not known
    model: str | None
    run_dir: Path
    warmups: int  # requests an instance
    vllm_versions: dict[str, str]  # of the environment that serves; empty where none is launched
    no_steps: str | None  # why a launched vLLM is not recorded
    weights_mib: float | None  # of the model that is launched, where it is known
    profile: Profile | None  # of the simulated engine

    @property
    def gpus(self) -> tuple[int, ...]:
        """All GPUs that serve."""
        return tuple(gpu for group in self.groups for gpu in group)


def make_plan(options: RunOptions) -> Plan:
    """Check `options` and fill in what they leave open. Raises a `WattraceError` for what cannot be run."""
    check_values(options)
    source = TraceSource(
        options.trace, options.duration_ns, options.num_prompts, time_scale=options.time_scale, ramp_ns=options.ramp_ns
    )
    # In virtual time it is read when the model's context is known, which is before anything is started.
    survey = NOTHING if options.virtual else source.survey()
    if not options.virtual:
        _check_for_trace(options, survey)
    hashed = options.virtual or source.hashed
    block_tokens = read_metadata(options.trace).get("block_tokens", 0) if hashed else 0
    engine, why = choose_engine(options)
    if survey.prioritized:
        check_by_priority(engine, options)
    named = len(options.gpus or ()) // options.replicas
    profile = simulated_profile(options) if engine == "sim" else None
    tp = options.tp or named or (smallest_tp(profile) if profile else 1)
    groups = _choose_gpus(options, engine, tp)
    check_for_engine(options, engine, known_gpus=bool(groups[0]))
    versions: dict[str, str] = {}
    no_steps = None
    if engine == "vllm":
        check_arguments(options.vllm_args)
        versions = inspect_vllm(options.vllm_python)
        no_steps = check_version(versions["vllm"], record_steps=options.record_steps)
        if not options.record_steps:
            no_steps = "asked for with --no-record-steps"
    model = options.model or {"sim": DEFAULT_SIM_MODEL, "vllm": DEFAULT_MODEL}.get(engine)
    warmups = options.num_warmups if options.num_warmups is not None else _VLLM_WARMUPS if engine == "vllm" else 0
    weights = weights_mib(model, options.vllm_args) if engine == "vllm" and model else None
    return Plan(
        options, source, survey, block_tokens, engine, why, tp, groups, model, _run_dir(options, engine, tp), warmups,
        versions, no_steps, weights, profile,
    )  # fmt: skip


def simulated_profile(options: RunOptions) -> Profile:
    """The simulated node and model, as the options want them served."""
    profile = load_profile(options.hardware or DEFAULT_HARDWARE, options.model or DEFAULT_SIM_MODEL)
    capped(profile, options.power_cap_w)  # a cap that cannot be is an error here
    return with_arguments(profile, options.vllm_args)


def smallest_tp(profile: Profile) -> int:
    """The smallest tensor-parallel size that holds the model. Raises `ReplayError` when none does."""
    sizes = profile.tp_sizes()
    if not sizes:
        raise ReplayError(
            f"{profile.name}: {profile.model.weight_bytes / 1e9:.0f} GB of weights and one request of "
            f"{profile.max_model_len} tokens fit at no tensor-parallel size; use a smaller model or other --hardware"
        )
    return sizes[0]


def check_values(options: RunOptions) -> None:
    """Raise `ReplayError` for a value that is wrong with any engine."""
    for name, given, known in (
        ("--overlong", options.overlong, OVERLONG),
        ("--router", options.router, ROUTERS),
        ("--endpoint", options.endpoint, ENDPOINTS),
    ):
        if given not in known:
            raise ReplayError(f"{name} {given}: use one of {', '.join(known)}")
    for name, value in (
        ("--tp", options.tp),
        ("--replicas", options.replicas),
        ("--num-prompts", options.num_prompts),
        ("--time-scale", options.time_scale),
        ("--max-concurrency", options.max_concurrency),
        ("--max-rate", options.max_rate_rps),
        ("--workers", options.workers),
        ("--power-cap", options.power_cap_w),
        ("--ready-check-timeout-sec", options.ready_timeout_s),
        ("--request-timeout-sec", options.request_timeout_s),
    ):
        if value is not None and not 0 < value < math.inf:
            raise ReplayError(f"{name} {value:g}: must be above 0")
    for name, count in (("--seed", options.seed), ("--num-warmups", options.num_warmups or 0)):
        if count < 0:
            raise ReplayError(f"{name} {count}: must not be negative")
    if options.virtual:
        _check_virtual(options)
    if options.power != "nvml" and not options.power.startswith(("csv:", "prometheus:")):
        raise ReplayError(f"--power {options.power}: use one of {', '.join(POWER)}")


def _check_virtual(options: RunOptions) -> None:
    """Raise `ReplayError` for an option that means nothing in virtual time."""
    if options.engine not in {"auto", "sim"}:
        raise ReplayError(f"--virtual with --engine {options.engine}: only the simulated engine runs in virtual time")
    loop = "requests arrive at their times, without a client that could hold them back"
    server = "no server is launched in virtual time"
    for name, given, why in (
        ("--max-concurrency", options.max_concurrency, loop),
        ("--max-rate", options.max_rate_rps, loop),
        ("--workers", options.workers, loop),
        ("--think-time", options.think_time, loop),
        ("--time-scale", options.time_scale != 1, "'tracegen' makes such a trace"),
        ("--ramp", options.ramp_ns, "'tracegen' makes such a trace"),
        ("--warmup", options.warmup_ns, "nothing warms up there; 'analysis latency --steady' leaves the beginning out"),
        ("--endpoint", options.endpoint != RunOptions.endpoint, server),
        ("--no-stream", not options.stream, server),
        ("--port", options.port, server),
        ("--vllm-python", options.vllm_python, server),
        ("--ready-check-timeout-sec", options.ready_timeout_s != RunOptions.ready_timeout_s, server),
        ("--num-warmups", options.num_warmups, "the simulated engine needs no warm-up"),
        ("--request-timeout-sec", options.request_timeout_s, "every request is served to its end"),
        ("--no-ignore-eos", not options.exact, "the simulated engine always writes the trace's lengths"),
        ("--no-record-steps", not options.record_steps, "the steps are what is simulated, and always written"),
        ("--with-cpu", options.with_cpu, "no CPU is simulated"),
        ("--allow-busy", options.allow_busy, "nobody else uses simulated GPUs"),
        ("--idle 0s", options.idle_ns == 0, "idle power costs no time there; leave it out"),
    ):
        if given:
            raise ReplayError(f"{name} with --virtual: {why}")


def check_for_engine(options: RunOptions, engine: str, *, known_gpus: bool) -> None:
    """Raise `ReplayError` for an option that means nothing to `engine`."""
    for name, asked in (("--freq", options.freq_mhz), ("--power-cap", options.power_cap_w)):
        if asked is not None and not known_gpus:
            raise ReplayError(f"{name} with a URL needs --gpus: which GPUs of this host serve it?")
        if asked is not None and options.power != "nvml":
            raise ReplayError(f"{name} needs --power nvml: through {options.power} GPUs can be read, not set")
    if engine == "sim" and options.endpoint != RunOptions.endpoint:
        raise ReplayError(f"--endpoint {options.endpoint}: the simulated engine answers completions only")
    if engine == "sim" and options.power != "nvml":
        raise ReplayError(f"--power {options.power}: a simulated engine draws simulated power only")
    if engine != "sim" and options.hardware is not None:
        raise ReplayError(f"--hardware {options.hardware}: only the simulated engine chooses its hardware")
    if engine == "url":
        _check_for_url(options, known_gpus=known_gpus)
    elif options.steps is not None:
        raise ReplayError("--steps is where an attached server logs its steps; a launched one is followed by itself")
    named = options.model or ""
    if engine == "vllm" and named.startswith(("/", "./", "../", "~")) and not Path(named).expanduser().is_dir():
        raise ReplayError(f"--model {named}: no such folder")


def _check_for_url(options: RunOptions, *, known_gpus: bool) -> None:
    """Raise `ReplayError` for an option that means nothing to a server that somebody else runs."""
    for name, given in (
        ("--vllm-arg", options.vllm_args), ("--vllm-python", options.vllm_python), ("--port", options.port)
    ):  # fmt: skip
        if given:
            raise ReplayError(f"{name} is for a server that replay launches; with a URL it says nothing")
    if options.replicas > 1:
        raise ReplayError("--replicas with a URL: replay launches replicas itself, with --engine vllm or sim")
    if options.power.startswith("csv:") and not known_gpus:
        raise ReplayError(f"--power {options.power} needs --gpus: which of the meter's channels are the server's?")


def check_by_priority(engine: str, options: RunOptions) -> None:
    """Raise `ReplayError` when a trace with priorities would go to a launched server that refuses them.

    vLLM answers a request with a priority by an error unless it schedules by priority.
    """
    words = " ".join(options.vllm_args).replace("_", "-").replace("=", " ").split()
    pairs = list(itertools.pairwise(words))
    # What a file (--config) says is not known here, nor how somebody else's server was started.
    if engine != "url" and ("--scheduling-policy", "priority") not in pairs and "--config" not in words:
        raise ReplayError(
            f"{options.trace}: has priorities, which the server refuses unless it schedules by them: add "
            "--vllm-arg=--scheduling-policy=priority, or drop the column 'priority'"
        )


def _check_for_trace(options: RunOptions, survey: Survey) -> None:
    """Raise `ReplayError` for an option that means nothing to the part of the trace that is to be replayed."""
    last_ns = survey.last_ns
    if options.warmup_ns > last_ns:
        raise ReplayError(
            f"--warmup {format_duration(options.warmup_ns)}: the last request is due after {format_duration(last_ns)}, "
            "so nothing would be measured; give a shorter one"
        )
    if options.ramp_ns > last_ns:
        raise ReplayError(
            f"--ramp {format_duration(options.ramp_ns)}: the last request is due after {format_duration(last_ns)}, "
            "before the rate is the trace's own; give a shorter one"
        )
    if options.think_time and not survey.turns:
        raise ReplayError(
            f"{options.trace}: no request waits for another (columns parent_id and think_ns), so --think-time would "
            "change nothing; leave it out"
        )


def choose_engine(options: RunOptions) -> tuple[str, str]:
    """The engine and, for the first line of output, why."""
    asked = options.engine
    if options.virtual:
        return "sim", "virtual time, asked for with --virtual"
    if asked.startswith(("http://", "https://")):
        if not urlsplit(asked).hostname:
            raise ReplayError(f"--engine {asked}: names no host, such as http://localhost:8000")
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


def _choose_gpus(options: RunOptions, engine: str, tp: int) -> tuple[tuple[int, ...], ...]:
    """The GPUs of each instance: of those named, else the first; none for a URL without --gpus."""
    wanted, gpus = tp * options.replicas, options.gpus
    if gpus is None:
        gpus = () if engine == "url" else tuple(range(wanted))
    else:
        if len(set(gpus)) != len(gpus):
            raise ReplayError(f"--gpus {','.join(map(str, gpus))}: names a GPU twice")
        if len(gpus) != wanted:
            times = f" and --replicas {options.replicas} need" if options.replicas > 1 else " needs"
            raise ReplayError(f"--tp {tp}{times} {wanted} GPUs, but --gpus names {len(gpus)}")
    return tuple(gpus[i * tp : (i + 1) * tp] for i in range(options.replicas))


def _run_dir(options: RunOptions, engine: str, tp: int) -> Path:
    """Where the run goes; a directory that holds something is never written over."""
    if options.resume is not None:
        return options.resume
    if options.output is not None:
        if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
            raise ReplayError(f"{options.output}: exists already; a run is never overwritten, give another -o")
        return options.output
    clock = f"{options.freq_mhz}MHz" if options.freq_mhz else "unlocked"
    stem = re.sub(r"[^\w.-]+", "-", options.trace.stem)
    size = f"tp{tp}" if options.replicas == 1 else f"tp{tp}x{options.replicas}"
    base = f"{stem}-{engine}-{size}-{clock}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    candidates = (Path("runs") / f"{base}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(path for path in candidates if not path.exists())
