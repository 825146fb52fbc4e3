"""Losses: functions of a network's training output and the labels."""

from medseg.losses.boundary import BoundaryMultiTaskLoss, SumOfTasksLoss, edge_truth
from medseg.losses.deep_supervision import BCEDiceLoss, DeepSupervision
from medseg.losses.dice_ce import SoftDiceCELoss
from medseg.losses.selfreg import (
    InternalFeatureDistillationLoss,
    SelfRegLoss,
    SelfRegTerms,
    SelfRegularizedLoss,
    SemanticConsistencyLoss,
)
from medseg.losses.training import TrainingLoss
from medseg.losses.weighted import WeightedCrossEntropyLoss

__all__ = [
    "BCEDiceLoss",
    "BoundaryMultiTaskLoss",
    "DeepSupervision",
    "InternalFeatureDistillationLoss",
    "SelfRegLoss",
    "SelfRegTerms",
    "SelfRegularizedLoss",
    "SemanticConsistencyLoss",
    "SoftDiceCELoss",
    "SumOfTasksLoss",
    "TrainingLoss",
    "WeightedCrossEntropyLoss",
    "edge_truth",
]
