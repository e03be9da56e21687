"""The game of `analysis.pricing`, step by step, compiled.

Numba looks at this file alone to tell whether its machine code is current, so nothing compiled is called from
elsewhere.
"""

import numpy as np

from analysis.kernels import Floats, compiled

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(3)
_X1, _X2, _X3 = (float(x + 1) / 2 for x in _NODES)
_W1, _W2, _W3 = (float(w) / 2 for w in _WEIGHTS)
MOST_LUMPS = 3  # the chunks beside the largest, as so many equal lumps
TINY = 1e-12


@compiled
def _state(m: Floats, idle_w: float, x: Floats, part: float, tokens: float, slopes: bool) -> tuple[float, ...]:
    """Energy, J, its slopes by context and by attention, and the duration, s, of a part of the step `x` (4,).

    That is with `part` of its decodes and `tokens` of prefill. `m` is the model: overhead, compute and memory (6 each),
    power (13), exponent, wave.
    """
    decode, context = part * x[1], part * x[2]
    attention = x[3] * (tokens / max(x[0], 1.0))
    exponent, wave = m[31], m[32]
    pad = 0.0
    if wave > 0:
        scheduled = tokens + np.floor(decode + 0.5)
        pad = wave * np.ceil(scheduled / wave) - scheduled
    c = m[0] + m[1] * tokens + m[2] * decode + m[3] * context + m[4] * attention + m[5] * pad
    a = m[6] + m[7] * tokens + m[8] * decode + m[9] * context + m[10] * attention + m[11] * pad
    b = m[12] + m[13] * tokens + m[14] * decode + m[15] * context + m[16] * attention + m[17] * pad
    high, low = max(a, b), min(a, b)
    soft, of_high, of_low = a + b, 1.0, 1.0  # of the larger and the smaller: (x / soft)^(exponent - 1)
    if high > TINY:
        ratio = low / high
        power = ratio**exponent
        root = (1.0 + power) ** (1.0 / exponent)
        soft = high * root
        of_high = root / (1.0 + power)
        of_low = of_high * (power / ratio) if ratio > 0 else 0.0
    soft = max(soft, TINY)
    span = max(c + soft, TINY)
    u, v = a / span, b / span
    root_u, root_v = np.sqrt(u), np.sqrt(v)
    watts = idle_w + m[18] + m[19] * u + m[20] * v + m[21] * root_u + m[22] * root_v
    watts += m[23] * u * u + m[24] * v * v + m[25] * u * v
    energy = watts * span + m[26] + m[27] * tokens + m[28] * decode + m[29] * context + m[30] * attention
    if not slopes:
        return energy, 0.0, 0.0, span
    # With Δ' the slope of Δ: E' = Δ'·(P - u·P_u - v·P_v), plus P_u for a and P_v for b themselves.
    by_u = m[19] + m[21] * 0.5 / max(root_u, 3e-5) + 2 * m[23] * u + m[25] * v
    by_v = m[20] + m[22] * 0.5 / max(root_v, 3e-5) + 2 * m[24] * v + m[25] * u
    common = watts - u * by_u - v * by_v
    in_a = common * (of_high if a >= b else of_low) + by_u
    in_b = common * (of_low if a >= b else of_high) + by_v
    by_context = max(common * m[3] + in_a * m[9] + in_b * m[15] + m[29], 0.0)
    by_attention = max(common * m[4] + in_a * m[10] + in_b * m[16] + m[30], 0.0)
    return energy, by_context, by_attention, span


@compiled
def _chance(n: int, k: int, p: float) -> float:
    """The chance that `k` of `n` come before, each with chance `p`."""
    ways = 1.0
    for i in range(k):
        ways = ways * (n - i) / (i + 1)
    return ways * p**k * (1.0 - p) ** (n - k)


@compiled
def _against_chunks(
    m: Floats, idle_w: float, x: Floats, decoders: float, large: float, lumps: int
) -> tuple[float, float, float, float]:
    """What the largest chunk and the others add on average, J, and the mean slopes by context and attention."""
    paid_large, paid_rest, by_context, by_attention = 0.0, 0.0, 0.0, 0.0
    first = 1.0 / (decoders + 1.0)  # the chance to be before every decode
    lump = (x[0] - large) / max(lumps, 1)
    energy, slope = np.empty((2, MOST_LUMPS + 1)), np.empty((2, MOST_LUMPS + 1))
    nodes = ((0.0, first), (_X1, _W1 * (1 - first)), (_X2, _W2 * (1 - first)), (_X3, _W3 * (1 - first)))
    for n in range(4):
        if n > 0 and decoders == 0:
            break
        k = 0.5 + nodes[n][0] * decoders if n > 0 else 0.0
        weight = nodes[n][1]
        part = k / max(decoders, 1.0)
        before = min((k + 1.0) / (decoders + 2.0), 1.0)
        last = 0.0
        for i in range(2):
            for j in range(lumps + 1):
                state = _state(m, idle_w, x, part, i * large + j * lump, True)
                energy[i, j], slope[i, j], last = state[0], state[1], state[2]
        by_attention += weight * last
        for j in range(lumps + 1):
            chance = _chance(lumps, j, before)
            paid_large += weight * chance * (energy[1, j] - energy[0, j])
            for i in range(2):
                presence = before if i else 1.0 - before
                by_context += weight * chance * presence * slope[i, j]
                if j < lumps:
                    among = lumps * _chance(lumps - 1, j, before) * presence
                    paid_rest += weight * among * (energy[i, j + 1] - energy[i, j])
    return paid_large, paid_rest, by_context, by_attention


