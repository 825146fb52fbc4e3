"""Training with MONAI's engines: wrappers, handlers and checkpoints."""

from medseg.training.checkpoint import Checkpoints
from medseg.training.handlers import ClipGradients, SeedEpochs, WeightAverage, seed_everything
from medseg.training.outputs import TrainingOutputs

__all__ = ["Checkpoints", "ClipGradients", "SeedEpochs", "TrainingOutputs", "WeightAverage", "seed_everything"]
