"""Export of a bundle's network for other runtimes: TorchScript, ONNX, torch.export, OpenVINO.

Only the network is exported, from a resampled and normalized image to logits. The preprocessing is described in the
file's metadata if the format has any. Every file is read back and compared with the network before it gets its final
name.
"""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import find_bundle
from medseg.bundle.compose import nearest
from medseg.bundle.knobs import knobs
from medseg.bundle.trust import require_trust
from medseg.errors import BundleError, MedsegError, OutputError, RequestError, SizeError, WeightsError, in_a_line
from medseg.extras import advice
from medseg.files import check_folder, sha256_file
from medseg.tools.export_formats import FORMATS, READERS, WRITERS, Shapes, missing_packages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from medseg.bundle.catalog import Bundle
    from medseg.bundle.compose import Config
    from medseg.tools.export_formats import Run

__all__ = ["TOLERANCE", "Difference", "ExportResult", "export"]

# Largest accepted difference without and with half precision, relative to max(1, largest logit).
TOLERANCE: Final = {False: 1e-4, True: 3e-2}
# Longest side of the traced image, if the network can be exported for any size.
_SIDE: Final = {2: 128, 3: 48}
_NOTED: Final = ("spacing", "microns_per_pixel", "orientation", "intensity_range", "roi_size", "overlap")


@dataclass(frozen=True)
class Difference:
    """Difference of an exported network from the original network on one random input.

    Attributes:
        shape: Shape of the input, `(B, C, *spatial)`.
        difference: Largest absolute difference of two logits.
        largest: Largest absolute logit of the original network.
        changed: Fraction of voxels whose label changes.
    """

    shape: tuple[int, ...]
    difference: float
    largest: float
    changed: float

    @property
    def relative(self) -> float:
        """The difference relative to max(1, largest logit)."""
        return self.difference / max(1.0, self.largest)


@dataclass(frozen=True)
class ExportResult:
    """Result of `export`.

    Attributes:
        path: Exported file; the weights of OpenVINO are beside it as `.bin`.
        free: Dynamic axes of the input: "batch and size", "batch", or "" for none.
        differences: Differences from the network on two random inputs.
        tolerance: Largest accepted difference, relative to max(1, largest logit).
    """

    path: Path
    free: str
    differences: tuple[Difference, ...]
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {**asdict(self), "path": str(self.path), "bytes": self.bytes}

    @property
    def bytes(self) -> int:
        """Size of the exported files in bytes."""
        weights = self.path.with_suffix(".bin")
        files = [self.path, *([weights] if self.path.suffix == ".xml" and weights.is_file() else [])]
        return sum(file.stat().st_size for file in files)


def export(
    bundle: str | Path | Bundle,
    file_format: str,
    output: str | Path,
    *,
    half: bool = False,
    random: bool = False,
    tolerance: float | None = None,
    trust: str | None = None,
) -> ExportResult:
    """Export a bundle's network for another runtime, and compare both on random images of two sizes.

    Args:
        bundle: Folder of a bundle, or name of a shipped one.
        file_format: Format of the file: "ts" (TorchScript), "onnx", "pt2" (torch.export) or "openvino".
        output: File to write, atomically; an existing one is replaced.
        half: Whether weights and arithmetic are float16, not for OpenVINO; input and output stay float32.
        random: Whether to export the network with random weights, for a bundle without weights.
        tolerance: Largest accepted difference of the logits, relative to max(1, largest logit); by default 1e-4, or
            3e-2 with `half`.
        trust: SHA-256 of a bundle that contains executable code, to confirm that you trust it.

    Returns:
        File, dynamic axes, and differences from the network.

    Raises:
        RequestError: Unknown format, missing package, network not supported by the format, or differences above the
            tolerance.
        WeightsError: The bundle has no weights.
        BundleError: The bundle is incomplete or not trusted.
    """
    if half and file_format == "openvino":
        raise RequestError(
            "OpenVINO selects its precision when the file is loaded (INFERENCE_PRECISION_HINT): remove --half"
        )
    found, target = find_bundle(bundle), Path(output)
    config = _checked(found, file_format, target, random=random, trust=trust)
    allowed = TOLERANCE[half] if tolerance is None else tolerance
    from medseg.inferers.engines import quiet

    with quiet(), tempfile.TemporaryDirectory(prefix=".partial-", dir=target.absolute().parent) as folder:
        network, shapes = _built(found, config, random=random)
        form = _half(network) if half else network
        written = Path(folder, target.name)
        try:
            free = WRITERS[file_format](form, shapes, written, _notes(found, config), half)
            run = READERS[file_format](written)
            differences = tuple(_compared(network, run, shape) for shape in _inputs(shapes, free))
        except MedsegError:
            raise
        except Exception as error:
            raise RequestError(
                f"{type(network).__name__} of bundle '{found.name}' cannot be exported as {file_format}"
                f"{' with half precision' if half else ''}: {in_a_line(error)}"
            ) from error
        _check_same(differences, allowed, target, half=half)
        _move(Path(folder), target)
    return ExportResult(target, free, differences, allowed)


# The request


def _checked(bundle: Bundle, file_format: str, target: Path, *, random: bool, trust: str | None) -> Config:
    """Check the request without importing torch, and return the config of the network."""
    if file_format not in FORMATS:
        raise RequestError(f"unknown export format '{file_format}'{nearest(file_format, FORMATS)}")
    suffix, _ = FORMATS[file_format]
    if target.suffix != suffix:
        raise RequestError(f"'{target}' must end in {suffix}, as files of format {file_format} do")
    if missing := missing_packages(file_format):
        raise RequestError(
            f"format {file_format} needs {', '.join(missing)}: {advice(missing[0])}",
            code="missing-package",
            package=missing[0],
        )
    configs = bundle.load_configs("inference")
    require_trust(bundle.root, configs, trust)
    if not random and not bundle.weights.is_file():
        raise WeightsError(
            f"no weights at '{bundle.weights}': run `medseg train` first, or give --random to export the network with "
            "random weights"
        )
    check_folder(target.absolute().parent)
    return {**configs["inference.json"], "bundle_root": str(bundle.root)}


