"""Published weights become bundles that compute what the authors' code computed."""

from __future__ import annotations

import copy
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from medseg.bundle.catalog import Bundle
from medseg.errors import BundleError, MedsegError, RequestError, WeightsError
from medseg.files import sha256_file
from medseg.jobs.config_functions import load_weights
from medseg.networks import UNet
from medseg.networks.convert import SOURCES
from medseg.tools import convert as convert_module
from medseg.tools.check import check_bundle
from medseg.tools.convert import SOURCE_NAMES, Conversion, convert

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("background", "one", "two", "three")


@pytest.fixture
def like(make_bundle: Any, tiny_source: dict[str, Any]):
    """Return a function that makes a bundle with the given dimensions, channels and labels as a model for others."""

    def make(spatial_dims: int, channels: int, labels: int) -> Bundle:
        source = copy.deepcopy(tiny_source)
        source["template"] = {3: "mr_volume", 2: {1: "grey_image", 3: "rgb_image"}.get(channels)}[spatial_dims]
        source["channels"] = {str(i): f"channel {i}" for i in range(channels)}
        source["labels"] = {str(i): NAMES[i] for i in range(labels)}
        source["network_def"] |= {"spatial_dims": spatial_dims, "in_channels": channels, "out_channels": labels}
        if spatial_dims == 2:
            source["knobs"] = {"patch_size": [64, 64], "roi_size": [64, 64]}
        else:
            source["knobs"] |= {"patch_size": [16, 32, 32], "roi_size": [16, 32, 32]}
        return make_bundle(source)

    return make


def built_network(bundle: Bundle) -> torch.nn.Module:
    """Build the network as a job of the bundle does, and load the bundle's weights."""
    parser = ConfigParser({"network_def": bundle.load_configs("inference")["inference.json"]["network_def"]})
    network = parser.get_parsed_content("network_def")
    load_weights(network, str(bundle.weights), str(bundle.root))
    return network.eval()


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def test_all_sources_can_be_named_before_torch_is_imported() -> None:
    assert tuple(SOURCES) == SOURCE_NAMES


@pytest.mark.parametrize(
    ("source", "name", "output", "probabilities", "shape"),
    [
        ("unet-port", "unet2d", "output/logits", False, (2, 3, 2)),
        ("unet-2018", "unet2d_deconv", "output/prob", True, (2, 1, 2)),
        ("unetpp-port", "unetpp2d", "output/head4", False, (2, 3, 2)),
        ("unetpp-nnunet", "unetpp2d_nnunet", "output/head5", False, (2, 1, 2)),
        ("unetpp-port", "unetpp3d", "output/head4", False, (3, 1, 2)),
        ("unetpp-2018", "unetpp3d_deconv", "output/head4_prob", True, (3, 1, 2)),
        ("uctransnet", "uctransnet3d", "output", False, (3, 1, 2)),
        ("uctransnet-unet", "uctransnet_unet2d", "output", True, (2, 3, 2)),
    ],
)
def test_the_bundle_passes_its_checks_and_computes_the_golden_output(
    source: str, name: str, output: str, probabilities: bool, shape: tuple[int, int, int], like: Any, tmp_path: Path
) -> None:
    arrays = golden(name)
    target = Bundle(tmp_path / "new" / "target_any_network")
    done = convert(GOLDEN / f"{name}.npz", source, target.root, like=like(*shape).root, prefix="state/")
    assert check_bundle(target) == dict.fromkeys(check_bundle(target), "")
    network = built_network(target)
    with torch.no_grad():
        found = network(torch.from_numpy(arrays["input"]))
    expected = torch.from_numpy(arrays[output])
    assert done.background == (expected.shape[1] == 1)
    if done.background:
        assert not found[:, 0].any()
        as_before = found.softmax(1) if probabilities else found
        found = as_before[:, 1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert done.tensors == len(network.state_dict())
    assert done.parameters == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("name", "shape"), [("banet2d", (2, 3, 2)), ("banet3d", (3, 1, 2))])
def test_what_the_source_never_uses_is_left_out_and_reported(
    name: str, shape: tuple[int, int, int], like: Any, tmp_path: Path
) -> None:
    target = Bundle(tmp_path / "target_any_banet")
    done = convert(GOLDEN / f"{name}.npz", "banet", target.root, like=like(*shape).root, prefix="net/state/")
    state = torch.load(target.weights, weights_only=True)
    assert len(done.left_out) == 6
    assert done.tensors == len(state)
    assert check_bundle(target) == dict.fromkeys(check_bundle(target), "")


