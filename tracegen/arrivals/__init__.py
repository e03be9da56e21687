"""Arrival processes: points of unit rate, random rates that modulate them, and the models that users name."""

from tracegen.arrivals.models import ARRIVALS, Arrivals, parse_arrivals
from tracegen.arrivals.points import poisson_arrivals_ns

__all__ = ["ARRIVALS", "Arrivals", "parse_arrivals", "poisson_arrivals_ns"]
