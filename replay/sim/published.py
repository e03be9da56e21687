"""Published step times and powers of Llama-2-70B on H100s, beside the operating points of `replay.sim.points`.

Sources: "greener", the repository jovans2/jovan-vllm by the first author of Stojkovic et al., "Towards Greener LLMs";
"splitwise", Patel et al., ISCA'24, `perf_model.csv` (medians). Splitwise's times at TP4 and TP8 and greener's cannot
both hold (TP8 at batch 1: 29.8 ms, at about batch 5: 18.4 ms, another vLLM): the fit takes TP2 alone from Splitwise.
"""

from typing import NamedTuple

from replay.sim.hardware import Hardware, Work
from replay.sim.profile import Profile

H100 = "NVIDIA H100 80GB HBM3"
MODEL = "llama-2-70b"
TOP_MHZ = 1980


class StepTime(NamedTuple):
    """One published duration of an engine step."""

    source: str
    tp: int
    clock_mhz: int
    prefill_tokens: float  # 0 for a decode step
    batch: float  # sequences that decode
    context_tokens: float  # of each of them
    published_ms: float
    fitted: bool  # whether constants are fitted to it

    @property
    def name(self) -> str:
        """What step it is, in words."""
        what = (
            f"prefill of {self.prefill_tokens:g} tokens" if self.prefill_tokens else f"decode, batch {self.batch:.0f}"
        )
        return f"{self.source} TP{self.tp}, {self.clock_mhz} MHz, {what}"

    def simulated_ms(self, hardware: Hardware) -> float:
        """How long the simulated hardware takes for it."""
        attention = self.prefill_tokens**2 / 2
        work = Work(self.prefill_tokens, self.batch, self.batch * self.context_tokens, attention)
        return 1e3 * hardware.step_s(work, float(self.clock_mhz))


# [greener]: mean TBT of requests of 1010 + 600 tokens at 0.5 requests/s at 1980 MHz, and its ratios to that.
_TBT_MS = {2: 37.1, 4: 24.9, 8: 18.4}
_TBT_RATIOS = {
    2: {800: 1.63, 1000: 1.30, 1400: 1.05, 1800: 1.01, TOP_MHZ: 1.0},
    4: {800: 1.64, 1000: 1.35, 1400: 1.08, 1800: 1.02, TOP_MHZ: 1.0},
    8: {800: 1.77, 1000: 1.44, 1400: 1.09, 1800: 1.01, TOP_MHZ: 1.0},
}
_TBT_RATE_RPS, _TBT_OUTPUT_TOKENS, _TBT_CONTEXT_TOKENS = 0.5, 600, 1010 + 600 / 2
# [splitwise]: prefill by tokens at batch 1, decode by batch; its contexts are not given: 1024 is assumed.
_SPLITWISE_PREFILL_MS = {
    2: {512: 84.0, 2048: 310.0, 8192: 1340.0},
    4: {512: 60.0, 2048: 201.0, 8192: 954.0},
    8: {512: 53.0, 2048: 137.0, 8192: 845.0},
}
_SPLITWISE_TBT_MS = {
    2: {1: 37.0, 16: 42.0, 32: 52.3},
    4: {1: 29.7, 16: 32.8, 32: 36.9, 64: 52.4},
    8: {1: 29.8, 16: 34.2, 32: 38.6, 64: 50.2},
}
_SPLITWISE_CONTEXT_TOKENS = 1024.0
# [greener]: power of a GPU with the model loaded that does nothing, W, by SM clock; 71-75 W without a model.
IDLE_W = {1410: 88.0, 1605: 102.0, 1800: 112.0, 1830: 113.0}
# [greener]: mean power of a busy GPU, W, TP2 with small inputs; lowest and highest of its raw power logs.
BUSY_W = {1410: (350.0, 370.0), 1605: (402.0, 421.0), 1800: (432.0, 458.0)}


def step_times(profile: Profile) -> list[StepTime]:
    """What is published of this model on these GPUs; empty for others."""
    if profile.gpu_name != H100 or profile.model_name != MODEL:
        return []
    greener = [
        # The batch is Little's law: those who decode at once.
        StepTime(
            "greener", tp, mhz, 0.0, _TBT_RATE_RPS * _TBT_OUTPUT_TOKENS * tbt_ms * ratio / 1e3, _TBT_CONTEXT_TOKENS,
            tbt_ms * ratio, fitted=True,
        )
        for tp, tbt_ms in _TBT_MS.items()
        for mhz, ratio in _TBT_RATIOS[tp].items()
    ]  # fmt: skip
    prefill = [
        StepTime("Splitwise", tp, TOP_MHZ, float(tokens), 0.0, 0.0, ms, fitted=tp == 2)
        for tp, row in _SPLITWISE_PREFILL_MS.items()
        for tokens, ms in row.items()
    ]
    decode = [
        StepTime("Splitwise", tp, TOP_MHZ, 0.0, float(batch), _SPLITWISE_CONTEXT_TOKENS, ms, fitted=tp == 2)
        for tp, row in _SPLITWISE_TBT_MS.items()
        for batch, ms in row.items()
    ]
    return greener + prefill + decode
