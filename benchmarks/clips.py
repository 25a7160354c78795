"""Clips against the hand-written loop.

Frames one by one through a CNN, its features one by one into an LSTM.

    OMP_NUM_THREADS=1 python benchmarks/clips.py
    python benchmarks/clips.py --model resnet50 --frames 16 -b 8 --img-size 224 --device cuda

The baseline is what tutorials show: plain torch, `for t in range(T)` over the frames, the LSTM's
state carried on, the backbone frozen or not; it has the same weights and must give the same
answers. Measured are a training step with the backbone trained and with it frozen, inference, the
memory that autograd keeps for the backward pass, an epoch on cached features against one on frames,
and a stream: one more frame against the whole window once more. Variants are timed in turns and
their medians compared, so that a busy machine slows all of them alike.
"""

import argparse
import itertools
import tempfile
import time

import numpy as np
import timm
import torch
import torch.nn.functional as F
from measure import peak_bytes, print_header, time_all
from torch import nn

from timm_branches import BranchModel, LSTMHead, StreamingClassifier, create_branch_model
from timm_branches.data import (
    ClipDataset,
    collate_clips,
    create_clip_loader,
    create_loader,
    create_transform,
)
from timm_branches.features import HeadsOnly, cache_features

CLASSES = 5


class FrameLoop(nn.Module):
    """CNN+LSTM by hand.

    A Python loop over the frames. Frozen, the CNN runs without gradients and in eval mode.
    """

    def __init__(self, name: str, ours: BranchModel):
        super().__init__()
        head = ours.head(ours.names[0])
        self.cnn = timm.create_model(name, num_classes=0)
        self.cnn.load_state_dict(ours.backbone.state_dict())
        self.frozen = False
        self.lstm = nn.LSTM(
            head.rnn.input_size, head.rnn.hidden_size, head.rnn.num_layers, batch_first=True
        )
        self.lstm.load_state_dict(head.rnn.state_dict())
        self.fc = nn.Linear(head.fc.in_features, CLASSES)
        self.fc.load_state_dict(head.fc.state_dict())

    def freeze(self, frozen: bool) -> None:
        self.frozen = frozen
        self.cnn.requires_grad_(not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cnn.train(self.training and not self.frozen)
        state = None
        for t in range(x.shape[1]):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                y = self.cnn(x[:, t])
            out, state = self.lstm(y[:, None], state)
        return self.fc(out[:, -1])


def row(what: str, loop: float, ours: float, unit: str = "ms") -> None:
    scale = 1e3 if unit == "ms" else 2**-20
    print(
        f"{what:44} {scale * loop:12.2f} {scale * ours:12.2f} {unit:4} "
        f"{loop / max(ours, 1e-12):8.2f}",
        flush=True,
    )


def steps(
    ours: BranchModel, loop: FrameLoop, args: argparse.Namespace, device: torch.device
) -> None:
    """Training steps, inference and memory."""
    x = torch.randn(args.batch_size, args.frames, 3, args.img_size, args.img_size, device=device)
    target = torch.randint(CLASSES, (args.batch_size,), device=device)

    def answer(model: nn.Module) -> torch.Tensor:
        return model(x)[ours.names[0]] if model is ours else model(x)

    def training(model: nn.Module) -> None:
        F.cross_entropy(answer(model), target).backward()
        model.zero_grad()

    def inference(model: nn.Module) -> None:
        with torch.no_grad():
            answer(model)

    with torch.no_grad():  # the same answers, else the times mean nothing
        torch.testing.assert_close(answer(ours.eval()), answer(loop.eval()), rtol=1e-3, atol=1e-4)
    for frozen in (False, True):
        (ours.freeze if frozen else ours.unfreeze)()
        loop.freeze(frozen)
        what = "backbone frozen" if frozen else "backbone trained"
        for model in (ours, loop):
            model.train()
        seconds = time_all(
            {"loop": lambda: training(loop), "ours": lambda: training(ours)}, args.repeats, device
        )
        row(f"training step, {what}", seconds["loop"], seconds["ours"])
        memory = [peak_bytes(lambda m=model: training(m), model, device) for model in (loop, ours)]  # type: ignore[misc]
        row(
            f"  memory {'at its peak' if device.type == 'cuda' else 'kept for backward'}",
            *memory,
            unit="MiB",
        )
    for model in (ours, loop):
        model.eval()
    seconds = time_all(
        {"loop": lambda: inference(loop), "ours": lambda: inference(ours)}, args.repeats, device
    )
    row("inference", seconds["loop"], seconds["ours"])
    if device.type == "cuda":
        memory = [peak_bytes(lambda m=model: inference(m), model, device) for model in (loop, ours)]  # type: ignore[misc]
        row("  memory at its peak", *memory, unit="MiB")


def epochs(
    ours: BranchModel, loop: FrameLoop, args: argparse.Namespace, device: torch.device
) -> None:
    """An epoch of training the head.

    On frames by hand, and on features from the second epoch on.
    """
    rng = np.random.default_rng(0)
    clips = rng.integers(
        0, 256, (args.clips, args.frames, args.img_size, args.img_size, 3), np.uint8
    )
    data = ClipDataset(
        clips,
        np.arange(args.clips) % CLASSES,
        transform=create_transform((3, args.img_size, args.img_size)),
    )
    ours.freeze()
    loop.freeze(True)
    heads, number = HeadsOnly(ours), itertools.count()

    def epoch(model: nn.Module, loader) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model.train()
        loader.set_epoch(next(number))
        for (x, lengths), y in loader:
            x = x.to(device)
            logits = model(x) if model is loop else model(x, lengths=lengths)[ours.names[0]]
            optimizer.zero_grad()
            F.cross_entropy(logits, y.to(device)).backward()
            optimizer.step()

    frames = create_clip_loader(data, args.batch_size, is_training=True)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        features = create_loader(
            cache_features(ours, data, folder, batch_size=args.batch_size),
            args.batch_size,
            is_training=True,
            collate_fn=collate_clips,
        )
        computing = time.perf_counter() - start
        seconds = time_all(
            {"loop": lambda: epoch(loop, frames), "ours": lambda: epoch(heads, features)},
            max(1, args.repeats // 3),
            device,
        )
    row("epoch, frozen: computing the cache once", seconds["loop"], computing)
    row("epoch, frozen: from the cache", seconds["loop"], seconds["ours"])


def streams(
    ours: BranchModel, loop: FrameLoop, args: argparse.Namespace, device: torch.device
) -> None:
    """The answer to the newest frame: with the state kept, and from the last T frames once more."""
    window = torch.randn(args.frames, 3, args.img_size, args.img_size, device=device)
    stream = StreamingClassifier(ours.eval())
    for frame in window:
        answer = stream(frame)[ours.names[0]]
    with torch.no_grad():
        torch.testing.assert_close(answer, loop.eval()(window[None])[0], rtol=1e-3, atol=1e-4)

    def again() -> None:
        with torch.no_grad():
            loop(window[None])

    seconds = time_all({"loop": again, "ours": lambda: stream(window[0])}, args.repeats, device)
    row("stream, a frame (loop: the whole window)", seconds["loop"], seconds["ours"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("-b", "--batch-size", type=int, default=4)
    parser.add_argument("--clips", type=int, default=16, help="clips of an epoch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print_header(
        device,
        f"{args.model}, batch {args.batch_size}, {args.frames} frames of {args.img_size} px, "
        f"medians of {args.repeats}",
    )
    torch.manual_seed(0)
    ours = create_branch_model(
        args.model, head=LSTMHead(hidden_size=256), num_classes=CLASSES, img_size=args.img_size
    )
    loop = FrameLoop(args.model, ours).to(device)
    ours.to(device)
    print(f"{'':44} {'frame loop':>12} {'timm_branches':>12} {'':4} {'ratio':>7}")
    # the first while both have the same statistics of BatchNorm
    for part in (streams, steps, epochs):
        part(ours, loop, args, device)


if __name__ == "__main__":
    main()
