"""How well mixes fit their sources, and fitting them anew.

`python benchmarks/mix_fit.py FOLDER` measures every mix whose source file (plain, .xz) lies somewhere in FOLDER, over
20 seeds at the source's number of rows, and prints the `[goodness]` of its file; `--write` writes it there.
`--refit NAME` fits the components of that mix anew first, from those that it has: least squares on both marginal
distributions and on the joint distribution at the buckets' edges and at deciles.

As many rows drawn from the source itself miss its bucket shares, too: `resampled_bucket_error_max` says by how much
over 20 draws, and `mix_bucket_error` how far the mix is off apart from that (2 million rows).
"""

import argparse
import json
import lzma
import re
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import ndtr, ndtri
from scipy.stats import ks_2samp, spearmanr

import tracegen.mixes
from tracegen.buckets import BUCKETS, bucket_expr
from tracegen.lengths import Component, Mix, load_mix, mix_names, sample_lengths

SEEDS = 20
MIXES = Path(tracegen.mixes.__file__).parent
Lengths = NDArray[np.int64]
COLUMNS = (("ContextTokens", "GeneratedTokens"), ("num_prefill_tokens", "num_decode_tokens"))


def find(folder: Path, name: str) -> Path | None:
    """The file called `name`, or `name` with .xz, in `folder` or below."""
    return next((path for end in ("", ".xz") for path in folder.rglob(Path(name).name + end)), None)


def read_source(path: Path) -> tuple[Lengths, Lengths]:
    """Input and output lengths of an Azure or Vidur CSV or a Mooncake JSONL; rows with a zero are no requests."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    if ".jsonl" in path.name:
        rows = [json.loads(line) for line in raw.splitlines()]
        sides = [np.array([row[f"{side}_length"] for row in rows]) for side in ("input", "output")]
    else:
        frame = pl.read_csv(raw)
        names = next(names for names in COLUMNS if names[0] in frame.columns)
        sides = [frame[name].cast(pl.Int64).to_numpy() for name in names]
    sound = (sides[0] > 0) & (sides[1] > 0)
    return sides[0][sound], sides[1][sound]


def read_servegen(folder: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Input and output lengths of all clients by their share of the volume; ServeGen gives each side by itself."""
    sides: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for trace in sorted(folder.glob("chunk-*-trace.csv")):
        parts = json.loads(Path(str(trace).replace("-trace.csv", "-dataset.json")).read_text(encoding="utf-8"))
        rates = np.loadtxt(trace, delimiter=",", usecols=(0, 1), ndmin=2)
        starts = sorted(int(float(key)) for key in parts)
        for at_s, rate in rates[rates[:, 1] > 0]:
            part = parts[next(key for key in parts if int(float(key)) == max([s for s in starts if s <= at_s]))]
            for counter, side in zip(sides, ("input_tokens", "output_tokens"), strict=True):
                for length, share in _pmf(part[side]).items():
                    counter[length] += rate * share
    return dict(sides[0]), dict(sides[1])


def _pmf(text: str) -> dict[int, float]:
    """`{50: 0.04, 51: 0.08}`; shares sum to 1."""
    pairs = re.findall(r"(\d+(?:\.\d+)?): ([\d.eE+-]+)", text)
    total = sum(float(share) for _, share in pairs)
    return {int(float(length)): float(share) / total for length, share in pairs}


def shares(inputs: Lengths, outputs: Lengths) -> NDArray[np.float64]:
    """The share of each bucket."""
    frame = pl.DataFrame({"i": inputs, "o": outputs})
    bucket = frame.select(bucket_expr(pl.col("i"), pl.col("o"))).to_series()
    return np.array([(bucket == name).mean() for name in BUCKETS])


