"""What a model says of each sample of a data set, kept to be looked at afterwards."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from timm_branches.data import create_loader
from timm_branches.data.bad_images import sample_name
from timm_branches.hierarchy.decode import decode
from timm_branches.hierarchy.tree_metrics import path_tables
from timm_branches.task import BranchTask, base_model
from timm_branches.taxonomy import Taxonomy
from timm_branches.train.evaluation import images_to

__all__ = ["Answers", "examine"]

_FRAMES = 4  # of a clip's thumbnail


class _Numbered(Dataset):
    """Samples whose label rows end in their position, which stays right where some are left out."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.sampler = getattr(dataset, "sampler", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, labels = self.dataset[index]
        return image, torch.cat([labels.reshape(-1), torch.tensor([index])])  # (L + 1,)


@dataclass
class Answers:
    """Truth and answer of each sample.

    Attributes:
        taxonomy: The tree.
        dataset: The samples, to look at.
        decoder: What made a path of the levels' answers.
        labels: (N, L), -1 for unknown.
        predictions: (N, L), -1 for none.
        confidences: (N,) the probability of the deepest class that was answered.
        positions: (N,) in the data set.
        left_out: Samples that could not be read, and why.
        mean: Of each channel, which the samples' transform took away.
        std: What it divided by.
    """

    taxonomy: Taxonomy
    dataset: Any
    decoder: str
    labels: torch.Tensor
    predictions: torch.Tensor
    confidences: torch.Tensor
    positions: torch.Tensor
    left_out: dict[str, str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def distances(self) -> torch.Tensor:
        """The tree distance (N,) of each answer from the truth; 0 for a right one.

        It is the height of their lowest common ancestor, as `hierarchical_distance` has it.
        """
        tables = path_tables(self.taxonomy)
        # a truth that ends early is no mistake of the levels below it
        answers = self.predictions.masked_fill(self.labels < 0, -1)
        heights = tables.lca_height(tables.end(self.labels), tables.end(answers))
        return heights.masked_fill((self.labels == answers).all(1), 0)

    def node_counts(self) -> dict[tuple[str, ...], tuple[int, int]]:
        """For each node its labelled samples, and how many of them were given that node."""
        counts = {}
        for level, nodes in enumerate(self.taxonomy.nodes):
            known = self.labels[:, level] >= 0
            label = self.labels[known, level]
            right = label[label == self.predictions[known, level]]
            of_all = label.bincount(minlength=len(nodes)).tolist()
            of_right = right.bincount(minlength=len(nodes)).tolist()
            for node, total, good in zip(nodes, of_all, of_right, strict=True):
                counts[node] = (total, good)
        return counts

    def confusions(self, limit: int = 20) -> list[tuple[str, str, int, int]]:
        """The mistakes that cost most together: true path, answered path, count, tree distance.

        They are ordered by count times distance.

        Args:
            limit: How many.
        """
        distances = self.distances().tolist()
        counts: Counter = Counter()
        rows = zip(self.labels.tolist(), self.predictions.tolist(), distances, strict=True)
        for label, answer, distance in rows:
            if distance:
                counts[self.path(label), self.path(answer), distance] += 1
        mistakes = []
        for (truth, answer, distance), count in counts.items():
            mistakes.append((truth, answer, count, distance))
        mistakes.sort(key=lambda row: (-row[2] * row[3], row[:2]))
        return mistakes[:limit]

    def path(self, row: list[int]) -> str:
        """A label row as names, 'animal / cat'; '?' where a level has no answer."""
        known = [label >= 0 for label in row]
        if not any(known):
            return "?"
        names = []
        deepest = max(level for level, is_known in enumerate(known) if is_known)
        for level, label in enumerate(row[: deepest + 1]):
            names.append(self.taxonomy.classes[level][label] if label >= 0 else "?")
        return " / ".join(names)

    def extremes(self, count: int = 12) -> tuple[list[int], list[int]]:
        """The surest right answers, and the worst mistakes: far off in the tree, and sure of it.

        Args:
            count: How many of each, at most.

        Returns:
            Rows of the best and of the worst.
        """
        distances = self.distances().tolist()
        labelled = (self.labels >= 0).any(1).tolist()
        sure = self.confidences.nan_to_num(0.0).tolist()
        rows = [row for row, is_labelled in enumerate(labelled) if is_labelled]
        right = [row for row in rows if distances[row] == 0]
        wrong = [row for row in rows if distances[row] > 0]
        right.sort(key=lambda row: -sure[row])
        wrong.sort(key=lambda row: (-distances[row], -sure[row]))
        return right[:count], wrong[:count]

    def name(self, row: int) -> str:
        """What the sample is called."""
        position = int(self.positions[row])
        return sample_name(self.dataset, position) or f"sample {position + 1}"

    def pixels(self, row: int) -> np.ndarray:
        """What the network was shown: (H, W, 3), uint8; of a clip some frames side by side."""
        image, _ = self.dataset[int(self.positions[row])]
        if image.ndim == 4:  # (T, C, H, W)
            last = len(image) - 1
            chosen = sorted({round(k * last / (_FRAMES - 1)) for k in range(_FRAMES)})
            image = torch.cat(list(image[chosen]), dim=-1)  # (C, H, T' * W)
        return to_pixels(image, self.mean, self.std)


def to_pixels(
    image: torch.Tensor, mean: tuple[float, ...] = (0.0,), std: tuple[float, ...] = (1.0,)
) -> np.ndarray:
    """A normalised image (C, H, W) as one to look at (H, W, 3), uint8.

    Of more than three channels the first three are shown, of two the first.
    """
    shape = (-1, 1, 1)
    image = image.float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return image.nan_to_num(0.0).clamp(0, 1).mul(255).round().byte().movedim(0, -1).numpy()


@torch.no_grad()
def examine(
    task: BranchTask,
    dataset: Any,
    batch_size: int,
    decoder: str = "best-path",
    make_loader: Callable = create_loader,
    **loading: Any,
) -> Answers:
    """Ask a model about each sample of a data set, in this process alone.

    Args:
        task: A task whose model has a tree.
        dataset: Samples with label rows (L,) of the same tree.
        batch_size: Samples a batch.
        decoder: What makes a path of the levels' answers.
        make_loader: `create_loader`, or its twin for clips.
        **loading: What the loader takes, such as `num_workers`.

    Returns:
        The answers.
    """
    loader = make_loader(_Numbered(dataset), batch_size, rank=0, world_size=1, **loading)
    tree = dataset.taxonomy
    module = base_model(task)
    was_training = module.training
    module.eval()
    labels, predictions, confidences = [], [], []
    for inputs, rows in loader:
        output = task.answer(module, images_to(inputs, task.device, None))
        logits = [level.float() for level in task.level_logits(output)]
        decided = decode(logits, tree, decoder)
        known = decided.labels >= 0
        depth = (known.sum(1, keepdim=True) - 1).clamp(min=0)
        labels.append(rows)
        predictions.append(decided.labels.cpu())
        confidences.append(decided.probabilities.gather(1, depth)[:, 0].cpu())
    module.train(was_training)
    table = torch.cat(labels)  # (N, L + 1)
    config = module.pretrained_cfg
    return Answers(
        tree,
        dataset,
        decoder,
        table[:, :-1],
        torch.cat(predictions),
        torch.cat(confidences),
        table[:, -1],
        dict(getattr(loader, "bad_images", {})),
        tuple(config.get("mean") or (0.0,)),
        tuple(config.get("std") or (1.0,)),
    )
