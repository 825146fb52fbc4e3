"""The MONAI Label app: annotate with a bundle, correct its masks, train it further.

The modules of this folder know MONAI Label's requests and data, but not MONAI Label: they are imported and tested
without it. What is made of its classes is in `app/`, which is imported only in the environment that
`make label-environment` sets up, since MONAI Label and medseg need different versions of pydicom.
"""

__all__: list[str] = []
