"""Training data loader with persistent workers, prefetching across epochs and errors that name the case."""

from __future__ import annotations

import signal
from multiprocessing import RawArray
from typing import TYPE_CHECKING, Any, Final

import torch
from ignite.engine import Events
from monai.data import DataLoader

from medseg.errors import CaseError, MedsegError, WeightsError
from medseg.notices import forward
from medseg.training.dataset import WarnedBatch, collate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ignite.engine import Engine

    from medseg.training.dataset import SeededDataset
    from medseg.training.sampling import InfiniteBatchSampler

__all__ = ["TrainingLoader"]

_ADVICE: Final = {
    "SIGKILL": "usually because the system ran out of memory: lower num_workers, cache_memory or batch_size",
    "SIGBUS": "because shared memory is full: give the container more (docker run --shm-size=4g), or set num_workers=0",
    "SIGSEGV": "because a library crashed: run `medseg doctor` on the dataset, or set num_workers=0 for a traceback",
    "SIGTERM": "by the user or the scheduler: continue with --resume",
}


class TrainingLoader(DataLoader):  # type: ignore[misc]  # MONAI publishes no types
    """Data loader that prefetches the batches of the next epoch while the current epoch ends.

    Iterating yields `len()` batches and then stops, like any loader; the next iteration continues from there. Workers
    persist between epochs and need no epoch number, since the sampler yields it with each case.

    A case that fails in a worker raises a `CaseError` that names it. If a worker dies, the error names the case it was
    processing, the signal and what to change.

    Args:
        dataset: Training cases.
        batches: Sampler of the cases of each step.
        num_workers: Number of worker processes; 0 loads batches in the main process.
        device: Device that the batches are moved to; for CUDA they are placed in pinned memory.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        batches: InfiniteBatchSampler,
        *,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        dataset.working = RawArray("q", [-1] * num_workers) if num_workers else None
        self.batches = batches
        self.step = 0
        self._stream: Iterator[Any] | None = None
        super().__init__(
            dataset,
            num_workers=num_workers,
            batch_sampler=batches,
            collate_fn=collate,
            # A separate generator, so that starting the workers does not advance the global one.
            generator=torch.Generator(),
            pin_memory=torch.device(device).type == "cuda",
        )

    def attach(self, engine: Engine) -> None:
        """Report errors of the engine with the case they occurred in. Attach before other exception handlers."""
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._explain)
        engine.add_event_handler(Events.COMPLETED, self.close)

    def __iter__(self) -> Iterator[Any]:
        """Yield the remaining batches of the current epoch, or those of the next one.

        Raises:
            CaseError: A case cannot be loaded, or a worker died.
        """
        for _ in range(len(self) - self.step % len(self)):
            if self._stream is None:
                self.batches.start = self.step
                self._stream = super().__iter__()
            batch = self._next()
            self.step += 1
            yield batch

    def seek(self, step: int) -> None:
        """Continue from a step, counted from 0 over all epochs."""
        if step != self.step:
            self.close()
            self.step = step

    def close(self) -> None:
        """Stop the workers; iterating starts new ones."""
        stop = getattr(self._stream, "_shutdown_workers", None)
        self._stream = None
        if stop is not None:
            stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the next step and the settings that determine the order of the cases."""
        return {"step": self.step, "order": self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last step of an earlier run.

        Raises:
            WeightsError: The order of the cases differs from the earlier run.
        """
        changes = [
            f"{name} was {state['order'].get(name)}, now {value}"
            for name, value in self._order().items()
            if state["order"].get(name) != value
        ]
        if changes:
            raise WeightsError(
                f"cannot resume this run, since the order of its cases would change: {'; '.join(changes)}. "
                "Use the settings and data of the earlier run, or start again without resume"
            )
        self.seek(int(state["step"]))

    def _order(self) -> dict[str, Any]:
        batches = self.batches
        return {
            "seed": batches.seed,
            "batch_size": batches.batch_size,
            "steps per epoch": len(batches),
            "cases": batches.count,
            "their names": self.dataset.fingerprint(),
        }

    def _next(self) -> Any:
        try:
            batch = next(self._stream)  # type: ignore[arg-type]
        except RuntimeError as error:
            self._explain(None, error)
        if isinstance(batch, WarnedBatch):
            forward(batch.warnings)
            batch = batch.batch
        if isinstance(batch, MedsegError):
            self.close()
            raise batch
        return batch

    def _explain(self, _engine: Engine | None, error: Exception) -> None:
        """Raise the error, or a `CaseError` if a worker died."""
        death = None if isinstance(error, MedsegError) else self._death()
        self.close()
        if death is None:
            raise error
        raise death from error

    def _death(self) -> CaseError | None:
        for number, worker in enumerate(getattr(self._stream, "_workers", ())):
            worker.join(timeout=0)
            if worker.exitcode:
                case = self.dataset.working[number]
                doing = f"while processing {self.dataset.describe(case)}" if case >= 0 else "between two cases"
                return CaseError(f"a data loader worker died {doing}: {_cause(worker.exitcode)}")
        return None


def _cause(exitcode: int) -> str:
    if exitcode > 0:
        return f"exit code {exitcode}; set num_workers=0 for a traceback"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = "an unknown signal"
    advice = _ADVICE.get(name, "set num_workers=0 for a traceback")
    return f"killed by signal {-exitcode} ({name}), {advice}"
