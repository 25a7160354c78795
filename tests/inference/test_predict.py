"""``predict``.

The same numbers as the training pipeline's validation, whatever an image comes as.
"""

import os
import tarfile
from itertools import takewhile

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches import Taxonomy, create_branch_model, save_model
from timm_branches.data import create_dataset, create_loader, create_transform
from timm_branches.inference.predict import predict

TREE = Taxonomy(
    ["animal/pet/cat", "animal/pet/dog", "animal/wild/fox", "thing/ship/sail", "thing/car/van"],
    levels=["coarse", "middle", "fine"],
)
UNEVEN = Taxonomy(["animal/pet/cat", "animal/pet/dog", "animal/fox", "ship"])
LOOK = {
    "crop_pct": 0.8,
    "interpolation": "bicubic",
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.3, 0.25),
}


def make(taxonomy=None, num_classes=None, taps=(3, 4, 5), **kwargs):
    """A small model whose answers differ from image to image, with preprocessing of its own."""
    torch.manual_seed(0)
    model = create_branch_model(
        "test_resnet",
        taps=list(taps),
        taxonomy=taxonomy,
        num_classes=num_classes,
        img_size=32,
        **kwargs,
    )
    for name in (name for name, classes in model.num_classes.items() if classes):
        model.head(name).fc.weight.data *= 12
    model.pretrained_cfg.update(
        {k: v[: model.in_chans] if isinstance(v, tuple) else v for k, v in LOOK.items()}
    )
    return model.eval()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return save_model(make(TREE), tmp_path_factory.mktemp("model") / "model.safetensors")


