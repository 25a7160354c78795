"""Features of a frozen backbone on the disk.

The same training as on images, and never a stale one.
"""

import copy
import json
import os
import pickle
import subprocess
import time
import warnings
from pathlib import Path

import albumentations
import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from torch import multiprocessing

from timm_branches import PoolHead, create_branch_model, load_model, save_model
from timm_branches.data import (
    ClipDataset,
    FrameSampler,
    HierarchicalDataset,
    HierarchicalSubset,
    collate_clips,
    create_clip_dataset,
    create_clip_loader,
    create_dataset,
    create_loader,
    create_transform,
)
from timm_branches.data.clips.video import ClipError
from timm_branches.features import (
    FeatureDataset,
    HeadsOnly,
    cache_features,
)
from timm_branches.features import (
    shards as feature_files,
)
from timm_branches.heads import FlattenHead, GRUHead, LSTMHead
from timm_branches.task import BranchTask
from timm_branches.train import FitConfig, fit

SIDE = 32


def make_model(taps=(4, 5), head="pool", num_classes=(2, 3), name="test_resnet", seed=0, **kwargs):
    torch.manual_seed(seed)
    model = create_branch_model(
        name,
        taps=taps,
        head=head,
        num_classes=list(num_classes),
        in_chans=1,
        img_size=SIDE,
        names=["coarse", "fine"][-len(taps) :],
        **kwargs,
    )
    torch.manual_seed(seed)
    for module in model.backbone.modules():  # statistics as after a training
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    return model.freeze()


def make_data(size=12, augment="none", seed=0):
    rng = np.random.default_rng(seed)
    labels = torch.stack([torch.arange(size) % 2, torch.arange(size) % 3], 1)
    return HierarchicalDataset(
        rng.integers(0, 256, (size, SIDE, SIDE, 1), np.uint8),
        labels,
        transform=create_transform((1, SIDE, SIDE), augment != "none", augment),
    )


def make_clips(size=7, is_training=False):
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 256, (2 + i % 4, SIDE, SIDE, 1), np.uint8) for i in range(size)]
    return ClipDataset(
        clips,
        torch.stack([torch.arange(size) % 2, torch.arange(size) % 3], 1),
        transform=create_transform((1, SIDE, SIDE), is_training, "light"),
        sampler=FrameSampler(4, is_training=is_training),
    )


def passes(model):
    """A list that grows by the number of images in each pass of the backbone."""
    seen = []
    model.backbone.conv1.register_forward_hook(lambda module, args, y: seen.append(len(args[0])))
    return seen


def rows(features, epochs=(0,)):
    result = []
    for epoch in epochs:
        features.set_epoch(epoch)
        result += [features[i][0] for i in range(len(features))]
    return torch.stack(result)


def train(model, dataset, epochs=(0,), collate=None, **kwargs):
    """Losses by step of heads and weights at the end, by a plain loop."""
    task = BranchTask(model)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    make = create_loader if collate is None else create_clip_loader
    loader = make(dataset, 4, is_training=True, seed=3, **kwargs)
    losses = []
    task.train()
    for epoch in epochs:
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = task(images, labels)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


HEADS = {
    "pool": "pool",
    "hidden": PoolHead(hidden=(8,)),
    "max": PoolHead(pool_type="max"),
    "avgmax": PoolHead(pool_type="avgmax"),
    "catavgmax": PoolHead(pool_type="catavgmax"),
    "flatten": FlattenHead(hidden=(8,), drop_rate=0.0),
    "mixed": ["pool", FlattenHead(hidden=(8,), drop_rate=0.0)],
}


