"""The live figures over HTTP: what a scraper reads is what the snapshot says, in Prometheus' format and units."""

import asyncio
import http.client
import re
import socket
from pathlib import Path

import pytest

from replay.exposition import METRICS, WatchedProgress, exposition, serve_metrics
from replay.live import QuietProgress, Snapshot
from tracegen.errors import ReplayError

MS = 1_000_000
NOTHING = Snapshot(0, 60_000 * MS, 10, 0, 0, 0, *[None] * 7)
MIDWAY = Snapshot(
    30_000 * MS, 60_000 * MS, 2000, 1500, 1400, 2, 0.2 * MS, 1.5 * MS, 80 * MS, 400 * MS, 1234.5, 2500.4, 1200,
    target_rps=50.0, sent_rps=49.5, tbt_p50_ns=39 * MS, tbt_p99_ns=61 * MS, joules_per_token=2.5, simulated=True,
)  # fmt: skip
SAMPLE = re.compile(r'([a-z_]+)(\{quantile="0\.(?:5|99)"\})? (\S+)')


def samples(text):
    """Name and labels of each sample, and its value; a line of another form fails."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {match[1] + (match[2] or ""): float(match[3]) for match in map(SAMPLE.fullmatch, lines)}


def test_every_figure_is_told_in_base_units():
    assert samples(exposition(MIDWAY)) == {
        "wattrace_simulated": 1, "wattrace_elapsed_seconds": 30, "wattrace_planned_seconds": 60,
        "wattrace_planned_requests": 2000, "wattrace_sent_requests_total": 1500,
        "wattrace_ended_requests_total": 1400, "wattrace_failed_requests_total": 2,
        "wattrace_in_flight_requests": 100, "wattrace_target_requests_per_second": 50,
        "wattrace_sent_requests_per_second": 49.5, 'wattrace_dispatch_lag_seconds{quantile="0.5"}': 0.0002,
        'wattrace_dispatch_lag_seconds{quantile="0.99"}': 0.0015, 'wattrace_ttft_seconds{quantile="0.5"}': 0.08,
        'wattrace_ttft_seconds{quantile="0.99"}': 0.4, 'wattrace_tbt_seconds{quantile="0.5"}': 0.039,
        'wattrace_tbt_seconds{quantile="0.99"}': 0.061, "wattrace_output_tokens_per_second": 1234.5,
        "wattrace_power_watts": 2500.4, "wattrace_joules_per_output_token": 2.5, "wattrace_sm_clock_hertz": 1.2e9,
    }  # fmt: skip


def test_what_was_not_measured_has_no_sample_but_its_name_is_there():
    assert samples(exposition(None)) == {}
    told = samples(exposition(NOTHING))
    assert told["wattrace_planned_requests"] == 10
    assert not [name for name in told if "watts" in name or "quantile" in name]
    for text in (exposition(None), exposition(NOTHING), exposition(MIDWAY)):
        assert re.findall(r"^# TYPE (\S+) (?:counter|gauge)$", text, re.MULTILINE) == [m.name for m in METRICS]
        assert text.endswith("\n")


def scrape(port, target="/metrics", method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, target)
    answer = connection.getresponse()
    return answer.status, answer.getheader("Content-Type"), answer.read().decode()


def test_a_scraper_reads_the_latest_state_and_nothing_is_served_afterwards():
    told = []

    class Said(QuietProgress):
        def say(self, message):
            told.append(message)

    async def run():
        watched = WatchedProgress(Said())
        async with serve_metrics(0, watched):
            port = int(re.fullmatch(r"metrics at http://127.0.0.1:(\d+)/metrics", told[0])[1])
            before = await asyncio.to_thread(scrape, port)
            watched.update(MIDWAY)
            during = await asyncio.to_thread(scrape, port, "/metrics?x=1")
            others = [await asyncio.to_thread(scrape, port, *words) for words in (["/"], ["/metrics", "POST"])]
            # One that sends nonsense, or says nothing and leaves, holds nobody up.
            for words in (b"\r\n\r\n", b"x" * 20_000, b""):
                with socket.create_connection(("127.0.0.1", port)) as rude:
                    rude.sendall(words)
            head = await asyncio.to_thread(scrape, port, "/metrics", "HEAD")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.to_thread(scrape, port)
        return before, during, others, head

    before, during, others, head = asyncio.run(run())
    assert before[:2] == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert samples(before[2]) == {}
    assert samples(during[2]) == samples(exposition(MIDWAY))
    assert [status for status, _, _ in others] == [404, 405]
    assert head == (200, before[1], "")


def test_a_port_that_is_taken_is_an_error_before_anything_runs():
    async def run(port):
        async with serve_metrics(port, WatchedProgress(QuietProgress())):
            pytest.fail("it was served")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ReplayError, match=f"--prometheus-port {port}: cannot be had on 127.0.0.1"):
            asyncio.run(run(port))


def test_the_page_has_every_metric():
    page = (Path(__file__).parents[2] / "docs" / "live.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(wattrace_\w+)", page, re.MULTILINE) == [metric.name for metric in METRICS]
