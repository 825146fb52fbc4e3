"""Tools on bundles: check, export, prune and convert."""

__all__: list[str] = []
