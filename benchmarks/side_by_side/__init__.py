"""Modules of `benchmarks/inference.py`: cases, networks, contestants and measurements."""
