"""The data sets and files that the tests of `medseg doctor` make serve here too."""

from tests.diagnosis.conftest import dataset, dicom, nifti

__all__ = ["dataset", "dicom", "nifti"]
