"""The multi-task loss of BA-Net: reference values, edge truth in 2D and 3D, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import RequestError, SizeError
from medseg.losses.boundary import BoundaryMultiTaskLoss, SumOfTasksLoss, edge_truth
from medseg.networks import BANet

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    with np.load(GOLDEN / "banet2d.npz") as file:
        return {key.removeprefix("loss/"): torch.from_numpy(file[key]) for key in file if key.startswith("loss/")}


def output_of(reference: dict[str, Tensor]) -> Any:
    maps = {kind: [reference[f"in/{kind}{i}"] for i in range(1, 5)] for kind in ("seg", "edge")}
    return {"logits": reference["in/out"], "aux": maps["seg"], "edges": maps["edge"]}


def random_output(channels: int, edge_channels: int, size: tuple[int, ...], stages: int = 2) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def maps(c: int) -> list[Tensor]:
        return [torch.randn(2, c, *size, generator=generator) for _ in range(stages)]

    output = {"logits": maps(channels)[0], "aux": maps(channels), "edges": maps(edge_channels)}
    return output, torch.randint(0, max(channels, 2), (2, 1, *size), generator=generator)


class Constant(nn.Module):
    """A loss of a known value that remembers what it was given."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        self.seen.append((prediction, target))
        return torch.tensor(self.value)


# Edge truth


def test_the_edge_mask_of_the_authors_is_reproduced_exactly(reference):
    found = edge_truth(reference["in/label"][:, None], border_is_edge=True)
    assert torch.equal(found[:, 0], reference["out/boundary"])
    assert found.any()


@pytest.mark.parametrize("dims", [2, 3])
def test_the_edge_is_where_a_binary_mask_differs_from_its_box_mean(dims):
    """The official rule in any dimension, zeros outside counted."""
    mask = (torch.rand(2, 1, *(9, 8, 7)[:dims], generator=torch.Generator().manual_seed(1)) > 0.8).float()
    kernel = torch.ones(1, 1, *(3,) * dims) / 3**dims
    mean = (F.conv2d, F.conv3d)[dims - 2](mask, kernel, padding=1)
    assert torch.equal(edge_truth(mask, border_is_edge=True), (mask - mean).abs() > 1e-4)


@pytest.mark.parametrize("border_is_edge", [True, False])
@pytest.mark.parametrize(("dims", "side"), [(2, 3), (2, 6), (3, 5)])
def test_a_cube_has_a_band_of_two_voxels(dims, side, border_is_edge):
    mask = torch.zeros(1, 1, *(side + 6,) * dims, dtype=torch.long)
    mask[(..., *[slice(3, 3 + side)] * dims)] = 1
    edge = edge_truth(mask, border_is_edge=border_is_edge)
    assert edge[mask == 1].sum() == side**dims - (side - 2) ** dims
    assert edge[mask == 0].sum() == (side + 2) ** dims - side**dims


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("value", [0, 1])
def test_empty_and_full_masks_have_no_edge_unless_the_border_is_one(value, dims):
    mask = torch.full((1, 1, *(6,) * dims), value)
    assert not edge_truth(mask).any()
    assert edge_truth(mask, border_is_edge=True).sum() == value * (6**dims - 4**dims)


def test_a_middle_class_between_two_others_is_an_edge_although_their_mean_is_its_own():
    label = torch.tensor([0, 1, 2]).expand(1, 1, 3, 3)
    assert (F.avg_pool2d(label.float(), 3, 1) == 1).all()
    assert edge_truth(label).all()


def test_the_width_is_set_per_axis():
    mask = torch.zeros(1, 1, 7, 11, 11)
    mask[:, :, 2:5, 4:7, 4:7] = 1
    edge = edge_truth(mask, edge_width=(0, 2, 1))
    planes = edge[0, 0].any(-1).any(-1)
    assert planes.tolist() == [False, False, True, True, True, False, False]
    assert edge[0, 0, 3].any(-1).tolist() == [False] * 2 + [True] * 7 + [False] * 2
    assert edge[0, 0, 3].any(-2).tolist() == [False] * 3 + [True] * 5 + [False] * 3
    assert not edge_truth(mask, edge_width=0).any()


