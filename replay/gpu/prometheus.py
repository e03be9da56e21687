"""A DCGM exporter (NVIDIA's for Prometheus) as a power source, scraped where the driver itself cannot be asked.

Fields as DCGM documents them (dcgm_fields.h): power in W, the energy counter in mJ, clocks in MHz. The exporter shows
what it last collected, by default every 30 s (`dcgm-exporter --collect-interval`, in ms): power between two collections
is seen by the energy counter only, so let it collect every 100 ms. What an exporter leaves out is null in a reading.
"""

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

from replay.gpu.base import GpuInfo, Reading, Sensor
from replay.metrics import parse_metrics
from tracegen.errors import GpuError

_TIMEOUT_S = 2.0
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_POWER, _ENERGY = "DCGM_FI_DEV_POWER_USAGE", "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"
# DCGM's "no value" (dcgm_structs.h): from DCGM_INT32_BLANK on for small whole numbers, else from DCGM_FP64_BLANK on.
_INT32_BLANK, _FP64_BLANK = 2147483632.0, 140737488355328.0
# The fields by what their values stay below: the blanks, or what power.parquet's column holds.
_FIELDS = {
    _POWER: 4e6,
    _ENERGY: _FP64_BLANK,
    "DCGM_FI_DEV_SM_CLOCK": _INT32_BLANK,
    "DCGM_FI_DEV_MEM_CLOCK": _INT32_BLANK,
    "DCGM_FI_DEV_GPU_TEMP": 2**16 - 1.0,
    "DCGM_FI_DEV_GPU_UTIL": 2**8 - 1.0,
}


class PrometheusPower:
    """The GPUs that one exporter tells of (implements `replay.gpu.base.PowerSource`).

    Power is `power_average_mw`: the field is what nvmlDeviceGetPowerUsage gives, on Hopper the mean of a second. One
    scrape serves the readings of all GPUs until one of them is asked for again, also when the scrape failed.
    """

    def __init__(self, url: str) -> None:
        """Scrape the exporter at `url` (its path is /metrics where none is given).

        Raises `GpuError` when it does not answer or tells of no GPU's power.
        """
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise GpuError(f"prometheus:{url}: is no address; give the exporter's, such as http://localhost:9400")
        self._url = parts._replace(path=parts.path.rstrip("/") or "/metrics").geturl()
        # The exporter is near; a proxy for the way out would not find it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._gpus = self._scrape()
        self._asked: set[int] = set()  # the GPUs that the latest scrape has served
        self._error: str | None = None  # why the latest scrape failed
        powered = {gpu: labels for gpu, (labels, values) in self._gpus.items() if {_POWER, _ENERGY} & set(values)}
        if not powered:
            raise GpuError(f"{self._url}: tells of no GPU's power ({_POWER} or {_ENERGY}); is it a DCGM exporter?")
        self._infos = [
            GpuInfo(gpu, labels.get("UUID", ""), labels.get("modelName", "")) for gpu, labels in sorted(powered.items())
        ]

    def devices(self) -> list[GpuInfo]:
        """The GPUs whose power the exporter told of when it was opened."""
        return list(self._infos)

    def read(self, gpu: int) -> Reading:
        """What the exporter shows of `gpu`. Raises `GpuError` when it does not answer, or not of this GPU."""
        if gpu in self._asked:
            self._asked = set()
            try:
                self._gpus, self._error = self._scrape(), None
            except GpuError as error:
                self._gpus, self._error = {}, str(error)
        self._asked.add(gpu)
        if self._error is not None:
            raise GpuError(self._error)
        if gpu not in self._gpus:
            known = ", ".join(map(str, sorted(self._gpus))) or "none"
            raise GpuError(f"{self._url}: tells nothing of GPU {gpu}; the GPUs it tells of: {known}")
        _, values = self._gpus[gpu]
        watts, energy_mj, sm_mhz, mem_mhz, temperature_c, utilization = (values.get(field) for field in _FIELDS)
        return Reading(
            power_average_mw=None if watts is None else round(watts * 1e3),
            energy_mj=_whole(energy_mj),
            sm_clock_mhz=_whole(sm_mhz),
            mem_clock_mhz=_whole(mem_mhz),
            temperature_c=_whole(temperature_c),
            utilization=_whole(utilization),
        )

    def sensors(self, gpu: int) -> dict[str, Sensor]:
        """Nothing: how often the exporter collects is not in what it shows."""
        return {}

    def close(self) -> None:
        """Nothing to release: each scrape is a connection of its own."""

    def _scrape(self) -> dict[int, tuple[Mapping[str, str], dict[str, float]]]:
        """Labels and values by GPU. Raises `GpuError` in one line."""
        try:
            with self._opener.open(self._url, timeout=_TIMEOUT_S) as answer:
                text = answer.read().decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is the answer too
            reason = getattr(error, "reason", None)  # urllib wraps the socket's errors
            why = reason if isinstance(reason, Exception) else error
            raise GpuError(f"{self._url}: cannot be scraped ({str(why) or type(why).__name__})") from None
        found: dict[int, tuple[Mapping[str, str], dict[str, float]]] = {}
        for name, written, value in parse_metrics(text):
            labels = dict(_LABEL.findall(written)) if name in _FIELDS else {}
            # An instance's row (MIG) repeats the power of the whole card, which is nobody's share.
            if not labels.get("gpu", "").isdecimal() or labels.get("GPU_I_ID"):
                continue
            first, values = found.setdefault(int(labels["gpu"]), (labels, {}))
            if first.get("UUID") != labels.get("UUID"):
                raise GpuError(
                    f"{self._url}: tells of two GPUs {labels['gpu']}; give the address of one host's exporter"
                )
            if 0 <= value < _FIELDS[name]:  # no comparison holds for NaN
                values[name] = value
        return found


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
