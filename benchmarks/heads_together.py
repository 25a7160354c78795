"""What do three heads in one pass cost against three models with a head each?

    python benchmarks/heads_together.py
    python benchmarks/heads_together.py --model resnet50 --img-size 224 --frames 16 --device cuda

Labels of a clip's frames, an answer for the clip and a mask for each frame, on one backbone and on
three. Times are medians of interleaved repeats, given as ratios.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measure import print_header, time_all

from timm_branches import create_branch_model
from timm_branches.files import replace_file
from timm_branches.train.script import hardware

HEADS: dict[str, Any] = {"mean": 3, "transformer": 5, "lean": (2, 3, 4, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["convnext_atto", "vit_tiny_patch16_224"])
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("-b", "--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="the smallest of everything")
    parser.add_argument("--json", type=Path, help="keep the numbers in this file")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.batch_size, args.repeats = ["test_convnext"], 1, 1
    device = torch.device(args.device)
    print_header(
        device,
        f"{args.batch_size} clips of {args.frames} frames, {args.img_size} px, eval, median of "
        f"{args.repeats}",
    )
    clips = torch.randn(args.batch_size, args.frames, 3, args.img_size, args.img_size)
    clips = clips.to(device)
    rows = []
    for name in args.model:
        options: dict[str, Any] = {"num_classes": 5, "img_size": args.img_size}
        together = create_branch_model(name, taps=list(HEADS.values()), head=list(HEADS), **options)
        models = {"together": [together]}
        models["apart"] = []
        for head, taps in HEADS.items():
            models["apart"].append(create_branch_model(name, taps=[taps], head=head, **options))
        for model in (*models["together"], *models["apart"]):
            model.to(device).eval()

        @torch.no_grad()
        def step(chosen: list[Any]) -> None:
            for model in chosen:
                model(clips)

        seconds = time_all(
            {title: lambda chosen=chosen: step(chosen) for title, chosen in models.items()},  # type: ignore[misc]
            args.repeats,
            device,
        )
        ratio = seconds["together"] / seconds["apart"]
        rows.append({"model": name, "ratio": ratio, **seconds})
        print(f"{name:24} {ratio:.2f}")
    if args.json is not None:
        facts = {"hardware": hardware(device), "settings": {**vars(args), "json": None}}
        text = json.dumps({**facts, "rows": rows}, indent=2) + "\n"
        replace_file(args.json, lambda path: Path(path).write_text(text))


if __name__ == "__main__":
    main()
