"""Does the simulated engine keep its time under load? `python benchmarks/sim_server.py [STREAMS [TOKENS]]`.

Opens STREAMS streams (100) of TOKENS tokens (600) at once on a TP 8 engine and prints tokens per second, the CPU time
that the server spent on each, and how late its loop was at worst. Figures hold for the machine that it runs on.
"""

import asyncio
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import uvloop


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def stream(session: aiohttp.ClientSession, url: str, request_id: int, tokens: int) -> int:
    """Bytes received."""
    body = {
        "prompt": [1] * 500,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    received = 0
    async with session.post(f"{url}/v1/completions", json=body, headers={"X-Request-Id": str(request_id)}) as answer:
        async for data, _ in answer.content.iter_chunks():
            received += len(data)
    return received


async def main(streams: int, tokens: int) -> None:
    """Start the server, load it, print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        files = ["--board", f"{folder}/board", "--record", f"{folder}/run"]
        argv = [sys.executable, "-m", "replay.sim.server", "--port", "0", *files]
        server = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
        url = (await server.stdout.readline()).decode().split()[-1]
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            before_s, start_s = cpu_s(server.pid), time.monotonic()
            await asyncio.gather(*(stream(session, url, i, tokens) for i in range(streams)))
            took_s, used_s = time.monotonic() - start_s, cpu_s(server.pid) - before_s
            async with session.get(f"{url}/metrics") as answer:
                (lag_s,) = re.findall(
                    r"^simulated:engine_lag_seconds_max\{.*\} (\S+)$", await answer.text(), re.MULTILINE
                )
        server.send_signal(signal.SIGTERM)
        await server.wait()
    print(f"{streams} streams x {tokens} tokens in {took_s:.1f} s: {streams * tokens / took_s:,.0f} tokens/s")
    print(f"server CPU: {used_s / took_s:.0%} of a core, {used_s / (streams * tokens) * 1e6:.0f} us a token")
    print(f"loop behind the engine's time: {float(lag_s) * 1e3:.1f} ms at worst")


if __name__ == "__main__":
    uvloop.run(main(*(int(argument) for argument in (*sys.argv[1:3], *("100", "600")[len(sys.argv) - 1 :]))))
