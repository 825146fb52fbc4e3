"""Segmentation networks: MONAI-style `nn.Module` classes with one contract (`medseg.types.SegmentationNetwork`)."""

from __future__ import annotations

from medseg.networks.unet import UNet

__all__ = ["NETWORKS", "UNet"]

NETWORKS = (UNet,)
