"""The game of `analysis.pricing`, step by step, compiled.

Numba looks at this file alone to tell whether its machine code is current, so nothing compiled is called from
elsewhere.
"""

import numpy as np

from analysis.kernels import Bools, Floats, compiled

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(3)
_X1, _X2, _X3 = (float(x + 1) / 2 for x in _NODES)
_W1, _W2, _W3 = (float(w) / 2 for w in _WEIGHTS)
MOST_LUMPS = 3  # the chunks beside the largest, as so many equal lumps
MOST_DECODES = 4096  # in a step that is looked up; a table of more would take more memory than time
# Nodes of mean context between c and e·c. Between two of them a curve is off by at most an eighth of its relative
# curvature times the distance's square, 1.2e-4 of it; measured on simulated runs, below 1e-6.
NODES_PER_E = 32.0
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
    by_context = common * m[3] + in_a * m[9] + in_b * m[15] + m[29]
    by_attention = common * m[4] + in_a * m[10] + in_b * m[16] + m[30]
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
                energy[i, j], slope[i, j], last = state[0], max(state[1], 0.0), max(state[2], 0.0)
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
def _only_decodes(m: Floats, decodes: float, context: float) -> tuple[float, float, float, float]:
    """Of a step without prefill: energy without idle power, J; its mean slope by context; both by a watt of idle power.

    The slope is along the way from no work to all of it, three Gauss points.
    """
    x = np.array([0.0, decodes, context, 0.0])
    state = _state(m, 0.0, x, 1.0, 0.0, False)
    cold, warm = 0.0, 0.0
    for node, weight in ((_X1, _W1), (_X2, _W2), (_X3, _W3)):
        cold += weight * _state(m, 0.0, x, node, 0.0, True)[1]
        warm += weight * _state(m, 1.0, x, node, 0.0, True)[1]
    return state[0], cold, state[3], warm - cold


@compiled
def _reach(work: Floats) -> tuple[int, int]:
    """The most decodes in a step that is looked up, and the last node of the mean context in one."""
    decodes, context = 0.0, 1.0
    for k in range(work.shape[0]):
        if work[k, 0] <= 0 and work[k, 1] <= MOST_DECODES:
            decodes = max(decodes, work[k, 1])
            context = max(context, work[k, 2] / max(work[k, 1], 1.0))
    return int(decodes), int(np.log(context) * NODES_PER_E) + 1


@compiled
def _look_up(
    m: Floats, decodes: float, context: float, known: Bools, table: Floats
) -> tuple[float, float, float, float]:
    """`_only_decodes` from `table`, by decodes and node, where it is `known`; what is asked for first is put there."""
    mean = context / max(decodes, 1.0)
    row = int(decodes)
    if mean < 1.0 or decodes > MOST_DECODES or row != decodes:
        return _only_decodes(m, decodes, context)
    node = int(np.log(mean) * NODES_PER_E)
    low, high = np.exp(node / NODES_PER_E), np.exp((node + 1) / NODES_PER_E)
    for i, at in ((node, low), (node + 1, high)):
        if not known[row, i]:
            table[row, i, 0], table[row, i, 1], table[row, i, 2], table[row, i, 3] = _only_decodes(m, decodes, row * at)
            known[row, i] = True
    below, above, part = table[row, node], table[row, node + 1], (mean - low) / (high - low)
    return (
        below[0] + part * (above[0] - below[0]),
        below[1] + part * (above[1] - below[1]),
        below[2] + part * (above[2] - below[2]),
        below[3] + part * (above[3] - below[3]),
    )


@compiled
def _with_chunks(
    m: Floats, idle_w: float, x: Floats, requests: float, count: float, squares: float
) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]:
    """Of a step with prefill: energy and duration; what the largest chunk and the others add, J.

    Then the slopes by context and by attention; the tokens of the largest chunk, and the sum of all squared.
    """
    full = _state(m, idle_w, x, 1.0, x[0], False)
    chunks = max(count, 1.0)
    mean, large = x[0] / chunks, x[0]
    if chunks > 1:
        spread = np.sqrt(max(squares / chunks - mean * mean, 0.0))
        large = min(mean + spread * np.sqrt(chunks - 1.0), x[0])
    decoders = max(requests - count, 1.0 if x[1] > 0 else 0.0)
    lumps = int(min(chunks, MOST_LUMPS + 1.0)) - 1
    paid_large, paid_rest, by_context, by_attention = _against_chunks(m, idle_w, x, decoders, large, lumps)
    paid = max(paid_large, 0.0), max(paid_rest, 0.0)
    return (full[0], full[3]), paid, (by_context, by_attention), (large, max(squares, large * large))


