"""The simulated engine behind vLLM's HTTP API: `python -m replay.sim.server --port 8000 --board PATH --record DIR`."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
import uvloop
from aiohttp import web

from replay.clock import SleepTimer
from replay.gpu.sim import SimBoard
from replay.sim.api import RECORD_PATH, Answer, ApiError, Completion, parse_completion
from replay.sim.arguments import with_arguments
from replay.sim.blocks import content_keys
from replay.sim.engine import Engine, Stream
from replay.sim.hardware import Hardware, Profile, load_profile
from replay.sim.metrics import render
from replay.sim.models import DEFAULT_MODEL
from replay.sim.profile import DEFAULT_HARDWARE
from replay.sim.scheduler import Request, Scheduler
from replay.steps import SIM_STEP, StepWriter
from tracegen.console import make_app, note, run_app, say
from tracegen.errors import ReplayError

_FLUSH_S = 0.8  # with the time of writing, what a killed engine loses stays below a second
_MAX_BODY_BYTES = 64 * 2**20  # far beyond max_model_len, so that an overlong prompt is told so
_REQUEST_ID_HEADER = "X-Request-Id"
_IDLE_S = 0.01
_GRACE_S = 0.1  # for open streams at the end; their tokens will not come any more
_BACKLOG = 1024  # open-loop clients connect in bursts
_MAX_REQUEST_ID = 2**64 - 1


@dataclass(frozen=True)
class Settings:
    """What `serve` needs to know."""

    profile: Profile
    tp: int
    gpus: tuple[int, ...]  # board indices
    board: Path  # made when missing
    record: Path  # the run directory that steps and segments go to
    model: str
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    instance: int = 0
    first_step: int = 0  # where the numbers of its steps begin
    exit_with_parent: bool = False  # stop when stdin closes
    record_root: Path | None = None  # other run directories below it can be told to the running server


class Api:
    """The HTTP handlers of one engine."""

    def __init__(
        self, engine: Engine, scheduler: Scheduler, profile: Profile, model: str, recording: "Recording"
    ) -> None:
        """`scheduler` is the engine's, asked here only whether a request fits."""
        self._recording = recording
        self._engine, self._scheduler, self._profile, self._model = engine, scheduler, profile, model
        self._start_s = int(time.time())

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.add_routes(
            [
                web.post("/v1/completions", self.completions),
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
                web.get("/version", self.version),
                web.get("/metrics", self.metrics),
            ]
        )
        if self._recording.root is not None:
            app.add_routes([web.post(RECORD_PATH, self.record)])
        return app

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """One completion, streamed or whole; a client that goes away aborts it."""
        try:
            completion = parse_completion(await http.read(), self._model, self._profile, self._scheduler.fits)
        except ApiError as error:
            return web.Response(status=error.status, body=error.body(), content_type="application/json")
        name = http.headers.get(_REQUEST_ID_HEADER) or uuid.uuid4().hex
        request = Request(
            _integer_id(name), completion.prompt_tokens, completion.output_tokens, keys=self._keys(completion),
            priority=completion.priority,
        )  # fmt: skip
        answer = Answer(completion, f"cmpl-{name}", self._model, int(time.time()), lambda: request.cached_tokens)
        stream = self._engine.submit(request)
        try:
            if completion.stream:
                return await _send_stream(http, stream, answer, name)
            return await _send_whole(completion, stream, answer, name)
        finally:
            self._engine.abort(stream)

    def _keys(self, completion: Completion) -> list[int]:
        """Content keys of a prompt's blocks, by which the prefix cache knows them; a text has no tokens to compare."""
        if completion.token_ids is None or not self._profile.enable_prefix_caching:
            return []
        tokens = np.array(completion.token_ids, dtype=np.uint64)
        keys: list[int] = content_keys(tokens, self._profile.block_tokens).tolist()
        return keys

    async def models(self, _: web.Request) -> web.Response:
        """The one model."""
        card = {
            "id": self._model,
            "object": "model",
            "created": self._start_s,
            "owned_by": "wattrace (simulated)",
            "root": self._profile.name,
            "parent": None,
            "max_model_len": self._profile.max_model_len,
            "permission": [],
        }
        return _json({"object": "list", "data": [card]})

    async def health(self, _: web.Request) -> web.Response:
        """An empty answer: the process ends when its engine does."""
        return web.Response()

    async def version(self, _: web.Request) -> web.Response:
        """Whose version this is, and that it is simulated."""
        return _json({"version": f"wattrace {version('wattrace')} (simulated)"})

    async def record(self, http: web.Request) -> web.Response:
        """Let the engine end what it does, and record into another run directory; without one, nowhere."""
        name = (await http.json()).get("run_dir")
        while not self._engine.idle:  # noqa: ASYNC110 - a step under way is milliseconds long
            await asyncio.sleep(_IDLE_S)
        try:
            await self._recording.move(None if name is None else Path(name))
        except ReplayError as error:
            return web.Response(status=400, text=str(error))
        return web.Response()

    async def metrics(self, _: web.Request) -> web.Response:
        """Counters in Prometheus's text format."""
        text = render(self._engine.metrics, self._engine.gauges(), self._engine.preemptions, self._model)
        return web.Response(text=text, content_type="text/plain")


