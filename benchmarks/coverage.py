"""Is the promise of calibrated answers kept, and what does it cost?

A model answers for labelled images once. Then they are split at random many times into a half to
calibrate on and a half to judge by, for each target.

    python benchmarks/coverage.py                                       # digits, a minute
    python benchmarks/coverage.py model.safetensors photos/ --split test
    python benchmarks/coverage.py flat.safetensors photos/ --taxonomy tree.json --json coverage.json

It prints, over the splits, the mean share of right answers and its 5 % and 95 % quantiles, the mean
of the information that is kept, and what naming a leaf or nothing keeps where as many answers are
right on the same half.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
from measure import print_header

from timm_branches import create_branch_model, load_model
from timm_branches.data import create_dataset, create_loader, create_splits
from timm_branches.hierarchy.calibration import fit_calibration, information, is_wrong
from timm_branches.hierarchy.coverage import leaf_coverage
from timm_branches.inference.predict import model_transform
from timm_branches.task import BranchTask
from timm_branches.taxonomy import Taxonomy, get_taxonomy
from timm_branches.train import FitConfig, evaluate, fit
from timm_branches.train.calibrate import LevelOutputs, make_task


def outputs_of(args: argparse.Namespace) -> tuple[list[torch.Tensor], torch.Tensor, Taxonomy, str]:
    """Logits (N, K) of each level, labels (N, L), the tree and the decoder."""
    if args.model is None:
        return digits_outputs(args)
    model = load_model(args.model)
    tree = model.taxonomy or get_taxonomy(args.taxonomy)
    data = create_dataset(
        args.data, args.split, tree, in_chans=model.in_chans, transform=model_transform(model)
    )
    task, decoder = make_task(model, tree)
    seen = LevelOutputs(task)
    evaluate(task, create_loader(data, 64, num_workers=args.workers), also=[seen])
    return seen.levels(), torch.cat(seen.labels), tree, decoder


def digits_outputs(
    args: argparse.Namespace,
) -> tuple[list[torch.Tensor], torch.Tensor, Taxonomy, str]:
    """The same of a small network on scikit-learn's digits, trained for a moment."""
    train, _, test = create_splits("digits", 0.1, seed=0, in_chans=1)
    tree = train.taxonomy
    torch.manual_seed(0)
    model = create_branch_model("bcnn_a", taps=[4, 5], taxonomy=tree, in_chans=1, img_size=32)
    with tempfile.TemporaryDirectory() as folder:
        config = FitConfig(output=folder, epochs=5, lr=0.02, progress=False)
        loader = create_loader(train.limit(args.limit), 64, is_training=True)
        fit(BranchTask(model), loader, config=config)
    task, decoder = make_task(model, tree)
    seen = LevelOutputs(task)
    evaluate(task, create_loader(test, 64), also=[seen])
    return seen.levels(), torch.cat(seen.labels), tree, decoder


def judge(
    levels: list[torch.Tensor],
    labels: torch.Tensor,
    tree: Taxonomy,
    decoder: str,
    target: float,
    splits: int,
) -> dict[str, float]:
    """Means over the splits, in percent."""
    rows = []
    for seed in range(splits):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        fitted, judged = order.tensor_split(2)
        calibration = fit_calibration(
            [level[fitted] for level in levels], labels[fitted], tree, target, decoder=decoder
        )
        answers = calibration.answer([level[judged] for level in levels], tree)
        said, truth = answers.prediction.labels, labels[judged]
        right = float((~is_wrong(said, truth)).double().mean())
        leaves = leaf_coverage(answers.log_posterior, truth, tree)
        kept = float(information(said, tree).mean())
        rows.append((right, kept, leaves.information_at(right)))
    right, kept, leaf = 100 * torch.tensor(rows, dtype=torch.double).T
    return {
        "target": 100 * target,
        "right": float(right.mean()),
        "right, 5 %": float(right.quantile(0.05)),
        "right, 95 %": float(right.quantile(0.95)),
        "kept": float(kept.mean()),
        "kept, leaf or nothing": float(leaf.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="model.safetensors (default: a small one)")
    parser.add_argument("data", nargs="?", help="as for timm-branches evaluate")
    parser.add_argument("--split", default="test")
    parser.add_argument("--taxonomy", help="the tree of a model that was saved without one")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--limit", type=int, default=100, help="digits to train on")
    parser.add_argument("-j", "--workers", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the numbers here, too")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("give a model and its data, or neither.")
    logging.disable(logging.WARNING)  # of leaves that a half lacks, 200 times
    levels, labels, tree, decoder = outputs_of(args)
    print_header(
        torch.device("cpu"),
        f"{len(labels)} images, {tree.num_leaves} leaves, {decoder}, {args.splits} splits",
    )
    rows = [judge(levels, labels, tree, decoder, target, args.splits) for target in args.targets]
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{value:{len(name)}.1f}" for name, value in row.items()))
    if args.json:
        facts = {"command": sys.argv, "images": len(labels), "splits": args.splits}
        Path(args.json).write_text(json.dumps({**facts, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