def pixels(seed=0, size=(40, 52), channels=3):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, channels), dtype=np.uint8)
    return np.ascontiguousarray(np.kron(coarse, np.ones((8, 9, 1), np.uint8))[: size[0], : size[1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of several sizes in class folders."""
    root = tmp_path_factory.mktemp("photos")
    for i, leaf in enumerate([*TREE.leaves, *TREE.leaves[:2]]):
        path = root.joinpath(*leaf, f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i, (33 + i, 40 - i))).save(path)
    return root


def logits_of(model, array):
    transform = create_transform(model.input_size, **{k: model.pretrained_cfg[k] for k in LOOK})
    with torch.no_grad():
        return [y[0] for y in model(transform(array)[None]).values()]


def same(record, other):
    return (record.labels, record.path, record.stopped) == (
        other.labels,
        other.path,
        other.stopped,
    ) and record.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_equals_the_validation_loader(model_file, folder):
    transform = create_transform((3, 32, 32), **LOOK)
    data = create_dataset(folder, taxonomy=TREE, transform=transform)
    model = make(TREE)
    with torch.no_grad():
        batches = [model(x).values() for x, _ in create_loader(data, 3)]
    expected = [torch.cat(level).softmax(-1).max(-1) for level in zip(*batches, strict=True)]
    records = list(predict(model_file, folder, decoder="independent", device="cpu"))
    assert len(records) == len(data) == 7
    assert [list(r.labels) for r in records] == torch.stack(
        [e.indices for e in expected], 1
    ).tolist()
    assert len({r.labels for r in records}) > 1, "a model that always says the same proves nothing"
    probabilities = torch.tensor([r.probabilities for r in records])
    torch.testing.assert_close(probabilities, torch.stack([e.values for e in expected], 1))
    assert [r.path for r in records] == [
        tuple(TREE.classes[d][k] for d, k in enumerate(r.labels)) for r in records
    ]
    names = [os.path.relpath(r.file, folder) for r in records]
    assert names == sorted(names)


def test_default_is_the_best_path(model_file, folder):
    model = make(TREE)
    for record in predict(model_file, folder):
        levels = [
            y.softmax(-1).tolist() for y in logits_of(model, np.asarray(Image.open(record.file)))
        ]
        table = TREE.leaf_table.tolist()
        product = [np.prod([p[k] for p, k in zip(levels, row, strict=True)]) for row in table]
        best = table[int(np.argmax(product))]
        assert record.labels == tuple(best)
        for depth, p in enumerate(record.probabilities):
            below = sum(
                q for q, row in zip(product, table, strict=True) if row[depth] == best[depth]
            )
            assert p == pytest.approx(below / sum(product), abs=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_threshold(model_file, folder, share):
    whole = list(predict(model_file, folder))
    # among the probabilities that there are; 0 cuts nothing, 1 everything
    known = sorted(p for record in whole for p in record.probabilities[1:])
    threshold = share if share in (0.0, 1.0) else known[int(share * len(known))]
    cut = list(predict(model_file, folder, threshold=threshold))
    for before, after in zip(whole, cut, strict=True):
        kept = len(list(takewhile(lambda p: p >= threshold, before.probabilities)))
        assert after.labels == before.labels[:kept]
        assert after.path == before.path[:kept]
        assert after.probabilities == before.probabilities[:kept]
        assert after.stopped == (kept < 3)
        assert not before.stopped
    depths = {len(r.labels) for r in cut}
    assert depths == {0.0: {3}, 1.0: {0}}.get(threshold, depths)
    assert share in (0.0, 1.0) or len(depths) > 1, "every path was cut alike"


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_flat_model_with_a_tree(folder, threshold, tmp_path):
    UNEVEN.save_json(tmp_path / "tree.json")
    model = make(num_classes=4, taps=[5], names=["leaf"])
    stopped = 0
    for record in predict(model, folder, taxonomy=tmp_path / "tree.json", threshold=threshold):
        p = logits_of(model, np.asarray(Image.open(record.file)))[0].softmax(-1).tolist()
        leaf = int(np.argmax(p))
        path = UNEVEN.leaves[leaf]
        chances = [
            sum(
                q
                for q, other in zip(p, UNEVEN.leaves, strict=True)
                if other[: d + 1] == path[: d + 1]
            )
            for d in range(len(path))
        ]
        kept = [q for q in chances if q >= (threshold or 0)]
        assert record.path == path[: len(kept)]
        assert record.probabilities == pytest.approx(kept, abs=1e-5)
        assert record.stopped == (len(kept) < len(path))  # a leaf higher up is an end, not a stop
        stopped += record.stopped
    assert bool(stopped) == (threshold is not None)


def test_tree_given_for_a_model_with_its_levels(folder):
    given = predict(make(num_classes=list(TREE.num_classes)), folder, taxonomy=TREE)
    assert given.levels == ("coarse", "middle", "fine")
    assert list(given) == list(predict(make(TREE), folder))
    assert list(predict(make(TREE), folder, taxonomy=TREE)) == list(given)


@pytest.mark.parametrize("more", [[], ["thing/car/bus", "animal/pet/ant"]])
def test_tree_in_another_order_numbers_the_same_answers(folder, more):
    """Names stay as they are; numbers are looked up by name in the tree given."""
    paths = ["/".join(leaf) for leaf in TREE.leaves]
    given = Taxonomy([*reversed(paths), *more], levels=TREE.levels)
    model = make(TREE)
    plain = list(predict(model, folder, top=2, threshold=0.3))
    other = list(predict(model, folder, taxonomy=given, top=2, threshold=0.3))
    assert [record.path for record in other] == [record.path for record in plain]
    moved = 0
    for before, after in zip(plain, other, strict=True):
        names = [given.classes[level][label] for level, label in enumerate(after.labels)]
        assert tuple(names) == after.path
        assert after.probabilities == before.probabilities
        moved += before.labels != after.labels
        for level, (left, right) in enumerate(
            zip(before.candidates, after.candidates, strict=True)
        ):
            named = [(TREE.classes[level][label], p) for label, p in left]
            assert named == [(given.classes[level][label], p) for label, p in right]
    assert moved


def test_tree_that_lacks_a_class_is_refused(folder):
    paths = ["/".join(leaf) for leaf in TREE.leaves]
    with pytest.raises(ValueError, match=r"'animal / pet / cat' is only in the model's own tree"):
        predict(make(TREE), folder, taxonomy=Taxonomy(paths[1:], levels=TREE.levels))
    moved = Taxonomy(["thing/pet/cat", *paths[1:]], levels=TREE.levels)
    with pytest.raises(ValueError, match="tree of its own"):
        predict(make(TREE), folder, taxonomy=moved)


@pytest.mark.parametrize("decoder", [None, "independent"])
def test_model_without_a_tree(folder, decoder):
    model = make(num_classes=[2, 7, 4])
    found = predict(model, folder, decoder=decoder)
    assert found.levels == ("stage3", "stage4", "stage5")
    for record in found:
        levels = [y.softmax(-1) for y in logits_of(model, np.asarray(Image.open(record.file)))]
        assert record.labels == tuple(int(y.argmax()) for y in levels)
        assert record.probabilities == pytest.approx([float(y.max()) for y in levels], abs=1e-5)
        assert record.path == ()


def test_candidates(folder):
    model = make(TREE)
    for record in predict(model, folder, top=2):
        levels = [
            y.softmax(-1).tolist() for y in logits_of(model, np.asarray(Image.open(record.file)))
        ]
        for p, label, candidates in zip(levels, record.labels, record.candidates, strict=True):
            best = sorted(range(len(p)), key=lambda k: -p[k])[:2]
            assert [k for k, _ in candidates] == best + [label] * (label not in best)
            assert [q for _, q in candidates] == pytest.approx(
                [p[k] for k, _ in candidates], abs=1e-5
            )


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (3, 2)])
def test_batches_and_workers_change_nothing(model_file, folder, batch_size, num_workers):
    whole = predict(model_file, folder)
    parts = predict(model_file, folder, batch_size=batch_size, num_workers=num_workers)
    assert [r.file for r in parts] == [r.file for r in whole]
    assert all(same(a, b) for a, b in zip(parts, whole, strict=True))


def test_images_are_read_when_their_turn_comes(model_file, tmp_path):
    for i in range(3):
        Image.fromarray(pixels(i)).save(tmp_path / f"{i}.png")
    records = iter(predict(model_file, tmp_path, batch_size=1, strict=False))
    assert next(records).error is None
    (tmp_path / "2.png").unlink()
    assert next(records).error is None
    assert "2.png" in next(records).error


def test_all_kinds_of_images(model_file, tmp_path):
    array = pixels(3)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    with tarfile.open(tmp_path / "some.tar.gz", "w:gz") as tar:
        tar.add(path, "in/a.png")
    chw = torch.from_numpy(array.transpose(2, 0, 1).copy())
    ready = create_transform((3, 32, 32), **LOOK)(array)
    images = [
        path,
        str(path),
        tmp_path,
        tmp_path / "some.tar.gz",
        array,
        chw,
        ready,
        Image.fromarray(array),
        np.dstack([array, array[:, :, :1]]),
        Image.open(path),
    ]
    found = predict(model_file, images)
    records = list(found)
    assert len(records) == len(found) == len(images)
    assert [r.file for r in records[:5]] == [
        *[str(path)] * 3,
        f"{tmp_path}/some.tar.gz:in/a.png",
        "image 4",
    ]
    assert all(same(r, records[0]) for r in records[1:])
    for alone in images:
        assert same(*predict(model_file, alone), records[0])
    for batch in (np.stack([array] * 2), torch.stack([chw] * 2), torch.stack([ready] * 2)):
        assert all(same(r, records[0]) for r in predict(model_file, batch))


GREY = pixels(5, channels=1)[:, :, 0]
RGB = pixels(6)


@pytest.mark.parametrize(
    ("name", "image", "seen"),
    [
        ("grey.png", Image.fromarray(GREY), np.dstack([GREY] * 3)),
        ("16bit.png", Image.fromarray(GREY.astype(np.uint16) * 257), np.dstack([GREY] * 3)),
        ("alpha.png", Image.fromarray(np.dstack([RGB, GREY])), RGB),
        ("grey alpha.png", Image.fromarray(np.dstack([GREY, GREY])), np.dstack([GREY] * 3)),
        (
            "palette.png",
            Image.fromarray(RGB).quantize(200),
            np.asarray(Image.fromarray(RGB).quantize(200).convert("RGB")),
        ),
        ("one pixel.png", Image.fromarray(RGB[:1, :1]), RGB[:1, :1]),
        ("column.png", Image.fromarray(RGB[:, :1]), RGB[:, :1]),
        ("upper.PNG", Image.fromarray(RGB), RGB),
    ],
)
def test_odd_images(model_file, tmp_path, name, image, seen):
    image.save(tmp_path / name)
    (expected,) = predict(model_file, seen)
    assert same(*predict(model_file, tmp_path), expected)
    assert same(*predict(model_file, image), expected)


def test_upright(model_file, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    (expected,) = predict(model_file, np.rot90(RGB, -1))
    assert same(*predict(model_file, tmp_path), expected)
    assert same(*predict(model_file, Image.open(tmp_path / "turned.png")), expected)


def test_animation_is_its_first_frame(model_file, tmp_path):
    frames = [Image.fromarray(pixels(i)).quantize(200) for i in range(2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (expected,) = predict(model_file, np.asarray(frames[0].convert("RGB")))
    assert same(*predict(model_file, tmp_path / "a.gif"), expected)


def test_grey_model(tmp_path):
    model = make(TREE, in_chans=1)
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([GREY] * 3)).save(tmp_path / "rgb.png")
    expected = [float(y.softmax(-1).max()) for y in logits_of(model, GREY[:, :, None])]
    for record in predict(model, [tmp_path, GREY, Image.fromarray(GREY)], decoder="independent"):
        assert record.probabilities == pytest.approx(expected, abs=1e-5)


def test_folder_is_searched(model_file, tmp_path):
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    for name in ("10.png", "2.png", "sub/a.png", "sub/.hidden/b.png", ".c.png"):
        Image.fromarray(RGB).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "sub" / "self").symlink_to(tmp_path / "sub")
    found = predict(model_file, tmp_path)
    assert [os.path.relpath(r.file, tmp_path) for r in found] == ["2.png", "10.png", "sub/a.png"]


def test_unreadable(model_file, tmp_path):
    good = tmp_path / "1.png"
    Image.fromarray(RGB).save(good)
    (tmp_path / "2.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "3.png").touch()
    Image.fromarray(RGB).save(tmp_path / "4.png")
    records = iter(predict(model_file, tmp_path))
    assert next(records).error is None
    with pytest.raises(ValueError, match="2.png"):
        next(records)
    (expected,) = predict(model_file, good)
    first, second, third, fourth = predict(model_file, tmp_path, strict=False, batch_size=2)
    assert same(first, expected)
    assert same(fourth, expected)
    assert fourth.file.endswith("4.png")
    for record, name in ((second, "2.png"), (third, "3.png")):
        assert record.file.endswith(name)
        assert name in record.error
        assert record.labels == record.path == ()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((5, 5)),
        np.zeros((5, 5, 3), np.uint16),
        np.zeros(5, np.uint8),
        torch.zeros(3, 5, 5),
        Image.new("F", (5, 5)),
    ],
)
def test_images_of_unknown_range_or_shape(model_file, image):
    with pytest.raises(ValueError, match="image 0: "):
        list(predict(model_file, [image]))


def test_mode_is_kept_and_does_not_matter(folder):
    model = make(TREE, drop_rate=0.5)
    expected = list(predict(model, folder))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    assert list(predict(model, folder)) == expected
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_half_precision_model(folder):
    model = make(TREE).bfloat16()
    transform = create_transform((3, 32, 32), **LOOK)
    for record in predict(model, folder, decoder="independent", batch_size=1):
        x = transform(np.asarray(Image.open(record.file)))[None].bfloat16()
        with torch.no_grad():
            expected = [float(y.float().softmax(-1).max()) for y in model(x).values()]
        assert record.probabilities == pytest.approx(expected, abs=1e-5)


def _damaged(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    return data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": []}, "no images"),
        ({"images": "empty"}, "no images"),
        ({"images": ["a.png", "none.png"]}, "none.png"),
        ({"images": "cut.tar"}, "cut.tar"),
        ({"model": "damaged.safetensors"}, "damaged"),
        ({"model": "none.safetensors"}, "none.safetensors"),
        ({"taxonomy": UNEVEN}, "tree of its own"),
        ({"decoder": "greedy"}, "best-path"),
        ({"threshold": 80}, "from 0 to 1"),
        ({"threshold": float("nan")}, "from 0 to 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"device": "gpu"}, "cpu, cuda"),
        ({"model": (2, 7, 4), "threshold": 0.5}, "needs a tree"),
        ({"model": (2, 7, 4), "decoder": "crm"}, "needs a tree"),
        ({"model": (2, 7, 4), "taxonomy": TREE}, "does not fit"),
        ({"model": (2, 7, 0)}, "without classes"),
    ],
)
def test_mistakes(model_file, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.tar").write_bytes(b"not a tar" * 100)
    (tmp_path / "damaged.safetensors").write_bytes(_damaged(model_file))
    Image.fromarray(RGB).save("a.png")
    arguments = {"model": model_file, "images": "a.png", **options}
    if isinstance(arguments["model"], tuple):
        arguments["model"] = make(num_classes=list(arguments["model"]))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        predict(**arguments)


def test_model_that_has_diverged(folder):
    model = make(TREE)
    model.head("fine").fc.bias.data[1] = float("nan")
    with pytest.raises(ValueError, match="'fine'.*not finite"):
        list(predict(model, folder))


def test_a_mask_beside_the_labels_is_left_out(folder):
    """The records are those of the same network without the decoder."""
    torch.manual_seed(0)
    both = create_branch_model(
        "test_resnet",
        taps=[3, 4, 5, (3, 5)],
        head=[*3 * ["pool"], "unet"],
        taxonomy=TREE,
        num_classes=[*3 * [None], 4],
    ).eval()
    alone = create_branch_model("test_resnet", taps=[3, 4, 5], head="pool", taxonomy=TREE).eval()
    alone.load_state_dict(both.state_dict(), strict=False)
    seen = []
    both.head("unet").register_forward_hook(lambda *args: seen.append(args))
    assert list(predict(both, folder)) == list(predict(alone, folder))
    assert not seen


@pytest.mark.parametrize("taxonomy", [None, TREE])
def test_a_mask_alone_is_refused(folder, taxonomy):
    model = create_branch_model(
        "test_resnet",
        taps=[(3, 5)],
        head="unet",
        taxonomy=taxonomy,
        num_classes=None if taxonomy else 4,
    )
    with pytest.raises(ValueError, match=r"every pixel.*tiled_inference"):
        predict(model, folder)


def test_not_an_image(model_file):
    with pytest.raises(TypeError, match="int"):
        predict(model_file, [3])
