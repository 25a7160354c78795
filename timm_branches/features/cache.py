"""Features of a frozen backbone, computed once and read in every epoch.

They are kept in safetensors files.
"""

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from timm_branches.data.clips.dataset import ClipDataset
from timm_branches.data.datasets import HierarchicalDataset
from timm_branches.data.loader import create_loader
from timm_branches.features.fingerprint import differences, fingerprint, may_augment
from timm_branches.features.heads_only import check_frozen, feature_layout
from timm_branches.features.shards import INDEX, ShardWriter, check_shards, read_index, read_shard
from timm_branches.model import BranchModel
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["FeatureDataset", "cache_features"]


class FeatureDataset(Dataset):
    """Features instead of images, with the labels of the dataset they were computed from.

    Made by `cache_features`.

    Files are mapped into memory when they are first read, in each worker process by itself; none
    stays open.

    Args:
        place: Folder of the files.
        source: The images; only its labels are read.
        index: What the folder's index says.

    Attributes:
        source: The dataset of images or clips.
        views: Augmented views of each sample; epoch e gives view e % views.
        width: Features F of an image or frame.
        place: Folder of the files.
        nbytes: Their size.
    """

    def __init__(self, place: Path, source: HierarchicalDataset, index: dict[str, Any]) -> None:
        self.place = place
        self.source = source
        self.views: int = index["fingerprint"]["views"]
        self.width: int = index["width"]
        self.nbytes = sum(shard["bytes"] for shard in index["shards"])
        self._shards = index["shards"]
        self._starts = np.cumsum([0] + [shard["items"] for shard in self._shards])
        self._opened: dict[int, tuple[torch.Tensor, np.ndarray | None]] = {}
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample.

        Args:
            index: Its position.

        Returns:
            Features (F,), of a clip (T, F), and what the source gives as labels.

        Raises:
            ValueError: The file is damaged.
        """
        index = range(len(self))[index]
        item = self.epoch % self.views * len(self) + index
        number = int(np.searchsorted(self._starts, item, side="right")) - 1
        if number not in self._opened:
            self._opened[number] = read_shard(self.place, self._shards[number], self.width)
        rows, ends = self._opened[number]
        row = item - self._starts[number]
        found = rows[row] if ends is None else rows[ends[row] : ends[row + 1]]
        # a copy: what is done to it must not reach the next epoch
        return found.clone(), self.source.labels[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # a spawned worker maps the files itself

    @property
    def labels(self) -> torch.Tensor:
        """The source's labels as they are now."""
        return self.source.labels

    @property
    def taxonomy(self) -> Taxonomy | None:
        """The tree that the labels refer to."""
        return self.source.taxonomy

    @property
    def epoch(self) -> int:
        """The epoch, which says the view."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins: it reads view `epoch % views`."""
        if not self._epoch.is_shared():  # copy.deepcopy makes an ordinary tensor of a shared one
            self._epoch = self._epoch.share_memory_()
        self._epoch.fill_(epoch)


