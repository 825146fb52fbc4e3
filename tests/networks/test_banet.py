"""What is particular to BA-Net: its modules, counts, switches and sizes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from medseg.errors import RequestError, SizeError
from medseg.losses.boundary import BoundaryMultiTaskLoss
from medseg.networks import BANet
from medseg.networks.banet_modules import (
    BoxMean,
    CrossFeatureFusion,
    InteractiveAttention,
    MiniMultiTask,
    PyramidEdgeExtraction,
)
from medseg.networks.resnet import ASPP

SMALL: dict[str, Any] = {
    "blocks": (1, 1, 1, 1),
    "base_width": 4,
    "reduce_dim": 6,
    "aspp_dim": 8,
    "aspp_rates": (1, 2),
}


def small(dims: int = 2, **options: Any) -> BANet:
    torch.manual_seed(0)
    return BANet(dims, options.pop("in_channels", 1), 2, **{**SMALL, **options})


def count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def counted(*arguments: Any, **options: Any) -> int:
    with torch.device("meta"):
        return count(BANet(*arguments, **options))


# Parameters


@pytest.mark.parametrize(
    ("arguments", "official", "paper"),
    [
        ((2, 3, 2), 42_773_074, 40_271_442),
        ((2, 1, 2), 42_773_074 - 6_272, 40_271_442 - 6_272),
        ((2, 3, 2, "resnet101"), 61_765_202, 59_263_570),
        ((3, 1, 2), 98_848_850, 91_610_194),
        ((3, 1, 2, "resnet101"), 137_894_994, 130_656_338),
    ],
)
def test_published_forms_have_their_measured_parameter_counts(arguments, official, paper):
    for variant, expected in (("official", official), ("paper", paper)):
        assert counted(*arguments, variant=variant, aspp_pool_norm="batch") == expected


@pytest.mark.parametrize(
    ("backbone", "in_checkpoint"), [("resnet50", 44_857_658), ("resnet101", 63_849_786), ("resnet152", 79_493_434)]
)
def test_with_the_dead_weights_the_count_is_that_of_the_authors_checkpoints(backbone, in_checkpoint):
    classifier, decoder_block = 2_049_000, 35_584
    assert counted(2, 3, 2, backbone, variant="official") + classifier + decoder_block == in_checkpoint


def test_without_aspp_the_count_is_the_measured_one():
    assert counted(2, 3, 2, variant="official", use_aspp=False) + 2_049_000 + 35_584 == 29_269_178


@pytest.mark.parametrize(
    ("options", "in_3d", "in_2d"),
    [
        ({"base_width": 16, "reduce_dim": 32, "aspp_dim": 64}, (6_223_394, 5_765_410), (2_695_298, 2_536_834)),
        (
            {"blocks": (1, 1, 1, 1), "base_width": 8, "reduce_dim": 16, "aspp_dim": 16},
            (724_746, 608_394),
            (312_282, 271_962),
        ),
        ({"base_width": 32, "reduce_dim": 64, "aspp_dim": 128}, (24_772_658, 22_955_570), None),
    ],
    ids=["base16", "base8", "base32"],
)
def test_narrow_presets_have_their_measured_parameter_counts(options, in_3d, in_2d):
    for dims, expected in ((3, in_3d), (2, in_2d)):
        found = tuple(counted(dims, 1, 2, variant=v, aspp_pool_norm="batch", **options) for v in ("official", "paper"))
        assert expected in (None, found)


def test_the_parts_have_their_measured_parameter_counts():
    with torch.device("meta"):
        network = BANet(2, 3, 2, variant="official")
        deep = [BANet(2, 3, 2, f"resnet{depth}").backbone for depth in (101, 152)]
    assert [count(b) for b in (network.backbone, *deep)] == [23_508_032, 42_500_160, 58_143_808]
    assert count(network.aspp) == 15_535_104
    assert [count(stage) for stage in network.stages] == [175_492, 208_260, 273_796, 404_868]
    assert [count(fusion) for fusion in network.fusions] == [589_824] * 4
    assert [count(block) for block in network.decoder] == [35_584] * 3
    assert count(network.mix) == 53_376
    assert [count(network.head[:2]), count(network.head[3])] == [147_840, 258]


def test_the_bias_of_the_pooled_branch_in_3d_stands_for_a_norm():
    assert counted(3, 1, 2, aspp_pool_norm="batch") - counted(3, 1, 2) == 2 * 256 - 256


# Identities of the modules


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_interactive_attention_leaves_a_feature_alone_if_the_other_is_zero(dims, learned):
    torch.manual_seed(0)
    exchange = InteractiveAttention(dims, 4, learned=learned)
    feature = torch.randn(2, 4, *(6, 5, 4)[:dims])
    zero = torch.zeros_like(feature)
    assert torch.equal(exchange(feature, zero)[0], feature)
    assert torch.equal(exchange(zero, feature)[1], feature)
    assert exchange(feature, zero)[1].any()


def test_interactive_attention_treats_both_tasks_alike_and_uses_features_from_before_the_exchange():
    edge, seg = torch.randn(2, 1, 3, 4, 4).double()
    exchange = InteractiveAttention(2, 3)
    found_edge, found_seg = exchange(edge, seg)
    torch.testing.assert_close(found_edge, edge + seg / (1 + edge.exp()))
    torch.testing.assert_close(found_seg, seg + edge / (1 + seg.exp()))
    assert count(exchange) == 0


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_cross_feature_fusion_returns_its_own_stage_if_the_others_are_zero(dims, learned):
    torch.manual_seed(0)
    fusion = CrossFeatureFusion(dims, 3, learned_gates=learned)
    own = torch.randn(1, 3, *(6, 8, 4)[:dims])
    others = [torch.zeros(1, 3, *size[:dims]) for size in ((3, 4, 2), (6, 8, 4), (5, 3, 7))]
    assert torch.equal(fusion(own, others), own)
    assert not torch.equal(fusion(own, [o + 1 for o in others]), own)


def test_cross_feature_fusion_without_learned_gates_has_no_parameter():
    assert count(CrossFeatureFusion(3, 8)) == 0


@pytest.mark.parametrize("dims", [2, 3])
def test_pee_sees_no_edge_in_a_constant_map_away_from_its_rim(dims):
    torch.manual_seed(0)
    squeeze = PyramidEdgeExtraction(dims, 3, 4, (3, 5))
    seen = []
    squeeze.fuse.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    squeeze(torch.ones(1, 3, *(9, 8, 10)[:dims]))
    edges = seen[0][:, 4:]
    inside = (slice(None), slice(None), *[slice(2, -2)] * dims)
    torch.testing.assert_close(edges[inside], torch.zeros_like(edges[inside]), atol=1e-6, rtol=0)
    assert edges.abs().max() > 0.1  # zeros outside count in the mean, so the rim itself is an edge


@pytest.mark.parametrize(("dims", "box"), [(2, (5, 5)), (2, (1, 7)), (3, (7, 7, 7)), (3, (1, 3, 5)), (3, (1, 1, 1))])
def test_the_box_mean_is_that_of_torch_where_torch_has_one(dims, box):
    x = torch.randn(2, 3, *(9, 8, 10)[:dims])
    pool = (nn.functional.avg_pool2d, nn.functional.avg_pool3d)[dims - 2]
    expected = pool(x, box, stride=1, padding=tuple(b // 2 for b in box))
    torch.testing.assert_close(BoxMean(dims, box)(x), expected)


def test_the_box_mean_works_on_maps_smaller_than_the_box():
    """The first trap of 3D: torch's pooling refuses them even with padding."""
    x = torch.randn(1, 2, 3, 2, 4)
    with pytest.raises(RuntimeError, match="smaller than kernel"):
        nn.functional.avg_pool3d(x, 9, stride=1, padding=3)
    found = BoxMean(3, (9, 9, 9))(x)
    torch.testing.assert_close(found, (x.sum((2, 3, 4), keepdim=True) / 9**3).expand_as(x))


