"""Several processes that train one network: who this process is, its device, its share of the work.

Each process runs the same config on its own samples; gradients are averaged after each backward pass. Everything here
also works in a process that is alone, where it changes nothing, so one config serves both. A process learns who it is
from the environment variables that `torchrun` and `medseg train --devices` set (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`,
`MASTER_ADDR`, `MASTER_PORT`).
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sized
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

from medseg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.optim import Optimizer

__all__ = [
    "ValidationShare",
    "distributed_network",
    "is_first_process",
    "process_count",
    "process_device",
    "process_rank",
    "start_processes",
    "stop_processes",
]

# A process waits as long as the slowest validation takes; one that died is noticed by its closed connections.
_PATIENCE: Final = timedelta(days=30)
_LOGGERS: Final = ("monai.handlers.StatsHandler", "monai.handlers.LrScheduleHandler")
# Torch 2.13 renamed the option.
_SYNC_BUFFERS: Final = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


def process_count() -> int:
    """Return how many processes train together; 1 before `start_processes`."""
    return distributed.get_world_size() if _joined() else 1


def process_rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if _joined() else 0


def is_first_process() -> bool:
    """Tell whether this process is the one that writes files and speaks to people."""
    return process_rank() == 0


def process_device(device: torch.device) -> torch.device:
    """Return the device of this process: on CUDA each process of a machine has its own, on the CPU all share one.

    Args:
        device: what a process alone would use; on CUDA only its kind counts where there are several processes.

    Raises:
        RequestError: the machine has fewer CUDA devices than processes.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type != "cuda" or _announced() == 1:
        return device
    if local >= torch.cuda.device_count():
        raise RequestError(
            f"process {local} has no device: this machine has {torch.cuda.device_count()} CUDA devices; start as many "
            "processes (--devices, --nproc_per_node), or use device_name=cpu"
        )
    return torch.device("cuda", local)


def start_processes(device: torch.device) -> None:
    """Connect this process with the others: by NCCL for CUDA devices, by Gloo for CPUs; nothing to do if it is alone.

    Args:
        device: of this process, from `process_device`.
    """
    if _announced() == 1 or _joined():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    if not is_first_process():
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_from_warnings_on)


def stop_processes() -> None:
    """Part from the other processes."""
    if _joined():
        distributed.destroy_process_group()


def distributed_network(network: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Return the network such that a backward pass gives all processes the mean of their gradients.

    A loss that is the mean over a process's samples thereby becomes the mean over those of all. On CUDA batch norm
    takes its statistics over all processes; on the CPU, for which torch has no such layer, over each process's own
    samples, and only the running statistics are averaged. Layers without batch statistics are not concerned.

    Args:
        network: what the engine trains; parameters that its loss does not use are allowed, but must be the same ones at
            each step.
        optimizer: after whose steps the running statistics are averaged; needed only for batch norm.
    """
    if process_count() == 1:
        return network
    on_cuda = any(parameter.is_cuda for parameter in network.parameters())
    if on_cuda:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    average = _AverageBuffers(network)
    if average.buffers and optimizer is not None:
        optimizer.register_step_post_hook(average)
    options: dict[str, Any] = {_SYNC_BUFFERS: False}
    return DistributedDataParallel(_Tied(network), static_graph=True, **options)


class _Tied(nn.Module):
    """A network all of whose outputs take part in the backward pass, also those that the loss leaves out.

    Otherwise `DistributedDataParallel` would wait for the gradients of what leads to those. Features lie on the way to
    the other outputs and are left alone.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> Any:
        output = self.network(*inputs)
        if not isinstance(output, dict):
            return output
        parts = {name: value for name, value in output.items() if name != "features"}
        tensors = [tensor for tensor in _tensors(parts) if tensor.requires_grad]
        if len(tensors) < 2:
            return output
        replaced = _Tie.apply(*tensors)  # type: ignore[no-untyped-call]
        tied = dict(zip(map(id, tensors), replaced, strict=True))
        return {**output, **_replaced(parts, tied)}


class _Tie(torch.autograd.Function):
    """Give tensors back as they are; if one of them gets a gradient, the others get zeros."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield each tensor of nested dictionaries and sequences once."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if isinstance(value, Tensor):
        yield value
    known: set[int] = set()
    for item in items:
        for tensor in _tensors(item):
            if id(tensor) not in known:
                known.add(id(tensor))
                yield tensor


def _replaced(value: Any, by: Mapping[int, Tensor]) -> Any:
    if isinstance(value, dict):
        return {name: _replaced(item, by) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, by) for item in value)
    return by.get(id(value), value)


class _AverageBuffers:
    """Give all processes the mean of their running statistics."""

    def __init__(self, network: nn.Module) -> None:
        self.buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        flat = torch.cat([buffer.reshape(-1).float() for buffer in self.buffers])
        distributed.all_reduce(flat)
        flat /= process_count()
        start = 0
        for buffer in self.buffers:
            buffer.copy_(flat[start : start + buffer.numel()].view_as(buffer))
            start += buffer.numel()


class ValidationShare(Sampler[int]):
    """The cases that this process validates: every n-th of n processes, in order; all of them where it is alone.

    With fewer cases than processes each process validates all of them, so that none is without a result; a mean over
    the cases stays the same.

    Args:
        dataset: the validation cases.
    """

    def __init__(self, dataset: Sized) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the cases."""
        return iter(self._numbers())

    def __len__(self) -> int:
        """Return how many cases this process has."""
        return len(self._numbers())

    def _numbers(self) -> range:
        cases, processes = len(self.dataset), process_count()
        return range(process_rank(), cases, processes) if cases >= processes else range(cases)


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _announced() -> int:
    """How many processes the environment tells of."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _from_warnings_on(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
