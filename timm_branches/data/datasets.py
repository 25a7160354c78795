"""Images with a label on every level of a taxonomy."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from timm_branches.arguments import as_items, check_number, shown
from timm_branches.data.images import ArrayImages
from timm_branches.data.seeded import SeededDataset
from timm_branches.data.sources import (
    READERS,
    TORCHVISION,
    Source,
    read_categories,
    read_csv,
    read_digits,
    read_folder,
    read_tar,
    read_torchvision,
    register_reader,
)
from timm_branches.data.splits import SPLIT_NAMES, SPLITS, wanted_splits
from timm_branches.data.stratify import grouped_indices, keep_one_of_each, stratified_indices
from timm_branches.data.summary import DataSummary
from timm_branches.data.timm_readers import read_hfds, read_wds, refuse_hfids, refuse_tfds
from timm_branches.taxonomy.matching import match_taxonomies
from timm_branches.taxonomy.table_files import is_table_name
from timm_branches.taxonomy.taxonomy import Taxonomy
from timm_branches.taxonomy.trees import get_taxonomy

_logger = logging.getLogger(__name__)

__all__ = [
    "HierarchicalDataset",
    "HierarchicalSubset",
    "coarsen_labels",
    "create_dataset",
    "create_splits",
    "split_dataset",
]


register_reader("hfds", read_hfds)
register_reader("wds", read_wds)
register_reader("hfids", refuse_hfids)
register_reader("tfds", refuse_tfds)


def to_unit_tensor(image: np.ndarray) -> torch.Tensor:
    """An image (H, W, C), uint8 or float32 in [0, 1], as a tensor (C, H, W) of values in [0, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return tensor.float().div_(255) if tensor.dtype == torch.uint8 else tensor


def as_label_rows(labels: Any) -> torch.Tensor:
    """Labels as a LongTensor; numbers that are not whole are refused, not cut.

    Raises:
        ValueError: They are no whole numbers.
    """
    try:
        given = labels if isinstance(labels, torch.Tensor) else torch.as_tensor(labels)
        if given.is_floating_point() and not isinstance(labels, torch.Tensor):
            # as Python has them: float32 would take 1e-50 for 0, and 1 - 1e-9 for 1
            given = torch.as_tensor(labels, dtype=torch.float64)
        whole = given.to(torch.long)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"labels= takes rows of class indices, got {shown(labels)}.") from error
    if given.is_floating_point() and not bool((given == whole).all()):
        raise ValueError(f"labels= takes whole numbers, got {shown(labels)}.")
    return whole


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

    Attributes:
        groups: For each sample the number of what it belongs to (a subject, a video), which
            splitting does not divide; None if each stands alone.
        summary: What the reader understood, where there was one.

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
        labels = as_label_rows(labels)
        if not hasattr(images, "__len__"):
            raise ValueError(f"images= takes an array or a sequence of arrays, got {images!r}.")
        if taxonomy is not None and not isinstance(taxonomy, Taxonomy):
            raise ValueError(f"taxonomy= takes a Taxonomy, got {taxonomy!r}.")
        if labels.ndim != 2 or len(labels) != len(images):
            raise ValueError(
                f"labels must be ({len(images)}, levels), one row per image, not "
                f"{tuple(labels.shape)}; for leaf "
                "indices use taxonomy.expand(labels)."
            )
        if taxonomy is not None and len(labels):
            sizes = torch.tensor(taxonomy.num_classes)
            if labels.shape[1] != len(sizes) or (labels >= sizes).any() or (labels < -1).any():
                raise ValueError(
                    f"labels with {labels.shape[1]} levels and the highest class indices "
                    f"{labels.amax(0).tolist()} do not fit a taxonomy of {taxonomy.num_classes} "
                    "classes."
                )
        self.images = ArrayImages(images, in_chans)
        self.labels = labels
        self.taxonomy = taxonomy
        self.transform = transform
        self.groups: np.ndarray | None = None
        self.summary: DataSummary | None = None
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
            tensor = to_unit_tensor(image)
        elif getattr(self.transform, "takes_key", False):
            tensor = self.transform(image, key=(self.seed, self.epoch, sample))
        else:
            tensor = self.transform(image)
        return tensor, self.labels[index]

    def limit(self, count: int, seed: int = 0) -> "HierarchicalSubset":
        """A stratified part, for quick runs.

        Every class keeps its share, as far as whole samples allow.

        Args:
            count: Samples wanted; all if there are fewer.
            seed: Which samples.

        Returns:
            A subset with the same transform and taxonomy, its samples in their old order.
        """
        check_number("count", count, 1, whole=True)
        indices = stratified_indices(self.labels, min(count, len(self)), seed)
        return self.subset(indices.sort().values)

    def subset(self, indices: Any) -> "HierarchicalSubset":
        """Some of the samples, at these positions."""
        return HierarchicalSubset(self, indices)


