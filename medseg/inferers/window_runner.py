"""Forward passes of sliding window inference: backend, memory limit, progress and forecast."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from monai.data import MetaTensor

from medseg.errors import CaseError, RequestError
from medseg.inferers.backends import accelerate
from medseg.inferers.blend import Windows
from medseg.machine import forget_peak, peak_bytes, resident_bytes, shown_bytes
from medseg.notices import warn

__all__ = [
    "Forecast",
    "Network",
    "NetworkProbe",
    "NotStreamableError",
    "WindowOptions",
    "WindowRunner",
    "fitting_batch",
    "no_room_for_a_window",
]

logger = logging.getLogger(__name__)

Network = Callable[..., Any]


@dataclass(frozen=True)
class Forecast:
    """Forecast of run time and memory for one image, from its first forward pass.

    Attributes:
        windows: Total number of windows.
        batch: Windows per forward pass.
        seconds: Run time of all windows, extrapolated from the first pass.
        peak_bytes: Peak memory of the process; 0 if the system does not report it.
    """

    windows: int
    batch: int
    seconds: float
    peak_bytes: int

    def describe(self) -> str:
        """Return the forecast as one line of text."""
        memory = f", memory up to about {shown_bytes(self.peak_bytes)}" if self.peak_bytes else ""
        return f"{self.windows} windows, {self.batch} at a time: about {_shown_seconds(self.seconds)}{memory}"


class NetworkProbe:
    """Measurement of the memory of a forward pass."""

    def __init__(self) -> None:
        self.before = resident_bytes()
        forget_peak()

    def used(self) -> int:
        """Return the peak increase of the process memory since the probe was created, in bytes."""
        return max(peak_bytes() - self.before, 0)


class WindowOptions(Protocol):
    """Settings of the forward passes, documented in `SlidingWindowInferer`."""

    sw_batch_size: int
    backend: str | None
    precision: str
    memory_format: str
    max_memory: int
    output: str
    on_progress: Callable[[int, int], None] | None
    on_forecast: Callable[[Forecast], None] | None


class NotStreamableError(Exception):
    """The network output is not a tensor of the window size."""


class WindowRunner:
    """Run a network on windows `(N, C, *roi)` and return logits `(N, K, *roi)`.

    If a batch does not fit in GPU memory, the batch size is halved for all further passes. The callbacks of the inferer
    are called after each pass.

    Args:
        inferer: Inferer whose backend, batch size, memory limit and callbacks are used.
        network: Network to run.
        windows: Positions of the windows.
        channels: Number of channels of a window.
        total: Total number of windows to run.
        device: Device of the network.
        result_bytes: Function from the number of classes to the memory of the result, in bytes.
        args: Additional positional arguments of the network.
        kwargs: Additional keyword arguments of the network.

    Raises:
        RequestError: Backend set for a callable that is not an `nn.Module`.
    """

    def __init__(
        self,
        inferer: WindowOptions,
        network: Network,
        windows: Windows,
        *,
        channels: int,
        total: int,
        device: torch.device,
        result_bytes: Callable[[int], int],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.inferer = inferer
        self.windows = windows
        self.total = total
        self.device = device
        self.batch = inferer.sw_batch_size
        self.done = 0
        self._result_bytes = result_bytes
        self._args, self._kwargs = args, kwargs or {}
        self._network = self._accelerated(network, channels)

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the logits of windows, and call the callbacks.

        Raises:
            NotStreamableError: The network does not return logits of the window size.
            torch.OutOfMemoryError: A single window does not fit in GPU memory.
        """
        probe = NetworkProbe() if self.done == 0 and self.inferer.on_forecast is not None else None
        started = time.perf_counter()
        logits = self._halving(windows.to(self.device))
        self.done += len(windows)
        if probe is not None and self.inferer.on_forecast is not None:
            self.inferer.on_forecast(self._forecast(logits, probe, time.perf_counter() - started))
        if self.inferer.on_progress is not None:
            self.inferer.on_progress(self.done, self.total)
        return logits

    def fit(self, window: torch.Tensor, *, read_ahead: int = 0) -> None:
        """Set the batch size to meet the memory limit of the inferer, after a trial with one window.

        Args:
            window: Window `(1, C, *roi)` of the trial.
            read_ahead: Memory of prefetched windows, in bytes.

        Raises:
            CaseError: A single window exceeds the limit.
        """
        probe = NetworkProbe()
        classes = self._run(window.to(self.device)).shape[1]
        self.batch = fitting_batch(
            self.inferer.max_memory,
            self.inferer.sw_batch_size,
            held=resident_bytes(),
            slab=self._slab_bytes(classes),
            result=self._result_bytes(classes) + read_ahead,
            window=probe.used(),
        )

    def _halving(self, windows: torch.Tensor) -> torch.Tensor:
        try:
            results = [self._run(part) for part in torch.split(windows, self.batch)]
        except torch.OutOfMemoryError:
            if self.batch == 1:
                raise
            self.batch = math.ceil(min(self.batch, len(windows)) / 2)
            warn(
                logger,
                "gpu-fallback",
                f"out of GPU memory; the batch size is reduced to {self.batch} windows",
                run=True,
            )
            torch.cuda.empty_cache()
            return self._halving(windows)
        return results[0] if len(results) == 1 else torch.cat(results)

    def _run(self, windows: torch.Tensor) -> torch.Tensor:
        logits = self._network(windows, *self._args, **self._kwargs)
        if isinstance(logits, (list, tuple)) and len(logits) == 1:
            logits = logits[0]
        if not isinstance(logits, torch.Tensor):
            raise NotStreamableError(f"the network returns a {type(logits).__name__} instead of a tensor")
        if logits.shape[2:] != windows.shape[2:]:
            sizes = f"{tuple(logits.shape)} for windows {tuple(windows.shape)}"
            raise NotStreamableError(f"the network returns {sizes}, a different spatial size")
        if logits.requires_grad and self.inferer.output == "logits":
            raise NotStreamableError("the logits require gradients")
        return (logits.as_tensor() if isinstance(logits, MetaTensor) else logits).detach()

    def _forecast(self, logits: torch.Tensor, probe: NetworkProbe, seconds: float) -> Forecast:
        classes = logits.shape[1]
        rest = self._slab_bytes(classes) + self._result_bytes(classes)
        peak = probe.before + probe.used() + rest if probe.before and self.device.type == "cpu" else 0
        return Forecast(self.total, self.batch, seconds * math.ceil(self.total / self.batch), peak)

    def _slab_bytes(self, classes: int) -> int:
        # One third more for the planes being resampled.
        return self.windows.slab_values(classes) * 4 * 4 // 3

    def _accelerated(self, network: Network, channels: int) -> Network:
        if self.inferer.backend is None:
            return network
        if not isinstance(network, torch.nn.Module):
            raise RequestError(f"a backend requires an nn.Module, found a {type(network).__name__}: remove 'backend'")
        run: Network = accelerate(
            network,
            backend=self.inferer.backend,
            precision=self.inferer.precision,
            memory_format=self.inferer.memory_format,
            window_shape=(self.batch, channels, *self.windows.roi),
            device=self.device,
        )
        return run


