"""From a network to what training engines call."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from monai.data import MetaTensor
from monai.networks.nets import BasicUNetPlusPlus
from torch import Tensor, nn

from medseg.errors import RequestError
from medseg.training.bf16_conv3d_workaround import thin_maps_in_float32
from medseg.training.taps import FeatureTaps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from medseg.training.taps import Tap
    from medseg.types import TrainingOutput

__all__ = ["TrainingWrapper"]

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainingWrapper(nn.Module):
    """Make `forward` of the wrapped network return its whole `TrainingOutput`.

    The engine trains the wrapper; checkpoints hold the bare network, so its weights carry no prefix. A network without
    `forward_train`, such as MONAI's own, gives its logits, and features where `taps` says what they are.

    Args:
        network: the network to train.
        precision: `float32`, or `bfloat16` or `float16` for autocast on the network's device (weights stay float32);
            the last needs a scaler (see `medseg.components.needs_scaler`). On a CPU, maps that bfloat16 kernels train
            wrongly stay in float32 (see `medseg.training.bf16_conv3d_workaround`).
        taps: where `features` come from. None: from `forward_train`. "auto": from there or, for networks without
            it, from the modules of `medseg.training.preset_taps`. Else tap names with paths of modules, from the image
            down and up again. Hooks are on the network only during a forward pass of this wrapper.
        taps_per_block: 1, or 2 with "auto" for the first and the last layer of each block of a MONAI network.
        compile: run the network through `torch.compile`, which takes a minute at the start; not with taps.

    Raises:
        RequestError: an unknown precision, or taps that do not fit the network.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        precision: str = "float32",
        taps: Mapping[str, str | Tap] | str | None = None,
        taps_per_block: int = 1,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if precision not in _PRECISIONS:
            raise RequestError(f"unknown precision '{precision}'; use one of {', '.join(_PRECISIONS)}")
        self.network = network
        self.precision = precision
        own = taps is None or (taps == "auto" and hasattr(network, "forward_train") and taps_per_block == 1)
        self.taps = None if own else FeatureTaps(network, taps or "auto", taps_per_block=taps_per_block)
        if compile and self.taps is not None:
            raise RequestError("compile=true does not work with taps, since hooks are not compiled: set compile=false")
        self._call = torch.compile(self._output) if compile else self._output

    def forward(self, x: Tensor) -> TrainingOutput:
        """Return the training output for an image `(B, in_channels, *spatial)`."""
        # Metadata would be copied along with every layer's output.
        image = x.as_tensor() if isinstance(x, MetaTensor) else x
        with self._arithmetic(image.device.type):
            if self.taps is None:
                return self._call(image)
            with self.taps as taps:
                output = self._output(image)
                output["features"] = taps.features
                return output

    def _output(self, image: Tensor) -> TrainingOutput:
        forward_train = getattr(self.network, "forward_train", None)
        output: TrainingOutput = _output_of(self.network, image) if forward_train is None else forward_train(image)
        return output

    @contextmanager
    def _arithmetic(self, device_type: str) -> Iterator[None]:
        dtype = _PRECISIONS[self.precision]
        if dtype is None:
            yield
            return
        thin = thin_maps_in_float32(self.network) if device_type == "cpu" else nullcontext()
        with torch.autocast(device_type, dtype=dtype), thin:
            yield


def _output_of(network: nn.Module, image: Tensor) -> TrainingOutput:
    """Run a network of another library."""
    output: Any = network(image)
    if isinstance(output, Tensor):
        return {"logits": output}
    if isinstance(network, BasicUNetPlusPlus):
        return {"logits": output[-1], "aux": output} if len(output) > 1 else {"logits": output[0]}
    raise RequestError(
        f"{type(network).__name__} returned a {type(output).__name__}, expected one tensor of logits; "
        "switch off its deep supervision or its other extra outputs."
    )
