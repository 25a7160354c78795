"""What does a decoder cost beside the encoder? A training step, over the bare encoder's.

    python benchmarks/decoders.py
    python benchmarks/decoders.py --model resnet34 --img-size 512 -b 16 --device cuda --amp

The bare encoder answers for its last map; each decoder, ours and segmentation_models_pytorch's of
the same kind and width, reads the maps of strides 4 to 32 (a U-Net all). Times are medians of
interleaved repeats, given as ratios. Memory is what autograd keeps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from measure import peak_bytes, print_header, time_all
from torch import nn

from timm_branches import create_branch_model
from timm_branches.files import replace_file
from timm_branches.heads import DPTHead, FPNHead, Head, SegformerHead, UPerNetHead
from timm_branches.train.script import hardware

CLASSES = 11
# with the widths of smp's
OURS: dict[str, str | Head] = {
    "linear": "linear",
    "lean": "lean",
    "segformer": SegformerHead(),
    "fpn": FPNHead(),
    "upernet": UPerNetHead(),
    "dpt": DPTHead(),
    "rednet": "rednet",
    "unet": "unet",
}
THEIRS = {
    "smp Segformer": smp.Segformer,
    "smp FPN": smp.FPN,
    "smp UPerNet": smp.UPerNet,
    "smp Unet": smp.Unet,
}


class One(nn.Module):
    """A branch model with one head, as a function of images."""

    def __init__(self, name: str, head: "str | Head", taps: list[int]):
        super().__init__()
        self.model = create_branch_model(name, taps=[taps], head=head, num_classes=CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (y,) = self.model(x).values()
        return y


class Bare(nn.Module):
    """The encoder alone, timm's own."""

    def __init__(self, name: str):
        super().__init__()
        self.encoder = timm.create_model(name, features_only=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)[-1][:, :CLASSES]


def make_models(name: str, ours: list[str]) -> dict[str, nn.Module]:
    """The bare encoder, our decoders of these kinds, and smp's."""
    models: dict[str, nn.Module] = {"bare encoder": Bare(name)}
    for kind in ours:
        taps = [1, 2, 3, 4, 5] if kind in ("unet", "rednet") else [2, 3, 4, 5]
        models[kind] = One(name, OURS[kind], taps)
    for title, make in THEIRS.items():
        if title.removeprefix("smp ").lower() in ours:
            models[title] = make(f"tu-{name}", encoder_weights=None, classes=CLASSES)
    return models


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["resnet18", "resnet34"])
    parser.add_argument("--heads", nargs="+", choices=tuple(OURS), default=list(OURS))
    parser.add_argument("--img-size", type=int, default=128)
    parser.add_argument("-b", "--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="the smallest of everything")
    parser.add_argument("--json", type=Path, help="keep the numbers in this file")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.img_size, args.batch_size, args.repeats = ["test_resnet"], 64, 2, 1
    device = torch.device(args.device)
    print_header(
        device,
        f"segmentation_models_pytorch {smp.__version__}, batch {args.batch_size}, {args.img_size} "
        f"px, median of {args.repeats}",
    )
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    x = x.to(memory_format=layout)
    rows: list[dict[str, Any]] = []
    print(f"{'model':12} {'decoder':16} {'step, ms':>9} {'ratio':>6} {'M params':>9} {'MiB':>7}")
    for name in args.model:
        torch.manual_seed(0)
        models = make_models(name, args.heads)
        for model in models.values():
            model.to(device, memory_format=layout).train()

        def step(model: nn.Module) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                y = model(x)
            target = torch.zeros(len(y), *y.shape[2:], dtype=torch.long, device=device)
            F.cross_entropy(y, target).backward()
            model.zero_grad()

        seconds = time_all(
            {title: lambda model=model: step(model) for title, model in models.items()},  # type: ignore[misc]
            args.repeats,
            device,
        )
        for title, model in models.items():
            row: dict[str, Any] = {"model": name, "decoder": title}
            row["ms"] = 1e3 * seconds[title]
            row["ratio"] = seconds[title] / seconds["bare encoder"]
            row["parameters"] = sum(p.numel() for p in model.parameters())
            row["bytes"] = peak_bytes(lambda model=model: step(model), model, device)  # type: ignore[misc]
            rows.append(row)
            print(
                f"{name:12} {title:16} {row['ms']:9.1f} {row['ratio']:6.2f} "
                f"{row['parameters'] / 1e6:9.2f} {row['bytes'] / 2**20:7.1f}"
            )
    if args.json is not None:
        facts = {"hardware": hardware(device), "settings": {**vars(args), "json": None}}
        text = json.dumps({**facts, "rows": rows}, indent=2) + "\n"
        replace_file(args.json, lambda path: Path(path).write_text(text))


if __name__ == "__main__":
    main()
