"""Predictions for people: which classes a saved model sees in images, as paths through its tree.

Images are prepared exactly as for validation in training. They are decoded, and their predictions
handed out, one batch at a time, so a folder of any size can be gone through.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Subset

from timm_branches.data.image_list import ImageList
from timm_branches.hierarchy import Prediction, sum_upwards
from timm_branches.hierarchy.calibration import Calibration
from timm_branches.hierarchy.decode import Decoder
from timm_branches.inference.calibrated import confidence_drift, model_calibration
from timm_branches.model import BranchModel
from timm_branches.taxonomy import Taxonomy, get_taxonomy, match_taxonomies

if TYPE_CHECKING:
    from timm_branches.data.transforms import SampleTransform

__all__ = ["Predictions", "Record", "model_transform", "predict"]

# PIL reports a broken PNG as a SyntaxError
UNREADABLE = (OSError, ValueError, SyntaxError)


@dataclass(frozen=True)
class Record:
    """What a model says of one image.

    `labels`, `probabilities` and `path` have one entry a level, down to the level where the path
    ends: at a leaf, or where the model is not sure enough.

    Attributes:
        file: The image's file, `archive.tar:member`, or `image 3` for the fourth of images in
            memory.
        labels: Class index per level (per head for a model without a tree).
        probabilities: What the decoder gives for each of them.
        path: Their names; empty for a model without a tree.
        stopped: Whether the threshold ended the path above the class that the decoder had chosen.
        novelty: Where `novel` was asked for, the probability that the thing is of an unknown kind
            of the last class of the path, if that is the answer; else None.
        candidates: For every level its most probable classes and the chosen one as (index,
            probability by this level alone), where `top` asked for them.
        error: Why the image could not be read; nothing else is known of it then.
    """

    file: str
    labels: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    path: tuple[str, ...] = ()
    stopped: bool = False
    novelty: float | None = None
    candidates: tuple[tuple[tuple[int, float], ...], ...] = ()
    error: str | None = None


def predict(
    model: "BranchModel | str | os.PathLike",
    images: Any,
    taxonomy: "Taxonomy | str | os.PathLike | None" = None,
    decoder: "str | Decoder | None" = None,
    threshold: float | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: "torch.device | str | None" = None,
    strict: bool = True,
    top: int = 0,
    calibrated: bool = True,
    novel: bool = False,
) -> "Predictions":
    """Classify images on every level of a model's tree.

    A model with one head a level is decoded as it is. A flat model, with a single head of the
    tree's leaves, has its leaf probabilities summed upwards first. A model without a tree gives
    each head's most probable class. Decoders beside such heads are left out, and not computed.

    Args:
        model: A model, or what :func:`timm_branches.load_model` takes.
        images: A file, a folder (searched for images, natural order), a tar of images, a PIL image,
            an array (H, W) or (H, W, C) of uint8, a uint8 tensor (C, H, W), or a floating-point
            tensor (C, H, W) that the model's transform has made already; or any number of these.
        taxonomy: The tree of a model that was saved without one, or what `get_taxonomy` takes. Of a
            model with a tree the same classes in another order: labels are numbered as there.
        decoder: How the levels' answers become one path, see `timm_branches.hierarchy.decode`; None
            is 'best-path', for a flat model 'leaf-marginal', and each head on its own without a
            tree. What :func:`timm_branches.hierarchy.cost_decoder` makes is one, too.
        threshold: Stop at the deepest level whose probability is at least this, from 0 to 1.
        batch_size: Images a batch.
        num_workers: Processes that read images; 0 reads them in this one.
        device: Where the model is moved to; None leaves a model where it is and puts a loaded one
            on a GPU if there is one.
        strict: Raise at the first image that cannot be read; otherwise it has a record with its
            `error`.
        top: How many candidates of each level to keep in the records.
        calibrated: Answer by the model's calibration, if it has one
            (:func:`timm_branches.train.calibrate`) and neither `decoder` nor `threshold` is given.
        novel: Say where things stop being known, see :mod:`timm_branches.hierarchy.novelty`: by
            the children's mass, of flat models by their entropy. Without `decoder` or `threshold`.

    Returns:
        :class:`Predictions`: iterate over it for one :class:`Record` an image, in order.

    Raises:
        FileNotFoundError: A path given does not exist.
        ValueError: There are no images, the model's file is damaged, or a tree is missing, does not
            fit, or has other classes than the model's own; while iterating: an image cannot
            be read, or the model's outputs are not finite.

    Example:
        >>> records = predict('model.safetensors', ['photos/', 'a.jpg'])  # doctest: +SKIP
        >>> for record in records:  # doctest: +SKIP
        ...     print(record.file, record.path, record.probabilities)
        photos/1.jpg ('animal', 'pet', 'cat') (0.98, 0.91, 0.87)
        a.jpg ('transport',) (0.99,)
    """
    if not isinstance(model, BranchModel):
        from timm_branches.factory import load_model

        model = load_model(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if batch_size < 1 or num_workers < 0 or top < 0:
        raise ValueError(
            f"batch_size must be at least 1, num_workers and top at least 0; got {batch_size}, "
            f"{num_workers} and {top}."
        )
    levels = Levels(model, taxonomy, decoder, threshold, calibrated, novel)
    listed = ImageList(images, model.in_chans, model.pretrained_cfg.get("value_range"))
    if device is not None:
        model.to(find_device(device))
    return Predictions(model, listed, levels, batch_size, num_workers, strict, top)


class Predictions:
    """The records of images, in their order; made by :func:`predict`.

    Each iteration runs the model anew.

    Attributes:
        images: The images, to look at beside what was predicted.
        levels: Names of the levels, coarsest first; of the heads for a model without a tree.
        taxonomy: The tree, or None.
        calibration: What the answers are calibrated to, or None.
        novel: Whether answers say where things stop being known.
    """

    def __init__(
        self,
        model: BranchModel,
        images: ImageList,
        levels: "Levels",
        batch_size: int,
        num_workers: int,
        strict: bool,
        top: int,
    ) -> None:
        self.model, self.images, self._levels = model, images, levels
        self.levels, self.taxonomy = levels.names, levels.taxonomy
        self.calibration, self.novel = levels.calibration, levels.novel
        self.batch_size, self.num_workers = batch_size, num_workers
        self.strict, self.top = strict, top

    def __len__(self) -> int:
        return len(self.images)

    def drift(self) -> str | None:
        """A sentence, if the images iterated over are unlike those of the calibration."""
        return self._levels.drift()

    def __iter__(self) -> Iterator[Record]:
        return self.records(range(len(self)))

    def records(self, indices: Sequence[int]) -> Iterator[Record]:
        """The records of some of the images alone, in this order.

        Args:
            indices: Which, from 0.
        """
        from timm_branches.data import create_loader

        self._levels.begin()
        if not len(indices):
            return
        samples = Subset(_Samples(self.images, model_transform(self.model)), indices)
        loader = create_loader(
            samples,
            self.batch_size,
            num_workers=self.num_workers,
            rank=0,
            world_size=1,
            collate_fn=list,
            persistent_workers=False,
        )
        names = iter([self.images.names[index] for index in indices])
        for batch in loader:
            # an image that cannot be read is a text that says why
            tensors = [sample for sample in batch if not isinstance(sample, str)]
            results = iter(self._classify(tensors))
            for sample in batch:
                file = next(names)
                if not isinstance(sample, str):
                    yield Record(file, **next(results))
                elif self.strict:
                    raise ValueError(sample)
                else:
                    yield Record(file, error=sample)

    def _classify(self, tensors: list[torch.Tensor]) -> list[dict[str, Any]]:
        if not tensors:
            return []
        parameter = next(self.model.parameters())
        x = torch.stack(tensors).to(parameter.device, parameter.dtype)  # (B, C, H, W)
        return self._levels.read(self._forward(x), self.top)

    @torch.inference_mode()
    def _forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        training = self.model.training
        self.model.eval()
        try:
            outputs = self.model(x, heads=self._levels.heads)
        finally:
            self.model.train(training)
        logits = {name: y.float().cpu() for name, y in outputs.items()}
        for name, y in logits.items():
            if y.ndim != 2:
                raise ValueError(
                    f"predict() classifies whole images; head {name!r} gives {tuple(y.shape)} for "
                    f"{len(x)} images."
                )
            if not y.isfinite().all():
                raise ValueError(
                    f"head {name!r} of the model gives numbers that are not finite: the model has "
                    "diverged in training, or its input is out of bounds."
                )
        return list(logits.values())


class Levels:
    """How a model's outputs become rows of labels: its tree, or the one given, and the decoder."""

    def __init__(
        self,
        model: BranchModel,
        taxonomy: Any,
        decoder: "str | Decoder | None",
        threshold: float | None,
        calibrated: bool = True,
        novel: bool = False,
    ) -> None:
        given = None if taxonomy is None else get_taxonomy(taxonomy)
        tree = given if model.taxonomy is None else model.taxonomy
        self.heads = _classifying_heads(model)
        classes = tuple(model.num_classes[name] for name in self.heads)
        self.flat = tree is not None and classes != tree.num_classes
        if tree is not None and self.flat and classes != (tree.num_leaves,):
            raise ValueError(
                f"the tree does not fit the model, whose heads have {model.num_classes} classes: "
                f"its levels have {tree.num_classes} classes, and it has {tree.num_leaves} leaves."
            )
        _check_decoding(tree, decoder, threshold)
        if novel and (decoder is not None or threshold is not None):
            raise ValueError("novel has an answer of its own: leave decoder and threshold out.")
        if novel and tree is None:
            raise ValueError("novel needs a tree, and this model has none: give its taxonomy.")
        self.novel = novel
        self.tree, self.threshold = tree, threshold
        # what labels are numbered by, and the table of each level from the model's numbers to it
        self.taxonomy = tree
        self.renumbering: list[torch.Tensor] | None = None
        if tree is not None and given is not None and given.nodes != tree.nodes:
            self.taxonomy = given
            self.renumbering = _renumbering(tree, given)
        # summed leaves say the same thing on every level: multiplying them would count it several
        # times
        self.decoder = decoder or ("leaf-marginal" if self.flat else "best-path")
        self.names: tuple[str, ...] = self.heads if tree is None else tree.levels
        self.calibration: Calibration | None = None
        if calibrated and decoder is None and threshold is None and not novel:
            self.calibration = model_calibration(model, tree)
        self._sure: list[torch.Tensor] = []  # the likeliest leaves' probabilities, calibrated

    def begin(self) -> None:
        """Forget what was answered."""
        self._sure.clear()

    def drift(self) -> str | None:
        """A sentence, if what was answered so far is unlike the data of the calibration."""
        if self.calibration is None or not self._sure:
            return None
        return confidence_drift(self.calibration, torch.cat(self._sure))

    def read(self, logits: Sequence[torch.Tensor], top: int) -> list[dict[str, Any]]:
        """What a record holds, for each row of a batch's logits.

        Args:
            logits: (B, classes) for each head.
            top: How many candidates of each level are wanted.
        """
        if self.tree is None:
            chances = [y.softmax(-1) for y in logits]
            best = [p.max(-1) for p in chances]
            labels = torch.stack([b.indices for b in best], 1)  # (B, L)
            probabilities = torch.stack([b.values for b in best], 1)
            stopped = [False] * len(labels)
            novelty: list[float | None] = [None] * len(labels)
        else:
            from timm_branches.hierarchy.decode import back_off, decode

            levels = sum_upwards(logits[0], self.tree) if self.flat else list(logits)
            # on an uneven tree what the leaves sum to is less than 1, and is meant to be
            to_chances = torch.exp if self.flat else partial(torch.softmax, dim=-1)
            chances = [to_chances(y) for y in levels]
            novelty = [None] * len(levels[0])
            if self.novel:
                final, decided, novelty = self._where_known(levels)
            elif self.calibration is not None:
                final, decided, log_p = self.calibration.answer(levels, self.tree)
                self._sure.append(log_p.amax(1).exp())
            else:
                decided = decode(levels, self.tree, self.decoder)
                final = decided if self.threshold is None else back_off(decided, self.threshold)
            labels, probabilities = final.labels, final.probabilities
            stopped = (labels != decided.labels).any(1).tolist()
        highest = []
        if top:
            highest = [p.topk(min(top, p.shape[1])) for p in chances]
        records = []
        for i, row in enumerate(labels.tolist()):
            if -1 in row:
                row = row[: row.index(-1)]
            candidates = []
            for level, (values, indices) in enumerate(highest):
                known = dict(zip(indices[i].tolist(), values[i].tolist(), strict=True))
                if level < len(row):
                    known.setdefault(row[level], chances[level][i, row[level]].item())
                candidates.append(known)
            records.append(
                {
                    "labels": self._renumbered(row),
                    "probabilities": tuple(probabilities[i, : len(row)].tolist()),
                    "path": self._path(row),
                    "stopped": stopped[i],
                    "novelty": novelty[i],
                    "candidates": self._renumbered_candidates(candidates),
                }
            )
        return records

    def _where_known(
        self, levels: Sequence[torch.Tensor]
    ) -> tuple[Prediction, Prediction, list[float | None]]:
        """Paths down to where things stop being known, and the probability of stopping there.

        The second are whole paths where it is a known kind, but not sure which.
        """
        from timm_branches.hierarchy.calibration import labels_to_leaves
        from timm_branches.hierarchy.decode import decode
        from timm_branches.hierarchy.novelty import nearest_node, reached, stop_probabilities

        assert self.tree is not None
        stops = stop_probabilities(levels, self.tree, "entropy" if self.flat else "mass")
        answer = nearest_node(stops, self.tree)
        novelty: list[float | None] = []
        for is_new, chance in zip(answer.is_new, answer.probability, strict=True):
            novelty.append(float(chance) if is_new else None)
        final = Prediction(answer.labels, reached(stops, answer.labels, self.tree))
        # an answer above a leaf that is nothing new was not sure which
        open_ended = (labels_to_leaves(answer.labels, self.tree) < 0) & ~answer.is_new
        whole = decode(levels, self.tree, self.decoder).labels
        decided = torch.where(open_ended[:, None], whole, answer.labels)
        return final, Prediction(decided, final.probabilities), novelty

    def _path(self, row: Sequence[int]) -> tuple[str, ...]:
        if self.tree is None:
            return ()
        return tuple(self.tree.classes[level][label] for level, label in enumerate(row))

    def _renumbered(self, row: Sequence[int]) -> tuple[int, ...]:
        if self.renumbering is None:
            return tuple(row)
        return tuple(int(self.renumbering[level][label]) for level, label in enumerate(row))

    def _renumbered_candidates(
        self, candidates: Sequence[dict[int, float]]
    ) -> tuple[tuple[tuple[int, float], ...], ...]:
        if self.renumbering is None:
            return tuple(tuple(known.items()) for known in candidates)
        renumbered = []
        for table, known in zip(self.renumbering, candidates, strict=False):
            renumbered.append(tuple((int(table[label]), p) for label, p in known.items()))
        return tuple(renumbered)


