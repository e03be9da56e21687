"""The catalogue of public traces, `datasets.toml`."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from tracegen.errors import TraceError


@dataclass(frozen=True)
class Dataset:
    """A public trace: what it is, whose, under which licence, where, and what is known of its file.

    Null where it is not known. `format` is that of `tracegen import`; `rows` are the file's, failed requests included;
    `sha256_by` says who measured the hash: `here` from a copy of the commit in the URL, `others` as public projects
    pin it. A dataset without `url` is not one file.
    """

    name: str
    title: str
    license: str
    citation: str
    page: str
    format: str
    url: str | None = None
    rows: int | None = None
    span_s: float | None = None
    bytes: int | None = None
    sha256: str | None = None
    sha256_by: str | None = None


def all_datasets() -> list[Dataset]:
    """The public traces that are known, in the catalogue's order."""
    text = files("tracegen").joinpath("datasets.toml").read_text(encoding="utf-8")
    return [Dataset(name=name, format=found.pop("import"), **found) for name, found in tomllib.loads(text).items()]


def find_dataset(name: str) -> Dataset:
    """The dataset called `name`; raises `TraceError` naming all where there is none."""
    datasets = {dataset.name: dataset for dataset in all_datasets()}
    if name not in datasets:
        raise TraceError(f"there is no dataset '{name}'; the datasets are {', '.join(datasets)}")
    return datasets[name]
