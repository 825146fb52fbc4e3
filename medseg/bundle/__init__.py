"""Bundles: composing, checking and running them."""