def _as_positions(indices: Any, count: int) -> torch.Tensor:
    """Positions in a data set as a LongTensor (N,).

    Raises:
        ValueError: They are no whole numbers.
        IndexError: One is outside the data set.
    """
    try:
        given = indices if isinstance(indices, torch.Tensor) else torch.as_tensor(list(indices))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"indices= takes positions, got {shown(indices)}.") from error
    if given.numel() == 0:
        return given.long().reshape(-1)
    if given.ndim != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"indices= takes whole numbers in one row, got {shown(indices)}.")
    outside = (given < -count) | (given >= count)
    if outside.any():
        raise IndexError(f"position {int(given[outside][0])} is outside the {count} samples.")
    return given.long()


class HierarchicalSubset(HierarchicalDataset):
    """Some samples of a dataset, with the same taxonomy and a transform of its own to set.

    Images are not copied. A sample is augmented as in the whole dataset, given the same seed and
    epoch.

    Args:
        dataset: The whole.
        indices: Positions in it.

    Example:
        >>> data = HierarchicalDataset(np.zeros((5, 8, 8), np.uint8), torch.zeros(5, 2))
        >>> len(HierarchicalSubset(data, [0, 3]))
        2
    """

    def __init__(self, dataset: HierarchicalDataset, indices: Any) -> None:
        indices = _as_positions(indices, len(dataset))
        self.images = dataset.images
        self.labels = dataset.labels[indices]
        self.taxonomy = dataset.taxonomy
        self.transform = dataset.transform
        self.sample_ids = dataset.sample_ids[indices]
        self.groups = None if dataset.groups is None else dataset.groups[indices.numpy()]
        self.summary = dataset.summary
        SeededDataset.__init__(self, dataset.seed, dataset.epoch)


def split_dataset(
    dataset: HierarchicalDataset, fraction: float = 0.1, seed: int = 0
) -> tuple[HierarchicalSubset, HierarchicalSubset]:
    """Set a stratified part of the training data aside for validation.

    Settings are never chosen on the test set. A class keeps at least one training image. What
    belongs together (`dataset.groups`: the images of a subject, the clips of a video) is not
    divided.

    Args:
        dataset: The training data.
        fraction: The validation part's share.
        seed: Which samples; the split depends on the labels, the groups, the fraction and the seed
            alone.

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
    check_number("fraction", fraction)
    count = round(len(dataset) * fraction)
    if not 0 < count < len(dataset):
        raise ValueError(
            f"fraction={fraction} of {len(dataset)} samples leaves an empty part; take a fraction "
            "between 0 and 1 that leaves at least one sample on either side."
        )
    if dataset.groups is None:
        drawn = stratified_indices(dataset.labels, count, seed)
        held_out = keep_one_of_each(dataset.labels, drawn)
        if not len(held_out):
            _logger.warning(
                "Every class has a single image: %d classes are validated without a training "
                "image.",
                len(drawn),
            )
            held_out = drawn
    else:
        held_out = grouped_indices(dataset.labels, dataset.groups, count, seed)
    mask = torch.zeros(len(dataset), dtype=torch.bool)
    mask[held_out] = True
    if not mask.any() or mask.all():
        why = "every class needs a training image"
        if dataset.groups is not None:
            why += f", and {len(set(dataset.groups.tolist()))} groups are not divided"
        raise ValueError(
            f"fraction={fraction} of {len(dataset)} samples cannot be set aside: {why}. Give a "
            "validation split of your own, or more data."
        )
    return HierarchicalSubset(dataset, (~mask).nonzero()[:, 0]), HierarchicalSubset(
        dataset, mask.nonzero()[:, 0]
    )


def coarsen_labels(
    dataset: HierarchicalDataset, fraction: float, levels: int = 1, seed: int = 0
) -> tuple[HierarchicalSubset, HierarchicalSubset]:
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
        >>> labels = [[0, 0], [0, 0], [1, 1], [1, 1]]
        >>> data = HierarchicalDataset(np.zeros((4, 8, 8), np.uint8), labels)
        >>> some, full = coarsen_labels(data, 0.5)
        >>> sorted(some.labels.tolist()), full.labels.tolist()
        ([[0, -1], [0, 0], [1, -1], [1, 1]], [[0, 0], [1, 1]])
    """
    depth = dataset.labels.shape[1]
    if not 1 <= levels < depth:
        raise ValueError(
            f"levels={levels} of {depth}: at least one must be kept and one be hidden."
        )
    full, hidden = split_dataset(dataset, fraction, seed)
    everything = HierarchicalSubset(dataset, range(len(dataset)))
    everything.labels = everything.labels.clone()
    everything.labels[torch.isin(everything.sample_ids, hidden.sample_ids), levels:] = -1
    return everything, full


