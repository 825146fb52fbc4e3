"""Tools on bundles: check, export, prune and convert."""
