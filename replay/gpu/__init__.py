"""GPUs behind one Protocol: NVML and a simulated board; locking clocks; sampling power."""
