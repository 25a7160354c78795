"""Images that cannot be read: found before a training, or left out and not replaced."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches.data import create_dataset, create_loader
from timm_branches.data.bad_images import find_bad_images, sample_name


@pytest.fixture
def photos(tmp_path):
    """Ninety images of three classes, whose grey value is their number."""
    folder = tmp_path / "photos"
    for number in range(90):
        path = folder / "abc"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, number, number)).save(path)
    return folder


def spoil(folder, number, kind):
    """Make one image unreadable; returns its path."""
    path = folder / "abc"[number % 3] / f"{number:02d}.png"
    whole = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif kind == "text":
        path.write_text("this is no image")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    return path


KINDS = ["empty", "cut", "text", "gone", "pipe", "folder"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_left_out_without_another(photos, kind, workers, caplog):
    """The other samples come once each, the batch is smaller, the image is named once."""
    data = create_dataset(str(photos))
    path = spoil(photos, 10, kind)
    loader = create_loader(
        data,
        16,
        is_training=True,
        drop_last=False,
        num_workers=workers,
        on_bad_image="skip",
        persistent_workers=False,
    )
    for epoch in range(2):
        loader.set_epoch(epoch)
        greys, sizes = [], []
        for images, labels in loader:
            assert len(images) == len(labels)
            sizes.append(len(images))
            greys += (images[:, 0, 0, 0] * 255).round().int().tolist()
        assert sorted(greys) == [number for number in range(90) if number != 10]
        assert sorted(sizes) in ([10, 15, 16, 16, 16, 16], [9, 16, 16, 16, 16, 16])
    assert list(loader.bad_images) == [str(path)]
    assert caplog.text.count(str(path)) in (1, 2)  # its name, and perhaps the reason's
    assert caplog.text.count("Left out") == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_stops_with_one_line(photos, kind, workers):
    data = create_dataset(str(photos))
    path = spoil(photos, 10, kind)
    loader = create_loader(data, 16, num_workers=workers)
    with pytest.raises((OSError, ValueError)) as error:
        list(loader)
    assert path.name in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_stop_the_run(photos, workers):
    """One of 90 is allowed (1 %, rounded up), two are not; the list says which."""
    data = create_dataset(str(photos))
    paths = [spoil(photos, number, "cut") for number in (10, 50)]
    loader = create_loader(data, 16, num_workers=workers, on_bad_image="skip")
    with pytest.raises(ValueError, match="2 of 90 images cannot be read") as error:
        list(loader)
    assert all(str(path) in str(error.value) for path in paths)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_found_before_training(photos, kind):
    data = create_dataset(str(photos))
    path = spoil(photos, 10, kind)
    if kind != "cut":  # its header is whole
        [bad] = find_bad_images(data)
        assert bad.name == str(path)
    [bad] = find_bad_images(data, decode=True)
    assert bad.name == str(path)
    assert "\n" not in bad.reason
    others = [index for index in range(90) if sample_name(data, index) != str(path)]
    subset = torch.utils.data.Subset(data, others)
    assert find_bad_images(subset, decode=True) == []


def test_names_go_through_wrappers(photos):
    data = create_dataset(str(photos))
    paths = [sample_name(data, index) for index in range(90)]
    assert sorted(paths) == sorted(str(path) for path in photos.rglob("*.png"))
    part = data.subset([5, 7])
    assert sample_name(part, 1) == paths[7]
    inner = torch.utils.data.Subset(part, [1])
    assert sample_name(inner, 0) == paths[7]
    joined = torch.utils.data.ConcatDataset([part, inner, data])
    assert [sample_name(joined, i) for i in (0, 2, 3)] == [paths[5], paths[7], paths[0]]
    assert sample_name(create_dataset("digits", in_chans=1), 0) is None


def test_another_policy_is_refused(photos):
    with pytest.raises(ValueError, match="write 'stop' or 'skip'"):
        create_loader(create_dataset(str(photos)), 4, on_bad_image="ignore")


DIES = """
import os, signal, torch
from timm_branches.data import create_loader

class Dies(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1), torch.zeros(1)

try:
    list(create_loader(Dies(), 2, num_workers=1))
except (ChildProcessError, RuntimeError) as error:  # torch's own may come between two lines
    print(error, flush=True)
    os._exit(0)
"""


class Fails(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        if index == 5:
            raise self.error
        return torch.zeros(1), torch.zeros(1)


def test_a_worker_that_dies_is_one_message():
    """As by a system that lacks memory; in a process of its own, which it may take along."""
    done = subprocess.run(
        [sys.executable, "-c", DIES], capture_output=True, text=True, timeout=60, check=False
    )
    assert re.search("a process that loads data died|is killed by signal", done.stdout), done
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("one line"),
        ValueError("two\nValueError: lines"),
        OSError(2, "No such file", "a.jpg"),
        RuntimeError("of the program"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
    ],
    ids=lambda error: type(error).__name__ + str(len(str(error))),
)
def test_errors_of_workers_come_as_they_were(error):
    with pytest.raises(Exception) as here:  # noqa: PT011
        list(create_loader(Fails(error), 2))
    with pytest.raises(Exception) as there:  # noqa: PT011
        list(create_loader(Fails(error), 2, num_workers=1))
    assert "Traceback" not in str(there.value)
    if "\n" not in str(here.value):
        assert str(there.value) == str(here.value)


def test_clips_are_not_replaced(tmp_path):
    """A folder of frames of which one is damaged: the clip is left out."""
    from timm_branches.data import create_clip_dataset, create_clip_loader

    for number in range(20):
        folder = tmp_path / "ab"[number % 2] / f"clip{number:02d}"
        folder.mkdir(parents=True)
        for frame in range(3):
            Image.new("RGB", (8, 8), (number * 10,) * 3).save(folder / f"{frame}.png")
    (tmp_path / "b" / "clip03" / "1.png").write_bytes(b"no image")
    data = create_clip_dataset(str(tmp_path))
    loader = create_clip_loader(data, 4, on_bad_image="skip")
    greys = []
    for (clips, _), _ in loader:
        greys += (clips[:, 0, 0, 0, 0] * 255).round().int().tolist()
    assert sorted(greys) == [10 * number for number in range(20) if number != 3]
    [name] = loader.bad_images
    assert "clip03" in name
    assert data.errors == 1


def test_a_training_goes_on(photos, tmp_path):
    """The run names it in bad_images.txt and counts it in the log."""
    from timm_branches import create_branch_model
    from timm_branches.task import BranchTask
    from timm_branches.train import FitConfig, fit

    data = create_dataset(str(photos))
    path = spoil(photos, 10, "cut")
    model = create_branch_model("test_resnet", taps=[5], taxonomy=data.taxonomy, img_size=32)
    loader = create_loader(data, 16, is_training=True, drop_last=False, on_bad_image="skip")
    config = FitConfig(
        output=str(tmp_path / "run"), epochs=2, device="cpu", plots=False, progress=False
    )
    result = fit(BranchTask(model), loader, None, config)
    text = (tmp_path / "run" / "bad_images.txt").read_text()
    assert text.count("\n") == 1
    assert text.startswith(f"{path}\t")
    assert result.history[-1]["bad_images"] == 1
    assert np.isfinite(result.history[-1]["train_loss"])
