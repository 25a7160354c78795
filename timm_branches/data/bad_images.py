"""Images that cannot be read: found before a training, or left out of its batches."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

__all__ = [
    "BadImage",
    "TolerantDataset",
    "collate_good",
    "describe_bad_images",
    "find_bad_images",
    "sample_name",
]

# what reading and decoding a sample raise; anything else is a fault of the program
READ_ERRORS = (OSError, ValueError)
# headers that are read before a training; of more files a random part
_MOST_HEADERS = 100_000


class BadImage(NamedTuple):
    """A sample that cannot be read.

    Attributes:
        name: Its path, its name in an archive, or its number.
        reason: What was wrong, in one line.
    """

    name: str
    reason: str


def sample_name(dataset: Any, index: int) -> str | None:
    """What a sample of a data set is called: its path, or its name in an archive.

    Args:
        dataset: One of ours, or one of torch's wrappers (`Subset`, `ConcatDataset`) of such.
        index: The sample.

    Returns:
        None where it has no name.
    """
    images, index = _image_of(dataset, index)
    names = getattr(images, "paths", getattr(images, "names", None))
    return None if names is None else str(names[index])


def _image_of(dataset: Any, index: int) -> tuple[Any, int]:
    """The images behind a data set, and the position of a sample in them."""
    while True:
        if hasattr(dataset, "datasets"):
            for part in dataset.datasets:
                if index < len(part):
                    dataset = part
                    break
                index -= len(part)
        elif "dataset" in vars(dataset):
            indices = getattr(dataset, "indices", None)
            index = index if indices is None else int(indices[index])
            dataset = dataset.dataset
        else:
            break
    if getattr(dataset, "sample_ids", None) is not None:
        index = int(dataset.sample_ids[index])
    index //= getattr(dataset, "repeats", 1)
    images = getattr(dataset, "images", None)
    images = getattr(images, "images", images)
    if not hasattr(images, "paths") and not hasattr(images, "names") and hasattr(dataset, "names"):
        return dataset, index
    return images, index


class TolerantDataset(Dataset):
    """A data set whose samples that cannot be read come as :class:`BadImage`, without an error.

    Everything else is asked of the data set inside.

    Args:
        dataset: A map-style data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        # a clip that cannot be read must not be replaced by another
        for part in _bottom(dataset):
            if hasattr(part, "strict"):
                part.strict = True

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except READ_ERRORS as error:
            return BadImage(_name(self.dataset, index), _one_line(error))

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _bottom(dataset: Any) -> Iterator[Any]:
    """The data sets that torch's wrappers hold."""
    inner = getattr(dataset, "datasets", None)
    if inner is None and "dataset" in getattr(dataset, "__dict__", {}):
        inner = [dataset.dataset]
    if inner is None:
        yield dataset
    for part in inner or ():
        yield from _bottom(part)


def collate_good(collate: Callable, samples: list[Any]) -> tuple[Any, list[BadImage]]:
    """A batch of the samples that could be read, None without any; and the others."""
    bad = [sample for sample in samples if isinstance(sample, BadImage)]
    good = [sample for sample in samples if not isinstance(sample, BadImage)]
    return (collate(good) if good else None), bad


def find_bad_images(
    dataset: Any, decode: bool = False, workers: int = 8, progress: bool = False
) -> list[BadImage]:
    """Try a data set's images before anything is trained.

    Files must exist and have the header of an image; archives and images in memory are tried when
    they are decoded. Of more than 100,000 files a random part is looked at.

    Args:
        dataset: Any data set.
        decode: Read every sample in full, in a loader's own way.
        workers: Threads.
        progress: Show a bar on a terminal.

    Returns:
        Those that cannot be read, in their order.
    """
    total = len(dataset)
    if decode:
        indices, check = np.arange(total), _decode
    else:
        first, _ = _image_of(dataset, 0) if total else (None, 0)
        if not hasattr(first, "check_header"):
            return []
        indices, check = _distinct_files(dataset), _read_header
    bad = []
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda index: check(dataset, int(index)), indices)
        bar = tqdm(
            results,
            total=len(indices),
            desc="checking images",
            unit="img",
            leave=False,
            disable=None if progress else True,
        )
        for index, reason in zip(indices, bar, strict=True):
            if reason is not None:
                bad.append(BadImage(_name(dataset, int(index)), reason))
    return bad


def _distinct_files(dataset: Any) -> np.ndarray:
    """One sample of each file; of very many files a random part."""
    repeats = getattr(dataset, "repeats", 1)
    indices = np.arange(0, len(dataset), repeats)
    if len(indices) > _MOST_HEADERS:
        drawn = np.random.default_rng(0).choice(len(indices), _MOST_HEADERS, replace=False)
        indices = indices[np.sort(drawn)]
    return indices


def _read_header(dataset: Any, index: int) -> str | None:
    """What is wrong with a file as far as its header tells, or None."""
    images, at = _image_of(dataset, index)
    try:
        images.check_header(at)
    except READ_ERRORS as error:
        return _one_line(error)
    return None


def _decode(dataset: Any, index: int) -> str | None:
    try:
        sample = dataset[index]
    except READ_ERRORS as error:
        return _one_line(error)
    return sample.reason if isinstance(sample, BadImage) else None


def describe_bad_images(bad: list[BadImage], total: int) -> str:
    """A sentence that counts them and names the first."""
    named = "; ".join(f"{image.name}: {image.reason}" for image in bad[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    verb = "image cannot" if total == 1 else "images cannot"
    return f"{len(bad)} of {total} {verb} be read: {named}{more}".rstrip(".")


def _name(dataset: Any, index: int) -> str:
    return sample_name(dataset, index) or f"sample {index}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
