"""Is my network wired right? Which loss reaches which layer, how strongly, and why one does not.

    # the whole story on small networks, in half a minute
    python recipes/gradients.py
    # one network of your own, on random input
    python recipes/gradients.py --model resnet50 --taps 3 4 5
    python recipes/gradients.py --model resnet18 --taps 2 3 4 5 --head unet --num-classes 21
    python recipes/gradients.py --model resnet18 --head lstm --frames 16
    python recipes/gradients.py --checkpoint output/bcnn/bcnn/model.safetensors

Nothing is trained: all of this is one forward and a few backward passes. For a network written by
hand call the same functions of timm_branches.gradients: they take any module, a batch and a loss.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import get_outdir
from torch import nn

from timm_branches import BranchModel, Taxonomy, create_branch_model, list_taps, load_model
from timm_branches.figures import COLOURS, INK, new_figure, restrain, save_figure
from timm_branches.gradients import (
    GradientReport,
    branch_cosines,
    check_model,
    frame_gradients,
    gradient_report,
    path_gradients,
)
from timm_branches.gradients.kernel_figures import kernel_causes, plot_kernel_causes
from timm_branches.gradients.report_figures import report_figure
from timm_branches.heads import (
    HEADS,
    FlattenHead,
    LSTMHead,
    RedNetHead,
)
from timm_branches.task import BranchTask
from timm_branches.train.script import run_script
from timm_branches.weights import load_weights

# scikit-learn's digits by their strokes: with a loop or without, one loop or two, straight or
# curved
TREE = Taxonomy(
    [
        "loop/one/0",
        "open/straight/1",
        "open/curved/2",
        "open/curved/3",
        "open/straight/4",
        "open/curved/5",
        "loop/one/6",
        "open/straight/7",
        "loop/two/8",
        "loop/one/9",
    ],
    levels=["coarse", "middle", "fine"],
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments: none for the story, a model or a checkpoint for that one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="any timm backbone; without it and --checkpoint the story is told"
    )
    parser.add_argument(
        "--checkpoint", help="model.safetensors of timm_branches; with --model, weights for it"
    )
    parser.add_argument(
        "--taps", nargs="+", help="where the heads listen (default: 5; for decoders, all stages)"
    )
    parser.add_argument(
        "--head", choices=HEADS, help="at each tap; a decoder reads all (default: pool)"
    )
    parser.add_argument("--num-classes", type=count, help="of each head (default: 10)")
    parser.add_argument("--img-size", type=count, help="side of the images (default: the model's)")
    parser.add_argument(
        "--frames", type=count, help="frames of a clip, for lstm and gru (default: 8)"
    )
    parser.add_argument("-b", "--batch-size", type=count, help="random samples (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and random input")
    parser.add_argument(
        "--output", default="output/gradients", help="folder of the pictures; an older one is kept"
    )
    args = parser.parse_args(argv)
    flag = idle_flag(args)
    if flag is not None:
        reason = ": the checkpoint says itself how it is built" if args.checkpoint else ""
        parser.error(f"{flag} has no effect without --model{reason}")
    return args


def idle_flag(args: argparse.Namespace) -> str | None:
    """The first flag that was given and has no effect."""
    idle = []
    if not args.model:
        idle += ["taps", "head", "num_classes", "img_size"]
    if not args.model and not args.checkpoint:
        idle += ["frames", "batch_size"]
    for name in idle:
        if getattr(args, name) is not None:
            return "--" + name.replace("_", "-")
    return None


def main(args: argparse.Namespace) -> None:
    """The story, or one model."""
    torch.manual_seed(args.seed)
    model = None
    if args.model or args.checkpoint:
        model = make_model(args)  # before the folder: a mistake leaves nothing behind
    output = Path(args.output)
    if any(output.glob("*.png")):  # an earlier run's
        output = Path(get_outdir(str(output.parent), output.name, inc=True))
    output.mkdir(parents=True, exist_ok=True)
    if model is None:
        wired = branches(output)
        clips = recurrence(output)
        decoder(output)
        kernels(output)
        doctor(*wired, clips)
    else:
        report_on(model, args, output)
    print(f"\nPictures: {output}")


# -- the story: a section for each question


def branches(output: Path) -> tuple[BranchTask, tuple[torch.Tensor, torch.Tensor]]:
    """Are the losses of a B-CNN combined properly, and what do the epochs' weights do?

    Returns:
        The task and the batch, for the check-up at the end.
    """
    heading(
        "1. A B-CNN: which loss trains which stage?",
        "One backward pass of the weighted sum. Each level trains the stages up to its tap and its "
        "own head.",
    )
    images, leaves = digits(24, 28)
    batch = images, TREE.expand(leaves)
    model = create_branch_model(
        "bcnn_a",
        taps=[3, 4, 5],
        head=FlattenHead(hidden=(32,)),
        taxonomy=TREE,
        in_chans=1,
        img_size=28,
    )
    task = BranchTask(model, "bcnn-cifar10")
    task.set_epoch(0)
    report = gradient_report(task, batch)
    print(report)
    draw_branches(report, output / "branches.png")
    deep = report.cell("total", "stage5").relative or 0.0
    shallow = report.cell("total", "stage3").relative or 0.0
    print(
        f"In epoch 0 the weights leave stage5 {deep / shallow:.1%} of stage3's relative gradient.\n"
    )
    for (a, b), cosine in branch_cosines(task, batch).items():
        print(f"cosine of {a} and {b} at the deepest stage that all levels share: {cosine:+.2f}")
    print("Above 0 the levels help each other, below they are in conflict.\n")
    print_loss_shares(task, report.losses)

    task.set_epoch(29)
    report = gradient_report(task, batch)
    print("\nIn the last phase, [0, 0, 1]:", *report.findings, sep="\n  ")
    print(
        "That is the paper's schedule and no bug; but the trunk moves on under the coarse heads, "
        "which go stale."
    )
    task.set_epoch(0)
    return task, batch


def draw_branches(report: GradientReport, path: Path) -> None:
    """The picture of a B-CNN's report, without the cosines, which are printed."""
    figure = report_figure(replace(report, cosines={}))
    figure.set_size_inches(8.4, 5.4)
    figure.axes[0].set_title(
        "B-CNN in epoch 0, loss weights [.98 .01 .01]: gradient relative to the weights",
        fontsize=10,
        color=INK,
        loc="left",
    )
    save_figure(figure, path)


