"""Faster ways to run a network: the same numbers, the caller's network untouched, errors that say what to do."""

from __future__ import annotations

import copy
import gc
import importlib
import logging
import os
import platform
import subprocess
import sys
import weakref

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from medseg.errors import RequestError, SizeError
from medseg.inferers.backends import BACKENDS, MEMORY_FORMATS, accelerate
from medseg.machine import resident_bytes, reuse_memory
from medseg.networks import NETWORKS, UNet, small
from tests.networks.forms import tiny_options

SIZES = {2: (96, 96), 3: (32, 32, 32)}
INSTANCE = ("instance", {"affine": True})
ENGINES = [
    pytest.param("openvino", marks=pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="no openvino")),
    pytest.param(
        "onnxruntime", marks=pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="no onnxruntime")
    ),
]


def tiny(**changes) -> nn.Module:
    """Return a U-Net of a few weights."""
    torch.manual_seed(0)
    options = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "features": (4, 8, 8), "norm": INSTANCE}
    return UNet(**{**options, "dropout": 0.0, **changes}).eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def family(network: type[nn.Module], dims: int) -> nn.Module:
    torch.manual_seed(0)
    return network(dims, 1, 3, **small(network.__name__, dims)).eval()


def deviation(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest logit."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", [entry.load() for entry in NETWORKS.values()], ids=lambda network: network.__name__)
class TestEveryFamily:
    @pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
    def test_torch_gives_the_eager_logits(self, network, dims, memory_format) -> None:
        subject, windows = family(network, dims), noise(2, 1, *SIZES[dims])
        runner = accelerate(subject, memory_format=memory_format, window_shape=windows.shape)
        with torch.no_grad():
            assert deviation(runner(windows), subject(windows)) < 2e-5

    @pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
    def test_bfloat16_stays_near_the_eager_logits(self, network, dims, memory_format) -> None:
        subject, windows = family(network, dims), noise(1, 1, *SIZES[dims])
        runner = accelerate(subject, precision="bfloat16", memory_format=memory_format, window_shape=windows.shape)
        with torch.no_grad():
            assert 1e-4 < deviation(runner(windows), subject(windows)) < 0.25

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ENGINES)
    def test_an_engine_gives_the_eager_logits(self, network, dims, backend) -> None:
        torch.manual_seed(0)
        name = network.__name__
        # The norms of the presets, which engines have their own kernels for
        subject = network(dims, 1, 3, **tiny_options(name, dims, norm=small(name, dims)["norm"])).eval()
        windows = noise(1, 1, *SIZES[dims])
        runner = accelerate(subject, backend=backend, window_shape=windows.shape)
        with torch.no_grad():
            assert deviation(runner(windows), subject(windows)) < 1e-4


@pytest.mark.parametrize("backend", ENGINES)
def test_an_engine_takes_fewer_windows_and_other_values_at_every_call(backend) -> None:
    subject = tiny()
    runner = accelerate(subject, backend=backend, window_shape=(2, 1, 16, 16, 16))
    windows = noise(3, 1, 16, 16, 16)
    first = runner(windows)
    before = first.clone()
    second = runner(-2 * windows[:1])
    assert torch.equal(first, before), "the result of a call changed with the next call"
    with torch.no_grad():
        assert deviation(first, subject(windows)) < 1e-4
        assert deviation(second, subject(-2 * windows[:1])) < 1e-4


def test_openvino_sums_large_windows_with_little_error() -> None:
    pytest.importorskip("openvino", reason="needs openvino")
    subject, windows = tiny(features=(4, 4)), 1 + noise(1, 1, 96, 96, 96)
    exact = copy.deepcopy(subject).double()
    runner = accelerate(subject, backend="openvino", window_shape=windows.shape)
    with torch.no_grad():
        assert deviation(runner(windows), exact(windows.double()).float()) < 1e-4


def test_openvino_in_bfloat16_stays_near_float32() -> None:
    pytest.importorskip("openvino", reason="needs openvino")
    subject, windows = tiny(), noise(1, 1, 16, 16, 16)
    runner = accelerate(subject, backend="openvino", precision="bfloat16", window_shape=windows.shape)
    with torch.no_grad():
        assert deviation(runner(windows), subject(windows)) < 0.1


