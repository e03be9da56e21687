"""The numbers of a hardware file: each keeps to its range, and what is carried over is what it is carried over from."""

import re
import tomllib
from importlib.resources import files

import pytest

from replay.sim.profile import load_node, load_profile, parse_node
from tracegen.errors import ReplayError


@pytest.fixture
def node_document():
    return tomllib.loads(files("replay.sim").joinpath("profiles", "nodes", "dgx-h100.toml").read_text("utf-8"))


NAN, INF = float("nan"), float("inf")
# By section and words of the rule: keys, values that are just not allowed, values that just are.
RANGES = [
    ("engine", "above 0", ("max_num_seqs", "max_num_batched_tokens", "block_tokens"), (0, -1), (1,)),
    ("memory", "above 0", ("gpu_bytes",), (0, -1.0), (1e9,)),
    ("memory", "0 or above", ("reserve_bytes",), (-1e-9,), (0,)),
    ("memory", "above 0 and at most 1", ("utilization",), (0, 1.0001, -0.1), (1, 0.01)),
    ("time", "above 0 and at most 1", ("compute_efficiency", "memory_efficiency"), (0, 1.0001), (1, 0.01)),
    ("time", "from 0 to 1", ("sync_reduce_share",), (-0.01, 1.01), (0, 1)),
    ("time", "0 or above", ("sync_layer_s", "launch_s", "sequence_s"), (-1e-9,), (0, 0.1)),
    (
        "time", "above 0",
        (
            "peak_flops", "boost_mhz", "sustained_mhz", "memory_bytes_per_s", "traffic_knee_mhz",
            "traffic_knee_sharpness", "overlap_sharpness", "link_bytes_per_s",
        ),
        (0, -1.0), (1980,),
    ),
    (
        "power", "above 0",
        (
            "cap_w", "idle_unloaded_w", "idle_loaded_w", "awake_w", "core_w", "memory_w", "compute_w", "voltage_mhz",
            "voltage_width_mhz",
        ),
        (0, -1), (300,),
    ),
    ("power", "0 or above", ("idle_exponent", "memory_exponent", "compute_exponent", "voltage_rise"), (-0.1,), (0, 3)),
    ("sensor", "above 0", ("period_ns", "window_ns", "average_window_ns"), (0, -1), (100_000_000,)),
    ("sensor", "0 or above", ("lag_ns",), (-1,), (0, 1)),
    ("sensor", "0 or above, and below 1", ("noise_rel", "gain_error_rel"), (-0.01, 1), (0, 0.99)),
    ("thermal", "above 0", ("time_constant_s",), (0, -1.0), (1e-3,)),
    ("thermal", "0 or above", ("resistance_c_per_w",), (-0.01,), (0,)),
    ("thermal", "from 0 to 0.02", ("leakage_per_c",), (-0.001, 0.021), (0, 0.02)),
    ("thermal", "a finite number", ("ambient_c", "reference_c"), (), (-10, 0, 40)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "words", "key", "wrong", "right"),
    [(section, words, key, wrong, right) for section, words, keys, wrong, right in RANGES for key in keys],
)
def test_each_constant_keeps_to_its_range(node_document, section, words, key, wrong, right):
    table = node_document[section]
    for value in right:
        parse_node(node_document | {section: table | {key: value}})
    whole = section == "engine" or key.endswith("_ns")  # whole numbers have no NaN
    for value in (*wrong, *(() if whole else (NAN, INF, -INF))):
        with pytest.raises(ReplayError) as caught:
            parse_node(node_document | {section: table | {key: value}})
        rule = words if value in wrong else "a finite number"
        assert re.fullmatch(rf"\[{section}\] {key} = \S+: must be {rule}", str(caught.value))


def test_a_power_cap_must_leave_room_above_an_idle_gpu(node_document):
    lowest_w = load_profile().power_caps_w[0]
    node_document["power"]["cap_w"] = lowest_w + 1
    assert parse_node(node_document).power.caps_w == (lowest_w, lowest_w + 1)
    node_document["power"]["cap_w"] = lowest_w
    with pytest.raises(ReplayError, match=r"\[power\] cap_w = .* what idle_unloaded_w, idle_loaded_w and awake_w add"):
        parse_node(node_document)


def test_every_number_of_a_hardware_file_has_a_range_that_is_tested(node_document):
    numbers = {
        (section, key)
        for section, table in node_document.items()
        if isinstance(table, dict) and section not in {"calibration", "clocks_mhz"}
        for key, value in table.items()
        if isinstance(value, int | float)
    }
    assert numbers == {(section, key) for section, _, keys, *_ in RANGES for key in keys}


def marked(name):
    """The constants of a shipped node: section, key, value and the remark behind it."""
    section, found = "", []
    for line in files("replay.sim").joinpath("profiles", "nodes", f"{name}.toml").read_text("utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif match := re.match(r"(\w+) = ([\d._e-]+) *#(.*)", line):
            found.append((section, match[1], float(match[2]), match[3].strip()))
    return found


def of_h100(section, key):
    table = tomllib.loads(files("replay.sim").joinpath("profiles", "nodes", "dgx-h100.toml").read_text("utf-8"))
    return table[section][key]


def test_what_the_h200_has_of_the_h100_is_the_h100_s():
    carried = [entry for entry in marked("dgx-h200") if "[h100]" in entry[3]]
    assert len(carried) >= 30
    for section, key, value, _ in carried:
        assert value == of_h100(section, key), f"[{section}] {key}"
    h100, h200 = load_node("dgx-h100"), load_node("dgx-h200")
    assert h200.clocks_mhz == h100.clocks_mhz
    assert h200.time.peak_flops == h100.time.peak_flops


# What each remark of dgx-a100.toml makes of the H100's value. 1830 and 1410 MHz are the boost clocks of the two, 700
# and 400 W their power caps, 450e9 and 300e9 bytes/s what their NVLink carries each way.
SCALES = {
    "[h100]": 1,
    "[h100] x 400 W / 700 W": 400 / 700,
    "[h100], as a fraction of the boost clock": 1410 / 1830,
    "[h100]: at the same fraction of the boost clock": 1410 / 1830,
    "[h100]: the same fraction of NVLink 3's 300e9 each way [datasheet]": 300 / 450,
    "[h100]: as many clock cycles": 1830 / 1410,
    "[h100] x 1.5": 1.5,
    "off, as in [h100]": 1,
}


def test_what_the_a100_has_of_the_h100_is_scaled_as_it_says():
    carried = [list(entry) for entry in marked("dgx-a100") if "[h100]" in entry[3]]
    # One remark stands behind both lines of the CPU's part.
    carried += [[s, k, v, "[h100] x 1.5"] for s, k, v, _ in marked("dgx-a100") if k == "sequence_s"]
    assert len(carried) >= 20
    for section, key, value, remark in carried:
        said = remark if remark in SCALES else remark.split(":")[0]
        assert value == pytest.approx(SCALES[said] * of_h100(section, key), rel=5e-3), f"[{section}] {key}"