def _json(document: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(document), content_type="application/json")


def _integer_id(name: str) -> int | None:
    """The request's id as the run directory knows it, None where the header is no such integer."""
    number = int(name) if name.isascii() and name.isdecimal() and len(name) <= len(str(_MAX_REQUEST_ID)) else None
    return number if number is not None and number <= _MAX_REQUEST_ID else None


async def _send_stream(http: web.Request, stream: Stream, answer: Answer, name: str) -> web.StreamResponse:
    """One server-sent event, and one write, a token."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", _REQUEST_ID_HEADER: name}
    )
    with contextlib.suppress(ConnectionResetError):  # the client went away; the caller aborts its request
        await response.prepare(http)
        last = False
        while not last:
            last = await stream.tokens.get()
            await response.write(answer.event(last=last))
    return response


async def _send_whole(completion: Completion, stream: Stream, answer: Answer, name: str) -> web.Response:
    """The answer when all tokens are there."""
    for _ in range(completion.output_tokens):
        await stream.tokens.get()
    return web.Response(body=answer.whole(), content_type="application/json", headers={_REQUEST_ID_HEADER: name})


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT (or the parent's end, if asked); all steps are written when this returns.

    Raises `ReplayError` for a TP that does not match the GPUs, an unknown GPU or a port that cannot be opened.
    """
    profile, hardware = settings.profile, Hardware(settings.profile, settings.tp)
    if len(settings.gpus) != settings.tp or len(set(settings.gpus)) != settings.tp:
        named = ",".join(map(str, settings.gpus))
        raise ReplayError(f"--tp {settings.tp} needs {settings.tp} different GPUs; --gpus names {named}")
    with _listen(settings.host, settings.port) as listener, _board(settings) as board, SleepTimer() as timer:
        for gpu in settings.gpus:
            board.clock_mhz(gpu)  # refuses a GPU that does not exist before anything is written
        recorder = StepWriter(settings.record, settings.instance, extra=SIM_STEP)
        recorder.skip(settings.first_step)
        scheduler = Scheduler(hardware.limits)
        engine = Engine(scheduler, hardware, board, settings.gpus, recorder, sleep_until_ns=timer.sleep_until_ns)
        recording = Recording(recorder, settings.record_root)
        app = Api(engine, scheduler, profile, settings.model, recording).application()
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_GRACE_S)
        await runner.setup()
        _stop_on_signals(engine, exit_with_parent=settings.exit_with_parent)
        note("loading the simulated engine; its first start on a machine compiles it, which takes half a minute")
        engine.load()
        try:
            await web.SockSite(runner, listener).start()
            say(f"SIMULATED engine: {settings.model} on {settings.tp} x {profile.gpu_name} at {_url(listener)}")
            await _run(engine, recording)
        finally:
            await runner.cleanup()


class Recording:
    """Who writes what an engine did, and where."""

    def __init__(self, recorder: StepWriter, root: Path | None) -> None:
        """`root`: the folder below which all run directories are that it may be moved to."""
        self.root = None if root is None else root.resolve()
        self._recorder, self._writing = recorder, asyncio.Lock()

    async def flush(self) -> None:
        """Write what was recorded, in a thread."""
        async with self._writing:
            await asyncio.to_thread(self._recorder.write, self._recorder.take())

    async def move(self, run_dir: Path | None) -> None:
        """Write what was recorded, then record into `run_dir`. Raises `ReplayError` for one that may not be."""
        await self.flush()
        self._recorder.move(None if run_dir is None else self._allowed(run_dir))

    def _allowed(self, run_dir: Path) -> Path:
        if self.root is None or not run_dir.resolve().is_relative_to(self.root):
            raise ReplayError(f"{run_dir} is not below {self.root}")
        return run_dir


