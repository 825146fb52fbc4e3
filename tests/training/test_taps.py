"""Features of MONAI's networks by hooks: what is recorded, that it trains, and that the network stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from monai.networks import nets
from monai.transforms import Compose
from torch import Tensor, nn

from medseg.errors import RequestError, SizeError
from medseg.losses.selfreg import SelfRegLoss, SelfRegularizedLoss
from medseg.losses.training import TrainingLoss
from medseg.networks import UNet
from medseg.training.handlers import SeedEpochs
from medseg.training.taps import FeatureTaps, Tap, preset_taps
from medseg.training.wrapper import TrainingWrapper

WIDTHS = (4, 5, 6, 7, 8, 3)
FULL = ["E1", "E2", "E3", "E4", "B", "D4", "D3", "D2", "D1"]


def _dyn_unet(dims: int, **options: Any) -> nn.Module:
    return nets.DynUNet(dims, 1, 2, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=[4, 5, 6, 7], **options)


def _swin_unetr(dims: int) -> nn.Module:
    pytest.importorskip("einops", reason="MONAI's SwinUNETR needs einops")
    heads = (1, 2, 2, 2)
    return nets.SwinUNETR(1, 2, feature_size=12, spatial_dims=dims, num_heads=heads, window_size=2)


# Network -> how to build it for `dims` axes, size of its image, tap names, stride of each tap.
NETWORKS = {
    "BasicUNet": (lambda dims: nets.BasicUNet(dims, 1, 2, WIDTHS), 32, FULL, [1, 2, 4, 8, 16, 8, 4, 2, 1]),
    "BasicUNetPlusPlus": (
        lambda dims: nets.BasicUNetPlusPlus(dims, 1, 2, WIDTHS),
        32,
        FULL,
        [1, 2, 4, 8, 16, 8, 4, 2, 1],
    ),
    "DynUNet": (_dyn_unet, 16, ["E1", "E2", "E3", "B", "D3", "D2", "D1"], [1, 2, 4, 8, 4, 2, 1]),
    "DynUNet-residual": (
        lambda dims: _dyn_unet(dims, res_block=True),
        16,
        ["E1", "E2", "E3", "B", "D3", "D2", "D1"],
        [1, 2, 4, 8, 4, 2, 1],
    ),
    "SegResNet": (
        lambda dims: nets.SegResNet(dims, 8, 1, 2),
        16,
        ["E1", "E2", "E3", "B", "D3", "D2", "D1"],
        [1, 2, 4, 8, 4, 2, 1],
    ),
    "SwinUNETR": (
        _swin_unetr,
        (64, 32, 32),
        ["E1", "E3", "E4", "E5", "B", "D5", "D4", "D3", "D2", "D1"],
        [1, 4, 8, 16, 32, 16, 8, 4, 2, 1],
    ),
}
BASE = TrainingLoss(DiceCELoss(softmax=True, to_onehot_y=True))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Subject:
    """One network in 2D or 3D, with an image and a label."""

    def __init__(self, name: str, dims: int) -> None:
        build, size, self.names, self.strides = NETWORKS[name]
        torch.manual_seed(0)
        self.network = build(dims)
        self.size = (size,) * dims if isinstance(size, int) else size[:dims]
        generator = torch.Generator().manual_seed(1)
        self.image = torch.randn(2, 1, *self.size, generator=generator)
        self.label = torch.randint(0, 2, (2, 1, *self.size), generator=generator)

    def logits(self) -> Tensor:
        output = self.network(self.image)
        return output if isinstance(output, Tensor) else output[-1]


@pytest.fixture(params=[(name, dims) for name in NETWORKS for dims in (2, 3)], ids=lambda p: f"{p[0]}-{p[1]}d")
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(*request.param)


def hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def test_each_preset_records_its_blocks_from_the_image_down_and_up_again(subject):
    output = TrainingWrapper(subject.network, taps="auto")(subject.image)
    assert list(output["features"]) == subject.names
    for feature, stride in zip(output["features"].values(), subject.strides, strict=True):
        assert feature.shape[2:] == tuple(n // stride for n in subject.size)
        assert feature.shape[0] == 2


def test_each_preset_trains_with_selfreg(subject):
    """The students get gradients from the regularizer alone; with the segmentation loss all parameters do."""
    wrapped = TrainingWrapper(subject.network, taps="auto")
    output = wrapped(subject.image)
    terms = SelfRegLoss()(output["features"])
    students = [name for name in subject.names if name not in ("E1", "D1")]
    assert list(terms["per_block"]) == students
    assert all(value.isfinite() for block in terms["per_block"].values() for value in block.values())
    taps = [output["features"][name] for name in students]
    assert all(gradient.any() for gradient in torch.autograd.grad(terms["total"], taps, retain_graph=True))
    SelfRegularizedLoss(BASE)(output, subject.label).backward()
    used = {name for name, p in subject.network.named_parameters() if p.grad is not None}
    subject.network.zero_grad(set_to_none=True)
    BASE(wrapped(subject.image), subject.label).backward()
    assert used == {name for name, p in subject.network.named_parameters() if p.grad is not None}


def test_every_recorded_block_shapes_the_logits(subject):
    output = TrainingWrapper(subject.network, taps="auto")(subject.image)
    gradients = torch.autograd.grad(output["logits"].square().sum(), list(output["features"].values()))
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("training", [False, True])
def test_logits_are_those_of_the_bare_network(subject, training):
    subject.network.train(training)
    wrapped = TrainingWrapper(subject.network, taps="auto")
    with torch.no_grad():
        torch.manual_seed(2)
        strip_metadata = subject.logits()
        torch.manual_seed(2)
        assert torch.equal(wrapped(subject.image)["logits"], strip_metadata)


def test_nothing_stays_on_the_network(subject):
    strip_metadata = copy.deepcopy(subject.network)
    before = hooks(subject.network)
    SelfRegularizedLoss(BASE)(TrainingWrapper(subject.network, taps="auto")(subject.image), subject.label).backward()
    assert hooks(subject.network) == before
    assert list(subject.network.state_dict()) == list(strip_metadata.state_dict())
    assert set(vars(subject.network)) == set(vars(strip_metadata))


@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")  # inside MONAI's DynUNet
@pytest.mark.parametrize("name", [name for name in NETWORKS if "Swin" not in name])
def test_the_network_scripts_after_training_as_before(name):
    subject = Subject(name, 2)
    TrainingWrapper(subject.network, taps="auto")(subject.image)
    scripted = torch.jit.script(subject.network.eval())(subject.image)
    assert torch.equal(scripted if isinstance(scripted, Tensor) else scripted[-1], subject.logits())


def test_the_network_exports_after_training_as_before():
    subject = Subject("BasicUNet", 2)
    TrainingWrapper(subject.network, taps="auto")(subject.image)
    exported = torch.export.export(subject.network.eval(), (subject.image,))
    torch.testing.assert_close(exported.module()(subject.image), subject.logits())


def test_two_taps_per_block_are_its_first_and_its_last_layer(subject):
    output = TrainingWrapper(subject.network, taps="auto", taps_per_block=2)(subject.image)
    names = list(output["features"])
    assert names[-1] == "D1"
    assert names[:-1:2] == [f"{name[:-2]}_0" for name in names[:-1:2]]
    assert names[1:-1:2] == [f"{name[:-2]}_1" for name in names[:-1:2]]
    for first, last in zip(names[:-1:2], names[1:-1:2], strict=True):
        assert output["features"][first].shape == output["features"][last].shape
    terms = SelfRegLoss()(output["features"])
    assert terms["total"].isfinite()
    blocks = [name for name in subject.names if name not in ("E1", "D1")]
    assert len(terms["per_block"]) == 2 * len(blocks)


def test_the_first_layer_comes_before_the_last():
    """Gradient of the last layer's map reaches the first one's, and they differ."""
    for name in ("BasicUNet", "DynUNet", "SegResNet"):
        subject = Subject(name, 2)
        features = TrainingWrapper(subject.network, taps="auto", taps_per_block=2)(subject.image)["features"]
        first, last = features["E2_0"], features["E2_1"]
        assert torch.autograd.grad(last.square().sum(), first)[0].any()
        assert not torch.equal(first, last)


def test_transformer_layers_are_recorded_channels_first():
    subject = Subject("SwinUNETR", 3)
    features = TrainingWrapper(subject.network, taps="auto", taps_per_block=2)(subject.image)["features"]
    assert list(features)[2:10] == [f"E{level}_{layer}" for level in (2, 3, 4, 5) for layer in (0, 1)]
    assert [features[f"E{level}_1"].shape[1:] for level in (2, 3, 4, 5)] == [
        (12 * 2**i, 32 >> i, 16 >> i, 16 >> i) for i in range(4)
    ]


def test_the_heads_of_monais_unet_plus_plus_become_auxiliary_outputs():
    torch.manual_seed(0)
    network = nets.BasicUNetPlusPlus(2, 1, 2, WIDTHS, deep_supervision=True)
    image = torch.randn(1, 1, 32, 32)
    heads = network(image)
    output = TrainingWrapper(network, taps="auto")(image)
    assert torch.equal(output["logits"], heads[-1])
    assert all(torch.equal(found, head) for found, head in zip(output["aux"], heads, strict=True))


def test_outputs_that_are_no_logits_are_refused():
    network = nets.SegResNetVAE((16, 16), spatial_dims=2, init_filters=8, in_channels=1, out_channels=2)
    with pytest.raises(RequestError, match=r"SegResNetVAE returned a \w+, expected one tensor"):
        TrainingWrapper(network)(torch.randn(1, 1, 16, 16))


def test_our_own_networks_give_their_own_features():
    network = UNet(2, 1, 2, (4, 6, 8), dropout=0.0)
    image = torch.randn(1, 1, 16, 16)
    wrapped = TrainingWrapper(network, taps="auto")
    assert wrapped.taps is None
    assert list(wrapped(image)["features"]) == ["E1", "E2", "B", "D2", "D1"]


def test_modules_can_be_named_for_any_network():
    network = UNet(2, 1, 2, (4, 6, 8), dropout=0.0)
    image = torch.randn(1, 1, 16, 16)
    features = TrainingWrapper(network, taps={"B_0": "bottleneck.0", "B_1": Tap("bottleneck")})(image)["features"]
    assert list(features) == ["B_0", "B_1"]
    assert torch.equal(features["B_1"], network.forward_train(image)["features"]["B"])
    assert hooks(network) == 0


def test_a_forward_pass_replaces_the_features_of_the_one_before():
    network = nets.BasicUNet(2, 1, 2, WIDTHS).eval()
    with FeatureTaps(network) as taps:
        first = network(torch.zeros(1, 1, 32, 32)), taps.features["B"]
        network(torch.ones(3, 1, 32, 32))
        assert taps.features["B"].shape[0] == 3
    assert first[1].shape[0] == 1
    with pytest.raises(RequestError, match="tap 'E1' recorded nothing"):
        taps.features  # noqa: B018 - reading is what fails


def test_hooks_go_also_when_the_network_fails():
    network = nets.BasicUNet(2, 1, 2, WIDTHS)
    with pytest.raises(RuntimeError):
        TrainingWrapper(network, taps="auto")(torch.zeros(1, 7, 32, 32))
    assert hooks(network) == 0


def test_wrapped_weights_carry_no_prefix_and_load_into_the_bare_network():
    wrapped = TrainingWrapper(nets.BasicUNet(2, 1, 2, WIDTHS), taps="auto")
    nets.BasicUNet(2, 1, 2, WIDTHS).load_state_dict(wrapped.network.state_dict())
    assert {name.removeprefix("network.") for name in wrapped.state_dict()} == set(wrapped.network.state_dict())


def test_a_value_changed_in_place_later_is_noticed():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True))
    with FeatureTaps(network, {"E1": "0"}) as taps, torch.no_grad():
        network(torch.randn(1, 1, 4, 4))
        with pytest.raises(RequestError, match="the output of '0' was modified in place"):
            taps.features  # noqa: B018 - reading is what fails
    with FeatureTaps(network, {"E1": "1"}) as taps, torch.inference_mode():
        logits = network(torch.randn(1, 1, 4, 4))
        assert torch.equal(taps.features["E1"], logits)


def test_a_module_called_twice_is_recorded_at_the_call_asked_for():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x) - 1)

    network, image = Twice(), torch.tensor([[[[0.5, 3.0]]]])
    with FeatureTaps(network, {"E1": Tap("act", call=0), "B": Tap("act", call=1), "D1": "act"}) as taps:
        network(image)
        network(image)
        assert [feature[0, 0, 0].tolist() for feature in taps.features.values()] == [[0.5, 3], [0, 2], [0, 2]]
    with FeatureTaps(network, {"E1": Tap("act", call=2)}) as taps:
        network(image)
        with pytest.raises(RequestError, match="call 2 of 'act' did not occur"):
            taps.features  # noqa: B018 - reading is what fails


def test_monais_trainer_goes_on_bit_for_bit_where_it_stopped():
    generator = torch.Generator().manual_seed(3)
    image, label = torch.randn(4, 1, 32, 32, generator=generator), torch.randint(0, 2, (4, 1, 32, 32))
    data = [{"image": i, "label": y} for i, y in zip(image, label, strict=True)]

    def train(epochs: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
        torch.manual_seed(0)
        network = nets.BasicUNet(2, 1, 2, WIDTHS, dropout=0.2)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        loss = SelfRegularizedLoss(BASE, SelfRegLoss(0.1, 0.1, warmup_steps=5))
        parts = {"network": network, "optimizer": optimizer, "loss": loss}
        for name, part in parts.items() if state else ():
            part.load_state_dict(state[name])
        dataset = Dataset(data, Compose([]))
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=epochs,
            train_data_loader=DataLoader(dataset, batch_size=2, shuffle=True),
            network=TrainingWrapper(network, taps="auto"),
            optimizer=optimizer,
            loss_function=loss,
            train_handlers=[SeedEpochs(1, dataset)],
            decollate=False,
        )
        trainer.state.epoch = state["epoch"] if state else 0
        trainer.run()
        assert hooks(network) == 0
        return {**{name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}, "epoch": epochs}

    whole, resumed = train(4), train(4, train(2))
    assert all(torch.equal(resumed["network"][name], weight) for name, weight in whole["network"].items())
    assert resumed["loss"] == whole["loss"]
    assert whole["loss"]["regularizer._extra_state"]["steps"] == 8


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ("auto", "no preset taps for Sequential, only for BasicUNet, .*SwinUNETR"),
        ("all", 'invalid taps="all"'),
        ({"E1": "0.conv"}, r"tap 'E1': Sequential has no module '0\.conv'; its modules are 0, 1"),
    ],
)
def test_taps_that_do_not_fit_are_named(taps, message):
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten())
    with pytest.raises(RequestError, match=message):
        TrainingWrapper(network, taps=taps)


def test_outputs_that_are_no_maps_are_named():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten())
    with pytest.raises(SizeError, match=r"tap 'E1': '1' returned \(1, 16\), expected"):
        TrainingWrapper(network, taps={"E1": "1"})(torch.zeros(1, 1, 4, 4))


def test_a_block_is_tapped_once_or_twice():
    with pytest.raises(RequestError, match="taps_per_block=3"):
        preset_taps(nets.BasicUNet(2), 3)
