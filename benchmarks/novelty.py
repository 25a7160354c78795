"""Does a network with a classifier a level see better where a thing stops being known?

One fine class in five is held out, in turns, so that each is once. What is known is learned by
linear probes on frozen features, a probe a level (which is what a B-CNN with all taps at the last
stage is) and a flat one of the leaves. All images of the test set are then judged: a known one
should get its leaf, one of a held-out class the lowest node above it that is known.

    python benchmarks/novelty.py                                        # digits, by their pixels
    python benchmarks/novelty.py photos/ --model tf_efficientnet_lite0 --img-size 128 \
        --checkpoint-path lite0.safetensors --json novelty.json

Nothing is chosen on held-out classes: the thresholds are those at which a share of the *known*
validation images keep their leaf, and `hierarchy.novelty` has nothing to choose. Means over the
folds, and their deviation, of which each has other classes held out: they are no repetitions.
"""

import argparse
import json
import sys
from collections.abc import Callable
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from measure import print_header

from timm_branches import create_branch_model
from timm_branches.data import create_loader, create_splits
from timm_branches.hierarchy import sum_upwards
from timm_branches.hierarchy.decode import Prediction, back_off, decode
from timm_branches.hierarchy.novelty import balanced_scores, nearest_node, stop_probabilities
from timm_branches.inference.predict import model_transform
from timm_branches.taxonomy import Taxonomy

Split = tuple[torch.Tensor, torch.Tensor]  # features (N, D), leaves (N,) of the whole tree


def read_features(args: argparse.Namespace) -> tuple[list[Split], Taxonomy]:
    """Features of training, validation and test images, read once."""
    if args.data == "digits":
        splits = create_splits("digits", 0.2, seed=0, in_chans=1)
        return [of_pixels(split) for split in splits], splits[0].taxonomy
    model = create_branch_model(
        args.model,
        taps=[5],
        num_classes=1,
        img_size=args.img_size,
        checkpoint_path=args.checkpoint_path,
    ).eval()
    splits = create_splits(args.data, 0.2, seed=0)
    for split in splits:
        split.transform = model_transform(model)
    return [of_backbone(split, model, args.workers) for split in splits], splits[0].taxonomy


def of_pixels(split: torch.utils.data.Dataset) -> Split:
    """An image's pixels as they are."""
    rows = [(image.flatten().float(), label) for image, label in split]
    images, labels = zip(*rows, strict=True)
    return torch.stack(images), leaves_of(torch.stack(labels), split.taxonomy)


@torch.inference_mode()
def of_backbone(split: torch.utils.data.Dataset, model: torch.nn.Module, workers: int) -> Split:
    """The map (B, C, H, W) of the last stage, averaged."""
    features, labels = [], []
    for images, rows in create_loader(split, 32, num_workers=workers):
        y = model.backbone.forward_features(images.contiguous(memory_format=torch.channels_last))
        features.append(y.mean((2, 3)))
        labels.append(rows)
    return torch.cat(features), leaves_of(torch.cat(labels), split.taxonomy)


def leaves_of(labels: torch.Tensor, tree: Taxonomy) -> torch.Tensor:
    """The leaf (N,) of whole label rows (N, L)."""
    return (labels[:, None] == tree.leaf_table).all(-1).byte().argmax(1)


def without(tree: Taxonomy, held_out: set[int]) -> tuple[Taxonomy, torch.Tensor]:
    """The tree of what is left; of each leaf of the whole the row (leaves, L) that is right."""
    paths = [path for leaf, path in enumerate(tree.leaves) if leaf not in held_out]
    known = Taxonomy(paths, levels=tree.levels[: max(map(len, paths))])
    rows = torch.full((tree.num_leaves, known.num_levels), -1)
    for leaf, path in enumerate(tree.leaves):
        for level in range(min(len(path), known.num_levels)):
            if path[: level + 1] in known.nodes[level]:
                rows[leaf, level] = known.nodes[level].index(path[: level + 1])
    return known, rows


