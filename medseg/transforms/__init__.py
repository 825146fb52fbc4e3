"""Dictionary transforms that MONAI lacks: reading and writing cases, and mapping labels to classes."""

from medseg.transforms.labels import MapLabelsd
from medseg.transforms.load import LoadCased
from medseg.transforms.save import SaveMaskd

__all__ = ["LoadCased", "MapLabelsd", "SaveMaskd"]
