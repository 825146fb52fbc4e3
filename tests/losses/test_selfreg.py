"""SelfReg: the reference values and gradients, its closed forms, its randomness, and a training output's whole loss."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor

from medseg.errors import RequestError, SizeError
from medseg.losses.deep_supervision import DeepSupervision
from medseg.losses.selfreg import (
    InternalFeatureDistillationLoss,
    SelfRegLoss,
    SelfRegularizedLoss,
    SemanticConsistencyLoss,
)
from medseg.losses.training import TrainingLoss
from medseg.networks import UNet
from medseg.training.handlers import SeedEpochs

GOLDEN = Path(__file__).parents[1] / "golden" / "selfreg.npz"
EXACT = {"atol": 1e-5, "rtol": 0}
TAPS = ["E1", "E2", "E3", "B", "D3", "D2", "D1"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(np.array(file[name])) for name in file.files}


def case(arrays: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the arrays of one group of the reference file."""
    return {key.removeprefix(f"{name}/"): value.clone() for key, value in arrays.items() if key.startswith(f"{name}/")}


def features(dims: int = 2, *, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Return taps of three levels with odd widths and unequal axes."""
    generator = torch.Generator().manual_seed(seed)
    finest = (16, 24, 8)[:dims]
    widths = {"E1": 5, "E2": 7, "E3": 9, "B": 11, "D3": 9, "D2": 7, "D1": 5}
    levels = {"E1": 0, "E2": 1, "E3": 2, "B": 3, "D3": 2, "D2": 1, "D1": 0}
    return {
        name: torch.randn(batch, width, *(n >> levels[name] for n in finest), generator=generator).requires_grad_()
        for name, width in widths.items()
    }


@pytest.mark.parametrize("name", [*(f"scr{i}" for i in range(4)), *(f"gen_scr{i}" for i in range(3))])
def test_scr_reference_loss_and_gradient(arrays, name):
    given = case(arrays, name)
    student, teacher = given["student"].requires_grad_(), given["teacher"].requires_grad_()
    loss = SelfRegLoss().scr_pair(student, teacher, given["idx_student"], given["idx_teacher"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), given["loss"], **EXACT)
    torch.testing.assert_close(student.grad, given["grad_student"], **EXACT)
    assert teacher.grad is None


@pytest.mark.parametrize("name", [f"gen_scr{i}" for i in range(3)])
def test_scr_reference_expectation(arrays, name):
    given = case(arrays, name)
    loss = SelfRegLoss(channel_mode="expected").scr_pair(given["student"], given["teacher"])
    torch.testing.assert_close(loss, given["expected_loss"], **EXACT)


@pytest.mark.parametrize("name", [*(f"ifd{i}" for i in range(3)), *(f"gen_ifd{i}" for i in range(3))])
def test_ifd_reference_order_loss_and_gradient(arrays, name):
    given = case(arrays, name)
    feature = given["feature"].requires_grad_()
    term = InternalFeatureDistillationLoss()
    loss = term(feature)
    loss.backward()
    assert term.order(feature).tolist() == given["order"].tolist()
    torch.testing.assert_close(loss.detach(), given["loss"], **EXACT)
    torch.testing.assert_close(feature.grad, given["grad_feature"], **EXACT)


def test_ifd_reference_gradient_of_the_one_way_form(arrays):
    given = case(arrays, "gen_ifd0")
    feature = given["feature"].requires_grad_()
    SelfRegLoss(one_way=True).ifd_block(feature).backward()
    torch.testing.assert_close(feature.grad, given["grad_feature_oneway"], **EXACT)


@pytest.mark.parametrize(("name", "layers"), [("full_cnn", [""]), ("full_vit", ["_0", "_1"])])
def test_whole_objective_of_the_reference(arrays, name, layers):
    given = case(arrays, name)
    blocks = {"enc0": "E2", "enc1": "E3", "enc2": "E4", "enc3": "B", "dec0": "D4", "dec1": "D3", "dec2": "D2"}
    names = {f"{block}{layer}": f"{ours}{layer}" for block, ours in blocks.items() for layer in layers}
    taps = {ours: given[theirs].requires_grad_() for theirs, ours in names.items()}
    indices = {ours: (given[f"idx_student_{theirs}"], given[f"idx_teacher_{theirs}"]) for theirs, ours in names.items()}
    terms = SelfRegLoss(1.0, 1.0)(taps, given["final"], indices=indices)
    torch.testing.assert_close(terms["total"].detach(), given["loss"], **EXACT)
    torch.testing.assert_close((terms["scr"] + terms["ifd"]).detach(), given["loss"], **EXACT)
    if name == "full_cnn":
        torch.testing.assert_close(terms["scr"].detach(), given["scr_total"], **EXACT)
        torch.testing.assert_close(terms["ifd"].detach(), given["ifd_total"], **EXACT)
        for theirs, ours in names.items():
            torch.testing.assert_close(terms["per_block"][ours]["scr"], given[f"scr_{theirs}"], **EXACT)
            torch.testing.assert_close(terms["per_block"][ours]["ifd"], given[f"ifd_{theirs}"], **EXACT)


def test_the_segmentation_loss_of_the_reference_is_monais(arrays):
    given = case(arrays, "base")
    label = given["label"][:, None]
    options = {
        "softmax": True,
        "to_onehot_y": True,
        "squared_pred": True,
        "batch": True,
        "smooth_nr": 1e-5,
        "smooth_dr": 1e-5,
    }
    torch.testing.assert_close(DiceLoss(**options)(given["logits"], label), given["dice"], **EXACT)
    whole = TrainingLoss(DiceCELoss(**options, lambda_dice=0.6, lambda_ce=0.4))({"logits": given["logits"]}, label)
    torch.testing.assert_close(whole, 0.6 * given["dice"] + 0.4 * given["ce"], **EXACT)


@pytest.mark.parametrize("widths", [(7, 4), (4, 7), (5, 5)])
def test_scr_closed_form_is_the_mean_over_all_draws(widths):
    """The mean of every pairing of one student with one teacher channel, value and gradient."""
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(2, widths[0], 6, 4, generator=generator).requires_grad_()
    teacher = torch.randn(2, widths[1], 12, 4, generator=generator)
    term = SemanticConsistencyLoss("expected")
    pairs = [
        term(student, teacher, torch.tensor([i]), torch.tensor([j])) for i in range(widths[0]) for j in range(widths[1])
    ]
    mean, closed = torch.stack(pairs).mean(), term(student, teacher)
    torch.testing.assert_close(closed, mean)
    torch.testing.assert_close(torch.autograd.grad(closed, student), torch.autograd.grad(mean, student))


def test_scr_of_random_channels_is_the_closed_form_on_average():
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 6, 4, 4, generator=generator), torch.randn(2, 3, 8, 8, generator=generator)
    drawn = SemanticConsistencyLoss(generator=generator)
    mean = torch.stack([drawn(student, teacher) for _ in range(2000)]).mean()
    torch.testing.assert_close(mean, SemanticConsistencyLoss("expected")(student, teacher), rtol=0.01, atol=0)


@pytest.mark.parametrize("mode", ["random", "expected", "first"])
def test_scr_is_zero_where_student_and_teacher_are_one_constant(mode):
    loss = SelfRegLoss(channel_mode=mode).scr_pair(torch.full((2, 5, 4, 6), 3.0), torch.full((2, 3, 8, 6), 3.0))
    assert loss == 0


def test_scr_of_the_first_channels_pairs_them_in_order():
    student, teacher = torch.randn(1, 4, 6), torch.randn(1, 3, 6)
    loss = SelfRegLoss(channel_mode="first").scr_pair(student, teacher)
    torch.testing.assert_close(loss, (student[:, :3] - teacher).square().mean())


def test_scr_pools_each_axis_to_the_smaller_size():
    student, teacher = torch.randn(1, 2, 8, 3, 6), torch.randn(1, 2, 4, 6, 6)
    order = torch.arange(2)
    pooled = student.reshape(1, 2, 4, 2, 3, 6).mean(3), teacher.reshape(1, 2, 4, 3, 2, 6).mean(4)
    loss = SelfRegLoss().scr_pair(student, teacher, order, order)
    torch.testing.assert_close(loss, (pooled[0] - pooled[1]).square().mean())


def test_ifd_is_zero_where_the_ranked_halves_are_equal():
    # Mirrored maps of whole numbers have exactly equal scores, so all four channels keep their order.
    one = torch.randint(1, 9, (2, 1, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    feature = torch.cat([one, one.flip(-1), one, one.flip(-1)], 1)
    assert SelfRegLoss().ifd_block(feature) == 0
    assert SelfRegLoss().ifd_block(feature[:, [0, 2, 1, 3]]) > 0


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_ifd_is_the_mean_power_of_the_differences(p):
    feature = torch.randn(2, 4, 6, 3)
    expected = (feature[:, :2] - feature[:, 2:]).abs().pow(p).mean()
    torch.testing.assert_close(SelfRegLoss(p=p, ranking="none").ifd_block(feature), expected)


@pytest.mark.parametrize(("channels", "kept"), [(5, [0, 1, 3, 4]), (3, [0, 2])])
def test_ifd_leaves_out_the_middle_of_an_odd_number_of_channels(channels, kept):
    feature = torch.randn(2, channels, 3, 4, 5)
    term = SelfRegLoss(ranking="none")
    torch.testing.assert_close(term.ifd_block(feature), term.ifd_block(feature[:, kept]))


def test_ifd_of_a_single_channel_is_zero():
    assert SelfRegLoss().ifd_block(torch.randn(2, 1, 4, 4)) == 0


def test_dead_channels_keep_their_order():
    feature = torch.zeros(2, 6, 4, 4)
    feature[:, 3] = 1
    assert InternalFeatureDistillationLoss().order(feature).tolist() == [3, 0, 1, 2, 4, 5]


def test_order_of_batch_and_channels_does_not_matter():
    taps = features()
    loss = SelfRegLoss(channel_mode="expected")
    turned = {name: tap.flip(0) for name, tap in taps.items()}
    torch.testing.assert_close(loss(turned)["total"], loss(taps)["total"])
    shuffled = {name: tap[:, torch.randperm(tap.shape[1])] for name, tap in taps.items()}
    torch.testing.assert_close(loss(shuffled)["ifd"], loss(taps)["ifd"])


@pytest.mark.parametrize("one_way", [False, True])
def test_scale_free_features_make_a_scale_free_loss(one_way):
    loss = SelfRegLoss(channel_mode="expected", feature_scale="l2", one_way=one_way)
    taps = features()
    scaled = {name: 7 * tap for name, tap in taps.items()}
    torch.testing.assert_close(loss(scaled)["total"], loss(taps)["total"], rtol=1e-4, atol=0)
    assert (
        SelfRegLoss(channel_mode="expected")(scaled)["total"] > 40 * SelfRegLoss(channel_mode="expected")(taps)["total"]
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["random", "expected", "first"])
def test_gradient_reaches_all_students_and_not_the_teacher(dims, mode):
    taps = features(dims)
    terms = SelfRegLoss(channel_mode=mode)(taps)
    terms["total"].backward()
    assert list(terms["per_block"]) == ["E2", "E3", "B", "D3", "D2"]
    assert all(torch.isfinite(value) for block in terms["per_block"].values() for value in block.values())
    assert all(taps[name].grad.any() for name in terms["per_block"])
    assert taps["D1"].grad is None
    assert taps["E1"].grad is None


def test_the_two_normalizations_follow_from_the_blocks():
    taps = features()
    code = SelfRegLoss(0.2, 0.3, channel_mode="expected")(taps)
    paper = SelfRegLoss(0.2, 0.3, channel_mode="expected", normalization="paper")(taps)

    def mean(terms, term, names):
        return torch.stack([terms["per_block"][name][term] for name in names]).mean()

    students = ["E2", "E3", "B", "D3", "D2"]
    for terms in (code, paper):
        torch.testing.assert_close(terms["scr"], mean(terms, "scr", students))
        torch.testing.assert_close(terms["total"], 0.2 * terms["scr"] + 0.3 * terms["ifd"])
    torch.testing.assert_close(code["ifd"], mean(code, "ifd", ["E2", "E3", "B"]) + mean(code, "ifd", ["D3", "D2"]))
    torch.testing.assert_close(paper["ifd"], mean(paper, "ifd", [*students, "D1"]))
    paper["total"].backward()
    assert taps["D1"].grad.any()


def test_the_finest_encoder_block_is_a_student_on_request():
    assert list(SelfRegLoss(include_e1=True)(features())["per_block"]) == ["E1", "E2", "E3", "B", "D3", "D2"]


def test_groups_name_taps_of_any_network():
    taps = dict(zip(["a", "b", "c"], features().values(), strict=False))
    teacher = torch.randn(2, 3, 16, 24)
    terms = SelfRegLoss(groups={"encoder": ["a"], "decoder": ["c", "b"]})(taps, teacher)
    assert list(terms["per_block"]) == ["a", "c", "b"]
    with pytest.raises(RequestError, match="missing tap 'd'; the features are a, b, c"):
        SelfRegLoss(groups={"encoder": ["d"]})(taps, teacher)
    with pytest.raises(RequestError, match="unknown tap name 'a'; expected E1"):
        SelfRegLoss()(taps, teacher)


def test_a_term_without_weight_is_not_computed():
    terms = SelfRegLoss(0.0, 1.0)(features())
    assert terms["scr"] == 0
    assert all(set(block) == {"ifd"} for block in terms["per_block"].values())
    terms = SelfRegLoss(1.0, 0.0)(features())
    assert terms["ifd"] == 0
    assert all(set(block) == {"scr"} for block in terms["per_block"].values())


def test_weights_rise_over_the_warm_up():
    taps = features()
    loss = SelfRegLoss(channel_mode="expected", warmup_steps=4)
    full = SelfRegLoss(channel_mode="expected")(taps)["total"]
    shares = [float((loss(taps)["total"] / full).detach()) for _ in range(6)]
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    with torch.no_grad():
        fresh = SelfRegLoss(channel_mode="expected", warmup_steps=4)
        assert [float(fresh(taps)["total"]) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_a_float32_loss(dtype):
    taps = {name: (300 * tap.detach()).to(dtype).requires_grad_() for name, tap in features().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = SelfRegLoss(channel_mode="first")(taps)
    exact = SelfRegLoss(channel_mode="first")({name: tap.float() for name, tap in taps.items()})
    assert terms["total"].dtype == torch.float32
    torch.testing.assert_close(terms["total"], exact["total"])
    terms["total"].backward()
    assert taps["B"].grad.dtype == dtype


class _Dataset:
    class transform:  # noqa: N801 - stands for a MONAI dataset's transform
        @staticmethod
        def set_random_state(seed: int) -> None:
            pass


def test_a_run_seeded_per_epoch_repeats_its_draws_when_resumed():
    taps, loss = features(), SelfRegLoss()

    def run(first_epoch: int) -> list[tuple[int, float]]:
        seen: list[tuple[int, float]] = []
        trainer = Engine(lambda engine, _: seen.append((engine.state.epoch, float(loss(taps)["total"].detach()))))
        SeedEpochs(5, _Dataset()).attach(trainer)
        trainer.state.epoch = first_epoch
        trainer.run([0, 0], max_epochs=4)
        return seen

    whole = run(0)
    assert [value for epoch, value in whole if epoch > 2] == [value for _, value in run(2)][-4:]
    assert len({value for _, value in whole}) == 8


def test_a_private_generator_repeats_and_leaves_the_global_one_alone():
    taps = features()
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, second = (
        [float(loss(taps)["total"].detach()) for _ in range(5)]
        for loss in (SelfRegLoss(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    )
    assert first == second
    assert len(set(first)) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_without_weights_nothing_is_drawn_and_the_base_loss_is_left_as_it_is():
    output = {"logits": torch.randn(2, 3, 16, 24).requires_grad_(), "features": features()}
    label = torch.randint(0, 3, (2, 1, 16, 24))
    base = TrainingLoss(DiceCELoss(softmax=True, to_onehot_y=True))
    before = torch.get_rng_state()
    assert torch.equal(SelfRegularizedLoss(base, SelfRegLoss(0.0, 0.0))(output, label), base(output, label))
    assert torch.equal(torch.get_rng_state(), before)


def test_state_holds_warm_up_and_private_generator_and_loads_as_plain_data():
    taps = features()
    whole = SelfRegularizedLoss(
        TrainingLoss(DiceCELoss()), SelfRegLoss(warmup_steps=10, generator=torch.Generator().manual_seed(3))
    )
    for _ in range(3):
        whole.regularizer(taps)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = SelfRegularizedLoss(
        TrainingLoss(DiceCELoss()), SelfRegLoss(warmup_steps=10, generator=torch.Generator().manual_seed(8))
    )
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed.regularizer(taps)["total"], whole.regularizer(taps)["total"])


@pytest.mark.parametrize("dims", [2, 3])
def test_our_networks_train_with_it(dims):
    torch.manual_seed(0)
    network = UNet(dims, 1, 2, (5, 7, 9), dropout=0.0)
    image, label = torch.randn(2, 1, *(16,) * dims), torch.randint(0, 2, (2, 1, *(16,) * dims))
    base = TrainingLoss(DiceCELoss(softmax=True, to_onehot_y=True))
    whole = SelfRegularizedLoss(base, SelfRegLoss(channel_mode="expected"))
    output = network.forward_train(image)
    loss = whole(output, label)
    torch.testing.assert_close(
        loss, base(output, label) + SelfRegLoss(channel_mode="expected")(output["features"])["total"]
    )
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


def test_the_regularizer_alone_touches_neither_the_last_block_nor_the_head():
    network = UNet(2, 1, 2, (4, 6, 8), dropout=0.0)
    SelfRegLoss()(network.forward_train(torch.randn(2, 1, 16, 16))["features"])["total"].backward()
    without = {
        name.split(".")[0] + "." + name.split(".")[1] for name, p in network.named_parameters() if p.grad is None
    }
    assert without == {"decoder.1", "head.weight", "head.bias"}


def test_it_adds_to_any_loss_over_training_outputs():
    output = {
        "logits": torch.randn(1, 1, 16, 24),
        "aux": [torch.randn(1, 1, 16, 24) for _ in range(2)],
        "features": features(batch=1),
    }
    label = torch.randint(0, 2, (1, 1, 16, 24))
    whole = SelfRegularizedLoss(DeepSupervision(), SelfRegLoss(channel_mode="first"))
    expected = DeepSupervision()(output, label) + SelfRegLoss(channel_mode="first")(output["features"])["total"]
    assert torch.equal(whole(output, label), expected)


def test_a_config_builds_it():
    config = {
        "loss": {
            "_target_": "medseg.components.SelfRegularizedLoss",
            "loss": {
                "_target_": "medseg.components.TrainingLoss",
                "loss": {"_target_": "monai.losses.DiceCELoss", "softmax": True},
            },
            "regularizer": {"_target_": "medseg.components.SelfRegLoss", "lambda_scr": 0.1, "warmup_steps": 5},
        }
    }
    loss = ConfigParser(json.loads(json.dumps(config))).get_parsed_content("loss")
    assert isinstance(loss, SelfRegularizedLoss)
    assert (loss.regularizer.lambda_scr, loss.regularizer.lambda_ifd) == (0.1, 0.015)


def test_stored_activations_grow_by_less_than_fifteen_percent():
    torch.manual_seed(0)
    network = UNet(2, 1, 2, (16, 16, 32, 64, 128), norm="batch", dropout=0.0)
    image = torch.randn(2, 1, 64, 64)
    regularizer = SelfRegLoss()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def stored(regularize: bool) -> int:
        sizes: dict[int, int] = {}
        kept = []

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = network.forward_train(image)
            kept.append(regularizer(output["features"]) if regularize else output["logits"])
        return sum(sizes.values())

    plain, more = stored(False), stored(True)
    assert plain < more < 1.15 * plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_mode": "all"}, "invalid channel_mode='all'; choose one of 'random', 'expected', 'first'"),
        ({"ranking": "l1"}, "invalid ranking='l1'"),
        ({"normalization": "mean"}, "invalid normalization='mean'"),
        ({"feature_scale": "l1"}, "invalid feature_scale='l1'"),
        ({"p": 0.5}, "p=0.5"),
        ({"lambda_scr": -1.0}, "lambda_scr=-1.0 is negative"),
        ({"lambda_ifd": float("nan")}, "lambda_ifd=nan"),
        ({"warmup_steps": -3}, "warmup_steps=-3 is negative"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(RequestError, match=message):
        SelfRegLoss(**options)


def test_missing_features_are_named():
    whole = SelfRegularizedLoss(TrainingLoss(DiceCELoss()))
    with pytest.raises(RequestError, match=r"only logits\. .*taps='auto'"):
        whole({"logits": torch.zeros(1, 2, 4, 4)}, torch.zeros(1, 1, 4, 4))
    with pytest.raises(RequestError, match="missing tap 'D1'; the features are E1"):
        SelfRegLoss()({"E1": torch.zeros(1, 2, 4, 4)})
    with pytest.raises(RequestError, match="no student taps among E1, D1"):
        SelfRegLoss()({name: torch.zeros(1, 2, 4, 4) for name in ("E1", "D1")})


def test_maps_that_cannot_be_compared_are_named():
    loss = SelfRegLoss()
    with pytest.raises(SizeError, match=r"student \(1, 2, 4, 4\), teacher \(1, 2, 4, 4, 4\)"):
        loss.scr_pair(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, 4))
    with pytest.raises(SizeError, match=r"student \(1, 2, 4, 4\), teacher \(2, 2, 4, 4\)"):
        loss.scr_pair(torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 4, 4))
    with pytest.raises(SizeError, match=r"invalid feature shape \(1, 2\)"):
        loss.ifd_block(torch.zeros(1, 2))
    with pytest.raises(RequestError, match="only one of idx_student"):
        loss.scr_pair(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([0]))
