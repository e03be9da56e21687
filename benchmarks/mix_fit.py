"""How well mixes fit their sources, and fitting them anew.

`python benchmarks/mix_fit.py FOLDER` measures every mix whose source file (plain, .xz) lies somewhere in FOLDER, over
20 seeds at the source's number of rows, and prints the `[goodness]` of its file; `--write` writes it there.
`--refit NAME` fits the components of that mix anew first, as `tracegen fit` does.

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
from scipy.stats import ks_2samp, spearmanr

import tracegen.mixes
from tracegen.buckets import BUCKETS, INPUT_EDGES, OUTPUT_EDGES, bucket_expr
from tracegen.fit.lengths import fit_lengths
from tracegen.fit.mixfile import components_text
from tracegen.lengths import Component, Mix, load_mix, mix_names, sample_lengths

SEEDS = 20
MIXES = Path(tracegen.mixes.__file__).parent
Lengths = NDArray[np.int64]
COLUMNS = (("ContextTokens", "GeneratedTokens"), ("num_prefill_tokens", "num_decode_tokens"))

# Lognormal mixtures (weight, mu, sigma) of inputs and of outputs, where the source itself is not to be had: fitted to
# its rows by expectation maximization, at Kolmogorov-Smirnov distances of 0.004 and 0.006 from them.
MARGINALS = {
    "sharegpt": (
        (
            (0.10254, 3.4392, 0.7654),
            (0.14578, 5.6274, 0.9632),
            (0.31349, 7.0646, 0.5556),
            (0.2337, 7.9623, 0.337),
            (0.13704, 8.492, 0.1889),
            (0.06745, 8.8108, 0.0851),
        ),
        (
            (0.01015, 1.1507, 0.3777),
            (0.17348, 4.3947, 0.891),
            (0.20057, 5.5142, 0.4571),
            (0.33769, 6.0706, 0.2722),
            (0.19399, 6.524, 0.1651),
            (0.08413, 6.82, 0.0665),
        ),
    )
}


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


def stand_in(mix: Mix) -> tuple[Lengths, Lengths]:
    """As many rows as the source has, from what is published of it: `MARGINALS` and the shares of buckets.

    Within a bucket input and output are drawn independently: nothing else is known, and their rank correlation comes
    out as the source's.
    """
    stream = np.random.default_rng(0)
    pools = []
    for marginal, low, high in zip(MARGINALS[mix.name], mix.low, mix.high, strict=True):
        weight, mu, sigma = np.array(marginal).T
        k = stream.choice(weight.size, 2_000_000, p=weight / weight.sum())
        tokens = np.exp(mu[k] + sigma[k] * stream.standard_normal(k.size))
        pools.append(np.clip(tokens.round(), low, high).astype(np.int64))
    inside = [
        np.searchsorted(edges, pool, "right") for edges, pool in zip((INPUT_EDGES, OUTPUT_EDGES), pools, strict=True)
    ]
    rows = []
    for place, name in enumerate(BUCKETS):
        count = round(mix.source["rows"] * mix.source_buckets[name])
        sides = divmod(place, len(OUTPUT_EDGES) + 1)
        cells = [pool[at == side] for pool, at, side in zip(pools, inside, sides, strict=True)]
        if count:
            rows.append([stream.choice(cell, count) for cell in cells])
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


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
    true = mix.source.get("spearman") or spearmanr(inputs, outputs).statistic
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


def write(name: str, goodness: dict[str, float], components: tuple[Component, ...] | None) -> None:
    """Put the figures, and new components, into the mix's file; what else is in it stays."""
    path = MIXES / f"{name}.toml"
    text = path.read_text(encoding="utf-8")
    lines = "".join(f"{key} = {value}\n" for key, value in goodness.items())
    text = re.sub(r"(\[goodness\]\n).*?(\n(?:\[|#)|\Z)", lambda m: m[1] + lines + m[2], text, count=1, flags=re.DOTALL)
    if components:
        new = components_text(components)
        text = re.sub(r"components = \[\n.*?\n\]\n", lambda _: new, text, flags=re.DOTALL)
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
            if path is None and name not in MARGINALS:
                print(f"{name}: its source is not in {asked.folder}")
                continue
            lengths = read_source(path) if path else stand_in(mix)
            if name in asked.refit:
                components = fit_lengths(*lengths, seed=1).components
                mix = Mix(**{**vars(mix), "components": components})
            goodness = measure(mix, *lengths)
        print(name, json.dumps(goodness, indent=2))
        if asked.write:
            write(name, goodness, components)


if __name__ == "__main__":
    main()
