"""Public UNet++ weights: reference outputs are reproduced at every head, pruned or not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medseg.errors import WeightsError
from medseg.networks import UNetPlusPlus
from medseg.networks.convert import from_reference
from medseg.networks.unetplusplus import preset

ROOT = Path(__file__).parents[2]


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the state and the other arrays of a reference file."""
    places = [ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden"]
    path = next((p for place in places if (p := place / f"{name}.npz").is_file()), None)
    if path is None:
        pytest.skip(f"{name}.npz is too large for the repository; put it into {places[1]}")
    with np.load(path) as file:
        arrays = dict(file)
    state = {key.removeprefix("state/"): a for key, a in arrays.items() if key.startswith("state/")}
    return state, arrays


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def small(dims: int = 2, features: tuple[int, ...] = (4, 5, 6, 7), **options) -> UNetPlusPlus:
    torch.manual_seed(0)
    return UNetPlusPlus(dims, 1, 2, features, **options)


def image(dims: int = 2, size: tuple[int, ...] = (16, 24, 16), batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, *size[:dims], generator=torch.Generator().manual_seed(1))


REFERENCES = [
    ("unetpp-port", "unetpp2d", 1e-5),
    ("unetpp-port", "unetpp3d", 1e-5),
    ("unetpp-2018", "unetpp2d_deconv", 1e-5),
    ("unetpp-2018", "unetpp3d_deconv", 1e-5),
    ("unetpp-nnunet", "unetpp2d_nnunet", 1e-4),
    pytest.param("unetpp-nnunet", "unetpp3d_nnunet", 1e-4, marks=pytest.mark.data),
]


@pytest.mark.parametrize(("source", "name", "tolerance"), REFERENCES)
def test_reference_heads_are_reproduced(source, name, tolerance):
    state, arrays = golden(name)
    network = from_reference(source, state)
    with torch.no_grad():
        heads = network.forward_train(torch.from_numpy(arrays["input"]))["aux"]
    assert len(heads) == sum(key.startswith("output/head") for key in arrays)
    for level, logits in enumerate(heads, start=1):
        key = f"output/head{level}"
        found = logits if key in arrays else logits.sigmoid()
        expected = arrays[key] if key in arrays else arrays[f"{key}_prob"]
        torch.testing.assert_close(found, torch.from_numpy(expected), atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("name", ["unetpp2d", "unetpp3d", "unetpp2d_deconv", "unetpp3d_deconv"])
def test_reference_mean_of_probabilities_is_reproduced(name):
    state, arrays = golden(name)
    source = "unetpp-2018" if "deconv" in name else "unetpp-port"
    network = from_reference(source, state, output_mode="mean", head_activation="sigmoid")
    with torch.no_grad():
        found = network(torch.from_numpy(arrays["input"])).sigmoid()
    expected = arrays["output/mean_prob" if "deconv" in name else "output/mean_prob_sigmoid"]
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["unetpp2d", "unetpp3d"])
def test_reference_mean_of_logits_is_reproduced_and_is_another_number(name):
    state, arrays = golden(name)
    network = from_reference("unetpp-port", state, output_mode="mean_logits")
    with torch.no_grad():
        found = network(torch.from_numpy(arrays["input"]))
    torch.testing.assert_close(found, torch.from_numpy(arrays["output/mean_logits"]), atol=1e-5, rtol=1e-5)
    assert (found.sigmoid() - torch.from_numpy(arrays["output/mean_prob_sigmoid"])).abs().max() > 1e-3


@pytest.mark.parametrize(("source", "name", "tolerance"), REFERENCES)
def test_pruned_reference_is_its_head_bit_for_bit(source, name, tolerance):
    state, arrays = golden(name)
    network = from_reference(source, state)
    x = torch.from_numpy(arrays["input"])
    with torch.no_grad():
        heads = network.forward_train(x)["aux"]
        for level, head in zip(network.levels, heads, strict=True):
            assert torch.equal(network.prune(level)(x), head)


@pytest.mark.parametrize("name", ["unetpp2d", "unetpp3d"])
def test_pruned_reference_has_the_parameters_that_its_file_lists(name):
    state, arrays = golden(name)
    network = from_reference("unetpp-port", state)
    meta = json.loads(str(arrays["meta"]))
    assert parameters(network) == meta["params_total"]
    found = {str(level): parameters(network.prune(level)) for level in network.levels}
    assert found == meta["params_pruned_one_head"]


ORIGINALS = {
    "unetpp-port": {"norm": "batch", "upsample": "interp"},
    "unetpp-2018": {"cat_order": "up_first"},
    "unetpp-nnunet": {key: value for key, value in preset("nnunet", 2).items() if key != "features"},
}


def foreign_state(source: str, network: UNetPlusPlus, last_head: str | None = None) -> dict[str, torch.Tensor]:
    """Rename our tensors to the source's names, by the rule that its documents give."""
    depth = len(network.diagonals) - 1
    renamed = {}
    for name, tensor in network.state_dict().items():
        part, number, *path, leaf = name.split(".")
        n = int(number)
        if part == "heads":
            own = {
                "unetpp-port": f"final{n}",
                "unetpp-2018": f"output_{n}",
                "unetpp-nnunet": f"seg_outputs.{depth - n}",
            }
            renamed[f"{last_head or own[source]}.{leaf}"] = tensor
            continue
        column = int(path[1]) + 1 if path[0] == "nodes" else 0
        row = n - column
        if "up" in path:
            module = f"up{row + 1}{column + 1}" if source == "unetpp-2018" else f"up{depth - n}.{column - 1}"
        else:
            place, layer = int(path[-2]), path[-1]
            if source == "unetpp-port":
                module = f"conv{row}_{column}.{'conv' if layer == 'conv' else 'bn'}{place + 1}"
            elif source == "unetpp-2018":
                module = f"conv{row + 1}{column + 1}_{place + 1}"
            else:
                block = f"conv_blocks_context.{row}" if column == 0 else f"loc{depth - n}.{column - 1}"
                flat = column == 0 and row < depth
                unit = f"{block}.blocks.{place}" if flat else f"{block}.{place}.blocks.0"
                module = f"{unit}.{'conv' if layer == 'conv' else 'instnorm'}"
        renamed[f"{module}.{leaf}"] = tensor
    return renamed


@pytest.mark.parametrize("source", list(ORIGINALS))
@pytest.mark.parametrize(("dims", "features"), [(2, (3, 5, 4)), (3, (3, 5)), (3, (2, 3, 4, 5, 6)), (2, (2,) * 7)])
def test_other_widths_depths_heads_classes_and_3d_are_read_off_the_tensors(source, dims, features):
    torch.manual_seed(0)
    original = UNetPlusPlus(dims, 2, 4, features, **ORIGINALS[source]).eval()
    found = from_reference(source, foreign_state(source, original))
    assert found.levels == original.levels
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, msg=name)
    n = 2 ** (len(features) - 1)
    x = torch.randn(1, 2, *(2 * n, n, n)[:dims])
    with torch.no_grad():
        torch.testing.assert_close(found(x), original(x))


