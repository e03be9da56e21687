"""The general path of a load worker: aiohttp in an event loop, for servers that the fast path cannot speak to."""

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import uvloop

from replay.caps import Caps
from replay.client import CompletionsClient, tell_reuse
from replay.clock import now_ns
from replay.dispatch import StallMeter, dispatch
from replay.reqlog import RequestLog
from replay.shards import read_rows
from replay.tally import Tally
from replay.workload import PATHS, Config, Job, Workload, through_proxies

_HOUSE_S = 0.25


class GeneralPath:
    """Sends a worker's requests and reads their answers, until all have ended or it is told to stop."""

    def __init__(self, config: Config, tell: Callable[[Mapping[str, Any]], None], *, stop_fd: int = 0) -> None:
        """Make the first requests; the end of `stop_fd` ends the sending."""
        self._config, self._tell, self._stop_fd = config, tell, stop_fd
        self.tally = Tally()
        self._log = RequestLog(config.path, config.worker, save_chunks=config.save_chunks)
        self._work = Workload(config, read_rows(config.path, config.worker))
        self._in_flight: dict[Job, None] = {}
        self._loads = [0] * len(config.base_urls)
        self._stalls = StallMeter()
        self._tokens_ended = 0

    def last_message(self) -> dict[str, Any]:
        """What there is to say at the end."""
        self.tally.tokens = self._tokens_ended
        return self.tally.last_message(steps=0, stamp_error_ns=None)

    def run(self, epoch_ns: int) -> None:
        """Send from `epoch_ns` on; afterwards every request that was due has its record in the log.

        Raises `OSError` when the log cannot be written, and what a bug raises.
        """
        self._work.begin(epoch_ns)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())
        self._log.write()
        self._log.close()

    async def _run(self) -> None:
        config = self._config
        # No limit: how many streams are open is the load's business. Idle connections are dropped before uvicorn, which
        # serves vLLM, closes them after 5 s: a request sent into that moment would fail for no fault of the server.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4, ttl_dns_cache=3600)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(),
            headers=config.headers,
            trust_env=any(map(through_proxies, config.base_urls)),
            trace_configs=[tell_reuse()],
        ) as session:
            clients = [
                CompletionsClient(
                    session, url, config.request_timeout_s, path=PATHS[config.endpoint], stream=config.stream
                )
                for url in config.base_urls
            ]
            caps = Caps(config.max_concurrency, config.max_rate_rps)

            async def send(job: Job) -> None:
                await self._send(job, clients, caps)

            sending = asyncio.create_task(dispatch(self._work, send))
            asyncio.get_running_loop().add_reader(self._stop_fd, self._hear, sending)
            house = [asyncio.create_task(self._keep_house(sending)), asyncio.create_task(self._stalls.run())]
            try:
                with contextlib.suppress(asyncio.CancelledError):
                    await sending
            finally:
                asyncio.get_running_loop().remove_reader(self._stop_fd)
                for task in house:
                    task.cancel()
                ended = await asyncio.gather(*house, return_exceptions=True)
            for error in ended:
                if isinstance(error, Exception):
                    raise error

    async def _send(self, job: Job, clients: list[CompletionsClient], caps: Caps) -> None:
        record, tally = job.record, self.tally
        tally.due += 1
        if record.instance < 0:
            record.instance = self._loads.index(min(self._loads))
        self._loads[record.instance] += 1
        try:
            async with caps.open():
                self._in_flight[job] = None
                record.sent_ns = now_ns()
                tally.send(record)
                try:
                    await clients[record.instance].send(record, job.body, self._config.name(record.request_id))
                finally:
                    del self._in_flight[job]
                    tally.first_token(record)
                    tally.end(record)
                    self._tokens_ended += record.output_tokens or 0
        finally:
            self._loads[record.instance] -= 1
            self._log.add(record)
            self._work.ended(record, now_ns())

    async def _keep_house(self, sending: "asyncio.Task[None]") -> None:
        """Write the log and tell how it stands, a few times a second."""
        try:
            while True:
                await asyncio.sleep(_HOUSE_S)
                self._log.write()
                self.tally.stall_ns, self._stalls.worst_ns = self._stalls.worst_ns, 0
                open_ = [job.record for job in self._in_flight]
                self.tally.tokens = self._tokens_ended + sum(record.output_tokens or 0 for record in open_)
                self._tell(self.tally.message(open_))
        except OSError:
            sending.cancel()
            raise

    def _hear(self, sending: "asyncio.Task[None]") -> None:
        if not os.read(self._stop_fd, 4096):
            sending.cancel()
