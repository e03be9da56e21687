"""The game of `analysis.pricing`, step by step, compiled.

Numba looks at this file alone to tell whether its machine code is current, so nothing compiled is called from
elsewhere.
"""

import math

import numpy as np

from analysis.kernels import Bools, Floats, Ints, compiled

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(3)
_X1, _X2, _X3 = (float(x + 1) / 2 for x in _NODES)
_W1, _W2, _W3 = (float(w) / 2 for w in _WEIGHTS)
_TIMES = tuple((float(x + 1) / 2, float(w) / 2) for x, w in zip(*np.polynomial.legendre.leggauss(5), strict=True))
MOST_CHUNKS = 6  # whose 64 subsets are gone through; a step of more is long, and what any one adds to it is small
MOST_WAVES = 16.0  # of decodes, that are told apart; where more go by, their edges average out
FEW_WAVES = 4.0  # of decodes; of more, each is so short a stretch that its middle stands for it
MOST_DECODES = 4096  # in a step that is looked up; a table of more would take more memory than time
# Nodes of mean context between c and 2·c, evenly. Between two of them a curve is off by at most an eighth of its
# relative curvature times the distance's square, 1.2e-4 of it; measured on simulated runs, below 1e-6.
NODES_PER_OCTAVE = 32
ROOTS = 512  # nodes of the soft maximum's table,
DIRECT = 32  # of which the first are not used
FIRST_ROOT = 36  # where it begins in the model
TINY = 1e-12


def roots_of(exponent: float) -> Floats:
    """`(1 + r^exponent)^(1/exponent)` and its slope, at `ROOTS` + 1 ratios r from 0 to 1, one after the other."""
    ratio = np.linspace(0.0, 1.0, ROOTS + 1)
    root = (1.0 + ratio**exponent) ** (1.0 / exponent)
    slope = root / (1.0 + ratio**exponent) * ratio ** (exponent - 1.0)
    return np.asarray(np.stack([root, slope], axis=1).ravel())


@compiled
def _root(m: Floats, ratio: float) -> tuple[float, float]:
    """`(1 + ratio^p)^(1/p)` and its slope, p the model's exponent: two powers take longer than all else of `_state`.

    Between two nodes the cubic that has their values and slopes, off by < 1e-10, and its slope by < 1e-6.
    """
    at = ratio * ROOTS
    node = int(at)
    if node < DIRECT:  # there the fourth derivative may be without bounds
        power = ratio ** m[31]
        root = (1.0 + power) ** (1.0 / m[31])
        return root, root / (1.0 + power) * (power / ratio) if ratio > 0 else 0.0
    node = min(node, ROOTS - 1)
    t = at - node
    i = FIRST_ROOT + 2 * node
    low, high = m[i], m[i + 2]
    rise, from_low, to_high = high - low, m[i + 1] / ROOTS, m[i + 3] / ROOTS
    bend, twist = 3.0 * rise - 2.0 * from_low - to_high, from_low + to_high - 2.0 * rise
    return low + t * (from_low + t * (bend + t * twist)), (from_low + t * (2.0 * bend + 3.0 * t * twist)) * ROOTS


@compiled
def _state(
    m: Floats, idle_w: float, tokens: float, decode: float, context: float, attention: float, pad: float
) -> tuple[float, float, float]:
    """Energy, J, its slope by context, and the duration, s, of a step; the work in the order of the model's columns.

    `m` is the model: overhead, compute and memory (6 each), power (13), exponent, wave, compute time that draws no
    power, s a token of `pad`, which is what the last wave is short of, in tokens; the power cap and its exponent; the
    table of `roots_of`.
    """
    c = m[0] + m[1] * tokens + m[2] * decode + m[3] * context + m[4] * attention + m[5] * pad
    a = m[6] + m[7] * tokens + m[8] * decode + m[9] * context + m[10] * attention + m[11] * pad
    b = m[12] + m[13] * tokens + m[14] * decode + m[15] * context + m[16] * attention + m[17] * pad
    high, low = max(a, b), min(a, b)
    soft, of_high, of_low = a + b, 1.0, 1.0  # of the larger and the smaller: (x / soft)^(exponent - 1)
    if high > TINY:
        root, of_low = _root(m, low / high)
        soft = high * root
        of_high = root - low / high * of_low  # what is homogeneous is the sum of its slopes times what they are by
    soft = max(soft, TINY)
    span = max(c + soft, TINY)
    u, v = (a - m[33] * pad) / span, b / span
    watts = idle_w + m[18] + m[19] * u + m[20] * v + m[21] * (2.0 - u) * u + m[22] * (2.0 - v) * v
    watts += m[23] * u * u + m[24] * v * v + m[25] * u * v
    energy = watts * span + m[26] + m[27] * tokens + m[28] * decode + m[29] * context + m[30] * attention
    # With Δ' the slope of Δ: E' = Δ'·(P - u·P_u - v·P_v), plus P_u for a and P_v for b themselves.
    by_u = m[19] + 2 * m[21] * (1.0 - u) + 2 * m[23] * u + m[25] * v
    by_v = m[20] + 2 * m[22] * (1.0 - v) + 2 * m[24] * v + m[25] * u
    common = watts - u * by_u - v * by_v
    in_a = common * (of_high if a >= b else of_low) + by_u
    in_b = common * (of_low if a >= b else of_high) + by_v
    by_context = common * m[3] + in_a * m[9] + in_b * m[15] + m[29]
    above = energy / span - idle_w
    if above <= m[34]:
        return energy, by_context, span
    # The cap holds: power is the cap, compute is slower, and context costs what time it takes.
    a *= (above / m[34]) ** m[35]
    high, low = max(a, b, TINY), min(a, b)
    root, of_low = _root(m, low / high)
    of_b = root - low / high * of_low if b >= a else of_low
    span = max(c + high * root, TINY)
    watts = idle_w + m[34]
    return watts * span, watts * (m[3] + of_b * m[15]), span