@pytest.mark.parametrize("width", [-1, (1, 1), (1, -1, 1)])
def test_a_width_that_cannot_be_is_refused(width):
    with pytest.raises(RequestError, match="edge_width="):
        edge_truth(torch.zeros(1, 1, 4, 4, 4), edge_width=width)


def test_each_channel_has_its_own_edges():
    masks = torch.zeros(1, 2, 8, 8)
    masks[:, 1, 3:5, 3:5] = 1
    edge = edge_truth(masks)
    assert not edge[:, 0].any()
    assert torch.equal(edge[:, 1:], edge_truth(masks[:, 1:]))


# Values


def test_official_losses_are_reproduced(reference):
    label, output = reference["in/label"][:, None], output_of(reference)
    totals = {
        "total": BoundaryMultiTaskLoss("official"),
        "total_with_seg_edge": BoundaryMultiTaskLoss("official", seg_edge_loss=True),
    }
    for name, loss in totals.items():
        torch.testing.assert_close(loss(output, label), reference[f"out/{name}"], atol=1e-5, rtol=0)


def test_official_terms_are_reproduced_one_by_one(reference):
    label, output = reference["in/label"][:, None], output_of(reference)
    zero = Constant(0.0)

    def term(**options: Any) -> Tensor:
        return BoundaryMultiTaskLoss("official", **options)(output, label)

    expected = reference["out/ce"] + reference["out/dice"]
    torch.testing.assert_close(term(weights=0.0), expected, atol=1e-5, rtol=0)
    for i in range(4):
        weights = [float(i == j) for j in range(4)]
        seg = term(weights=weights, main_loss=zero, edge_loss=zero)
        torch.testing.assert_close(seg, reference[f"out/seg{i + 1}"], atol=1e-5, rtol=0)
        edge = term(weights=weights, main_loss=zero, seg_loss=zero)
        torch.testing.assert_close(edge, reference[f"out/edge{i + 1}"], atol=1e-5, rtol=0)


def test_the_official_dice_is_below_zero_when_perfect_and_minus_one_when_empty():
    label = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    loss = BoundaryMultiTaskLoss("official", weights=0)

    def of(label: Tensor) -> float:
        logits = 100.0 * torch.cat([1 - 2 * label, 2 * label - 1], dim=1)
        return float(loss({"logits": logits, "aux": [logits], "edges": [logits]}, label))

    assert of(label) == pytest.approx(-1)
    label[..., 2:4, 2:4] = 1
    assert of(label) == pytest.approx(1 - 2 * 5 / 9)


