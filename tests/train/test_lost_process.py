"""Several processes, of which one fails: each says why, and none waits for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from timm_branches import create_branch_model, load_model
from timm_branches.data import create_dataset, create_loader, create_transform
from timm_branches.task import BranchTask, base_model
from timm_branches.train import FitConfig, fit
from timm_branches.train.process import setup_device
from timm_branches.train.script import run_script


class Fault(torch.utils.data.Dataset):
    """A data set in which one process meets with a fault at its third sample."""

    def __init__(self, dataset, fault):
        self.dataset, self.fault, self.reads = dataset, fault, 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.reads += 1
        image, labels = self.dataset[index]
        if dist.get_rank() == 1 and self.reads == 12:
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "error":
                raise ZeroDivisionError("a fault of the program")
            if self.fault == "nan":
                image = image * float("nan")
        return image, labels


def main(folder, fault):
    setup_device("cpu")
    dataset = create_dataset(folder / "train", transform=create_transform(32))
    task = BranchTask(
        create_branch_model("test_resnet", taps=[2, 3], taxonomy=dataset.taxonomy), verbose=False
    )
    data = dataset if fault in ("image", "skip") else Fault(dataset, fault)
    skip = "skip" if fault == "skip" else "stop"
    loader = create_loader(data, 4, is_training=True, on_bad_image=skip)
    config = FitConfig(
        str(folder / fault), epochs=2, lr=0.01, plots=False, max_skipped_steps=2 * (fault == "nan")
    )
    result = fit(task, loader, config=config)
    print(f"process {dist.get_rank()} skipped {result.skipped_steps}", flush=True)
    for key, value in base_model(task).state_dict().items():
        others = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(others, value)
        assert torch.equal(*others), key


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(lambda: main(Path(sys.argv[1]), sys.argv[2]))


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name in ("animal/cat", "animal/dog", "plant/rose"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(16):
            pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{index}.jpg")
    return tmp_path


def launch(folder, fault):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *launcher, __file__, str(folder), fault],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done, time.monotonic() - began


def own_lines(text):
    """What the processes said themselves; torchrun adds a report of its own."""
    return [line for line in text.splitlines() if line.startswith(Path(__file__).name)]


def cut(folder):
    path = folder / "train" / "animal" / "cat" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return path


def test_an_image_that_one_process_cannot_read(folder):
    path = cut(folder)
    done, seconds = launch(folder, "image")
    assert done.returncode != 0
    said = own_lines(done.stderr)
    assert [line for line in said if str(path) in line], done.stderr[-3000:]
    # the other one may be ended by torchrun before it notices
    for line in said:
        assert str(path) in line or "another of the 2" in line, line
    assert "[rank" not in done.stderr
    assert seconds < 60


@pytest.mark.parametrize("fault", ["killed", "error"])
def test_a_process_that_ends(folder, fault):
    done, seconds = launch(folder, fault)
    assert done.returncode != 0
    for line in own_lines(done.stderr):
        assert "another of the 2 ended" in line, line
    assert "Connection" not in done.stderr
    if fault == "error":
        assert "a fault of the program" in done.stderr
    else:
        assert "Signal 9" in done.stderr
    assert seconds < 60


def test_a_bad_image_and_a_bad_number_in_one_process(folder):
    done, _ = launch(folder, "nan")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 0 skipped 1" in done.stdout
    assert "process 1 skipped 1" in done.stdout
    path = cut(folder)
    done, _ = launch(folder, "skip")
    assert done.returncode == 0, done.stderr[-3000:]
    names = ""
    for list_of_names in (folder / "skip").glob("bad_images*.txt"):
        names += list_of_names.read_text()
    assert str(path) in names
    tensors = load_model(folder / "skip" / "model.safetensors").state_dict()
    for key, value in tensors.items():
        assert value.isfinite().all(), key
