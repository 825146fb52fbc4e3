"""The small functions that configs call."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from medseg.errors import RequestError, WeightsError
from medseg.files import sha256_file
from medseg.jobs import config_functions


@pytest.fixture
def network() -> nn.Module:
    return nn.Linear(3, 2)


def _saved(network: nn.Module, path: Path) -> str:
    torch.save(network.state_dict(), path)
    return str(path)


def test_weights_find_their_place(network: nn.Module, tmp_path: Path) -> None:
    other = nn.Linear(3, 2)
    config_functions.load_weights(network, _saved(other, tmp_path / "model.pt"))
    assert torch.equal(network.weight, other.weight)


def test_a_state_dict_under_model_is_taken(network: nn.Module, tmp_path: Path) -> None:
    other = nn.Linear(3, 2)
    torch.save({"model": other.state_dict()}, tmp_path / "model.pt")
    config_functions.load_weights(network, str(tmp_path / "model.pt"))
    assert torch.equal(network.weight, other.weight)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_in_the_weights_is_refused_and_does_not_run(network: nn.Module, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"weight": torch.zeros(2, 3), "bias": _Payload(marker)}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match="could run code"):
        config_functions.load_weights(network, str(tmp_path / "model.pt"))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Payload(marker)))
    with pytest.raises(WeightsError):
        config_functions.load_weights(network, str(tmp_path / "plain.pt"))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cut off"), (b"not weights at all", "model.pt"), (None, "No weights at")],
)
def test_an_unreadable_file_is_named(content: bytes | None, message: str, network: nn.Module, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        config_functions.load_weights(network, str(tmp_path / "model.pt"))


def test_a_truncated_file_is_refused(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    content = Path(_saved(network, path)).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="cut off"):
        config_functions.load_weights(network, str(path))


def test_weights_of_another_network_are_refused_with_what_does_not_fit(network: nn.Module, tmp_path: Path) -> None:
    path = _saved(nn.Sequential(nn.Linear(3, 2)), tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"another network.*4 tensors.*missing weight"):
        config_functions.load_weights(network, path)
    path = _saved(nn.Linear(5, 2), tmp_path / "model.pt")
    before = network.weight.clone()
    with pytest.raises(WeightsError, match=r"weight is \(2, 5\), not \(2, 3\)"):
        config_functions.load_weights(network, path)
    assert torch.equal(network.weight, before)


def test_altered_weights_are_refused_by_their_hash(network: nn.Module, tmp_path: Path) -> None:
    weights = tmp_path / "models" / "model.pt"
    weights.parent.mkdir()
    _saved(network, weights)
    metadata = tmp_path / "configs" / "metadata.json"
    metadata.parent.mkdir()
    metadata.write_text(json.dumps({"weights": {"models/model.pt": {"sha256": sha256_file(weights)}}}))
    config_functions.load_weights(network, str(weights), str(tmp_path))
    _saved(nn.Linear(3, 2), weights)
    with pytest.raises(WeightsError, match="was altered or replaced"):
        config_functions.load_weights(network, str(weights), str(tmp_path))


def test_paths_stay_inside(tmp_path: Path) -> None:
    assert config_functions.inside(str(tmp_path), "models/model.pt") == str(tmp_path / "models" / "model.pt")
    for path in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(RequestError, match="is outside the folder"):
            config_functions.inside(str(tmp_path), path)


def test_devices_are_checked() -> None:
    assert config_functions.select_device("cpu") == torch.device("cpu")
    assert config_functions.select_device("auto").type in ("cpu", "cuda")
    with pytest.raises(RequestError, match="Unknown device"):
        config_functions.select_device("gpu")
    with pytest.raises(RequestError, match="is not available"):
        config_functions.select_device("cuda:63")