def read_source(
    name_or_path: Any,
    split: str = "all",
    taxonomy: Any = None,
    download: bool = False,
    root: str = "data",
    in_chans: int = 3,
    **columns: Any,
) -> Source:
    """The source behind what `create_dataset` takes."""
    if isinstance(in_chans, bool) or not isinstance(in_chans, int) or in_chans < 1:
        raise ValueError(
            f"in_chans must be 3 (RGB), 1 (grey), or a number of bands, not {in_chans!r}."
        )
    tree = None if taxonomy is None else get_taxonomy(taxonomy)
    columns = {name: value for name, value in columns.items() if value is not None}
    if isinstance(name_or_path, Source):
        _refuse_columns(columns, "a Source, which has its labels")
        return with_taxonomy(name_or_path, tree)
    if not isinstance(name_or_path, str | os.PathLike):
        own_root = {} if root == "data" else {"root": root}
        return read_csv(name_or_path, in_chans, tree, **own_root, **columns)
    path = os.fspath(name_or_path)
    if is_table_name(path) and os.path.isfile(path):
        return read_csv(path, in_chans, tree, **columns)
    if path.lower().endswith(".json") and os.path.isfile(path):
        _refuse_columns(columns, f"{path}, which is no table")
        return read_categories(path, in_chans, tree)
    prefix, slash, remainder = path.partition("/")
    prefix = prefix if prefix in READERS else prefix.lower()  # timm's are found in capitals, too
    if slash and prefix in READERS:
        options = {"split": split, "in_chans": in_chans, "taxonomy": tree, **columns}
        return with_taxonomy(READERS[prefix](remainder, **options), tree)
    _refuse_columns(columns, f"{path}, which is no table")
    name = path.lower().replace("-", "_")
    if in_chans not in (1, 3) and (name == "digits" or name in TORCHVISION):
        raise ValueError(f"in_chans must be 3 (RGB) or 1 (grey) for {name}, not {in_chans}.")
    if name == "digits":
        return read_digits(tree)
    if name in TORCHVISION:
        return read_torchvision(name, root, split, download, tree)
    if os.path.isdir(path):
        return read_folder(path, in_chans, tree)
    if not os.path.isfile(path):
        known = ", ".join(["digits", *TORCHVISION, *(f"{prefix}/..." for prefix in READERS)])
        raise FileNotFoundError(
            f"{path} is neither a file or folder nor one of the data sets {known}."
        )
    if path.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        return read_tar(path, in_chans, tree)
    raise ValueError(
        f"{path} is of no known kind; expected a folder, a .tar, .tar.gz, .tar.bz2, .tar.xz, or a "
        "table (.csv, .tsv, .parquet)."
    )


def _refuse_columns(columns: dict[str, Any], what: str) -> None:
    if columns:
        raise ValueError(
            f"{', '.join(columns)} name columns of a table and have no effect on {what}."
        )


def with_taxonomy(source: Source, taxonomy: Taxonomy | None) -> Source:
    """The source with its labels in another tree's numbers, found by their names.

    Raises:
        ValueError: The source has classes that the tree has not.
    """
    if taxonomy is None or taxonomy is source.taxonomy:
        return source
    translate = match_taxonomies(
        source.taxonomy, taxonomy, given_name="the source", expected_name="the taxonomy"
    )
    labels = source.labels if translate is None else translate(source.labels)
    return replace(source, labels=labels, taxonomy=taxonomy)


def take_split(data: Any, source: Source, split: str, where: Any) -> Any:
    """The part of a whole data set that a split names; the whole where it is all of it.

    Raises:
        ValueError: The source has no such split.
    """
    wanted = wanted_splits(split)
    present = {"train"} if source.splits is None else set(source.splits.tolist())
    if not wanted & present:
        raise ValueError(
            f"{where} has no {split!r} split, only {', '.join(sorted(present))}; split_dataset or "
            "create_splits set a part of the training data aside."
        )
    if source.splits is None or present <= wanted:
        return data
    return data.subset(np.flatnonzero(np.isin(source.splits, list(wanted))))


