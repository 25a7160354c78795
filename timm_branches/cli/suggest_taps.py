"""`timm-branches suggest-taps`: at which stage each level of a tree can be read."""

import argparse
import sys
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "suggest-taps",
        help="at which stage of a backbone each level of a tree can be read",
        description="Read each level of the data's tree off each stage of a backbone as it is, by "
        "linear probes on its averaged features; say which taps follow, and whether the tree is "
        "the one that the network sees. Test images are not looked at.",
    )
    parser.add_argument("model", help="any timm architecture")
    parser.add_argument("data", help="as for the recipe bcnn: class folders, a table, a name")
    parser.add_argument("--taxonomy", help="a ready-made tree's name, a .csv or .json, or folders")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights")
    parser.add_argument(
        "--checkpoint-path", default="", metavar="FILE", help="weights of one's own"
    )
    parser.add_argument("--img-size", type=int, help="default: the backbone's")
    parser.add_argument("--in-chans", type=int, default=None, help="default: 3, of digits 1")
    parser.add_argument(
        "--limit", type=int, default=5000, help="training images, stratified (default: 5000)"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.2, help="set aside without a val split"
    )
    parser.add_argument("--picture", metavar="PNG", help="draw the table")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("-b", "--batch-size", type=int, default=64, help="images a pass")
    parser.add_argument("-j", "--workers", type=int, default=0, help="processes that read images")


def run(args: argparse.Namespace) -> None:
    """Probe, and print the table and the taps."""
    import timm
    import torch

    from timm_branches import create_branch_model, list_taps
    from timm_branches.data import create_splits
    from timm_branches.inference.predict import find_device, model_transform
    from timm_branches.train.suggest_taps import suggest_taps

    if not timm.is_model(args.model):
        raise ValueError(f"{args.model} is no architecture of timm: see timm.list_models().")
    if not (args.pretrained or args.checkpoint_path):
        print(
            "timm-branches: without --pretrained or --checkpoint-path the weights are random, and "
            "say little of what a stage will learn.",
            file=sys.stderr,
        )
    grey = args.data in ("digits", "mnist", "fashion_mnist")
    in_chans = args.in_chans or (1 if grey else 3)
    train, val, _ = create_splits(
        args.data, args.val_fraction, seed=0, taxonomy=args.taxonomy, in_chans=in_chans
    )
    if train.taxonomy is None or train.taxonomy.num_levels < 2:
        raise ValueError(f"{args.data} has one level of labels: give its tree with --taxonomy.")
    train = train.limit(args.limit, seed=0)
    stages = [info.stage for info in list_taps(args.model)]
    model = create_branch_model(
        args.model,
        taps=stages,
        num_classes=2,
        pretrained=args.pretrained,
        checkpoint_path=args.checkpoint_path,
        img_size=args.img_size,
        in_chans=in_chans,
    )
    model.to(find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    train.transform = val.transform = model_transform(model)
    found = suggest_taps(model, train, val, args.batch_size, args.workers)
    print(found)
    print(
        f"\nPercent of {max(found.count)} validation images, probes of {len(train)} images; "
        "* the shallowest stage within one standard error of the best."
    )
    print(f"--taps {' '.join(map(str, found.taps))}")
    print(f"\n{found.agreement}")
    if args.picture:
        print(f"Drawn into {found.plot(args.picture)}")
