"""What `model(x, heads=[...])` saves.

The pass ends at the deepest tap that the heads asked for need.

    python benchmarks/heads_depth.py
    python benchmarks/heads_depth.py --model resnet50
    vit_base_patch16_224 --img-size 224 --batch-size 8 --device cuda

For each backbone: all heads, each head alone, and as the baseline the usual way to get at maps: the
whole timm model with forward hooks at the same places, and the same heads behind them. Times are
medians of interleaved repeats, as ratios to the baseline's, so that a busy machine slows all of
them alike.
"""

import argparse
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from measure import print_header, time_all

from timm_branches import BranchModel, create_branch_model
from timm_branches.taps import TapTable, list_taps


def whole_model_with_hooks(
    name: str, model: BranchModel, table: TapTable
) -> Callable[[torch.Tensor], dict]:
    """The plain timm model run to its classifier, with a hook where each tap of `model` is."""
    plain = timm.create_model(name).to(next(model.parameters()).device).eval()
    plain.load_state_dict(model.backbone.state_dict(), strict=False)
    maps: dict[str, torch.Tensor] = {}
    for key, tap in zip(model.names, model.taps, strict=True):
        assert tap.stage is not None
        plain.get_submodule(table.get(tap.stage.stage).module).register_forward_hook(
            lambda module, args, y, key=key: maps.__setitem__(key, y)
        )

    def run(x: torch.Tensor) -> dict:
        plain(x)
        logits = {}
        for key, y in maps.items():
            if y.ndim == 3:
                y = y[:, getattr(plain, "num_prefix_tokens", 0) :].transpose(1, 2).unsqueeze(-1)
            logits[key] = model.head(key)(y)
        return logits

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["vgg16_bn", "resnet50"])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("-b", "--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", action="store_true", help="forward and backward, in train mode")
    args = parser.parse_args()
    device = torch.device(args.device)
    print_header(
        device,
        f"batch {args.batch_size}, {args.img_size} px, {'train' if args.train else 'eval'}, median "
        f"of {args.repeats}",
    )
    print(f"{'model':20} {'what runs':32} {'ms':>9} {'ratio':>7}")
    for name in args.model:
        torch.manual_seed(0)
        model = create_branch_model(name, taps=[3, 4, 5], num_classes=[2, 7, 25]).to(device)
        table = list_taps(name)
        baseline = whole_model_with_hooks(name, model.eval(), table)
        x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
        with torch.no_grad():  # the same answers, else the times mean nothing
            for key, y in baseline(x).items():
                torch.testing.assert_close(y, model(x)[key], rtol=1e-3, atol=1e-4)
        model.train(args.train)

        def run(function: Callable[..., dict], **kwargs) -> Callable[[], object]:
            def step() -> None:
                with torch.set_grad_enabled(args.train):
                    logits = function(x, **kwargs)  # noqa: B023
                    loss = torch.stack(
                        [F.softmax(y, 1).square().sum() for y in logits.values()]
                    ).sum()
                    if args.train:
                        loss.backward()

            return step

        functions = {"whole timm model with hooks": run(baseline), "all heads": run(model)}
        functions |= {f"heads=['{head}']": run(model, heads=[head]) for head in model.names}
        seconds = time_all(functions, args.repeats, device)
        first = next(iter(seconds.values()))
        for what, value in seconds.items():
            print(f"{name:20} {what:32} {1e3 * value:9.1f} {value / first:7.2f}")


if __name__ == "__main__":
    main()