def test_signals_reach_a_process_that_has_let_two_openvino_networks_go() -> None:
    pytest.importorskip("openvino", reason="needs openvino")
    code = """
import faulthandler, gc, os, signal
import torch
from medseg.inferers.backends import accelerate
from medseg.networks import UNet
faulthandler.enable()
signal.signal(signal.SIGCHLD, lambda *_: print("heard"))
runners = [
    accelerate(UNet(2, 1, 2, features=(4, 8)).eval(), backend="openvino", window_shape=(1, 1, 16, 16))
    for _ in range(2)
]
while runners:
    del runners[0]
    gc.collect()
os.kill(os.getpid(), signal.SIGCHLD)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["heard"]), done.stderr


def test_openvino_does_not_report_its_use() -> None:
    pytest.importorskip("openvino_telemetry", reason="needs openvino-telemetry")
    code = """
import time
from openvino_telemetry.backend.backend_ga4 import GA4Backend
sent = []
GA4Backend.send = lambda self, message: sent.append(message)
import torch
from medseg.inferers.backends import accelerate
from medseg.networks import UNet
accelerate(UNet(2, 1, 2, features=(4, 8)).eval(), backend="openvino", window_shape=(1, 1, 16, 16))
time.sleep(1)
print(sent)
"""
    silent = {name: value for name, value in os.environ.items() if name != "CI"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=silent, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.slow
def test_compiled_network_gives_the_eager_logits_of_short_batches_too(tmp_path) -> None:
    subject, windows = tiny(features=(4, 4)), noise(3, 1, 16, 16, 16)
    runner = accelerate(subject, backend="compile", window_shape=(2, 1, 16, 16, 16), cache_dir=tmp_path)
    with torch.no_grad():
        assert deviation(runner(windows), subject(windows)) < 1e-4
    assert any(tmp_path.rglob("*.so")), "nothing was kept for other processes"
    assert accelerate(subject, backend="compile", window_shape=(2, 1, 16, 16, 16), cache_dir=tmp_path) is runner


def test_without_a_compiler_the_network_runs_eagerly_and_says_so(monkeypatch, caplog, tmp_path, assert_warns) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setenv("CXX", "no-such-compiler")
    subject, windows = tiny(), noise(1, 1, 16, 16, 16)
    with caplog.at_level(logging.WARNING):
        runner = accelerate(subject, backend="compile", window_shape=windows.shape, cache_dir=tmp_path)
    assert "runs uncompiled" in caplog.text
    assert "C++ compiler" in caplog.text
    with torch.no_grad():
        assert deviation(runner(windows), subject(windows)) < 1e-5
    assert_warns(
        lambda: accelerate(tiny(), backend="compile", window_shape=windows.shape), "backend-fallback", run=True
    )


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_the_callers_network_stays_as_it_is(memory_format) -> None:
    subject, windows = tiny(), noise(1, 1, 16, 16, 16)
    kinds = [type(module) for module in subject.modules()]
    state = copy.deepcopy(subject.state_dict())
    strides = [tensor.stride() for tensor in subject.parameters()]
    accelerate(subject, memory_format=memory_format, window_shape=windows.shape)(windows)
    assert [type(module) for module in subject.modules()] == kinds
    assert [tensor.stride() for tensor in subject.parameters()] == strides
    assert all(torch.equal(tensor, state[name]) for name, tensor in subject.state_dict().items())
    subject(windows).sum().backward()
    assert all(parameter.grad is not None for parameter in subject.parameters())


@pytest.mark.parametrize("options", [{}, {"memory_format": "channels_last"}, {"backend": "openvino"}], ids=str)
def test_changed_weights_are_noticed(options) -> None:
    if "backend" in options:
        pytest.importorskip("openvino", reason="needs openvino")
    subject, windows = tiny(), noise(1, 1, 16, 16, 16)
    first = accelerate(subject, window_shape=windows.shape, **options)(windows)
    for parameter in subject.parameters():
        parameter.data.mul_(1.1)  # changes neither the tensor's address nor its version
    second = accelerate(subject, window_shape=windows.shape, **options)(windows)
    with torch.no_grad():
        assert deviation(second, subject(windows)) < 1e-4
    assert deviation(second, first) > 1e-2


def test_what_was_built_is_kept_for_the_next_image_and_leaves_with_the_network() -> None:
    subject = tiny()
    choice = {"memory_format": "channels_last", "window_shape": (1, 1, 16, 16, 16)}
    runner = accelerate(subject, **choice)
    assert accelerate(subject, **choice) is runner
    assert accelerate(subject, **{**choice, "window_shape": (1, 1, 24, 16, 16)}) is not runner
    gone = weakref.ref(subject)
    del subject, runner
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("backend", ["torch", *ENGINES])
def test_a_metatensor_comes_out_as_a_tensor(backend) -> None:
    seen: list[type] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(type(x))
            return 2 * x

    windows = MetaTensor(noise(1, 1, 16, 16, 16))
    result = accelerate(Spy().eval(), backend=backend, window_shape=windows.shape)(windows)
    assert type(result) is Tensor
    assert MetaTensor not in seen
    assert torch.equal(result, 2 * windows.as_tensor())


def test_torch_passes_further_arguments_and_other_outputs_on() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, factor: float = 1.0) -> list[Tensor]:
            return [x, factor * x]

    windows = noise(1, 1, 16, 16, 16)
    found = accelerate(Two(), window_shape=windows.shape)(windows, factor=3.0)
    assert torch.equal(found[1], 3 * windows)


def test_results_can_be_changed_in_place() -> None:
    windows = noise(1, 1, 16, 16, 16)
    result = accelerate(tiny(), window_shape=windows.shape)(windows)
    expected = result + 1
    assert torch.equal(result.add_(1), expected)
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backend": "openvno"}, "Did you mean 'openvino'"),
        ({"backend": "tensorrt"}, "'onnxruntime'"),
        ({"precision": "bf16"}, "'bfloat16'"),
        ({"memory_format": "channel_last"}, "Did you mean 'channels_last'"),
        ({"precision": "float16"}, "CUDA"),
        ({"backend": "onnxruntime", "precision": "bfloat16"}, "supports float32 only"),
        ({"backend": "openvino", "device": "cuda:0"}, "runs on the CPU"),
        ({"window_shape": (1, 16, 16)}, "2 or 3 spatial axes"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused(options, told) -> None:
    with pytest.raises(RequestError, match=told):
        accelerate(tiny(), **{"window_shape": (1, 1, 16, 16, 16), **options})


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_network_in_training_mode_is_not_frozen(backend) -> None:
    with pytest.raises(RequestError, match=r"network\.eval\(\)"):
        accelerate(tiny().train(), backend=backend, window_shape=(1, 1, 16, 16, 16))


@pytest.mark.parametrize(
    ("backend", "package", "extra"), [("openvino", "openvino", "openvino"), ("onnxruntime", "onnxruntime", "onnx")]
)
def test_a_missing_package_is_named_with_its_extra(backend, package, extra, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RequestError, match=rf'pip install "medseg\[{extra}\]"'):
        accelerate(tiny(), backend=backend, window_shape=(1, 1, 16, 16, 16))


@pytest.mark.parametrize("backend", ENGINES)
def test_a_network_that_cannot_be_exported_is_named_with_the_reason(backend) -> None:
    class Undecided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(RequestError, match=r"Undecided cannot be exported .* backend='torch'") as caught:
        accelerate(Undecided().eval(), backend=backend, window_shape=(1, 1, 16, 16, 16))
    assert "\n" not in str(caught.value)


def test_windows_of_another_size_are_refused_by_an_engine() -> None:
    pytest.importorskip("openvino", reason="needs openvino")
    runner = accelerate(tiny(), backend="openvino", window_shape=(1, 1, 16, 16, 16))
    with pytest.raises(SizeError, match="24, 16, 16"):
        runner(noise(1, 1, 24, 16, 16))


def test_reused_memory_costs_no_page_faults_and_goes_back_at_the_end(monkeypatch) -> None:
    resource = pytest.importorskip("resource", reason="needs a Unix")
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)

    # More than what earlier tests may have left free in the heap.
    size = 512 << 20

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            torch.ones(size, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    fresh, start = faults(), resident_bytes()
    with reuse_memory():
        with reuse_memory():
            faults()
        # One of the three may find that something small has settled where it was.
        assert faults() < fresh / 2, "the end of an inner block ends the outer one"
        held = resident_bytes()
    assert held - start > size / 2
    assert held - resident_bytes() > size / 2
