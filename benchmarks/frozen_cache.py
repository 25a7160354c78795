"""What caching a frozen backbone's features saves.

An epoch of training the heads on images, and on cached features.

    OMP_NUM_THREADS=1 python benchmarks/frozen_cache.py
    python benchmarks/frozen_cache.py --model vit_base_patch16_224 --images 2000 -b 64 --device cuda

Both epochs read through the same kind of loader, compute the loss and update the same heads. They
are taken in turns, and their medians are compared, so that a busy machine slows both alike.
Computing and writing the features is timed once.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch
from measure import print_header

from timm_branches import create_branch_model
from timm_branches.data import HierarchicalDataset, create_loader, create_transform
from timm_branches.features import HeadsOnly, cache_features
from timm_branches.task import BranchTask


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print_header(
        device,
        f"{args.images} images, {args.img_size} px, batch {args.batch_size}, median of "
        f"{args.repeats}",
    )

    torch.manual_seed(0)
    model = create_branch_model(
        args.model, taps=[3, 4, 5], num_classes=[2, 7, 25], img_size=args.img_size
    )
    model.to(device).freeze()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.images, args.img_size, args.img_size, 3), np.uint8)
    labels = torch.stack([torch.arange(args.images) % count for count in (2, 7, 25)], 1)
    data = HierarchicalDataset(
        images, labels, transform=create_transform((3, args.img_size, args.img_size))
    )

    def epoch(network: torch.nn.Module, dataset: torch.utils.data.Dataset, number: int) -> float:
        task = BranchTask(network)
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01)
        loader = create_loader(dataset, args.batch_size, is_training=True)
        loader.set_epoch(number)
        task.train()
        start = time.perf_counter()
        for x, y in loader:
            optimizer.zero_grad()
            task(x.to(device), y.to(device))["loss"].backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        features = cache_features(model, data, folder, batch_size=args.batch_size)
        computing = time.perf_counter() - start
        heads = HeadsOnly(model)
        epoch(model, data, 0)
        epoch(heads, features, 0)
        seconds: dict[str, list[float]] = {"images": [], "features": []}
        for number in range(args.repeats):
            seconds["images"].append(epoch(model, data, number))
            seconds["features"].append(epoch(heads, features, number))
    on_images, on_features = (statistics.median(values) for values in seconds.values())
    size = features.nbytes / args.images / 1024
    print(f"{args.model}: {features.width} features an image, {size:.1f} KiB on the disk")
    print(f"{'epoch':36} {'s':>9} {'ratio':>9}")
    print(f"{'on images, backbone frozen':36} {on_images:9.3f} {1:9.2f}")
    print(
        f"{'computing and writing the features':36} {computing:9.3f} {computing / on_images:9.2f}"
    )
    print(f"{'on cached features':36} {on_features:9.4f} {on_features / on_images:9.4f}")
    print(f"\ncached epochs are {on_images / on_features:.0f} times as fast")


if __name__ == "__main__":
    main()
