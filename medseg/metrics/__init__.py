"""Measures: of masks against the truth, and of what a network has learned."""

from __future__ import annotations

from medseg.metrics.features import (
    attention_maps,
    boundary_share,
    channel_similarity,
    energy_inside,
    grad_cam,
    linear_cka,
    redundancy,
    tap_similarity,
)

__all__ = [
    "attention_maps",
    "boundary_share",
    "channel_similarity",
    "energy_inside",
    "grad_cam",
    "linear_cka",
    "redundancy",
    "tap_similarity",
]