@compiled
def _pad(wave: float, tokens: float) -> float:
    """What the last of the waves of `tokens` is short of; 0 without waves."""
    return wave * np.ceil(tokens / wave) - tokens if wave > 0 else 0.0


@compiled
def _chance(others: int, here: int, k: float, decoders: float) -> float:
    """The chance that of `others` chunks just the certain `here` came before, given that `k` of `decoders` decodes did.

    All arrive at times uniform in (0, 1), so with n = `decoders` - k it is B(k + 1 + here, n + 1 + others - here) /
    B(k + 1, n + 1).
    """
    p = 1.0
    for i in range(here):
        p *= k + 1.0 + i
    for i in range(others - here):
        p *= decoders - k + 1.0 + i
    for i in range(others):
        p /= decoders + 2.0 + i
    return p


@compiled
def _points(count: float) -> tuple[float, float]:
    """Three points that stand for `count` whole numbers in a row: one in the middle, and two so far from it.

    And the part of them that each of the two stands for. They have the means of all polynomials up to the fifth degree
    (the Gauss rule of the discrete uniform distribution; of two numbers and of one these themselves).
    """
    if count < 3:
        return (0.5, 0.5) if count > 1 else (0.0, 0.0)
    squared = (3.0 * count * count - 7.0) / 20.0
    return np.sqrt(squared), (count * count - 1.0) / (24.0 * squared)


@compiled
def _beside(
    m: Floats, idle_w: float, x: Floats, decoders: int, chunks: int, here: int, tokens: float, attention: float
) -> tuple[float, float, float]:
    """Means over the decodes that came before, of a step `x` (4,) in which `here` of `chunks` are, of these `tokens`.

    Of the energy, J: by the chance that one of these came last, and that one of the others comes next; and of the
    slope by context. A step has k of its decodes, k uniform over 0..decoders; between two edges of waves energy is
    smooth in k, and three points stand for all, or one.
    """
    wave = m[32]
    each = x[1] / max(decoders, 1)
    many, blurred = x[1] > FEW_WAVES * wave, x[1] > MOST_WAVES * wave  # both where there are no waves
    last_j, next_j, slope = 0.0, 0.0, 0.0
    first = 0
    while first <= decoders:
        final = decoders
        padded = 0.0
        smooth = blurred and tokens + first > 0
        if wave > 0 and not smooth:
            padded = wave * np.ceil((tokens + first * each) / wave)
            if each > 0:
                final = max(first, min(decoders, int(np.floor((padded - tokens) / each + 1e-9))))
        count = final - first + 1.0
        away, outer = (0.0, 0.0) if padded > 0 and many else _points(count)
        for point in range(-1, 2):
            part = 1.0 - 2.0 * outer if point == 0 else outer
            if part < TINY:
                continue
            k = 0.5 * (first + final) + point * away
            pad = max(padded - tokens - k * each, 0.0)
            if wave > 0 and smooth:
                pad = 0.5 * (wave - 1.0)
            context = x[2] * k / max(decoders, 1)
            energy, by_context, _ = _state(m, idle_w, tokens, k * each, context, attention, pad)
            weight = part * count / (decoders + 1.0)
            if here > 0:
                last_j += weight * _chance(chunks - 1, here - 1, k, decoders) * energy
            if here < chunks:
                next_j += weight * _chance(chunks - 1, here, k, decoders) * energy
            slope += weight * _chance(chunks, here, k, decoders) * max(by_context, 0.0)
        first = final + 1
    return last_j, next_j, slope


