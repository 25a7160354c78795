"""`timm-branches evaluate`: how often a model is right on labelled images, by level and class."""

import argparse
import csv
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from timm_branches.cli.text import printable, write_output

if TYPE_CHECKING:
    from timm_branches.model import BranchModel
    from timm_branches.taxonomy import Taxonomy

__all__ = ["add_parser", "run"]

FORMATS = ("text", "json", "csv")


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "evaluate",
        help="how often a model is right on images with labels, by level and class",
        description="Measure a model that classifies images on data with labels, with its own "
        "transform and tree; labels are compared by name.",
    )
    parser.add_argument("model", help="model.safetensors, a folder, or hf-hub:user/name")
    parser.add_argument("data", help="class folders, a table, a tar, or the name of a data set")
    parser.add_argument("--split", default="test", help="train, val, test or all (default: test)")
    parser.add_argument("--taxonomy", help="the tree of a model that was saved without one")
    parser.add_argument(
        "--decoder", help="as for predict (default: best-path, of flat models leaf-marginal)"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: by the output's ending")
    parser.add_argument("--output", metavar="FILE", help="write here instead of to stdout")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("-b", "--batch-size", type=int, default=64, help="images a batch")
    parser.add_argument("-j", "--workers", type=int, default=0, help="processes that read images")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and write the table."""
    import torch

    from timm_branches.data import create_dataset, create_loader
    from timm_branches.factory import load_model
    from timm_branches.inference.predict import find_device, model_transform
    from timm_branches.taxonomy import get_taxonomy
    from timm_branches.train import evaluate

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model).to(find_device(device))
    if model.dense_heads or model.temporal_heads:
        raise ValueError(
            "evaluate is for models that classify images; the recipes segment, denoise and "
            "cnn_lstm measure theirs at the end of a run."
        )
    tree = model.taxonomy
    if args.taxonomy is not None:
        if tree is not None:
            raise ValueError("--taxonomy has no effect: the model's file has a tree.")
        tree = get_taxonomy(args.taxonomy)
    if tree is None:
        raise ValueError("the model was saved without a tree: give --taxonomy.")
    task, decoder = _task(model, tree)
    data = create_dataset(
        args.data,
        args.split,
        tree,
        in_chans=model.in_chans,
        transform=model_transform(model),
        value_range=model.pretrained_cfg.get("value_range"),
    )
    loader = create_loader(data, args.batch_size, num_workers=args.workers)
    evaluator = evaluate(task, loader, decoder=args.decoder or decoder)
    results: dict[str, Any] = {
        "model": os.fspath(args.model),
        "data": f"{args.data}, {args.split}",
        "images": len(data),
        "decoder": args.decoder or decoder,
        "metrics": dict(evaluator.metrics),
        "classes": _by_class(evaluator.confusion_matrices(), tree),
    }
    ending = os.path.splitext(args.output or "")[1].lower().removeprefix(".")
    kind = args.format or (ending if ending in FORMATS else "text")
    write = {"text": _write_text, "json": _write_json, "csv": _write_csv}[kind]
    write_output(args.output, [args.model], lambda file: write(results, tree, file))
    return 0


def _task(model: "BranchModel", tree: "Taxonomy") -> tuple[Any, str]:
    """What evaluates a model, and how it is decoded by default."""
    from timm_branches.task import BranchTask, FlatTask

    classes = tuple(model.num_classes[name] for name in model.names)
    if model.taxonomy is not None and classes == tuple(tree.num_classes):
        return BranchTask(model, verbose=False), "best-path"
    if len(classes) == 1 and classes[0] == tree.num_leaves:
        return FlatTask(model, tree), "leaf-marginal"
    raise ValueError(
        f"the tree has {list(tree.num_classes)} classes on its levels and {tree.num_leaves} "
        f"leaves; the model's heads have {model.num_classes}."
    )


def _by_class(matrices: Any, tree: "Taxonomy") -> dict[str, dict[str, dict[str, Any]]]:
    """For each level and class its images and how many percent of them were named right."""
    levels: dict[str, dict[str, dict[str, Any]]] = {}
    for level, names, matrix in zip(tree.levels, tree.classes, matrices, strict=True):
        levels[level] = {}
        if matrix is None:  # too many classes for a matrix
            continue
        counts = matrix.sum(1).tolist()
        right = matrix.diagonal().tolist()
        for name, count, hits in zip(names, counts, right, strict=True):
            share = 100 * hits / count if count else None
            levels[level][name] = {"images": int(count), "top1": share}
    return levels


def _columns(tree: "Taxonomy") -> Mapping[str, str]:
    titles = {f"{level}_top1": level for level in tree.levels}
    titles |= {"full_path": "full path", "consistency": "consistency", "hf": "hF"}
    return titles | {"distance": "distance", "severity": "severity"}


def _write_text(results: dict[str, Any], tree: "Taxonomy", file: TextIO) -> None:
    from timm_branches.train.compare import comparison_table

    name = os.path.basename(results["model"])
    print(comparison_table({name: [results["metrics"]]}, _columns(tree)), file=file)
    for level, classes in results["classes"].items():
        print(f"\n{printable(level)}", file=file)
        for label, row in classes.items():
            share = "-" if row["top1"] is None else f"{row['top1']:.1f}"
            print(f"{share:>7}  {row['images']:>6}  {printable(label)}", file=file)
    print(
        f"\nPercent right, and images, of {results['images']:,} images ({results['data']}); "
        f"decoder {results['decoder']}. Distances in levels.",
        file=file,
    )


def _write_json(results: dict[str, Any], tree: "Taxonomy", file: TextIO) -> None:
    from timm_branches.train.script import nan_to_null

    results = {**results, "metrics": nan_to_null(results["metrics"])}
    file.write(json.dumps(results, indent=2, allow_nan=False) + "\n")


def _write_csv(results: dict[str, Any], tree: "Taxonomy", file: TextIO) -> None:
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["level", "class", "images", "top1"])
    for level, classes in results["classes"].items():
        for label, row in classes.items():
            share = "" if row["top1"] is None else f"{row['top1']:.6g}"
            table.writerow([level, label, row["images"], share])