def probe(features: torch.Tensor, target: torch.Tensor, classes: int, args) -> Callable:
    """A linear classifier of features (N, D), by AdamW; targets of -1 are left out."""
    torch.manual_seed(args.seed)
    layer = torch.nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    for _ in range(args.steps):
        chosen = torch.randint(len(features), (min(512, len(features)),))
        loss = F.cross_entropy(layer(features[chosen]), target[chosen], ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer.requires_grad_(False)


def of_leaf(prediction: Prediction) -> torch.Tensor:
    """The probability (N,) of the leaf of each path: the last one, and the least."""
    return prediction.probabilities.masked_fill(prediction.labels < 0, 1).amin(1)


def fold_scores(
    splits: list[Split], tree: Taxonomy, held_out: set[int], args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """The scores of each way to answer."""
    known, rows = without(tree, held_out)
    is_known = torch.tensor([leaf not in held_out for leaf in range(tree.num_leaves)])
    (features, leaves), (val, val_leaves), (test, test_leaves) = splits
    mean, std = features.mean(0), features.std(0) + 1e-6
    features, val, test = ((x - mean) / std for x in (features, val, test))
    keep = is_known[leaves]
    features, labels = features[keep], rows[leaves[keep]]
    heads = []
    for level, classes in enumerate(known.num_classes):
        heads.append(probe(features, labels[:, level], classes, args))
    flat = probe(features, leaves_of(labels, known), known.num_leaves, args)
    val = val[is_known[val_leaves]]  # nothing is known of the others
    levels = {
        "flat": lambda x: sum_upwards(flat(x), known),
        "B-CNN": lambda x: [head(x) for head in heads],
    }
    decoders = {"flat": "leaf-marginal", "B-CNN": "best-path"}
    truth = rows[test_leaves]
    scores = {}
    for name, logits in levels.items():
        answers = {"always a leaf": decode(logits(test), known, decoders[name]).labels}
        calm = decode(logits(val), known, decoders[name])
        whole = decode(logits(test), known, decoders[name])
        for share in args.known:
            limit = float(of_leaf(calm).quantile(1 - share))
            kept = f"{share:.0%} of the known keep their leaf"
            answers[f"climbs to a threshold, {kept}"] = back_off(whole, limit).labels
            depth = (whole.labels >= 0).sum(1, keepdim=True)
            is_leaf = torch.arange(known.num_levels) == depth - 1
            unsure = (of_leaf(whole) < limit)[:, None]
            answers[f"leaf or its parent, {kept}"] = whole.labels.masked_fill(is_leaf & unsure, -1)
        for kind in ("mass", "entropy"):
            if name == "flat" and kind == "mass":
                continue  # a flat network's children have all of their parent's mass
            stops = stop_probabilities(logits(test), known, kind)
            answers[f"stops by {kind}"] = nearest_node(stops, known).labels
        for how, labels in answers.items():
            found = balanced_scores(labels, truth, known)
            for measure in ("accuracy", "distance"):
                both = (found[f"known_{measure}"], found[f"new_{measure}"])
                found[f"balanced_{measure}"] = fmean(both)
            scores[f"{name}, {how}"] = found
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", default="digits", help="digits, or class folders")
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--checkpoint-path", default="")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--folds", type=int, default=5, help="one class in so many is held out")
    parser.add_argument("--known", type=float, nargs="+", default=[0.9, 0.7], metavar="SHARE")
    parser.add_argument("--steps", type=int, default=1000, help="of each probe")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-j", "--workers", type=int, default=0)
    parser.add_argument("--json")
    args = parser.parse_args()
    print_header(torch.device("cpu"), f"{args.folds} folds, seed {args.seed}")
    splits, tree = read_features(args)
    order = torch.randperm(tree.num_leaves, generator=torch.Generator().manual_seed(args.seed))
    by_fold = []
    for fold in range(args.folds):
        by_fold.append(fold_scores(splits, tree, set(order[fold :: args.folds].tolist()), args))
    names = ["known_accuracy", "new_accuracy", "balanced_accuracy", "balanced_distance"]
    print(f"{'':58} {'known':>13} {'new':>13} {'balanced':>13} {'distance':>13}")
    for method in by_fold[0]:
        cells = []
        for name in names:
            values = [fold[method][name] for fold in by_fold]
            spread = stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{fmean(values):6.2f} ±{spread:5.2f}")
        print(f"{method:58} {' '.join(f'{cell:>13}' for cell in cells)}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"command": sys.argv, "folds": by_fold}, file, indent=1)


if __name__ == "__main__":
    main()