@pytest.mark.parametrize(
    ("head", "taps"),
    [
        *((head, (4, 5)) for head in HEADS),
        ("pool", (5, 5)),
        ("mixed", (5, 5)),
        ("mixed", ("layer4.0.conv1", 3)),
    ],
)
def test_training_is_the_same(head, taps, tmp_path):
    whole, cached = make_model(taps, HEADS[head]), make_model(taps, HEADS[head])
    data = make_data(14)
    expected = train(whole, HierarchicalSubset(data, range(14)))
    features = cache_features(cached, data, tmp_path, batch_size=5)
    frozen = copy.deepcopy(cached.backbone.state_dict())
    before = passes(cached)
    losses = train(HeadsOnly(cached), features)
    assert before == []
    assert len(losses) == 3
    assert losses == pytest.approx(expected, abs=1e-5)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    assert all(
        torch.equal(value, frozen[key]) for key, value in cached.backbone.state_dict().items()
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_on_views_is_the_same(num_workers, tmp_path):
    whole, cached = make_model(), make_model()
    data = make_data(augment="cifar")
    data.set_seed(3)
    features = cache_features(cached, data, tmp_path, views=2, num_workers=num_workers)
    assert data.epoch == 0
    losses = train(HeadsOnly(cached), features, epochs=(0, 1, 4, 5), num_workers=num_workers)
    expected = []
    # the order belongs to epochs 4 and 5, the views to 0 and 1
    for epoch, view in ((0, 0), (1, 1), (4, 0), (5, 1)):
        loader = create_loader(
            HierarchicalSubset(data, range(len(data))), 4, is_training=True, seed=3
        )
        loader.set_epoch(epoch)
        order = list(loader.sampler)
        data.set_epoch(view)
        expected += (
            [torch.stack([data[i][0] for i in order[k : k + 4]]) for k in (0, 4, 8)],
            [order],
        )
    assert losses == pytest.approx(train_on(whole, expected, data.labels), abs=1e-5)


def train_on(model, given, labels):
    task = BranchTask(model)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    losses = []
    task.train()
    for batches, (order,) in zip(given[::2], given[1::2], strict=True):
        for k, images in enumerate(batches):
            optimizer.zero_grad()
            loss = task(images, labels[order[4 * k : 4 * k + 4]])["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_items(tmp_path):
    model, data = make_model().train(), make_data()
    features = cache_features(model, data, tmp_path)
    assert isinstance(features, FeatureDataset)
    assert model.training
    assert not model.backbone.training
    assert len(features) == len(data)
    maps = model.forward_taps(torch.stack([data[i][0] for i in range(len(data))]))
    expected = torch.cat([y.mean((2, 3)) for y in maps.values()], 1)
    torch.testing.assert_close(rows(features), expected)
    assert not features[0][0].requires_grad
    assert torch.equal(features[-1][1], data.labels[-1])
    assert features.nbytes == pytest.approx(expected.nbytes, rel=0.1)
    with pytest.raises(IndexError):
        features[len(data)]
    features[3][0].zero_()
    assert torch.equal(features[3][0], rows(features)[3])
    assert torch.equal(rows(pickle.loads(pickle.dumps(features))), rows(features))


def test_workers_read_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "SHARD_BYTES", 10_000)
    features = cache_features(
        make_model(), make_data(augment="light"), tmp_path, views=3, batch_size=3
    )
    assert len(list(features.place.glob("*.safetensors"))) > 3
    alone = create_loader(features, 4, is_training=True)
    several = create_loader(copy.deepcopy(features), 4, is_training=True, num_workers=2)
    seen = []
    for epoch in range(4):
        for loader in (alone, several):
            loader.set_epoch(epoch)
        for (x, labels), (y, others) in zip(alone, several, strict=True):
            assert torch.equal(x, y)
            assert torch.equal(labels, others)
        seen.append(rows(features, [epoch]))
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(dtype, tmp_path):
    model, data = make_model(), make_data()
    whole, half = (cache_features(model, data, tmp_path / str(t), dtype=t) for t in (None, dtype))
    assert half[0][0].dtype == dtype
    assert torch.equal(rows(half), rows(whole).to(dtype))
    outputs = HeadsOnly(model)(rows(half))
    for name, y in HeadsOnly(model)(rows(half).float()).items():
        assert torch.equal(outputs[name], y)


# -- stale or not
# --------------------------------------------------------------------------------------------


def changed_weight(model, data):
    with torch.no_grad():
        model.backbone.layer1[0].conv1.weight[0, 0, 0, 0] += 1e-3


def changed_statistics(model, data):
    model.backbone.bn1.running_var[0] += 1e-3


def changed_pixel(model, data):
    data.images.images[5, 3, 3] += 1


def changed_mean(model, data):
    data.transform = create_transform((1, SIDE, SIDE), True, "light", mean=(0.4,))


def changed_augmentation(model, data):
    data.transform = create_transform((1, SIDE, SIDE), True, "light", hflip=0.4)


def changed_interpolation(model, data):
    data.transform = create_transform((1, SIDE, SIDE), True, "light", interpolation="bicubic")


def changed_activation(model, data):
    model.backbone.act1 = torch.nn.GELU()


def changed_seed(model, data):
    data.set_seed(1)


def replaced(**kwargs):
    return lambda model, data: (make_model(**kwargs), data)


CHANGES = {
    "weight": (changed_weight, "weights"),
    "statistics": (changed_statistics, "weights"),
    "taps": (replaced(taps=(3, 5)), "taps"),
    "module": (replaced(taps=("layer2.0.conv1", 5)), "structure, taps"),
    "pooling": (replaced(head=PoolHead(pool_type="max")), "taps"),
    "tag": (replaced(name="test_resnet.r160_in1k"), "options"),
    "backbone": (
        replaced(name="test_efficientnet"),
        r"backbone \(test_resnet, now test_efficientnet\), options, structure, weights, taps",
    ),
    "option": (replaced(output_stride=16), "options, structure"),
    "activation": (changed_activation, "structure"),
    "mean": (changed_mean, "preprocessing"),
    "augmentation": (changed_augmentation, "preprocessing"),
    "interpolation": (changed_interpolation, "preprocessing"),
    "pixel": (changed_pixel, "data"),
    "subset": (lambda model, data: (model, HierarchicalSubset(data, range(11))), "data, samples"),
    "seed": (changed_seed, r"seed \(0, now 1\)"),
    "views": (lambda model, data: (model, data, {"views": 3}), r"views \(2, now 3\)"),
    "dtype": (
        lambda model, data: (model, data, {"dtype": torch.float16}),
        r"dtype \(float32, now float16\)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stale(change, tmp_path):
    model, data = make_model(), make_data(augment="light")
    first = cache_features(model, data, tmp_path, views=2)
    before = rows(first, (0, 1))
    apply, words = CHANGES[change]
    model, data, *more = apply(model, data) or (model, data)
    kwargs = {"views": 2, **(more[0] if more else {})}
    with pytest.warns(
        UserWarning, match=rf"{first.place} are stale, they differ in: {words}\. New"
    ):
        second = cache_features(model, data, tmp_path, **kwargs)
    assert second.place != first.place
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = cache_features(model, data, tmp_path, **kwargs)
    assert again.place == second.place
    fresh = cache_features(model, data, tmp_path / "fresh", **kwargs)
    assert torch.equal(rows(second, (0, 1)), rows(fresh, (0, 1)))
    assert torch.equal(rows(first, (0, 1)), before)  # the old one stays as it is


def test_other_version_of_timm(tmp_path, monkeypatch):
    cache_features(make_model(), make_data(), tmp_path)
    monkeypatch.setattr(timm, "__version__", "9.9")
    with pytest.warns(UserWarning, match=r"timm \(.*, now 9.9\)"):
        cache_features(make_model(), make_data(), tmp_path)


def saved_and_loaded(model, data, folder):
    return load_model(save_model(model, folder / "model.safetensors")).freeze(), data


def other_labels(model, data, folder):
    data.labels = data.labels.flip(0)
    return model, data


def other_heads(model, data, folder):
    model.reset_classifier([5, 6])
    return model, data


def in_training(model, data, folder):
    return model.unfreeze().train().freeze(), data


def other_order(model, data, folder):
    return make_model(taps=(5, 4), head=PoolHead(hidden=(4,))), data


def same(model, data, folder):
    return model, data


@pytest.mark.parametrize(
    "change", [same, saved_and_loaded, other_labels, other_heads, other_order, in_training]
)
def test_not_stale(change, tmp_path):
    first = cache_features(make_model(), make_data(), tmp_path / "features")
    model, data = change(make_model(), make_data(), tmp_path)
    seen = passes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = cache_features(model, data, tmp_path / "features", batch_size=5)
    assert second.place == first.place
    assert seen == []
    images = torch.stack([data[i][0] for i in range(len(data))])
    outputs = HeadsOnly(model.eval())(rows(second))
    for name, y in model(images).items():
        torch.testing.assert_close(outputs[name], y)
    assert torch.equal(second[0][1], data.labels[0])


@pytest.fixture
def folder(tmp_path):
    """Class folders of images, as they are, packed, and as clips of one frame."""
    rng = np.random.default_rng(0)
    for i in range(6):
        for name in (f"images/{i % 2}/{i}.png", f"clips/{i % 2}/{i}/0.png"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), np.uint8)).save(path)
    return tmp_path


def pack(folder, name):
    subprocess.run(["tar", "-caf", folder / name, "-C", folder / "images", "."], check=True)
    return folder / name


def rewrite(path):
    """Another image of the same size in bytes would have another time.

    Here only the time differs.
    """
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize("kind", ["files", "csv", "tar", "tar.gz", "clips"])
def test_changed_files(kind, folder):
    def read():
        if kind == "clips":
            return create_clip_dataset(folder / "clips", in_chans=1, num_frames=1)
        if kind == "csv":
            lines = [f"images/{i % 2}/{i}.png,{i % 2}" for i in range(6)]
            (folder / "data.csv").write_text("\n".join(["path,label", *lines]))
        where = {"files": folder / "images", "csv": folder / "data.csv"}
        return create_dataset(
            where[kind] if kind in where else pack(folder, f"data.{kind}"), in_chans=1
        )

    model = make_model(taps=[5], num_classes=[2])
    data = read()
    first = cache_features(model, data, folder / "features")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache_features(model, data, folder / "features").place == first.place
    path = folder / ("clips/0/2/0.png" if kind == "clips" else "images/0/2.png")
    if kind == "tar.gz":
        Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(path)
    else:
        rewrite(path)
    with pytest.warns(UserWarning, match="differ in: data\\."):
        cache_features(model, read(), folder / "features")


# -- interruption and damage
# ---------------------------------------------------------------------------------


class Stop(BaseException):
    """Like KeyboardInterrupt, but surely not pytest's own."""


@pytest.mark.parametrize("damage", [None, "truncated", "lost", "progress"])
def test_interruption(damage, tmp_path, monkeypatch):
    model, data = make_model(), make_data(augment="light")
    whole = cache_features(model, data, tmp_path / "whole", views=2, batch_size=2)
    monkeypatch.setattr(feature_files, "SHARD_BYTES", 2 * 2 * 288 * 4)  # two batches
    seen = passes(model)

    def stop(module, args):
        if len(seen) == 9:  # in the middle of the second view
            raise Stop

    hook = model.backbone.conv1.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        cache_features(model, data, tmp_path / "part", views=2, batch_size=2)
    hook.remove()
    assert data.epoch == 0
    assert not list(tmp_path.glob("part/*/index.json"))
    shards = sorted(tmp_path.glob("part/*/*.safetensors"))
    assert len(shards) == 4  # 8 of 9 batches
    if damage == "truncated":
        shards[1].write_bytes(shards[1].read_bytes()[:-1])
    elif damage == "lost":
        shards[2].unlink()
    elif damage == "progress":
        next(tmp_path.glob("part/*/partial.json")).write_text("{")
    seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = cache_features(model, data, tmp_path / "part", views=2, batch_size=2)
    assert len(seen) == 12 - {None: 8, "truncated": 2, "lost": 4, "progress": 0}[damage]
    assert torch.equal(rows(features, (0, 1)), rows(whole, (0, 1)))
    assert not list(tmp_path.glob("part/*/partial.json"))


def test_interrupted_before_the_index(tmp_path, monkeypatch):
    model, data = make_model(), make_data()

    def stop(path, *args, replace=feature_files.replace_file):
        if path.name == "index.json":
            raise Stop
        replace(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(feature_files, "replace_file", stop)
        with pytest.raises(Stop):
            cache_features(model, data, tmp_path)
    seen = passes(model)
    features = cache_features(model, data, tmp_path)
    assert seen == []
    assert torch.equal(rows(features), rows(cache_features(model, data, tmp_path / "other")))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "bytes, .* were written"),
    "lost": (Path.unlink, "it is gone"),
    "flipped": (flip, "does not hold what was written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "SHARD_BYTES", 4000)
    model, data = make_model(), make_data()
    features = cache_features(model, data, tmp_path, batch_size=3)
    path = sorted(features.place.glob("*.safetensors"))[1]
    apply, message = DAMAGES[damage]
    cache_features(model, data, tmp_path, verify=True)
    apply(path)
    with pytest.raises(
        ValueError, match=f"{path} is damaged: .*{message}.*Delete the folder {features.place}"
    ):
        cache_features(model, data, tmp_path, verify=damage == "flipped")


def test_damaged_after_opening(tmp_path):
    features = cache_features(make_model(), make_data(), tmp_path)
    (path,) = features.place.glob("*.safetensors")
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        features[0]


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_index(text, tmp_path):
    features = cache_features(make_model(), make_data(), tmp_path)
    (features.place / "index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json is damaged"):
        cache_features(make_model(), make_data(), tmp_path)


def test_foreign_index(tmp_path):
    first = cache_features(make_model(), make_data(), tmp_path)
    with pytest.warns(UserWarning, match="stale"):
        second = cache_features(make_model(seed=1), make_data(), tmp_path)
    (first.place / "index.json").write_bytes((second.place / "index.json").read_bytes())
    with pytest.raises(ValueError, match="holds other features"):
        cache_features(make_model(), make_data(), tmp_path)


# -- refusals
# ------------------------------------------------------------------------------------------------


def trained_bias():
    model = make_model()
    model.backbone.bn1.bias.requires_grad_()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_model().unfreeze(), "backbone is not frozen"),
        (lambda: make_model().unfreeze().freeze(3), "frozen up to stage 3 only"),
        (trained_bias, "backbone is not frozen"),
        (lambda: torch.nn.DataParallel(make_model()), "expected a branch model, not DataParallel"),
    ],
)
def test_not_frozen(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        cache_features(make(), make_data(), tmp_path)
    with pytest.raises(ValueError, match=message):
        HeadsOnly(make())
    assert not list(tmp_path.iterdir())


def test_decoder(tmp_path):
    model = create_branch_model(
        "test_resnet", taps=[4, 5], head="unet", num_classes=2, names=["mask"]
    ).freeze()
    with pytest.raises(ValueError, match="'mask' .unet. reads the images too"):
        cache_features(model, make_data(), tmp_path)


def with_transform(transform):
    data = make_data()
    data.transform = transform
    return data


def large():
    model = make_model()
    torch.nn.init.constant_(model.backbone.bn1.weight, 1e9)
    return model


@pytest.mark.parametrize(
    ("model", "data", "kwargs", "message"),
    [
        (make_model, make_data, {"views": 0}, "views must be at least 1"),
        (make_model, make_data, {"views": 2}, "views=2 has no effect"),
        (make_model, lambda: with_transform(None), {"views": 2}, "views=2 has no effect"),
        (make_model, make_data, {"dtype": torch.int8}, "dtype=torch.int8 cannot hold features"),
        (large, make_data, {"dtype": torch.float16}, "do not fit torch.float16"),
        (
            make_model,
            lambda: with_transform(lambda image: None),
            {},
            "cannot be told from another one",
        ),
        (
            make_model,
            lambda: [(torch.zeros(1, SIDE, SIDE), 0)],
            {},
            "expected a HierarchicalDataset",
        ),
        (
            make_model,
            lambda: HierarchicalSubset(make_data(), []),
            {},
            "with samples, not HierarchicalSubset of 0",
        ),
        (lambda: make_model(head=["pool", "lstm"]), make_data, {}, "'fine'.* read clips"),
        (
            lambda: make_model(head="flatten"),
            lambda: with_transform(create_transform((1, 64, 64))),
            {},
            "map at stage 4 is .* for images of .1, 64, 64.",
        ),
        (
            make_model,
            lambda: HierarchicalDataset(
                [np.zeros((s, s), np.uint8) for s in (32, 40)], torch.zeros(2, 2)
            ),
            {},
            "shapes .*transform makes them equal",
        ),
    ],
)
def test_refused(model, data, kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        cache_features(model(), data(), tmp_path, **kwargs)
    assert not list(tmp_path.glob("*/index.json"))


def test_augmentation_without_views(tmp_path):
    data = make_data(augment="cifar")
    data.set_epoch(2)
    with pytest.warns(UserWarning, match="views=1 of a dataset that augments"):
        features = cache_features(make_model(), data, tmp_path)
    assert data.epoch == 2
    data.set_epoch(0)  # which is what the only view shows
    assert torch.equal(rows(features), rows(cache_features(make_model(), data, tmp_path)))
    data.transform = create_transform((1, SIDE, SIDE), True, albumentations.HorizontalFlip(p=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache_features(make_model(), data, tmp_path / "always the same")


# -- heads
# -------------------------------------------------------------------------------------------------


def test_heads_are_the_models(tmp_path):
    model = make_model(head=PoolHead(hidden=(6,)))
    heads = HeadsOnly(model)
    features = cache_features(model, make_data(), tmp_path / "features")
    train(heads, features)
    model.eval()
    assert not heads.training
    images = torch.stack([make_data()[i][0] for i in range(4)])
    path = save_model(heads, tmp_path / "model.safetensors")
    loaded, expected = load_model(path)(images), heads(rows(features)[:4])
    for name, y in model(images).items():
        torch.testing.assert_close(expected[name], y)
        assert torch.equal(loaded[name], y)
    assert list(heads(rows(features), heads=["fine"])) == ["fine"]
    twin = copy.deepcopy(heads)
    heads.reset_classifier([4, 4])
    assert model(images)["coarse"].shape == (4, 4)
    assert twin(rows(features))["coarse"].shape == (12, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda heads: heads(torch.zeros(2, 287)), r"expected features \(B, 288\)"),
        (lambda heads: heads(torch.zeros(2, 1, SIDE, SIDE)), r"expected features \(B, 288\)"),
        (
            lambda heads: heads(torch.zeros(2, 288), lengths=[1, 1]),
            "lengths= belongs to features of clips",
        ),
        (lambda heads: heads(torch.zeros(2, 288), heads=["stage3"]), "stage3"),
        (lambda heads: heads.set_grad_checkpointing(), "has no effect on heads alone"),
        (lambda heads: heads.unfreeze(4)(torch.zeros(2, 288)), "was unfrozen"),
        (
            lambda heads: HeadsOnly(make_model(head=["pool", "gru"]))(torch.zeros(2, 288)),
            r"\['fine'\] read features",
        ),
    ],
)
def test_heads_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(HeadsOnly(make_model()))


def test_fit_refuses_what_has_no_effect_on_features(tmp_path):
    features = cache_features(model := make_model(), make_data(), tmp_path / "features")
    config = FitConfig(
        output=str(tmp_path / "run"), epochs=1, channels_last=True, plots=False, progress=False
    )
    with pytest.raises(ValueError, match="--channels-last has no effect on features"):
        fit(
            BranchTask(HeadsOnly(model)),
            create_loader(features, 4, is_training=True),
            config=config,
        )


@pytest.mark.parametrize("ema", [False, True])
def test_fit(ema, tmp_path):
    """The same file of a whole model comes out, also of a run that goes on."""
    data, val = make_data(), make_data(8, seed=1)
    settings = {"lr": 0.05, "plots": False, "progress": False}
    settings |= {"model_ema": True, "model_ema_decay": 0.5} if ema else {}

    def run(name, cached, epochs, **kwargs):
        model, parts = make_model(), (HierarchicalSubset(data, range(12)), val)
        if cached:
            parts = [
                cache_features(model, part, tmp_path / f"part{i}") for i, part in enumerate(parts)
            ]
        loaders = [create_loader(part, 4, is_training=i == 0) for i, part in enumerate(parts)]
        config = FitConfig(
            output=str(tmp_path / name), epochs=epochs, sched="none", **settings, **kwargs
        )
        return fit(BranchTask(HeadsOnly(model) if cached else model), *loaders, config=config)

    expected = run("images", False, 3)
    run("cached", True, 2)
    found = run("cached", True, 3, resume="auto")
    assert found.best_epoch == expected.best_epoch
    assert [row["train_loss"] for row in found.history] == pytest.approx(
        [row["train_loss"] for row in expected.history], abs=1e-5
    )
    images = torch.stack([val[i][0] for i in range(len(val))])
    for name, y in load_model(expected.model_path)(images).items():
        torch.testing.assert_close(
            load_model(found.model_path)(images)[name], y, rtol=1e-4, atol=1e-5
        )


# -- clips
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_pass", [None, 3])
@pytest.mark.parametrize(
    "head",
    [
        [LSTMHead(hidden_size=8), "pool"],
        [
            LSTMHead(hidden_size=8, output="frame"),
            GRUHead(hidden_size=4, pool_type="attention", bidirectional=True),
        ],
        [
            GRUHead(hidden_size=8, pool_type="flatten"),
            LSTMHead(hidden_size=8, pool_type="max", readout="mean"),
        ],
    ],
    ids=["pool", "frames", "flatten"],
)
def test_clips(head, per_pass, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "SHARD_BYTES", 4000)
    model, data = make_model(head=head).eval(), make_clips()
    model.frames_per_pass = per_pass
    seen = passes(model)
    features = cache_features(model, data, tmp_path, batch_size=2)
    assert sum(seen) == sum(len(data[i][0]) for i in range(len(data)))
    assert max(seen) == 3 or per_pass is None
    assert [len(features[i][0]) for i in range(7)] == [2, 3, 4, 4, 2, 3, 4]
    loaders = (create_clip_loader(data, 3), create_loader(features, 3, collate_fn=collate_clips))
    for ((clips, lengths), labels), ((rows, found), others) in zip(*loaders, strict=True):
        assert torch.equal(lengths, found)
        assert torch.equal(labels, others)
        outputs = HeadsOnly(model)(rows, lengths=found)
        for name, y in model(clips, lengths=lengths).items():
            torch.testing.assert_close(outputs[name], y, rtol=1e-4, atol=1e-5)


def test_views_of_clips(tmp_path):
    model, data = make_model(head="gru"), make_clips(is_training=True)
    features = cache_features(model, data, tmp_path, views=2, batch_size=3)
    for epoch in (1, 2):
        data.set_epoch(epoch % 2)
        features.set_epoch(epoch)
        for i in range(len(data)):
            maps = model.forward_taps(data[i][0])
            torch.testing.assert_close(
                features[i][0], torch.cat([y.mean((2, 3)) for y in maps.values()], 1)
            )
    data.sampler = FrameSampler(3, is_training=True)
    with pytest.warns(UserWarning, match="differ in: preprocessing\\."):
        cache_features(model, data, tmp_path, views=2)


def test_clip_that_cannot_be_read(folder):
    """In training another clip with its own label takes its place.

    Features have the labels of all.
    """
    (folder / "clips/1/3/0.png").write_bytes(b"no image")
    data = create_clip_dataset(folder / "clips", in_chans=1, num_frames=1)
    with pytest.raises(ClipError, match="0.png"):
        cache_features(
            make_model(taps=[5], num_classes=[2], head="lstm"), data, folder / "features"
        )
    assert not data.strict


# -- two processes
# -------------------------------------------------------------------------------------------


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = make_model()
    seen = passes(model)
    features = cache_features(model, make_data(), folder / "features")
    facts = {"passes": len(seen), "sum": rows(features).double().sum().item()}
    try:
        cache_features(make_model(head="lstm"), make_data(), folder / "failing")
    except Exception as error:
        facts["error"] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    processes = multiprocessing.start_processes(
        process, (tmp_path,), 2, join=False, start_method="fork"
    )
    deadline = time.monotonic() + 100
    while not processes.join(timeout=5):  # raises what a process raises
        if time.monotonic() > deadline:
            for hanging in processes.processes:
                hanging.kill()
            pytest.fail("the processes hang")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["passes"], second["passes"]) == (1, 0)
    assert first["sum"] == second["sum"]
    assert first["error"].startswith("ValueError: the heads")
    assert (
        "the first process could not compute the features: ValueError: the heads" in second["error"]
    )
