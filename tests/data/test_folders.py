"""Folders of class folders as people have them: recognised or refused, never a level by mistake."""

import pytest
from PIL import Image

from timm_branches import Taxonomy
from timm_branches.data import create_clip_dataset, create_dataset, create_splits


def fill(root, *paths):
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".png", ".jpg", ".jfif", ".gif", ".bmp"):
            Image.new("RGB", (2, 2), (number, 0, 0)).save(file, "PNG")
        else:
            file.write_text("no image")


def leaves(data):
    return ["/".join(leaf) for leaf in data.taxonomy.leaves]


class TestSplits:
    @pytest.mark.parametrize(
        "names",
        [
            ("train", "val", "test"),
            ("Training", "Validation", "Testing"),
            ("training", "validation", "evaluation"),
            ("train_mini", "val", "holdout"),
            ("TRAIN", "dev", "Test"),
            ("train2017", "val2017", "test2017"),
            ("seg_train", "seg_dev", "seg_test"),
            ("train-images", "valid-images", "hold-out"),
            ("training set", "validation set", "test set"),
        ],
    )
    def test_recognised(self, tmp_path, names):
        for count, name in enumerate(names, start=1):
            fill(tmp_path / name, *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(count)))
        parts = create_splits(tmp_path)
        assert [len(part) for part in parts] == [2, 4, 6]
        assert leaves(parts[0]) == ["cat", "dog"]

    def test_two_of_them(self, tmp_path):
        fill(tmp_path, "Training/cat/1.png", "Training/dog/1.png", "Testing/cat/1.png")
        assert leaves(create_dataset(tmp_path)) == ["cat", "dog"]

    def test_below_the_classes(self, tmp_path):
        fill(tmp_path, "cat/train/1.png", "cat/test/1.png", "dog/train/1.png", "dog/test/2.png")
        train, test = create_dataset(tmp_path), create_dataset(tmp_path, "test")
        assert (len(train), len(test), leaves(train)) == (2, 2, ["cat", "dog"])

    def test_a_vehicle(self, tmp_path):
        fill(tmp_path, "train/1.png", "car/1.png", "bus/1.png")
        assert leaves(create_dataset(tmp_path)) == ["bus", "car", "train"]

    def test_unlabelled_beside(self, tmp_path):
        fill(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "unlabeled/1.png")
        data = create_dataset(tmp_path)
        assert leaves(data) == ["cat", "dog"]
        assert data.summary.left_out == {"images in unlabeled": 1}

    def test_others_beside(self, tmp_path):
        fill(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "extra/cat/1.png")
        with pytest.raises(ValueError, match=r"splits \(test, train\) beside others \('extra'\)"):
            create_dataset(tmp_path)


class TestWrappers:
    @pytest.mark.parametrize("wrapper", ["images", "dataset/photos", "a/b/c"])
    def test_one_too_many(self, tmp_path, wrapper):
        fill(tmp_path / wrapper, "cat/1.png", "dog/1.png", "dog/2.png")
        data = create_dataset(tmp_path)
        assert leaves(data) == ["cat", "dog"]
        assert any("lies on top of all others" in text for text in data.summary.warnings)

    def test_on_top_of_splits(self, tmp_path):
        fill(tmp_path / "my data", "train/cat/1.png", "train/dog/1.png", "test/dog/1.png")
        assert leaves(create_dataset(tmp_path, "test")) == ["cat", "dog"]

    def test_a_class_that_the_tree_knows(self, tmp_path):
        """A level of one class, if the tree has it."""
        fill(tmp_path / "Animalia", "cat/1.png", "dog/1.png")
        tree = Taxonomy(["Animalia/cat", "Animalia/dog"])
        assert create_dataset(tmp_path, taxonomy=tree).labels.tolist() == [[0, 0], [0, 1]]


class TestWhatIsLeftOut:
    def test_by_ending(self, tmp_path):
        fill(
            tmp_path,
            "cat/1.png",
            "cat/2.jfif",
            "dog/1.gif",
            "dog/a.txt",
            "dog/b.txt",
            "readme",
            "cat/.hidden.png",
            "__MACOSX/cat/1.png",
            "cat/Thumbs.db",
            "cat/.DS_Store",
        )
        data = create_dataset(tmp_path)
        assert len(data) == 3
        assert data.summary.left_out == {"files .txt": 2, "files without an ending": 1}

    def test_a_class_does_not_vanish(self, tmp_path):
        fill(tmp_path, "cat/1.png", "dog/1.cr2", "dog/2.cr2", "emu/1.png")
        (tmp_path / "fox").mkdir()
        text = " ".join(create_dataset(tmp_path).summary.warnings)
        assert "dog has nothing to read (files .cr2)" in text
        assert "fox has nothing to read (it is empty)" in text

    def test_nothing_to_read(self, tmp_path):
        fill(tmp_path, "cat/1.cr2", "dog/1.cr2")
        with pytest.raises(
            ValueError, match=r"no images .* What is there cannot be read: 2 files .cr2"
        ):
            create_dataset(tmp_path)


class TestClips:
    def test_frames_directly_in_class_folders(self, tmp_path):
        fill(tmp_path, "run/0.png", "run/1.png", "walk/0.png")
        with pytest.raises(ValueError, match="hold images directly.*one folder deeper"):
            create_clip_dataset(tmp_path)

    def test_in_splits_too(self, tmp_path):
        fill(tmp_path, "train/run/0.png", "train/walk/1.png", "test/run/0.png")
        with pytest.raises(ValueError, match="hold images directly"):
            create_clip_dataset(tmp_path)

    def test_split_names(self, tmp_path):
        fill(tmp_path, "Training/run/a/0.png", "Training/walk/b/0.png", "evaluation/run/c/0.png")
        assert len(create_clip_dataset(tmp_path)) == 2
        assert len(create_clip_dataset(tmp_path, "test")) == 1
