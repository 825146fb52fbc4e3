"""The MONAI Label app: annotate with a bundle, correct its masks, train it further.

The modules of this package handle MONAI Label's requests and records but do not import MONAI Label, so they run and are
tested without it. Subclasses of its classes are in `app/`, which is imported only in the environment that
`make label-environment` sets up, since MONAI Label and medseg need different versions of pydicom.
"""

__all__: list[str] = []
