"""Measurements: one question per script, run as `python -m benchmarks.NAME`; the results lie in `results/`."""
