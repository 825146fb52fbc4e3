"""UCTransNet from the authors' weights and from a trained U-Net."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.errors import RequestError, WeightsError
from medseg.networks import UCTransNet, UNet
from medseg.networks.convert import from_reference
from medseg.networks.unet_transfer import transfer_unet

ROOT = Path(__file__).parents[2]


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Return the state and the other arrays of a reference file."""
    places = [ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden"]
    file = next((place / f"{name}.npz" for place in places if (place / f"{name}.npz").is_file()), None)
    if file is None:
        pytest.skip(f"needs ../shared/golden/{name}.npz beside the project")
    with np.load(file) as arrays:
        content = dict(arrays)
    state = {key.removeprefix("state/"): a for key, a in content.items() if key.startswith("state/")}
    return state, {key: torch.from_numpy(a) for key, a in content.items() if not key.startswith("state/")}


def assert_golden(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def weights_and_steps(network: UCTransNet, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what the reference files hold, under their names."""
    kept: dict[str, torch.Tensor] = {}
    for i, norm in enumerate(network.cct.norms):
        norm.register_forward_hook(lambda _, __, y, name=f"inter/tokens_final{i + 1}": kept.__setitem__(name, y))
    network.decoder[0].cca.register_forward_hook(lambda _, __, y: kept.__setitem__("inter/cca4", y.clone()))
    with torch.no_grad():
        maps = network._encode(x)
        kept["inter/bottleneck"] = maps[-1]
        kept |= {f"inter/ctrans_out{i + 1}": fused for i, fused in enumerate(network._fuse(maps[:-1]))}
        kept["inter/attn_layer1_level1"] = network.attention_maps(x)[0][1]
        kept["inter/logits"] = network(x)
    return kept


@pytest.mark.data
def test_the_authors_network_gives_the_authors_results_at_every_step():
    state, arrays = golden("uctransnet2d")
    network = from_reference("uctransnet", state)
    assert not network.training
    found = weights_and_steps(network, arrays["input"])
    found["output"] = found["inter/logits"].sigmoid()
    expected = [name for name in arrays if name == "output" or name.startswith("inter/")]
    assert len(expected) == 13
    for name in expected:
        assert_golden(found[name], arrays[name])


@pytest.mark.data
def test_small_queries_show_the_scale_of_the_scores_and_the_epsilon_of_their_norm():
    state, arrays = golden("uctransnet2d")
    state = {name: a * np.float32(0.01) if "channel_attn.query" in name else a for name, a in state.items()}
    with torch.no_grad():
        found = from_reference("uctransnet", state)(arrays["input"]).sigmoid()
    assert (arrays["output_query_x0.01"] - arrays["output"]).abs().max() > 1e-2
    assert_golden(found, arrays["output_query_x0.01"])


def test_the_volume_form_gives_the_reference_results():
    state, arrays = golden("uctransnet3d")
    network = from_reference("uctransnet", state)
    assert network.strides == ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    found = weights_and_steps(network, arrays["input"])
    assert_golden(found["inter/logits"], arrays["output"])
    for i in range(1, 5):
        assert_golden(found[f"inter/ctrans_out{i}"], arrays[f"inter/ctrans_out{i}"])


def test_every_tensor_of_the_authors_network_is_used():
    state, _ = golden("uctransnet3d")
    network = from_reference("uctransnet", state)
    assert sum(a.size for a in state.values()) == sum(t.numel() for t in network.state_dict().values())


def test_the_authors_unet_gives_the_authors_result():
    state, arrays = golden("uctransnet_unet2d")
    network = from_reference("uctransnet-unet", state)
    with torch.no_grad():
        assert_golden(network(arrays["input"]).sigmoid(), arrays["output"])


@pytest.mark.data
@pytest.mark.parametrize(("cat_order", "output"), [(None, "swapped"), ("up_first", "literal")])
def test_transfer_reproduces_the_right_and_the_literal_copy_of_the_authors_unet(cat_order, output):
    """Exchanging halves that stand in order already gives what the authors' copy by name gave."""
    state, arrays = golden("uctransnet2d")
    unet_state, unet_arrays = golden("uctransnet_unet2d")
    network = from_reference("uctransnet", state)
    unet = from_reference("uctransnet-unet", unet_state)
    report = transfer_unet(network, unet.state_dict(), cat_order=cat_order)
    with torch.no_grad():
        assert_golden(network(arrays["input"]).sigmoid(), unet_arrays[f"transfer/output_{output}"])
    assert (len(report.copied), len(report.left_out)) == (121, 8)


def small(**options) -> UCTransNet:
    torch.manual_seed(0)
    form = {"features": (4, 6, 8, 8), "img_size": 16, "patch_size": 4, "num_heads": 2, "num_layers": 1}
    return UCTransNet(2, 1, 2, **{**form, **options}).eval()


def small_unet(**options) -> UNet:
    torch.manual_seed(1)
    network = UNet(2, 1, 2, **{"features": (4, 6, 8, 8), "norm": "batch", "dropout": 0.0, **options})
    for name, tensor in network.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("features", [(4, 6, 8, 8), (3, 5, 7, 11)], ids=["equal-halves", "unequal-halves"])
@pytest.mark.parametrize("cat_order", ["up_first", "skip_first"])
def test_a_unet_put_into_the_network_without_its_transformer_is_that_unet(cat_order, features):
    unet = small_unet(features=features, cat_order=cat_order)
    network = small(features=features, backbone="unet", upsample="deconv", use_cct=False, use_cca=False)
    report = transfer_unet(network, unet.state_dict(), cat_order=cat_order)
    x = torch.randn(1, 1, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(network(x), unet(x))
    swapped = [f"decoder.{i}.convs.0.conv.weight" for i in range(3)] if cat_order == "up_first" else []
    assert (list(report.swapped), report.left_out, report.fresh) == (swapped, (), ())
    assert len(report.copied) == len(unet.state_dict()) == len(network.state_dict())


def test_the_order_of_a_unet_is_up_first_and_of_a_uctransnet_skip_first_unless_told():
    unet = small_unet()
    network = small(backbone="unet", upsample="deconv")
    assert len(transfer_unet(network, unet.state_dict()).swapped) == 3
    assert transfer_unet(network, network.state_dict()).swapped == ()


def test_a_unet_without_up_convolutions_fits_where_the_widths_differ():
    unet = small_unet(features=(4, 6, 8, 10), upsample="interp")
    network = small(features=(4, 6, 8, 10), backbone="unet")
    report = transfer_unet(network, unet.state_dict())
    given, taken = unet.state_dict(), network.state_dict()
    name = "decoder.0.convs.0.conv.weight"
    assert given[name].shape[1] == 10 + 8
    torch.testing.assert_close(taken[name], torch.cat([given[name][:, 10:], given[name][:, :10]], dim=1))
    assert report.left_out == ()


def test_the_report_says_what_was_taken_left_out_and_is_new():
    unet = small(use_cct=False, use_cca=False, upsample="deconv")
    network = small()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = transfer_unet(network, unet.state_dict())
    after = network.state_dict()
    assert set(report.left_out) == {f"decoder.{i}.up.0.{leaf}" for i in range(3) for leaf in ("weight", "bias")}
    assert {name.split(".")[0 if name.startswith("cct") else 2] for name in report.fresh} == {"cct", "cca"}
    assert sorted([*report.copied, *report.fresh]) == sorted(after)
    assert all(torch.equal(after[name], unet.state_dict()[name]) for name in report.copied)
    assert all(torch.equal(after[name], before[name]) for name in report.fresh)
    text = str(report)
    assert f"{len(report.copied)} of {len(unet.state_dict())} tensors" in text
    assert "skipped: 6 (decoder.0.up, decoder.1.up, decoder.2.up)" in text
    assert "(cct, decoder.0.cca, decoder.1.cca, decoder.2.cca)" in text


def test_everything_stays_trainable_after_a_transfer():
    network = small().train()
    transfer_unet(network, small(use_cct=False, use_cca=False).state_dict())
    network(torch.randn(2, 1, 16, 16)).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no matching tensors"),
        ({"inc.conv.weight": torch.zeros(4, 1, 3, 3)}, "no matching tensors.*uctransnet-unet"),
        (small_unet().state_dict(), r'shape mismatch of .*\(decoder.*backbone="unet"'),
        ({"head.bias": torch.zeros(3)}, r"head.bias is \(3,\) in the U-Net and \(2,\) here"),
    ],
    ids=["empty", "authors", "unet-into-paper-backbone", "classes"],
)
def test_a_unet_that_does_not_fit_is_refused_and_changes_nothing(state, message):
    network = small()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        transfer_unet(network, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_an_unknown_order_is_refused():
    with pytest.raises(RequestError, match="'up_first', 'skip_first'"):
        transfer_unet(small(), small().state_dict(), cat_order="down_first")


def foreign_state(network: UCTransNet) -> dict[str, torch.Tensor]:
    """Rename our tensors to the authors' names, and split the heads, by the rule that the documents give."""
    depth = len(network.decoder)
    fixed = {"query_norms": "attn_norm", "queries": "channel_attn.query", "outputs": "channel_attn.out"}
    renamed = {}
    for name, tensor in network.state_dict().items():
        first, number, *rest = name.split(".")
        if first == "head":
            renamed[f"outc.{number}"] = tensor
        elif first == "encoder":
            renamed[".".join(["inc" if number == "0" else f"down{number}.nConvs.{rest[0]}", *rest[1:]])] = tensor
        elif first == "decoder":
            gate = {"skip": "coatt.mlp_x.1", "up": "coatt.mlp_g.1"}
            tail = [gate[rest[1]], *rest[2:]] if rest[0] == "cca" else ["nConvs", *rest[1:]]
            renamed[".".join([f"up{depth - int(number)}", *tail])] = tensor
        elif number == "embeddings":
            tail = ["patch_embeddings", *rest[2:]] if rest[1] == "patches" else rest[1:]
            renamed[".".join([f"mtc.embeddings_{int(rest[0]) + 1}", *tail])] = tensor
        elif number == "norms":
            renamed[f"mtc.encoder.encoder_norm{int(rest[0]) + 1}.{rest[1]}"] = tensor
        elif number == "reconstructions":
            renamed[".".join([f"mtc.reconstruct_{int(rest[0]) + 1}", *rest[1:]])] = tensor
        else:
            layer, part, *tail = rest
            if part == "mlps":
                kind = {"0": "ffn_norm{}", "1": "ffn{}.fc1", "4": "ffn{}.fc2"}[tail[1]].format(int(tail[0]) + 1)
            elif part == "context_norm":
                kind = "attn_norm"
            elif part == "query_norms":
                kind = f"attn_norm{int(tail[0]) + 1}"
            else:
                kind = fixed.get(tail[0], f"channel_attn.{tail[0]}")
                kind += str(int(tail[1]) + 1) if tail[0] in fixed else ""
            stem = f"mtc.encoder.layer.{layer}.{kind}"
            if part == "attention" and tail[0] != "outputs":
                heads = tensor.chunk(network.cct.layers[0].attention.num_heads)
                renamed |= {f"{stem}.{h}.weight": head for h, head in enumerate(heads)}
            else:
                renamed[f"{stem}.{tail[-1]}"] = tensor
    return renamed


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        (2, {"features": (4, 6, 8, 8), "img_size": 32, "patch_size": 8, "num_heads": 3, "mlp_ratio": 2}),
        (2, {"features": (2, 3, 4, 5, 6), "img_size": 32, "num_layers": 11, "num_heads": 1}),
        (3, {"features": (2, 3, 4), "img_size": (8, 16, 16), "patch_size": (2, 4, 4), "strides": ((1, 2, 2), 2)}),
    ],
)
def test_widths_heads_layers_and_dimensions_are_read_off_the_tensors(dims, options):
    torch.manual_seed(0)
    original = UCTransNet(dims, 2, 3, **options).eval()
    found = from_reference("uctransnet", foreign_state(original))
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, msg=name)
    size = original.step[0] * 2, *(3 * n for n in original.step[1:])
    with torch.no_grad():
        image = torch.randn(1, 2, *size)
        torch.testing.assert_close(found(image), original(image))


def test_a_grid_that_is_not_square_needs_the_image_size():
    original = small(img_size=(16, 24))
    state = foreign_state(original)
    with pytest.raises(WeightsError, match=r"not of a square grid.*img_size"):
        from_reference("uctransnet", state)
    found = from_reference("uctransnet", state, img_size=(16, 24))
    image = torch.randn(1, 1, 16, 24)
    torch.testing.assert_close(found(image), original(image))


def test_a_missing_head_is_named():
    state = foreign_state(small())
    del state["mtc.encoder.layer.0.channel_attn.query2.1.weight"]
    with pytest.raises(WeightsError, match=r"Missing \(1\): mtc.encoder.layer.0.channel_attn.query2.weight"):
        from_reference("uctransnet", state)
