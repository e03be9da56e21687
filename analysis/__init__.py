"""Attribute a run's measured energy to its requests and size buckets, and compare runs."""
