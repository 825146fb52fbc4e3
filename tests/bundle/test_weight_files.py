"""Weight files that are made to harm: nothing of them runs, fills the memory, or becomes part of a network."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medseg.bundle.weight_files import find_pickled
from medseg.errors import WeightsError
from medseg.jobs import config_functions


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def rewritten(
    content: bytes, *, method: int = zipfile.ZIP_STORED, pickle: bytes | None = None, more: Mapping[str, bytes] = {}
) -> bytes:
    """Write a weight file anew: with another way of packing, another pickle, more records."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", method) as new:
        for name in old.namelist():
            given = pickle is not None and name.endswith("data.pkl")
            new.writestr(name, pickle if given and pickle is not None else old.read(name))
        for name, record in more.items():
            new.writestr(name, record)
    return stream.getvalue()


def linear(**changes: Any) -> dict[str, Any]:
    return {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), **changes}


PACKED: dict[str, Callable[[], bytes]] = {
    "packed": lambda: rewritten(saved(linear()), method=zipfile.ZIP_DEFLATED),
    "a packed mountain": lambda: rewritten(
        saved(linear()), method=zipfile.ZIP_BZIP2, more={"archive/data/9": bytes(2**24)}
    ),
    "many pickles": lambda: rewritten(saved(linear()), more={f"archive/{n}.pkl": b"." for n in range(3)}),
    "a huge pickle": lambda: rewritten(saved(linear()), pickle=bytes(2**24 + 1)),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_file_that_could_fill_the_memory_is_refused_before_it_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(PACKED[name]())
    assert [found.reason for found in find_pickled(path, "models/model.pt")] != []
    monkeypatch.delattr(torch, "load")
    with pytest.raises(WeightsError, match=r"torch\.save"):
        config_functions.load_weights(nn.Linear(3, 2), str(path))


ODD: dict[str, Callable[[], Any]] = {
    "without data": lambda: torch.empty(2, 3, device="meta"),
    "sparse": lambda: torch.ones(2, 3).to_sparse(),
    "complex": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "one number for all": lambda: torch.ones(1).expand(2, 3),
    "overlapping": lambda: torch.ones(4).as_strided((2, 3), (1, 1)),
    "endless": lambda: torch.ones(1).expand(10**6, 10**6),
}


@pytest.mark.parametrize("name", ODD)
def test_tensors_that_no_network_saves_are_refused_and_change_nothing(name: str, tmp_path: Path) -> None:
    path, network = tmp_path / "model.pt", nn.Linear(3, 2)
    path.write_bytes(saved({"bias": torch.zeros(2), "weight": ODD[name]()}))
    before = network.bias.clone()
    with pytest.raises(WeightsError, match="Unsupported tensor 'weight'"):
        config_functions.load_weights(network, str(path))
    assert torch.equal(network.bias, before)


def test_views_of_one_storage_are_taken(tmp_path: Path) -> None:
    path, network = tmp_path / "model.pt", nn.Linear(3, 2)
    storage = torch.arange(8.0)
    path.write_bytes(saved({"weight": storage[:6].reshape(3, 2).T, "bias": storage[6:]}))
    config_functions.load_weights(network, str(path))
    assert torch.equal(network.weight, storage[:6].reshape(3, 2).T)


BROKEN: dict[str, bytes] = {
    "too many marks": b"\x80\x02" + b"(" * 1000 + b".",
    "a number of two thousand million bytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "nothing": b"",
    "an unknown memory": b"\x80\x02h\x07.",
    "an extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pickle_is_an_error_of_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(rewritten(saved(linear()), pickle=BROKEN[name]))
    assert not any(found.allowed for found in find_pickled(path, "models/model.pt"))
    with pytest.raises(WeightsError, match=r"model\.pt"):
        config_functions.load_weights(nn.Linear(3, 2), str(path))


def test_of_a_pickle_with_endless_calls_the_first_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    calls = b"".join(f"cos\nname{n}\n".encode() for n in range(100_000))
    path.write_bytes(rewritten(saved(linear()), pickle=b"\x80\x02" + calls + b"."))
    found = [finding.value for finding in find_pickled(path, "models/model.pt")]
    assert found == [f"os.name{n}" for n in range(20)]
