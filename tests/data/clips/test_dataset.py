"""Datasets of clips.

Folders of frames, CSV, arrays; splits, transforms, and clips that cannot be read.
"""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from timm_branches.data import (
    ClipDataset,
    ClipSubset,
    FrameSampler,
    create_clip_dataset,
    create_clip_splits,
    create_transform,
    split_clips,
)
from timm_branches.taxonomy.taxonomy import Taxonomy


def save(folder, count=3, first=0, size=(6, 4)):
    """A folder of plain grey frames, width x height, frame k of the value `first` + k, without
    leading zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, (first + number,) * 3).save(folder / f"frame{number}.png")
    return folder


def greys(clip):
    return [round(value) for value in (clip.mean((1, 2, 3)) * 255).tolist()]


def video_like(count, channels=3, side=32, seed=0):
    """Clips whose frames all show the same noise, (count, T, H, W, C)."""
    noise = np.random.default_rng(seed).integers(0, 256, (1, 1, side, side, channels), np.uint8)
    return noise.repeat(count, 0).repeat(4, 1)


def test_folders_of_frames(tmp_path):
    save(tmp_path / "sport/run/clip10", 12, 100)
    save(tmp_path / "sport/run/clip2", 3, 50)
    save(tmp_path / "sport/jump/a", 3, 10)
    save(tmp_path / "rest/sleep/a", 1, 7)
    (tmp_path / "sport/run/clip2/notes.txt").write_text("no image")
    (tmp_path / "sport/run/clip2/._frame0.png").write_text("left by macOS")
    data = create_clip_dataset(tmp_path)
    assert data.taxonomy.leaves == (("rest", "sleep"), ("sport", "jump"), ("sport", "run"))
    assert data.labels.tolist() == [[0, 0], [1, 1], [1, 2], [1, 2]]
    # natural order: clip2 before clip10, frame2 before frame10
    assert [greys(clip) for clip, _ in data] == [
        [7],
        [10, 11, 12],
        [50, 51, 52],
        list(range(100, 112)),
    ]
    assert data[0][0].shape == (1, 3, 4, 6)
    assert create_clip_dataset(tmp_path, in_chans=1, num_frames=2)[3][0].shape == (2, 1, 4, 6)


def test_only_the_chosen_frames_are_read(tmp_path):
    folder = save(tmp_path / "run/1", 5)
    (folder / "frame0.png").write_text("broken, but not looked at")
    assert greys(create_clip_dataset(tmp_path, num_frames=1, strict=True)[0][0]) == [2]


def test_images_beside_clips_are_no_clip(tmp_path):
    save(tmp_path / "run/1")
    save(tmp_path / "run", 1)  # a preview
    (tmp_path / "jump/2").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"left out in .*: 'jump/2', 'run'$"):
        data = create_clip_dataset(tmp_path)
    assert data.taxonomy.leaf_names == ("run",)
    assert len(data) == 1


def test_folders_without_clips(tmp_path):
    with pytest.raises(ValueError, match=r"no clips in .*jump/1\.mp4"):
        create_clip_dataset(tmp_path)
    save(tmp_path)
    with pytest.raises(ValueError, match="no clips in"):
        create_clip_dataset(tmp_path)
    images = save(tmp_path / "top/images")
    with pytest.raises(ValueError, match="hold images directly"):
        create_clip_dataset(tmp_path / "top")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a file"):
        create_clip_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"folder of class folders or a \.csv"):
        create_clip_dataset(images / "frame0.png")


def test_a_taxonomy_over_flat_folders(tmp_path):
    for name in ("run", "sport", "sleep"):
        save(tmp_path / name / "1")
    tree = Taxonomy(["sport/jump", "sport/run", "rest/sleep"])
    data = create_clip_dataset(tmp_path, taxonomy=tree)
    assert data.taxonomy is tree
    assert data.labels.tolist() == [[0, 1], [1, 2], [0, -1]]


def test_splits_of_folders(tmp_path):
    for split, names in {"train": "abc", "validation": "ac", "Test": "c"}.items():
        for name in names:
            save(tmp_path / split / name / "1", 3)
    for split, labels in {
        "train": [0, 1, 2],
        "val": [0, 2],
        "test": [2],
        "trainval": [0, 1, 2, 0, 2],
    }.items():
        assert sorted(create_clip_dataset(tmp_path, split).labels.flatten().tolist()) == sorted(
            labels
        )
    marks = {"transform": lambda clip: torch.ones(1), "eval_transform": lambda clip: torch.zeros(1)}
    parts = create_clip_splits(tmp_path, num_frames=2, sampling="dense", **marks)
    assert [len(part) for part in parts] == [3, 2, 1]
    assert [part.sampler for part in parts] == [
        FrameSampler(2, "dense", is_training=t) for t in (True, False, False)
    ]
    assert [part[0][0].item() for part in parts] == [1, 0, 0]
    with pytest.raises(ValueError, match="no split 'some'"):
        create_clip_dataset(tmp_path, "some")


def test_splits_where_there_are_none(tmp_path):
    for name, count in {"a": 10, "b": 20}.items():
        for number in range(count):
            save(tmp_path / name / str(number), 1, number)
    train, val, test = create_clip_splits(tmp_path, val_fraction=0.2)
    assert test is None
    assert train.labels.flatten().bincount().tolist() == [8, 16]
    assert val.labels.flatten().bincount().tolist() == [2, 4]
    assert sorted(train.sample_ids.tolist() + val.sample_ids.tolist()) == list(range(30))
    again = create_clip_splits(tmp_path, val_fraction=0.2)[1]
    assert again.sample_ids.tolist() == val.sample_ids.tolist()
    with pytest.raises(ValueError, match="no 'test' split, only train"):
        create_clip_dataset(tmp_path, "test")
    with pytest.raises(ValueError, match="is_training has no effect"):
        create_clip_splits(tmp_path, is_training=True)
    with pytest.raises(ValueError, match="leaves an empty part"):
        create_clip_splits(tmp_path, val_fraction=0)


def test_csv(tmp_path):
    for name in "abcd":
        save(tmp_path / "clips" / name, 6, 10 * "abcd".index(name))
    path = tmp_path / "list.csv"
    path.write_text(
        "path,coarse,fine,split,start,end\n"
        "clips/a,sport,run,train,,\n"
        "clips/b,sport,,train,2,\n"
        "clips/c,rest,sleep,val,,3\n"
        "clips/d,,,test,1,5\n"
        "clips/d,sport,run,valid,5,6\n",
        encoding="utf-8-sig",
    )
    data = create_clip_dataset(path, "all")
    assert data.taxonomy.levels == ("coarse", "fine")
    assert data.labels.tolist() == [[1, 1], [1, -1], [0, 0], [-1, -1], [1, 1]]
    expected = [[0, 1, 2, 3, 4, 5], [12, 13, 14, 15], [20, 21, 22], [31, 32, 33, 34], [35]]
    assert [greys(clip) for clip, _ in data] == expected
    assert [greys(clip) for clip, _ in create_clip_dataset(path, "val")] == [
        expected[2],
        expected[4],
    ]
    assert [len(part) for part in create_clip_splits(path)] == [2, 2, 1]
    tree = Taxonomy(["sport/jump", "sport/run", "rest/sleep"], levels=["coarse", "fine"])
    assert create_clip_dataset(path, taxonomy=tree).labels.tolist() == [[0, 1], [0, -1]]
    with pytest.raises(ValueError, match="level columns"):
        create_clip_dataset(path, taxonomy=Taxonomy(["a/b/c"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label\na\n", "needed are a column 'path'"),
        ("path,start,end\na,0,1\n", "one column per level"),
        (
            "path,label,start\na,x,1.5\n",
            r"line 2: start='1\.5'.*no range of frames.*multiplied by the frame rate",
        ),
        ("path,label,start,end\na,x,0,4\nb,x,7,7\n", "line 3: start='7' and end='7' are no range"),
        ("path,label,end\na,x,-1\n", "line 2: .*no range"),
        ("path,label,split\na,x,nowhere\n", "'nowhere' in the column 'split' is no split"),
    ],
)
def test_csv_that_does_not_fit(tmp_path, text, message):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        create_clip_dataset(path)


def test_arrays():
    clips = np.random.default_rng(0).integers(0, 256, (3, 5, 8, 6), np.uint8)
    data = ClipDataset(clips, [1, 0, -1])
    clip, label = data[1]
    assert torch.equal(clip, torch.from_numpy(clips[1])[:, None] / 255)
    assert label.shape == ()
    assert label.dtype == torch.long
    assert data[-1][1] == -1
    with pytest.raises(IndexError):
        data[3]
    assert ClipDataset(clips, [1, 0, 1], in_chans=3)[0][0].shape == (5, 3, 8, 6)
    ragged = [clips[0], clips[1, :2, :, :, None].repeat(3, 3)]
    assert [tuple(clip.shape) for clip, _ in ClipDataset(ragged, [0, 1])] == [
        (5, 1, 8, 6),
        (2, 3, 8, 6),
    ]
    tree = Taxonomy(["a/x", "b/y"])
    assert ClipDataset(clips, tree.expand(torch.tensor([0, 1, 1])), tree)[2][1].tolist() == [1, 1]


def test_arrays_that_do_not_fit():
    clips = np.zeros((3, 5, 8, 6), np.uint8)
    with pytest.raises(ValueError, match="one row per image|labels must be"):
        ClipDataset(clips, [0, 1])
    with pytest.raises(ValueError, match=r"taxonomy\.expand"):
        ClipDataset(clips, [0, 1, 1], Taxonomy(["a", "b"]))
    with pytest.raises(ValueError, match="highest class indices"):
        ClipDataset(clips, [[0], [1], [2]], Taxonomy(["a", "b"]))
    with pytest.raises(ValueError, match=r"clip 1 is uint8 of shape \(0, 8, 6\)"):
        ClipDataset([clips[0], clips[1, :0]], [0, 1])
    with pytest.raises(ValueError, match=r"clip 0 is float64"):
        ClipDataset(clips / 255, [0, 1, 1])
    with pytest.raises(ValueError, match=r"clip 0 is list"):
        ClipDataset([[1, 2]], [0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", ["none", "light", "cifar", "imagenet", "own"])
def test_all_frames_of_a_clip_are_augmented_alike(augment, channels):
    if augment == "own":
        A = pytest.importorskip("albumentations")
        shift = A.Affine(rotate=(-30, 30), scale=(0.8, 1.2), p=0.8)
        augment = A.Compose(
            [
                A.OneOf([shift, A.GaussianBlur(p=1)]),
                A.RandomBrightnessContrast(p=0.7),
                A.GaussNoise(p=0.7),
            ]
        )
    transform = create_transform((channels, 32, 32), True, augment)
    data = ClipDataset(video_like(3, channels), [0, 0, 0], transform=transform)
    plain = create_transform((channels, 32, 32))(video_like(1, channels)[0, 0])
    seen = []
    for epoch in range(4):
        data.set_epoch(epoch)
        for clip, _ in data:
            assert clip.shape == (4, channels, 32, 32)
            assert all(torch.equal(frame, clip[0]) for frame in clip)
            seen.append(clip[0])
    if augment == "none":
        assert all(torch.equal(frame, plain) for frame in seen)
    else:
        # of 12 clips; two may get the same shift
        assert len({frame.numpy().tobytes() for frame in seen}) > 8


def test_same_parameters_as_albumentations_images_target():
    clip = np.random.default_rng(0).integers(0, 256, (1, 6, 48, 48, 3), np.uint8)
    transform = create_transform((3, 48, 48), True, "imagenet", mean=(0.0,) * 3, std=(1.0,) * 3)
    ours = ClipDataset(clip, [0], transform=transform)[0][0]
    transform.random.seed((0, 0, 0))
    theirs = transform.compose(images=clip[0])["images"]
    torch.testing.assert_close(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2) / 255)


def test_another_callable_gets_the_whole_clip():
    clips = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 6, 3), np.uint8)
    data = ClipDataset(clips, [0, 1], transform=lambda clip: torch.from_numpy(clip[::-1].copy()))
    assert torch.equal(data[1][0], torch.from_numpy(clips[1, ::-1].copy()))


def test_a_subset_reads_the_same_as_the_whole():
    clips = np.random.default_rng(0).integers(0, 256, (9, 20, 16, 16, 1), np.uint8)
    transform = create_transform((1, 16, 16), True, "light")
    data = ClipDataset(
        clips, range(9), transform=transform, sampler=FrameSampler(4, is_training=True)
    )
    data.set_seed(3)
    data.set_epoch(4)
    part = ClipSubset(ClipSubset(data, [8, 5, 7]), [1, 2])
    assert torch.equal(part[1][0], data[7][0])
    assert part[1][1] == 7
    part.set_epoch(5)
    assert data.epoch == 4
    assert not torch.equal(part[1][0], data[7][0])
    assert data.limit(4).labels.tolist() == sorted(data.limit(4).labels.tolist())
    assert len(data.limit(4)) == 4
    assert len(data.limit(40)) == 9
    train, val = split_clips(data, 0.3)
    assert (train.sampler.is_training, val.sampler.is_training, len(train), len(val)) == (
        True,
        False,
        6,
        3,
    )
    assert data.sampler.is_training


@pytest.fixture
def broken(tmp_path):
    """Six clips of one class, of which 1, 2 and 5 cannot be read."""
    for number in range(5):
        save(tmp_path / f"clips/{number}", 3, 10 * number)
    (tmp_path / "clips/1/frame1.png").write_text("no image")
    for frame in (tmp_path / "clips/2").iterdir():
        frame.unlink()
    (tmp_path / "clips/5").touch()
    path = tmp_path / "list.csv"
    path.write_text("path,label\n" + "".join(f"clips/{number},c{number}\n" for number in range(6)))
    return path


def test_a_broken_clip_is_replaced_by_the_next(broken):
    data = create_clip_dataset(broken)
    assert data.errors == 0
    with (
        pytest.warns(
            UserWarning, match=r"cannot read the image .*clips.1.frame1\.png.*takes its place"
        ),
        pytest.warns(UserWarning, match="holds no image"),
    ):
        first = data[1]
    assert data.errors == 2  # 2, its successor, as well
    with pytest.warns(UserWarning, match=r"cannot open the video .*clips.5"):
        last = data[5]
    assert (greys(first[0]), first[1].tolist()) == ([30, 31, 32], [3])
    assert (greys(last[0]), last[1].tolist()) == ([0, 1, 2], [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each file is named once
        assert [label.item() for _, label in data] == [0, 3, 3, 3, 4, 0]
    assert data.errors == 3


def test_a_replacement_stays_in_its_subset(broken):
    data = create_clip_dataset(broken)
    part = ClipSubset(data, [1, 4])
    with pytest.warns(UserWarning, match="frame1"):
        assert [label.item() for _, label in part] == [4, 4]
    assert (part.errors, data.errors, ClipSubset(data, [0, 4]).errors) == (1, 1, 0)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (1, r"cannot read the image .*clips.1.frame1\.png"),
        (2, r"the folder .*clips.2 holds no image"),
        (5, r"cannot open the video .*clips.5"),
    ],
)
def test_strict(broken, index, message):
    with pytest.raises(ValueError, match=message):
        create_clip_dataset(broken, strict=True)[index]


def test_errors_are_counted_over_all_workers(broken):
    data = create_clip_dataset(broken)
    labels = [label.item() for _, label in DataLoader(data, None, num_workers=2)]
    assert labels == [0, 3, 3, 3, 4, 0]
    assert data.errors == 3


def test_errors_are_counted_over_spawned_workers(broken):
    data = create_clip_dataset(broken)
    labels = [
        label.item()
        for _, label in DataLoader(data, None, num_workers=1, multiprocessing_context="spawn")
    ]
    assert labels == [0, 3, 3, 3, 4, 0]
    assert data.errors == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_clips_broken(broken):
    data = ClipSubset(create_clip_dataset(broken), [1, 2, 5])
    with pytest.raises(
        RuntimeError, match=r"none of the 3 clips can be read; the first error was: .*clips.2"
    ):
        data[1]


def test_frames_of_different_sizes(tmp_path):
    folder = save(tmp_path / "run/1", 3, size=(6, 4))
    Image.new("RGB", (8, 4)).save(folder / "frame10.png")
    data = create_clip_dataset(tmp_path, strict=True)
    with pytest.raises(
        ValueError,
        match=r"run.1 differ in size: frame0\.png is 6 x 4 pixels, frame10\.png is 8 x 4",
    ):
        data[0]


def test_a_range_of_frames_beyond_the_folder(tmp_path):
    save(tmp_path / "clip", 3)
    path = tmp_path / "list.csv"
    path.write_text("path,label,start,end\nclip,a,1,4\n")
    with pytest.raises(ValueError, match=r"the frames 1 to 4 of .*clip: it holds 3 images"):
        create_clip_dataset(path, strict=True)[0]


def test_a_mistake_in_the_transform_is_no_broken_clip(tmp_path):
    save(tmp_path / "run/1")
    data = create_clip_dataset(tmp_path, transform=create_transform((1, 8, 8)))
    with pytest.raises(ValueError, match="set in_chans of the dataset"):
        data[0]
    assert data.errors == 0
    with pytest.raises(ValueError, match="in_chans must be 3"):
        create_clip_dataset(tmp_path, in_chans=4)


def test_importing_and_reading_frames_needs_no_pyav(tmp_path):
    save(tmp_path / "run/1")
    code = (
        "import sys\nsys.modules['av'] = None\nfrom timm_branches.data import create_clip_dataset\n"
        f"print(len(create_clip_dataset({str(tmp_path)!r})[0][0]), 'albumentations' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["3", "False"]
