"""Packing bundles with the same bytes every time, and unpacking nothing that could do harm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medseg.bundle import archive
from medseg.bundle.archive import find_all, pack, unpack
from medseg.bundle.catalog import Bundle, shipped_bundles
from medseg.errors import BundleError, OutputError, RequestError, UntrustedBundleError
from medseg.files import sha256_file

TOP = "balls_mri_unet"
Entry = tuple[str, bytes]
Change = Callable[[zipfile.ZipInfo], None]


@pytest.fixture
def packed(trained: Bundle, tmp_path: Path) -> Path:
    return pack(trained, tmp_path / "good.zip").path


@pytest.fixture
def files(packed: Path) -> list[Entry]:
    """The files of a good archive without their sums, named below the bundle."""
    with zipfile.ZipFile(packed) as opened:
        names = opened.namelist()[1:]
        return [(name.removeprefix(f"{TOP}/"), opened.read(name)) for name in names]


def written(path: Path, entries: list[Entry], change: dict[str, Change] | None = None, top: str = TOP) -> Path:
    """Write an archive as `pack` does, with sums that are right, and with changes to single entries."""
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in entries).encode()
    return listed(path, [("SHA256SUMS", sums), *entries], change, top)


def listed(path: Path, entries: list[Entry], change: dict[str, Change] | None = None, top: str = TOP) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as opened:
        warnings.simplefilter("ignore")  # of names that stand there twice
        for name, content in entries:
            inside = name if name.startswith(("/", "C:", "~", "beside/")) else f"{top}/{name}"
            info = zipfile.ZipInfo(inside, (1980, 1, 1, 0, 0, 0))
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.create_system = 3
            (change or {}).get(name, lambda info: None)(info)
            opened.writestr(info, content)
    return path


def refused(path: Path, said: str, error: type[Exception] = BundleError) -> str:
    """Unpack, expect a refusal, and find nothing left behind."""
    folder = path.parent
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=said) as caught:
        unpack(path, folder / "new")
    assert sorted(folder.rglob("*")) == before
    return str(caught.value)


# Packing


def test_packing_and_unpacking_gives_the_same_files(trained: Bundle, packed: Path, tmp_path: Path) -> None:
    bundle = unpack(packed, tmp_path / "mine")
    names = [path.relative_to(bundle.root).as_posix() for path in sorted(bundle.root.rglob("*")) if path.is_file()]
    assert names == sorted(["bundle.json", "models/model.pt", *(f"configs/{p.name}" for p in _configs(trained))])
    for name in names:
        assert (bundle.root / name).read_bytes() == (trained.root / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] != []
    assert not list(tmp_path.glob(".partial*"))


def _configs(bundle: Bundle) -> list[Path]:
    return list((bundle.root / "configs").glob("*.json"))


def test_the_same_bundle_gives_the_same_bytes_whenever_and_wherever(
    trained_copy: Bundle, packed: Path, tmp_path: Path
) -> None:
    for path in trained_copy.root.rglob("*"):
        os.utime(path, (time.time() + 9e6,) * 2)
        path.chmod(0o700)
    code = f"import sys; from pathlib import Path; from medseg.bundle import archive, catalog; \
archive.pack(catalog.Bundle(Path({str(trained_copy.root)!r})), Path({str(tmp_path / 'again.zip')!r}))"
    environment = {**os.environ, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()


def test_the_bytes_do_not_depend_on_the_version_of_python(tmp_path: Path) -> None:
    root = tmp_path / "a_b_c"
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "inference.json").write_bytes(b"{}\n")
    (root / "LICENSE").write_bytes(bytes(range(256)))
    sums = {name: sha256_file(root / name) for name in ("LICENSE", "configs/inference.json")}
    archive._write_archive(Bundle(root), sums, tmp_path / "a.zip")
    # The same from Python 3.10 to 3.13: packed archives must stay readable.
    assert sha256_file(tmp_path / "a.zip") == "54902244799d5b11aea0d2da8ff078b011a719f52f6ed5d4103c39b49d02d179"


def test_the_sums_are_what_sha256sum_checks(packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as opened:
        opened.extractall(tmp_path / "plain")
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=tmp_path / "plain" / TOP,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == len(list((tmp_path / "plain" / TOP).rglob("*.*")))


def test_what_is_no_part_of_a_bundle_is_left_out_and_said(trained_copy: Bundle, packed: Path, tmp_path: Path) -> None:
    extra = {
        ".git/config": "hidden",
        "docs/.secret.md": "hidden",
        "__pycache__/net.pyc": "cache",
        "scripts/net.py": "not part",
        "models/model.onnx": "medseg export",
        "models/best.ckpt": "not part",
        "scan.nii.gz": "not part",
        "docs/t\u00fcr.md": "invalid name",
        "SHA256SUMS": "written again",
    }
    for name in extra:
        (trained_copy.root / name).parent.mkdir(parents=True, exist_ok=True)
        (trained_copy.root / name).write_text("x")
    (trained_copy.root / "docs" / "figure").symlink_to(tmp_path)
    result = pack(trained_copy, tmp_path / "again.zip")
    assert result.path.read_bytes() == packed.read_bytes()
    assert result.sha256 == sha256_file(packed)
    said = dict(result.left_out)
    for name, reason in extra.items():
        shown = next(key for key in said if name == key or (key.endswith("/") and name.startswith(key)))
        assert reason in said[shown], name
    assert "runs/" in said
    assert "docs/figure/" in said


def test_a_link_in_place_of_a_file_is_refused_when_packing(trained_copy: Bundle, tmp_path: Path) -> None:
    moved = trained_copy.weights.rename(tmp_path / "elsewhere.pt")
    trained_copy.weights.symlink_to(moved)
    with pytest.raises(BundleError, match=r"model\.pt.*link"):
        pack(trained_copy, tmp_path / "x.zip")
    assert not list(tmp_path.glob("*.zip"))


@pytest.mark.parametrize("limit", ["MAX_FILE_BYTES", "MAX_BYTES", "MAX_FILES"])
def test_a_bundle_over_the_limits_is_refused_when_packing(
    trained: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(archive, limit, 3)
    with pytest.raises(BundleError, match=r"too large|fewer than 3"):
        pack(trained, tmp_path / "x.zip")
    assert not list(tmp_path.glob("*.zip"))


def test_what_unpack_would_refuse_is_not_packed(trained_copy: Bundle, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"end in \.zip"):
        pack(trained_copy, tmp_path / "x.tar")
    trained_copy.weights.write_bytes(b"other")
    with pytest.raises(UntrustedBundleError, match="SHA-256"):
        pack(trained_copy, tmp_path / "x.zip")
    trained_copy.config_path("inference").unlink()
    with pytest.raises(BundleError, match=r"no configs/inference\.json"):
        pack(trained_copy, tmp_path / "x.zip")
    assert not list(tmp_path.glob("*.zip"))


@pytest.mark.parametrize("bundle", shipped_bundles(), ids=lambda bundle: bundle.name)
def test_every_shipped_bundle_is_packed_and_unpacked(bundle: Bundle, tmp_path: Path) -> None:
    new = unpack(pack(bundle, tmp_path / "b.zip").path, tmp_path / bundle.name)
    assert new.metadata == bundle.metadata
    assert new.weights.is_file() == bundle.weights.is_file()


# Unpacking


def test_an_existing_folder_is_never_touched(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    refused(packed, "exists", OutputError)
    (tmp_path / "new").rmdir()
    (tmp_path / "new").symlink_to("nowhere")
    refused(packed, "exists", OutputError)


def test_without_a_folder_the_bundle_comes_under_its_own_name(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert unpack(packed).root == tmp_path / "here" / TOP


HOSTILE_NAMES = {
    "absolute": ("/etc/cron.d/x", "absolute"),
    "home": ("~/x", "absolute|invalid name"),
    "climbing": ("../../x", "outside the bundle"),
    "climbing in the middle": ("docs/../../../x.md", "outside the bundle"),
    "drive": ("C:/x.md", "drive"),
    "stream": ("docs/x.md:hidden", "drive"),
    "backslash": ("docs\\..\\..\\x.md", "backslash"),
    "line break": ("docs/a\nb.md", "control"),
    "escape sequence": ("docs/\x1b[2J.md", "control"),
    "right to left": ("docs/\u202egnp.md", "control"),
    "look-alike": ("docs/m\u043edel.md", "invalid name"),
    "device": ("docs/CON.md", "device"),
    "trailing dot": ("docs./x.md", "invalid name"),
    "hidden": ("docs/.bashrc", "invalid name"),
    "empty part": ("docs//x.md", "invalid name"),
    "this folder": ("docs/./x.md", "invalid name"),
    "long": (f"docs/{'x' * 300}.md", "invalid name"),
    "beside": ("beside/LICENSE", "outside the folder"),
    "nested archive": ("models/more.zip", "not part of a bundle"),
    "script": ("scripts/net.py", "not part of a bundle"),
    "importable": ("skimage.py", "not part of a bundle"),
    "logging config": ("configs/logging.conf", "not part of a bundle"),
    "program as weights": ("models/model.ts", "not part of a bundle"),
    "second sums": ("docs/SHA256SUMS", "not part of a bundle"),
}


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_could_do_harm_is_refused(name: str, files: list[Entry], tmp_path: Path) -> None:
    inside, said = HOSTILE_NAMES[name]
    message = refused(written(tmp_path / "bad.zip", [*files, (inside, b"x")]), said)
    assert message.isprintable()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["LICENSE", "LICENSE"], "one file"),
        (["docs/a.md", "docs/A.md"], "one file"),
        (["docs/x/a.md", "docs/X/b.md"], "one file"),
        (["docs/a.md", "docs/a.md/b.md"], "one file"),
        (["docs/a.md/b.md", "docs/a.md"], "one file"),
    ],
)
def test_names_that_meet_in_one_file_are_refused(
    names: list[str], said: str, files: list[Entry], tmp_path: Path
) -> None:
    refused(written(tmp_path / "bad.zip", [*files, *((name, b"x") for name in names)]), said)


def _kind(kind: int) -> Change:
    def change(info: zipfile.ZipInfo) -> None:
        info.external_attr = (kind | 0o777) << 16

    return change


def _method(method: int) -> Change:
    def change(info: zipfile.ZipInfo) -> None:
        info.compress_type = method

    return change


def _extra(info: zipfile.ZipInfo) -> None:
    info.extra = struct.pack("<HHQQ", 1, 16, 5, 5)


def _comment(info: zipfile.ZipInfo) -> None:
    info.comment = b"see http://x"


@pytest.mark.parametrize(
    ("change", "content", "said"),
    [
        (_kind(stat.S_IFLNK), b"/etc/passwd", "is a link"),
        (_kind(stat.S_IFCHR), b"", "not a regular file"),
        (_kind(stat.S_IFBLK), b"", "not a regular file"),
        (_kind(stat.S_IFIFO), b"", "not a regular file"),
        (_kind(stat.S_IFDIR), b"", "not a regular file"),
        (_kind(0), b"x", "not a regular file"),
        (_method(zipfile.ZIP_DEFLATED), bytes(50_000_000), "compressed"),
        (_method(zipfile.ZIP_BZIP2), bytes(1_000_000), "compressed"),
        (_method(zipfile.ZIP_LZMA), bytes(1_000_000), "compressed"),
        (_extra, b"x", "extra fields or a comment"),
        (_comment, b"x", "extra fields or a comment"),
    ],
    ids=[
        *("link", "character device", "block device", "pipe", "folder", "of no kind"),
        *("deflate bomb", "bzip2 bomb", "lzma bomb", "extra field", "comment"),
    ],
)
def test_an_entry_that_is_no_plain_file_is_refused(
    change: Change, content: bytes, said: str, files: list[Entry], tmp_path: Path
) -> None:
    bad = written(tmp_path / "bad.zip", [*files, ("docs/x.md", content)], {"docs/x.md": change})
    refused(bad, said)


def _patched(path: Path, patch: Callable[[bytearray, zipfile.ZipInfo, int], None], index: int = -1) -> Path:
    """Change bytes of one entry; `patch` gets the archive, the entry, and where its line of the directory is."""
    with zipfile.ZipFile(path) as opened:
        info, entries, start = opened.infolist()[index], opened.infolist(), opened.start_dir
    place = start
    for other in entries:
        if other is info or other.filename == info.filename:
            break
        place += 46 + len(other.orig_filename.encode()) + len(other.extra) + len(other.comment)
    data = bytearray(path.read_bytes())
    assert data[place : place + 4] == b"PK\x01\x02"
    patch(data, info, place)
    path.write_bytes(data)
    return path


def _encrypted(data: bytearray, info: zipfile.ZipInfo, line: int) -> None:
    data[info.header_offset + 6] |= 1
    data[line + 8] |= 1


def _sized_in_list(data: bytearray, info: zipfile.ZipInfo, line: int) -> None:
    struct.pack_into("<L", data, line + 24, 2**31)


def _sized_in_header(data: bytearray, info: zipfile.ZipInfo, line: int) -> None:
    struct.pack_into("<LL", data, info.header_offset + 18, 1, 1)


def _sized_in_both(data: bytearray, info: zipfile.ZipInfo, line: int) -> None:
    for place in (line + 20, info.header_offset + 18):
        struct.pack_into("<LL", data, place, info.file_size + 40, info.file_size + 40)


def _renamed_in_header(data: bytearray, info: zipfile.ZipInfo, line: int) -> None:
    data[info.header_offset + 30 + len(TOP) + 1] ^= 1


def _wrong_checksum(data: bytearray, info: zipfile.ZipInfo, line: int) -> None:
    for place in (line + 16, info.header_offset + 14):
        struct.pack_into("<L", data, place, info.CRC ^ 1)


def _overlapping(data: bytearray, info: zipfile.ZipInfo, line: int) -> None:
    struct.pack_into("<L", data, line + 42, 0)


def _count(data: bytearray, info: zipfile.ZipInfo, line: int) -> None:
    struct.pack_into("<HH", data, len(data) - 14, 60_000, 60_000)


def _fewer(data: bytearray, info: zipfile.ZipInfo, line: int) -> None:
    count = struct.unpack_from("<H", data, len(data) - 14)[0] - 1
    struct.pack_into("<HH", data, len(data) - 14, count, count)


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (_encrypted, "encrypted"),
        (_sized_in_list, "inconsistent sizes"),
        (_sized_in_header, "bytes differ"),
        (_sized_in_both, "damaged .Bad CRC|[Oo]verlap"),
        (_renamed_in_header, "header .* differ"),
        (_wrong_checksum, "damaged"),
        (_overlapping, "header .* differ|[Oo]verlap"),
        (_count, "bytes differ"),
    ],
)
def test_an_archive_that_contradicts_itself_is_refused(
    patch: Callable[[bytearray, zipfile.ZipInfo, int], None], said: str, files: list[Entry], tmp_path: Path
) -> None:
    bad = _patched(written(tmp_path / "bad.zip", [*files, ("docs/x.md", b"x" * 100)]), patch)
    refused(bad, said)


def test_many_entries_over_one_piece_of_data_are_refused(files: list[Entry], tmp_path: Path) -> None:
    copies = [(f"docs/{number}.md", b"z" * 100_000) for number in range(50)]
    bad = written(tmp_path / "bad.zip", [*files, *copies])
    for number in range(1, 50):
        _patched(bad, _overlapping, -number)
    refused(bad, "header .* differ|[Oo]verlap")


def test_more_entries_than_the_end_counts_are_refused(files: list[Entry], tmp_path: Path) -> None:
    bad = _patched(written(tmp_path / "bad.zip", [*files, ("docs/x.md", b"x")]), _fewer)
    with zipfile.ZipFile(bad) as opened:
        assert len(opened.infolist()) == len(files) + 2  # Python's reader goes by the length, not by the count
    refused(bad, "bytes differ")


def test_a_second_directory_is_refused(files: list[Entry], tmp_path: Path) -> None:
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)

    def change(info: zipfile.ZipInfo) -> None:
        info.comment = locator

    refused(
        written(tmp_path / "bad.zip", [*files, ("docs/x.md", b"x")], {"docs/x.md": change}), "extra fields or a comment"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: b"#!/bin/sh\n" + data,
        lambda data: data + b"more",
        lambda data: data[:-2] + b"\x04\x00note",
        lambda data: data[:-22] + b"gap!" + data[-22:],
        lambda data: b"%PDF-1.4" + bytes(1000),
    ],
    ids=["half", "last byte", "ten bytes", "empty", "program before", "bytes after", "comment", "gap", "no zip"],
)
def test_an_archive_with_more_or_less_than_its_files_is_refused(
    change: Callable[[bytes], bytes], packed: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.zip"
    bad.write_bytes(change(packed.read_bytes()))
    refused(bad, "Cannot unpack")


def test_any_flipped_byte_is_refused(packed: Path, tmp_path: Path) -> None:
    good = packed.read_bytes()
    bad = tmp_path / "bad.zip"
    for place in range(0, len(good), max(1, len(good) // 150)):
        bad.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        refused(bad, "Cannot unpack")


def test_headers_of_another_time_or_system_are_refused(files: list[Entry], tmp_path: Path) -> None:
    def later(info: zipfile.ZipInfo) -> None:
        info.date_time = (2026, 1, 1, 0, 0, 0)

    def windows(info: zipfile.ZipInfo) -> None:
        info.create_system = 0

    for change in (later, windows):
        refused(written(tmp_path / "bad.zip", files, {files[0][0]: change}), "bytes differ")


def test_a_directory_that_claims_to_be_huge_is_not_read_into_memory(packed: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.zip"
    size = 3 * 10**8
    with bad.open("wb") as file:
        file.truncate(size)  # a sparse file
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, size, 0, 0))
    tracemalloc.start()
    try:
        refused(bad, "directory exceeds 1048576 bytes")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_entries_that_claim_more_than_the_archive_holds_are_refused_unread(files: list[Entry], tmp_path: Path) -> None:
    def long(data: bytearray, info: zipfile.ZipInfo, line: int) -> None:
        for place in (line + 20, info.header_offset + 18):
            struct.pack_into("<LL", data, place, 10**9, 10**9)

    refused(_patched(written(tmp_path / "bad.zip", [*files, ("docs/x.md", b"x")]), long), "entries overlap")


def test_files_that_are_not_those_of_the_sums_are_refused(files: list[Entry], tmp_path: Path) -> None:
    sums = [(name, hashlib.sha256(content).hexdigest()) for name, content in files]

    def with_sums(lines: list[tuple[str, str]], entries: list[Entry]) -> Path:
        text = "".join(f"{digest}  {name}\n" for name, digest in lines).encode()
        return listed(tmp_path / "bad.zip", [("SHA256SUMS", text), *entries])

    (name, content), *rest = files
    for bad in (
        with_sums(sums, [(name, content + b" "), *rest]),
        with_sums(sums, rest),
        with_sums(sums[1:], files),
        with_sums([*sums, sums[0]], files),
        with_sums([("../x", "0" * 64), *sums], files),
        with_sums(sums[::-1], files),
        listed(tmp_path / "bad.zip", [("SHA256SUMS", b"\xff\xfe"), *files]),
        listed(tmp_path / "bad.zip", [("SHA256SUMS", bytes(2**20 + 1)), *files]),
    ):
        refused(bad, "bytes differ from those of packing its files: the archive or its SHA256SUMS was modified")
    refused(listed(tmp_path / "bad.zip", files), "first entry")


def test_too_many_or_too_large_files_are_refused_by_the_directory_alone(files: list[Entry], tmp_path: Path) -> None:
    many = [(f"docs/{number}.md", b"") for number in range(archive.MAX_FILES)]
    refused(written(tmp_path / "bad.zip", [*files, *many]), "entries")
    bad = tmp_path / "large.zip"
    with bad.open("wb") as file:
        file.truncate(archive.MAX_BYTES + 1)  # a sparse file
    refused(bad, "but the limit is")


# What is inside


def _pickled() -> bytes:
    class Program:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("touch ran",)

    stream = io.BytesIO()
    torch.save({"head.weight": Program()}, stream)
    return stream.getvalue()


def _scripted() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Conv2d(1, 1, 1)), stream)
    return stream.getvalue()


def _old_format() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def _with(files: list[Entry], name: str, content: bytes) -> list[Entry]:
    """Replace or add a file; for weights the metadata says the new hash."""
    changed = dict(files) | {name: content}
    if name == "models/model.pt":
        metadata = json.loads(changed["configs/metadata.json"])
        metadata["weights"] = {name: {"sha256": hashlib.sha256(content).hexdigest()}}
        changed["configs/metadata.json"] = json.dumps(metadata).encode()
    return sorted(changed.items())


def _inference(files: list[Entry], **changes: object) -> list[Entry]:
    config = json.loads(dict(files)["configs/inference.json"])
    return _with(files, "configs/inference.json", json.dumps(config | changes).encode())


HOSTILE_CONTENT: dict[str, tuple[Callable[[list[Entry]], list[Entry]], str]] = {
    "expression": (lambda f: _inference(f, handlers="$__import__('os').system('touch ran')"), "expression"),
    "import": (lambda f: _inference(f, imports=["$import os"]), "import"),
    "callable": (lambda f: _inference(f, run=[{"_target_": "os.system", "command": "touch ran"}]), "os.system"),
    "hidden callable": (
        lambda f: _inference(f, handlers=[{"_target_": "medseg.io.os.system", "command": "touch ran"}]),
        "allowed components",
    ),
    "macro": (lambda f: _inference(f, spacing="%/etc/passwd::x"), "macro"),
    "path": (lambda f: _inference(f, output_dir="/etc/cron.d"), "outside the bundle"),
    "in metadata": (lambda f: _with(f, "configs/metadata.json", b'{"version": "$x"}'), "expression"),
    "in another config": (lambda f: _with(f, "configs/other.json", b'{"a": "$x"}'), "expression"),
    "huge": (lambda f: _with(f, "configs/train.json", b" " * (16 * 2**20 + 1)), "at most"),
    "deep": (lambda f: _with(f, "configs/train.json", b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "deeply"),
    "twice": (lambda f: _with(f, "configs/train.json", b'{"a": 1, "a": 2}'), "duplicate key"),
    "pickle": (lambda f: _with(f, "models/model.pt", _pickled()), "system"),
    "pickle beside": (lambda f: _with(f, "models/other.pt", _pickled()), "system"),
    "TorchScript": (lambda f: _with(f, "models/model.pt", _scripted()), "TorchScript"),
    "bare pickle": (lambda f: _with(f, "models/model.pt", b"cos\nsystem\n(S'touch ran'\ntR."), "torch.save"),
    "old format": (lambda f: _with(f, "models/model.pt", _old_format()), "torch.save"),
    "no weights at all": (lambda f: _with(f, "models/model.pt", b"weights"), "torch.save"),
    "other weights": (lambda f: sorted((dict(f) | {"models/model.pt": b"x"}).items()), "SHA-256"),
    "no configs": (lambda f: [entry for entry in f if "inference" not in entry[0]], "no configs/inference"),
}


@pytest.mark.parametrize("name", HOSTILE_CONTENT)
def test_a_hostile_bundle_is_not_unpacked_and_nothing_of_it_runs(
    name: str, files: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, said = HOSTILE_CONTENT[name]
    refused(written(tmp_path / "bad.zip", change(files)), said)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "weights",
    [[], "x", {"../../etc/passwd": {"sha256": "0" * 64}}, {"models/model.pt": "abc"}, {"a\x00b": {"sha256": "0"}}],
    ids=str,
)
def test_metadata_that_lists_weights_oddly_is_refused(weights: object, files: list[Entry], tmp_path: Path) -> None:
    metadata = json.loads(dict(files)["configs/metadata.json"]) | {"weights": weights}
    changed = dict(files) | {"configs/metadata.json": json.dumps(metadata).encode()}
    refused(written(tmp_path / "bad.zip", sorted(changed.items())), "must")


def test_what_torch_saves_of_a_network_is_allowed(trained_copy: Bundle) -> None:
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8]
    state = {str(kind): torch.zeros(3, dtype=kind) for kind in (*kinds, torch.bool)}
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    for number, content in enumerate((state, network.state_dict(), {"model": network.state_dict()})):
        torch.save(content, trained_copy.root / "models" / f"other{number}.pt")
    assert [str(item) for _, item in find_all(trained_copy) if not item.allowed] == []


def test_looking_into_weights_loads_neither_torch_nor_numpy(trained: Bundle) -> None:
    code = f"import sys; from pathlib import Path; from medseg.bundle import archive, catalog; \
archive.find_all(catalog.Bundle(Path({str(trained.root)!r}))); print(sorted({{'torch', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
