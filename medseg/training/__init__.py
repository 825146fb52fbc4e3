"""Training with MONAI's engines: data, wrappers, handlers, checkpoints, several processes."""

from medseg.training.checkpoint import Checkpoints
from medseg.training.dataset import SeededDataset
from medseg.training.handlers import (
    ClipGradients,
    EarlyStop,
    SeedEpochs,
    SeedSteps,
    Validation,
    WeightAverage,
    needs_scaler,
)
from medseg.training.loader import TrainingLoader
from medseg.training.outputs import TrainingOutputs
from medseg.training.randomness import deterministic_kernels, seed_everything
from medseg.training.run_log import RunLog
from medseg.training.sampling import EndlessBatches
from medseg.training.taps import FeatureTaps, Tap, preset_taps

__all__ = [
    "Checkpoints",
    "ClipGradients",
    "EarlyStop",
    "EndlessBatches",
    "FeatureTaps",
    "RunLog",
    "SeedEpochs",
    "SeedSteps",
    "SeededDataset",
    "Tap",
    "TrainingLoader",
    "TrainingOutputs",
    "Validation",
    "WeightAverage",
    "deterministic_kernels",
    "needs_scaler",
    "preset_taps",
    "seed_everything",
]