def measure(mix: Mix, inputs: Lengths, outputs: Lengths) -> dict[str, float]:
    """The mix's `[goodness]`."""
    rows, resampled, true_shares = [], [], shares(inputs, outputs)
    for seed in range(SEEDS):
        drawn = np.random.default_rng(seed).integers(0, inputs.size, inputs.size)
        resampled.append(float(np.abs(shares(inputs[drawn], outputs[drawn]) - true_shares).max()))
        own = sample_lengths(mix, inputs.size, seed)
        error = float(np.abs(shares(*own) - true_shares).max())
        ks = [ks_2samp(a, b).statistic for a, b in zip(own, (inputs, outputs), strict=True)]
        rows.append([*ks, error, own[0].mean(), own[1].mean(), spearmanr(*own).statistic])
    ks_in, ks_out, error, mean_in, mean_out, spearman = np.array(rows).T
    true = spearmanr(inputs, outputs).statistic
    return {
        **over_seeds(ks_in, ks_out),
        "worst_bucket_error_median": round(float(np.median(error)), 4),
        "worst_bucket_error_max": round(float(error.max()), 4),
        "mix_bucket_error": round(float(np.abs(shares(*sample_lengths(mix, 2_000_000, SEEDS)) - true_shares).max()), 4),
        "resampled_bucket_error_max": round(max(resampled), 4),
        "mean_input_tokens": round(float(mean_in.mean()), 1),
        "mean_output_tokens": round(float(mean_out.mean()), 1),
        "spearman": round(float(spearman.mean()), 3),
        "source_spearman": round(float(true), 3),
        "spearman_error_max": round(float(np.abs(spearman - true).max()), 3),
    }


def over_seeds(ks_in: NDArray[np.float64], ks_out: NDArray[np.float64]) -> dict[str, float]:
    """Distances of the seeds' samples, (SEEDS,) each, as `[goodness]` has them."""
    return {
        "seeds": SEEDS,
        "ks_input_median": round(float(np.median(ks_in)), 4),
        "ks_input_max": round(float(ks_in.max()), 4),
        "ks_output_median": round(float(np.median(ks_out)), 4),
        "ks_output_max": round(float(ks_out.max()), 4),
    }


def measure_marginals(mix: Mix, pmfs: tuple[dict[int, float], dict[int, float]], rows: int) -> dict[str, float]:
    """The part of `[goodness]` that marginal distributions alone allow; KS is to the distribution itself."""
    found: list[list[float]] = []
    for seed in range(SEEDS):
        line = []
        for own, pmf in zip(sample_lengths(mix, rows, seed), pmfs, strict=True):
            values = np.array(sorted(pmf))
            true = np.cumsum([pmf[v] for v in values.tolist()]) / sum(pmf.values())
            at = np.union1d(values, own)
            ours = np.searchsorted(np.sort(own), at, side="right") / rows
            below = np.searchsorted(values, at, side="right")
            line += [float(np.abs(ours - np.concatenate(([0.0], true))[below]).max()), float(own.mean())]
        found.append(line)
    ks_in, mean_in, ks_out, mean_out = np.array(found).T
    return {
        **over_seeds(ks_in, ks_out),
        "mean_input_tokens": round(float(mean_in.mean()), 1),
        "mean_output_tokens": round(float(mean_out.mean()), 1),
    }


NODES, WEIGHTS = np.polynomial.legendre.leggauss(24)