def cache_features(
    model: BranchModel,
    dataset: HierarchicalDataset,
    folder: str | os.PathLike,
    views: int = 1,
    dtype: torch.dtype | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    verify: bool = False,
) -> FeatureDataset:
    """Compute what a frozen model's heads read of each sample, or take it from files.

    Files belong to a fingerprint of backbone, weights and BatchNorm's statistics, taps,
    preprocessing, samples, seed, views and dtype, and lie in a folder of their own below `folder`.
    If there is none for this fingerprint, the features are computed into a new one, and a warning
    says in what they differ from those that are there; these stay until somebody deletes them.
    Labels do not belong to it: they come from the dataset, so they may change.

    A computation that was interrupted goes on where it was, file by file, in the next call. Among
    several processes (DDP) the first computes and the others wait; all must see the folder.

    Features of a sample take `F * itemsize * views` bytes on the disk, for clips as often as there
    are frames. F counts C for each tap whose heads pool first ('avg', 'max', 'avgmax'), C * H * W
    else: of resnet18's stages 3 to 5 at 224 px 896 or 175,616 numbers.

    Args:
        model: A frozen model; it is put into eval mode meanwhile. What augments in its heads
            (dropout) still does.
        dataset: The images or clips, with the training transform if there are to be several views.
        folder: Where to keep the files. Training and validation data have one each.
        views: Augmented views V of each sample: those of the epochs 0 to V - 1. Epoch e reads view
            e % V.
        dtype: How features are stored; None keeps them as they are, torch.float16 or torch.bfloat16
            halves the files.
        batch_size: Images or clips to compute at once; of clips `model.frames_per_pass` frames, if
            it is set.
        num_workers: Worker processes that load images.
        verify: Read the files that are there once, to check that they hold what was written. Their
            sizes are always checked.

    Returns:
        A dataset of the same length with features (F,), of clips (T, F), in place of images. A
        loader of clips' features needs `collate_fn=collate_clips`.

    Raises:
        ValueError: The backbone is not wholly frozen, a head is a decoder, a setting has no effect,
            maps are of another size than the model was made for, values do not fit dtype, the
            transform does not say what it does, or a file is damaged.

    Example:
        >>> from timm_branches import create_branch_model
        >>> model = create_branch_model('test_resnet', taps=[4, 5], num_classes=2, in_chans=1)
        >>> model = model.freeze()
        >>> data = HierarchicalDataset(np.zeros((6, 32, 32), np.uint8), torch.zeros(6, 2))
        >>> features = cache_features(model, data, 'features/train')
        >>> features[0][0].shape, features[0][1].tolist()
        (torch.Size([288]), [0, 0])
        >>> from timm_branches.features import HeadsOnly
        >>> from timm_branches.task import BranchTask
        >>> task = BranchTask(HeadsOnly(model))         # as BranchTask(model), but of features
    """
    check_frozen(model)
    if not isinstance(dataset, HierarchicalDataset) or not len(dataset):
        raise ValueError(
            "expected a HierarchicalDataset or ClipDataset with samples, not "
            f"{type(dataset).__name__} of {len(dataset)}; what says which samples these are is "
            "fingerprinted."
        )
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}.")
    if views > 1 and not may_augment(dataset):
        raise ValueError(
            f"views={views} has no effect: the dataset's transform does not augment, so that all "
            "views were the same. Take views=1, or create_transform(..., is_training=True)."
        )
    own = next(model.backbone.parameters()).dtype
    dtype = own if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(
            f"dtype={dtype} cannot hold features: take torch.float16, torch.bfloat16 or "
            "torch.float32."
        )
    facts = fingerprint(model, dataset, views, dtype)
    place = (
        Path(folder) / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    )

    def compute() -> None:
        if read_index(place / INDEX) is None:
            _warn(Path(folder), place, facts, dataset)
            _compute(model, dataset, ShardWriter(place, facts), dtype, batch_size, num_workers)

    _on_first_process(compute)
    index = read_index(place / INDEX)
    if index is None:
        raise ValueError(
            f"{place / INDEX} is not there, though the first process computed the features: "
            "processes must see the same folder and have the same weights and data."
        )
    if index["fingerprint"] != facts:
        raise ValueError(f"{place} holds other features than its name says: delete it.")
    check_shards(place, index, verify)
    return FeatureDataset(place, dataset, index)


def _warn(folder: Path, place: Path, facts: dict[str, Any], dataset: HierarchicalDataset) -> None:
    """Say what will be computed anew and why, and what a single view of augmented images means."""
    others = {
        path.parent: index["fingerprint"]
        for path in folder.glob(f"*/{INDEX}")
        if (index := read_index(path, strict=False))
    }
    if others:
        nearest = min(others, key=lambda path: len(differences(others[path], facts)))
        warnings.warn(
            f"the features in {nearest} are stale, they differ in: "
            f"{', '.join(differences(others[nearest], facts))}. New ones are computed into "
            f"{place}; delete what is not needed any more.",
            stacklevel=5,
        )
    if facts["views"] == 1 and may_augment(dataset):
        epoch = dataset.epoch
        try:
            dataset.set_epoch(0)
            first = dataset[0][0]
            for other in range(1, 8):
                dataset.set_epoch(other)
                if not torch.equal(dataset[0][0], first):
                    warnings.warn(
                        "views=1 of a dataset that augments: each epoch will see the same "
                        "augmented images. Take more views, or a transform without augmentation.",
                        stacklevel=5,
                    )
                    break
        finally:
            dataset.set_epoch(epoch)


