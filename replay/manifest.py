"""The manifest's beginning: who, where, with what arguments and versions."""

import contextlib
import platform
import re
import socket
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from replay.clock import now_ns
from replay.engines.vllm import take_secrets
from replay.plan import Plan, RunOptions
from replay.sim.profile import Profile, constants
from tracegen.schema import file_sha256


def first_manifest(plan: Plan, run_id: str) -> dict[str, Any]:
    """What is known before anything is started."""
    options = plan.options
    return {
        "state": "starting",
        "run_id": run_id,
        "engine": {"sim": "simulated", "vllm": "vllm", "url": "attached"}[plan.engine],
        "simulated_profile": None if plan.profile is None else _simulated(plan.profile),
        "instances": [
            {
                "instance": number,
                "host": host(),
                "gpus": list(group),
                "tp": plan.tp,
                "freq_mhz": None,
                "freq_asked_mhz": options.freq_mhz,
                "power_cap_w": None,
                "model": plan.model,
                "max_model_len": None,
            }
            for number, group in enumerate(plan.groups)
        ],
        "gpus": [],
        "hosts": [{"host": host(), "offset_ns": 0, "offset_error_ns": 0}],
        "workers": [{"worker": 0, "host": host()}],
        "clock_anchors": [anchor()],
        "trace_sha256": file_sha256(options.trace),
        "arguments": _arguments(options),
        "seed": options.seed,
        "metadata": options.metadata,
        "versions": _versions() | {f"engine {name}": text for name, text in plan.vllm_versions.items()},
        "verdicts": [],
    }


def _simulated(profile: Profile) -> dict[str, Any]:
    """What was simulated, with every constant: the run can be computed again when the profiles have changed."""
    return {
        "hardware": profile.hardware,
        "model": profile.model_name,
        "calibrated": profile.calibrated,
        "assumed": list(profile.assumed),
        "constants": constants(profile),
    }


def _arguments(options: RunOptions) -> dict[str, Any]:
    """What was asked, without keys and tokens."""
    shown = asdict(options) | {
        "vllm_args": take_secrets(options.vllm_args)[0],
        "engine": re.sub(r"//[^/@]*@", "//***@", options.engine),  # a user and password in the URL
    }
    del shown["api_key"]
    return {key: str(value) if isinstance(value, Path) else value for key, value in shown.items()}


def _versions() -> dict[str, str]:
    """The versions that a figure may depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("wattrace", "polars", "pyarrow", "numpy", "aiohttp", "uvloop", "nvidia-ml-py"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def anchor() -> dict[str, int]:
    """One instant on both clocks: the only place where wall time is kept."""
    return {"monotonic_ns": now_ns(), "unix_ns": time.time_ns()}


def host() -> str:
    """This host's name, as all tables and the manifest call it."""
    return socket.gethostname()