def no_room_for_a_window(roi: Sequence[int]) -> CaseError:
    """Return the error for a window that does not fit in GPU memory."""
    return CaseError(
        f"Out of GPU memory for a single window of {tuple(roi)}: choose a smaller roi_size, precision bfloat16, or the "
        "CPU.",
        code="memory",
        window=list(roi),
    )


def fitting_batch(limit: int, wanted: int, *, held: int, slab: int, result: int, window: int) -> int:
    """Return the largest batch size up to `wanted` that meets a memory limit.

    Args:
        limit: Memory limit of the process, in bytes.
        wanted: Requested number of windows per pass.
        held: Memory already in use by programs, weights and the image, in bytes.
        slab: Memory of the accumulators, in bytes.
        result: Memory of the result, in bytes.
        window: Memory of the forward pass of one window, in bytes.

    Raises:
        CaseError: A single window exceeds the limit; a smaller image may fit.
    """
    room = limit - held - slab - result
    batch = min(wanted, room // max(window, 1))
    if batch < 1:
        needed = held + slab + result + window
        raise CaseError(
            f"prediction needs {shown_bytes(needed)}, the limit is {shown_bytes(limit)} ({shown_bytes(held)} for "
            f"programs, weights and the image, {shown_bytes(slab)} for the slab, {shown_bytes(result)} for the result, "
            f"{shown_bytes(window)} for one window in the network): raise --max-memory, or choose a smaller roi_size",
            code="memory",
            limit=limit,
            held=held,
            expected=needed,
        )
    return batch


def _shown_seconds(seconds: float) -> str:
    return f"{math.ceil(seconds)} s" if seconds < 100 else f"{seconds / 60:.1f} min"
