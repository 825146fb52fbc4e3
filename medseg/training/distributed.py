"""Distributed data-parallel training: rank, device and share of the data of this process.

Each process runs the same config on its own samples; gradients are averaged after each backward pass. In a single
process all functions here are no-ops, so one config serves both cases. Rank and number of processes come from the
environment variables that `torchrun` and `medseg train --devices` set (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`,
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

# Long enough for the slowest validation; a dead process is noticed through its closed connection.
_PATIENCE: Final = timedelta(days=30)
_LOGGERS: Final = ("monai.handlers.StatsHandler", "monai.handlers.LrScheduleHandler")
# Torch 2.13 renamed the option.
_SYNC_BUFFERS: Final = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


def process_count() -> int:
    """Return the number of training processes (the world size); 1 before `start_processes`."""
    return distributed.get_world_size() if _joined() else 1


def process_rank() -> int:
    """Return the rank of this process, from 0."""
    return distributed.get_rank() if _joined() else 0


def is_first_process() -> bool:
    """Return whether this is the process with rank 0, which writes files and reports to the user."""
    return process_rank() == 0


def process_device(device: torch.device) -> torch.device:
    """Return the device of this process: its own CUDA device, or the CPU shared by all processes.

    Args:
        device: Device of a single process. With several processes on CUDA, the index is replaced by the local rank.

    Raises:
        RequestError: Fewer CUDA devices than processes on this machine.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type != "cuda" or _announced() == 1:
        return device
    if local >= torch.cuda.device_count():
        raise RequestError(
            f"no CUDA device for process {local}: this machine has {torch.cuda.device_count()} CUDA devices; start at "
            "most one process per device (--devices, --nproc_per_node), or use device_name=cpu"
        )
    return torch.device("cuda", local)


def start_processes(device: torch.device) -> None:
    """Initialize the process group: NCCL for CUDA devices, Gloo for CPUs; does nothing in a single process.

    Args:
        device: Device of this process, from `process_device`.
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
    """Destroy the process group."""
    if _joined():
        distributed.destroy_process_group()


def distributed_network(network: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Wrap a network in `DistributedDataParallel`, which averages gradients over all processes.

    A loss that averages over the samples of a process thus averages over the samples of all processes. On CUDA, batch
    norm is converted to `SyncBatchNorm`. Torch has no such layer for the CPU: there each process normalizes with its
    own batch statistics, and only the running statistics are averaged. Other layers are unchanged.

    Args:
        network: Network to train. Parameters that the loss does not use are allowed, but must be the same at each step.
        optimizer: Optimizer after whose steps the running statistics are averaged; needed only for batch norm.
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
    """Connect all outputs of a network to the backward pass, including outputs that the loss does not use.

    Otherwise `DistributedDataParallel` would wait for gradients of the parameters behind unused outputs. Features are
    intermediate results of the other outputs and need no connection.
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
    """Identity on several tensors; if one receives a gradient, the others receive zeros."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield each tensor in nested dictionaries and sequences once."""
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
    """Average the running statistics over all processes."""

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
    """Sampler of the validation cases of this process: every n-th case for n processes, in order.

    With fewer cases than processes, each process validates all cases, so that each has a result; the mean over the
    cases is the same.

    Args:
        dataset: Validation cases.
    """

    def __init__(self, dataset: Sized) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of the cases."""
        return iter(self._numbers())

    def __len__(self) -> int:
        """Return the number of cases of this process."""
        return len(self._numbers())

    def _numbers(self) -> range:
        cases, processes = len(self.dataset), process_count()
        return range(process_rank(), cases, processes) if cases >= processes else range(cases)


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _announced() -> int:
    """Return the number of processes according to the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _from_warnings_on(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