@pytest.mark.parametrize(
    ("source", "last_head"), [("unetpp-port", "final"), ("unetpp-2018", None), ("unetpp-nnunet", None)]
)
def test_weights_of_one_head_are_read(source, last_head):
    original = small(deep_supervision=False, **ORIGINALS[source])
    found = from_reference(source, foreign_state(source, original, last_head))
    assert found.levels == (3,)
    assert torch.equal(found.heads["3"].weight, original.heads["3"].weight)


@pytest.mark.parametrize("source", ["unetpp-2018", "unetpp-nnunet"])
def test_strides_per_axis_are_read_off_the_up_convolutions(source):
    original = small(3, strides=((1, 2, 2), (2, 2, 1), 2), **ORIGINALS[source]).eval()
    found = from_reference(source, foreign_state(source, original))
    assert found.strides == original.strides
    assert torch.equal(found(image(3)), original(image(3)))


@pytest.mark.parametrize(
    ("source", "name"),
    [("unetpp-port", "conv1_0.conv1.weight"), ("unetpp-2018", "output_3.weight"), ("unetpp-nnunet", "up0.1.weight")],
)
def test_a_missing_tensor_is_named(source, name):
    state = foreign_state(source, small(**ORIGINALS[source]))
    del state[name]
    with pytest.raises(WeightsError, match=rf"(?s){source}.*{name}"):
        from_reference(source, state)