def take_splits(
    data: Any, source: Source, val_fraction: float, seed: int, split: Callable, where: Any
) -> tuple[Any, Any, Any]:
    """Training, validation and test part of a whole data set.

    Args:
        data: The whole.
        source: Where it came from, with its splits.
        val_fraction: What to set aside of the training data where there is no validation split.
        seed: Which part to set aside.
        split: Sets it aside, as :func:`split_dataset`.
        where: Its name, for a message.
    """
    splits = np.full(len(data), "train") if source.splits is None else source.splits
    train, val, test = (data.subset(np.flatnonzero(splits == part)) for part in SPLITS)
    if not len(train):
        raise ValueError(
            f"{where} has no training data, only {', '.join(sorted(set(splits.tolist())))}."
        )
    if not len(val):
        train, val = split(train, val_fraction, seed)
    return train, val, test if len(test) else None


def create_dataset(
    name_or_path: Any,
    split: str = "train",
    taxonomy: Taxonomy | str | None = None,
    download: bool = False,
    in_chans: int = 3,
    root: str = "data",
    transform: Callable | None = None,
    *,
    levels: Sequence[str] | None = None,
    path_column: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    value_range: tuple[float, float] | None = None,
) -> HierarchicalDataset:
    """Make a dataset of a name, a folder, a tar, a table, or a :class:`Source` of your own.

    What was understood is in its `summary`; :func:`timm_branches.data.summarize` joins those of
    several splits.

    Args:
        name_or_path: 'digits' (comes with scikit-learn), 'cifar10', 'cifar100', 'fashion_mnist' or
            'mnist'; a folder of class folders, which may be nested and lie below train, val and
            test; a .tar, .tar.gz, .tar.bz2 or .tar.xz of such a folder; a table (.csv, .tsv,
            .parquet, a data frame) with a path and the names of its classes in each row; a
            :class:`Source`; timm's 'hfds/...' and 'wds/...', whose labels may be several columns or
            fields (`levels`); or 'prefix/...' of a registered reader. A folder of the same name as
            a data set is written './mnist'.
        split: 'train', 'val', 'test', 'trainval' or 'all'. Where the source has no splits, all is
            'train'.
        taxonomy: The tree of labels, or what `get_taxonomy` takes; class names are matched to it.
            None is the data set's own tree, or the one that nested folders or the columns of the
            table describe.
        download: Whether a named data set may be fetched.
        in_chans: 3 for RGB, 1 for grey.
        root: Where named data sets lie; of a data frame, what its paths are relative to.
        transform: Makes a float tensor CHW of an uint8 array HWC, see `create_transform`.
        levels: A table's columns of the levels, coarsest first; None finds them.
        path_column: A table's column of paths.
        split_column: A table's column of splits.
        group_column: A table's column of what is never divided between two splits.
        value_range: The values of black and white of images deeper than 8 bits, such as (0, 4095);
            see :mod:`timm_branches.data.decode`.

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
    wanted_splits(split)  # a wrong one is refused before anything is read
    split = SPLIT_NAMES.get(split.lower(), split)
    source = read_source(
        name_or_path,
        split,
        taxonomy,
        download,
        root,
        in_chans,
        levels=levels,
        path_column=path_column,
        split_column=split_column,
        group_column=group_column,
    )
    set_value_range(source, value_range, name_or_path)
    return take_split(_whole(source, transform, in_chans), source, split, name_or_path)


def set_value_range(source: Source, value_range: tuple[float, float] | None, where: Any) -> None:
    """Tell a source's images which values are black and white.

    Raises:
        ValueError: They are not decoded from files, or the range is none.
    """
    if value_range is None:
        return
    limits = as_items("value_range=", value_range, "(0, 4095)")
    if len(limits) != 2:
        raise ValueError(f"value_range= takes two numbers, such as (0, 4095), got {value_range!r}.")
    for number in limits:
        check_number("value_range=", number)
    low, high = limits
    if not low < high:
        raise ValueError(
            f"value_range={tuple(value_range)}: give the values of black and white, as in (0, "
            "4095)."
        )
    if not hasattr(source.images, "value_range"):
        raise ValueError(f"value_range has no effect on {where}, whose images are no files.")
    source.images.value_range = (float(low), float(high))


def _whole(source: Source, transform: Callable | None, in_chans: int) -> HierarchicalDataset:
    data = HierarchicalDataset(source.images, source.labels, source.taxonomy, transform, in_chans)
    data.groups, data.summary = source.groups, source.summary
    return data


def create_splits(
    name_or_path: Any, val_fraction: float = 0.1, seed: int = 0, **kwargs: Any
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
    value_range = kwargs.pop("value_range", None)
    source = read_source(name_or_path, "all", in_chans=in_chans, **kwargs)
    set_value_range(source, value_range, name_or_path)
    data = _whole(source, transform, in_chans)
    return take_splits(data, source, val_fraction, seed, split_dataset, name_or_path)
