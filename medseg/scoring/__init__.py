"""Scores of predicted masks: tables, statistics and comparison."""
