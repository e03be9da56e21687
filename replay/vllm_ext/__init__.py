"""What runs inside vLLM. This folder goes onto vLLM's PYTHONPATH by itself, so its module imports nothing of replay."""
