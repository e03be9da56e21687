"""Fit input and output lengths: a mixture of bivariate lognormals, as `tracegen.lengths` samples it.

Expectation maximization (Dempster, Laird, Rubin 1977) with numbers of components that grow as long as requests held out
become more likely; then least squares on both marginal distributions and on the joint distribution at the buckets'
edges and at deciles, since a likelihood cares little for the shares that buckets have.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from tracegen.buckets import INPUT_EDGES, OUTPUT_EDGES
from tracegen.lengths import Component
from tracegen.streams import random_stream

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_COMPONENTS = 10
ROWS_A_COMPONENT = 50  # fewer requests do not settle six parameters
EM_ROWS = 20_000  # drawn from larger traces: their parameters' error is then below 1 %
GAIN = 0.01  # log-likelihood a held-out request that makes one more component worth its six numbers
STAYS = (0.03, 0.01, 0.003)  # how much a parameter's way counts, beside differences of shares
CLOSE = 0.015  # largest difference of distribution functions: that of two draws of 6,000, 0.83 sqrt(2/n) in the median
CORNER = 5.0  # points of a curve that a bucket's corner counts as much as
SIGMA_FLOOR = 0.0005  # a spike: half a token at 1000
RHO_LIMIT = 0.95
_RHO_ROOM = 0.96
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


@dataclass(frozen=True)
class Lengths:
    """Fitted lengths, as a mix file has them, and what each component holds of the requests."""

    components: tuple[Component, ...]
    low: tuple[int, int]
    high: tuple[int, int]


def fit_lengths(inputs: Ints, outputs: Ints, seed: int, components: int | None = None) -> Lengths:
    """The mixture for `inputs` and `outputs` (n each, tokens from 1 on), with so many `components`.

    None: the number is chosen by held-out likelihood. The same arguments give the same mixture.
    """
    points = _log_points(inputs, outputs, seed)
    with threadpool_limits(1):  # threads would only wait for each other over matrices this small
        rows = _expect_maximize(points, components, seed) if components else _choose(points, seed)
        best = _refine(rows, inputs, outputs)
    return Lengths(
        _components(best),
        (int(inputs.min()), int(outputs.min())),
        (int(inputs.max()), int(outputs.max())),
    )


def _log_points(inputs: Ints, outputs: Ints, seed: int) -> Floats:
    """Logarithms of the lengths, (n, 2), at most `EM_ROWS`.

    Each length is spread over the half token to both sides that sampling rounds away; whole numbers would draw the
    likelihood to components of no width.
    """
    stream = random_stream(seed, "fit rows")
    both = np.stack([inputs, outputs], axis=1)
    if len(both) > EM_ROWS:
        both = both[stream.choice(len(both), EM_ROWS, replace=False)]
    spread: Floats = np.log(both + stream.uniform(-0.5, 0.5, both.shape))
    return spread


def _choose(points: Floats, seed: int) -> Floats:
    """The mixture with the most components of which each gained `GAIN` on a fifth that was held out."""
    order = random_stream(seed, "fit held out").permutation(len(points))
    held, known = points[order[: len(points) // 5]], points[order[len(points) // 5 :]]
    most = max(1, min(MAX_COMPONENTS, len(known) // ROWS_A_COMPONENT))
    best, best_gain, worse = 1, -math.inf, 0
    for count in range(1, most + 1):
        rows = _expect_maximize(known, count, seed)
        gain = float(_log_sum(_log_densities(held, rows)).mean()) if len(held) else 0.0
        if gain > best_gain + GAIN:
            best, best_gain, worse = count, gain, 0
        else:
            worse += 1
        if worse == 2:  # one more may be a poor start of the algorithm
            break
    return _expect_maximize(points, best, seed)


def _expect_maximize(points: Floats, count: int, seed: int) -> Floats:
    """Weights, means, deviations and correlations, (6, `count`), after at most 200 rounds from a k-means start."""
    from scipy.cluster.vq import kmeans2

    scaled = (points - points.mean(axis=0)) / np.maximum(points.std(axis=0), SIGMA_FLOOR)
    stream = random_stream(seed, "fit start", count)
    _, label = kmeans2(scaled, count, minit="++", rng=stream)
    shares = np.zeros((len(points), count))
    shares[np.arange(len(points)), label] = 1.0
    rows, before = _maximize(points, shares), -math.inf
    for _ in range(200):
        log = _log_densities(points, rows)
        total = _log_sum(log)
        if total.mean() - before < 1e-5:
            break
        before = float(total.mean())
        rows = _maximize(points, np.exp(log - total[:, None]))
    return rows


def _maximize(points: Floats, shares: Floats) -> Floats:
    """The mixture that fits best when each point belongs to the components by its `shares`, (n, k)."""
    mass = shares.sum(axis=0) + 1e-9
    mean = shares.T @ points / mass[:, None]
    square = shares.T @ (points * points) / mass[:, None] - mean**2
    product = shares.T @ (points[:, 0] * points[:, 1]) / mass - mean[:, 0] * mean[:, 1]
    sigma = np.sqrt(np.maximum(square, SIGMA_FLOOR**2))
    rho = np.clip(product / (sigma[:, 0] * sigma[:, 1]), -RHO_LIMIT, RHO_LIMIT)
    return np.array([mass / mass.sum(), mean[:, 0], sigma[:, 0], mean[:, 1], sigma[:, 1], rho])


def _log_densities(points: Floats, rows: Floats) -> Floats:
    """Logarithm of weight times density of each component at each point, (n, k)."""
    weight, mu_in, s_in, mu_out, s_out, rho = rows
    a = (points[:, :1] - mu_in) / s_in
    b = (points[:, 1:] - mu_out) / s_out
    rest = 1 - rho**2
    exponent = (a * a - 2 * rho * a * b + b * b) / (2 * rest)
    log: Floats = np.log(weight / (2 * math.pi * s_in * s_out * np.sqrt(rest))) - exponent
    return log


def _log_sum(log: Floats) -> Floats:
    """Logarithm of the sum over components, (n)."""
    top = log.max(axis=1)
    total: Floats = top + np.log(np.exp(log - top[:, None]).sum(axis=1))
    return total


def _refine(rows: Floats, inputs: Ints, outputs: Ints) -> Floats:
    """The mixture moved to where both marginals and the joint distribution on a grid are matched best.

    Each parameter is held back where the likelihood had it: distribution functions alone would let components that
    matter little run away. Less and less, until the distributions are close.
    """
    target = _Target.of(inputs, outputs)
    best, least = rows, math.inf
    for stay in STAYS:
        first = _moved(rows, rows, target, stay)
        found = _moved(first, rows, target.stressed(first), stay)
        if (missed := target.worst(found)) < least:
            best, least = found, missed
        if least < CLOSE:
            break
    return best


def _moved(rows: Floats, home: Floats, target: "_Target", stay: float) -> Floats:
    """From `rows` to the least squares of what `target` is missed by, and of `stay` times the way from `home`."""
    from scipy.optimize import least_squares

    start = _pack(home)

    def residuals(free: Floats) -> Floats:
        return np.concatenate([target.residuals(free), stay * (free - start)])

    def slopes(free: Floats) -> Floats:
        return np.concatenate([target.slopes(free), stay * np.eye(free.size)])

    return _unpack(least_squares(residuals, _pack(rows), slopes, method="trf", max_nfev=100).x)


def _pack(rows: Floats) -> Floats:
    """`rows` as numbers that an optimizer may move freely; `_unpack` is the inverse."""
    weight, mu_in, s_in, mu_out, s_out, rho = rows
    limited = np.arctanh(np.clip(rho / _RHO_ROOM, -0.99, 0.99))
    return np.concatenate([np.log(weight), mu_in, np.log(s_in), mu_out, np.log(s_out), limited])


def _unpack(free: Floats) -> Floats:
    raw = free.reshape(6, -1)
    weight = np.exp(raw[0] - raw[0].max())
    sigma = np.maximum(np.exp(np.minimum(raw[[2, 4]], 3.0)), SIGMA_FLOOR)
    return np.array([weight / weight.sum(), raw[1], sigma[0], raw[3], sigma[1], _RHO_ROOM * np.tanh(raw[5])])


@dataclass(frozen=True)
class _Target:
    """Distribution functions of a trace's lengths at a few hundred places."""

    knots: tuple[Ints, Ints]
    grid: tuple[Ints, Ints]
    shares: Floats  # of requests up to each point of the grid, then of lengths up to each knot of inputs and outputs
    scale: Floats  # how much each counts

    @classmethod
    def of(cls, inputs: Ints, outputs: Ints) -> "_Target":
        sides, edges = (inputs, outputs), (np.array(INPUT_EDGES) - [1, 1, 0], np.array(OUTPUT_EDGES) - 1)
        knots = [np.unique(np.quantile(x, np.linspace(0.002, 0.998, 300)).round()).astype(np.int64) for x in sides]
        marginals = [np.searchsorted(np.sort(x), k, side="right") / x.size for x, k in zip(sides, knots, strict=True)]
        deciles = [np.quantile(x, np.linspace(0.1, 0.9, 9)).round() for x in sides]
        grid = [np.unique(np.concatenate((e, d))).astype(np.int64) for e, d in zip(edges, deciles, strict=True)]
        counts = np.zeros((grid[0].size + 1, grid[1].size + 1))
        np.add.at(counts, tuple(np.searchsorted(g, x) for g, x in zip(grid, sides, strict=True)), 1 / inputs.size)
        joint = counts.cumsum(0).cumsum(1)[:-1, :-1]
        at_edge = [np.isin(g, e) for g, e in zip(grid, edges, strict=True)]
        scale = 1 + (CORNER - 1) * (at_edge[0][:, None] & at_edge[1])
        return cls(
            (knots[0], knots[1]),
            (grid[0], grid[1]),
            np.concatenate([joint.ravel(), *marginals]),
            np.concatenate([scale.ravel(), np.ones(sum(k.size for k in knots))]),
        )

    def stressed(self, rows: Floats) -> "_Target":
        """The same, but of the marginals what `rows` match worst counts more: their distance is its worst point."""
        missed = np.abs(self._features(rows) @ rows[0] - self.shares)
        more = np.sqrt(1 + missed / missed.mean())
        more[: self.grid[0].size * self.grid[1].size] = 1.0
        return replace(self, scale=self.scale * more)

    def worst(self, rows: Floats) -> float:
        """The largest difference of a marginal distribution, or three times that of a bucket's corner if it is more."""
        missed = np.abs(self._features(rows) @ rows[0] - self.shares)
        corners = self.scale[: self.grid[0].size * self.grid[1].size] > 1
        marginals = missed[corners.size :]
        return float(max(marginals.max(), 3 * missed[: corners.size][corners].max()))

    def residuals(self, free: Floats) -> Floats:
        """Model less trace."""
        rows = _unpack(free)
        missed: Floats = self.scale * (self._features(rows) @ rows[0] - self.shares)
        return missed

    def slopes(self, free: Floats) -> Floats:
        """Derivatives of the residuals. A component's parameters move its own part only: six steps make them all."""
        rows, step = _unpack(free), 1e-6
        now = self._features(rows)
        parts = [rows[0] * (now - (now @ rows[0])[:, None])]
        for k in range(1, 6):
            moved = free.reshape(6, -1).copy()
            moved[k] += step
            parts.append(rows[0] * (self._features(_unpack(moved.ravel())) - now) / step)
        slopes: Floats = self.scale[:, None] * np.concatenate(parts, axis=1)
        return slopes

    def _features(self, rows: Floats) -> Floats:
        """What each component alone would have for `shares`, (n, k)."""
        from scipy.special import ndtr

        _, mu_in, s_in, mu_out, s_out, _ = rows
        parts = [_joint(rows, *(np.log(g + 0.5) for g in self.grid))]
        for knot, mu, sigma in zip(self.knots, (mu_in, mu_out), (s_in, s_out), strict=True):
            parts.append(ndtr((np.log(knot + 0.5)[:, None] - mu) / sigma))
        return np.concatenate(parts)


