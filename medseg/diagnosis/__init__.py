"""Checks of a data set before training or prediction, and repaired copies of it."""

__all__: list[str] = []
