"""Wrapper that adapts a network to the training engines."""

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
    """Network wrapper whose `forward` returns the full `TrainingOutput`.

    The engine trains the wrapper; checkpoints store the wrapped network, so its weights carry no prefix. A network
    without `forward_train`, such as those of MONAI, returns its logits, plus the features that `taps` selects.

    Args:
        network: Network to train.
        precision: "float32", or "bfloat16" or "float16" for autocast on the device of the network (weights stay
            float32). "float16" needs a gradient scaler (see `medseg.components.needs_scaler`). On the CPU, layers with
            wrong bfloat16 gradients stay in float32 (see `medseg.training.bf16_conv3d_workaround`).
        taps: Source of `features`. None: `forward_train`. "auto": `forward_train`, or `medseg.training.preset_taps` for
            networks without it. Otherwise module paths by tap name, from encoder to decoder. Hooks are registered only
            during a forward pass of this wrapper.
        taps_per_block: Taps per block with "auto": 1, or 2 for the first and the last layer of each block.
        compile: Whether to run the network through `torch.compile`, which takes about a minute at the start; not
            available with taps.

    Raises:
        RequestError: Unknown precision, or taps that do not match the network.
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
            raise RequestError("compile=true does not support taps, since hooks are not compiled: set compile=false")
        self._call = torch.compile(self._output) if compile else self._output

    def forward(self, x: Tensor) -> TrainingOutput:
        """Return the training output for an image `(B, in_channels, *spatial)`."""
        # A MetaTensor would copy its metadata to the output of every layer.
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
    """Run a network without `forward_train`."""
    output: Any = network(image)
    if isinstance(output, Tensor):
        return {"logits": output}
    if isinstance(network, BasicUNetPlusPlus):
        return {"logits": output[-1], "aux": output} if len(output) > 1 else {"logits": output[0]}
    raise RequestError(
        f"{type(network).__name__} returned a {type(output).__name__}, expected one tensor of logits; "
        "disable deep supervision and other additional outputs."
    )
