"""Readers of published trace formats, one module each."""
