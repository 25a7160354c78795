"""Datasets read from files that the tests write in the formats' own layouts."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from timm_branches.data import (
    HierarchicalDataset,
    HierarchicalSubset,
    coarsen_labels,
    create_dataset,
    create_splits,
    create_transform,
    split_dataset,
)
from timm_branches.data.images import open_tar
from timm_branches.taxonomy.taxonomy import Taxonomy

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path: Path, colour=RED, size=(6, 4)):
    """A plain image, width x height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def colour(data, index):
    return [round(value) for value in (data[index][0].mean((1, 2)) * 255).tolist()]


@pytest.fixture
def nested(tmp_path):
    root = tmp_path / "nested"
    save(root / "animal/dog/1.png", RED)
    save(root / "animal/dog/2.png", RED)
    save(root / "animal/cat/1.png", GREEN)
    save(root / "transport/ship/10.bmp", BLUE)
    save(root / "transport/ship/2.bmp", (9, 9, 9))
    save(root / "animal/some.png", (1, 2, 3))
    (root / "animal/dog/notes.txt").write_text("no image")
    (root / "animal/dog/._1.png").write_text("left by macOS")
    return root


def check_nested(data):
    tree = data.taxonomy
    assert tree.leaves == (("animal", "cat"), ("animal", "dog"), ("transport", "ship"))
    found = sorted((tuple(colour(data, i)), tuple(data[i][1].tolist())) for i in range(len(data)))
    assert found == sorted(
        [
            (RED, (0, 1)),
            (RED, (0, 1)),
            (GREEN, (0, 0)),
            (BLUE, (1, 2)),
            ((9, 9, 9), (1, 2)),
            ((1, 2, 3), (0, -1)),
        ]
    )


def test_nested_folders(nested):
    data = create_dataset(nested)
    check_nested(data)
    # natural order: 2.bmp before 10.bmp
    assert [colour(data, i) for i in (4, 5)] == [[9, 9, 9], list(BLUE)]
    assert data[0][0].shape == (3, 4, 6)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
@pytest.mark.parametrize("top", ["", "nested", "."])
def test_tar(nested, tmp_path, suffix, top):
    path = tmp_path / f"archive{suffix}"
    kind = {".tar": "", ".tar.gz": "gz", ".tgz": "gz", ".tar.bz2": "bz2", ".tar.xz": "xz"}[suffix]
    with tarfile.open(path, f"w:{kind}") as tar:
        if top:
            tar.add(nested, arcname=top)
        else:
            for part in sorted(nested.iterdir()):
                tar.add(part, arcname=part.name)
    check_nested(create_dataset(path))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_in_random_order_from_several_workers(tmp_path, suffix):
    root = tmp_path / "many"
    for i in range(40):
        save(root / f"class{i % 4}" / f"{i}.png", (i, 2 * i, 3 * i))
    path = tmp_path / f"many{suffix}"
    with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w") as tar:
        tar.add(root, arcname="many")
    data = create_dataset(path)
    data[3]  # opens the file in this process, before the workers are forked
    expected = torch.stack([data[i][0] for i in range(40)])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    images = torch.cat([batch for batch, _ in DataLoader(data, 5, sampler=order, num_workers=2)])
    assert torch.equal(images, expected[order])
    assert np.array_equal(pickle.loads(pickle.dumps(data.images))[7], data.images[7])


def test_broken_tar(nested, tmp_path):
    path = tmp_path / "cut.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(nested, arcname="nested")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"cannot read .*cut\.tar\.gz as a tar"):
        create_dataset(path)