@compiled
def _by_size(
    prefill: float, chunks: float, large: float, squares: float, paid: tuple[float, float], attention: float
) -> tuple[float, float]:
    """Prices p and q of a chunk of c tokens, p·c + q·c², that give the largest and the others their due."""
    if prefill <= 0:
        return 0.0, 0.0
    others = prefill - large
    per_token = attention / prefill
    flat = (paid[0] + paid[1] - attention) / prefill
    small = others / max(chunks - 1.0, 1.0)
    if not (chunks > 1 and large - small > 1 and small > 0):
        return flat, 0.0
    high = max(paid[0] / large - per_token, 0.0)
    low = max(paid[1] / others - per_token, 0.0)
    square = (high - low) / (large - small)
    linear = high - square * large
    due = flat * prefill
    if linear < 0:  # small chunks would be paid for being there
        linear, square = 0.0, due / squares
    total = linear * prefill + square * squares
    fit = due / total if total > TINY else 0.0
    return linear * fit, square * fit


@compiled
def play(
    m: Floats, idle_w: Floats, work: Floats, requests: Floats, count: Floats, squares: Floats
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Total, shared, prices (n, 4) and square of each step with `work` (n, 4), and its watts above idle.

    `count` and `squares` are of the prefill chunks; `m` is the model, as in `_state`.
    """
    n = idle_w.size
    total, shared, square, watts = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    price = np.zeros((n, 4))
    nothing = _state(m, 0.0, np.zeros(4), 0.0, 0.0, False)  # at zero work, but for idle power
    for k in range(n):
        x, idle = work[k], idle_w[k]
        prefill, decode = x[0], x[1]
        chunks = max(count[k], 1.0)
        full = _state(m, idle, x, 1.0, prefill, False)
        zero_j = nothing[0] + idle * nothing[3]
        watts[k] = full[0] / full[3] - idle
        whole = max(full[0], zero_j)
        free = whole - zero_j
        paid_large, paid_rest, by_context, by_attention, large, squared = 0.0, 0.0, 0.0, 0.0, prefill, squares[k]
        if prefill > 0:
            mean = prefill / chunks
            if chunks > 1:
                spread = np.sqrt(max(squares[k] / chunks - mean * mean, 0.0))
                large = min(mean + spread * np.sqrt(chunks - 1.0), prefill)
            squared = max(squares[k], large * large)
            decoders = max(requests[k] - count[k], 1.0 if decode > 0 else 0.0)
            lumps = int(min(chunks, MOST_LUMPS + 1.0)) - 1
            paid_large, paid_rest, by_context, by_attention = _against_chunks(m, idle, x, decoders, large, lumps)
        else:
            for node, weight in ((_X1, _W1), (_X2, _W2), (_X3, _W3)):
                by_context += weight * _state(m, idle, x, node, 0.0, True)[1]
        paid_large, paid_rest = max(paid_large, 0.0), max(paid_rest, 0.0)
        paid = paid_large + paid_rest
        if paid > 0 and (paid > free or decode <= 0):  # without decodes the chunks pay it all
            paid_large, paid_rest = paid_large * free / paid, paid_rest * free / paid
            paid = free
        attention = min(by_attention * x[3], paid)
        left = max(free - paid, 0.0)
        read = min(max(by_context * x[2], 0.0), left)
        linear, squared_price = _by_size(prefill, chunks, large, squared, (paid_large, paid_rest), attention)
        price[k, 0], square[k] = linear, squared_price
        price[k, 1] = (left - read) / decode if decode > 0 else 0.0
        price[k, 2] = read / x[2] if x[2] > 0 else 0.0
        price[k, 3] = attention / x[3] if x[3] > 0 else 0.0
        spent = linear * prefill + squared_price * squared + price[k, 1] * decode + price[k, 2] * x[2] + attention
        total[k], shared[k] = whole, max(whole - spent, 0.0)
    return total, shared, price, square, watts
