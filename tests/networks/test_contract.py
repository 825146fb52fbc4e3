"""What every network must do; a new one is tested in the form `tiny` of its registry entry.

ONNX parity of the same forms is in tests/tools/test_export.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from medseg.errors import SizeError
from medseg.networks import NETWORKS
from tests.networks.forms import SIZES, tiny_options

OUT_CHANNELS = 2


@dataclass(frozen=True)
class Subject:
    network: type[nn.Module]
    dims: int

    @property
    def size(self) -> tuple[int, ...]:
        return SIZES[self.dims]

    @property
    def options(self) -> dict[str, Any]:
        shape = {"spatial_dims": self.dims, "in_channels": 1, "out_channels": OUT_CHANNELS}
        return {**shape, **tiny_options(self.network.__name__, self.dims)}

    def build(self, **changes: Any) -> Any:
        torch.manual_seed(0)
        return self.network(**{**self.options, **changes})

    def image(self, batch: int = 2, size: tuple[int, ...] | None = None) -> Tensor:
        return torch.randn(batch, 1, *(size or self.size), generator=torch.Generator().manual_seed(1))


@pytest.fixture(
    params=[(entry.load(), dims) for entry in NETWORKS.values() for dims in (2, 3)],
    ids=lambda p: f"{p[0].__name__}-{p[1]}d",
)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(*request.param)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_logits_have_the_class_channels_and_the_size_of_the_image(subject):
    for network in (subject.build().train(), subject.build().eval()):
        logits = network(subject.image())
        assert isinstance(logits, Tensor)
        assert logits.shape == (2, OUT_CHANNELS, *subject.size)
        assert torch.isfinite(logits).all()


def test_in_channels_are_read(subject):
    network = subject.build(in_channels=3).eval()
    assert network(torch.zeros(1, 3, *subject.size)).shape[1] == OUT_CHANNELS
    with pytest.raises(SizeError, match="3 channel"):
        network(subject.image())


@pytest.mark.parametrize("change", [(1, 3, 5), (7, 0, 2), (-5, 9, 13)])
def test_odd_and_anisotropic_sizes_work_or_the_error_names_one_that_does(subject, change):
    network = subject.build().eval()
    size = tuple(n + c for n, c in zip(subject.size, change, strict=False))
    with torch.no_grad():
        try:
            logits = network(subject.image(size=size))
        except SizeError as error:
            size = suggested_size(error, size)
            logits = network(subject.image(size=size))
    assert logits.shape == (2, OUT_CHANNELS, *size)


def test_a_tiny_image_is_refused_with_a_size_that_works(subject):
    network = subject.build().eval()
    tiny = (1,) * subject.dims
    with pytest.raises(SizeError) as caught:
        network(subject.image(size=tiny))
    size = suggested_size(caught.value, tiny)
    assert network(subject.image(size=size)).shape == (2, OUT_CHANNELS, *size)


def test_a_tensor_of_the_wrong_rank_is_refused(subject):
    network = subject.build().eval()
    with pytest.raises(SizeError, match=f"{subject.dims}D"):
        network(subject.image()[0])
    with pytest.raises(SizeError, match=f"{subject.dims}D"):
        network(subject.image()[:, None])


def test_gradient_reaches_every_parameter(subject):
    network = subject.build().train()
    output = network.forward_train(subject.image())
    outputs = [output["logits"], *output.get("aux", []), *output.get("edges", [])]
    sum(logits.square().mean() for logits in outputs).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    still = [name for name, p in network.named_parameters() if name.endswith("weight") and not p.grad.any()]
    assert (without, still) == ([], [])


def test_forward_equals_the_logits_of_forward_train(subject):
    network = subject.build().eval()
    with torch.no_grad():
        torch.testing.assert_close(network(subject.image()), network.forward_train(subject.image())["logits"])
        network.train()
        torch.manual_seed(3)
        plain = network(subject.image())
        torch.manual_seed(3)
        torch.testing.assert_close(plain, network.forward_train(subject.image())["logits"])


def test_extra_outputs_are_maps_of_the_same_batch(subject):
    output = subject.build().train().forward_train(subject.image())
    assert set(output) <= {"logits", "aux", "edges", "features"}
    for kind in ("aux", "edges"):
        if kind in output:
            assert output[kind], f"{kind} is there but empty"
            assert all(o.dim() == subject.dims + 2 and len(o) == 2 for o in output[kind])


def test_feature_taps_are_named_in_order_from_the_image_down_and_up_again(subject):
    features = subject.build().train().forward_train(subject.image())["features"]
    names = list(features)
    depth = names.index("B")
    encoder = [f"E{i + 1}" for i in range(depth)]
    decoder = [f"D{depth - i}" for i in range(depth)]
    assert depth >= 1
    assert names == [*encoder, "B", *decoder]
    voxels = [features[name][0, 0].numel() for name in names]
    assert voxels[: depth + 1] == sorted(voxels[: depth + 1], reverse=True)
    assert voxels[depth:] == sorted(voxels[depth:])


def test_every_feature_tap_shapes_the_logits(subject):
    output = subject.build().train().forward_train(subject.image())
    gradients = torch.autograd.grad(output["logits"].square().sum(), list(output["features"].values()))
    assert all(gradient.any() for gradient in gradients)


def test_scripted_network_gives_the_same_logits_at_any_size(subject):
    network = subject.build().eval()
    assert_same(network, torch.jit.script(network), subject)


def test_traced_network_gives_the_same_logits_at_any_size(subject):
    network = subject.build().eval()
    assert_same(network, torch.jit.trace(network, subject.image(), check_trace=False), subject)


def test_compiled_network_is_one_graph_with_the_same_logits(subject):
    network = subject.build().eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(subject.image()), network(subject.image()), atol=1e-5, rtol=1e-5)


def test_exported_program_gives_the_same_logits_at_any_size(subject):
    network = subject.build().eval()
    assert_same(network, exported(network, subject).module(), subject)


def test_a_config_builds_the_network(subject):
    config = {"_target_": f"medseg.components.{subject.network.__name__}", **subject.options}
    parser = ConfigParser({"network_def": json.loads(json.dumps(config))})
    network = parser.get_parsed_content("network_def")
    assert type(network) is subject.network
    network.load_state_dict(subject.build().state_dict())


def test_one_optimizer_step_lowers_the_loss(subject):
    network = subject.build().train()
    image, label = ellipse(subject.size)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    torch.manual_seed(2)
    before = nn.functional.cross_entropy(network(image), label)
    before.backward()
    optimizer.step()
    torch.manual_seed(2)
    assert nn.functional.cross_entropy(network(image), label) < before


def test_network_learns_one_noisy_ellipse(subject):
    network = subject.build().train()
    image, label = ellipse(subject.size)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(image), label).backward()
        optimizer.step()
    with torch.no_grad():
        found = network.eval()(image).argmax(1)
    dice = 2 * (found * label).sum() / (found.sum() + label.sum())
    assert dice > 0.95


def ellipse(size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return an image (a bright ellipse in noise, twice) and its label."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in size], indexing="ij")
    radii = (0.7, 0.55, 0.6)
    label = torch.from_numpy(sum((a / r) ** 2 for a, r in zip(axes, radii, strict=False)) < 1).long()
    noise = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(4))
    return label + 0.5 * noise, label.expand(2, *size)


def suggested_size(error: SizeError, given: tuple[int, ...]) -> tuple[int, ...]:
    """Return the first full size that the message names besides the one that was given."""
    message = str(error)
    found = [tuple(map(int, text.split("x"))) for text in re.findall(r"\d+(?:x\d+)+", message)]
    assert given in found, f"the message does not say which size came: {message}"
    fits = [size for size in found if len(size) == len(given) and size != given]
    assert fits, f"the message names no size that fits: {message}"
    return fits[-1]


def exported(network: nn.Module, subject: Subject) -> torch.export.ExportedProgram:
    """Export with a dynamic batch and dynamic spatial axes."""
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch", max=64)}
    dynamic |= {axis + 2: torch.export.Dim(f"n{axis}", min=n // 2, max=4 * n) for axis, n in enumerate(subject.size)}
    return torch.export.export(network, (subject.image(),), dynamic_shapes=(dynamic,))


def assert_same(network: nn.Module, other: Any, subject: Subject) -> None:
    """Compare with eager at the size seen when the graph was made, and at another size and batch."""
    another = tuple(n + (3 - 5 * i) for i, n in enumerate(subject.size))
    for x in (subject.image(), subject.image(batch=3, size=another)):
        with torch.no_grad():
            torch.testing.assert_close(other(x), network(x), atol=1e-5, rtol=1e-5)
