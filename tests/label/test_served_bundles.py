"""The bundles that a label server serves; hostile ones are refused and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medseg.bundle.catalog import Bundle
from medseg.errors import RequestError
from medseg.label.served_bundles import find_served_bundles


def _edit(bundle: Path, config: str, **entries: object) -> None:
    path = bundle / "configs" / f"{config}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries), encoding="utf-8")


def _expression(bundle: Path) -> None:
    _edit(bundle, "inference", note="$__import__('os').system('touch owned')")


def _imports(bundle: Path) -> None:
    _edit(bundle, "inference", imports=["$import os"])


def _callable(bundle: Path) -> None:
    _edit(bundle, "inference", inferer={"_target_": "os.system", "command": "touch owned"})


def _training(bundle: Path) -> None:
    _edit(bundle, "train", run=["$__import__('os').system('touch owned')"])


def _evaluation(bundle: Path) -> None:
    _edit(bundle, "evaluate", run=["$__import__('os').system('touch owned')"])


def _macro(bundle: Path) -> None:
    _edit(bundle, "inference", network_def="%/etc/passwd")


def _script(bundle: Path) -> None:
    (bundle / "scripts").mkdir()
    (bundle / "scripts" / "torch.py").write_text("open('owned', 'w')\n")


def _link(bundle: Path) -> None:
    (bundle / "docs").mkdir(exist_ok=True)
    (bundle / "docs" / "link").symlink_to("/etc")


def _yaml(bundle: Path) -> None:
    (bundle / "configs" / "inference.yaml").write_text("run: $exit()\n")


def _torn(bundle: Path) -> None:
    (bundle / "configs" / "inference.json").write_text('{"a": 1')


def _shapes(bundle: Path) -> None:
    _edit(bundle, "metadata", network_data_format=[])


def _numbers(bundle: Path) -> None:
    _edit(bundle, "metadata", network_data_format={"inputs": {"image": {"spatial_shape": 3}}})


def _channels(bundle: Path) -> None:
    _edit(bundle, "metadata", network_data_format={"outputs": {"pred": {"channel_def": {"one": "ball"}}}})


@pytest.fixture
def folder(trained: Bundle, tmp_path: Path) -> Path:
    """A folder of two bundles: one as it should be, one to be spoiled."""
    for name in (trained.name, "evil_mri_unet"):
        shutil.copytree(trained.root, tmp_path / "bundles" / name)
    return tmp_path / "bundles"


@pytest.mark.parametrize(
    "spoil",
    [
        *(_expression, _imports, _callable, _training, _evaluation, _macro, _script, _link, _yaml, _torn),
        *(_shapes, _numbers, _channels),
    ],
    ids=lambda f: f.__name__,
)
def test_a_hostile_bundle_is_refused_by_name_and_the_others_are_offered(spoil, folder: Path, tmp_path: Path) -> None:
    spoil(folder / "evil_mri_unet")
    bundles = find_served_bundles(tmp_path / "tuned", folders=[folder])
    assert list(bundles.served) == ["balls_mri_unet"]
    assert list(bundles.refused) == ["evil_mri_unet"]
    assert "evil_mri_unet" in bundles.refused["evil_mri_unet"]
    assert not list(tmp_path.rglob("owned"))


def test_a_hostile_trained_copy_is_refused_too(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "balls_mri_unet", tmp_path / "tuned" / "balls_mri_unet")
    _expression(tmp_path / "tuned" / "balls_mri_unet")
    assert list(find_served_bundles(tmp_path / "tuned", folders=[folder]).refused) == ["balls_mri_unet"]


def test_a_copy_that_was_trained_for_a_bundle_of_other_labels_is_not_used(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tuned" / "balls_mri_unet"
    shutil.copytree(folder / "balls_mri_unet", copy)
    assert list(find_served_bundles(tmp_path / "tuned", folders=[folder], names=["balls_mri_unet"]).served)
    metadata = json.loads((copy / "configs" / "metadata.json").read_text())
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = {"0": "background", "1": "large", "2": "small"}
    (copy / "configs" / "metadata.json").write_text(json.dumps(metadata))
    refused = find_served_bundles(tmp_path / "tuned", folders=[folder], names=["balls_mri_unet"]).refused
    assert str(copy) in refused["balls_mri_unet"]


def test_an_offer_knows_labels_size_and_weights(trained: Bundle, tmp_path: Path) -> None:
    served = find_served_bundles(tmp_path, folders=[trained.root]).served["balls_mri_unet"]
    assert served.labels == {"small": 1, "large": 2}
    assert (served.spatial_dims, served.trainable, served.ready) == (3, True, True)
    assert served.current == trained


def test_a_trained_copy_counts_as_soon_as_it_has_weights(trained: Bundle, tmp_path: Path) -> None:
    served = find_served_bundles(tmp_path, folders=[trained.root]).served["balls_mri_unet"]
    shutil.copytree(trained.root, tmp_path / "balls_mri_unet")
    assert served.current.root == tmp_path / "balls_mri_unet"


def test_a_bundle_without_weights_is_offered_for_training(trained_copy: Bundle, tmp_path: Path) -> None:
    trained_copy.weights.unlink()
    served = find_served_bundles(tmp_path / "tuned", folders=[trained_copy.root]).served["balls_mri_unet"]
    assert served.trainable
    assert not served.ready


def test_shipped_bundles_are_found_by_default_and_by_name(tmp_path: Path) -> None:
    assert "hippocampus_mri_unet" in find_served_bundles(tmp_path).served
    assert list(find_served_bundles(tmp_path, names=["phantom_ct_unet"]).served) == ["phantom_ct_unet"]


def test_what_cannot_be_found_is_an_error(tmp_path: Path, trained: Bundle) -> None:
    with pytest.raises(RequestError, match="no bundle in"):
        find_served_bundles(tmp_path, folders=[tmp_path])
    with pytest.raises(RequestError, match="no bundle 'spleen'"):
        find_served_bundles(tmp_path, folders=[trained.root], names=["spleen"])
    with pytest.raises(RequestError, match="two bundles are named"):
        find_served_bundles(tmp_path, folders=[trained.root, trained.root])


def test_looking_at_bundles_imports_nothing_heavy(trained: Bundle, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom medseg.label.served_bundles import find_served_bundles\n"
        f"assert find_served_bundles(Path({str(tmp_path)!r}), folders=[Path({str(trained.root)!r})]).served\n"
        "print(sorted({'torch', 'monai', 'numpy', 'nibabel'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.stdout == "[]\n", done.stderr