@pytest.mark.parametrize(("channels", "edge_channels"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_paper_loss_is_binary_cross_entropy_over_classes_and_their_edges(dims, channels, edge_channels):
    output, label = random_output(channels, edge_channels, (8, 9, 7)[:dims])
    one_hot = torch.cat([label == c for c in range(channels)], dim=1).float() if channels > 1 else label.float()
    masks = {1: label, channels: one_hot, channels - 1: one_hot[:, 1:]}[edge_channels]
    edges = edge_truth(label if edge_channels == 1 else masks).float()
    bce = F.binary_cross_entropy_with_logits
    expected = bce(output["logits"], one_hot)
    for seg, edge in zip(output["aux"], output["edges"], strict=True):
        expected = expected + bce(seg, one_hot) + bce(edge, edges)
    torch.testing.assert_close(BoundaryMultiTaskLoss()(output, label), expected)


def test_one_channel_takes_all_classes_for_foreground():
    output, label = random_output(1, 1, (8, 8))
    loss = BoundaryMultiTaskLoss()
    many = label * torch.randint(1, 4, label.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(loss(output, many), loss(output, label))


def test_edges_reach_the_border_in_the_official_preset_only():
    label = torch.ones(1, 1, 6, 6, dtype=torch.long)
    maps = torch.zeros(1, 2, 6, 6)
    for preset, options, expected in (
        ("official", {}, 20),
        ("official", {"border_is_edge": False}, 0),
        ("paper", {}, 0),
        ("paper", {"border_is_edge": True}, 20),
    ):
        edge = Constant(0.0)
        BoundaryMultiTaskLoss(preset, edge_loss=edge, **options)(
            {"logits": maps, "aux": [maps], "edges": [maps]}, label
        )
        assert edge.seen[0][1].sum() == expected, (preset, options)


def test_stages_are_weighted_and_losses_can_be_replaced():
    output, label = random_output(2, 2, (6, 6), stages=3)
    main, seg, edge = Constant(1.0), Constant(10.0), Constant(100.0)
    losses = {"main_loss": main, "seg_loss": seg, "edge_loss": edge}
    assert BoundaryMultiTaskLoss(**losses)(output, label) == 1 + 3 * 110
    assert BoundaryMultiTaskLoss(weights=0.5, **losses)(output, label) == 1 + 3 * 55
    assert BoundaryMultiTaskLoss(weights=[1, 0, 3], **losses)(output, label) == 1 + 4 * 110
    assert torch.equal(main.seen[0][1], label)
    assert all(torch.equal(prediction, output["aux"][i % 3]) for i, (prediction, _) in enumerate(seg.seen))


def test_class_weights_are_those_of_the_cross_entropies():
    output, label = random_output(3, 2, (8, 8), stages=1)
    loss = BoundaryMultiTaskLoss(
        "official", main_loss=Constant(0.0), class_weights=[1, 2, 5], edge_class_weights=[1, 9]
    )
    edge = edge_truth(label, border_is_edge=True)[:, 0].long()
    expected = F.cross_entropy(output["aux"][0], label[:, 0], torch.tensor([1.0, 2, 5])) + F.cross_entropy(
        output["edges"][0], edge, torch.tensor([1.0, 9])
    )
    torch.testing.assert_close(loss(output, label), expected)
    assert [name for name, _ in loss.named_buffers()] == ["stage_loss.losses.0.weight", "stage_loss.losses.1.weight"]


def test_half_precision_is_widened_and_metadata_is_dropped():
    output, label = random_output(2, 2, (8, 8))
    half = {
        "logits": output["logits"].bfloat16(),
        **{kind: [m.bfloat16() for m in output[kind]] for kind in ("aux", "edges")},
    }
    found = BoundaryMultiTaskLoss()(half, MetaTensor(label))
    assert found.dtype == torch.float32
    assert type(found) is Tensor
    torch.testing.assert_close(found, BoundaryMultiTaskLoss()(output, label), atol=1e-2, rtol=1e-2)


def test_the_term_on_the_edges_of_the_segmentation_works_in_3d_and_per_axis():
    output, label = random_output(2, 2, (6, 7, 8), stages=1)
    zero, edge = Constant(0.0), Constant(1.0)
    loss = BoundaryMultiTaskLoss(
        "official", main_loss=zero, seg_loss=zero, edge_loss=edge, seg_edge_loss=True, edge_width=(0, 1, 1)
    )
    assert loss(output, label) == 2
    seg = output["aux"][0]
    expected = (seg - F.avg_pool3d(seg, (1, 3, 3), 1, (0, 1, 1))).abs()
    torch.testing.assert_close(edge.seen[1][0], expected)
    assert torch.equal(edge.seen[0][1], edge.seen[1][1])


def test_a_sum_of_tasks_takes_any_number_of_them():
    losses = [Constant(1.0), Constant(2.0), Constant(4.0)]
    maps = [torch.zeros(1)] * 3
    assert SumOfTasksLoss(losses)(maps, maps) == 7
    assert SumOfTasksLoss(losses, [1, 0.5, 0.25])(maps, maps) == 3
    with pytest.raises(RequestError, match="3 losses and 2 weights"):
        SumOfTasksLoss(losses, [1, 2])
    with pytest.raises(RequestError, match="0 losses"):
        SumOfTasksLoss([])
    with pytest.raises(RequestError, match="2 predictions and 3 targets: expected one of each for 3 tasks"):
        SumOfTasksLoss(losses)(maps[:2], maps)


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "code"}, "preset='code'"),
        ({"class_weights": [1, 2]}, 'preset="official"'),
        ({"edge_class_weights": [1, 2]}, 'preset="official"'),
        ({"seg_edge_loss": True}, 'preset="official"'),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        BoundaryMultiTaskLoss(**options)


@pytest.mark.parametrize(
    ("options", "channels", "edge_channels", "message"),
    [
        ({"preset": "official"}, 2, 1, 'edge maps have 1 channel.*expected 2 for 2 classes.*"official"'),
        ({}, 2, 3, 'edge maps have 3 channel.*expected 1 or 2 for 2 classes.*"paper"'),
        ({"weights": [1.0]}, 2, 2, r"weights=\[1.0\].*2 for 2 stages"),
        ({"preset": "official", "seg_edge_loss": True}, 3, 2, "two classes"),
        ({"edge_width": (1, 1, 1)}, 2, 2, "edge_width"),
    ],
)
def test_outputs_that_do_not_fit_the_preset_are_refused(options, channels, edge_channels, message):
    output, label = random_output(channels, edge_channels, (6, 6))
    with pytest.raises(RequestError, match=message):
        BoundaryMultiTaskLoss(**options)(output, label)


@pytest.mark.parametrize("missing", ["aux", "edges"])
def test_an_output_without_maps_of_the_stages_is_refused(missing):
    output, label = random_output(2, 2, (6, 6))
    del output[missing]
    with pytest.raises(RequestError, match=r"use_mtl=True\), or TrainingLoss"):
        BoundaryMultiTaskLoss()(output, label)


@pytest.mark.parametrize("shape", [(2, 6, 6), (2, 1, 6, 5), (2, 2, 6, 6)])
def test_a_label_of_another_shape_is_refused(shape):
    output, _ = random_output(2, 2, (6, 6))
    with pytest.raises(SizeError, match=r"expected class indices \(2, 1, 6, 6\)"):
        BoundaryMultiTaskLoss()(output, torch.zeros(shape, dtype=torch.long))


# With the network


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "preset", "side"), [(2, "paper", 48), (3, "official", 24)])
def test_banet_learns_a_noisy_ellipse_and_its_edge(dims, preset, side):
    torch.manual_seed(0)
    narrow = {"blocks": (1, 1, 1, 1), "base_width": 8, "reduce_dim": 16, "aspp_dim": 16, "aspp_rates": (1, 2)}
    network = BANet(dims, 1, 2, variant=preset, **narrow).train()
    axes = torch.meshgrid(*[torch.linspace(-1, 1, side)] * dims, indexing="ij")
    radii = (0.7, 0.55, 0.6)
    label = (sum((a / r) ** 2 for a, r in zip(axes, radii, strict=False)) < 1).long().expand(2, 1, *(side,) * dims)
    image = label + 0.5 * torch.randn(label.shape)
    loss, optimizer = BoundaryMultiTaskLoss(preset), torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss(network.forward_train(image), label).backward()
        optimizer.step()
    with torch.no_grad():
        output = network.forward_train(image)
    found = {"logits": output["logits"].argmax(1), "edge": output["edges"][0].argmax(1)}
    if preset == "paper":  # both channels are edges there, of the background and of the ellipse
        found["edge"] = output["edges"][0][:, 1] > 0
    truth = {"logits": label[:, 0], "edge": edge_truth(label)[:, 0]}
    dice = {n: float(2 * (found[n] * t).sum() / (found[n].sum() + t.sum())) for n, t in truth.items()}
    assert dice["logits"] > {2: 0.96, 3: 0.9}[dims]
    assert dice["edge"] > 0.6
