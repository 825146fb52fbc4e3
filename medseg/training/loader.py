"""Batches for training, made beforehand by other processes, and a word on what became of these if they die."""

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
    "SIGKILL": "as systems do when memory runs out: lower num_workers, cache_memory or batch_size",
    "SIGBUS": "which means that shared memory is full: give the container more (docker run --shm-size=4g), or set "
    "num_workers=0",
    "SIGSEGV": "since a library crashed: `medseg doctor` on the data set may tell why; num_workers=0 shows the place",
    "SIGTERM": "by someone or something: start again with --resume",
}


class TrainingLoader(DataLoader):  # type: ignore[misc]  # MONAI publishes no types
    """Yield the batches of one epoch after another; what the next epoch needs is made while the last one ends.

    Iterating gives `len()` batches and then stops, as with any loader. The next time it goes on where it stopped: the
    workers stay, and need not be told of epochs, since each case comes with the pass that it belongs to.

    A case that cannot be used is raised as a `CaseError` that names it, also from a worker. If a worker dies, the error
    names the case that it worked on, the signal and what to change.

    Args:
        dataset: the cases.
        batches: what each step takes.
        num_workers: processes that make batches; 0 makes them between the steps.
        device: where the batches will go; for CUDA they are put into pinned memory.
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
            # of its own, so that starting the workers takes no number from the one that the network draws from
            generator=torch.Generator(),
            pin_memory=torch.device(device).type == "cuda",
        )

    def attach(self, engine: Engine) -> None:
        """Tell an engine's errors in words that name the case. Attach this before other handlers of errors."""
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._explain)
        engine.add_event_handler(Events.COMPLETED, self.close)

    def __iter__(self) -> Iterator[Any]:
        """Yield what is left of the present epoch, or the next one.

        Raises:
            CaseError: a case cannot be used, or a worker died.
        """
        for _ in range(len(self) - self.step % len(self)):
            if self._stream is None:
                self.batches.start = self.step
                self._stream = super().__iter__()
            batch = self._next()
            self.step += 1
            yield batch

    def seek(self, step: int) -> None:
        """Go on with another step, counted from 0 over all epochs."""
        if step != self.step:
            self.close()
            self.step = step

    def close(self) -> None:
        """End the worker processes; iterating starts new ones."""
        stop = getattr(self._stream, "_shutdown_workers", None)
        self._stream = None
        if stop is not None:
            stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the next step, and what the order of the cases depends on."""
        return {"step": self.step, "order": self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the steps of an earlier run.

        Raises:
            WeightsError: that run took its cases in another order, so it cannot be continued.
        """
        changes = [
            f"{name} was {state['order'].get(name)} and is {value}"
            for name, value in self._order().items()
            if state["order"].get(name) != value
        ]
        if changes:
            raise WeightsError(
                f"this run cannot be continued, since the order of its cases would change: {'; '.join(changes)}. "
                "Give it the settings and the data that it had, or start anew without resume"
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
        """Raise an error, or if workers have died, one that says so."""
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
                doing = f"at work on {self.dataset.describe(case)}" if case >= 0 else "between two cases"
                return CaseError(f"a process that loads training cases died, {doing}: {_cause(worker.exitcode)}")
        return None


def _cause(exitcode: int) -> str:
    if exitcode > 0:
        return f"it ended with code {exitcode}; num_workers=0 shows what it did"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = "an unknown signal"
    advice = _ADVICE.get(name, "num_workers=0 shows what it did")
    return f"it was killed by signal {-exitcode} ({name}), {advice}"
