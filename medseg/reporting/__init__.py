"""Overlays and figures, drawn from files, manifests and arrays."""

__all__: list[str] = []