# Switches and options


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("dims", [2, 3])
def test_switches_remove_their_module_and_exactly_its_parameters(dims, variant):
    k = SMALL["reduce_dim"]
    whole = small(dims, variant=variant)
    separable = k * 3**dims + 2 * k + k * k
    gates = separable * 2 if variant == "official" else 0
    heads = 2 * (k * 2 * 3**dims + 2)
    removed = {
        "use_pee": 4 * (3 * k * k + separable),
        "use_mtl": 4 * (2 * separable + gates + heads),
        "use_ia": 4 * gates,
        "use_cff": 4 * 4 * k * k * 3**dims if variant == "official" else 0,
        "use_aspp": count(whole.aspp) + count(whole.mix),
    }
    modules = {
        "use_pee": PyramidEdgeExtraction,
        "use_mtl": MiniMultiTask,
        "use_ia": InteractiveAttention,
        "use_cff": CrossFeatureFusion,
        "use_aspp": ASPP,
    }
    image = torch.randn(2, 1, *(32, 24, 24)[:dims])
    for switch, fewer in removed.items():
        network = small(dims, variant=variant, **{switch: False})
        assert count(whole) - count(network) == fewer, switch
        assert any(isinstance(m, modules[switch]) for m in whole.modules())
        assert not any(isinstance(m, modules[switch]) for m in network.modules())
        output = network.forward_train(image)
        assert output["logits"].shape[2:] == image.shape[2:]
        assert ("aux" in output) == ("edges" in output) == (switch != "use_mtl")


