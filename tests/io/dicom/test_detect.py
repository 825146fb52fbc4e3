import pytest

from medseg.io.dicom.detect import image_kind, is_dicom, split_series

BARE = b"\x08\x00\x05\x00\x0a\x00\x00\x00ISO_IR 100\x08\x00\x16\x00\x1a\x00\x00\x001.2.840.10008.5.1.4.1.1.2\x00"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\0" * 128 + b"DICM", True),
        (b"x" * 128 + b"DICM and more", True),
        (BARE, True),
        (BARE.replace(b"1.2.840.10008", b"9.9.999.99999"), False),
        (b"DICM", False),
        (b"", False),
        (b"\x08\x00 a text", False),
        (b"\0" * 128 + b"DICX", False),
    ],
)
def test_dicom_is_told_by_its_first_bytes(tmp_path, content, expected):
    path = tmp_path / "any.name"
    path.write_bytes(content)
    assert is_dicom(path) is expected
    assert not is_dicom(tmp_path)
    assert not is_dicom(tmp_path / "missing")


def test_a_series_is_split_off_unless_the_path_exists(tmp_path):
    assert split_series(f"{tmp_path}::1.2#0") == (tmp_path, "1.2#0")
    assert split_series(tmp_path) == (tmp_path, "")
    (tmp_path / "a::b").mkdir()
    assert split_series(tmp_path / "a::b") == (tmp_path / "a::b", "")


def test_the_kind_of_an_image_is_told_by_name_and_by_content(tmp_path):
    (tmp_path / "a").write_bytes(BARE)
    (tmp_path / "b").write_bytes(b"text")
    (tmp_path / "folder.nii").mkdir()
    found = {name: image_kind(tmp_path / name) for name in ("a", "b", "c.nii.gz", "c.png", "c.zip", "folder.nii")}
    assert found == {
        "a": "dicom",
        "b": None,
        "c.nii.gz": "nifti",
        "c.png": "picture",
        "c.zip": "dicom",
        "folder.nii": "dicom",
    }
    assert image_kind(f"{tmp_path}::3") == "dicom"
