"""What is to be said of an instance's meters, gathered slab by slab."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.accounts import Fitted
from analysis.counter import Survey
from analysis.load import HOLE_S, NS_PER_S, InstanceData, RunData, names
from analysis.manifest import pauses_ns
from analysis.patches import Patch
from analysis.slabs import Slab
from analysis.timeline import NOTHING_KNOWN, GpuTimeline


@dataclass
class _Seen:
    """Of one GPU, so far."""

    sources: list[str]
    whys: list[str]
    said: list[str]
    patches: list[Patch]
    survey: Survey = NOTHING_KNOWN
    both_j: float = 0.0  # counted where both sources are,
    more_j: float = 0.0  # and how much more by samples
    holes: int = 0
    longest_s: float = 0.0
    longest_at_s: float = 0.0


class Meters:
    """The meters of one instance."""

    def __init__(self, data: RunData, instance: InstanceData) -> None:
        self._pauses_s = [
            ((a - data.window_ns[0]) / NS_PER_S, (b - data.window_ns[0]) / NS_PER_S) for a, b in pauses_ns(data.run)
        ]
        self._seen = {gpu.name: _Seen([], [], [], []) for gpu in instance.gpus}

    def add(self, slab: Slab, lines: Sequence[GpuTimeline]) -> None:
        """Add a slab, and what its GPUs' sensors say."""
        begin_s, until_s = slab.begin_s, slab.until_s
        for gpu, line in zip(slab.gpus, lines, strict=True):
            seen = self._seen[line.name]
            seen.sources.append(line.curve.source)
            seen.whys += [line.why] if line.why else []
            seen.said += line.said
            seen.patches += line.patches
            seen.survey = seen.survey + line.survey
            if line.mismatch_rel is not None:
                used_j = line.curve.between(begin_s, until_s)
                seen.both_j += used_j
                seen.more_j += used_j * line.mismatch_rel
            # A hole belongs to the slab that it begins in.
            begins = (gpu.t_s[:-1] >= begin_s) if begin_s > 0 else (gpu.t_s[1:] > 0)
            unread_s = np.diff(gpu.t_s)
            for a, b in self._pauses_s:  # nobody is to read while a run lies between its stretches
                unread_s -= np.clip(np.minimum(gpu.t_s[1:], b) - np.maximum(gpu.t_s[:-1], a), 0.0, None)
            gap_s = np.where(begins & (gpu.t_s[:-1] < until_s), unread_s, 0.0)
            if np.any(gap_s > HOLE_S):
                i = int(np.argmax(gap_s))
                seen.holes += int(np.sum(gap_s > HOLE_S))
                if gap_s[i] > seen.longest_s:
                    seen.longest_s, seen.longest_at_s = float(gap_s[i]), float(gpu.t_s[i])

    def known(self) -> list[Survey]:
        """What the slabs so far tell of each GPU's counter."""
        return [seen.survey for seen in self._seen.values()]

    def facts(self, fitted: Fitted) -> tuple[GpuTimeline, ...]:
        """What the meters were: as they were fitted on, with what was seen of them over the whole window."""
        return tuple(
            replace(
                line,
                curve=replace(line.curve, source="+".join(sorted(set(seen.sources)))),
                mismatch_rel=seen.more_j / seen.both_j if seen.both_j > 0 else None,
                why=seen.whys[0] if seen.whys else None,
                patches=tuple(seen.patches),
                said=tuple(dict.fromkeys(seen.said)),
            )
            for line, seen in zip(fitted.lines, self._seen.values(), strict=True)
        )

    def notes(self) -> list[str]:
        """What to say of stretches in the window without a reading of a GPU."""
        said: dict[str, list[str]] = {}
        for name, seen in self._seen.items():
            if seen.holes:
                where = f"no power reading for {seen.longest_s:.1f} s at {seen.longest_at_s:.0f} s"
                text = f"{where}, among {seen.holes} holes of more than {HOLE_S} s"
                said.setdefault(text, []).append(name)
        return [f"{names(gpus)}: {text}" for text, gpus in said.items()]
