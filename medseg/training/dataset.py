"""Training dataset with caching, whose random transforms depend only on seed, epoch and case."""

from __future__ import annotations

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from monai.data import Dataset, MetaTensor, list_data_collate
from monai.transforms import Compose, RandomizableTrait, Transform
from torch.utils.data import get_worker_info

from medseg.errors import CaseError, MedsegError, RequestError, links, out_of_memory, own_error
from medseg.inferers.blend import one_thread
from medseg.machine import core_count, shown_bytes
from medseg.notices import CaseWarning, carry, collect, forward
from medseg.training.cache import DiskCache, memory_bound, size_of, strip_metadata
from medseg.training.randomness import isolated_seed, seed_from
from medseg.transforms.traits import traits_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableSequence, Sequence

__all__ = ["SeededDataset", "WarnedBatch", "collate"]

logger = logging.getLogger(__name__)


class SeededDataset(Dataset):  # type: ignore[misc]  # MONAI publishes no types
    """Training dataset with cached preprocessing and reproducible augmentation.

    The transforms before the first random one preprocess a case; the result is cached in memory up to a limit, and
    optionally on disk. The remaining transforms are seeded for each sample with (seed, epoch, index), where `epoch`
    counts the passes over the cases. A sample therefore does not depend on the worker that computes it, the number of
    workers or earlier samples. Torch runs on one thread, so that sums are rounded identically everywhere.

    Args:
        data: Cases as dictionaries with paths by key, and optionally a `name`.
        transform: MONAI transform or `Compose` for one case.
        seed: Seed of the random transforms.
        cache_memory: Memory limit of the cache: "auto" for half of the free memory, an amount such as "4G", or "0". As
            many of the first cases as fit are cached; the others are loaded on demand.
        disk_cache: Whether to cache preprocessed cases on disk, for later runs and for cases that do not fit in memory.
        cache_dir: Folder of the disk cache.

    Raises:
        CaseError: A case cannot be preprocessed; the message names it.
        RequestError: `disk_cache` without `cache_dir`.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Callable[..., Any],
        *,
        seed: int = 0,
        cache_memory: str = "auto",
        disk_cache: bool = False,
        cache_dir: str = "",
    ) -> None:
        super().__init__(list(data), transform if isinstance(transform, Compose) else Compose(transform))
        self.seed = seed
        first = self.transform.get_index_of_first(_is_random)
        self.first_random = len(self.transform.transforms) if first is None else first
        steps = self.transform.transforms[: self.first_random]
        if disk_cache and not cache_dir:
            raise RequestError("disk_cache=true requires cache_dir, the folder of the preprocessed cases")
        self.disk = DiskCache(Path(cache_dir), steps) if disk_cache else None
        self.working: MutableSequence[int] | None = None
        self._kept: list[dict[str, Any]] = []
        self._keep(memory_bound(cache_memory))

    @property
    def kept(self) -> int:
        """Number of cases cached in memory."""
        return len(self._kept)

    def fingerprint(self) -> str:
        """Return a hash of the case names in order."""
        return hashlib.sha256(json.dumps([self.name(index) for index in range(len(self))]).encode()).hexdigest()

    def name(self, index: int) -> str:
        """Return the name of a case."""
        case = self.data[index]
        return str(case.get("name") or Path(str(case.get("image", index))).name)

    def __getitem__(self, key: Any) -> Any:
        """Return the sample of a case; `key` is (epoch, index), or an index for epoch 0.

        Raises:
            CaseError: The case cannot be loaded or transformed; the message names it.
        """
        if isinstance(key, (slice, list)):
            return super().__getitem__(key)
        epoch, index = key if isinstance(key, tuple) else (0, int(key) % len(self))
        worker = get_worker_info()
        if self.working is not None and worker is not None:
            self.working[worker.id] = index
        try:
            with one_thread():
                return self._sample(epoch, index)
        except Exception as error:
            raise self._explained(index, error) from error
        finally:
            if self.working is not None and worker is not None:
                self.working[worker.id] = -1

    def __getitems__(self, keys: Sequence[Any]) -> list[Any]:
        """Return the samples of a batch, or a list with only the error, whose class would be lost in a worker.

        Warnings are appended as a list, for the main process to report.
        """
        with collect(deferred=True) as warnings:
            try:
                samples = [self[key] for key in keys]
            except MedsegError as error:
                logger.debug("a sample failed", exc_info=True)
                samples = [error]
        return [*samples, warnings] if warnings else samples

    def describe(self, index: int) -> str:
        """Return the description of a case in messages: its name and file."""
        name, image = self.name(index), str(self.data[index].get("image", ""))
        return f"training case '{name}'" + (f" ({image})" if image and Path(image).name != name else "")

    def _sample(self, epoch: int, index: int) -> Any:
        case = self._kept[index] if index < len(self._kept) else self._prepared(index)
        seed = seed_from(self.seed, epoch, index)
        self.transform.set_random_state(seed=seed)
        steps, start = self.transform.transforms, self.first_random
        with isolated_seed(seed):
            if start < len(steps) and _only_crops(steps[start]):
                cut = self.transform(_shared(case), start=start, end=start + 1)
                return self.transform(_copied(cut), start=start + 1)
            return self.transform(_copied(_shared(case)), start=start)

    def _prepared(self, index: int) -> dict[str, Any]:
        """Return the preprocessed case, from the disk cache if possible."""
        found = self.disk.load(self.data[index]) if self.disk else None
        if found is None:
            with collect(deferred=True) as warnings:
                found = strip_metadata(self.transform(dict(self.data[index]), end=self.first_random, threading=True))
            if self.disk:
                self.disk.save(self.data[index], found, warnings)
            forward(warnings)
        return found

    def _keep(self, bound: int) -> None:
        """Preprocess and cache as many of the first cases as fit into `bound` bytes."""
        used = largest = 0
        threads = min(4, core_count())
        with one_thread(), ThreadPoolExecutor(threads) as pool:
            while len(self._kept) < len(self) and used + largest < bound:
                group = range(len(self._kept), min(len(self._kept) + threads, len(self)))
                for case in pool.map(carry(self._prepared_or_explained), group):
                    used += size_of(case)
                    largest = max(largest, size_of(case))
                    if used <= bound:
                        self._kept.append(case)
        if bound:
            logger.info(f"{len(self._kept)} of {len(self)} training cases cached in memory")
        if bound and len(self._kept) < len(self):
            logger.info(f"the other cases are loaded on demand: up to about {shown_bytes(largest)} each")

    def _prepared_or_explained(self, index: int) -> dict[str, Any]:
        try:
            return self._prepared(index)
        except Exception as error:
            raise self._explained(index, error) from error

    def _explained(self, index: int, error: Exception) -> MedsegError:
        """Return an error that names the case and the original error, which MONAI wraps."""
        *_, first = links(error)
        shown = own_error(error) or first
        said = str(shown) if isinstance(shown, MedsegError) else f"{type(shown).__name__}: {shown}"
        if out_of_memory(shown):
            said += ". Out of memory: lower num_workers, cache_memory or patch_size"
        return CaseError(f"{self.describe(index)} cannot be used: {said}")


@dataclass
class WarnedBatch:
    """A batch, or an error in its place, with the warnings raised while computing it."""

    batch: Any
    warnings: list[CaseWarning]


def collate(samples: Sequence[Any]) -> Any:
    """Collate samples as MONAI's `list_data_collate` does; if a sample is an error, return the error instead.

    If `SeededDataset` appended warnings to the samples, return a `WarnedBatch`.
    """
    if isinstance(samples[-1], list) and samples[-1] and isinstance(samples[-1][0], CaseWarning):
        return WarnedBatch(collate(samples[:-1]), samples[-1])
    errors = [sample for sample in samples if isinstance(sample, MedsegError)]
    return errors[0] if errors else list_data_collate(samples)


def _only_crops(transform: Any) -> bool:
    """Return whether a transform only crops, so that the case need not be copied first."""
    traits = traits_of(transform)
    return traits is not None and traits.crops


def _is_random(transform: Any) -> bool:
    return isinstance(transform, RandomizableTrait) or not isinstance(transform, Transform)


def _shared(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return a shallow copy of a case: its own metadata, shared voxels."""
    return {
        key: MetaTensor(value.as_tensor(), affine=value.affine.clone()) if isinstance(value, MetaTensor) else value
        for key, value in case.items()
    }


def _copied(case: Any) -> Any:
    """Return a deep copy of one or several cases, which transforms may modify in place."""
    if isinstance(case, list):
        return [_copied(each) for each in case]
    return {
        key: value.clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value
        for key, value in case.items()
    }
