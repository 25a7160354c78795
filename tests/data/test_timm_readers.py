"""timm's names `hfds/` and `wds/` with a label on every level, against what timm reads."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from timm_branches import Taxonomy
from timm_branches.data import create_clip_dataset, create_dataset, create_loader, create_splits

DIGITS = ["zero", "one", "six", "eight"]
SHAPES = ["round", "straight"]
# zero and six are round, one is straight; sometimes a level is unknown
ROWS = [(0, 0), (1, 1), (0, 2), (-1, 2), (0, 0), (1, 1), (0, 2), (1, -1)]


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((5, 6, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def named(data):
    names = []
    for row in data.labels.tolist():
        cells = zip(data.taxonomy.classes, row, strict=True)
        names.append([classes[label] if label >= 0 else "" for classes, label in cells])
    return names


EXPECTED = []
for _shape, _digit in ROWS:
    EXPECTED.append([SHAPES[_shape] if _shape >= 0 else "", DIGITS[_digit] if _digit >= 0 else ""])


class TestParquet:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def write(self, folder, rows=ROWS, split="train", **more):
        import datasets

        folder.mkdir(exist_ok=True)
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "digit": datasets.ClassLabel(names=DIGITS),
                "shape": datasets.ClassLabel(names=SHAPES),
            }
        )
        columns = {
            "image": [{"bytes": png(10 * i), "path": None} for i in range(len(rows))],
            "digit": [digit for _, digit in rows],
            "shape": [shape for shape, _ in rows],
        }
        for name, (kind, cells) in more.items():
            features[name] = kind
            columns[name] = cells
        table = datasets.Dataset.from_dict(columns, features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        return f"hfds/{folder}"

    def test_every_level_by_name(self, tmp_path):
        name = self.write(tmp_path / "photos")
        data = create_dataset(name, levels=["shape", "digit"])
        assert data.taxonomy.levels == ("shape", "digit")
        assert named(data) == EXPECTED

    def test_images_and_numbers_are_those_that_timm_reads(self, tmp_path):
        name = self.write(tmp_path / "photos")
        theirs = timm.data.create_dataset(
            name, root=str(tmp_path / "theirs"), split="train", target_key="digit"
        )
        ours = create_dataset(name, levels=["digit"])
        assert len(ours) == len(theirs) == len(ROWS)
        for i, (image, target) in enumerate(theirs):
            np.testing.assert_array_equal(ours.images[i], np.asarray(image))
            expected = DIGITS[target] if target >= 0 else ""
            assert named(ours)[i] == [expected]

    def test_splits_share_one_tree(self, tmp_path):
        self.write(tmp_path / "photos")
        self.write(tmp_path / "photos", ROWS[2:5], "validation")
        name = self.write(tmp_path / "photos", ROWS[1:3], "test")
        parts = create_splits(name, levels=["shape", "digit"])
        assert [len(part) for part in parts] == [8, 3, 2]
        assert named(parts[1]) == EXPECTED[2:5]
        assert named(parts[2]) == EXPECTED[1:3]

    def test_another_tree(self, tmp_path):
        name = self.write(tmp_path / "photos")
        tree = Taxonomy(["straight/one", "round/six", "round/zero", "round/eight"])
        data = create_dataset(name, taxonomy=tree, levels=["shape", "digit"])
        assert data.taxonomy is tree
        assert named(data) == EXPECTED

    def test_a_contradiction_is_refused_with_its_row(self, tmp_path):
        name = self.write(tmp_path / "photos", [(0, 0), (1, 0)])
        tree = Taxonomy(["straight/one", "round/zero"])
        with pytest.raises(ValueError, match=r"row 1 of hfds/.*no class fits.*straight.*zero"):
            create_dataset(name, taxonomy=tree, levels=["shape", "digit"])

    def test_faults_are_named(self, tmp_path):
        name = self.write(tmp_path / "photos")
        with pytest.raises(ValueError, match=r"no column 'form'"):
            create_dataset(name, levels=["form", "digit"])
        with pytest.raises(ValueError, match=r"levels="):
            create_dataset(name, levels="digit")
        with pytest.raises(ValueError, match=r"no column 'picture'"):
            create_dataset(name, path_column="picture")
        with pytest.raises(FileNotFoundError, match=r"hfds/./nowhere is neither a folder"):
            create_dataset("hfds/./nowhere")
        with pytest.raises(FileNotFoundError, match=r"hfds/ names no data set"):
            create_dataset("hfds/")
        with pytest.raises(ValueError, match=r"hfids/.* is a stream.*hfds/"):
            create_dataset(name.replace("hfds", "hfids", 1))
        with pytest.raises(ValueError, match=r"holds images; clips come from"):
            create_clip_dataset(name)

    def test_workers_read_the_same(self, tmp_path):
        name = self.write(tmp_path / "photos")
        data = create_dataset(name.replace("hfds", "HFDS"), levels=["shape", "digit"])
        again = pickle.loads(pickle.dumps(data))
        for i in (7, 0):
            assert torch.equal(again[i][0], data[i][0])
        loader = create_loader(data, 4, num_workers=2)
        images = torch.cat([batch[0] for batch in loader])
        assert torch.equal(images[:, 0, 0, 0].mul(255).round(), 10.0 * torch.arange(8))
        assert data.images.identity([0, 1]) != data.images.identity([0, 2])


class TestShards:
    def write(self, path, rows=ROWS, first=0, fields=None, ending="png"):
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for i, (shape, digit) in enumerate(rows, start=first):
                content = {
                    "shape": SHAPES[shape] if shape >= 0 else None,
                    "digit": DIGITS[digit] if digit >= 0 else -1,
                    "number": digit,
                }
                content = content if fields is None else fields
                members = {ending: png(10 * i), "json": json.dumps(content).encode()}
                for kind, data in members.items():
                    info = tarfile.TarInfo(f"{i:04d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return path

    def test_every_level_by_name(self, tmp_path):
        self.write(tmp_path / "s/train-000.tar", ROWS[:4])
        self.write(tmp_path / "s/train-001.tar", ROWS[4:], first=4)
        for name in (tmp_path / "s", tmp_path / "s/train-*.tar"):
            data = create_dataset(f"wds/{name}", levels=["shape", "digit"])
            assert named(data) == EXPECTED
            assert [int(data.images[i][0, 0, 0]) for i in (7, 0, 4, -1)] == [70, 0, 40, 70]
        assert data.images.identity([0, 4]) != data.images.identity([0, 5])

    def test_images_and_numbers_are_those_that_timm_reads(self, tmp_path):
        pytest.importorskip("webdataset")
        self.write(tmp_path / "s/train-000.tar", ROWS[:4])
        self.write(tmp_path / "s/train-001.tar", ROWS[4:7], first=4)
        theirs = timm.data.create_dataset(
            "wds/",
            root=str(tmp_path / "s"),
            split="train-{000..001}.tar|7",
            target_key="number",
        )
        name = f"wds/{tmp_path}/s/train-{{000..001}}.tar"
        ours = create_dataset(name, levels=["number"], path_column="png")
        pairs = list(theirs)
        assert len(pairs) == len(ours) == 7
        for i, (image, target) in enumerate(pairs):
            np.testing.assert_array_equal(ours.images[i], np.asarray(image))
            assert named(ours)[i] == [str(target)]

    def test_splits(self, tmp_path):
        self.write(tmp_path / "s/train-000.tar")
        self.write(tmp_path / "s/val-000.tar", ROWS[2:5])
        parts = create_splits(f"wds/{tmp_path}/s", levels=["shape", "digit"])
        assert [part and len(part) for part in parts] == [8, 3, None]
        assert named(parts[1]) == EXPECTED[2:5]
        # timm's own list of shards wins over their names
        info = {"splits": {"train": {"filenames": ["val-000.tar"]}}}
        (tmp_path / "s/info.json").write_text(json.dumps(info))
        data = create_dataset(f"wds/{tmp_path}/s", levels=["shape", "digit"])
        assert named(data) == EXPECTED[2:5]

    def test_classes_beside_the_images(self, tmp_path):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as tar:
            for i, label in enumerate([b"1", b"0\n", b"-1"]):
                for kind, data in {"jpg": png(i), "cls": label, "txt": b"caption"}.items():
                    info = tarfile.TarInfo(f"x/{i}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        data = create_dataset(f"wds/{path}")
        assert named(data) == [["1"], ["0"], [""]]

    def test_faults_are_named(self, tmp_path):
        path = self.write(tmp_path / "s/train-000.tar")
        with pytest.raises(ValueError, match="no column 'form'"):
            create_dataset(f"wds/{path}", levels=["form"])
        with pytest.raises(ValueError, match="has no images 'jpg'"):
            create_dataset(f"wds/{path}", path_column="jpg")
        with pytest.raises(FileNotFoundError, match=r"no shards .*val-\*.tar"):
            create_dataset(f"wds/{tmp_path}/s/val-*.tar")
        with pytest.raises(ValueError, match="not on this machine"):
            create_dataset("wds/https://a.example/train-000.tar")
        with pytest.raises(ValueError, match=r"tfds/mnist is a stream.*hfds/FOLDER"):
            create_dataset("tfds/mnist")
        self.write(tmp_path / "s/extra.tar")
        with pytest.raises(ValueError, match="extra.tar is named after no split"):
            create_dataset(f"wds/{tmp_path}/s")

    def test_a_contradiction_is_refused_with_its_row(self, tmp_path):
        path = self.write(tmp_path / "a.tar", [(0, 0), (1, 0)])
        tree = Taxonomy(["straight/one", "round/zero"])
        with pytest.raises(ValueError, match="row 1 of wds/.*no class fits"):
            create_dataset(f"wds/{path}", taxonomy=tree, levels=["shape", "digit"])
