import subprocess
import sys

import pytest

from medseg.errors import OutputError, RequestError
from medseg.io import case_stem, output_path
from medseg.io.formats import FORMATS
from medseg.io.names import OUTPUT_FORMATS, file_kind, mask_name


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("case1.nii.gz", "case1"),
        ("sub/case1.nii", "case1"),
        ("Scan.2024.NII.GZ", "Scan.2024"),
        ("tile.jpeg", "tile"),
        ("a.nii.png", "a.nii"),
        ("TCGA-18-5592-01Z", "TCGA-18-5592-01Z"),
        ("notes.txt", "notes.txt"),
    ],
)
def test_only_image_suffixes_are_taken_off(name, stem):
    assert case_stem(name) == stem


@pytest.mark.parametrize(
    ("name", "mask", "kind"),
    [
        ("sub/a.nii.gz", "sub/a.nii.gz", "nifti"),
        ("a.NII", "a.NII", "nifti"),
        ("sub/a.jpg", "sub/a.png", "picture"),
        ("a.TIFF", "a.png", "picture"),
        ("a.MHA", "a.MHA", "meta"),
        ("a.mhd", "a.mha", "meta"),
        ("a.nhdr", "a.nrrd", "nrrd"),
        ("sub/a.seg.nrrd", "sub/a.seg.nrrd", "nrrd"),
        ("a.mgh", "a.mgh", "mgh"),
        ("a.dcm", "a.nii.gz", "dicom"),
        ("sub/a.SVS", "sub/a.geojson", "slide"),
        ("a.txt", "a.txt", None),
    ],
)
def test_masks_keep_the_format_of_the_image_where_it_can_hold_them(name, mask, kind):
    assert mask_name(name) == mask
    assert file_kind(name) == kind


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
def test_an_output_format_replaces_the_ending(output_format):
    for name in ("sub/a.nii.gz", "sub/a.png", "sub/a"):
        assert mask_name(name, output_format) == "sub/a" + OUTPUT_FORMATS[output_format]


def test_unknown_output_formats_are_refused_with_the_known_ones():
    with pytest.raises(RequestError, match=r"'nift': use one of nifti"):
        mask_name("a.nii", "nift")


def test_no_two_kinds_of_files_share_an_ending():
    endings = [suffix for kind in FORMATS.values() for suffix in kind.images]
    assert len(set(endings)) == len(endings)
    for suffix in endings:
        assert suffix == suffix.lower()
        assert file_kind(f"a{suffix.upper()}") == next(kind for kind in FORMATS if suffix in FORMATS[kind].images)


def test_output_path_lies_below_the_folder(tmp_path):
    assert output_path("sub/a.nii.gz", tmp_path) == tmp_path / "sub" / "a.nii.gz"


@pytest.mark.parametrize("name", ["", "../a.png", "sub/../../a.png", "/etc/a.png", "a\0.png", "."])
def test_names_that_climb_out_are_refused(name, tmp_path):
    with pytest.raises(OutputError) as error:
        output_path(name, tmp_path)
    assert repr(name) in str(error.value)


def test_finding_cases_loads_nothing_heavy():
    code = (
        "import sys; from medseg.components import find_cases, find_dataset;"
        "heavy = {'numpy', 'torch', 'monai', 'nibabel', 'PIL'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_loaded():
    import medseg.io

    assert sorted(medseg.io.__all__) == medseg.io.__all__
    for name in medseg.io.__all__:
        assert getattr(medseg.io, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = medseg.io.no_such_name
