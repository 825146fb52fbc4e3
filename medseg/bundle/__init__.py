"""Bundles: composing, checking and running them. Import the module that is needed; most of them load no torch."""

__all__: list[str] = []