def test_what_the_tensors_cannot_tell_is_taken_from_the_settings(like: Any, tmp_path: Path) -> None:
    target, arrays = Bundle(tmp_path / "target_any_unet"), golden("unet2d_valid")
    options = {"like": like(2, 1, 2).root, "prefix": "state/", "settings": {"upconv_relu": True}}
    convert(GOLDEN / "unet2d_valid.npz", "unet-2015", target.root, **options)
    with torch.no_grad():
        found = built_network(target)(torch.from_numpy(arrays["input"]))
    expected = torch.from_numpy(arrays["output/logits_relu_after_upconv"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def unet_port(path: Path, **changes: Any) -> Path:
    """Save the state of a golden U-Net as `torch.save` does, with some of its names changed."""
    state = {k.removeprefix("state/"): torch.from_numpy(a) for k, a in golden("unet2d").items() if "state/" in k}
    torch.save({"epoch": 3, "state_dict": state, **changes}, path)
    return path


def converted(path: Path, to: Path, **options: Any) -> Conversion:
    return convert(path, "unet-port", to, **options)


def test_weights_in_a_wrapped_torch_file_are_found(like: Any, tmp_path: Path) -> None:
    target = Bundle(tmp_path / "target_any_unet")
    converted(unet_port(tmp_path / "a.pth"), target.root, like=like(2, 3, 2).root)
    assert isinstance(built_network(target), UNet)


def test_reversed_channels_give_the_same_result_for_the_reversed_picture(like: Any, tmp_path: Path) -> None:
    target, arrays = Bundle(tmp_path / "target_any_unet"), golden("unet2d")
    converted(unet_port(tmp_path / "a.pth"), target.root, like=like(2, 3, 2).root, reverse_channels=True)
    with torch.no_grad():
        found = built_network(target)(torch.from_numpy(arrays["input"]).flip(1))
    torch.testing.assert_close(found, torch.from_numpy(arrays["output/logits"]), atol=1e-5, rtol=1e-5)


def test_an_existing_bundle_of_the_same_network_gets_the_weights_and_their_hash(like: Any, tmp_path: Path) -> None:
    path = unet_port(tmp_path / "a.pth")
    bundle = Bundle(tmp_path / "target_any_unet")
    converted(path, bundle.root, like=like(2, 3, 2).root)
    first = sha256_file(bundle.weights)
    with pytest.raises(RequestError, match="--overwrite"):
        converted(path, bundle.root)
    bundle.weights.write_bytes(b"other")
    converted(path, bundle.root, overwrite=True)
    assert sha256_file(bundle.weights) == first
    assert bundle.metadata["weights"]["models/model.pt"]["sha256"] == first
    assert check_bundle(bundle) == dict.fromkeys(check_bundle(bundle), "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cat_order": "up_first"}, r"computes something else: decoder\.0\.join is 'up_first', not 'skip_first'"),
        ({"act": "leakyrelu"}, "LeakyReLU, not ReLU"),
        ({"features": [6, 8, 12, 16, 24]}, r"bottleneck\.0\.conv\.weight is \(20, "),
        ({"norm": "instance"}, "tensors do not match"),
    ],
)
def test_a_bundle_of_another_network_is_refused_with_what_differs(
    change: dict[str, Any], message: str, like: Any, tmp_path: Path
) -> None:
    path, bundle = unet_port(tmp_path / "a.pth"), Bundle(tmp_path / "target_any_unet")
    converted(path, bundle.root, like=like(2, 3, 2).root)
    before = bundle.weights.read_bytes()
    source = json.loads((bundle.root / "bundle.json").read_text())
    source["network_def"] |= change
    (bundle.root / "bundle.json").write_text(json.dumps(source))
    with pytest.raises(MedsegError, match=message):
        converted(path, bundle.root, overwrite=True)
    assert bundle.weights.read_bytes() == before


def test_a_bundle_whose_network_is_a_program_is_not_built(like: Any, tmp_path: Path) -> None:
    path, bundle = unet_port(tmp_path / "a.pth"), like(2, 3, 2)
    marker = tmp_path / "ran"
    source = json.loads((bundle.root / "bundle.json").read_text())
    source["network_def"] = {"_target_": "pathlib.Path.touch", "self": f"{marker}", "in_channels": 3, "out_channels": 2}
    (bundle.root / "bundle.json").write_text(json.dumps(source))
    with pytest.raises(BundleError, match="is not trusted"):
        converted(path, bundle.root)
    assert not marker.exists()


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def _hostile_array(path: Path, marker: Path) -> None:
    np.savez(path, **{"final.weight": np.array([_Payload(marker)], dtype=object)})


