"""Modules of `benchmarks/training.py`."""