def test_everything_can_be_switched_off_together():
    switches = {f"use_{module}": False for module in ("pee", "mtl", "ia", "cff", "aspp")}
    network = small(**switches)
    network(torch.randn(2, 1, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_without_aspp_the_decoder_starts_from_the_deepest_fused_stage():
    network = small(aspp_rates=None)
    assert network.aspp is None
    assert network.mix is None
    features = network.forward_train(torch.randn(2, 1, 32, 32))["features"]
    assert list(features) == ["E1", "E2", "E3", "E4", "B", "D4", "D3", "D2", "D1"]


@pytest.mark.parametrize("merge", ["seg", "sum", "concat"])
def test_mini_mtl_hands_on_what_merge_says(merge):
    torch.manual_seed(0)
    tasks = MiniMultiTask(2, 4, 2, 1, merge=merge)
    merged, edge, seg = tasks(torch.randn(2, 4, 6, 6))
    expected = {"seg": lambda: seg, "sum": lambda: edge + seg, "concat": lambda: tasks.join(torch.cat([edge, seg], 1))}
    assert torch.equal(merged, expected[merge]())
    assert count(tasks.join) == (2 * 4 * 4 if merge == "concat" else 0)
    assert not torch.equal(edge, seg)


def test_variants_merge_as_their_sources_do():
    assert [stage.tasks.merge for stage in small().stages] == ["sum"] * 4
    assert [stage.tasks.merge for stage in small(variant="official").stages] == ["seg"] * 4
    assert small(variant="official", merge="concat").stages[1].tasks.merge == "concat"


def test_dense_branches_are_convolution_norm_and_activation():
    tasks = small(conv_type="dense").stages[0].tasks
    assert [type(layer).__name__ for layer in tasks.edge_branch] == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert tasks.seg_branch[0].weight.shape == (6, 6, 3, 3)


@pytest.mark.parametrize("dims", [2, 3])
def test_stage_maps_have_the_size_of_the_image_and_their_own_channels(dims):
    size = (33, 26, 19)[:dims]
    output = small(dims, edge_channels=1).forward_train(torch.randn(2, 1, *size))
    assert [tuple(m.shape) for m in output["aux"]] == [(2, 2, *size)] * 4
    assert [tuple(m.shape) for m in output["edges"]] == [(2, 1, *size)] * 4


def test_taps_are_the_stages_the_context_and_the_decoder():
    network = small(use_cff=False).eval()
    features = network.forward_train(torch.randn(1, 1, 64, 48))["features"]
    assert {n: tuple(f.shape[1:]) for n, f in features.items()} == {
        "E1": (16, 16, 12),
        "E2": (32, 8, 6),
        "E3": (64, 8, 6),
        "E4": (128, 8, 6),
        "B": (8, 8, 6),
        "D4": (6, 8, 6),
        "D3": (6, 8, 6),
        "D2": (6, 8, 6),
        "D1": (6, 16, 12),
    }
    torch.testing.assert_close(features["B"], network.aspp(features["E4"]))


@pytest.mark.parametrize("norm", ["instance", ("group", {"num_groups": 2})])
@pytest.mark.parametrize("dims", [2, 3])
def test_other_norms_run_and_learn(dims, norm):
    network = small(dims, norm=norm, act="prelu")
    network(torch.randn(1, 1, *(32, 24, 24)[:dims])).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "code"}, "variant='code'.*'paper', 'official'"),
        ({"backbone": "resnet18"}, "'resnet50', 'resnet101', 'resnet152'"),
        ({"merge": "mean"}, "'seg', 'sum', 'concat'"),
        ({"conv_type": "plain"}, "'separable', 'dense'"),
        ({"aspp_rates": "wide"}, "aspp_rates='wide'.*'auto'"),
        ({"aspp_rates": (1, 0)}, "invalid value 0 in aspp_rates"),
        ({"aspp_rates": ((1, 2, 3),)}, "2 of them"),
        ({"aspp_pool_norm": "INSTANCE"}, "one voxel"),
        ({"edge_pool_sizes": ((3, 5),)}, "each of the 4 stages"),
        ({"edge_pool_sizes": ((3, 5), (3, 4), (3, 5), (3, 5))}, "odd sizes"),
        ({"edge_pool_sizes": ((3, (1, 3, 3)),) * 4}, "2 of them"),
        ({"spatial_dims": 4}, "spatial_dims=4; expected 2 or 3"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        BANet(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 2, **SMALL, **options})


