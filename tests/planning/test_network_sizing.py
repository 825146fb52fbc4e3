"""The ladder of sizes, and the arguments that a plan gives to each network."""

from __future__ import annotations

import math

import pytest

from medseg.networks import NETWORKS
from medseg.planning.estimate import count
from medseg.planning.geometry import Layout, lay_out
from medseg.planning.network_sizing import SIZE_LADDER, max_poolings, network_def, strides_note

WIDTHS = (8, 32)


def layout(dims: int, network: str = "UNet", *, thick: bool = False) -> Layout:
    shape, spacing = ((32, 32, 32), (1.0, 1.0, 1.0)) if not thick else ((48, 48, 12), (0.8, 0.8, 4.0))
    return lay_out(shape[:dims], spacing[:dims], 10**6, max_poolings(network, dims))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_ladder_goes_down_in_powers_of_two_and_never_widens(dims: int) -> None:
    ladder = SIZE_LADDER[dims]
    assert all(math.log2(width).is_integer() for width, _ in ladder)
    costs = [width**2 * voxels for width, voxels in ladder]
    assert costs == sorted(costs, reverse=True)
    widths = [width for width, _ in ladder]
    assert widths == sorted(widths, reverse=True)
    for width in set(widths):
        voxels = [n for each, n in ladder if each == width]
        assert voxels == sorted(voxels, reverse=True)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", list(NETWORKS))
def test_a_definition_has_channels_classes_and_norm_of_its_data(network: str, dims: int) -> None:
    for norm in ("batch", "instance"):
        definition = network_def(network, dims, 3, 5, 16, layout(dims, network), norm)
        assert definition["_target_"] == f"medseg.components.{network}"
        assert (definition["spatial_dims"], definition["in_channels"], definition["out_channels"]) == (dims, 3, 5)
        assert definition["norm"] == ("batch" if norm == "batch" else ["instance", {"affine": True}])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", list(NETWORKS))
def test_more_width_takes_more_weights_and_more_memory(network: str, dims: int) -> None:
    made = layout(dims, network)
    costs = [count(network_def(network, dims, 1, 2, width, made, "instance"), made.patch, 2) for width in WIDTHS]
    assert [cost.parameters for cost in costs] == sorted({cost.parameters for cost in costs})
    assert [cost.memory for cost in costs] == sorted({cost.memory for cost in costs})


@pytest.mark.parametrize("network", list(NETWORKS))
def test_definitions_share_nothing_that_one_could_change_for_all(network: str) -> None:
    first, second = (network_def(network, 3, 1, 2, 16, layout(3, network), "instance") for _ in range(2))
    first["norm"][1]["affine"] = False
    for value in first.values():
        if isinstance(value, list):
            value.clear()
    assert second == network_def(network, 3, 1, 2, 16, layout(3, network), "instance")


@pytest.mark.parametrize(("width", "dims", "features"), [(16, 2, [16, 32, 64, 128]), (32, 3, [32, 64, 128, 256])])
def test_features_double_at_every_pooling(width: int, dims: int, features: list[int]) -> None:
    made = layout(dims)
    definition = network_def("UNet", dims, 1, 2, width, made, "instance")
    assert definition["features"] == features[: len(made.strides) + 1]
    assert "strides" not in definition


def test_the_deepest_levels_stop_doubling() -> None:
    deep = Layout((64, 64, 64), ((2, 2, 2),) * 4, whole=True)
    assert network_def("UNet", 3, 1, 2, 32, deep, "instance")["features"] == [32, 64, 128, 256, 320]


def test_coarse_slices_give_strides_per_axis() -> None:
    made = layout(3, thick=True)
    definition = network_def("UNet", 3, 1, 2, 16, made, "instance")
    assert definition["strides"] == [list(stride) for stride in made.strides]
    assert definition["strides"][0] == [2, 2, 1]


def test_uctransnet_gets_the_patch_that_it_is_trained_on() -> None:
    made = layout(3, "UCTransNet", thick=True)
    definition = network_def("UCTransNet", 3, 1, 2, 16, made, "instance")
    assert definition["img_size"] == list(made.patch)
    assert definition["patch_size"] == list(made.step)


@pytest.mark.parametrize("network", list(NETWORKS))
def test_every_network_has_a_depth_a_rate_and_a_note(network: str) -> None:
    planning = NETWORKS[network].planning
    for dims in (2, 3):
        assert 1 <= max_poolings(network, dims) <= 6
        assert 1e-5 < planning.learning_rate[dims] < 1e-1
    assert strides_note(network)