@compiled
def _few(m: Floats, idle_w: float, x: Floats, decoders: int, tokens: Floats, attention: Floats, due_j: Floats) -> float:
    """Put into `due_j` what each of a few chunks adds on average; the mean slope by context."""
    chunks = tokens.size
    slope = 0.0
    for subset in range(1 << chunks):
        here, inside, work = 0, 0.0, 0.0
        for i in range(chunks):
            if subset >> i & 1:
                here += 1
                inside += tokens[i]
                work += attention[i]
        last_j, next_j, by_context = _beside(m, idle_w, x, decoders, chunks, here, inside, work)
        slope += by_context
        for i in range(chunks):
            due_j[i] += last_j if subset >> i & 1 else -next_j
    return slope


@compiled
def _many(m: Floats, idle_w: float, x: Floats, tokens: Floats, attention: Floats, due_j: Floats) -> float:
    """`_few` of many chunks: to each the largest other is there or not, and of the rest so many tokens.

    At time u that rest has the mean u·Σ tokens and the variance u·(1 - u)·Σ tokens², and two points stand for it that
    have both. Among so many the edges of waves average out.
    """
    blur = max(0.5 * (m[32] - 1.0), 0.0)
    largest = int(np.argmax(tokens))
    second = -1
    squares = 0.0
    for i in range(tokens.size):
        squares += tokens[i] ** 2
        if i != largest and (second < 0 or tokens[i] > tokens[second]):
            second = i
    slope = 0.0
    for u, weight in _TIMES:
        decode, context = u * x[1], u * x[2]
        slope += weight * max(_state(m, idle_w, u * x[0], decode, context, u * x[3], blur)[1], 0.0)
        for i in range(tokens.size):
            big = second if i == largest else largest
            rest = max(x[0] - tokens[i] - tokens[big], 0.0)
            spread = np.sqrt(u * (1.0 - u) * max(squares - tokens[i] ** 2 - tokens[big] ** 2, 0.0))
            for side in (-1.0, 1.0):
                inside = min(max(u * rest + side * spread, 0.0), rest)
                work = max(x[3] - attention[i] - attention[big], 0.0) * (inside / max(rest, 1.0))
                for chance, there in ((1.0 - u, 0.0), (u, 1.0)):
                    t, w = inside + there * tokens[big], work + there * attention[big]
                    more = _state(m, idle_w, t + tokens[i], decode, context, w + attention[i], blur)[0]
                    less = _state(m, idle_w, t, decode, context, w, blur)[0]
                    due_j[i] += weight * 0.5 * chance * (more - less)
    return slope


@compiled
def _only_decodes(m: Floats, decodes: float, context: float) -> tuple[float, float, float, float]:
    """Of a step without prefill: energy without idle power, J; its mean slope by context; both by a watt of idle power.

    The slope is along the way from no work to all of it, three Gauss points.
    """
    energy, _, span = _state(m, 0.0, 0.0, decodes, context, 0.0, _pad(m[32], decodes))
    cold, warm = 0.0, 0.0
    for node, weight in ((_X1, _W1), (_X2, _W2), (_X3, _W3)):
        pad = _pad(m[32], np.floor(node * decodes + 0.5))
        cold += weight * _state(m, 0.0, 0.0, node * decodes, node * context, 0.0, pad)[1]
        warm += weight * _state(m, 1.0, 0.0, node * decodes, node * context, 0.0, pad)[1]
    return energy, cold, span, warm - cold


@compiled
def _node(mean: float) -> int:
    """The last node of a mean context of at least 1 that is not beyond it."""
    part, octave = math.frexp(mean)
    return int((2.0 * part - 1.0) * NODES_PER_OCTAVE) + NODES_PER_OCTAVE * (octave - 1)


@compiled
def _nodes(work: Floats) -> tuple[int, Floats]:
    """The most decodes in a step that is looked up, and the nodes of the mean context in one."""
    decodes, context = 0.0, 1.0
    for k in range(work.shape[0]):
        if work[k, 0] <= 0 and work[k, 1] <= MOST_DECODES:
            decodes = max(decodes, work[k, 1])
            context = max(context, work[k, 2] / max(work[k, 1], 1.0))
    at = np.empty(_node(context) + 2)
    for i in range(at.size):
        octave = i // NODES_PER_OCTAVE
        at[i] = 2.0**octave * (1.0 + (i - octave * NODES_PER_OCTAVE) / NODES_PER_OCTAVE)
    return int(decodes), at


