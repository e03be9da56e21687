"""Runs in virtual time: `replay run --virtual` serves a trace on the simulated engine without sockets or waiting.

The run directory is that of a simulated run in wall time, written as it goes on, in bounded memory:
`source` reads the trace in batches, `node` turns steps into what the node's sensors show, `tables` writes, `judge`
adds up the verdicts, and `run` wires them to the engines of `replay.sim.virtual`.
"""
