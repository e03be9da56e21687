"""Synthesize, import and describe traces of LLM requests: arrival times, input and output token lengths."""
