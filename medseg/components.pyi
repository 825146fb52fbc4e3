# The parts that bundle configs may name as `medseg.components.NAME`. This is the one list: the rooms' public names, the
# trust check and type checkers read it. Networks are listed in medseg/networks/registry.py.
from collections.abc import Callable
from typing import Any

from medseg.inferers.ensemble import Ensemble as Ensemble
from medseg.inferers.ensemble import MirrorTTA as MirrorTTA
from medseg.inferers.native import NativeInferer as NativeInferer
from medseg.inferers.overlap_tile import OverlapTileInferer as OverlapTileInferer
from medseg.inferers.rotations import RotationTTAInferer as RotationTTAInferer
from medseg.inferers.sliding_window import SlidingWindowInferer as SlidingWindowInferer
from medseg.io.cases import find_cases as find_cases
from medseg.io.datasets import find_dataset as find_dataset
from medseg.jobs.config_functions import identity as identity
from medseg.jobs.config_functions import inside as inside
from medseg.jobs.config_functions import load_weights as load_weights
from medseg.jobs.config_functions import on_device as on_device
from medseg.jobs.config_functions import parameters as parameters
from medseg.jobs.config_functions import run as run
from medseg.jobs.config_functions import select_device as select_device
from medseg.jobs.config_functions import start_from as start_from
from medseg.jobs.slides import SlidePredictor as SlidePredictor
from medseg.jobs.training_pictures import PredictionPictures as PredictionPictures
from medseg.losses.boundary import BoundaryMultiTaskLoss as BoundaryMultiTaskLoss
from medseg.losses.deep_supervision import BCEDiceLoss as BCEDiceLoss
from medseg.losses.deep_supervision import DeepSupervision as DeepSupervision
from medseg.losses.dice_ce import SoftDiceCELoss as SoftDiceCELoss
from medseg.losses.selfreg import SelfRegLoss as SelfRegLoss
from medseg.losses.selfreg import SelfRegularizedLoss as SelfRegularizedLoss
from medseg.losses.training import TrainingLoss as TrainingLoss
from medseg.losses.weighted import WeightedCrossEntropyLoss as WeightedCrossEntropyLoss
from medseg.training.checkpoint import Checkpoints as Checkpoints
from medseg.training.dataset import SeededDataset as SeededDataset
from medseg.training.distributed import ValidationShare as ValidationShare
from medseg.training.distributed import distributed_network as distributed_network
from medseg.training.distributed import process_device as process_device
from medseg.training.distributed import start_processes as start_processes
from medseg.training.distributed import stop_processes as stop_processes
from medseg.training.handlers import EMA as EMA
from medseg.training.handlers import ClipGradients as ClipGradients
from medseg.training.handlers import EarlyStop as EarlyStop
from medseg.training.handlers import SeedEpochs as SeedEpochs
from medseg.training.handlers import SeedSteps as SeedSteps
from medseg.training.handlers import Validation as Validation
from medseg.training.handlers import needs_scaler as needs_scaler
from medseg.training.loader import TrainingLoader as TrainingLoader
from medseg.training.randomness import deterministic_kernels as deterministic_kernels
from medseg.training.randomness import seed_everything as seed_everything
from medseg.training.run_log import RunLog as RunLog
from medseg.training.sampling import InfiniteBatchSampler as InfiniteBatchSampler
from medseg.training.taps import Tap as Tap
from medseg.training.wrapper import TrainingWrapper as TrainingWrapper
from medseg.transforms.edges import LabelToEdged as LabelToEdged
from medseg.transforms.elastic import RandElasticd as RandElasticd
from medseg.transforms.labels import MapLabelsd as MapLabelsd
from medseg.transforms.load import LoadCased as LoadCased
from medseg.transforms.objects import NumberObjectsd as NumberObjectsd
from medseg.transforms.save import SaveMaskd as SaveMaskd
from medseg.transforms.spacing import SeparableSpacingd as SeparableSpacingd
from medseg.transforms.warp import ClassIndicesd as ClassIndicesd
from medseg.transforms.warp import RandWarpd as RandWarpd
from medseg.transforms.weight_map import BorderWeightMapd as BorderWeightMapd

__all__: list[str]

def room(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]: ...
