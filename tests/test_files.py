import json
import os

import pytest

from medseg.errors import OutputError
from medseg.files import replace_text, replacing


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
