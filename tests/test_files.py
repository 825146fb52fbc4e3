import hashlib
import json
import os

import pytest

from medseg import files
from medseg.errors import BundleError, OutputError
from medseg.files import check_folder, load_json, replace_text, replacing, sha256_file, stamp


def test_names_of_another_coding_are_written_and_read_back(tmp_path):
    name = os.fsdecode(b"caf\xe9.nii.gz")
    path = replace_text(tmp_path / "a.json", json.dumps({"name": name}, ensure_ascii=False))
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": name}


def _write_and_fail(path):
    with replacing(path) as part:
        part.write_text("new")
        raise OSError(28, "No space left on device")


def test_what_fails_leaves_the_older_file_and_nothing_beside_it(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OutputError, match="No space left"):
        _write_and_fail(tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_file_is_replaced_whole_and_its_temporary_keeps_the_suffixes(tmp_path):
    path = tmp_path / "new" / "deeper" / "mask.nii.gz"
    with replacing(path) as part:
        assert part.parent == path.parent
        assert part.name.endswith("mask.nii.gz")
        part.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_other_errors_pass_and_leave_nothing(tmp_path, error):
    def fail():
        with replacing(tmp_path / "a.txt") as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="file"):
            check_folder(folder)
        with pytest.raises(OutputError, match="file"):
            replace_text(folder / "a.txt", "text")
    assert (tmp_path / "file").read_text() == "mine"
    check_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_a_checksum_is_that_of_all_bytes(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "a").write_bytes(content[:size])
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content[:size]).hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "",
        "[1]",
        "3",
        "null",
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "b": 1}}',
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        "[" * 100_000,
        '{"a": ' * 100_000,
    ],
)
def test_a_config_that_two_readers_could_take_differently_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(BundleError, match=r"train\.json"):
        load_json(path)


def test_a_config_is_utf8_an_object_and_of_limited_size(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text('{"name": "Milz größer", "values": [1, 2.5, null, true]}', encoding="utf-8")
    assert load_json(path) == {"name": "Milz größer", "values": [1, 2.5, None, True]}
    path.write_bytes('{"name": "größer"}'.encode("latin-1"))
    with pytest.raises(BundleError, match=r"a\.json"):
        load_json(path)
    path.write_text('{"a": "' + "x" * 100 + '"}')
    monkeypatch.setattr(files, "MAX_CONFIG_BYTES", 50)
    with pytest.raises(BundleError, match="50"):
        load_json(path)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(BundleError):
            load_json(missing)


def test_a_stamp_changes_with_content_name_and_place(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "a.dcm").write_text("one")
    first = stamp(str(folder))
    assert stamp(str(folder)) == first
    assert stamp(f"{folder}::1.2.3") != first
    assert stamp(str(folder / "a.dcm")) != first
    (folder / "below").mkdir()
    (folder / "below" / "c.dcm").write_text("three")
    assert stamp(str(folder)) == first
    os.utime(folder / "a.dcm", ns=(0, 1))
    later = stamp(str(folder))
    assert later != first
    (folder / "b.dcm").write_text("two")
    more = stamp(str(folder))
    assert more not in (first, later)
    (folder / "b.dcm").rename(folder / "z.dcm")
    assert stamp(str(folder)) not in (first, later, more)
    assert len(stamp(str(tmp_path / "nowhere"))) == 32
