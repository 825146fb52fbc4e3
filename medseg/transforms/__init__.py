"""Dictionary transforms that MONAI lacks: reading and writing cases, mapping labels to classes, and their edges."""

from medseg.transforms.edges import EdgeTruthd
from medseg.transforms.labels import MapLabelsd
from medseg.transforms.load import LoadCased
from medseg.transforms.save import SaveMaskd
from medseg.transforms.spacing import SeparableSpacingd

__all__ = ["EdgeTruthd", "LoadCased", "MapLabelsd", "SaveMaskd", "SeparableSpacingd"]
