"""Public weights: reference outputs are reproduced, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.errors import RequestError, WeightsError
from medseg.networks import UNet
from medseg.networks.convert import SOURCES, from_reference, read_reference

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the state and the other arrays of a reference file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    state = {key.removeprefix("state/"): a for key, a in arrays.items() if key.startswith("state/")}
    return state, arrays


@pytest.mark.parametrize(
    ("source", "name", "output", "config"),
    [
        ("unet-port", "unet2d", "logits", {}),
        ("unet-2018", "unet2d_deconv", "prob", {}),
        ("unet-2015", "unet2d_valid", "logits", {}),
        ("unet-2015", "unet2d_valid", "logits_relu_after_upconv", {"upconv_relu": True}),
    ],
)
def test_reference_outputs_are_reproduced(source, name, output, config):
    state, arrays = golden(name)
    network = from_reference(source, state, **config)
    assert not network.training
    with torch.no_grad():
        found = network(torch.from_numpy(arrays["input"]))
    found = found.sigmoid() if output == "prob" else found
    expected = torch.from_numpy(arrays[f"output/{output}"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_relu_after_the_up_convolution_makes_a_difference():
    _, arrays = golden("unet2d_valid")
    assert abs(arrays["output/logits"] - arrays["output/logits_relu_after_upconv"]).max() > 1e-2


ORIGINALS = {
    "unet-port": {"norm": "batch", "upsample": "interp", "cat_order": "skip_first"},
    "unet-2018": {},
    "unet-2015": {"padding": "valid", "last_upconv_channels": 6},
}


def foreign_state(source: str, network: UNet) -> dict[str, torch.Tensor]:
    """Rename our tensors to the source's names, by the rule that its documents give."""
    depth = len(network.encoder)
    renamed = {}
    for name, tensor in network.state_dict().items():
        path, leaf = name.split("."), name.split(".")[-1]
        if path[0] == "head":
            module = {"unet-port": "final", "unet-2018": "output", "unet-2015": "score"}[source]
            renamed[f"{module}.{leaf}"] = tensor
            continue
        up = path[0] == "decoder"
        level = depth if path[0] == "bottleneck" else depth - 1 - int(path[1]) if up else int(path[1])
        column = depth - level if up else 0
        if path[2] == "up":
            module = f"up{level + 1}{column + 1}" if source == "unet-2018" else f"up{level}_deconv"
        else:
            nth = int(path[-3]) + 1
            module = {
                "unet-port": f"conv{level}_{column}.{'conv' if path[-2] == 'conv' else 'bn'}{nth}",
                "unet-2018": f"conv{level + 1}{column + 1}_{nth}",
                "unet-2015": f"{'up' if up else 'down'}{level}_conv{nth}",
            }[source]
        renamed[f"{module}.{leaf}"] = tensor
    return renamed


@pytest.mark.parametrize("source", list(ORIGINALS))
@pytest.mark.parametrize(("dims", "features"), [(2, (3, 5, 4)), (3, (3, 5)), (3, (2, 3, 4, 5, 6))])
def test_other_widths_depths_classes_and_3d_are_read_off_the_tensors(source, dims, features):
    torch.manual_seed(0)
    original = UNet(dims, 2, 4, features, **ORIGINALS[source]).eval()
    found = from_reference(source, foreign_state(source, original))
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, msg=name)
    size = original.valid_sizes.smallest if original.valid_sizes else (16, 18, 20)[:dims]
    if dims == 2 or source != "unet-2015":
        with torch.no_grad():
            image = torch.randn(1, 2, *size)
            torch.testing.assert_close(found(image), original(image))


def test_a_prefix_of_parallel_training_is_ignored():
    state, _ = golden("unet2d_valid")
    from_reference("unet-2015", {f"module.{name}": tensor for name, tensor in state.items()})


def test_missing_batch_counters_are_no_error():
    state, _ = golden("unet2d")
    from_reference("unet-port", {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")})


def test_the_given_state_is_not_shared_with_the_network():
    state = {name: torch.from_numpy(a) for name, a in golden("unet2d_valid")[0].items()}
    network = from_reference("unet-2015", state)
    with torch.no_grad():
        network.head.bias.add_(1)
    assert (network.head.bias - state["score.bias"]).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("name", "title"), [("up2_conv1.bias", "Missing"), ("down2_conv2.weight", "Missing"), ("score.weight", "missing")]
)
def test_a_missing_tensor_is_named(name, title):
    state, _ = golden("unet2d_valid")
    del state[name]
    with pytest.raises(WeightsError, match=rf"(?s)unet-2015.*({title}.*{name}|{name}.*{title})"):
        from_reference("unet-2015", state)


def test_a_surplus_tensor_is_named():
    state, _ = golden("unet2d_deconv")
    with pytest.raises(WeightsError, match=r"Unexpected \(1\): output_2.bias"):
        from_reference("unet-2018", {**state, "output_2.bias": np.zeros(1)})


def test_a_tensor_of_another_shape_is_named_with_both_shapes():
    state, _ = golden("unet2d_valid")
    state["up1_conv1.weight"] = state["up1_conv1.weight"][:3]
    with pytest.raises(WeightsError, match=r"up1_conv1.weight \(3, 12, 3, 3\), expected \(6, 12, 3, 3\)"):
        from_reference("unet-2015", state)


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("state", [{}, {"encoder.weight": np.zeros(3)}], ids=["empty", "foreign"])
def test_a_file_of_something_else_is_refused(source, state):
    with pytest.raises(WeightsError, match=source):
        from_reference(source, state)


FIRST = {
    "unet-2015": "down0_conv1.weight",
    "unet-port": "conv0_0.conv1.weight",
    "unetpp-nnunet": "conv_blocks_context.0.blocks.0.conv.weight",
    "banet": "pretrain_model.conv1.weight",
    "uctransnet": "inc.conv.weight",
}


@pytest.mark.parametrize("source", FIRST)
def test_a_tensor_with_too_few_axes_is_an_error_of_the_file(source):
    deeper = {"conv1_0.conv1.weight", "down1.nConvs.0.conv.weight", "conv_blocks_context.1.0.blocks.0.conv.weight"}
    state = dict.fromkeys({FIRST[source], *deeper}, torch.zeros(()))
    with pytest.raises(WeightsError, match=f"do not match source '{source}'"):
        read_reference(source, state)


def test_a_number_that_leaves_gaps_is_refused_at_once():
    with pytest.raises(WeightsError, match="number a module 999999999, but there are only 1 tensors"):
        read_reference("unet-2015", {"down999999999_conv1.weight": torch.zeros(1, 1, 3, 3)})


def test_long_lists_of_names_are_cut():
    state, _ = golden("unet2d")
    with pytest.raises(WeightsError, match=r"Unexpected \(40\).*and 28 more"):
        from_reference("unet-port", {**state, **{f"extra{i}": np.zeros(1) for i in range(40)}})


def test_an_unknown_source_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match=r"'unet-1999'.*unet-2015"):
        from_reference("unet-1999", {})