# Sizes


@pytest.mark.parametrize("size", [(70, 54), (17, 16), (16, 45), (33, 16, 19), (24, 40, 17)])
def test_odd_and_lopsided_sizes_keep_their_size(size):
    output = small(len(size)).eval().forward_train(torch.randn(1, 1, *size))
    assert all(m.shape[2:] == size for m in (output["logits"], *output["aux"], *output["edges"]))


def test_an_image_below_two_deepest_voxels_is_refused_with_the_nearest_size():
    network = small()
    with pytest.raises(
        SizeError, match=r"downsamples by 8x8.*at least 16x16 voxels, found 15x40\. The nearest .* is 16x40"
    ):
        network(torch.zeros(1, 1, 15, 40))
    assert network.eval()(torch.zeros(1, 1, 16, 40)).shape[2:] == (16, 40)


def test_strides_and_boxes_per_axis_keep_thick_slices():
    network = small(
        3,
        strides=((1, 2, 2), (1, 2, 2), 1, (1, 2, 2), 1, 1),
        edge_pool_sizes=((3, (1, 5, 5)),) * 4,
        aspp_rates=((1, 2, 2),),
    )
    assert network.step == (1, 8, 8)
    features = network.forward_train(torch.randn(2, 1, 3, 33, 20))["features"]
    assert tuple(features["E1"].shape[2:]) == (3, 9, 5)
    assert tuple(features["E4"].shape[2:]) == (3, 5, 3)
    assert network(torch.randn(1, 1, 2, 16, 16)).shape[2:] == (2, 16, 16)
    with pytest.raises(SizeError, match=r"at least 2x16x16 voxels, found 1x32x32"):
        network(torch.randn(1, 1, 1, 32, 32))


