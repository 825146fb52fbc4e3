"""The forward passes of a stream: through a back end, within the memory there is, and told about."""

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
    """What one image will take, known after its first windows.

    Attributes:
        windows: how many there are.
        batch: windows per forward pass.
        seconds: time for all of them, at the pace of the first pass.
        peak_bytes: memory of the process at its highest; 0 where the system does not tell.
    """

    windows: int
    batch: int
    seconds: float
    peak_bytes: int

    def describe(self) -> str:
        """Return the forecast as one line."""
        memory = f", memory up to about {shown_bytes(self.peak_bytes)}" if self.peak_bytes else ""
        return f"{self.windows} windows, {self.batch} at a time: about {_shown_seconds(self.seconds)}{memory}"


class NetworkProbe:
    """Measures how far a forward pass raises the memory of the process."""

    def __init__(self) -> None:
        self.before = resident_bytes()
        forget_peak()

    def used(self) -> int:
        """Return the bytes by which memory rose above its present state since the probe was made."""
        return max(peak_bytes() - self.before, 0)


class WindowOptions(Protocol):
    """What an inferer says of its forward passes; `SlidingWindowInferer` has the meaning of each."""

    sw_batch_size: int
    backend: str | None
    precision: str
    memory_format: str
    max_memory: int
    output: str
    on_progress: Callable[[int, int], None] | None
    on_forecast: Callable[[Forecast], None] | None


class NotStreamableError(Exception):
    """The network's output is no tensor of the windows' size."""


class WindowRunner:
    """Runs a network on windows; called with windows `(N, C, *roi)` it returns logits `(N, K, *roi)`.

    What does not fit into a GPU's memory runs in halves, then and from then on. After each pass the inferer's listeners
    are told.

    Args:
        inferer: its back end, windows per pass, limit of memory and listeners are used.
        network: what is run.
        windows: where the windows lie.
        channels: of a window.
        total: windows to run in all.
        device: where the network is.
        result_bytes: what the result takes in memory, by the number of classes.
        args: further arguments of the network.
        kwargs: further named arguments of the network.

    Raises:
        RequestError: a back end is asked for and the network is none that it can take.
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
        """Return the logits of windows, and tell the listeners.

        Raises:
            NotStreamableError: the network returns something else than logits of the windows' size.
            torch.OutOfMemoryError: a GPU does not hold one window.
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
        """Choose the windows per pass that keep to the inferer's limit of memory, after a trial with one window.

        Args:
            window: `(1, C, *roi)`.
            read_ahead: bytes that are read before they are due.

        Raises:
            CaseError: not even one window at a time fits.
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
            warn(logger, "gpu-fallback", f"the GPU's memory is full; {self.batch} windows run at a time", run=True)
            torch.cuda.empty_cache()
            return self._halving(windows)
        return results[0] if len(results) == 1 else torch.cat(results)

    def _run(self, windows: torch.Tensor) -> torch.Tensor:
        logits = self._network(windows, *self._args, **self._kwargs)
        if isinstance(logits, (list, tuple)) and len(logits) == 1:
            logits = logits[0]
        if not isinstance(logits, torch.Tensor):
            raise NotStreamableError(f"the network returns a {type(logits).__name__} instead of one tensor")
        if logits.shape[2:] != windows.shape[2:]:
            sizes = f"{tuple(logits.shape)} for windows {tuple(windows.shape)}"
            raise NotStreamableError(f"the network returns {sizes}, which is another size than that of its input")
        if logits.requires_grad and self.inferer.output == "logits":
            raise NotStreamableError("gradients are wanted")
        return (logits.as_tensor() if isinstance(logits, MetaTensor) else logits).detach()

    def _forecast(self, logits: torch.Tensor, probe: NetworkProbe, seconds: float) -> Forecast:
        classes = logits.shape[1]
        rest = self._slab_bytes(classes) + self._result_bytes(classes)
        peak = probe.before + probe.used() + rest if probe.before and self.device.type == "cpu" else 0
        return Forecast(self.total, self.batch, seconds * math.ceil(self.total / self.batch), peak)

    def _slab_bytes(self, classes: int) -> int:
        # a third more for the planes that are being restored
        return self.windows.slab_values(classes) * 4 * 4 // 3

    def _accelerated(self, network: Network, channels: int) -> Network:
        if self.inferer.backend is None:
            return network
        if not isinstance(network, torch.nn.Module):
            raise RequestError(f"a backend needs a network, and got a {type(network).__name__}: leave 'backend' out")
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
    """Return the error of a GPU whose memory does not hold one window."""
    return CaseError(
        f"The GPU's memory does not hold one window of {tuple(roi)}: choose a smaller roi_size, precision bfloat16, or "
        "the CPU.",
        code="memory",
        window=list(roi),
    )


def fitting_batch(limit: int, wanted: int, *, held: int, slab: int, result: int, window: int) -> int:
    """Return the largest number of windows per pass, up to `wanted`, that stays below a limit.

    Args:
        limit: bytes that the process may take.
        wanted: windows per pass that were asked for.
        held: what the process holds already: programs, weights, the image.
        slab: the accumulators of the stream.
        result: what is handed back.
        window: what one window takes while the network runs.

    Raises:
        CaseError: not even one window at a time fits; a smaller image may.
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
