"""DataLoaders whose batches and augmentations do not depend on the number of workers and ranks."""

import builtins
import logging
import math
import multiprocessing.connection
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from timm_branches.arguments import check_flag, check_number
from timm_branches.data.bad_images import (
    BadImage,
    TolerantDataset,
    collate_good,
    describe_bad_images,
    sample_name,
)

_logger = logging.getLogger(__name__)

__all__ = ["BalancedSampler", "EpochSampler", "Loader", "create_loader"]


def _datasets(dataset: Any) -> Iterator[Any]:
    """A dataset and all those that torch's wrappers (Subset, ConcatDataset) hold."""
    yield dataset
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    for part in inner:
        if part is not None:
            yield from _datasets(part)


def _data_of(dataset: Any) -> Iterator[Any]:
    """The data sets at the bottom, which torch's wrappers hold."""
    for part in _datasets(dataset):
        if not hasattr(part, "dataset") and not hasattr(part, "datasets"):
            yield part


class EpochSampler(Sampler):
    """A random order that is a function of (seed, epoch), dealt out to the ranks like cards.

    Rank r takes every `world_size`-th sample from the r-th on. So the n-th batches of all ranks
    together are the n-th batch of a single process with a batch `world_size` times as large:
    training does not depend on the number of ranks.

    Args:
        dataset: What to sample from.
        batch_size: Batch size of one rank.
        seed: Seed of the order.
        rank: This process's number.
        world_size: Number of processes.
        drop_last: Drop what does not fill a batch on every rank; otherwise the last batches are
            smaller, and the first samples of the order fill up ranks that would have one less.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._skip = 0
        self.size = len(dataset)  # type: ignore[arg-type]
        if drop_last:
            self.num_samples = self.size // (batch_size * world_size) * batch_size
        else:
            self.num_samples = -(-self.size // world_size)

    def __iter__(self) -> Iterator[int]:
        order = self._order(self._generator()).tolist()
        stop = self.num_samples * self.world_size
        start = self.rank + self._skip * self.world_size
        self._skip = 0
        return iter([order[i % self.size] for i in range(start, stop, self.world_size)])

    def skip(self, count: int) -> None:
        """Leave out the first samples, the next time only: an interrupted epoch goes on.

        Args:
            count: How many, on this rank.
        """
        self._skip = count

    def _generator(self) -> torch.Generator:
        """The generator of this epoch: one for each pair of numbers.

        seed + epoch would give seed 1, epoch 0 the order of seed 0, epoch 1.
        """
        base = torch.Generator().manual_seed(self.seed)
        mixed = int(torch.randint(2**62, (), generator=base)) ^ (
            self.epoch * 0x9E3779B97F4A7C15 % 2**62
        )
        return torch.Generator().manual_seed(mixed)

    def _order(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(self.size, generator=generator)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def epoch(self) -> int:
        """The current epoch.

        The dataset's, if it knows one, because timm's train.py tells only the dataset then.
        """
        return getattr(self.dataset, "epoch", self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order and augmentations.

        Args:
            epoch: Its number, from 0.
        """
        self._epoch = epoch
        for dataset in _datasets(self.dataset):
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)