@compiled
def _look_up(
    m: Floats, decodes: float, context: float, at: Floats, known: Bools, table: Floats
) -> tuple[float, float, float, float]:
    """`_only_decodes` from `table`, by decodes and node, where it is `known`; what is asked for first is put there."""
    mean = context / max(decodes, 1.0)
    row = int(decodes)
    if mean < 1.0 or decodes > MOST_DECODES or row != decodes:
        return _only_decodes(m, decodes, context)
    node = _node(mean)
    for i in (node, node + 1):
        if not known[row, i]:
            table[row, i, 0], table[row, i, 1], table[row, i, 2], table[row, i, 3] = _only_decodes(
                m, decodes, row * at[i]
            )
            known[row, i] = True
    below, above, part = table[row, node], table[row, node + 1], (mean - at[node]) / (at[node + 1] - at[node])
    return (
        below[0] + part * (above[0] - below[0]),
        below[1] + part * (above[1] - below[1]),
        below[2] + part * (above[2] - below[2]),
        below[3] + part * (above[3] - below[3]),
    )


@compiled
def _with_chunks(
    m: Floats, idle_w: float, x: Floats, requests: float, tokens: Floats, attention: Floats, due_j: Floats
) -> tuple[float, float, float]:
    """Of a step with prefill: energy, J, and duration, s; the mean slope by context. Fills `due_j` of its chunks."""
    energy, _, span = _state(m, idle_w, x[0], x[1], x[2], x[3], _pad(m[32], x[0] + x[1]))
    if tokens.size > MOST_CHUNKS:
        slope = _many(m, idle_w, x, tokens, attention, due_j)
    else:
        decoders = max(round(requests) - tokens.size, 1) if x[1] > 0 else 0
        slope = _few(m, idle_w, x, decoders, tokens, attention, due_j)
    for i in range(due_j.size):
        due_j[i] = max(due_j[i], 0.0)
    return energy, span, slope


@compiled
def play(
    m: Floats,
    idle_w: Floats,
    span_s: Floats,
    busy_s: Floats,
    work: Floats,
    requests: Floats,
    first: Ints,
    tokens: Floats,
    attention: Floats,
) -> tuple[Floats, Floats, Floats, Floats]:
    """Total and shared energy, J, and prices (n, 4) of each step with `work` (n, 4); and what each chunk pays, J.

    All are scaled to the step's own duration `span_s`, of which it was `busy_s` at work. The chunks of step k are
    `tokens` and `attention` from `first[k]` to `first[k + 1]`, and are its prefill, which has no prices. `m` is the
    model, as in `_state`.

    Steps without prefill, which most are, are looked up: for each number of decodes at some mean contexts
    (`NODES_PER_OCTAVE`), worked out when first asked for, and linearly between.
    """
    n = idle_w.size
    total, shared, price, due_j = np.empty(n), np.empty(n), np.empty((n, 4)), np.zeros(tokens.size)
    nothing_j, _, nothing_s = _state(m, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # at zero work, but for idle power
    decodes, at = _nodes(work)
    known, table = np.zeros((decodes + 1, at.size), dtype=np.bool_), np.empty((decodes + 1, at.size, 4))
    for k in range(n):
        x, idle = work[k], idle_w[k]
        due = due_j[first[k] : first[k + 1]]
        if due.size > 0:
            own = tokens[first[k] : first[k + 1]], attention[first[k] : first[k + 1]]
            full_j, full_s, slope = _with_chunks(m, idle, x, requests[k], own[0], own[1], due)
        else:
            cold_j, cold_slope, full_s, warm_slope = _look_up(m, x[1], x[2], at, known, table)
            full_j, slope = cold_j + idle * full_s, cold_slope + idle * warm_slope
        zero_j = nothing_j + idle * nothing_s
        whole = max(full_j, zero_j)
        free, paid = whole - zero_j, due.sum()
        if paid > 0 and (paid > free or x[1] <= 0):  # without decodes the chunks pay it all
            due *= free / paid
            paid = free
        left = max(free - paid, 0.0)
        read = min(max(slope * x[2], 0.0), left)
        by_decode = (left - read) / x[1] if x[1] > 0 else 0.0
        spent = paid + by_decode * x[1] + read
        modelled = idle * span_s[k] + (full_j / full_s - idle) * busy_s[k]
        factor = modelled / whole if whole > TINY else 0.0
        due *= factor
        total[k], shared[k] = modelled, factor * max(whole - spent, 0.0) if whole > TINY else modelled
        price[k, 0], price[k, 3] = 0.0, 0.0
        price[k, 1], price[k, 2] = factor * by_decode, factor * read / x[2] if x[2] > 0 else 0.0
    return total, shared, price, due_j


@compiled
def play_linear(
    duration: Floats, power: Floats, timed: bool, idle_w: Floats, span_s: Floats, busy_s: Floats, work: Floats
) -> tuple[Floats, Floats, Floats]:
    """`play` by a linear model: duration d·(1, x) in s, energy above idle θ·(Δ, 1, x) in J; chunks pay by price.

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
