"""Studies that run from a config, and the synthetic data they use.

Import the module that is needed (`medseg.studies.phantoms`); the package imports nothing itself.
"""

__all__: list[str] = []