def joint_cdf(parameters: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(ln input <= a, ln output <= b) of the mixture, (a.size, b.size).

    Per component the integral over u from 0 to Phi(za) of Phi((zb - rho Phi^-1(u)) / sqrt(1 - rho²)).
    """
    weight, mu_in, s_in, mu_out, s_out, rho = unpack(parameters)
    top = ndtr((a[:, None] - mu_in) / s_in)  # (a, k)
    u = np.clip(top[:, :, None] * (NODES + 1) / 2, 1e-12, 1 - 1e-12)
    zb = ((b[:, None] - mu_out) / s_out)[None, :, :, None]
    inner = ndtr((zb - (rho[None, :, None] * ndtri(u))[:, None]) / np.sqrt(1 - rho**2)[:, None])
    return np.einsum("k,ak,abkn,n->ab", weight, top, inner, WEIGHTS / 2)


def unpack(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights, means, deviations and correlations, from what the optimizer moves freely."""
    raw = parameters.reshape(6, -1)
    weight = np.exp(raw[0] - raw[0].max())
    return np.array([weight / weight.sum(), raw[1], np.exp(raw[2]), raw[3], np.exp(raw[4]), 0.95 * np.tanh(raw[5])])


def refit(mix: Mix, inputs: Lengths, outputs: Lengths) -> tuple[Component, ...]:
    """The mix's components moved to where the source is matched best."""
    rows = np.array([[c.weight, c.mu_in, c.sigma_in, c.mu_out, c.sigma_out, c.rho] for c in mix.components]).T
    start = rows.copy()
    start[0], start[2], start[4] = np.log(rows[0]), np.log(rows[2]), np.log(rows[4])
    start[5] = np.arctanh(np.clip(rows[5], -0.94, 0.94) / 0.95)
    knots = [np.unique(np.quantile(x, np.linspace(0.005, 0.995, 200)).round()) for x in (inputs, outputs)]
    edges = (np.array([255, 1023, 8192]), np.array([99, 349]))
    deciles = [np.quantile(x, np.linspace(0.1, 0.9, 9)).round() for x in (inputs, outputs)]
    grid = [np.unique(np.concatenate((e, d))) for e, d in zip(edges, deciles, strict=True)]
    true = np.array([[((inputs <= a) & (outputs <= b)).mean() for b in grid[1]] for a in grid[0]])
    sure = [np.isin(g, e) for g, e in zip(grid, edges, strict=True)]
    scale = 1 + 4 * (sure[0][:, None] & sure[1])  # a bucket's share counts as much as five points of a curve

    def residuals(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        weight, mu_in, s_in, mu_out, s_out, _ = unpack(parameters)
        parts = [(scale * (joint_cdf(parameters, *(np.log(g + 0.5) for g in grid)) - true)).ravel()]
        for x, knot, mu, s in ((inputs, knots[0], mu_in, s_in), (outputs, knots[1], mu_out, s_out)):
            model = (weight * ndtr((np.log(knot + 0.5)[:, None] - mu) / s)).sum(axis=1)
            edge = (weight * ndtr((np.log(np.concatenate((edges[0], edges[1])) + 0.5)[:, None] - mu) / s)).sum(axis=1)
            seen = np.array([(x <= v).mean() for v in np.concatenate((edges[0], edges[1]))])
            parts += [model - np.searchsorted(np.sort(x), knot, side="right") / x.size, 5 * (edge - seen)]
        return np.concatenate(parts)

    best = unpack(least_squares(residuals, start.ravel(), method="trf", max_nfev=200).x)
    best[2], best[4] = np.maximum(best[2], 0.003), np.maximum(best[4], 0.003)
    digits = (5, 4, 4, 4, 4, 3)
    columns = [column.round(d).tolist() for column, d in zip(best, digits, strict=True)]
    columns[0][0] = round(columns[0][0] + 1 - sum(columns[0]), 5)
    return tuple(Component(*row) for row in zip(*columns, strict=True))


def write(name: str, goodness: dict[str, float], components: tuple[Component, ...] | None) -> None:
    """Put the figures, and new components, into the mix's file; what else is in it stays."""
    path = MIXES / f"{name}.toml"
    text = path.read_text(encoding="utf-8")
    lines = "".join(f"{key} = {value}\n" for key, value in goodness.items())
    text = re.sub(r"(\[goodness\]\n).*?(\n(?:\[|#)|\Z)", lambda m: m[1] + lines + m[2], text, count=1, flags=re.DOTALL)
    if components:
        rows = "".join(
            f"  {{ weight = {c.weight:.5f}, mu_in = {c.mu_in:.4f}, sigma_in = {c.sigma_in:.4f}, "
            f"mu_out = {c.mu_out:.4f}, sigma_out = {c.sigma_out:.4f}, rho = {c.rho:.3f} }},\n"
            for c in components
        )
        text = re.sub(r"components = \[\n.*?\n\]\n", lambda _: f"components = [\n{rows}]\n", text, flags=re.DOTALL)
    tomllib.loads(text)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mix", action="append", help="only this one; may be given several times")
    parser.add_argument("--refit", action="append", default=[], metavar="NAME")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    for name in asked.mix or mix_names():
        mix = load_mix(name)
        components = None
        if servegen := mix.source.get("folder"):
            found = next(iter(asked.folder.rglob(servegen)), None)
            if found is None:
                continue
            goodness = measure_marginals(mix, read_servegen(found), mix.source["measured_rows"])
        else:
            path = find(asked.folder, mix.source.get("file", "no file"))
            if path is None:
                print(f"{name}: its source is not in {asked.folder}")
                continue
            lengths = read_source(path)
            if name in asked.refit:
                components = refit(mix, *lengths)
                mix = Mix(**{**vars(mix), "components": components})
            goodness = measure(mix, *lengths)
        print(name, json.dumps(goodness, indent=2))
        if asked.write:
            write(name, goodness, components)


if __name__ == "__main__":
    main()
