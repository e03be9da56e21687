"""Send a trace, open loop, to an LLM server at locked GPU clocks; record requests, engine steps and power."""