@compiled
def play(
    m: Floats,
    idle_w: Floats,
    span_s: Floats,
    busy_s: Floats,
    work: Floats,
    requests: Floats,
    count: Floats,
    squares: Floats,
) -> tuple[Floats, Floats, Floats, Floats]:
    """Total and shared energy, J, prices (n, 4) and the square's price of each step with `work` (n, 4).

    All are scaled to the step's own duration `span_s`, of which it was `busy_s` at work. `count` and `squares` are of
    the prefill chunks; `m` is the model, as in `_state`.

    Steps without prefill, which most are, are looked up: for each number of decodes at mean contexts that are
    1 / `NODES_PER_E` apart, worked out when first asked for, and linearly between.
    """
    n = idle_w.size
    total, shared, square = np.zeros(n), np.zeros(n), np.zeros(n)
    price = np.zeros((n, 4))
    nothing = _state(m, 0.0, np.zeros(4), 0.0, 0.0, False)  # at zero work, but for idle power
    decodes, nodes = _reach(work)
    known, table = np.zeros((decodes + 1, nodes + 2), dtype=np.bool_), np.empty((decodes + 1, nodes + 2, 4))
    for k in range(n):
        x, idle = work[k], idle_w[k]
        chunks, (large, squared) = (0.0, 0.0), (0.0, 0.0)
        if x[0] > 0:
            full, chunks, slopes, (large, squared) = _with_chunks(m, idle, x, requests[k], count[k], squares[k])
        else:
            cold_j, cold_slope, full_s, warm_slope = _look_up(m, x[1], x[2], known, table)
            full, slopes = (cold_j + idle * full_s, full_s), (cold_slope + idle * warm_slope, 0.0)
        zero_j = nothing[0] + idle * nothing[3]
        whole = max(full[0], zero_j)
        free, paid = whole - zero_j, chunks[0] + chunks[1]
        if paid > 0 and (paid > free or x[1] <= 0):  # without decodes the chunks pay it all
            chunks = chunks[0] * free / paid, chunks[1] * free / paid
            paid = free
        attention = min(slopes[1] * x[3], paid)
        left = max(free - paid, 0.0)
        read = min(max(slopes[0] * x[2], 0.0), left)
        linear, squared_price = _by_size(x[0], max(count[k], 1.0), large, squared, chunks, attention)
        by_decode = (left - read) / x[1] if x[1] > 0 else 0.0
        spent = linear * x[0] + squared_price * squared + by_decode * x[1] + read + attention
        modelled = idle * span_s[k] + (full[0] / full[1] - idle) * busy_s[k]
        factor = modelled / whole if whole > TINY else 0.0
        total[k], shared[k] = modelled, factor * max(whole - spent, 0.0) if whole > TINY else modelled
        price[k, 0], square[k], price[k, 1] = factor * linear, factor * squared_price, factor * by_decode
        price[k, 2] = factor * read / x[2] if x[2] > 0 else 0.0
        price[k, 3] = factor * attention / x[3] if x[3] > 0 else 0.0
    return total, shared, price, square


@compiled
def play_linear(
    duration: Floats, power: Floats, timed: bool, idle_w: Floats, span_s: Floats, busy_s: Floats, work: Floats
) -> tuple[Floats, Floats, Floats]:
    """`play` by a linear model: duration d·(1, x) in s, energy above idle θ·(Δ, 1, x) in J; a chunk has no square.

    Prices are the coefficients, at the pace of each step. `timed` False: durations are taken as given.
    """
    n = idle_w.size
    total, shared, price = np.empty(n), np.empty(n), np.empty((n, 4))
    for k in range(n):
        predicted_s, priced = duration[0], 0.0
        for j in range(4):
            predicted_s += duration[j + 1] * work[k, j]
        predicted_s = max(predicted_s if timed else span_s[k], TINY)
        pace = busy_s[k] / predicted_s if timed else 1.0
        per_s = power[0] + power[1] / predicted_s
        per_time = (idle_w[k] * span_s[k] / predicted_s + pace * power[0]) if timed else 0.0
        for j in range(4):
            per_s += power[j + 2] * work[k, j] / predicted_s
            price[k, j] = pace * power[j + 2] + per_time * duration[j + 1]
            priced += price[k, j] * work[k, j]
        total[k] = idle_w[k] * span_s[k] + per_s * busy_s[k]
        shared[k] = max(total[k] - priced, 0.0)
    return total, shared, price
