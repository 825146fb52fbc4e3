"""Losses: functions of a network's training output and the labels."""

from medseg.losses.deep_supervision import BCEDiceLoss, DeepSupervision
from medseg.losses.selfreg import (
    InternalFeatureDistillationLoss,
    SelfRegLoss,
    SelfRegTerms,
    SelfRegularizedLoss,
    SemanticConsistencyLoss,
)
from medseg.losses.training import TrainingLoss

__all__ = [
    "BCEDiceLoss",
    "DeepSupervision",
    "InternalFeatureDistillationLoss",
    "SelfRegLoss",
    "SelfRegTerms",
    "SelfRegularizedLoss",
    "SemanticConsistencyLoss",
    "TrainingLoss",
]
