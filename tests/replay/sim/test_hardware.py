"""The hardware model: physical sense for any work, and the published figures that it was calibrated on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.sim.hardware import Hardware, Work, load_profile
from tracegen.errors import ReplayError

PROFILE = load_profile()
MAX_MHZ = PROFILE.clocks_mhz.max

tps = st.sampled_from([2, 4, 8])
clocks_mhz = st.integers(0, 118).map(lambda n: PROFILE.clocks_mhz.min + n * PROFILE.clocks_mhz.step)
works = st.builds(
    Work,
    st.floats(0, 8192),
    st.floats(0, 256),
    st.floats(0, 1e6),
    st.floats(0, 1e8),
)


def prefill(tokens: int) -> Work[float]:
    return Work(float(tokens), 0.0, 0.0, tokens**2 / 2)


def decode(batch: float, context: float) -> Work[float]:
    return Work(0.0, float(batch), float(batch * context), 0.0)


@given(tps, works, works, clocks_mhz)
def test_more_work_takes_longer_and_costs_more(tp, work, extra, mhz):
    hardware, more = Hardware(PROFILE, tp), Work(*(a + b for a, b in zip(work, extra, strict=True)))
    assert hardware.step_s(more, mhz) >= hardware.step_s(work, mhz) * (1 - 1e-9)
    assert hardware.step_j(more, mhz) >= hardware.step_j(work, mhz) * (1 - 1e-9)


@given(tps, works, clocks_mhz, clocks_mhz)
def test_a_higher_clock_is_faster_and_draws_more(tp, work, one, other):
    hardware, (low, high) = Hardware(PROFILE, tp), sorted((one, other))
    assert hardware.step_s(work, high) <= hardware.step_s(work, low) * (1 + 1e-6)
    assert hardware.step_w(work, high) >= hardware.step_w(work, low) * (1 - 1e-6)


@given(tps, works, clocks_mhz)
def test_power_stays_between_idle_and_the_cap(tp, work, mhz):
    hardware, cap_w = Hardware(PROFILE, tp), PROFILE.power.cap_w
    gpu_w = hardware.step_w(work, mhz) / tp
    held_mhz = hardware.effective_mhz(work, mhz)
    assert hardware.idle_w(held_mhz) < gpu_w <= cap_w * (1 + 1e-9)
    assert held_mhz <= mhz * (1 + 1e-12)
    if held_mhz < min(mhz, PROFILE.time.sustained_mhz) * (1 - 1e-9):
        assert gpu_w == pytest.approx(cap_w, rel=1e-9)


@given(tps, st.lists(st.tuples(works, clocks_mhz), min_size=1, max_size=20))
def test_many_steps_at_once_are_each_step_alone(tp, steps):
    hardware = Hardware(PROFILE, tp)
    work = Work(*np.array([work for work, _ in steps]).T)
    mhz = np.array([mhz for _, mhz in steps], float)
    for function in (hardware.step_s, hardware.step_w, hardware.step_j, hardware.effective_mhz):
        alone = [function(*step) for step in steps]
        np.testing.assert_allclose(function(work, mhz), alone, rtol=1e-12)


@given(works, clocks_mhz)
def test_more_gpus_are_faster_and_each_draws_less_when_decoding(work, mhz):
    work = work._replace(prefill_tokens=0.0, prefill_attention=0.0)
    groups = [Hardware(PROFILE, tp) for tp in (2, 4, 8)]
    seconds = [group.step_s(work, mhz) for group in groups]
    watts = [group.step_w(work, mhz) / group.tp for group in groups]
    assert seconds == sorted(seconds, reverse=True)
    assert watts == sorted(watts, reverse=True)


def test_no_work_still_passes_over_the_weights():
    for tp in (2, 4, 8):
        nothing = Hardware(PROFILE, tp).step_s(Work(0.0, 0.0, 0.0, 0.0), MAX_MHZ)
        weights_s = PROFILE.model.weight_bytes / tp / PROFILE.time.memory_bytes_per_s
        assert weights_s < nothing < Hardware(PROFILE, tp).step_s(decode(1, 0), MAX_MHZ)


def test_long_prefill_on_two_gpus_is_held_by_the_power_cap():
    pair, long = Hardware(PROFILE, 2), prefill(4085)
    assert pair.effective_mhz(long, MAX_MHZ) < 1600
    assert pair.step_s(long, 1605) == pytest.approx(pair.step_s(long, MAX_MHZ), rel=1e-5)
    assert pair.step_w(long, MAX_MHZ) == pytest.approx(2 * PROFILE.power.cap_w, rel=1e-9)


# Splitwise (Patel et al., ISCA'24), perf_model.csv, medians for Llama-2-70B on H100 at TP2.
@pytest.mark.parametrize(("tokens", "published_ms"), [(512, 84), (2048, 310), (8192, 1340)])
def test_prefill_time_at_tp2(tokens, published_ms):
    assert 1e3 * Hardware(PROFILE, 2).step_s(prefill(tokens), MAX_MHZ) == pytest.approx(published_ms, rel=0.1)


@pytest.mark.parametrize(("batch", "published_ms"), [(1, 37.0), (16, 42.0), (32, 52.3)])
def test_decode_time_at_tp2(batch, published_ms):
    assert 1e3 * Hardware(PROFILE, 2).step_s(decode(batch, 1024), MAX_MHZ) == pytest.approx(published_ms, rel=0.2)


# Characterization by the first author of "Towards Greener LLMs" (jovans2/jovan-vllm): TBT of 1010 + 600 tokens at
# 0.5 requests/s, ms at 1980 MHz and ratios at 800, 1000, 1400 and 1800 MHz.
@pytest.mark.parametrize(
    ("tp", "reference_ms", "ratios"),
    [(2, 37.1, (1.63, 1.30, 1.05, 1.01)), (4, 24.9, (1.64, 1.35, 1.08, 1.02)), (8, 18.4, (1.77, 1.44, 1.09, 1.01))],
)
def test_decode_time_by_clock(tp, reference_ms, ratios):
    hardware = Hardware(PROFILE, tp)

    def tbt_ms(mhz, ratio):
        return 1e3 * hardware.step_s(decode(0.5 * 600 * reference_ms * ratio / 1e3, 1310), mhz)

    reference = tbt_ms(MAX_MHZ, 1.0)
    assert reference == pytest.approx(reference_ms, rel=0.07)
    for mhz, ratio in zip((800, 1000, 1400, 1800), ratios, strict=True):
        assert tbt_ms(mhz, ratio) / reference == pytest.approx(ratio, rel=0.05)


# The same source: power of the same cells (ML, 0.5 requests/s, where a batch is always running), ratios to 1980 MHz.
@pytest.mark.parametrize(
    ("tp", "ratios"),
    [(2, (0.504, 0.575, 0.772, 0.963)), (4, (0.549, 0.609, 0.774, 0.985)), (8, (0.549, 0.597, 0.777, 0.977))],
)
def test_decode_power_by_clock(tp, ratios):
    hardware, work = Hardware(PROFILE, tp), decode({2: 11, 4: 7.5, 8: 5.5}[tp], 1310)
    reference = hardware.step_w(work, MAX_MHZ)
    for mhz, ratio in zip((800, 1000, 1400, 1800), ratios, strict=True):
        assert hardware.step_w(work, mhz) / reference == pytest.approx(ratio, rel=0.08)


# Raw power logs of the same author, TP2: W per GPU, idle with the model loaded and mean while busy.
@pytest.mark.parametrize(
    ("mhz", "idle_w", "busy_w"), [(1410, 88, 360), (1605, 102, 411), (1800, 112, 445), (1980, 113, 449)]
)
def test_power_levels_at_tp2(mhz, idle_w, busy_w):
    pair = Hardware(PROFILE, 2)
    assert pair.idle_w(mhz) == pytest.approx(idle_w, rel=0.05)
    assert pair.step_w(decode(8, 600), mhz) / 2 == pytest.approx(busy_w, rel=0.12)
    assert 71 <= pair.idle_w(mhz, loaded=False) <= 75


def test_kv_cache_is_what_the_weights_leave():
    memory, model = PROFILE.memory, PROFILE.model
    for tp in (2, 4, 8):
        tokens = Hardware(PROFILE, tp).kv_tokens
        used_bytes = tokens * model.kv_bytes_per_token + model.weight_bytes + tp * memory.reserve_bytes
        block_bytes = PROFILE.block_tokens * model.kv_bytes_per_token
        assert 0 <= tp * memory.gpu_bytes * memory.utilization - used_bytes < block_bytes
        assert tokens >= PROFILE.max_model_len
        assert tokens % PROFILE.block_tokens == 0


@pytest.mark.parametrize("tp", [0, 1, 3, 6, 16])
def test_a_group_that_cannot_exist_is_refused(tp):
    with pytest.raises(ReplayError, match=f"tensor parallelism {tp}; use one of 2, 4, 8"):
        Hardware(PROFILE, tp)
