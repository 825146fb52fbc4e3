"""Training with MONAI's engines: wrappers, handlers and checkpoints."""

from medseg.training.checkpoint import Checkpoints
from medseg.training.handlers import ClipGradients, SeedEpochs, WeightAverage, seed_everything
from medseg.training.outputs import TrainingOutputs
from medseg.training.taps import FeatureTaps, Tap, preset_taps

__all__ = [
    "Checkpoints",
    "ClipGradients",
    "FeatureTaps",
    "SeedEpochs",
    "Tap",
    "TrainingOutputs",
    "WeightAverage",
    "preset_taps",
    "seed_everything",
]
