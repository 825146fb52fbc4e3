"""`medseg export` and `medseg bundle check | inspect | pack | unpack` as a user meets them; hostile bundles."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from medseg.bundle.archive import pack
from medseg.bundle.catalog import Bundle


def test_export_says_how_near_the_file_is(medseg: Any, trained: Bundle, tmp_path: Path) -> None:
    code, out, err = medseg("export", trained.root, "--format", "ts", "-o", tmp_path / "n.ts")
    assert (code, "Error" in err) == (0, False)
    assert "dynamic axes: batch and size" in out
    assert out.count("largest difference") == 2
    assert (tmp_path / "n.ts").is_file()


def test_exports_that_cannot_be_are_refused(medseg: Any, trained: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cases: list[tuple[list[object], str]] = [
        (["gland_pathology_unet", "--format", "ts", "-o", tmp_path / "n.ts"], "--random"),
        ([trained.root, "--format", "tensorrt", "-o", tmp_path / "n.trt"], "known are: onnx, openvino, pt2, ts"),
        ([trained.root, "--format", "ts", "-o", tmp_path / "n.onnx"], "must end in .ts"),
        ([trained.root, "--format", "ts", "-o", tmp_path / "file" / "n.ts"], "cannot write"),
        (["nothing", "--format", "ts", "-o", tmp_path / "n.ts"], "unknown bundle"),
    ]
    for arguments, message in cases:
        code, _, err = medseg("export", *arguments)
        assert code == 2, arguments
        assert message in err, (arguments, err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_half_needs_its_tolerance(medseg: Any, trained: Bundle, tmp_path: Path) -> None:
    code, _, err = medseg("export", trained.root, "--format", "ts", "-o", tmp_path / "n.ts", "--half", "--tolerance", 0)
    assert code == 2
    assert "Remove --half" in err
    assert list(tmp_path.iterdir()) == []


def test_check_prints_a_row_for_each_bundle(medseg: Any, trained_copy: Bundle) -> None:
    code, out, _ = medseg("bundle", "check", trained_copy.root, "phantom_ct_unet")
    assert code == 0
    assert "failed" not in out
    path = trained_copy.config_path("inference")
    path.write_text(path.read_text().replace("RAS", "LPS"))
    code, out, err = medseg("bundle", "check", trained_copy.root, "phantom_ct_unet")
    assert code == 1
    assert out.count("failed") == 1
    assert "failed: balls_mri_unet: built: configs/inference.json differ" in err


def test_pack_and_unpack(medseg: Any, trained: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = medseg("bundle", "pack", trained.root)
    assert code == 0
    assert "skipped: runs/ (results of runs)" in err
    assert hashlib.sha256((tmp_path / "balls_mri_unet.zip").read_bytes()).hexdigest() in out
    code, out, _ = medseg("bundle", "unpack", "balls_mri_unet.zip", "-o", "mine")
    assert code == 0
    assert "all allowed" in out
    assert (tmp_path / "mine" / "models" / "model.pt").read_bytes() == trained.weights.read_bytes()
    code, _, err = medseg("bundle", "unpack", "balls_mri_unet.zip", "-o", "mine")
    assert (code, "exists" in err) == (2, True)
    code, _, err = medseg("bundle", "unpack", "missing.zip")
    assert (code, "No such archive" in err) == (2, True)
    code, _, err = medseg("bundle", "pack", "gland_pathology_unet")
    assert (code, "no weights in this bundle" in err) == (0, True)


def _config(bundle: Bundle, **changes: Any) -> None:
    path = bundle.config_path("inference")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _weights(bundle: Bundle, content: bytes) -> None:
    """Replace the weights, and the hash in the metadata with them."""
    bundle.weights.write_bytes(content)
    metadata = bundle.metadata
    metadata["weights"] = {"models/model.pt": {"sha256": hashlib.sha256(content).hexdigest()}}
    bundle.config_path("metadata").write_text(json.dumps(metadata))


class _Program:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def _pickle(bundle: Bundle) -> None:
    stream = io.BytesIO()
    torch.save({"head.weight": _Program()}, stream)
    _weights(bundle, stream.getvalue())


def _link(bundle: Bundle, name: str) -> None:
    path = bundle.root / name
    moved = path.rename(bundle.root.parent / f"moved-{path.name}")
    path.symlink_to(moved)


def _touching(**target: Any) -> list[dict[str, Any]]:
    return [{"_target_": "os.system", "command": "touch ran", **target}]


HOSTILE: dict[str, Callable[[Bundle], object]] = {
    "expression": lambda b: _config(b, handlers="$__import__('os').system('touch ran') and []"),
    "expression in a list": lambda b: _config(b, spacing=["$open('ran', 'w')", 1, 1]),
    "import": lambda b: _config(b, imports=["$import os"]),
    "callable": lambda b: _config(b, handlers=_touching()),
    "disabled callable": lambda b: _config(b, handlers=_touching(_disabled_="$open('ran', 'w')")),
    "callable by a detour": lambda b: _config(b, handlers=_touching(_target_="medseg.io.os.system")),
    "mode": lambda b: _config(b, handlers=_touching(_target_="monai.transforms.Compose", _mode_="debug")),
    "macro": lambda b: _config(b, spacing="%/etc/hostname"),
    "path": lambda b: _config(b, weights="../../model.pt"),
    "expression in the metadata": lambda b: b.config_path("metadata").write_text('{"a": "$open()"}'),
    "huge config": lambda b: b.config_path("inference").write_text(" " * (16 * 2**20 + 1)),
    "deep config": lambda b: b.config_path("inference").write_text('{"a":' + "[" * 10**5 + "]" * 10**5 + "}"),
    "key twice": lambda b: b.config_path("inference").write_text('{"a": 1, "a": 2}'),
    "list of weights": lambda b: b.config_path("metadata").write_text('{"weights": [1]}'),
    "pickled program": _pickle,
    "no weights": lambda b: _weights(b, b"MZ"),
    "other weights": lambda b: b.weights.write_bytes(b"MZ"),
    "linked weights": lambda b: _link(b, "models/model.pt"),
    "linked config": lambda b: _link(b, "configs/inference.json"),
    "linked folder": lambda b: _link(b, "configs"),
    "importable file": lambda b: (b.root / "skimage.py").write_text("open('ran', 'w')"),
    "logging config": lambda b: (b.root / "configs" / "logging.conf").write_text("[loggers]"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_bundle_is_refused_by_every_command(
    kind: str, medseg: Any, trained_copy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    HOSTILE[kind](trained_copy)
    nibabel.save(nibabel.Nifti1Image(np.ones((20, 28, 26), np.float32), np.diag([2.0, 2, 2, 1])), tmp_path / "a.nii.gz")
    code, out, err = medseg("bundle", "inspect", trained_copy.root)
    assert code in (1, 2)
    assert "NOT" in out or "Error" in err
    code, _, err = medseg("predict", trained_copy.root, "a.nii.gz", "-o", "out")
    assert code == 2, err
    assert not list(tmp_path.glob("out/*.nii.gz"))
    code, _, _ = medseg("export", trained_copy.root, "--format", "ts", "-o", "n.ts")
    assert code == 2
    if kind not in ("importable file", "logging config"):  # which are no part of what is packed
        code, _, _ = medseg("bundle", "pack", trained_copy.root)
        assert code == 2
    assert not list(tmp_path.rglob("ran"))
    assert not list(tmp_path.glob("*.zip"))
    assert not list(tmp_path.glob("n.ts"))


def test_inspect_passes_a_declarative_bundle(medseg: Any, trained: Bundle) -> None:
    code, out, _ = medseg("bundle", "inspect", trained.root)
    assert code == 0
    assert ", 0 not" in out


def test_a_hostile_archive_is_refused(medseg: Any, trained: Bundle, tmp_path: Path) -> None:
    path = pack(trained, tmp_path / "b.zip").path
    path.write_bytes(path.read_bytes().replace(b"configs/inference.json", b"configs/../../x/y.json"))
    code, _, err = medseg("bundle", "unpack", path, "-o", tmp_path / "new")
    assert code == 2
    assert "outside the bundle" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.zip"]
