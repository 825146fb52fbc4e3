"""Losses: functions of a network's training output and the labels."""

from medseg.losses.training import TrainingLoss

__all__ = ["TrainingLoss"]