def _classifying_heads(model: BranchModel) -> tuple[str, ...]:
    """The heads that answer for whole images.

    Raises:
        ValueError: There is none, or one has no classes.
    """
    heads = []
    for name, head in zip(model.names, model.head_specs, strict=False):
        if not head.dense:
            heads.append(name)
    if not heads:
        raise ValueError(
            "predict() classifies whole images, and this model answers for every pixel: call the "
            "model itself, or timm_branches.dense.tiled_inference for large images."
        )
    if any(model.num_classes[name] == 0 for name in heads):
        raise ValueError(
            f"a head without classes has nothing to predict; the model's have {model.num_classes}."
        )
    return tuple(heads)


def _check_decoding(
    tree: Taxonomy | None, decoder: "str | Decoder | None", threshold: float | None
) -> None:
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a probability from 0 to 1, not {threshold}.")
    if tree is None and (threshold is not None or decoder not in (None, "independent")):
        setting = "threshold" if threshold is not None else f"decoder {decoder!r}"
        raise ValueError(
            f"{setting} needs a tree, and this model was saved without one: give its taxonomy."
        )
    if tree is not None and isinstance(decoder, str):
        from timm_branches.hierarchy.decode import DECODERS

        if decoder not in DECODERS:
            raise ValueError(f"no decoder {decoder!r}; it is one of {', '.join(DECODERS)}.")


