"""The commands that make a trace again, rebuilt from its file's metadata, from its origins on.

One rule for every command that writes a trace. The metadata's `generator` names it, and its options have the values of
the `parameters` of their names, with or without a unit: `--start` that of `start_ns` or `start_s`, `--rate` that of
`rate` or `rate_rps`. What is not among them had its default. Files between have the names that they had, in the working
directory; a file that nothing here makes is named in a remark behind its line, where it is not the one of then.
"""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperOption

from tracegen.cli import app
from tracegen.durations import NS_PER_S, exact_duration
from tracegen.schema import file_sha256


def _as_text(value: Any) -> str:
    """A value as an option takes it; a mapping as `--map` does."""
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


# What a parameter's name may have behind that of its option, and how it is then written; the first that is there.
_UNITS: dict[str, Callable[[Any], str]] = {
    "": _as_text,
    "_ns": exact_duration,
    "_s": lambda seconds: exact_duration(round(seconds * NS_PER_S)),
    "_rps": str,
    "_target_rps": str,
}


def commands_of(metadata: Mapping[str, Any], output: str) -> list[str]:
    """The `tracegen` lines that make the trace with this file metadata as `output`; empty where that is not known.

    Each may be given to a shell as it is: remarks stand behind a `#`. Files that were read are looked for in the
    working directory and beside `output`, by their SHA-256.
    """
    return _WayBack(output).lines(metadata, output)


class _WayBack:
    """The lines of one trace: what its files are called in them."""

    def __init__(self, output: str) -> None:
        self._places = (Path(), Path(output).parent)
        self._taken = {output}
        self._made: dict[str, str] = {}  # by their SHA-256, the files that lines so far make

    def lines(self, metadata: Mapping[str, Any], output: str) -> list[str]:
        """The lines that make `output`, of which the last does; none where it is not known how."""
        options = _option_words(metadata)
        if options is None:
            return []
        sources = metadata.get("sources") or ([metadata["source"]] if "source" in metadata else [])
        before: list[str] = []
        names: list[str] = []
        remarks: list[str] = []
        for source in sources:
            made, name, remark = self._input(source)
            before += made
            names.append(f"./{name}" if name.startswith("-") else name)
            remarks += remark
        for made, remark in (self._named_in_options(metadata, file, sha) for file, sha in _files(metadata).items()):
            before += made
            remarks += remark
        words = [*str(metadata["generator"]).split(), *names, *options, "-o", output]
        return [*before, _line(words, remarks)]

    def _input(self, source: Mapping[str, Any]) -> tuple[list[str], str, list[str]]:
        """Of a file that a trace was made from: the lines that make it, its name, and what there is to say."""
        file, sha = str(source.get("file")), source.get("sha256")
        if sha in self._made:
            return [], self._made[str(sha)], []
        name = file if file not in self._taken else f"{len(self._taken)}/{file}"  # of that name in another folder
        if made := self.lines(source.get("metadata") or {}, name):
            self._taken.add(name)
            self._made[str(sha)] = name
            return made, name, []
        there = [place / file for place in self._places if _is(place / file, sha)]
        return [], str(there[0] if there else file), [] if there else [_remark(file, sha)]

    def _named_in_options(self, metadata: Mapping[str, Any], file: str, sha: str) -> tuple[list[str], list[str]]:
        """The same of a file that an option names: one that is gone and was fitted is fitted again."""
        if _is(Path(file), sha):
            return [], []
        fits = metadata.get("lengths_fitted_to") or {}
        fitted = fits if "file" in fits else fits.get(Path(file).stem) or {}
        if Path(file).exists() or not {"seed", "twins"} <= fitted.keys():
            return [], [_remark(file, sha)]
        made, name, remarks = self._input(fitted)
        options = ["--seeds", str(fitted["twins"]), "--seed", str(fitted["seed"]), "-o", file]
        return [*made, _line(["tracegen", "fit", name, *options], remarks)], []


def _option_words(metadata: Mapping[str, Any]) -> list[str] | None:
    """The options of the command that `metadata` name; None where it is none, or one that it needs is not there."""
    first, *words = str(metadata.get("generator")).split()
    command: Any = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word)
    if first != "tracegen" or not words or command is None:
        return None
    parameters = metadata.get("parameters") or {}
    asked = {**parameters, **parameters.get("structure", {}), "seed": metadata.get("seed")}
    if "how" in asked:  # two switches, of which either is given
        asked["drop"] = asked["how"] == "drop"
    if "system_prompts" in asked:
        asked["system_prompts"] = f"{asked['system_prompts']}:{asked.get('system_tokens', 0)}"
    result: list[str] = []
    for option in command.params:
        if not isinstance(option, TyperOption) or option.name in {"output", "force"}:
            continue
        switch = max(option.opts, key=len)
        name = switch.removeprefix("--").replace("-", "_")
        unit = next((unit for unit in _UNITS if asked.get(name + unit) is not None), None)
        if unit is None:
            if option.required:
                return None
        elif option.is_flag:
            result += (option.opts if asked[name + unit] else option.secondary_opts)[:1]
        else:
            text = _UNITS[unit](asked[name + unit])
            result += [f"{switch}={text}"] if text.startswith("-") else [switch, text]
    return result


def _files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The files that options name, with their SHA-256."""
    return {**(metadata.get("mix_files_sha256") or {}), **(metadata.get("rate_files_sha256") or {})}


def _is(path: Path, sha256: str | None) -> bool:
    """Whether the file at `path` is that file."""
    return path.is_file() and file_sha256(path) == sha256


def _remark(file: str, sha256: str | None) -> str:
    """What is to be said of a file that was not found as it was."""
    then = f"sha256 {sha256[:12]}..." if sha256 else "sha256 not known"
    if "://" in file:
        return f"{file} had {then}"
    if Path(file).is_dir():
        return f"{file} is a folder, not compared with that of then ({then})"
    return f"{file} is {'another file now' if Path(file).exists() else 'not here'} ({then})"


def _line(words: list[str], remarks: list[str]) -> str:
    """A line for a shell; a remark is one line whatever a file is called."""
    return shlex.join(words) + "".join(f"  # {' '.join(remark.split())}" for remark in remarks)