@pytest.mark.parametrize(
    ("strides", "deciding", "deepest"),
    [
        ((2, 2, 1, 1, 1, 1), 4, 4),
        ((2, 2, 2, 2, 1, 1), 8, 16),
        ((1, 2, 1, 2, 1, 1), 2, 4),
        ((2, 1, 1, 2, 1, 1), 2, 4),
        ((2, 2, 1, 2, 2, 2), 4, 32),
    ],
    ids=["output-stride-4", "output-stride-16", "stem-stride-1", "no-stem-pool", "not-dilated"],
)
def test_strides_set_how_fine_the_maps_are(strides, deciding, deepest):
    features = small(strides=strides).eval().forward_train(torch.randn(1, 1, 64, 64))["features"]
    assert features["D1"].shape[2:] == (64 // deciding,) * 2
    assert features["E4"].shape[2:] == (64 // deepest,) * 2


# The traps of three dimensions


def test_3d_runs_at_32_voxels_per_axis_with_the_boxes_of_7():
    """The deepest map is then 4 voxels wide, stage 1 has 8."""
    network = small(3, edge_pool_sizes=((5, 7),) * 4).train()
    network(torch.randn(1, 1, 32, 32, 32)).sum().backward()


def test_3d_trains_with_a_batch_of_one():
    network = small(3).train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.aspp.pool)
    assert network.aspp.pool[0].bias is not None
    network(torch.randn(1, 1, 16, 16, 16)).sum().backward()


@pytest.mark.parametrize(("dims", "options"), [(2, {}), (3, {"aspp_pool_norm": "batch"})])
def test_a_batch_norm_over_one_pooled_voxel_is_refused_before_torch_does(dims, options):
    network = small(dims, **options).train()
    image = torch.randn(1, 1, *(32,) * dims)
    with pytest.raises(SizeError, match=r"batch size of at least 2.*aspp_pool_norm=None"):
        network(image)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network.aspp(torch.randn(1, 128, *(4,) * dims))
    network(torch.cat([image, image]))
    network.eval()(image)
    small(dims, aspp_pool_norm=None).train()(image)


def test_2d_batch_norm_in_the_pooled_branch_follows_the_norm():
    assert [type(m).__name__ for m in small().aspp.pool] == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert [type(m).__name__ for m in small(norm="instance").aspp.pool] == ["Conv2d", "ReLU"]


def test_default_rates_are_smaller_in_3d():
    with torch.device("meta"):
        rates = [BANet(dims, 1, 2).aspp.rates for dims in (2, 3)]
    assert rates == [((6, 6), (12, 12), (18, 18)), ((1, 1, 1), (2, 2, 2), (3, 3, 3))]


def test_rates_as_large_as_the_map_are_warned_of_once(caplog, assert_warns):
    network = small(aspp_rates=(2, 4, 8)).eval()
    network(torch.zeros(1, 1, 128, 128))
    assert not caplog.records
    for _ in range(2):
        network(torch.zeros(1, 1, 32, 128))
    assert len(caplog.records) == 1
    assert "32x128" in caplog.text
    assert "deepest feature map of 4x16" in caplog.text
    assert "ASPP rates 4x4, 8x8 exceed" in caplog.text
    wide = functools.partial(torch.zeros, 1, 1, 32, 128)
    assert_warns(lambda: small(aspp_rates=(2, 4, 8)).eval()(wide()), "context-exceeds-image", run=True)


def test_a_rate_as_large_as_the_map_acts_like_its_center():
    torch.manual_seed(0)
    branch = ASPP(3, 2, 3, (4,)).eval().branches[1]
    x = torch.randn(1, 2, 4, 4, 4)
    center = nn.functional.conv3d(x, branch[0].weight[:, :, 1:2, 1:2, 1:2])
    torch.testing.assert_close(branch[0](x), center)


# The other two pairs of dimensions and variant: tests/losses/test_boundary.py, with the edge.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "size", "required", "variant"), [(2, (64, 64), 0.96, "official"), (3, (32, 32, 32), 0.90, "paper")]
)
def test_one_noisy_ellipse_is_learned_as_well_as_the_specification_measured(dims, size, required, variant):
    torch.manual_seed(0)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    inside = sum((axis / radius) ** 2 for axis, radius in zip(axes, (0.7, 0.55, 0.6), strict=False)) < 1
    label = inside.long().expand(2, 1, *size)
    image = (inside + 0.5 * torch.randn(1, 1, *size)).expand(2, 1, *size)
    network = BANet(
        dims, 1, 2, blocks=(1, 1, 1, 1), base_width=8, reduce_dim=16, aspp_dim=16, aspp_rates=(1, 2, 3), variant=variant
    )
    loss = BoundaryMultiTaskLoss(variant)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss(network.forward_train(image), label).backward()
        optimizer.step()
    found = network(image).argmax(1, keepdim=True)
    assert 2 * (found * label).sum() / (found.sum() + label.sum()) > required