def _renumbering(tree: Taxonomy, given: Taxonomy) -> list[torch.Tensor]:
    """For each level a table from the classes of the model's tree to those of the tree given.

    Raises:
        ValueError: The tree given lacks a class of the model's, or has other levels.
    """
    if given.num_levels != tree.num_levels:
        raise ValueError(
            f"the model has a tree of its own with the levels {list(tree.levels)}, and the tree "
            f"given has {list(given.levels)}: leave it out, or give the same classes."
        )
    try:
        translation = match_taxonomies(
            tree, given, given_name="the model's own tree", expected_name="the tree given"
        )
    except ValueError as error:
        raise ValueError(
            f"the model has a tree of its own, and the one given does not hold its classes: {error}"
        ) from None
    assert translation is not None
    return [table for _, table in translation.tables]


class _Samples(Dataset):
    """What the model takes of each image, or as a text why it cannot be read."""

    def __init__(self, images: ImageList, transform: "SampleTransform") -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            image = self.images[index]
            if not isinstance(image, torch.Tensor):
                return self.transform(image)
            wanted = (self.images.in_chans, *self.transform.size)
            if tuple(image.shape) != wanted:
                raise ValueError(
                    f"a floating-point tensor must be what the model's transform makes, of shape "
                    f"{wanted}, not {tuple(image.shape)}; images themselves are uint8."
                )
            return image.detach().cpu()
        except UNREADABLE as error:
            name, reason = self.images.names[index], " ".join(str(error).split())
            return reason if name in reason else f"{name}: {reason}"


