"""Streaming sliding window inference: the windows and blending of MONAI, with labels in native space."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import monai.inferers
import torch
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map
from monai.utils import convert_to_dst_type

from medseg.errors import CaseError, RequestError, SizeError
from medseg.inferers.blend import Place, Slab, TensorWindows, cut_windows, in_batches, per_axis, stream
from medseg.inferers.foreground import windows_with_foreground
from medseg.inferers.native import NativeResult
from medseg.inferers.window_runner import Forecast, Network, NotStreamableError, WindowRunner, no_room_for_a_window
from medseg.machine import parse_memory, reuse_memory
from medseg.notices import warn

__all__ = ["SlidingWindowInferer"]

logger = logging.getLogger(__name__)


class SlidingWindowInferer(monai.inferers.SlidingWindowInferer):  # type: ignore[misc]  # MONAI publishes no types
    """MONAI's `SlidingWindowInferer` with accumulators for a slab instead of the whole volume.

    The arguments of MONAI's class keep their order and meaning; the keyword arguments are additional. With
    `output="logits"` the result equals that of MONAI. With other outputs, activation, resampling to native space and
    arg max run slab by slab during inference, and memory holds only the image, the slab and the result; no
    `Activationsd`, `Invertd` or `AsDiscreted` is needed afterwards.

    Calls that cannot be streamed (networks with several outputs or a different output size, `condition`, `with_coord`)
    are passed to MONAI's class. `buffer_steps` and `buffer_dim` are ignored.

    Args:
        roi_size: Size of a window in voxels; 0 or less for the whole axis.
        sw_batch_size: Maximum number of windows per forward pass.
        overlap: Overlap between adjacent windows as a fraction of the window, in [0, 1).
        mode: Importance map of a window, "constant" or "gaussian".
        sigma_scale: Standard deviation of the Gaussian as a fraction of the window size.
        padding_mode: Padding of axes shorter than a window, a mode of `torch.nn.functional.pad`.
        cval: Value of constant padding.
        sw_device: Device of the network; by default that of the image.
        device: Device of the returned logits; by default that of the image.
        progress: Whether to show the progress bar of MONAI.
        cache_roi_weight_map: Ignored; the importance map is always cached.
        cpu_thresh: Number of voxels above which logits are returned on the CPU.
        buffer_steps: Ignored.
        buffer_dim: Ignored.
        with_coord: Whether to pass the coordinates of the windows to the network.
        output: "logits" in model space; "labels" in native space (`(B, 1, ...)` for softmax, one 0/1 channel per class
            for sigmoid), uint8 up to 256 classes; or probabilities in native space as "uint8" (0..255), "float16" or
            "float32".
        activation: "softmax", "sigmoid", or "none" to interpolate and compare logits.
        threshold: Probability threshold of sigmoid labels.
        max_memory: Memory limit of the process, such as "2G". The number of windows per pass is reduced to meet it; an
            image that does not fit is rejected before inference. Empty for no limit.
        foreground: Intensity threshold of the foreground. Only windows with a voxel above it are run, within the
            bounding box of the foreground; all other voxels are background. This moves the windows, so results differ
            slightly. None runs all windows.
        backend: Inference backend: None calls the network directly; "torch", "compile", "openvino" and "onnxruntime"
            are faster for windows of a fixed size and equal up to rounding (see `medseg.inferers.backends`).
        precision: Precision of the backend: "float32", "bfloat16", or "float16" on CUDA.
        memory_format: Memory format in the backend: "contiguous" or "channels_last".

    Attributes:
        on_progress: Callback after each forward pass, called with (windows done, total windows).
        on_forecast: Callback after the first forward pass of each image, called with a `Forecast`.

    Raises:
        RequestError: Unknown choice; precision or memory_format without a backend; or a preprocessing that cannot be
            inverted (see `find_grid_mapping`).
    """

    on_progress: Callable[[int, int], None] | None = None
    on_forecast: Callable[[Forecast], None] | None = None

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        sw_batch_size: int = 1,
        overlap: Sequence[float] | float = 0.25,
        mode: str = "constant",
        sigma_scale: Sequence[float] | float = 0.125,
        padding_mode: str = "constant",
        cval: float = 0.0,
        sw_device: torch.device | str | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        cache_roi_weight_map: bool = False,
        cpu_thresh: int | None = None,
        buffer_steps: int | None = None,
        buffer_dim: int = -1,
        with_coord: bool = False,
        *,
        output: str = "logits",
        activation: str = "softmax",
        threshold: float = 0.5,
        max_memory: str | int = "",
        foreground: float | None = None,
        backend: str | None = None,
        precision: str = "float32",
        memory_format: str = "contiguous",
    ) -> None:
        super().__init__(
            roi_size,
            sw_batch_size,
            overlap,
            mode,
            sigma_scale,
            padding_mode,
            cval,
            sw_device,
            device,
            progress,
            False,
            cpu_thresh,
            buffer_steps,
            buffer_dim,
            with_coord,
        )
        if foreground is not None and output == "logits":
            raise RequestError("'foreground' skips voxels, which then have no logits: set output to 'labels'")
        if backend is None and (precision, memory_format) != ("float32", "contiguous"):
            raise RequestError("precision and memory_format require a backend: set backend to 'torch'")
        self.output = output
        self.native = NativeResult(output, activation, threshold)
        self.max_memory = parse_memory(max_memory)
        self.foreground = foreground
        self.backend = backend
        self.precision = precision
        self.memory_format = memory_format
        self._weights: dict[tuple[object, ...], torch.Tensor] = {}

    def __call__(self, inputs: torch.Tensor, network: Network, *args: Any, **kwargs: Any) -> Any:
        """Return the result for images `(B, in_channels, *spatial)`, a `MetaTensor` if `inputs` is one.

        Raises:
            CaseError: Non-finite logits; an image that does not fit into `max_memory` or the GPU memory; or an image
                too small for the network, where a window spans the image.
            RequestError: `roi_size` or `overlap` do not match the axes of the image.
        """
        if self.with_coord or "condition" in kwargs:
            return self._by_monai(inputs, network, args, kwargs)
        try:
            return _Run(self, inputs, network, args, kwargs).result()
        except SizeError as error:
            if all((size or 0) > 0 for size in per_axis(self.roi_size, inputs.ndim - 2)):
                raise
            raise CaseError(str(error)) from error  # the window size is that of the image
        except NotStreamableError as error:
            if self.output != "logits":
                raise RequestError(f"{error}; only output 'logits' is supported for it") from None
            return self._by_monai(inputs, network, args, kwargs)

    def _by_monai(self, inputs: torch.Tensor, network: Network, args: Any, kwargs: Any) -> Any:
        return super().__call__(inputs, network, *args, **kwargs)

    def weights(self, roi: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the importance map `(*roi)` of a window, cached for windows of one size."""
        key = (roi, dtype, device)
        if key not in self._weights:
            own = compute_importance_map(roi, mode=self.mode, sigma_scale=self.sigma_scale, device=device, dtype=dtype)
            # Keep only the latest: where a window spans the image, each image needs a map of its own size.
            self._weights = {key: own}
        return self._weights[key]


