"""Overlays and figures, drawn from files, manifests and arrays alone."""

__all__: list[str] = []
