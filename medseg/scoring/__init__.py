"""Scores of predicted masks: tables, statistics and comparison."""

__all__: list[str] = []
