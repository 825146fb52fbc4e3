"""Segmentation networks: MONAI-style `nn.Module` classes with one contract (`medseg.types.SegmentationNetwork`)."""

from __future__ import annotations

from medseg.networks.banet import BANet
from medseg.networks.presets import small
from medseg.networks.uctransnet import UCTransNet
from medseg.networks.unet import UNet
from medseg.networks.unetplusplus import UNetPlusPlus

__all__ = ["NETWORKS", "BANet", "UCTransNet", "UNet", "UNetPlusPlus", "small"]

NETWORKS = (UNet, UNetPlusPlus, UCTransNet, BANet)
