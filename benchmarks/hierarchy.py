"""What a label hierarchy costs beside the network.

Decoders, losses and tables, on a tree of 10,000 leaves.

    python benchmarks/hierarchy.py
    python benchmarks/hierarchy.py --leaves 1000 --levels 4 -b 256 --device cuda

Two random trees are timed: an even one, and one where a fifth of the branches end early. Times are
medians of interleaved repeats, as ratios to one softmax over the leaves of the same batch, so that
a busy machine slows all of them alike. The loops over samples, in plain Python, run on
`--loop-samples` of them and are scaled up to the batch.
"""

import argparse
import math
import random
from collections.abc import Callable

import torch
from measure import print_header, time_all

from timm_branches.hierarchy import sum_upwards
from timm_branches.hierarchy.decode import (
    DECODERS,
    back_off,
    decode,
    depth_accuracy_curve,
    leaf_log_probs,
)
from timm_branches.hierarchy.losses import (
    consistency_loss,
    hxe_loss,
    marginal_loss,
    soft_label_loss,
    tree_path_kl,
)
from timm_branches.taxonomy import Taxonomy


def random_paths(
    leaves: int, levels: int, early: float, rng: random.Random
) -> list[tuple[str, ...]]:
    """A forest of that many leaves whose levels grow by the same factor.

    A share of the leaves ends early.
    """
    sizes = [max(1, round(leaves ** ((level + 1) / levels))) for level in range(levels)]
    above: list[tuple[str, ...]] = [()]
    ended: list[tuple[str, ...]] = []
    for level, size in enumerate(sizes):
        # everyone has a child, the others have their parents drawn
        parents = above + rng.choices(above, k=max(0, size - len(above)))
        above = [(*parent, f"{level}.{i}") for i, parent in enumerate(parents)]
        if 0 < level < levels - 1:
            rng.shuffle(above)
            stop = min(round(early * leaves / (levels - 2)), len(above) // 2)
            ended, above = ended + above[:stop], above[stop:]
    paths = ended + above[: max(1, leaves - len(ended))]
    rng.shuffle(paths)
    return paths


def top_down_loop(level_logits: list[torch.Tensor], taxonomy: Taxonomy) -> list[list[int]]:
    """Top-down as one would write it first: sample by sample, children looked up in lists."""
    children: list[list[list[int]]] = [[] for _ in taxonomy.levels]
    for level, parents in enumerate(taxonomy.parents):
        children[level] = [[] for _ in range(taxonomy.num_classes[level - 1] if level else 1)]
        for node, parent in enumerate(parents.tolist()):
            children[level][max(parent, 0)].append(node)
    answers = []
    for sample in range(len(level_logits[0])):
        row, node = [], 0
        for level, logits in enumerate(level_logits):
            candidates = children[level][node] if node >= 0 else []
            node = candidates[int(logits[sample, candidates].argmax())] if candidates else -1
            row.append(node)
        answers.append(row)
    return answers


def best_path_loop(level_logits: list[torch.Tensor], taxonomy: Taxonomy) -> list[list[int]]:
    """Best path sample by sample and leaf by leaf."""
    paths = [[at for at in row if at >= 0] for row in taxonomy.leaf_table.tolist()]
    answers = []
    for sample in range(len(level_logits[0])):
        log_p = [logits[sample].log_softmax(-1).tolist() for logits in level_logits]
        means = [
            sum(level[at] for level, at in zip(log_p, path, strict=False)) / len(path)
            for path in paths
        ]
        best = paths[means.index(max(means))]
        answers.append(best + [-1] * (taxonomy.num_levels - len(best)))
    return answers


def functions(
    taxonomy: Taxonomy, paths: list, batch: int, loop: int, device: torch.device
) -> dict[str, tuple[Callable[[], object], float]]:
    """What is timed, by name, each with the factor that scales its time to the whole batch."""
    g = torch.Generator().manual_seed(0)
    logits = [
        torch.randn(batch, classes, generator=g).to(device) for classes in taxonomy.num_classes
    ]
    leaf_logits = torch.randn(batch, taxonomy.num_leaves, generator=g).to(device)
    labels = torch.randint(taxonomy.num_leaves, (batch,), generator=g).to(device)
    rows = taxonomy.expand(labels)
    prediction = decode(logits, taxonomy, "crm")
    few = [level[:loop].cpu() for level in logits]
    # else times mean nothing
    for method, by_loop in (("top-down", top_down_loop), ("best-path", best_path_loop)):
        assert decode(few, taxonomy, method).labels.tolist() == by_loop(few, taxonomy), method

    timed: dict[str, tuple[Callable[[], object], float]] = {
        "softmax over the leaves": (lambda: leaf_logits.softmax(-1), 1),
        "softmax of every level": (lambda: [level.softmax(-1) for level in logits], 1),
    }
    for method in DECODERS:
        timed[f"decode, {method}"] = (lambda method=method: decode(logits, taxonomy, method), 1)

    def and_backward(loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        for tensor in (leaf_logits, *logits):
            tensor.requires_grad_()
        return lambda: torch.autograd.grad(loss(), [leaf_logits, *logits], allow_unused=True)

    losses = {
        "cross-entropy of the leaves": lambda: torch.nn.functional.cross_entropy(
            leaf_logits, labels
        ),
        "marginal_loss": lambda: marginal_loss(leaf_logits, rows, taxonomy),
        "hxe_loss": lambda: hxe_loss(leaf_logits, rows, taxonomy),
        "soft_label_loss": lambda: soft_label_loss(leaf_logits, rows, taxonomy),
        "tree_path_kl": lambda: tree_path_kl(logits, rows, taxonomy),
        "consistency_loss": lambda: consistency_loss(logits, taxonomy),
    }
    timed |= {f"{name} and backward": (and_backward(loss), 1) for name, loss in losses.items()}
    return timed | {
        "leaf_log_probs": (lambda: leaf_log_probs(logits, taxonomy), 1),
        "sum_upwards": (lambda: sum_upwards(leaf_logits, taxonomy), 1),
        "Taxonomy.expand": (lambda: taxonomy.expand(labels), 1),
        "Taxonomy.valid_paths": (lambda: taxonomy.valid_paths(prediction.labels), 1),
        "back_off": (lambda: back_off(prediction, 0.5), 1),
        "depth_accuracy_curve": (lambda: depth_accuracy_curve(prediction, rows), 1),
        "Taxonomy, once": (lambda: Taxonomy(paths), 1),
        "top-down in a Python loop": (lambda: top_down_loop(few, taxonomy), batch / loop),
        "best-path in a Python loop": (lambda: best_path_loop(few, taxonomy), batch / loop),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leaves", type=int, default=10_000)
    parser.add_argument("--levels", type=int, default=7)
    parser.add_argument("-b", "--batch-size", type=int, default=1024)
    parser.add_argument("--loop-samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.levels < 3:
        parser.error(f"--levels must be 3 or more for branches to end early, got {args.levels}")
    device = torch.device(args.device)
    print_header(device, f"batch {args.batch_size}, median of {args.repeats}")
    for kind, early in (("even", 0.0), ("uneven", 0.2)):
        paths = random_paths(args.leaves, args.levels, early, random.Random(0))
        taxonomy = Taxonomy(paths)
        timed = functions(
            taxonomy, paths, args.batch_size, min(args.loop_samples, args.batch_size), device
        )
        steps = {name: function for name, (function, _) in timed.items()}
        seconds = time_all(steps, args.repeats, device, limit=2.0)
        seconds = {name: timed[name][1] * value for name, value in seconds.items()}
        first = next(iter(seconds.values()))
        print(
            f"\n{kind}: {taxonomy.num_leaves} leaves, levels of "
            f"{', '.join(map(str, taxonomy.num_classes))}"
        )
        print(f"{'what':30} {'ms':>10} {'ratio':>9}")
        for name, value in seconds.items():
            digits = (
                max(0, 2 - math.floor(math.log10(max(value / first, 1e-9))) - 1)
                if value < first
                else 1
            )
            print(f"{name:30} {1e3 * value:10.2f} {value / first:9.{digits}f}")


if __name__ == "__main__":
    main()
