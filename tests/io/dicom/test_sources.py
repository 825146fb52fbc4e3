import os
import shutil
import warnings
import zipfile

import numpy as np
import pytest
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from medseg.errors import CaseError
from medseg.io import load
from medseg.io.dicom import open_series, sources
from medseg.io.dicom.sources import find_sources


def pack(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def members(series):
    return {f"../up/{file.name}": file.read_bytes() for file in series.files}


def write_directory(folder, names, *, loop=False, syntax=ExplicitVRLittleEndian):
    """Write a DICOMDIR that lists files by the parts of their names."""
    records = []
    for parts in names:
        record = Dataset()
        record.OffsetOfTheNextDirectoryRecord = 400 if loop else 0
        record.RecordInUseFlag = 0xFFFF
        record.OffsetOfReferencedLowerLevelDirectoryEntity = 400 if loop else 0
        record.DirectoryRecordType = "IMAGE"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about characters that file names must not have
            record.ReferencedFileID = parts
        records.append(record)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.FileSetID = "X"
    ds.OffsetOfTheFirstDirectoryRecordOfTheRootDirectoryEntity = 400 if loop else 0
    ds.OffsetOfTheLastDirectoryRecordOfTheRootDirectoryEntity = 400 if loop else 0
    ds.FileSetConsistencyFlag = 0
    ds.DirectoryRecordSequence = Sequence(records)
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.1.3.10", ds.file_meta.MediaStorageSOPInstanceUID
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcmwrite(folder / "DICOMDIR", ds, enforce_file_format=True)
    return folder / "DICOMDIR"


def test_a_folder_is_searched_deeply_but_not_where_it_is_hidden(write_series, tmp_path):
    series = write_series(tmp_path / "a" / "b")
    shutil.copytree(tmp_path / "a", tmp_path / ".trash")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert [source.path for source in find_sources(tmp_path)] == sorted(series.files)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_damaged_anywhere_are_refused(write_series, tmp_path, compression):
    series = write_series(tmp_path / "in", shape=(6, 5, 2))
    path = pack(tmp_path / "study.zip", {file.name: file.read_bytes() for file in series.files}, compression)
    content = path.read_bytes()
    ends = [0, content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")]
    places = {start + offset for start in ends for offset in range(0, 44) if start + offset < len(content)}
    refused = 0
    for position in sorted(places):
        path.write_bytes(content[:position] + b"\xff\xff" + content[position + 2 :])
        try:
            load(path)
        except CaseError:
            refused += 1
    assert refused > len(places) / 3


def test_a_copy_that_cannot_be_unpacked_is_refused(write_series, tmp_path):
    series = write_series(tmp_path / "in", shape=(60, 50, 4))
    content = [file.read_bytes() for file in series.files]
    marked = content[0][:-8] + b"marked12"
    path = pack(tmp_path / "a.zip", dict(zip("abcde", [*content, marked], strict=True)), zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"marked12", content[0][-8:]))
    with pytest.raises(CaseError, match=r"cannot be unpacked .*CRC"):
        load(path)


def test_a_folder_that_cannot_be_searched_is_not_passed_over(write_series, tmp_path, monkeypatch):
    series = write_series(tmp_path / "a")
    (tmp_path / "a" / "more").mkdir()
    scan = os.scandir

    def refuse(folder):
        if str(folder).endswith("more"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CaseError, match=r"more cannot be read \(Permission denied\)"):
        load(series.folder)


def test_an_archive_reads_as_its_folder_and_is_not_unpacked(write_series, tmp_path):
    series = write_series(tmp_path / "in")
    path = pack(
        tmp_path / "study.zip", {**members(series), "readme.txt": b"text", "__MACOSX/x": series.files[0].read_bytes()}
    )
    expected = load(series.folder)
    before = sorted(tmp_path.rglob("*"))
    found = load(path)
    assert np.array_equal(found.numpy(), expected.numpy())
    assert np.array_equal(found.affine.numpy(), expected.affine.numpy())
    assert sorted(tmp_path.rglob("*")) == before
    opened = open_series(path)
    assert {file.parent.parent for file in opened.files} == {path / ".."}
    assert [header.SOPInstanceUID for header in opened.headers()] == list(opened.sop_uids)


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({"inner.zip": b"x"}, "a nested archive"),
        ({"inner": b"PK\x03\x04" + b"\0" * 200}, "a nested archive"),
        ({"a/inner.tar.GZ": b"x"}, "a nested archive"),
        ({"bomb.dcm": b"\0" * (17 << 20)}, "a compression ratio of"),
        ({"notes.txt": b"x"}, "has no DICOM image"),
    ],
)
def test_archives_that_hide_something_are_refused(tmp_path, files, part):
    with pytest.raises(CaseError, match=part):
        load(pack(tmp_path / "a.zip", files))


