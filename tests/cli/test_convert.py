"""Published weights and trained starts on the command line: what it prints and how it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.catalog import Bundle

GOLDEN = Path(__file__).parents[1] / "golden"


def _like(make_bundle: Any, source: dict[str, Any], template: str, channels: int) -> Path:
    source["template"] = template
    source["channels"] = {str(i): f"channel {i}" for i in range(channels)}
    source["labels"] = {"0": "background", "1": "one"}
    dims = 3 if template == "mr_volume" else 2
    source["network_def"] |= {"spatial_dims": dims, "in_channels": channels, "out_channels": 2}
    source["knobs"] = {"patch_size": [32] * dims, "roi_size": [32] * dims}
    root: Path = make_bundle(source).root
    return root


def test_convert_tells_what_it_wrote_left_out_and_added(
    medseg: Any, make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path
) -> None:
    like = _like(make_bundle, tiny_source, "rgb_image", 3)
    to = tmp_path / "target_any_network"
    code, out, err = medseg(
        "convert", GOLDEN / "banet2d.npz", "--from", "banet", "--prefix", "net/state/", "--to", to, "--like", like
    )
    assert (code, "Error" in err) == (0, False)
    assert "BANet from banet: " in out
    assert "skipped 6 tensors that the network never uses: " in out
    assert str(to / "models" / "model.pt") in out
    arguments = ("convert", GOLDEN / "unetpp2d.npz", "--from", "unetpp-port", "--prefix", "state/", "--like", like)
    code, out, err = medseg(*arguments, "--to", tmp_path / "target_any_other")
    assert (code, "Error" in err) == (0, False)
    assert "added: a channel of zeros for the background" in out
    assert "skipped" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("missing.npz", "--from", "unet-port"), "no weights at 'missing.npz'"),
        ((GOLDEN / "unet2d.npz", "--from", "unet-prot"), "did you mean 'unet-port'"),
        ((GOLDEN / "unet2d.npz", "--from", "unet-port", "--set", "features"), "invalid setting"),
        ((GOLDEN / "unet2d.npz", "--from", "banet", "--prefix", "state/"), "do not match source 'banet'"),
    ],
)
def test_convert_refuses_with_one_message(
    medseg: Any, make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path, options: Any, message: str
) -> None:
    like = _like(make_bundle, tiny_source, "rgb_image", 3)
    code, _, err = medseg("convert", *options, "--to", tmp_path / "target_any_network", "--like", like)
    assert code == 2
    assert message in err
    assert not (tmp_path / "target_any_network").exists()


def test_train_tells_what_it_started_from(medseg: Any, trained: Bundle, tiny_data: Path, tmp_path: Path) -> None:
    settings = ("--set", f"pretrained={trained.weights}", "--set", "max_epochs=1", "--set", "val_interval=1")
    code, _, err = medseg("train", trained.root, "--data", tiny_data, "-o", tmp_path / "mine", *settings)
    assert code == 0
    assert "started from model.pt: all " in err
    code, _, err = medseg("train", trained.root, "--data", tiny_data, "-o", tmp_path / "x", "--set", "pretrained=gone")
    assert code == 2
    assert "No pretrained weights at 'gone' to start from" in err
