"""medseg: published U-Net families as MONAI networks, bundled and run on real medical images."""

__version__ = "0.1.0"

__all__ = ["__version__"]
