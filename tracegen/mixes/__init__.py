"""Length mixes, one TOML file each, with their source and how well they fit it; `tracegen.lengths` loads them."""
