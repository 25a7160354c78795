"""Images with a label on every level of a taxonomy."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from timm_branches.data.images import ArrayImages
from timm_branches.data.seeded import SeededDataset
from timm_branches.data.sources import (
    SPLITS,
    TORCHVISION,
    Source,
    read_csv,
    read_digits,
    read_folder,
    read_tar,
    read_torchvision,
)
from timm_branches.data.stratify import stratified_indices
from timm_branches.taxonomy.taxonomy import Taxonomy
from timm_branches.taxonomy.trees import get_taxonomy

__all__ = [
    "HierarchicalDataset",
    "Subset",
    "coarsen_labels",
    "create_dataset",
    "create_splits",
    "split_dataset",
]


class HierarchicalDataset(SeededDataset):
    """Images in memory or on disk, each with one label a level.

    A transform made by :func:`timm_branches.data.create_transform` is told which sample it gets, so
    that augmentation depends on (seed, epoch, sample) alone; any other callable is given the image
    and nothing else. Seed and epoch lie in shared memory, where worker processes that outlive an
    epoch see them change.

    Args:
        images: uint8 array (N, H, W) or (N, H, W, C), or a sequence of uint8 arrays HW or HWC, or
            of functions that return one.
        labels: (N, L) class indices, -1 for unknown.
        taxonomy: The tree that the labels refer to.
        transform: Makes a float tensor CHW of an uint8 array HWC; None scales to [0, 1].
        in_chans: Channels that grey or RGB images are brought to; None leaves them.

    Raises:
        ValueError: If images and labels differ in number, or labels do not fit the taxonomy.

    Example:
        >>> data = HierarchicalDataset(np.zeros((2, 8, 8), np.uint8), [[0, 1], [1, -1]])
        >>> image, labels = data[1]
        >>> image.shape, labels.tolist()
        (torch.Size([1, 8, 8]), [1, -1])
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        taxonomy: Taxonomy | None = None,
        transform: Callable | None = None,
        in_chans: int | None = None,
    ) -> None:
        labels = torch.as_tensor(labels, dtype=torch.long)
        if labels.ndim != 2 or len(labels) != len(images):
            raise ValueError(
                f"labels must be ({len(images)}, levels), one row per image, not {tuple(labels.shape)}; for leaf "
                "indices use taxonomy.expand(labels)"
            )
        if taxonomy is not None and len(labels):
            sizes = torch.tensor(taxonomy.num_classes)
            if labels.shape[1] != len(sizes) or (labels >= sizes).any() or (labels < -1).any():
                raise ValueError(
                    f"labels with {labels.shape[1]} levels and the highest class indices "
                    f"{labels.amax(0).tolist()} do not fit a taxonomy of {taxonomy.num_classes} classes"
                )
        self.images = ArrayImages(images, in_chans)
        self.labels = labels
        self.taxonomy = taxonomy
        self.transform = transform
        # positions in `images`; a subset holds some of them
        self.sample_ids = torch.arange(len(labels))
        super().__init__()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample.

        Args:
            index: Its position.

        Returns:
            The image (C, H, W), and its labels (L,).
        """
        sample = int(self.sample_ids[index])
        image = self.images[sample]
        if self.transform is None:
            tensor = (
                torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div_(255)
            )
        elif getattr(self.transform, "takes_key", False):
            tensor = self.transform(image, key=(self.seed, self.epoch, sample))
        else:
            tensor = self.transform(image)
        return tensor, self.labels[index]

    def limit(self, count: int, seed: int = 0) -> "Subset":
        """A stratified part, for quick runs: every class keeps its share, as far as whole samples
        allow.

        Args:
            count: Samples wanted; all if there are fewer.
            seed: Which samples.

        Returns:
            A subset with the same transform and taxonomy, its samples in their old order.
        """
        return Subset(
            self, stratified_indices(self.labels, min(count, len(self)), seed).sort().values
        )


class Subset(HierarchicalDataset):
    """Some samples of a dataset, with the same taxonomy and a transform of its own to set.

    Images are not copied. A sample is augmented as in the whole dataset, given the same seed and
    epoch.

    Args:
        dataset: The whole.
        indices: Positions in it.

    Example:
        >>> data = HierarchicalDataset(np.zeros((5, 8, 8), np.uint8), torch.zeros(5, 2))
        >>> len(Subset(data, [0, 3]))
        2
    """

    def __init__(self, dataset: HierarchicalDataset, indices: Any) -> None:
        indices = torch.as_tensor(indices, dtype=torch.long)
        self.images = dataset.images
        self.labels = dataset.labels[indices]
        self.taxonomy = dataset.taxonomy
        self.transform = dataset.transform
        self.sample_ids = dataset.sample_ids[indices]
        SeededDataset.__init__(self, dataset.seed, dataset.epoch)


def split_dataset(
    dataset: HierarchicalDataset, fraction: float = 0.1, seed: int = 0
) -> tuple[Subset, Subset]:
    """Set a stratified part of the training data aside for validation: settings are never chosen on
    the test set.

    Args:
        dataset: The training data.
        fraction: The validation part's share.
        seed: Which samples; the split depends on the labels, the fraction and the seed alone.

    Returns:
        The training and the validation part, each with the dataset's transform: give the latter one
        without augmentation (`val.transform = ...`).

    Raises:
        ValueError: If a part would be empty.

    Example:
        >>> data = HierarchicalDataset(np.zeros((10, 8, 8), np.uint8), torch.zeros(10, 1))
        >>> [len(part) for part in split_dataset(data, 0.2)]
        [8, 2]
    """
    count = round(len(dataset) * fraction)
    if not 0 < count < len(dataset):
        raise ValueError(
            f"fraction={fraction} of {len(dataset)} samples leaves an empty part; take a fraction between 0 and 1 "
            "that leaves at least one sample on either side"
        )
    held_out = stratified_indices(dataset.labels, count, seed)
    mask = torch.zeros(len(dataset), dtype=torch.bool)
    mask[held_out] = True
    return Subset(dataset, (~mask).nonzero()[:, 0]), Subset(dataset, mask.nonzero()[:, 0])


def coarsen_labels(
    dataset: HierarchicalDataset, fraction: float, levels: int = 1, seed: int = 0
) -> tuple[Subset, Subset]:
    """Hide the fine labels of a part of the data, to learn what coarsely labelled images are worth.

    Args:
        dataset: Data that is labelled on all levels.
        fraction: The share of samples that keep the labels of the coarsest levels only, drawn
            stratified.
        levels: How many levels these keep.
        seed: Which samples.

    Returns:
        All samples, -1 standing for what is hidden; and those alone that kept all their labels.

    Raises:
        ValueError: If the fraction is not in (0, 1) or leaves no sample on either side, or no level
            is kept or hidden.

    Example:
        >>> data = HierarchicalDataset(np.zeros((4, 8, 8), np.uint8), [[0, 0], [0, 0], [1, 1], [1, 1]])
        >>> some, full = coarsen_labels(data, 0.5)
        >>> sorted(some.labels.tolist()), full.labels.tolist()
        ([[0, -1], [0, 0], [1, -1], [1, 1]], [[0, 0], [1, 1]])
    """
    depth = dataset.labels.shape[1]
    if not 1 <= levels < depth:
        raise ValueError(f"levels={levels} of {depth}: at least one must be kept and one be hidden")
    full, hidden = split_dataset(dataset, fraction, seed)
    everything = Subset(dataset, range(len(dataset)))
    everything.labels = everything.labels.clone()
    everything.labels[torch.isin(everything.sample_ids, hidden.sample_ids), levels:] = -1
    return everything, full


def _read(
    name_or_path: str, split: str, taxonomy: Any, download: bool, root: str, in_chans: int
) -> Source:
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans must be 3 (RGB) or 1 (grey), not {in_chans}")
    tree = None if taxonomy is None else get_taxonomy(taxonomy)
    path = os.fspath(name_or_path)
    name = path.lower().replace("-", "_")
    if name == "digits":
        return read_digits(tree)
    if name in TORCHVISION:
        return read_torchvision(name, root, split, download, tree)
    if os.path.isdir(path):
        return read_folder(path, in_chans, tree)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} is neither a file or folder nor one of the data sets {', '.join(['digits', *TORCHVISION])}"
        )
    if path.lower().endswith(".csv"):
        return read_csv(path, in_chans, tree)
    if path.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        return read_tar(path, in_chans, tree)
    raise ValueError(
        f"{path} is of no known kind; expected a folder, a .tar, .tar.gz, .tar.bz2, .tar.xz or a .csv"
    )


def create_dataset(
    name_or_path: str | os.PathLike,
    split: str = "train",
    taxonomy: Taxonomy | str | None = None,
    download: bool = False,
    in_chans: int = 3,
    root: str = "data",
    transform: Callable | None = None,
) -> HierarchicalDataset:
    """Make a dataset of a name, a folder, a tar or a CSV.

    Args:
        name_or_path: 'digits' (comes with scikit-learn), 'cifar10', 'cifar100', 'fashion_mnist' or
            'mnist'; a folder of class folders, which may be nested and lie below train, val and
            test; a .tar, .tar.gz, .tar.bz2 or .tar.xz of such a folder; or a .csv with a path and
            the names of its classes in each row. A folder of the same name as a data set is written
            './mnist'.
        split: 'train', 'val', 'test', 'trainval' or 'all'. Where the source has no splits, all is
            'train'.
        taxonomy: The tree of labels, or what `get_taxonomy` takes; class names are matched to it.
            None is the data set's own tree, or the one that nested folders or the columns of the
            CSV describe.
        download: Whether a named data set may be fetched.
        in_chans: 3 for RGB, 1 for grey.
        root: Where named data sets lie.
        transform: Makes a float tensor CHW of an uint8 array HWC, see `create_transform`.

    Returns:
        The dataset, with its `taxonomy`.

    Raises:
        FileNotFoundError: If there is no such data; the message says how to get it.
        ValueError: If the split or the class names do not exist, or files are of no known kind.

    Example:
        >>> data = create_dataset('digits', split='test', in_chans=1)
        >>> len(data), data[0][0].shape
        (360, torch.Size([1, 8, 8]))
    """
    if split not in (*SPLITS, "trainval", "all"):
        raise ValueError(f"no split {split!r}; it is 'train', 'val', 'test', 'trainval' or 'all'")
    split = SPLITS.get(split, split)
    source = _read(os.fspath(name_or_path), split, taxonomy, download, root, in_chans)
    data = HierarchicalDataset(source.images, source.labels, source.taxonomy, transform, in_chans)
    present = {"train"} if source.splits is None else set(source.splits.tolist())
    wanted = {"trainval": {"train", "val"}, "all": {"train", "val", "test"}}.get(split, {split})
    if not wanted & present:
        raise ValueError(
            f"{name_or_path} has no {split!r} split, only {', '.join(sorted(present))}; split_dataset or "
            "create_splits set a part of the training data aside"
        )
    if source.splits is None or present <= wanted:
        return data
    return Subset(data, np.flatnonzero(np.isin(source.splits, list(wanted))))


def create_splits(
    name_or_path: str | os.PathLike, val_fraction: float = 0.1, seed: int = 0, **kwargs: Any
) -> tuple[HierarchicalDataset, HierarchicalDataset, HierarchicalDataset | None]:
    """Training, validation and test data of any source, in one call.

    The source's own validation split is taken where there is one; otherwise a stratified part of
    its training data.

    Args:
        name_or_path: As for `create_dataset`.
        val_fraction: The share of the training data to set aside where there is no validation
            split.
        seed: Which part to set aside.
        **kwargs: What else `create_dataset` takes, but the split.

    Returns:
        The three datasets; the last is None where the source has no test data. All share the images
        and transform: give the last two one without augmentation.

    Example:
        >>> [len(part) for part in create_splits('digits')]
        [1077, 360, 360]
    """
    kwargs.pop("split", None)
    transform = kwargs.pop("transform", None)
    in_chans = kwargs.pop("in_chans", 3)
    options = {"taxonomy": None, "download": False, "root": "data", **kwargs}
    source = _read(os.fspath(name_or_path), "all", in_chans=in_chans, **options)
    data = HierarchicalDataset(source.images, source.labels, source.taxonomy, transform, in_chans)
    splits = np.full(len(data), "train") if source.splits is None else source.splits
    train, val, test = (
        Subset(data, np.flatnonzero(splits == part)) for part in ("train", "val", "test")
    )
    if not len(train):
        raise ValueError(
            f"{name_or_path} has no training data, only {', '.join(sorted(set(splits.tolist())))}"
        )
    if not len(val):
        train, val = split_dataset(train, val_fraction, seed)
    return train, val, test if len(test) else None