def _joint(rows: Floats, a: Floats, b: Floats) -> Floats:
    """P(ln input <= a, ln output <= b) in each component, (a.size * b.size, k).

    The integral of Phi((zb - rho Phi^-1(u)) / sqrt(1 - rho^2)) over u from 0 to Phi(za), by Gauss.
    """
    from scipy.special import ndtr, ndtri

    _, mu_in, s_in, mu_out, s_out, rho = rows
    top = ndtr((a[:, None] - mu_in) / s_in)  # (a, k)
    z = ndtri(np.clip(top[:, :, None] * (_NODES + 1) / 2, 1e-12, 1 - 1e-12))
    zb = ((b[:, None] - mu_out) / s_out)[None, :, :, None]
    inner = ndtr((zb - (rho[:, None] * z)[:, None]) / np.sqrt(1 - rho**2)[:, None])
    joint: Floats = np.einsum("ak,abkn,n->abk", top, inner, _WEIGHTS / 2)
    return joint.reshape(-1, rho.size)


def _components(rows: Floats) -> tuple[Component, ...]:
    """`rows` as components, rounded as mix files are, the heaviest first."""
    order = np.argsort(-rows[0])
    columns = [row[order].round(d).tolist() for row, d in zip(rows, (5, 4, 4, 4, 4, 3), strict=True)]
    return tuple(Component(*row) for row in zip(*columns, strict=True) if row[0] > 0)