def print_loss_shares(task: BranchTask, level_losses: dict[str, float]) -> None:
    """What each level's loss is of the whole, where the schedule's weights change."""
    print(
        "Share of the loss by the weights of the epoch (the losses are those of the untrained "
        "network):"
    )
    losses = torch.tensor([level_losses[level] for level in TREE.levels])
    for epoch in (0, 9, 19, 29):
        weights = task.schedule(epoch)
        weighted = torch.tensor(weights) * losses
        shares = (weighted / weighted.sum()).tolist()
        named_shares = zip(TREE.levels, shares, strict=True)
        text = ", ".join(f"{level} {share:.0%}" for level, share in named_shares)
        print(f"  from epoch {epoch:2}, weights {list(weights)}: {text}")


class ByHand(nn.Module):
    """A CNN+LSTM as it is often written, frame by frame, with one of two mistakes."""

    def __init__(self, keep_state: bool, detach: bool):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 8, 5, 2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 5, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 20),
        )
        self.lstm = nn.LSTM(20, 50, batch_first=True)
        self.fc = nn.Linear(50, 2)
        self.keep_state = keep_state
        self.detach = detach

    def forward(self, clips_BTCHW: torch.Tensor) -> torch.Tensor:
        """Clips (B, T, C, H, W) -> logits (B, K), frame after frame."""
        state = None
        for frame in clips_BTCHW.unbind(1):  # (B, C, H, W)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
                features = self.cnn(frame)  # (B, 20)
            if not self.keep_state:
                state = None
            out, state = self.lstm(features[:, None], state)  # (B, 1, 50)
        return self.fc(out[:, -1])


