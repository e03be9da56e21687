"""The simulated engine: scheduler, hardware and power of a DGX-H100, behind vLLM's HTTP API."""
