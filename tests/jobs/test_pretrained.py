"""Training that starts from weights: what is taken over, what is refused, and what the user is told."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.bundle.catalog import Bundle
from medseg.errors import WeightsError
from medseg.jobs import api, runner
from medseg.jobs.config_functions import start_from
from medseg.jobs.job import Job, prepare
from medseg.networks import UCTransNet, UNet


def unet(**options: Any) -> UNet:
    torch.manual_seed(1)
    return UNet(2, 1, 2, (4, 8, 8), **{"norm": "batch", "upsample": "deconv", **options})


def uctransnet() -> UCTransNet:
    torch.manual_seed(2)
    options = {"img_size": 16, "patch_size": 4, "num_heads": 1, "num_layers": 1, "upsample": "deconv"}
    return UCTransNet(2, 1, 2, (4, 8, 8), backbone="unet", **options)


def saved(network: torch.nn.Module, path: Path) -> str:
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("network", [unet, uctransnet])
def test_weights_of_the_same_network_are_all_taken(network: Any, tmp_path: Path, caplog: Any) -> None:
    first, second = network(), network()
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter)
    with caplog.at_level(logging.INFO):
        note = start_from(second, saved(first, tmp_path / "a.pt"))
    state = first.state_dict()
    assert note == f"started from a.pt: all {len(state)} tensors copied"
    assert note in caplog.messages
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.state_dict().items())


@pytest.mark.parametrize("cat_order", [None, "skip_first"])
def test_a_uctransnet_takes_over_a_unet_with_its_halves_in_order(cat_order: str | None, tmp_path: Path) -> None:
    source, target = unet(cat_order=cat_order or "up_first"), uctransnet()
    fresh = {name: tensor.clone() for name, tensor in target.state_dict().items() if "cct" in name or "cca" in name}
    note = start_from(target, saved(source, tmp_path / "a.pt"), cat_order=cat_order)
    swapped = 0 if cat_order else 2
    taken = len(source.state_dict())
    assert f"{taken} of {taken} tensors copied from the U-Net, {swapped} of them" in note
    theirs = source.state_dict()["decoder.1.convs.0.conv.weight"]
    ours = target.state_dict()["decoder.1.convs.0.conv.weight"]
    assert torch.equal(ours, theirs if cat_order else torch.cat([theirs[:, 4:], theirs[:, :4]], dim=1))
    assert torch.equal(target.state_dict()["encoder.2.0.conv.weight"], source.bottleneck[0].conv.weight)
    assert fresh
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in fresh.items())


@pytest.mark.parametrize(("path", "resume"), [("", False), ("gone.pt", True)])
def test_without_a_file_and_on_resuming_the_network_stays(path: str, resume: bool) -> None:
    network = unet()
    before = copy.deepcopy(network.state_dict())
    assert start_from(network, path, resume=resume) == ""
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("network", [unet, uctransnet])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda marker: {"head.weight": _Payload(marker)}, "could run code"),
        (lambda marker: [torch.zeros(1)], "expected a state dict"),
        (lambda marker: {"strange": torch.zeros(1)}, "a.pt"),
        (lambda marker: UNet(2, 1, 2, (6, 8, 8), norm="batch", upsample="deconv").state_dict(), "a.pt"),
        (lambda marker: None, "a.pt"),
    ],
)
def test_files_that_do_not_fit_are_named_and_change_nothing(
    network: Any, content: Any, message: str, tmp_path: Path
) -> None:
    target = network()
    before = copy.deepcopy(target.state_dict())
    torch.save(content(tmp_path / "ran"), tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=message):
        start_from(target, str(tmp_path / "a.pt"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert not (tmp_path / "ran").exists()


def _job(bundle: Bundle, data: Path, resume: bool = False, **settings: Any) -> Job:
    return prepare("train", bundle, settings, paths={"dataset_dir": str(data), "resume": resume})


def test_training_starts_from_the_weights_and_its_manifest_says_so(
    trained: Bundle, make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path
) -> None:
    bundle = make_bundle(tiny_source)
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "max_epochs": 2}
    manifest = runner.train(_job(bundle, tiny_data, pretrained=str(trained.weights), **still))
    (note,) = manifest.notes
    given = torch.load(trained.weights, weights_only=True)
    assert note == f"started from model.pt: all {len(given)} tensors copied"
    stored = json.loads((bundle.root / "runs" / "train" / "manifest.json").read_text())
    assert stored["notes"] == [note]
    assert stored["knobs"]["pretrained"] == "model.pt"
    # At a learning rate of zero the network ends where it began; only with another start would the weights differ.
    for name, tensor in torch.load(bundle.weights, weights_only=True).items():
        torch.testing.assert_close(tensor, given[name], msg=name)
    resumed = runner.train(_job(bundle, tiny_data, resume=True, pretrained="gone.pt", max_epochs=3))
    assert resumed.notes == []


def test_a_uctransnet_bundle_trains_from_a_unet(
    trained: Bundle, make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path
) -> None:
    keep = {name: tiny_source["network_def"][name] for name in ("spatial_dims", "in_channels", "out_channels")}
    shape = {"features": [4, 8, 8], "norm": ["instance", {"affine": True}], "upsample": "deconv", "backbone": "unet"}
    cct = {"img_size": [16, 24, 24], "patch_size": 4, "num_heads": 1, "num_layers": 1}
    tiny_source["network_def"] = {"_target_": "medseg.components.UCTransNet", **keep, **shape, **cct}
    manifest = runner.train(
        _job(make_bundle(tiny_source), tiny_data, pretrained=str(trained.weights), max_epochs=1, val_interval=1)
    )
    assert "2 of them with swapped halves of their input channels" in manifest.notes[0]
    assert "skipped: none" in manifest.notes[0]


def test_a_missing_file_is_refused_before_anything_is_written(trained: Bundle, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="to start from") as refusal:
        api.train(trained.root, tiny_data, output=tmp_path / "copy", settings={"pretrained": "gone.pt"})
    assert refusal.value.exit_code == 2
    assert not (tmp_path / "copy").exists()


def test_a_foreign_file_is_refused_before_the_first_epoch(trained: Bundle, tiny_data: Path, tmp_path: Path) -> None:
    path = saved(unet(), tmp_path / "other.pt")
    epochs: list[float] = []
    with pytest.raises(WeightsError, match="another network than UNet"):
        api.train(
            trained.root,
            tiny_data,
            output=tmp_path / "copy",
            settings={"pretrained": path},
            report=lambda done, total, note: epochs.append(done),
        )
    assert epochs == []
    assert not (tmp_path / "copy" / "runs").exists()