def _lying_array(path: Path) -> None:
    """Write an array whose header claims a million times what memory can hold."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("final.weight.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def test_an_archive_of_arrays_that_unpacks_to_too_much_is_not_read(
    like: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "_MAX_BYTES", 1000)
    np.savez_compressed(tmp_path / "a.npz", **{"final.weight": np.zeros(1000)})
    with pytest.raises(WeightsError, match="limit 1000"):
        converted(tmp_path / "a.npz", tmp_path / "target_any_unet", like=like(2, 3, 2).root)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("a.pt", lambda path, marker: torch.save({"final.weight": _Payload(marker)}, path)),
        ("b.pt", lambda path, marker: path.write_bytes(pickle.dumps(_Payload(marker)))),
        ("c.npz", _hostile_array),
        ("d.npz", lambda path, marker: path.write_bytes(pickle.dumps(_Payload(marker)))),
        ("e.npz", lambda path, marker: path.write_bytes((GOLDEN / "unet2d.npz").read_bytes()[:5000])),
        ("f.npz", lambda path, marker: path.write_bytes(b"")),
        ("g.pt", lambda path, marker: path.write_bytes((GOLDEN / "unet2d.npz").read_bytes())),
        ("h.pt", lambda path, marker: torch.save({0: torch.zeros(1)}, path)),
        ("i.pt", lambda path, marker: torch.save([torch.zeros(1)], path)),
        ("j.pt", lambda path, marker: torch.save({}, path)),
        ("k.pt", lambda path, marker: torch.save({"other": torch.zeros(1)}, path)),
        ("l.npz", lambda path, marker: _lying_array(path)),
    ],
)
def test_hostile_and_foreign_files_are_refused_and_leave_nothing(
    name: str, spoil: Any, like: Any, tmp_path: Path
) -> None:
    marker, path, target = tmp_path / "ran", tmp_path / name, tmp_path / "target_any_unet"
    spoil(path, marker)
    with pytest.raises(WeightsError):
        converted(path, target, like=like(2, 3, 2).root)
    assert not marker.exists()
    assert not target.exists()


def test_requests_that_cannot_be_leave_nothing(like: Any, tmp_path: Path) -> None:
    path, new, fits = unet_port(tmp_path / "a.pth"), tmp_path / "target_any_unet", like(2, 3, 2).root
    (tmp_path / "full" / "x").mkdir(parents=True)
    cases: list[tuple[Path, str, Path, dict[str, Any], str]] = [
        (path, "unet-prot", new, {"like": fits}, "did you mean 'unet-port'"),
        (tmp_path / "missing.pt", "unet-port", new, {"like": fits}, "no weights at"),
        (path, "unet-port", new, {}, "--like BUNDLE"),
        (path, "unet-port", tmp_path / "full", {"like": fits}, "exists without a bundle.json"),
        (path, "unet-port", fits, {"like": fits}, "remove --like"),
        (
            path,
            "unet-port",
            tmp_path / "unnamed",
            {"like": fits},
            "expected a name of the form <target>_<modality>_<network>",
        ),
        (path, "unet-port", new, {"like": like(2, 1, 2).root}, "in_channels=3, but .* lists 1 channels"),
        (path, "unet-port", new, {"like": like(2, 3, 3).root}, "out_channels=2, but .* lists 3 labels"),
        (path, "unet-port", new, {"like": like(3, 3, 2).root}, "2D network, but .* 3D images"),
        (path, "unet-port", new, {"like": fits, "prefix": "net."}, "starting with 'net.'"),
        (path, "unet-2018", new, {"like": fits}, "do not match source 'unet-2018'"),
        (path, "unet-port", new, {"like": fits, "settings": {"colour": 1}}, "cannot be built with .*colour=1"),
        (path, "unet-port", new, {"like": fits, "settings": {"features": [1, 2]}}, "do not match source"),
    ]
    for file, source, to, options, message in cases:
        with pytest.raises(RequestError, match=message):
            convert(file, source, to, **options)
        assert not new.exists(), message
        assert not (fits / "models").exists(), message
