"""What is particular to UCTransNet: its counts, attention over channels, sizes, skips and switches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medseg.errors import RequestError, SizeError
from medseg.networks import UCTransNet
from medseg.networks.cct import CCT
from medseg.networks.uctransnet import CCA

BASE = {"use_cct": False, "use_cca": False}
THICK = {"patch_size": (8, 16, 16), "strides": ((1, 2, 2), 2, 2, 2)}
SUBSETS = [levels for n in range(5) for levels in itertools.combinations((1, 2, 3, 4), n)]


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def small(dims: int = 2, **options) -> UCTransNet:
    torch.manual_seed(0)
    form = {"features": (4, 6, 8), "img_size": (16, 24, 8)[:dims], "patch_size": 4, "num_heads": 2, "num_layers": 2}
    return UCTransNet(dims, 1, 2, **{**form, **options})


def image(*size: int, batch: int = 1, channels: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def random_positions(network: UCTransNet) -> None:
    """Give the positional tables values; they start from zero."""
    for embedding in network.cct.embeddings:
        nn.init.normal_(embedding.position_embeddings)


def widths(base: int) -> tuple[int, ...]:
    return tuple(base * n for n in (1, 2, 4, 8, 8))


@pytest.mark.parametrize(
    ("channels", "classes", "options", "count"),
    [
        (3, 1, {}, 66_430_657),
        (3, 2, {}, 66_430_722),
        (3, 9, {}, 66_431_177),
        (1, 1, {}, 66_429_505),
        (1, 9, {}, 66_430_025),
        (3, 1, {"img_size": 512}, 67_225_537),
        (3, 1, {"features": widths(16)}, 4_199_089),
        (3, 1, {**BASE, "upsample": "deconv"}, 14_751_873),
        (3, 9, {**BASE, "upsample": "deconv"}, 14_752_393),
    ],
)
def test_published_forms_have_their_measured_parameter_counts(channels, classes, options, count):
    with torch.device("meta"):
        assert parameters(UCTransNet(2, channels, classes, **options)) == count


@pytest.mark.parametrize(
    ("base", "options", "count", "in_cct"),
    [
        (64, {"img_size": 96}, 120_402_369, 79_656_320),
        (32, {"img_size": 96}, 30_168_289, 19_977_920),
        (32, {"img_size": 96, "patch_size": 8}, 24_012_769, 13_822_400),
        (32, {"img_size": 128}, 30_310_369, 20_120_000),
        (32, {"img_size": (32, 192, 192), **THICK}, 28_243_937, 18_053_568),
        (16, {"img_size": 96}, 7_575_921, 5_026_400),
        (16, {"img_size": 96, "patch_size": 8}, 6_218_481, 3_668_960),
        (16, {"img_size": 64, "patch_size": 8}, 5_926_641, 3_377_120),
        (8, {"img_size": 32, "patch_size": 8, "num_heads": 2, "num_layers": 1}, 832_385, 194_040),
    ],
)
def test_volume_forms_have_their_measured_parameter_counts(base, options, count, in_cct):
    with torch.device("meta"):
        network = UCTransNet(3, 1, 1, widths(base), **options)
    assert (parameters(network), parameters(network.cct)) == (count, in_cct)


def test_every_part_of_the_paper_network_has_its_measured_size():
    with torch.device("meta"):
        network = UCTransNet(2, 3, 1)
    cct = network.cct
    assert [parameters(level) for level in network.encoder] == [1_920, 221_952, 886_272, 3_542_016, 4_721_664]
    assert [parameters(part) for part in cct.embeddings] == [1_061_184, 1_073_792, 1_099_008, 1_149_440]
    assert sum(map(parameters, [*cct.layers, *cct.norms])) == 47_639_680
    assert {parameters(layer.attention) for layer in cct.layers} == {9_113_600}
    assert [parameters(part) for part in cct.reconstructions] == [4_288, 16_768, 66_304, 263_680]
    assert [parameters(level) for level in network.decoder] == [3_475_968, 869_632, 217_728, 119_296]
    assert sum(parameters(level.cca) for level in network.decoder) == 698_240
    assert parameters(network.head) == 65
    assert sum(buffer.numel() for buffer in network.buffers()) == 9_749


@pytest.mark.parametrize(
    ("use_cct", "use_cca", "count"),
    [(False, False, 13_358_273), (False, True, 14_056_513), (True, False, 65_732_417), (True, True, 66_430_657)],
    ids=["base", "base+cca", "base+cct", "all"],
)
def test_ablations_of_the_paper_have_their_measured_parameter_counts(use_cct, use_cca, count):
    with torch.device("meta"):
        assert parameters(UCTransNet(2, 3, 1, use_cct=use_cct, use_cca=use_cca)) == count


@pytest.mark.parametrize(
    ("skip_levels", "saved"),
    [((2, 3, 4), 36_864), ((1, 3, 4), 73_728), ((1, 2, 4), 294_912), ((1, 2, 3), 1_179_648), ("none", 1_585_152)],
)
def test_a_removed_skip_saves_its_share_of_the_decoder_convolution(skip_levels, saved):
    with torch.device("meta"):
        assert parameters(UCTransNet(2, 3, 1, skip_levels=skip_levels, **BASE)) == 13_358_273 - saved


@pytest.mark.parametrize(("use_cct", "use_cca"), [(True, True), (True, False), (False, True), (False, False)])
def test_ablations_learn_with_every_parameter(use_cct, use_cca):
    network = small(use_cct=use_cct, use_cca=use_cca)
    network(image(16, 24, batch=2)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    assert (network.cct is not None, network.decoder[0].cca is not None) == (use_cct, use_cca)


def test_a_channel_attention_of_known_tokens_has_its_closed_form():
    """Tokens (1, 0) and (0, 2): scores X^T X are ((1, 0), (0, 4)), of mean 5/4 and variance 43/16."""
    attention = CCT([2], [(1, 1)], (1, 2), num_heads=1, num_layers=1).layers[0].attention.eval()
    for linear in (attention.queries[0], attention.key, attention.value, attention.outputs[0]):
        nn.init.eye_(linear.weight)
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    normalized = torch.tensor([[-0.25, -1.25], [-1.25, 2.75]]) / math.sqrt(43 / 16)
    (a, b), (c, d) = normalized.softmax(dim=1).tolist()
    with torch.no_grad():
        maps, changes = attention.maps([tokens], tokens), attention([tokens], tokens)
    assert maps[0].flatten().tolist() == pytest.approx([a, b, c, d], abs=2e-5)
    assert changes[0].flatten().tolist() == pytest.approx([a, c, 2 * b, 2 * d], abs=4e-5)


def test_attention_equals_the_formula_head_by_head():
    torch.manual_seed(0)
    attention = CCT([3, 5], [(2, 2), (1, 1)], (2, 3), num_heads=2).layers[0].attention.double().eval()
    queries = [torch.randn(2, 7, 3).double(), torch.randn(2, 7, 5).double()]
    context = torch.randn(2, 7, 8).double()
    for i, (found, query, width) in enumerate(zip(attention(queries, context), queries, (3, 5), strict=True)):
        heads = []
        for h in range(2):
            q = query @ attention.queries[i].weight[h * width : (h + 1) * width].T
            k, v = (context @ layer.weight[h * 8 : (h + 1) * 8].T for layer in (attention.key, attention.value))
            scores = F.instance_norm((q.transpose(1, 2) @ k / math.sqrt(8))[:, None], eps=1e-5)[:, 0]
            heads.append((scores.softmax(dim=2) @ v.transpose(1, 2)).transpose(1, 2))
        torch.testing.assert_close(found, torch.stack(heads).mean(0) @ attention.outputs[i].weight.T)


def test_attention_is_over_channels_and_its_size_does_not_grow_with_the_image():
    network = small().eval()
    for size in ((16, 24), (32, 48)):
        layers = network.attention_maps(image(*size))
        assert [{level: m.shape for level, m in layer.items()} for layer in layers] == [
            {1: (1, 4, 10), 2: (1, 6, 10)}
        ] * 2
        for layer in layers:
            for found in layer.values():
                torch.testing.assert_close(found.sum(2), torch.ones(found.shape[:2]))


def turned(x: torch.Tensor) -> torch.Tensor:
    """Exchange the left and the right half of a map."""
    return torch.cat(x.chunk(2, dim=3)[::-1], dim=3)


@pytest.mark.parametrize("pos_embed", ["none", "learned"])
def test_only_the_positional_tables_tell_the_order_of_the_tokens(pos_embed):
    network = small(pos_embed=pos_embed, img_size=(8, 16)).eval()
    if pos_embed == "learned":
        random_positions(network)
    maps = [image(8, 16, channels=4), image(4, 8, channels=6)]
    with torch.no_grad():
        plain, other = network.cct(maps), network.cct([turned(m) for m in maps])
    same = [torch.allclose(turned(a), b, atol=1e-5) for a, b in zip(plain, other, strict=True)]
    assert same == [pos_embed == "none"] * 2


def test_tokens_of_all_levels_cover_the_same_part_of_the_image():
    network = small(3, features=(4, 4, 4, 4, 4), **THICK, img_size=(32, 192, 192))
    assert network.step == (8, 16, 16)
    assert [e.patches.kernel_size for e in network.cct.embeddings] == [(8, 16, 16), (8, 8, 8), (4, 4, 4), (2, 2, 2)]
    assert {e.position_embeddings.shape[1] for e in network.cct.embeddings} == {4 * 12 * 12}


def test_channel_gate_has_its_closed_form():
    gate = CCA(2, 2, 1)
    nn.init.eye_(gate.skip.weight)
    for tensor, value in ((gate.skip.bias, 0.5), (gate.up.weight, 2.0), (gate.up.bias, -0.5)):
        nn.init.constant_(tensor, value)
    skip = torch.tensor([[[[1.0, 3.0]], [[-4.0, 0.0]]]])
    up = torch.tensor([[[[1.0, 2.0]]]])
    # Means 2 and -2 of the skip, 1.5 of the other map: (2 + 0.5 + 3 - 0.5) / 2 and (-2 + 0.5 + 3 - 0.5) / 2.
    first = 1 / (1 + math.exp(-2.5))
    assert gate(skip, up).flatten().tolist() == pytest.approx([first, 3 * first, 0, 0])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_cheaper_reconstruction_equals_the_order_of_the_paper(dims, training):
    torch.manual_seed(0)
    part = small(dims).cct.reconstructions[0].double().train(training)
    nn.init.normal_(part.norm.weight)
    nn.init.normal_(part.norm.bias)
    grid = torch.randn(2, 4, *(3, 4, 2)[:dims], dtype=torch.double, requires_grad=True)
    plain = F.relu(part.norm(part.conv(part.enlarge(grid))))
    found = part(grid)
    assert found.shape[2:] == tuple(4 * n for n in grid.shape[2:])
    torch.testing.assert_close(found, plain)
    weight = torch.randn_like(plain)
    gradients = [torch.autograd.grad((x * weight).sum(), [grid, *part.parameters()]) for x in (found, plain)]
    torch.testing.assert_close(*gradients)


interpolate = F.interpolate


def repeat_only(*args, mode: str, **options) -> torch.Tensor:
    """Stand in for `F.interpolate` where nothing but repetition of voxels is expected."""
    assert mode == "nearest", mode
    return interpolate(*args, mode=mode, **options)


def test_positional_tables_are_used_as_they_are_at_the_native_size(monkeypatch):
    network = small(img_size=(30, 20)).eval()
    random_positions(network)
    monkeypatch.setattr(F, "interpolate", repeat_only)
    with torch.no_grad():
        assert network(image(30, 20)).shape == (1, 2, 30, 20)
        with pytest.raises(AssertionError, match="bilinear"):
            network(image(36, 20))


def test_interpolation_of_a_table_onto_its_own_grid_changes_no_bit():
    """Graphs for any size interpolate always, so that this keeps them equal to the network."""
    for dims, mode in ((2, "bilinear"), (3, "trilinear")):
        table = image(*(7, 5, 3)[:dims], channels=4)
        same = interpolate(table, size=table.shape[2:], mode=mode, align_corners=False)
        torch.testing.assert_close(same, table, atol=0, rtol=0)


@pytest.mark.parametrize("grid", [(4, 6), (2, 3), (1, 1), (9, 2), (2, 3, 8), (1, 5, 3)])
def test_positional_tables_are_spread_linearly_over_other_grids(grid):
    dims = len(grid)
    embedding = small(dims).cct.embeddings[0].eval()
    for tensor in (embedding.patches.weight, embedding.patches.bias):
        nn.init.zeros_(tensor)
    native = (4, 6, 2)[:dims]
    table = torch.stack([axis.flatten() for axis in torch.meshgrid(*map(torch.arange, native), indexing="ij")])
    table = torch.cat([table.float(), torch.ones(4 - dims, table.shape[1])])
    with torch.no_grad():
        embedding.position_embeddings.copy_(table.T[None])
        found = embedding(torch.zeros(1, 4, *(4 * n for n in grid)))[0]
    assert found.shape == (4, *grid)
    for axis, (n, m) in enumerate(zip(native, grid, strict=True)):
        # Centers of m cells over n entries; beyond the first and last entry the table goes on as it ends.
        line = ((torch.arange(m) + 0.5) * n / m - 0.5).clamp(0, n - 1)
        along = line.reshape([m if a == axis else 1 for a in range(dims)]).expand(grid)
        torch.testing.assert_close(found[axis], along)
    if dims < 4:
        torch.testing.assert_close(found[dims:], torch.ones(4 - dims, *grid))


def test_tables_start_from_zero_and_every_layer_from_its_own_draw():
    cct = small().cct
    assert not any(embedding.position_embeddings.any() for embedding in cct.embeddings)
    first, second = (layer.attention.key.weight for layer in cct.layers)
    heads = first.chunk(2)
    assert not torch.equal(first, second)
    assert not torch.equal(*heads)
    assert first.abs().max() <= 1 / math.sqrt(10)
    mlp = cct.layers[0].mlps[0]
    assert mlp[1].weight.abs().max() <= math.sqrt(6 / (4 + 16))
    assert 0 < mlp[1].bias.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("source", "target"), [((16, 24), (32, 48)), ((32, 48), (16, 24)), ((16, 16), (16, 24))], ids=str
)
def test_tables_of_another_native_size_are_interpolated_when_loaded(source, target, assert_warns, caplog):
    trained, network = small(img_size=source), small(img_size=target)
    random_positions(trained)
    state = trained.state_dict()
    network.load_state_dict(state)
    assert "embeddings.0.position_embeddings: position embeddings interpolated" in caplog.text
    assert_warns(lambda: small(img_size=target).load_state_dict(state), "positions-interpolated", run=True)
    grid = [n // 4 for n in source]
    table = state["cct.embeddings.0.position_embeddings"]
    assert table.shape[1] == grid[0] * grid[1]
    spread = interpolate(table.transpose(1, 2).reshape(1, 4, *grid), size=[n // 4 for n in target], mode="bilinear")
    torch.testing.assert_close(network.cct.embeddings[0].position_embeddings, spread.flatten(2).transpose(1, 2))


def test_tables_whose_grid_cannot_be_told_are_refused():
    with pytest.raises(RuntimeError, match=r"position_embeddings.*\[1, 10, 4\]"):
        small(img_size=(16, 24)).load_state_dict(small(img_size=(8, 20)).state_dict())


@pytest.mark.parametrize(
    ("dims", "size", "options"),
    [
        (2, (17, 31), {}),
        (2, (64, 8), {}),
        (2, (9, 200), {"upsample": "deconv"}),
        (2, (5, 6), {"patch_size": 2}),
        (2, (19, 13), BASE),
        (3, (5, 17, 30), {"patch_size": (2, 4, 4), "strides": ((1, 2, 2), 2)}),
        (3, (7, 33, 20), {"patch_size": (1, 4, 8), "strides": ((1, 2, 2), (1, 2, 2))}),
        (3, (12, 9, 5), {"upsample": "deconv", "pos_embed": "none"}),
    ],
)
def test_odd_oblong_and_anisotropic_sizes_come_back_as_they_were(dims, size, options):
    network = small(dims, **options).eval()
    with torch.no_grad():
        output = network.forward_train(image(*size))
    assert output["logits"].shape == (1, 2, *size)
    assert torch.isfinite(output["logits"]).all()


def test_an_image_that_patches_do_not_tile_is_extended_by_its_last_voxels():
    network = small().eval()
    x = image(14, 23)
    extended = F.pad(x, (0, 1, 0, 2), mode="replicate")
    torch.testing.assert_close(network(x), network(extended)[..., :14, :23], atol=0, rtol=0)


def test_patches_and_strides_together_set_the_step():
    assert small(patch_size=6).step == (12, 12)
    assert small(3, patch_size=(2, 4, 8), strides=((1, 2, 2), 2)).step == (2, 4, 8)
    assert small(patch_size=6, use_cct=False).step == (4, 4)


def test_an_image_below_one_patch_is_refused_with_the_nearest_size():
    with pytest.raises(SizeError, match=r"7x30.*nearest valid size is 8x30"):
        small(patch_size=8)(image(7, 30))


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_one_voxel_or_token_under_a_batch_norm_is_refused_in_training(patch):
    network = small(patch_size=patch).train()
    side = max(patch, 4)
    with pytest.raises(SizeError, match=rf"{side}x{side}.*single voxel.*{2 * side}x{side}"):
        network(image(side, side))
    assert network(image(2 * side, side)).shape[2:] == (2 * side, side)
    assert network(image(side, side, batch=2)).shape[2:] == (side, side)
    assert network.eval()(image(side, side)).shape[2:] == (side, side)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("skip_levels", SUBSETS, ids=str)
def test_every_subset_of_skips_runs_and_learns(dims, skip_levels):
    network = small(dims, features=(2, 3, 4, 5, 6), num_layers=1, skip_levels=skip_levels, patch_size=8)
    output = network(image(16, 16, 16)[(...,) + (0,) * (3 - dims)].expand(2, -1, *[-1] * dims))
    output.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    assert network.cct_levels == network.skip_levels == skip_levels
    joins = [level.convs[0].conv.in_channels for level in network.decoder]
    read = (6, 4, 3, 2)
    assert joins == [up + (2, 3, 4, 5)[4 - i - 1] * (4 - i in skip_levels) for i, up in enumerate(read)]


@pytest.mark.parametrize("skip_levels", ["none", (2,), (1, 2)])
def test_zeros_in_place_of_a_skip_keep_the_weights_and_cut_the_connection(skip_levels):
    whole = small().eval()
    probe = small(skip_levels=skip_levels, skip_mode="zeros", cct_levels="all").eval()
    probe.load_state_dict(whole.state_dict())
    x = image(16, 24)
    maps, probed = whole._encode(x), probe._encode(x)
    silent = [level for level in (1, 2) if level not in probe.skip_levels]
    for level in silent:
        probed[level - 1] = torch.zeros_like(probed[level - 1])
    deep, expected = probed[-1], probe(x)
    fused = whole._fuse(maps[:-1])
    for level in silent:
        fused[level - 1] = torch.zeros_like(fused[level - 1])
    for block in whole.decoder:
        deep = block(deep, fused.pop())
    torch.testing.assert_close(whole.head(deep), expected)
    assert torch.equal(expected, whole(x)) == (not silent)


def test_levels_left_out_of_the_cct_pass_around_it():
    network = small(features=(2, 3, 4, 5), cct_levels=(1, 3)).eval()
    maps = network._encode(image(16, 24))[:-1]
    fused = network._fuse(list(maps))
    assert [torch.equal(a, b) for a, b in zip(maps, fused, strict=True)] == [False, True, False]
    assert network.attention_maps(image(16, 24))[0][3].shape == (1, 4, 2 + 4)


def test_without_a_cct_there_are_no_attention_maps():
    assert small(use_cct=False).attention_maps(image(16, 24)) == []


def test_a_volume_of_one_slice_is_segmented_as_its_image():
    """3D kernels that are zero but for their middle slice are the 2D ones."""
    flat = small(features=(2, 3, 4, 5, 5), patch_size=16, img_size=32).eval()
    random_positions(flat)
    options = {"patch_size": (1, 16, 16), "strides": ((1, 2, 2),) * 4, "img_size": (1, 32, 32)}
    network = small(3, features=(2, 3, 4, 5, 5), **options).eval()
    state = flat.state_dict()
    for name, tensor in network.state_dict().items():
        if tensor.dim() == 5:
            deep = tensor.shape[2] // 2
            state[name] = F.pad(state[name][:, :, None], (0, 0, 0, 0, deep, deep))
    network.load_state_dict(state)
    x = image(32, 48)
    torch.testing.assert_close(network(x[:, :, None])[:, :, 0], flat(x), atol=2e-6, rtol=0)
    many = network(x[:, :, None].expand(-1, -1, 4, -1, -1))
    torch.testing.assert_close(many, flat(x)[:, :, None].expand_as(many), atol=1e-5, rtol=0)


def test_attention_stays_in_float32_under_mixed_precision():
    network = small().eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = network.attention_maps(image(16, 24))
        logits = network(image(16, 24))
    assert {m.dtype for layer in found for m in layer.values()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(logits.float(), network(image(16, 24)), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": ("instance", {"affine": True}), "act": ("leakyrelu", {"negative_slope": 0.01})},
        {"norm": ("group", {"num_groups": 2}), "act": "gelu"},
        {"norm": None, "mlp_ratio": 1.5, "mlp_dropout": 0.2},
        {"backbone": "unet", "upsample": "deconv"},
        {"backbone": "unet"},
    ],
)
def test_other_norms_activations_and_backbones_run_and_learn(options):
    network = small(features=(4, 6, 8), **options)
    network(image(16, 24, batch=2)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upsample": "linear"}, "'nearest', 'deconv'"),
        ({"backbone": "resnet"}, "'paper', 'unet'"),
        ({"skip_mode": "drop"}, "'remove', 'zeros'"),
        ({"pos_embed": "sine"}, "'learned', 'none'"),
        ({"skip_levels": (0, 1)}, r"skip_levels=\(0, 1\).*to 2"),
        ({"skip_levels": "1"}, "skip_levels='1'"),
        ({"skip_levels": 1}, "skip_levels=1;"),
        ({"cct_levels": (1, 3)}, r"cct_levels=\(1, 3\)"),
        ({"skip_levels": (1,), "cct_levels": "all"}, 'skip_mode="zeros"'),
        ({"patch_size": 3}, r"patch_size=\(3, 3\).*\(2, 2\).*level 2"),
        ({"patch_size": (4, 4, 4)}, "patch_size=.* 2 of them"),
        ({"img_size": 0}, "img_size=0"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"features": (8,)}, "two or more"),
        ({"strides": (2,)}, "2 entries for 3 levels"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        small(**options)
