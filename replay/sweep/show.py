"""What a sweep came to, as lines for people."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tracegen.console import plural

_SHOWN = 5  # reasons that are told


def lines(document: Mapping[str, Any]) -> list[str]:
    """`sweep.json` in short: how many cells ended how, and why those that did not go to their end."""
    cells = document["cells"]
    states = Counter(cell["state"] for cell in cells)
    mark = "SIMULATED  " if document["simulated"] else ""
    told = ", ".join(f"{count:,} {state}" for state, count in states.most_common())
    result = [f"{mark}{document['state']}: {plural(len(cells), 'cell')}: {told}"]
    whys = Counter(cell["why"] for cell in cells if cell["state"] == "failed")
    result += [f"  {count:,} failed: {why}" for why, count in whys.most_common(_SHOWN)]
    return result
