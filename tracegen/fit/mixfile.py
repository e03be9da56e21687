"""Write a fit as a mix file, which `tracegen.lengths.load_mix` reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracegen.fit.lengths import Lengths
from tracegen.lengths import Component

_ABOUT = (
    "Input and output token lengths as a mixture of bivariate lognormals: a component is picked by weight, then",
    "ln(input) and ln(output) are normal with the given means, deviations and correlation; rounded, then clipped.",
)


@dataclass(frozen=True)
class MixFile:
    """What a mix file says; empty tables are left out. `notes` stand as comments above their table."""

    description: str
    lengths: Lengths
    tables: dict[str, Mapping[str, Any]]
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    head: tuple[str, ...] = _ABOUT

    def text(self) -> str:
        """The file as TOML; the same fit gives the same text."""
        lines = [f"# {line}" for line in self.head]
        lines += [f"description = {_value(self.description)}"]
        lines += [f"{key} = {_value(list(getattr(self.lengths, key)))}" for key in ("low", "high")]
        lines += components_text(self.lengths.components).splitlines()
        for name, table in self.tables.items():
            if table:
                lines += ["", *(f"# {line}" for line in self.notes.get(name, ())), f"[{name}]"]
                lines += [f"{key} = {_value(value)}" for key, value in table.items()]
        return "\n".join(lines) + "\n"


def components_text(components: Sequence[Component]) -> str:
    """The components as TOML."""
    lines = [
        f"  {{ weight = {c.weight:.5f}, mu_in = {c.mu_in:.4f}, sigma_in = {c.sigma_in:.4f}, "
        f"mu_out = {c.mu_out:.4f}, sigma_out = {c.sigma_out:.4f}, rho = {c.rho:.3f} }},\n"
        for c in components
    ]
    return f"components = [\n{''.join(lines)}]\n"


def _value(value: Any) -> str:
    """`value` in TOML: strings, numbers and lists of numbers, which JSON writes the same way."""
    return json.dumps(value, ensure_ascii=False)
