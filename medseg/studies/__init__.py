"""Comparisons and demonstrations that run from a config, and the data they make for themselves.

Import the module that is needed (`medseg.studies.phantoms`); nothing is loaded ahead of use.
"""

__all__: list[str] = []
