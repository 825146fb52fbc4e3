"""Networks as files for other programs: each file is opened by the program it is for, and must give the same logits."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.bundle.catalog import Bundle
from medseg.errors import BundleError, RequestError, UntrustedBundleError, WeightsError
from medseg.inferers.engines import openvino_core
from medseg.networks import NETWORKS, small
from medseg.tools import export as exporting
from medseg.tools import export_formats as formats
from medseg.tools.export import ExportResult, export
from medseg.tools.export_formats import FORMATS
from tests.networks.forms import tiny_options

NAMES = list(NETWORKS)
EVERY = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            any(importlib.util.find_spec(package) is None for package in packages), reason=f"needs {packages}"
        ),
    )
    for name, (_, packages) in FORMATS.items()
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _target(folder: Path, file_format: str) -> Path:
    return folder / f"network{FORMATS[file_format][0]}"


def _logits(bundle: Bundle, x: torch.Tensor) -> torch.Tensor:
    """Return what the bundle's network says, by MONAI alone."""
    from monai.bundle import ConfigParser

    config = json.loads(bundle.config_path("inference").read_text())
    network = ConfigParser(config).get_parsed_content("network_def")
    network.load_state_dict(torch.load(bundle.weights, weights_only=True))
    with torch.no_grad():
        return network.eval()(x)


def _source(source: dict[str, Any], name: str, dims: int, **changes: Any) -> dict[str, Any]:
    """Put a network into the tiny bundle's source, for volumes or pictures."""
    source = copy.deepcopy(source)
    definition = {"spatial_dims": dims, "in_channels": 1, "out_channels": 3, **tiny_options(name, dims, **changes)}
    source["network_def"] = {"_target_": f"medseg.components.{name}", **definition}
    if dims == 2:
        source.update(template="grey_image", name="balls_gray_unet")
        source["knobs"] = {"patch_size": [48, 64], "roi_size": [48, 64]}
    return source


@pytest.fixture(scope="module")
def exported(trained: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ExportResult]:
    """Return a function that exports the trained bundle to a format, once, alone in a folder that was not there."""
    finished: dict[str, ExportResult] = {}

    def once(file_format: str) -> ExportResult:
        if file_format not in finished:
            target = _target(tmp_path_factory.mktemp("exported") / "deeper" / "still", file_format)
            finished[file_format] = export(trained, file_format, target)
            assert finished[file_format].path == target
        return finished[file_format]

    return once


