"""Dictionary transforms that MONAI lacks: reading and writing cases, labels, and the patches of training."""

from medseg.transforms.edges import EdgeTruthd
from medseg.transforms.elastic import RandElasticd
from medseg.transforms.labels import MapLabelsd
from medseg.transforms.load import LoadCased
from medseg.transforms.objects import NumberObjectsd
from medseg.transforms.save import SaveMaskd
from medseg.transforms.spacing import SeparableSpacingd
from medseg.transforms.warp import ClassPlacesd, RandWarpd
from medseg.transforms.weight_map import BorderWeightMapd

__all__ = [
    "BorderWeightMapd",
    "ClassPlacesd",
    "EdgeTruthd",
    "LoadCased",
    "MapLabelsd",
    "NumberObjectsd",
    "RandElasticd",
    "RandWarpd",
    "SaveMaskd",
    "SeparableSpacingd",
]
