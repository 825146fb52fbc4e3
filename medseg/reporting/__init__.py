"""Overlays and figures, drawn from files, manifests and arrays alone."""