@pytest.mark.parametrize("file_format", EVERY)
def test_the_file_gives_the_logits_of_the_bundle_at_any_size(
    file_format: str, trained: Bundle, exported: Callable[[str], ExportResult]
) -> None:
    done = exported(file_format)
    target = done.path
    assert done.free == "batch and size"
    assert len({one.shape for one in done.differences}) == 2
    run = formats.READERS[file_format](target)
    for shape in ((1, 1, 16, 24, 24), (3, 1, 21, 32, 17)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            torch.testing.assert_close(run(x), _logits(trained, x), atol=1e-4, rtol=1e-4)
    assert sorted(path.suffix for path in target.parent.iterdir()) == sorted(
        {"openvino": [".bin", ".xml"]}.get(file_format, [target.suffix])
    )


@pytest.fixture(scope="module")
def programs() -> dict[tuple[str, int], Any]:
    """What torch made of each network on the way to a format."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("file_format", EVERY)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_every_network_is_exported_to_every_format(
    name: str,
    dims: int,
    file_format: str,
    make_bundle: Any,
    tiny_source: dict[str, Any],
    programs: dict[tuple[str, int], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def once(*arguments: Any) -> Any:
        if (name, dims) not in programs:
            programs[name, dims] = real(*arguments)
        return programs[name, dims]

    real, openvino = formats._program, file_format == "openvino"
    if not openvino:  # which is given a network with other norms
        monkeypatch.setattr(formats, "_program", once)
    bundle = make_bundle(_source(tiny_source, name, dims, **({"norm": small(name, dims)["norm"]} if openvino else {})))
    done = export(bundle, file_format, _target(tmp_path, file_format), random=True)
    assert done.free == "batch and size"
    for one in done.differences:
        assert one.difference <= (1e-4 if openvino else 1e-5) * max(1.0, one.largest)
        assert one.largest > 0


def test_a_pruned_network_and_one_without_padding_are_exported(
    make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path
) -> None:
    pruned = _source(tiny_source, "UNetPlusPlus", 2, output_mode="head", head=1)
    done = export(make_bundle(pruned), "ts", tmp_path / "pruned.ts", random=True)
    assert done.free == "batch and size"
    valid = _source(tiny_source, "UNet", 2, features=[4, 8, 8], padding="valid")
    valid["knobs"] = {"roi_size": [60, 76]}
    done = export(make_bundle(valid), "pt2", tmp_path / "valid.pt2", random=True)
    assert all(one.difference < 1e-4 for one in done.differences)


def test_what_a_user_of_the_file_must_know_is_in_the_file(
    trained: Bundle, exported: Callable[[str], ExportResult]
) -> None:
    found = {"medseg.json": "", "metadata.json": "", "inference.json": ""}
    torch.jit.load(str(exported("ts").path), _extra_files=found)
    notes = json.loads(found["medseg.json"])
    assert notes["labels"] == {"0": "background", "1": "small", "2": "large"}
    assert notes["spacing"] == [2.0, 2.0, 2.0]
    assert notes["orientation"] == "RAS"
    assert notes["weights_sha256"] == trained.metadata["weights"]["models/model.pt"]["sha256"]
    assert json.loads(found["metadata.json"]) == trained.metadata
    assert json.loads(found["inference.json"])["network_def"]["_target_"] == "medseg.components.UNet"

    found = {"medseg.json": "", "metadata.json": "", "inference.json": ""}
    torch.export.load(exported("pt2").path, extra_files=found)
    assert json.loads(found["medseg.json"]) == notes


def test_onnx_holds_the_notes_and_no_path_of_this_machine(exported: Callable[[str], ExportResult]) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    path = exported("onnx").path
    model = onnx.load(path)
    onnx.checker.check_model(model)
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(notes["medseg.json"])["labels"]["2"] == "large"
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["image", "pred"]
    content = path.read_bytes()
    assert str(Path(exporting.__file__).parents[2]).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_openvino_holds_the_notes(exported: Callable[[str], ExportResult]) -> None:
    pytest.importorskip("openvino", reason="needs openvino")
    model = openvino_core().read_model(exported("openvino").path)
    notes = json.loads(model.get_rt_info(["medseg", "medseg"]).astype(str))
    assert notes["labels"]["1"] == "small"


@pytest.mark.parametrize("file_format", EVERY[:3])
def test_half_precision_makes_a_smaller_file_with_nearly_the_same_logits(
    file_format: str, trained: Bundle, exported: Callable[[str], ExportResult], tmp_path: Path
) -> None:
    whole = exported(file_format)
    done = export(trained, file_format, _target(tmp_path, file_format), half=True)
    for each in (whole, done):
        run = formats.READERS[file_format](each.path)
        with torch.no_grad():
            assert run(torch.zeros(1, 1, 16, 24, 24)).dtype == torch.float32
    assert done.path.stat().st_size < whole.path.stat().st_size
    assert (
        0
        < max(one.difference for one in done.differences)
        <= 3e-2 * max(1.0, *(one.largest for one in done.differences))
    )


def test_a_network_that_differs_is_not_written(
    trained: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(path: Path) -> Any:
        run = real(path)
        return lambda x: run(x) + 0.01

    real = formats.READERS["ts"]
    monkeypatch.setitem(formats.READERS, "ts", wrong)
    target = tmp_path / "n.ts"
    target.write_text("before")
    with pytest.raises(RequestError, match=r"was not written.*differ.*1\.0e-02"):
        export(trained, "ts", target)
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["n.ts"]
    assert export(trained, "ts", target, tolerance=0.5).tolerance == 0.5
    assert target.read_bytes() != b"before"


def test_a_network_that_gives_no_numbers_is_not_written(
    trained: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        formats.READERS, "ts", lambda path: lambda x: torch.full((*x.shape[:1], 3, *x.shape[2:]), np.nan)
    )
    with pytest.raises(RequestError, match="was not written"):
        export(trained, "ts", tmp_path / "n.ts", tolerance=1e9)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_exported_gives_one_message_and_no_file(
    trained: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> str:
        raise ValueError("no such operator\nand a long story")

    monkeypatch.setitem(formats.WRITERS, "onnx", broken)
    monkeypatch.setattr(exporting, "missing_packages", lambda name: ())
    with pytest.raises(
        RequestError, match=r"UNet of bundle 'balls_mri_unet' cannot be exported as onnx.*no such"
    ) as caught:
        export(trained, "onnx", tmp_path / "n.onnx")
    assert "story" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        ("inference", {"network_def": 3}, "no attribute 'state_dict'"),
        ("inference", {"network_def": {"_target_": "medseg.components.UNet", "width": 3}}, "argument 'width'"),
        ("metadata", {"network_data_format": []}, "list indices"),
        ("metadata", {"network_data_format": {}}, "inputs"),
    ],
)
def test_a_bundle_whose_network_cannot_be_built_is_told_so(
    config: str, changes: dict[str, Any], said: str, trained_copy: Bundle, tmp_path: Path
) -> None:
    path = trained_copy.config_path(config)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match=f"cannot build and run.*{said}"):
        export(trained_copy, "ts", tmp_path / "out" / "n.ts")
    assert list((tmp_path / "out").iterdir()) == []


def test_requests_that_cannot_be_are_refused_before_torch_is_needed(
    trained_copy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_network", None)
    with pytest.raises(RequestError, match="remove --half"):
        export(trained_copy, "openvino", tmp_path / "n.xml", half=True)
    with pytest.raises(RequestError, match="did you mean 'onnx'"):
        export(trained_copy, "onx", tmp_path / "n.onnx")
    with pytest.raises(RequestError, match=r"must end in \.pt2"):
        export(trained_copy, "pt2", tmp_path / "n.pt")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "missing_packages", lambda name: ("onnxscript",))
        with pytest.raises(RequestError, match=r'onnxscript: pip install "medseg\[onnx\]"'):
            export(trained_copy, "onnx", tmp_path / "n.onnx")
    trained_copy.weights.unlink()
    with pytest.raises(WeightsError, match="--random"):
        export(trained_copy, "ts", tmp_path / "n.ts")
    with pytest.raises(BundleError, match="--trust"):
        export(trained_copy, "ts", tmp_path / "n.ts", random=True, trust="0" * 64)
    path = trained_copy.config_path("inference")
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"network_def": {"_target_": "os.system", "command": "x"}})
    )
    with pytest.raises(UntrustedBundleError, match=r"os\.system"):
        export(trained_copy, "ts", tmp_path / "n.ts", random=True)
    assert [path.name for path in tmp_path.iterdir()] == [trained_copy.name]


def test_altered_weights_are_not_exported(trained_copy: Bundle, tmp_path: Path) -> None:
    torch.save(torch.nn.Conv3d(1, 3, 3).state_dict(), trained_copy.weights)
    with pytest.raises(WeightsError, match="altered"):
        export(trained_copy, "ts", tmp_path / "n.ts")


# MONAI's own commands


def _monai(elsewhere: Path, command: str, bundle: Bundle, **options: object) -> None:
    """Run one of MONAI's export commands from a folder that has nothing to do with the bundle."""
    elsewhere.mkdir()
    given = {
        "net_id": "network_def",
        "ckpt_file": bundle.weights,
        "meta_file": bundle.config_path("metadata"),
        "config_file": bundle.config_path("inference"),
        "bundle_root": bundle.root,
        **options,
    }
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", command, *arguments],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(elsewhere.iterdir()) == []


def test_monais_ckpt_export_takes_the_bundle_from_any_folder(trained: Bundle, tmp_path: Path) -> None:
    _monai(tmp_path / "x", "ckpt_export", trained, filepath=tmp_path / "n.ts")
    x = torch.randn(1, 1, 16, 24, 24, generator=torch.Generator().manual_seed(3))
    torch.save(x, tmp_path / "x.pt")
    # In a process that knows nothing of medseg
    code = (
        "import json, sys, torch; from monai.data import load_net_with_metadata as load; "
        "network, metadata, extra = load(sys.argv[1], more_extra_files=['inference.json']); "
        "torch.save(network(torch.load(sys.argv[2])).detach(), sys.argv[3]); "
        "print('FOUND' + json.dumps([metadata, json.loads(extra['inference.json'])]))"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("n.ts", "x.pt", "y.pt"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    metadata, inference = json.loads(done.stdout.partition("FOUND")[2])
    assert metadata["network_data_format"] == trained.metadata["network_data_format"]
    assert "network_def" in inference
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), _logits(trained, x))


def test_monais_loader_reads_our_torchscript(trained: Bundle, exported: Callable[[str], ExportResult]) -> None:
    from monai.data import load_net_with_metadata

    network, metadata, _ = load_net_with_metadata(str(exported("ts").path))
    assert metadata["name"] == trained.metadata["name"]
    x = torch.randn(2, 1, 17, 24, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(network(x), _logits(trained, x))


def test_monais_onnx_export_takes_the_bundle_from_any_folder(trained: Bundle, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    _monai(tmp_path / "x", "onnx_export", trained, filepath=tmp_path / "n.onnx", input_shape="[1,1,16,24,24]")
    session = runtime.InferenceSession(tmp_path / "n.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(1, 1, 16, 24, 24, generator=torch.Generator().manual_seed(3))
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(found, _logits(trained, x), atol=1e-4, rtol=1e-4)
