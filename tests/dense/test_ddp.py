"""Two processes on the CPU measure what one does."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import one_hot

from timm_branches.dense import RestorationEvaluator, SegmentationEvaluator, pixel_cross_entropy
from timm_branches.taxonomy import Taxonomy

TREE = Taxonomy(["a/x", "a/y", "b/z"], levels=["coarse", "fine"])


def make():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(3, (5, 12, 13), generator=generator)
    logits = torch.randn(5, 3, 12, 13, generator=generator) + one_hot(target, 3).movedim(-1, 1)
    target[torch.rand(target.shape, generator=generator) < 0.3] = -1
    target[0] = -1
    return logits, target


def measure(part, distributed):
    logits, target = make()
    found = {}
    for evaluator in (SegmentationEvaluator(3), SegmentationEvaluator(3, taxonomy=TREE)):
        evaluator.update(logits[part], target[part])
        found |= {
            f"{len(evaluator.levels)}_{k}": v for k, v in evaluator.compute(distributed).items()
        }
        found |= evaluator.class_iou()
        found |= {f"own_{len(evaluator.levels)}_{k}": v for k, v in evaluator.compute().items()}
    evaluator = RestorationEvaluator(data_range=8)
    evaluator.update(logits[part], logits[part].roll(1, -1))
    return found | evaluator.compute(distributed)


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = [slice(0, 2), slice(2, 5)][rank]
    logits, target = make()
    share = pixel_cross_entropy(logits[part], target[part], share=True)
    torch.save({"metrics": measure(part, distributed=True), "share": share}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    expected = measure(slice(0, 5), distributed=False)
    for result, part in zip(found, (slice(0, 2), slice(2, 5)), strict=True):
        alone = measure(part, distributed=False)  # with its own counts each process goes on
        for name, value in result["metrics"].items():
            wanted = alone if name.startswith("own_") else expected
            assert value == pytest.approx(wanted[name], rel=1e-12, nan_ok=True), name
    assert found[0]["metrics"]["own_1_miou"] != found[1]["metrics"]["own_1_miou"]
    mean = sum(float(result["share"]) for result in found) / 2
    assert mean == pytest.approx(float(pixel_cross_entropy(*make())), rel=1e-6)
