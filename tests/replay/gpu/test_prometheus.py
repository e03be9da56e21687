"""A DCGM exporter's text becomes readings, one scrape a poll, and what it does not tell stays null."""

import asyncio
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import polars as pl
import pytest

from replay.gpu import prometheus as prometheus_module
from replay.gpu.base import Reading, open_power
from replay.gpu.prometheus import PrometheusPower
from replay.gpu.sampler import Sampler
from replay.rundir import scan_table
from tracegen.errors import GpuError

NAMES = {
    "POWER_USAGE": "Power draw (in W).",
    "TOTAL_ENERGY_CONSUMPTION": "Total energy consumption since boot (in mJ).",
    "SM_CLOCK": "SM clock frequency (in MHz).",
    "MEM_CLOCK": "Memory clock frequency (in MHz).",
    "GPU_TEMP": "GPU temperature (in C).",
    "GPU_UTIL": "GPU utilization (in %).",
    "FB_USED": "Framebuffer memory used (in MiB).",
}
USUAL = {
    "POWER_USAGE": "312.457000",
    "TOTAL_ENERGY_CONSUMPTION": "123456789012",
    "SM_CLOCK": "1980",
    "MEM_CLOCK": "2619",
    "GPU_TEMP": "41",
    "GPU_UTIL": "97",
    "FB_USED": "61000",
}


def exposition(gpus, **labels):
    """The text of an exporter: `gpus` has the changes against `USUAL` by GPU; None leaves a field out."""
    lines = []
    for name, text in NAMES.items():
        lines += [f"# HELP DCGM_FI_DEV_{name} {text}", f"# TYPE DCGM_FI_DEV_{name} gauge"]
        for gpu, changes in gpus.items():
            value = {**USUAL, **changes}[name]
            who = {
                "gpu": gpu, "UUID": f"GPU-{gpu}", "pci_bus_id": "00000000:00:02.0", "device": f"nvidia{gpu}",
                "modelName": 'NVIDIA "H100" {80GB}', "Hostname": "node", "pod": "", **labels,
            }  # fmt: skip
            quoted = ",".join(f'{key}="{str(text).replace(chr(34), chr(92) + chr(34))}"' for key, text in who.items())
            lines += [f"DCGM_FI_DEV_{name}{{{quoted}}} {value}"] if value is not None else []
    return "\n".join(lines) + "\n"


class Exporter:
    """Answers GET with `text` and `status`; `asked` has the paths."""

    def __init__(self):
        exporter = self
        self.text, self.status, self.asked = exposition({0: {}, 1: {"POWER_USAGE": "99.5"}}), 200, []
        self.answering = threading.Event()
        self.answering.set()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                exporter.asked.append(self.path)
                exporter.answering.wait(30)
                body = exporter.text.encode()
                self.send_response(exporter.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self):
        self.answering.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def exporter():
    exporter = Exporter()
    yield exporter
    exporter.stop()


def test_every_field_of_a_gpu_is_read(exporter):
    power = open_power(f"prometheus:{exporter.url}")
    assert power.read(0) == Reading(
        power_average_mw=312_457,
        energy_mj=123_456_789_012,
        sm_clock_mhz=1980,
        mem_clock_mhz=2619,
        temperature_c=41,
        utilization=97,
    )
    assert power.read(1).power_average_mw == 99_500
    assert [(d.gpu, d.uuid) for d in power.devices()] == [(0, "GPU-0"), (1, "GPU-1")]
    assert "H100" in power.devices()[0].name
    assert power.sensors(0) == {}
    power.close()
    assert set(exporter.asked) == {"/metrics"}


def test_one_scrape_serves_all_gpus_of_a_poll(exporter):
    power = PrometheusPower(exporter.url)
    for poll in range(1, 4):
        exporter.text = exposition({g: {"POWER_USAGE": str(100 * poll + g)} for g in (0, 1)})
        if poll > 1:  # the first poll is served by what was scraped at the start
            assert [power.read(g).power_average_mw for g in (0, 1)] == [100_000 * poll, 100_000 * poll + 1000]
        else:
            assert [power.read(g).power_average_mw for g in (1, 0)] == [99_500, 312_457]
        assert len(exporter.asked) == poll


@pytest.mark.parametrize(
    ("url", "path"), [("{}/", "/metrics"), ("{}/dcgm/metrics?x=1", "/dcgm/metrics?x=1"), ("{}/custom", "/custom")]
)
def test_the_path_is_metrics_unless_it_is_given(exporter, url, path):
    PrometheusPower(url.format(exporter.url))
    PrometheusPower(url.format(exporter.url).removeprefix("http://"))
    assert exporter.asked == [path, path]


@pytest.mark.parametrize(
    "value", [None, "NaN", "+Inf", "-1", "140737488355328", "140737488355329.000000", "9223372036854775792"]
)
def test_what_is_not_told_is_null_and_not_a_number(exporter, value):
    exporter.text = exposition({0: dict.fromkeys(NAMES, value) | {"POWER_USAGE": "5"}})
    assert PrometheusPower(exporter.url).read(0) == Reading(power_average_mw=5000)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"FB_USED", "TOTAL_ENERGY_CONSUMPTION"}])
