"""The servers that replay sends to: attached by URL, launched vLLM, the simulated engine."""