class BalancedSampler(EpochSampler):
    """Draws every class equally often, with replacement; as reproducible as its base class.

    An epoch has as many samples as the data set. Samples without a label on that level are drawn as
    if they were one class more.

    Args:
        labels: For each sample the class to balance (N,), -1 for unknown.
        dataset: As in :class:`EpochSampler`, like all further arguments.
        *args: As there.
        **kwargs: As there.

    Example:
        >>> labels = torch.tensor([0] * 90 + [1] * 10)
        >>> order = list(BalancedSampler(labels, range(100), batch_size=1))
        >>> 35 < int(labels[order].sum()) < 65
        True
    """

    def __init__(self, labels: torch.Tensor, dataset: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        number = torch.unique(labels, return_inverse=True)[1]
        self.weights = number.bincount().double().reciprocal()[number]

    def _order(self, generator: torch.Generator) -> torch.Tensor:
        return torch.multinomial(self.weights, self.size, replacement=True, generator=generator)


class Loader(DataLoader):
    """torch's DataLoader that is told which epoch begins, and leaves out what cannot be read.

    Attributes:
        bad_images: What was left out so far, by name, with the reason (`on_bad_image='skip'`).
    """

    _last_epoch: int | None = None
    max_bad_share = 0.01

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.bad_images: dict[str, str] = {}
        super().__init__(*args, **kwargs)

    def set_epoch(self, epoch: int) -> None:
        """Choose order and augmentation of the next epoch; call it before iterating.

        Worker processes hear of it too, persistent ones included: datasets keep the epoch in shared
            memory.

        Args:
            epoch: Its number, from 0.
        """
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def skip_batches(self, count: int) -> bool:
        """Begin the next epoch behind its first batches, without reading them.

        Args:
            count: How many.

        Returns:
            Whether that is possible: what is random must be a function of epoch and sample, not of
            what was drawn before.
        """
        repeatable = all(hasattr(part, "set_epoch") for part in _data_of(self.dataset))
        if not repeatable or not isinstance(self.sampler, EpochSampler):
            return False
        assert self.batch_size is not None
        self.sampler.skip(count * self.batch_size)
        return True

    def name_of_sample(self, batch: int, place: int) -> str | None:
        """What the image at a place of a batch of this epoch is called; None if it has no name.

        Args:
            batch: Number of the batch, from 0.
            place: Place in it, from 0.
        """
        assert self.batch_size is not None
        order = list(self.sampler)
        at = batch * self.batch_size + place
        return sample_name(self.dataset, order[at]) if at < len(order) else None

    def __iter__(self) -> Any:
        if isinstance(self.sampler, EpochSampler):
            epoch = self.sampler.epoch
            if epoch == self._last_epoch:
                warnings.warn(
                    f"epoch {epoch} begins again with the same order and augmentation; call "
                    "loader.set_epoch(epoch) before each epoch",
                    stacklevel=2,
                )
            self._last_epoch = epoch
        batches = super().__iter__()
        if isinstance(self.dataset, TolerantDataset):
            return self._good_batches(batches)
        return batches if self.num_workers == 0 else _with_plain_errors(batches)

    def _good_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches without what could not be read, which is noted.

        Raises:
            ValueError: More than `max_bad_share` of the samples.
        """
        total = len(self.dataset)  # type: ignore[arg-type]
        allowed = math.ceil(self.max_bad_share * total)
        for batch, bad in _with_plain_errors(batches):
            for image in bad:
                if image.name not in self.bad_images:
                    self.bad_images[image.name] = image.reason
                    _logger.warning("Left out: %s: %s", image.name, image.reason)
            if len(self.bad_images) > allowed:
                images = [BadImage(*item) for item in self.bad_images.items()]
                raise ValueError(
                    f"{describe_bad_images(images, total)}. More than "
                    f"{100 * self.max_bad_share:g} % is too many to be left out."
                )
            if batch is not None:
                yield batch


def _with_plain_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Batches of workers, whose errors come as they were raised, without the worker's traceback.

    Raises:
        ChildProcessError: A worker died.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or str(error).startswith("Caught "):
                raise _plain(error) from error
            raise _worker_died(error) from error
        except (ConnectionError, EOFError) as error:  # it died while it sent a batch
            _await_dead(getattr(batches, "_workers", []))
            raise _worker_died(error) from error
        except (OSError, ValueError) as error:
            raise _plain(error) from error
        yield batch


def _await_dead(workers: list[Any]) -> None:
    """Collect the workers that died, and torch's notice of it.

    The notice is an error that is raised wherever the main process is at that moment: here it harms
    nobody.
    """
    try:
        sentinels = {worker.sentinel: worker for worker in workers}
        for sentinel in multiprocessing.connection.wait(list(sentinels), timeout=5):
            sentinels[sentinel].join()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise


def _worker_died(error: Exception) -> ChildProcessError:
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return ChildProcessError(
        f"{reason}: a process that loads data died, most often for lack of memory. Take fewer "
        "workers, or smaller batches."
    )


def _plain(error: Exception) -> Exception:
    """The error of a worker without its traceback, which torch glues before the message."""
    name = re.match(r"Caught (\w+) in ", str(error))
    if name is None:
        return error
    parts = re.split(rf"^(?:\w+\.)*{name.group(1)}: ", str(error), flags=re.MULTILINE)
    text = parts[-1].strip() if len(parts) > 1 else name.group(1)
    # an error that is made of more than a message comes as a RuntimeError
    original = getattr(builtins, name.group(1), None)
    if isinstance(original, type) and issubclass(original, ValueError):
        return ValueError(text)
    return type(error)(text)


def _leave_signals_to_parent() -> None:
    """Go on when Ctrl-C or a cluster's notice reaches the whole group of processes.

    The main process finishes its batch with the workers' help, and ends them itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)  # as torch's own handler does

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


def _init_worker(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # the workers share the cores already
    _leave_signals_to_parent()


def _labels_to_balance(dataset: Any, sampler: str, level: int) -> torch.Tensor:
    if sampler != "balanced":
        raise ValueError(f"sampler={sampler!r}: write 'balanced', or give a sampler.")
    labels = getattr(dataset, "labels", None)
    if not isinstance(labels, torch.Tensor):
        raise ValueError(
            f"sampler='balanced' needs a data set with `labels`; {type(dataset).__name__} has none."
        )
    return labels if labels.ndim == 1 else labels[:, level]


def create_loader(
    dataset: Dataset,
    batch_size: int,
    is_training: bool = False,
    num_workers: int = 0,
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    drop_last: bool | None = None,
    pin_memory: bool = False,
    persistent_workers: bool = True,
    sampler: Sampler | str | None = None,
    balanced_level: int = -1,
    on_bad_image: str = "stop",
    **kwargs: Any,
) -> Loader:
    """A DataLoader that repeats exactly, whatever the number of workers and ranks.

    For training, order and augmentation are functions of (seed, epoch): call
    `loader.set_epoch(epoch)` before each epoch. For evaluation the order is the dataset's; ranks
    that would have one sample less repeat one at their very end, so that all make equally many
    steps, and `timm.task.evaluation_sample_limit(loader)` says how many count.

    Args:
        dataset: A :class:`HierarchicalDataset` or any other map-style dataset; augmentations are
            reproducible as described for the former only. The seed is set on it: two training
            loaders need two datasets (a `HierarchicalSubset` of all samples is one).
        batch_size: Samples a batch, on each rank.
        is_training: Shuffle and drop the last batch, or go through all samples in order.
        num_workers: Worker processes; 0 loads in this one.
        seed: Seed of order and augmentation.
        rank: This process's number; None asks torch.distributed.
        world_size: Number of processes; None asks torch.distributed.
        drop_last: Drop what does not fill a batch; None does so in training.
        pin_memory: Put batches into page-locked memory, for faster copies to a GPU.
        persistent_workers: Keep workers from epoch to epoch.
        sampler: For training: a sampler of your own, or 'balanced' to draw every class equally
            often.
        balanced_level: The level whose classes 'balanced' balances; -1 is the finest.
        on_bad_image: What to do with a sample that cannot be read: 'stop' with an error that names
            it, or 'skip' it: it is left out of its batch, named once, and counted in the loader's
            `bad_images`; above 1 % of the data the loader stops.
        **kwargs: Further arguments of torch's DataLoader.

    Returns:
        The loader; its batches are what the dataset's samples collate to, here images (B, C, H, W)
        and labels (B, L).

    Raises:
        ValueError: If there would be no batch at all, or rank and world_size do not fit.

    Example:
        >>> from timm_branches.data import create_dataset
        >>> dataset = create_dataset('digits', in_chans=1)
        >>> loader = create_loader(dataset, batch_size=32, is_training=True)
        >>> loader.set_epoch(0)
        >>> images, labels = next(iter(loader))
        >>> images.shape
        torch.Size([32, 1, 8, 8])
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if world_size is None:
        world_size = torch.distributed.get_world_size() if distributed else 1
    if rank is None:
        rank = torch.distributed.get_rank() if distributed else 0
    check_number("batch_size", batch_size, 1, whole=True)
    check_number("num_workers", num_workers, 0, whole=True)
    check_number("seed", seed, 0, whole=True)
    check_number("world_size", world_size, 1, whole=True)
    check_number("rank", rank, whole=True)
    check_flag("is_training", is_training)
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank {rank} is not one of 0 to {world_size - 1} (world_size={world_size})."
        )
    if drop_last is None:
        drop_last = is_training
    _check_size(len(dataset), batch_size, world_size, drop_last)  # type: ignore[arg-type]
    if not is_training:
        if sampler is not None:
            raise ValueError(
                "sampler= is for training: evaluation goes through all samples in order."
            )
        sampler = OrderedDistributedSampler(dataset, num_replicas=world_size, rank=rank)
    else:
        if sampler is None:
            sampler = EpochSampler(dataset, batch_size, seed, rank, world_size, drop_last)
        elif isinstance(sampler, str):
            labels = _labels_to_balance(dataset, sampler, balanced_level)
            sampler = BalancedSampler(
                labels, dataset, batch_size, seed, rank, world_size, drop_last
            )
        for part in _datasets(dataset):
            if hasattr(part, "set_seed"):
                part.set_seed(seed)
        if isinstance(sampler, EpochSampler):
            sampler.set_epoch(0)
    if on_bad_image not in ("stop", "skip"):
        raise ValueError(f"on_bad_image={on_bad_image!r}: write 'stop' or 'skip'.")
    if on_bad_image == "skip":
        dataset = TolerantDataset(dataset)
        kwargs["collate_fn"] = partial(collate_good, kwargs.get("collate_fn") or default_collate)
    # Seeds of the workers' global generators, for transforms that use those; this leaves torch's
    # own generator alone.
    generator = torch.Generator().manual_seed(seed * world_size + rank)
    return Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=persistent_workers and num_workers > 0,
        **{"worker_init_fn": _init_worker, "generator": generator, **kwargs},
    )


def _check_size(size: int, batch_size: int, world_size: int, drop_last: bool) -> None:
    """Refuse a data set of which no batch would be left."""
    if size == 0:
        raise ValueError("the dataset is empty.")
    if drop_last and size < batch_size * world_size:
        raise ValueError(
            f"{size} samples do not fill one batch of {batch_size} on each of {world_size} "
            "processes, and drop_last drops the rest: nothing would be left. Take batch_size <= "
            f"{max(1, size // world_size)}, or drop_last=False."
        )
