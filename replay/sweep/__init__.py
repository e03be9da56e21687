"""Sweeps: the same work at many settings, each a run directory, in a folder that says what is asked and done."""