class _Run:
    """State of one call of the inferer."""

    def __init__(
        self, inferer: SlidingWindowInferer, inputs: torch.Tensor, network: Network, args: Any, kwargs: Any
    ) -> None:
        self.inferer = inferer
        self.inputs = inputs
        self.images = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        self.device = torch.device(kwargs.pop("device", None) or self._output_device())
        self.sw_device = torch.device(inferer.sw_device or self.images.device)
        for ignored in ("buffer_steps", "buffer_dim"):
            kwargs.pop(ignored, None)
        # Logits equal those of MONAI bit for bit only along axis 0; labels do not depend on the order of additions.
        axis = 0 if inferer.output == "logits" else None
        self.windows = cut_windows(self.images.shape[2:], inferer.roi_size, _overlap(inferer, self.images), axis=axis)
        self.places = self._places()
        self.passes = WindowRunner(
            inferer,
            network,
            self.windows,
            channels=self.images.shape[1],
            total=len(self.places),
            device=self.sw_device,
            result_bytes=self._result_bytes,
            args=args,
            kwargs=kwargs,
        )

    def result(self) -> Any:
        """Run all windows; if the accumulators do not fit in GPU memory, run again with the accumulators on the CPU."""
        if self.sw_device.type == "cpu":
            with reuse_memory():
                return self._result(None)
        try:
            return self._result(None)
        except torch.OutOfMemoryError:
            pass
        warn(logger, "gpu-fallback", "out of GPU memory; the accumulators are moved to the CPU", run=True)
        torch.cuda.empty_cache()
        try:
            return self._result(torch.device("cpu"))
        except torch.OutOfMemoryError as error:
            raise no_room_for_a_window(self.windows.roi) from error

    def _result(self, accumulators: torch.device | None) -> Any:
        slabs = self._slabs(accumulators)
        if self.inferer.output == "logits":
            return self._logits(slabs)
        return self.inferer.native.of(slabs, self.inputs, self.windows.axis)

    def _slabs(self, accumulators: torch.device | None) -> Iterator[Slab]:
        self.passes.done = 0
        source = TensorWindows(self.images, self.windows, self.inferer.padding_mode, self.inferer.cval)
        dtype = self.images.dtype if self.images.dtype == torch.float64 else torch.float32
        weights = self.inferer.weights(self.windows.roi, dtype, self.sw_device)
        if self.inferer.max_memory:
            self.passes.fit(source.read(*self.places[0]))
        batches = in_batches(self.places, self.passes.batch)
        return stream(source, self.windows, self.passes, weights=weights, batches=batches, device=accumulators)

    def _logits(self, slabs: Iterator[Slab]) -> Any:
        result: torch.Tensor | None = None
        for slab in slabs:
            if result is None:
                shape = (len(self.images), len(slab.logits), *self.images.shape[2:])
                result = torch.empty(shape, dtype=self.images.dtype, device=self.device)
            planes = slice(slab.start, slab.start + slab.logits.shape[1])
            result[slab.image].movedim(self.windows.axis + 1, 1)[:, planes] = slab.logits.to(self.device, result.dtype)
        if not isinstance(self.inputs, MetaTensor):
            return result
        like = MetaTensor([]).copy_meta_from(self.inputs, copy_attr=False)
        return convert_to_dst_type(result, like, device=self.device)[0]

    def _places(self) -> list[Place]:
        numbers = range(len(self.images))
        if self.inferer.foreground is None:
            return [(number, start) for number in numbers for start in self.windows.starts]
        return [
            (number, start)
            for number in numbers
            for start in windows_with_foreground(
                self.images[number], self.windows, _overlap(self.inferer, self.images), self.inferer.foreground
            )
        ]

    def _result_bytes(self, classes: int) -> int:
        if self.inferer.output == "logits":
            return 4 * classes * self.images[:, 0].numel()
        return self.inferer.native.size_in_bytes(self.inputs, classes)

    def _output_device(self) -> torch.device:
        if self.inferer.device is not None:
            return torch.device(self.inferer.device)
        limit = self.inferer.cpu_thresh
        too_large = limit is not None and self.images[0, 0].numel() > limit
        return torch.device("cpu") if too_large else self.images.device


def _overlap(inferer: SlidingWindowInferer, images: torch.Tensor) -> tuple[float, ...]:
    overlap = tuple(float(value or 0.0) for value in per_axis(inferer.overlap, images.ndim - 2))
    if any(not 0 <= value < 1 for value in overlap):
        raise RequestError(f"invalid overlap {inferer.overlap}; expected values in [0, 1).")
    return overlap