def _compute(
    model: BranchModel,
    dataset: HierarchicalDataset,
    writer: ShardWriter,
    dtype: torch.dtype,
    batch_size: int,
    num_workers: int,
) -> None:
    """Write the features that are missing: all samples of view 0, then of view 1, and so on."""
    size, views, done = len(dataset), writer.index["fingerprint"]["views"], writer.done
    epoch, was_training = dataset.epoch, model.training
    data = copy.copy(dataset)
    if isinstance(data, ClipDataset):
        # a clip in the place of one that cannot be read would have its own label
        data.strict = True
    model.eval()
    try:
        with tqdm(
            total=views * size, initial=done, unit="sample", desc="features", disable=None
        ) as bar:
            for view in range(done // size, views):
                data.set_epoch(view)
                part = Subset(data, range(max(0, done - view * size), size))
                for inputs in create_loader(
                    part,
                    batch_size,
                    num_workers=num_workers,
                    rank=0,
                    world_size=1,
                    persistent_workers=False,
                    collate_fn=_inputs,
                ):
                    rows = _features(model, inputs, dtype)
                    lengths = None
                    if inputs[0].ndim == 4:  # clips (T, C, H, W)
                        lengths = [len(x) for x in inputs]
                    writer.add(rows, lengths)
                    bar.update(len(inputs))
    finally:
        model.train(was_training)
        dataset.set_epoch(epoch)
    writer.close()


def _inputs(samples: Sequence[tuple[torch.Tensor, Any]]) -> list[torch.Tensor]:
    return [x for x, _ in samples]


@torch.no_grad()
def _features(model: BranchModel, inputs: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Features (N, F) of images (C, H, W), or of all frames of clips (T, C, H, W) in a row."""
    is_clip = inputs[0].ndim == 4
    if not is_clip and model.temporal_heads:
        raise ValueError(
            f"the heads {sorted(model.temporal_heads)} read clips, the dataset has images: make a "
            "ClipDataset."
        )
    first = 1 if is_clip else 0  # a clip's length may differ
    sizes = {tuple(x.shape[first:]) for x in inputs}
    if len(sizes) > 1:
        raise ValueError(
            f"samples of a batch have the shapes {sorted(sizes)}; a transform makes them equal."
        )
    like = next(model.backbone.parameters())
    frames = (torch.cat(inputs) if is_clip else torch.stack(inputs)).to(like.device, like.dtype)
    layout, _ = feature_layout(model)
    parts = []
    for images in frames.split((model.frames_per_pass if is_clip else None) or len(frames)):
        maps = model.forward_taps(images)
        columns = []
        for key, feature in layout.items():
            found = maps[feature.head]
            y = found if isinstance(found, torch.Tensor) else found[feature.position]
            y = y if feature.pool is None else feature.pool(y)[:, :, None, None]
            if y.shape[1:] != feature.shape:
                raise ValueError(
                    f"the map at {key} is {tuple(y.shape[1:])} for images of "
                    f"{tuple(images.shape[1:])}, but {feature.shape} at the size that the model "
                    f"was made for, {model.input_size}: make the model with img_size=, or "
                    "transform images to that."
                )
            columns.append(y.flatten(1))
        parts.append(torch.cat(columns, 1).cpu())
    rows = torch.cat(parts)
    stored = rows.to(dtype)
    if rows.isfinite().all() and not stored.isfinite().all():
        raise ValueError(
            f"features up to {float(rows.abs().max()):.3g} do not fit {dtype}: take "
            "torch.bfloat16, or leave out dtype=."
        )
    return stored


def _on_first_process(work: Callable[[], None]) -> None:
    """Run it here, or on the first of several processes while the others wait."""
    if not dist.is_available() or not dist.is_initialized():
        return work()
    # a group of its own: the default one's timeout, made for one step of training, is minutes
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    failure: Exception | None = None
    message: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            failure, message = error, [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(message, src=0, group=group)
    dist.destroy_process_group(group)
    if failure is not None:
        raise failure
    if message[0] is not None:
        raise RuntimeError(f"the first process could not compute the features: {message[0]}.")