def recurrence(output: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Does the clip's loss reach the CNN, and which of the frames does it see?

    Returns:
        The clips (4, 30, 1, 24, 48) and their labels, for the check-up at the end.
    """
    heading(
        "2. A CNN+LSTM: which frames does the loss see?",
        "30 frames of 24 x 48, one label a clip. The norm of the loss' gradient at each frame's "
        "features says how much of it the loss sees.",
    )
    clips = torch.rand(4, 30, 1, 24, 48)
    labels = torch.tensor([0, 1, 1, 0])
    last = make_clip_model(readout="last")
    mean = make_clip_model(readout="mean")
    stateless = ByHand(keep_state=False, detach=False)
    detached = ByHand(keep_state=True, detach=True)
    # name, model, the module whose output are a frame's features (None: the model says), colour
    cases: list[tuple[str, nn.Module, str | None, str]] = [
        ("one LSTM over all frames, read at the last", last, None, COLOURS[0]),
        ("the same, the mean of all outputs read", mean, None, COLOURS[0]),
        ("by hand, the state lost between frames", stateless, "cnn", COLOURS[1]),
        ("by hand, the CNN under no_grad", detached, "cnn", COLOURS[1]),
    ]
    figure = new_figure(6.2, 5.4)
    panels = figure.subplots(len(cases), 1, sharex=True, sharey=True)
    for panel, (name, model, features, colour) in zip(panels, cases, strict=True):
        gradients = frame_gradients(model, (clips, labels), F.cross_entropy, features=features)
        assert gradients.norms is not None
        seen = f"{len(gradients.seen)} of 30 frames seen"
        if any("without autograd" in line for line in gradients.findings):
            seen += ", but nothing reaches the CNN"
        findings = gradients.findings or ["Nothing wrong found."]
        print(f"{name}: {seen}.", *findings, sep="\n  ")
        panel.bar(range(30), gradients.norms, color=colour, width=0.8, log=True)
        panel.set_title(name, fontsize=9.5, color=INK, loc="left")
        panel.text(0.01, 0.93, seen, transform=panel.transAxes, fontsize=8.5, color=INK, va="top")
        restrain(panel)
        panel.set(xlim=(-0.8, 29.8), ylim=(1e-9, 1))
        panel.minorticks_off()
    panels[-1].set_xlabel("frame")
    figure.supylabel("gradient norm at the frame's features", fontsize=10, color=INK)
    overview(save_figure(figure, output / "frames.png"), output)
    return clips, labels


def make_clip_model(readout: str) -> BranchModel:
    """The small CNN+LSTM; `readout` says which of the LSTM's outputs is classified."""
    head = LSTMHead(hidden_size=50, pool_type="flatten", projection=20, readout=readout)
    return create_branch_model("conv2_24x48", num_classes=2, head=head)


def decoder(output: Path) -> None:
    """Does anything but the skips learn?"""
    heading(
        "3. A skip decoder: through which path does the encoder learn?",
        "A RED-Net with a linear bottleneck removes noise from digits. The paths' gradients add up "
        "to the whole; a trunk without a share is a network that only copies through its skips.",
    )
    clean, _ = digits(8, 64)
    model = create_branch_model(
        "rednet_small",
        taps=[3, 4, 5],
        num_classes=1,
        in_chans=1,
        img_size=64,
        head=RedNetHead(bottleneck=128, act="leaky_relu", out_act=("leaky_relu", "sigmoid")),
    )
    noisy = clean + 0.2 * torch.randn_like(clean)
    gradients = path_gradients(model, (noisy, clean), F.mse_loss)
    print(gradients)

    # a bar for each stage and path, the first at the top
    names, norms, shares, colours = [], [], [], []
    for stage in reversed(gradients.stages):
        for number, path in reversed(list(enumerate(gradients.paths))):
            norm = gradients.norms[path][stage]
            if norm:
                names.append(f"{stage}, {path}")
                norms.append(norm)
                share = round(gradients.shares[path][stage] or 0.0, 3) + 0.0  # no -0.0 %
                shares.append(f" {share:.1%}")
                colours.append(COLOURS[number])
    figure = new_figure(7, 3)
    axes = figure.subplots()
    bars = axes.barh(names, norms, color=colours, log=True)
    axes.bar_label(bars, shares, fontsize=8, color=INK)
    axes.set_xlabel("gradient norm of a stage through a path, and its share of the whole")
    restrain(axes)
    save_figure(figure, output / "paths.png")


def kernels(output: Path) -> None:
    """Why are the gradients of my kernels equal?"""
    heading(
        "4. A convolution: why are my kernels' gradients equal?",
        "Channel c of filter o's gradient is input channel c correlated with dE/dy of filter o: "
        "equal channels have equal inputs, equal filters an equal dE/dy.",
    )
    for name, diagnosis in kernel_causes().items():
        findings = diagnosis.findings.values() or ["Nothing found."]
        print(f"{name}:", *findings, sep="\n  ")
    plot_kernel_causes(output / "kernels.png")


def doctor(
    task: BranchTask,
    batch: tuple[torch.Tensor, torch.Tensor],
    clips: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """A check-up before a long training."""
    heading(
        "5. The doctor: what to run before a long training",
        "First the B-CNN above, then a CNN+LSTM by hand with three mistakes: the state is lost, "
        "the CNN is run under no_grad, and cross-entropy gets a softmax.",
    )
    print("B-CNN", check_model(task, batch), sep="\n")

    def wrong_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.softmax(1), target)

    images, labels = clips
    broken = ByHand(keep_state=False, detach=True)
    diagnosis = check_model(broken, (images[:, :6], labels), wrong_loss)
    print("CNN+LSTM by hand", diagnosis, sep="\n")


# -- one model


def make_model(args: argparse.Namespace) -> BranchModel:
    """The model that was asked for.

    The checkpoint as it is, or one that is built and then filled.
    """
    if args.model:
        taps: Any = args.taps or ["5"]
        if args.head in ("unet", "rednet"):
            taps = [args.taps or [info.stage for info in list_taps(args.model)]]
        model = create_branch_model(
            args.model,
            taps=taps,
            head=args.head or "pool",
            img_size=args.img_size,
            num_classes=args.num_classes or 10,
        )
        if args.checkpoint:
            load_weights(model, args.checkpoint)
    else:
        model = load_model(args.checkpoint)
    if args.frames and not model.temporal_heads:
        raise ValueError(
            f"--frames has no effect: none of the heads {list(model.names)} takes clips."
        )
    return model


def report_on(model: BranchModel, args: argparse.Namespace, output: Path) -> None:
    """Report and check-up of one model.

    Random input, random labels, a random picture for a decoder.
    """
    shape = [args.batch_size or 4, *model.pretrained_cfg["input_size"]]
    if model.temporal_heads:
        shape.insert(1, args.frames or 8)  # (B, T, C, H, W)
    x = torch.randn(shape)
    targets: dict[str, torch.Tensor] = {}  # by head, drawn when its output is first seen

    def loss(name: str, output: torch.Tensor) -> torch.Tensor:
        is_regression = name in model.dense_heads or output.shape[-1] == 1
        if name not in targets and is_regression:
            targets[name] = torch.rand(output.shape)
        elif name not in targets:
            targets[name] = torch.randint(output.shape[-1], output.shape[:-1])
        if is_regression:
            return F.mse_loss(output, targets[name])
        return F.cross_entropy(output.flatten(0, -2), targets[name].flatten())

    def losses(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: loss(name, output) for name, output in outputs.items()}

    heading(
        f"{args.model or args.checkpoint}: heads {', '.join(model.names)} on random input "
        f"{tuple(shape)}",
        "Cross-entropy with random labels; the squared error to random numbers for a decoder or a "
        "single output.",
    )
    model.train()
    diagnosis = check_model(model, x, losses)
    if diagnosis.report is not None:
        print(diagnosis.report, end="\n\n")
        save_figure(report_figure(diagnosis.report), output / "report.png")
    for name in model.temporal_heads:
        frames = frame_gradients(model, x, partial(loss, name), head=name)
        print(f"{name}:", frames, sep="\n", end="\n\n")
    for name in model.dense_heads:
        paths = path_gradients(model, x, partial(loss, name), head=name)
        print(f"{name}:", paths, sep="\n", end="\n\n")
    print(diagnosis)


# -- small helpers


def digits(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's first digits, enlarged.

    Images (N, 1, size, size) in [0, 1] and leaf labels (N,).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.tensor(data.images[:count], dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
    images = F.interpolate(small, (size, size), mode="bilinear")
    return images, torch.tensor(data.target[:count])


def heading(title: str, sentence: str) -> None:
    """A section's title, and what is measured."""
    print(f"\n{title}\n{'-' * len(title)}\n{sentence}\n", flush=True)


def count(text: str) -> int:
    """A whole number above 0, of a flag."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, got {number}.")
    return number


def overview(frames: Path, output: Path) -> None:
    """The B-CNN beside the frames, in one picture."""
    from PIL import Image

    left = Image.open(output / "branches.png").convert("RGB")
    right = Image.open(frames).convert("RGB")
    whole = Image.new("RGB", (left.width + right.width, right.height), "white")
    whole.paste(left, (0, 0))
    whole.paste(right, (left.width, 0))
    whole.quantize(256).save(output / "overview.png", optimize=True)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
