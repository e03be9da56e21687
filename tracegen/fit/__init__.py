"""Fit a mix file to a trace: lengths, arrivals and structure, and how well a synthetic twin matches."""