def _built(bundle: Bundle, config: Config, *, random: bool) -> tuple[nn.Module, Shapes]:
    try:
        network = _network(bundle, config, random=random)
        return network, _shapes(network, bundle, config)
    except MedsegError:
        raise
    except Exception as error:
        causes = dict.fromkeys((in_a_line(error), in_a_line(error.__cause__ or error)))
        raise BundleError(
            f"cannot build and run the network of bundle '{bundle.root}' with its configs and metadata: "
            f"{'; '.join(causes)}. See `medseg bundle check`"
        ) from error


def _network(bundle: Bundle, config: Config, *, random: bool) -> nn.Module:
    import torch
    from monai.bundle import ConfigParser

    from medseg.jobs.config_functions import load_weights

    torch.manual_seed(0)
    network: nn.Module = ConfigParser(dict(config)).get_parsed_content("network_def")
    if not random:
        load_weights(network, str(bundle.weights), str(bundle.root))
    return network.eval()


def _shapes(network: nn.Module, bundle: Bundle, config: Config) -> Shapes:
    """Return inputs of two sizes, small ones if the network accepts them."""
    image = bundle.metadata["network_data_format"]["inputs"]["image"]
    channels, listed = image["num_channels"], config.get("roi_size", image["spatial_shape"])
    side = _SIDE[3 if len(listed) == 3 else 2]
    window = [n if isinstance(n, int) else side for n in listed]
    small = [min(n, side) for n in window]
    changes = [(3, -2, 1), (16, 0, 16), (16, 16, 16), (32, 32, 32)]
    for start in (small, window):
        if _takes(network, (2, channels, *start)):
            others = [[n + c for n, c in zip(start, change, strict=False)] for change in changes]
            fits = next((o for o in others if _takes(network, (1, channels, *o))), start)
            return Shapes((2, channels, *start), (1, channels, *fits), (1, channels, *window))
    raise RequestError(
        f"{type(network).__name__} of bundle '{bundle.name}' does not accept an image of {window} voxels"
    )


def _takes(network: nn.Module, shape: tuple[int, ...]) -> bool:
    import torch

    try:
        with torch.no_grad():
            network(torch.zeros(shape))
    except SizeError:
        return False
    return True


def _half(network: nn.Module) -> nn.Module:
    """Return a copy that computes in half precision, with float32 input and output."""
    from torch import nn

    class Half(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        # Without annotations, which TorchScript would resolve in this module, it assumes a tensor.
        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.network(x.half()).float()

    return Half(copy.deepcopy(network).half()).eval()


# Metadata of the file


def _notes(bundle: Bundle, config: Config) -> dict[str, str]:
    """Return the metadata for users of the file, each entry as JSON text."""
    metadata = bundle.metadata
    data = metadata["network_data_format"]
    values = knobs(dict(config))
    summary: Config = {
        "name": bundle.name,
        "version": metadata.get("version"),
        "description": metadata.get("description"),
        "channels": data["inputs"]["image"].get("channel_def"),
        "labels": data["outputs"]["pred"].get("channel_def"),
        "output": "logits",
        **{name: values[name] for name in _NOTED if name in values},
        "weights_sha256": sha256_file(bundle.weights) if bundle.weights.is_file() else None,
    }
    texts: dict[str, Config] = {
        "medseg.json": summary,
        "metadata.json": metadata,
        "inference.json": config | {"bundle_root": "."},
    }
    return {name: json.dumps(content) for name, content in texts.items()}


# The comparison


def _inputs(shapes: Shapes, free: str) -> Sequence[tuple[int, ...]]:
    """Return the shapes for the comparison: two sizes if dynamic, else two batch sizes or the same shape."""
    if free == "batch and size":
        return shapes.example, shapes.other
    return ((2, *shapes.window[1:]) if free else shapes.window), shapes.window


def _compared(network: nn.Module, run: Run, shape: tuple[int, ...]) -> Difference:
    import torch

    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    with torch.no_grad():
        expected, found = network(x), run(x)
    if expected.shape != found.shape:
        raise RequestError(
            f"the exported network returns {tuple(found.shape)} for {shape}, expected {tuple(expected.shape)}"
        )
    labels = [y.argmax(1) if y.shape[1] > 1 else y > 0 for y in (expected, found)]
    return Difference(
        shape,
        float((expected - found).abs().max()),
        float(expected.abs().max()),
        float((labels[0] != labels[1]).float().mean()),
    )


def _check_same(found: Sequence[Difference], tolerance: float, target: Path, *, half: bool) -> None:
    for one in found:
        # Not `>`, so that NaN is refused.
        if not one.relative <= tolerance:
            raise RequestError(
                f"'{target}' was not written: on a random image of {'x'.join(map(str, one.shape))} its logits differ "
                f"from the network's by up to {one.difference:.1e} (logits up to {one.largest:.1f}), above the "
                f"tolerance of {tolerance:g} of the largest. {'Remove --half' if half else 'Use another format'}, or "
                "increase --tolerance"
            )


# Small helpers


def _move(folder: Path, target: Path) -> None:
    """Move the files to the target folder, the weights of OpenVINO before the file that refers to them."""
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.suffix == target.suffix):
            path.replace(target.with_name(path.name))
    except OSError as error:
        raise OutputError(f"cannot write '{target}': {error.strerror or error}") from error