def model_transform(model: BranchModel) -> "SampleTransform":
    """A model's own evaluation transform, as its file and timm's configuration say.

    `predict` uses it, and `evaluate` where a data set has none.

    Args:
        model: The model.

    Returns:
        A transform from images (H, W, C) to tensors (C, H, W), see
        :func:`timm_branches.data.create_transform`.

    Example:
        >>> from timm_branches import create_branch_model
        >>> model_transform(create_branch_model('test_resnet', num_classes=2)).size
        (160, 160)
    """
    from timm.data import resolve_model_data_config

    from timm_branches.data import create_transform

    cfg = resolve_model_data_config(model)
    # timm would fill in its own crop for a model that says nothing of it; create_transform goes by
    # the image size
    return create_transform(
        model.input_size,
        mean=cfg["mean"],
        std=cfg["std"],
        interpolation=cfg["interpolation"],
        crop_pct=model.pretrained_cfg.get("crop_pct"),
        crop_mode=model.pretrained_cfg.get("crop_mode"),
    )


def find_device(device: "torch.device | str") -> torch.device:
    """The device of this name, after trying whether it is there.

    Raises:
        ValueError: It is not.
    """
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)  # says so if it is not there
        return wanted
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"no device {str(device)!r}: {reason} Write cpu, cuda or cuda:1."
        ) from None