@pytest.mark.parametrize("change", ["other members", "cut"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_tar_that_changes_while_it_is_read(nested, tmp_path, change, opened):
    """A member is never read at the place of another one."""
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(nested, arcname="nested")
    _, images = open_tar(str(path))
    os.utime(path)  # nothing but its time
    if opened:
        images[0]
    if change == "cut":
        path.write_bytes(path.read_bytes()[: int(images.offsets[-1]) + 10])
    else:
        other = io.BytesIO()
        with tarfile.open(fileobj=other, mode="w") as tar:
            for part in sorted(nested.iterdir(), reverse=True):
                tar.add(part, arcname=part.name)
        path.write_bytes(other.getvalue())
    with pytest.raises(ValueError, match=r"images\.tar was changed .*:nested/"):
        images[len(images) - 1]


@pytest.mark.parametrize("label", [1e-50, 1 - 1e-9, 0.5, float("nan"), float("inf")])
def test_a_label_that_is_not_whole_is_refused(label):
    with pytest.raises(ValueError, match="whole numbers"):
        HierarchicalDataset(np.zeros((1, 2, 2), np.uint8), [[0, label]])


def test_split_folders_share_one_tree(tmp_path):
    for split, names in {"train": "abc", "validation": "ac", "Test": "c"}.items():
        for name in names:
            save(tmp_path / split / name / "1.png")
    for split, labels in {
        "train": [0, 1, 2],
        "val": [0, 2],
        "test": [2],
        "trainval": [0, 1, 2, 0, 2],
    }.items():
        data = create_dataset(tmp_path, split)
        assert sorted(data.labels.flatten().tolist()) == sorted(labels)
        assert data.taxonomy.num_classes == (3,)
    assert [len(part) for part in create_splits(tmp_path)] == [3, 2, 1]


def test_a_class_named_train_is_no_split(tmp_path):
    for name in ("train", "car"):
        save(tmp_path / name / "1.png")
    assert create_dataset(tmp_path).taxonomy.leaf_names == ("car", "train")
    with pytest.raises(ValueError, match="no 'test' split, only train"):
        create_dataset(tmp_path, "test")


def test_flat_folders_with_a_taxonomy(tmp_path):
    for name in ("cat", "ship", "animal"):
        save(tmp_path / name / "1.png")
    tree = Taxonomy(["animal/dog", "animal/cat", "transport/ship"])
    data = create_dataset(tmp_path, taxonomy=tree)
    assert data.taxonomy is tree
    assert data.labels.tolist() == [[0, -1], [0, 1], [1, 2]]
    save(tmp_path / "plane/1.png")
    save(tmp_path / "boat/1.png")
    with pytest.raises(
        ValueError, match="2 class names are not in the taxonomy: 'boat', 'plane'.*'dog'"
    ):
        create_dataset(tmp_path, taxonomy=tree)


def test_equal_names_under_two_parents(tmp_path):
    save(tmp_path / "fruit/orange/1.png")
    save(tmp_path / "colour/orange/1.png")
    tree = create_dataset(tmp_path).taxonomy
    assert tree.num_classes == (2, 2)
    save(tmp_path / "flat/orange/1.png")
    with pytest.raises(ValueError, match="fit several of its classes: 'orange'"):
        create_dataset(tmp_path / "flat", taxonomy=tree)


def test_csv(tmp_path):
    for i in range(5):
        save(tmp_path / f"images/{i}.png", (i, 0, 0))
    path = tmp_path / "list.csv"
    path.write_text(
        "path,coarse,fine,split\n"
        "images/0.png,animal,dog,train\n"
        "images/1.png,animal,,train\n"
        "images/2.png,,ship,val\n"
        '"images/3.png",,,test\n'
        "images/4.png,transport,ship,valid\n",
        encoding="utf-8-sig",  # as a spreadsheet writes it
    )
    data = create_dataset(path, "all")
    assert data.taxonomy.levels == ("coarse", "fine")
    assert data.labels.tolist() == [[0, 0], [0, -1], [-1, 1], [-1, -1], [1, 1]]
    assert [colour(data, i)[0] for i in range(5)] == [0, 1, 2, 3, 4]
    val = create_dataset(path, "val")
    assert val.labels.tolist() == [[-1, 1], [1, 1]]
    assert colour(val, 1) == [4, 0, 0]

    tree = Taxonomy(["animal/cat", "animal/dog", "transport/ship"], levels=["coarse", "fine"])
    assert create_dataset(path, "all", taxonomy=tree).labels.tolist()[0] == [0, 1]
    with pytest.raises(ValueError, match=r"line 4: no class fits the row .*'ship'"):
        create_dataset(
            path, taxonomy=Taxonomy(["animal/dog", "transport/car"], levels=["coarse", "fine"])
        )
    with pytest.raises(ValueError, match="level columns"):
        create_dataset(path, taxonomy=Taxonomy(["a/b/c"]))


def test_csv_with_leaf_names(tmp_path):
    path = tmp_path / "list.csv"
    for i in (1, 2, 3):
        save(tmp_path / f"{i}.png")
    path.write_text("image,label\n1.png,cat\n2.png,\n3.png,ship\n")
    tree = Taxonomy(["transport/ship", "animal/cat"])
    assert create_dataset(path, taxonomy=tree).labels.tolist() == [[1, 1], [-1, -1], [0, 0]]
    assert create_dataset(path).labels.tolist() == [[0], [-1], [1]]
    path.write_text("label\ncat\n")
    with pytest.raises(ValueError, match="needed are a column 'path'"):
        create_dataset(path)


def test_decoding(tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(folder / "1palette.png")
    Image.new("L", (4, 4), 100).save(folder / "2grey.jpg", quality=100)
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(folder / "3alpha.png")
    Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)).save(folder / "4deep.png")
    upright = np.zeros((8, 4, 3), np.uint8)  # red above, blue below
    upright[:4], upright[4:] = RED, BLUE
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    lying.save(folder / "5turned.jpg", exif=exif, quality=100, subsampling=0)
    Image.fromarray(upright).save(folder / "6upright.webp", lossless=True)
    data = create_dataset(tmp_path)
    assert colour(data, 0) == [10, 200, 30]
    assert colour(data, 1) == [100, 100, 100]
    assert colour(data, 2) == [10, 20, 30]
    assert colour(data, 3) == [100, 100, 100]
    for index, tolerance in ((4, 0.1), (5, 0)):
        expected = torch.from_numpy(upright).permute(2, 0, 1) / 255
        torch.testing.assert_close(data[index][0], expected, rtol=0, atol=tolerance)
    grey = create_dataset(tmp_path, in_chans=1)
    assert grey[0][0].shape == (1, 4, 4)
    assert abs(colour(grey, 0)[0] - (0.299 * 10 + 0.587 * 200 + 0.114 * 30)) <= 1
    assert colour(grey, 3) == [100]


@pytest.mark.parametrize("name", ["bad.png", "bad.jpg"])
@pytest.mark.parametrize("kind", ["text", "empty", "cut"])
def test_broken_file_is_named(tmp_path, name, kind):
    path = tmp_path / "class" / name
    save(path, size=(64, 64))
    content = {"text": b"<html>404</html>", "empty": b"", "cut": path.read_bytes()[:-40]}[kind]
    path.write_bytes(content)
    data = create_dataset(tmp_path)
    with pytest.raises(
        ValueError, match=rf"cannot read the image .*class.{name} \({len(content)} bytes\)"
    ):
        data[0]


def test_broken_file_is_named_through_a_worker(tmp_path):
    save(tmp_path / "class/1.png")
    (tmp_path / "class/2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"class.2\.png"):
        list(DataLoader(create_dataset(tmp_path), 1, num_workers=1))


def write_cifar(root, name, count, pattern, monkeypatch):
    """Batches in CIFAR's own on-disk format, and their checksums in torchvision."""
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    base = root / cls.base_folder
    base.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"

    def write(file, data):
        (base / file).write_bytes(pickle.dumps(data))
        return file, hashlib.md5((base / file).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        entries = []
        for file, _ in getattr(cls, attribute):
            labels = [pattern(i) for i in range(count)]
            pixels = np.zeros((count, 3, 32, 32), np.uint8)
            pixels[:, 2] = np.array(labels)[:, None, None]  # blue tells the label
            entries.append(write(file, {"data": pixels.reshape(count, -1), key: labels}))
        monkeypatch.setattr(cls, attribute, entries)
    meta = dict(cls.meta)
    _, meta["md5"] = write(meta["filename"], {meta["key"]: [str(i) for i in range(100)]})
    monkeypatch.setattr(cls, "meta", meta)


@pytest.mark.parametrize(("name", "batches"), [("cifar10", 5), ("cifar100", 1)])
def test_cifar(tmp_path, monkeypatch, name, batches):
    classes = 10 if name == "cifar10" else 100
    write_cifar(tmp_path, name, 20, lambda i: (7 * i + 3) % classes, monkeypatch)
    for split, count in (("train", 20 * batches), ("test", 20), ("all", 20 * batches + 20)):
        data = create_dataset(name, split, root=str(tmp_path))
        assert len(data) == count
        image, labels = data[1]
        assert image.shape == (3, 32, 32)
        assert colour(data, 1) == [0, 0, 10 % classes]
        assert labels.tolist() == data.taxonomy.expand(10 % classes).tolist()
    train, val, test = create_splits(name, root=str(tmp_path), val_fraction=0.25)
    assert (len(train), len(val), len(test)) == (15 * batches, 5 * batches, 20)
    with pytest.raises(ValueError, match="no 'val' split, only test, train; split_dataset"):
        create_dataset(name, "val", root=str(tmp_path))


def test_cifar10_with_another_tree(tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar10", 10, lambda i: i, monkeypatch)
    own = create_dataset("cifar10", root=str(tmp_path)).taxonomy
    names = [leaf[-1] for leaf in own.leaves]
    tree = Taxonomy([("thing", name) for name in reversed(names)])
    data = create_dataset("cifar10", "test", taxonomy=tree, root=str(tmp_path))
    assert data.labels[:, 1].tolist() == list(range(9, -1, -1))
    with pytest.raises(ValueError, match="9 class names are not in the taxonomy"):
        create_dataset("cifar10", taxonomy=Taxonomy(names[:1]), root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_mnist(tmp_path, name, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 5)):
        labels = (np.arange(count) * 3 % 10).astype(np.uint8)
        pixels = np.repeat(labels, 28 * 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 2049, count) + labels.tobytes()
        )
        with gzip.open(raw / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(b"")
    for in_chans in (1, 3):
        data = create_dataset(name, "test", in_chans=in_chans, root=str(tmp_path))
        assert len(data) == 5
        assert data[2][0].shape == (in_chans, 28, 28)
        assert colour(data, 2) == [6] * in_chans
        assert data[2][1].tolist() == data.taxonomy.expand(6).tolist()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_missing_download(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="Pass download=True"):
        create_dataset(name, root=str(tmp_path))


def test_digits():
    parts = {
        split: create_dataset("digits", split, in_chans=1) for split in ("train", "val", "test")
    }
    assert [len(part) for part in parts.values()] == [1077, 360, 360]
    ids = torch.cat([part.sample_ids for part in parts.values()])
    assert sorted(ids.tolist()) == list(range(1797))
    for part in parts.values():
        share = part.labels[:, -1].bincount().float() / len(part)
        assert (share - 0.1).abs().max() < 0.01
    from sklearn.datasets import load_digits

    source = load_digits()
    image, labels = parts["test"][17]
    sample = int(parts["test"].sample_ids[17])
    torch.testing.assert_close(
        image[0], torch.from_numpy(source.images[sample] / 16).float(), atol=1 / 500, rtol=0
    )
    assert labels.tolist() == parts["test"].taxonomy.expand(int(source.target[sample])).tolist()


def test_split_is_stratified_and_repeats():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [3])[torch.randperm(100)][:, None]
    data = HierarchicalDataset(np.zeros((100, 2, 2), np.uint8), labels)
    train, val = split_dataset(data, 0.2, seed=1)
    counts = val.labels.flatten().bincount(minlength=4).tolist()
    assert counts[:2] == [12, 6]
    assert counts[2] in (1, 2)
    assert sorted(train.sample_ids.tolist() + val.sample_ids.tolist()) == list(range(100))
    torch.manual_seed(77)
    assert split_dataset(data, 0.2, seed=1)[1].sample_ids.tolist() == val.sample_ids.tolist()
    assert split_dataset(data, 0.2, seed=2)[1].sample_ids.tolist() != val.sample_ids.tolist()
    for fraction in (0.0, 1.0, 0.001, -1):
        with pytest.raises(ValueError, match="leaves an empty part"):
            split_dataset(data, fraction)


def test_limit_and_nested_subsets():
    tree = Taxonomy(["a/x", "a/y", "b/z"])
    images = np.arange(90, dtype=np.uint8)[:, None, None].repeat(2, 1)
    data = HierarchicalDataset(images, tree.expand(torch.arange(90) % 3), tree)
    part = data.limit(30, seed=4)
    assert len(part) == 30
    assert part.taxonomy is tree
    assert part.labels[:, 1].bincount().tolist() == [10, 10, 10]
    inner = HierarchicalSubset(part, [3, 29])
    assert [colour(inner, i) for i in range(2)] == [colour(part, 3), colour(part, 29)]
    assert inner[1][1].tolist() == part[29][1].tolist()
    assert len(data.limit(1000)) == 90
    part.transform = create_transform((1, 2, 2))
    assert data.transform is None


def test_loaders_and_plain_transforms():
    data = HierarchicalDataset([lambda: np.full((4, 4), 7, np.uint8)], [[0]], in_chans=3)
    assert colour(data, 0) == [7, 7, 7]
    data.transform = lambda image: torch.tensor(image.shape)
    assert data[0][0].tolist() == [4, 4, 3]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="use taxonomy.expand"):
        HierarchicalDataset(np.zeros((2, 2, 2), np.uint8), [0, 1])
    with pytest.raises(ValueError, match="do not fit a taxonomy"):
        HierarchicalDataset(np.zeros((1, 2, 2), np.uint8), [[3]], Taxonomy(["a", "b"]))
    with pytest.raises(ValueError, match="must be uint8"):
        HierarchicalDataset(np.zeros((1, 2, 2), np.float32), [[0]])[0]
    with pytest.raises(ValueError, match="no split 'some'"):
        create_dataset("digits", "some")
    with pytest.raises(ValueError, match="in_chans"):
        create_dataset("digits", in_chans=0)
    with pytest.raises(FileNotFoundError, match="cifar100"):
        create_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match="no images"):
        create_dataset(tmp_path)
    save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png in .* lies in no class folder"):
        create_dataset(tmp_path)
    with pytest.raises(ValueError, match="no known kind"):
        create_dataset(tmp_path / "loose.png")


def test_importing_is_light():
    # in a new process: other tests have imported everything already
    code = (
        "import sys; from timm_branches.data import *; "
        'print([name for name in ("albumentations", "sklearn", "cv2") if name in sys.modules])'
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


class TestCoarsenLabels:
    def data(self):
        labels = [[i % 2, i % 4] for i in range(40)]
        whole = HierarchicalDataset(np.arange(40 * 4, dtype=np.uint8).reshape(40, 2, 2), labels)
        return HierarchicalSubset(whole, range(39, -1, -1))  # positions differ from sample ids

    @pytest.mark.parametrize("fraction", [0.5, 0.9])
    def test_a_stratified_share_keeps_the_coarse_label_alone(self, fraction):
        data = self.data()
        some, full = coarsen_labels(data, fraction, seed=3)
        hidden = some.labels[:, 1] < 0
        assert hidden.sum() == 40 * fraction
        assert torch.equal(some.labels[:, 0], data.labels[:, 0])
        assert torch.equal(some.labels[~hidden], data.labels[~hidden])
        assert torch.equal(full.sample_ids, data.sample_ids[~hidden])
        assert torch.equal(full.labels, data.labels[~hidden])
        assert data.labels[hidden, 1].bincount().tolist() == [10 * fraction] * 4
        assert (data.labels >= 0).all()

    def test_seed(self):
        masks = [
            coarsen_labels(self.data(), 0.5, seed=seed)[0].labels[:, 1] < 0 for seed in (0, 0, 1)
        ]
        assert torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[0], masks[2])

    @pytest.mark.parametrize(("fraction", "levels"), [(0, 1), (1, 1), (0.5, 0), (0.5, 2)])
    def test_refuses(self, fraction, levels):
        with pytest.raises(ValueError, match="fraction|levels"):
            coarsen_labels(self.data(), fraction, levels)