async def _run(engine: Engine, recording: Recording) -> None:
    """Run `engine` to its end, writing what it did as it goes."""
    ended = asyncio.Event()

    async def flush() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), _FLUSH_S)
            await recording.flush()

    async with asyncio.TaskGroup() as group:
        group.create_task(flush())
        try:
            await engine.run()
        finally:
            ended.set()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ReplayError` when it cannot be had."""
    try:
        return socket.create_server((host, port), backlog=_BACKLOG)
    except OSError as error:
        # A name that does not resolve has a negative number and says why in its text.
        why = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error)
        raise ReplayError(f"cannot listen on {host} port {port}: {why}; choose another --port or --host") from None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}"


def _board(settings: Settings) -> SimBoard:
    """The simulated driver's board, made when there is none yet."""
    return SimBoard(settings.board) if settings.board.exists() else SimBoard.create(settings.board, settings.profile)


def _stop_on_signals(engine: Engine, *, exit_with_parent: bool) -> None:
    """Stop `engine` on SIGTERM and SIGINT, and when stdin closes if asked."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, engine.stop)

    def watch_stdin() -> None:
        # os.read, not sys.stdin: a thread that waits inside a buffered reader breaks the interpreter's exit.
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop has closed: we are stopping already
            loop.call_soon_threadsafe(engine.stop)

    if exit_with_parent:
        threading.Thread(target=watch_stdin, daemon=True).start()


app = make_app("The simulated engine: vLLM's HTTP API over simulated hardware.")


@app.command()
def main(
    board: Annotated[Path, typer.Option(help="File of the simulated GPUs; made when missing.")],
    record: Annotated[Path, typer.Option(help="Run directory that steps.parquet and segments.parquet go to.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.", min=0, max=65535)] = 8000,
    hardware: Annotated[
        str, typer.Option(help="Simulated node: see `replay sim profiles`, or a TOML file.")
    ] = DEFAULT_HARDWARE,
    model: Annotated[
        str, typer.Option(help="Simulated model: see `replay sim profiles`, or a folder with config.json.")
    ] = DEFAULT_MODEL,
    tp: Annotated[int, typer.Option(help="Tensor-parallel size: GPUs that serve together.", min=1)] = 8,
    gpus: Annotated[str, typer.Option(help="Their indices, for example 0,1; the first ones if not given.")] = "",
    served_model_name: Annotated[
        str, typer.Option(help="Name that the model is served under; --model's if not given.")
    ] = "",
    instance: Annotated[int, typer.Option(help="Number of this engine in the run directory.", min=0, max=65535)] = 0,
    first_step: Annotated[int, typer.Option(help="Number of its first step.", min=0)] = 0,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="Option of `vllm serve` on batching, repeatable.", show_default="none")
    ] = None,
    exit_with_parent: Annotated[bool, typer.Option("--exit-with-parent", help="Stop when stdin closes.")] = False,
    record_root: Annotated[
        Path | None, typer.Option(help="Folder of further run directories; a sweep names them.", show_default="none")
    ] = None,
) -> None:
    """Serve a SIMULATED model: real HTTP and real waiting, computed step times and power.

    \b
    Examples:
      python -m replay.sim.server --board /tmp/board --record /tmp/run
      python -m replay.sim.server --board /tmp/board --record /tmp/run --tp 2 --gpus 0,1 --port 8001
    """  # noqa: D301 - the help formatter's mark is the backspace itself
    settings = Settings(
        profile=with_arguments(load_profile(hardware, model), vllm_arg or ()),
        tp=tp,
        gpus=_parse_gpus(gpus) or tuple(range(tp)),
        board=board,
        record=record,
        model=served_model_name or model,
        host=host,
        port=port,
        instance=instance,
        first_step=first_step,
        exit_with_parent=exit_with_parent,
        record_root=record_root,
    )
    uvloop.run(serve(settings))


def _parse_gpus(text: str) -> tuple[int, ...]:
    """Indices as in `0,1`. Raises `ReplayError` for anything else."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ReplayError(f"--gpus {text}: give GPU indices separated by commas, for example 0,1") from None


if __name__ == "__main__":
    run_app(app)