def test_the_blank_of_a_small_number_is_null_too(exporter, name):
    exporter.text = exposition({0: {}, 1: {name: "2147483632"}})
    power = PrometheusPower(exporter.url)
    whole, blank = (list(vars(power.read(gpu)).values()) for gpu in (0, 1))
    assert blank.count(None) == whole.count(None) + 1


def test_the_counter_alone_is_enough(exporter):
    exporter.text = exposition({0: {"POWER_USAGE": None}})
    assert PrometheusPower(exporter.url).read(0).energy_mj == 123_456_789_012


def test_rows_of_mig_instances_are_nobodys_share(exporter):
    exporter.text = exposition({0: {}}) + exposition({1: {}}, GPU_I_ID="3", GPU_I_PROFILE="1g.10gb")
    power = PrometheusPower(exporter.url)
    assert [d.gpu for d in power.devices()] == [0]
    with pytest.raises(GpuError, match="tells nothing of GPU 1; the GPUs it tells of: 0"):
        power.read(1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "tells of no GPU's power"),
        ("<html>hello</html>", "is it a DCGM exporter?"),
        ("DCGM_FI_DEV_POWER_USAGE 5\n", "tells of no GPU's power"),
        (exposition({0: {"POWER_USAGE": None, "TOTAL_ENERGY_CONSUMPTION": None}}), "tells of no GPU's power"),
        (exposition({0: {}}) + exposition({0: {}}, UUID="GPU-other"), "tells of two GPUs 0"),
    ],
)
def test_an_answer_without_power_is_one_clear_line(exporter, text, words):
    exporter.text = text
    refused(exporter.url, words)


def refused(url, words):
    with pytest.raises(GpuError) as error:
        PrometheusPower(url)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert "http" in str(error.value)


def test_an_exporter_that_cannot_be_reached_is_one_clear_line(exporter, monkeypatch):
    exporter.status = 503
    refused(exporter.url, "cannot be scraped (HTTP Error 503: Service Unavailable)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refused(f"http://127.0.0.1:{free.getsockname()[1]}", "cannot be scraped ([Errno 111] Connection refused)")
    exporter.answering.clear()
    monkeypatch.setattr(prometheus_module, "_TIMEOUT_S", 0.05)
    refused(exporter.url, "cannot be scraped (timed out)")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://", "ftp://host/metrics"])
def test_what_is_no_address_is_refused(url):
    refused(url, "is no address; give the exporter's")


def test_a_failed_scrape_fails_for_all_gpus_of_the_poll_but_is_tried_once(exporter):
    power = PrometheusPower(exporter.url)
    assert [power.read(gpu).energy_mj for gpu in (0, 1)] == [123_456_789_012] * 2
    exporter.status = 500
    for gpu in (0, 1):
        with pytest.raises(GpuError, match=r"cannot be scraped \(HTTP Error 500"):
            power.read(gpu)
    assert len(exporter.asked) == 2
    exporter.status = 200
    assert power.read(0).power_average_mw == 312_457
    exporter.text = exposition({1: {}})
    with pytest.raises(GpuError, match="tells nothing of GPU 0; the GPUs it tells of: 1"):
        power.read(0)
    assert power.read(1).power_average_mw == 312_457


def test_the_sampler_outlives_an_exporter_that_stops_for_a_while(exporter, tmp_path):
    async def wait(sampler, condition):
        for _ in range(1000):
            if condition(sampler.status):
                return
            await asyncio.sleep(0.02)
        raise AssertionError("never")

    async def main():
        async with Sampler(f"prometheus:{exporter.url}", [0, 1], tmp_path, "here") as sampler:
            exporter.status = 503
            await wait(sampler, lambda status: set(status.lost) == {0, 1})
            assert "503" in sampler.status.lost[0]
            assert sampler.status.watts == {0: None, 1: None}
            exporter.status = 200
            await wait(sampler, lambda status: not status.lost)
            assert sampler.status.watts == {0: pytest.approx(312.457), 1: 99.5}

    asyncio.run(main())
    power = scan_table(tmp_path, "power").collect()
    for gpu in (0, 1):
        frame = power.filter(pl.col("gpu") == gpu)
        assert 0 < frame["power_average_mw"].null_count() < frame.height
        assert frame["power_instant_mw"].null_count() == frame.height
        assert (frame["power_average_mw"].is_null() == frame["energy_mj"].is_null()).all()


def test_an_exporter_that_does_not_answer_at_the_start_is_an_error(exporter, tmp_path):
    exporter.status = 503

    async def main():
        async with Sampler(f"prometheus:{exporter.url}", [0], tmp_path, "here"):
            pass

    with pytest.raises(GpuError, match="cannot be scraped"):
        asyncio.run(main())