def test_archives_beyond_the_limits_are_refused(write_series, tmp_path, monkeypatch):
    path = pack(tmp_path / "a.zip", members(write_series(tmp_path / "in")))
    for limit in ("_MAX_MEMBERS", "_MAX_MEMBER_BYTES", "_MAX_ARCHIVE_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(sources, limit, 3)
            with pytest.raises(CaseError, match=r"limits? (of an archive )?(is|are) "):
                load(path)


def test_encrypted_links_and_repeated_members_are_refused(write_series, tmp_path):
    series = write_series(tmp_path / "in")
    content = series.files[0].read_bytes()
    path = pack(tmp_path / "a.zip", {"a.dcm": content}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(CaseError, match="encrypted"):
        load(path)
    link = zipfile.ZipInfo("link.dcm")
    link.external_attr = 0o120777 << 16
    with pytest.raises(CaseError, match="is a link"):
        load(pack(tmp_path / "b.zip", {link: b"/etc/passwd"}))
    twice = pack(tmp_path / "c.zip", {"a.dcm": content, "b.dcm": content}, zipfile.ZIP_STORED)
    twice.write_bytes(twice.read_bytes().replace(b"b.dcm", b"a.dcm"))
    with pytest.raises(CaseError, match="the same name"):
        load(tmp_path / "c.zip")


@pytest.mark.parametrize("damage", [slice(None, 400), slice(400, None), slice(0, 30)])
def test_damaged_archives_are_refused(write_series, tmp_path, damage):
    path = pack(tmp_path / "a.zip", members(write_series(tmp_path / "in")))
    path.write_bytes(path.read_bytes()[damage])
    with pytest.raises(CaseError):
        load(path)


def test_flipped_bytes_in_an_archive_are_refused(write_series, tmp_path):
    path = pack(tmp_path / "a.zip", members(write_series(tmp_path / "in", shape=(64, 64, 3))))
    data = bytearray(path.read_bytes())
    data[2500:2510] = b"\xff" * 10
    path.write_bytes(data)
    with pytest.raises(CaseError):
        load(path)


@pytest.mark.parametrize("loop", [False, True])
def test_a_dicomdir_names_the_files_also_in_another_case_and_in_loops(write_series, tmp_path, loop):
    series = write_series(tmp_path / "sub", name="im{:03d}")
    write_series(tmp_path / "elsewhere")
    directory = write_directory(tmp_path, [["SUB", file.name.upper()] for file in series.files], loop=loop)
    found = load(directory)
    assert np.array_equal(found.numpy()[0], series.values)
    assert np.allclose(found.affine.numpy(), series.affine, atol=1e-6)


def test_a_dicomdir_of_implicit_types_is_read(write_series, tmp_path):
    series = write_series(tmp_path / "SUB", name="IM{:03d}")
    names = [["SUB", file.name] for file in series.files]
    found = load(write_directory(tmp_path, names, syntax=ImplicitVRLittleEndian))
    assert np.array_equal(found.numpy()[0], series.values)


@pytest.mark.parametrize("parts", [["..", "x"], ["SUB", "..", "..", "x"], ["/etc/passwd"], ["SUB/x"]])
def test_a_dicomdir_that_climbs_out_is_refused(tmp_path, parts):
    (tmp_path / "in").mkdir()
    directory = write_directory(tmp_path / "in", [parts])
    with pytest.raises(CaseError, match="is outside its folder"):
        load(directory)


def test_a_dicomdir_with_links_out_of_its_folder_is_refused(write_series, tmp_path):
    series = write_series(tmp_path / "secret")
    (tmp_path / "medium").mkdir()
    (tmp_path / "medium" / "LINK").symlink_to(series.files[0])
    with pytest.raises(CaseError, match="link to outside"):
        load(write_directory(tmp_path / "medium", [["LINK"]]))


def test_a_dicomdir_with_missing_files_says_how_many(write_series, tmp_path):
    series = write_series(tmp_path / "SUB")
    directory = write_directory(tmp_path, [*(["SUB", file.name] for file in series.files), ["SUB", "GONE"]])
    with pytest.raises(CaseError, match=r"lists 5 files, of which 1 .*GONE"):
        load(directory)


@pytest.mark.parametrize("content", [b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 300])
def test_a_broken_dicomdir_is_refused(tmp_path, content):
    (tmp_path / "DICOMDIR").write_bytes(content)
    with pytest.raises(CaseError):
        load(tmp_path / "DICOMDIR")


def test_what_is_no_dicom_file_is_refused(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"not DICOM at all")
    with pytest.raises(CaseError, match="not a DICOM file"):
        load(tmp_path / "a.dcm")
    with pytest.raises(CaseError, match="is a folder that has no DICOM image"):
        load(tmp_path)
