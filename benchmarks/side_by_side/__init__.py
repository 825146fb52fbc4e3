"""The parts of `benchmarks/inference.py`: cases, networks, contestants, measures."""
