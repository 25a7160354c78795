"""Our U-Net head against `segmentation_models_pytorch.Unet` on the same encoder.

Time, memory and parameters.

    python benchmarks/unet_vs_smp.py
    python benchmarks/unet_vs_smp.py --model resnet34 --img-size
    512 --batch-size 16 --device cuda --amp

Both have timm's encoder, the decoder widths 256, 128, 64, 32 and 16, and the same weights; their
outputs are compared first. Times are medians of interleaved repeats and are reported as ratios, so
that a busy machine slows both alike. Peak memory is that of the allocator on a GPU; on the CPU it
is the sum of the tensors kept for the backward pass.
"""

import argparse

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from measure import peak_bytes, print_header, time_all
from torch import nn

from timm_branches import create_branch_model

CLASSES = 11


class Ours(nn.Module):
    """The branch model with one head, returning logits as smp's does."""

    def __init__(self, name: str):
        super().__init__()
        self.model = create_branch_model(
            name, taps=[1, 2, 3, 4, 5], head="unet", num_classes=CLASSES
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)["unet"]


def with_weights_of(ours: Ours, name: str) -> nn.Module:
    """smp's Unet with the weights of ours; the decoders have the same tensors in the same order."""
    theirs = smp.Unet(f"tu-{name}", encoder_weights=None, classes=CLASSES)
    theirs.encoder.model.load_state_dict(ours.model.backbone.state_dict())
    decoder = ours.model.head("unet")
    for part, other in ((decoder.stages, theirs.decoder), (decoder.fc, theirs.segmentation_head)):
        other.load_state_dict(
            dict(zip(other.state_dict(), part.state_dict().values(), strict=True))
        )
    return theirs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["resnet34"])
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("-b", "--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    print_header(
        device,
        f"segmentation_models_pytorch {smp.__version__}, batch {args.batch_size}, {args.img_size} "
        f"px, median of {args.repeats}",
    )
    print(f"{'model':20} {'what':24} {'timm_branches':>14} {'smp':>14} {'ratio':>7}")
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    for name in args.model:
        torch.manual_seed(0)
        ours = Ours(name)
        models = {
            "ours": ours.to(device, memory_format=layout),
            "smp": with_weights_of(ours, name).to(device, memory_format=layout),
        }
        x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device).to(
            memory_format=layout
        )
        target = torch.randint(
            CLASSES, (args.batch_size, args.img_size, args.img_size), device=device
        )
        with torch.no_grad():  # the same answers, else the times mean nothing
            torch.testing.assert_close(
                models["ours"].eval()(x), models["smp"].eval()(x), rtol=1e-3, atol=1e-4
            )

        def inference(model: nn.Module) -> None:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                model(x)  # noqa: B023

        def training(model: nn.Module) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = F.cross_entropy(model(x), target)  # noqa: B023
            loss.backward()
            model.zero_grad()

        rows: list[tuple[str, float, float, str]] = []
        rows.append(
            (
                "parameters",
                *(sum(p.numel() for p in m.parameters()) for m in models.values()),
                ",.0f",
            )
        )
        for what, step in (("inference, ms", inference), ("training step, ms", training)):
            for m in models.values():
                m.train(step is training)
            seconds = time_all(
                {key: lambda m=m, step=step: step(m) for key, m in models.items()},  # type: ignore[misc]
                args.repeats,
                device,
            )
            rows.append((what, 1e3 * seconds["ours"], 1e3 * seconds["smp"], ",.1f"))
        memory = [peak_bytes(lambda m=m: training(m), m, device) / 2**20 for m in models.values()]  # type: ignore[misc]
        rows.append(("peak memory, MiB", memory[0], memory[1], ",.1f"))
        for what, a, b, form in rows:
            print(f"{name:20} {what:24} {a:>14{form}} {b:>14{form}} {a / b:7.2f}")


if __name__ == "__main__":
    main()
