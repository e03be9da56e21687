"""Profiles survive their files, broken files are named, and what was not probed falls back to what is published."""

import tomllib
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay.gpu.base import GpuInfo, Sensor
from replay.gpu.sensor_profiles import (
    Behaviour,
    CounterBehaviour,
    SensorProfile,
    known_sensors,
    lines,
    load_profile,
    profile_path,
    save_profile,
)
from tracegen.errors import GpuError

MS = 1_000_000
INFO = GpuInfo(3, "GPU-0f", "NVIDIA H100 80GB HBM3")
PUBLISHED = {"instant": Sensor(100 * MS, 25 * MS, 0), "average": Sensor(100 * MS, 1000 * MS, 0)}
INSTANT = Behaviour(99 * MS, MS, 52 * MS, MS, 21 * MS, MS, 0, 90.5, 512.25, 0.987)
PROFILE = SensorProfile(
    uuid=INFO.uuid,
    name=INFO.name,
    probed="2026-11-23T10:00:00+00:00",
    seconds=26.5,
    polls=21_000,
    read_ns=310_000,
    read_p99_ns=900_000,
    instant=INSTANT,
    counter=CounterBehaviour(20 * MS, MS, 7, 1400),
    idle_power_w={"instant": 70.25, "counter": 70.0},
    counter_over_instant=1.01,
    counter_over_instant_se=0.02,
    reasons={"average": "the driver tells none"},
)


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "wattrace" / "gpus"


def test_where_profiles_are_kept(config, monkeypatch):
    path = save_profile(PROFILE)
    assert path == config / "NVIDIA-H100-80GB-HBM3-GPU-0f.toml"
    assert [entry.name for entry in config.iterdir()] == [path.name]
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CONFIG_HOME", unset)
        monkeypatch.setenv("HOME", "/home/somebody")
        assert str(profile_path("u", "n")) == "/home/somebody/.config/wattrace/gpus/n-u.toml"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(st.characters(exclude_categories=["Cs"])),
    reasons=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
    ),
    watts=st.floats(allow_nan=False, allow_infinity=False),
    window_ns=st.none() | st.integers(1, 2**62),
)
def test_a_profile_survives_its_file(name, reasons, watts, window_ns):
    profile = replace(
        PROFILE, name=name[:40], reasons=reasons, seconds=watts, instant=replace(INSTANT, window_ns=window_ns)
    )
    save_profile(profile)
    assert load_profile(profile.uuid, profile.name) == profile


def test_what_was_not_measured_is_not_in_the_file():
    document = tomllib.loads(save_profile(PROFILE).read_text(encoding="utf-8"))
    assert document["average"] == {}
    assert "counter_over_average" not in document
    assert document["reasons"] == {"average": "the driver tells none"}


def test_probed_goes_before_published():
    assert known_sensors(INFO, PUBLISHED) == (PUBLISHED, "published for NVIDIA H100 80GB HBM3")
    assert known_sensors(INFO, {}) == ({}, "unknown")
    save_profile(replace(PROFILE, average=Behaviour(98 * MS, 0, 990 * MS, 0, 5 * MS, 0)))
    found = {"instant": Sensor(99 * MS, 52 * MS, 21 * MS), "average": Sensor(98 * MS, 990 * MS, 5 * MS)}
    for published in (PUBLISHED, {}):
        assert known_sensors(INFO, published) == (found, "probed 2026-11-23 on this GPU")
    assert known_sensors(replace(INFO, uuid="GPU-10"), PUBLISHED)[0] == PUBLISHED


def test_each_field_falls_back_on_its_own():
    save_profile(replace(PROFILE, instant=Behaviour(period_ns=99 * MS)))
    sensors, source = known_sensors(INFO, PUBLISHED)
    assert sensors == {"instant": Sensor(99 * MS, 25 * MS, 0), "average": PUBLISHED["average"]}
    assert source == (
        "probed 2026-11-23 on this GPU; instant window and lag, average period and window and lag published for "
        "NVIDIA H100 80GB HBM3"
    )
    # A window that is neither probed nor published is not made up.
    assert known_sensors(INFO, {}) == ({}, "unknown")
    save_profile(replace(PROFILE, instant=Behaviour()))
    assert known_sensors(INFO, PUBLISHED) == (PUBLISHED, "published for NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("uuid = ", "no sensor profile"),
        ("polls = 1", "no sensor profile"),
        ("\xff", "no sensor profile"),
        (None, "no sensor profile"),  # period_ns = 0
        ("schema_version = 2", "newer wattrace"),
    ],
)
def test_a_broken_file_is_named_in_one_line(text, why):
    path = save_profile(PROFILE)
    if text is None:
        text = path.read_text().replace(f"period_ns = {99 * MS}", "period_ns = 0")
        assert "period_ns = 0" in text
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(GpuError, match=why) as caught:
        known_sensors(INFO, PUBLISHED)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert "delete" in str(caught.value)


def test_another_gpus_file_is_not_taken():
    path = save_profile(PROFILE)
    path.rename(profile_path("GPU-10", INFO.name))
    with pytest.raises(GpuError, match="belongs to another GPU"):
        known_sensors(replace(INFO, uuid="GPU-10"), PUBLISHED)


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_write_that_fails_leaves_the_old_file(config, monkeypatch, step):
    path = save_profile(PROFILE)
    before = path.read_bytes()

    def full(self, *arguments, **options):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"pathlib.Path.{step}", full)
    with pytest.raises(GpuError, match=r"cannot be written there \(No space left on device\)"):
        save_profile(replace(PROFILE, polls=5))
    assert path.read_bytes() == before
    assert list(config.iterdir()) == [path]


def test_a_profile_in_words():
    assert lines(PROFILE) == [
        "NVIDIA H100 80GB HBM3 (GPU-0f), probed 2026-11-23",
        "  polls    21000 in 26.5 s, one takes 0.31 ms (p99 0.9 ms)",
        (
            "  instant  updates every 99 ms (± 1 ms), mean of 52 ms (± 1 ms), 21 ms ago (± 1 ms), sees 53% of the "
            "time, 90 to 512 W, R² 0.987"
        ),
        "  counter  every 20 ms, in multiples of 7 mJ, at least 1400 mJ",
        "  idle     70.2 W by instant, 70.0 W by counter",
        "  energy   counter over instant 1.010 ± 0.020",
        "  average: the driver tells none",
    ]
