"""Numbers that are not finite: named, kept out of the weights, counted."""

import pytest
import torch

from tests.train.small_runs import (
    TREE,
    assert_equal,
    loader_of,
    make_data,
    make_task,
    settings,
    weights_of,
)
from timm_branches.data import HierarchicalDataset, create_loader, create_transform
from timm_branches.task import base_model
from timm_branches.train import evaluate, fit
from timm_branches.train.checkpoint import load_state
from timm_branches.train.checks import bad_pixel


class Poison:
    """A loader whose first image in some batches of the first epoch holds a number at one pixel."""

    def __init__(self, inner, batches, value=float("nan")):
        self.inner, self.batches, self.value = inner, batches, value

    def __len__(self):
        return len(self.inner)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for index, (images, labels) in enumerate(self.inner):
            if self.epoch == 0 and index in self.batches:
                images = images.clone()
                images[1, 0, 5, 9] = self.value
            yield images, labels


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("opt", ["momentum", "adamw"])
def test_an_update_is_skipped_and_nothing_changes(tmp_path, value, opt, caplog):
    """BatchNorm's statistics, weights and the optimizer's memory are those of a run without it."""
    data = make_data(16)
    options = {"epochs": 1, "opt": opt, "max_skipped_steps": 1}
    task = make_task()
    result = fit(
        task, Poison(loader_of(data, 4), {2}, value), None, settings(tmp_path / "a", **options)
    )
    assert result.skipped_steps == 1
    assert "Image 2 of batch 3 holds" in caplog.text
    assert "channel 0, row 5, column 9" in caplog.text
    without = torch.utils.data.Subset(data, [i for i in range(16) if not 8 <= i < 12])
    other = make_task()
    fit(other, loader_of(without, 4), None, settings(tmp_path / "b", **options))
    assert_equal(weights_of(task), weights_of(other))
    states = [
        load_state(tmp_path / name / "last.safetensors")["optimizer"]["state"] for name in "ab"
    ]
    for key, values in states[0].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name]))


def test_the_whole_group_is_skipped(tmp_path):
    """With accumulation, an update of two batches of which one is bad."""
    data = make_data(16)
    options = {"epochs": 1, "grad_accum_steps": 2, "max_skipped_steps": 1}
    task = make_task()
    fit(task, Poison(loader_of(data, 4), {2}), None, settings(tmp_path / "a", **options))
    other = make_task()
    first = torch.utils.data.Subset(data, range(8))
    fit(other, loader_of(first, 4), None, settings(tmp_path / "b", **options))
    assert_equal(weights_of(task), weights_of(other))


def test_the_limit_stops_the_run(tmp_path):
    options = settings(tmp_path, max_skipped_steps=2)
    task = make_task()
    with pytest.raises(FloatingPointError, match="Image 2 of batch 4 holds nan at channel 0"):
        fit(task, Poison(loader_of(make_data(16), 4), {0, 1, 3}), None, options)
    assert all(tensor.isfinite().all() for tensor in weights_of(task).values())


def test_the_file_is_named(tmp_path):
    """Of a data set with files, the path of the sample whose transform made a NaN."""
    from PIL import Image

    paths = [tmp_path / f"{name}.png" for name in "abcdefgh"]
    for number, path in enumerate(paths):
        Image.new("L", (16, 16), 10 * number).save(path)
    from timm_branches.data.images import FileImages

    data = HierarchicalDataset([None] * 8, TREE.expand(torch.arange(8) % 4), TREE)
    data.images = FileImages([str(path) for path in paths], in_chans=1)
    plain = create_transform(16, mean=(0.5,), std=(0.5,))

    def transform(image):
        tensor = plain(image)
        if image[0, 0, 0] == 50:
            tensor[0, 3, 4] = float("nan")
        return tensor

    data.transform = transform
    loader = create_loader(data, 4, is_training=True)
    with pytest.raises(FloatingPointError, match=r"\(.*f\.png\) holds nan at .*row 3, column 4"):
        fit(make_task(), loader, None, settings(tmp_path / "run"))


def test_a_gradient_names_its_layer_at_that_step(tmp_path):
    task = make_task()
    weight = base_model(task).head("fine").fc.weight
    count = 0

    def spoil(gradient):
        nonlocal count
        count += 1
        return gradient * float("nan") if count == 2 else gradient

    before = []
    handle = weight.register_hook(spoil)
    data = loader_of(make_data(16), 4)
    with pytest.raises(
        FloatingPointError, match=r"fc\.weight of head 'fine', .* in epoch 1, batch 2"
    ):
        fit(task, data, None, settings(tmp_path / "a"))
    handle.remove()
    before = weights_of(task)
    other = make_task()
    first = torch.utils.data.Subset(make_data(16), range(4))
    fit(other, loader_of(first, 4), None, settings(tmp_path / "b", epochs=1))
    assert_equal(before, weights_of(other))  # the first update happened, the second did not


def test_buffers_are_checked(tmp_path):
    """A running mean that is NaN never gets into a checkpoint."""
    task = make_task()
    with torch.no_grad():
        next(b for n, b in base_model(task).named_buffers() if n.endswith("running_var")).fill_(
            float("nan")
        )
    with pytest.raises(FloatingPointError, match=r"running_var of backbone"):
        fit(task, loader_of(make_data()), None, settings(tmp_path))
    assert not (tmp_path / "last.safetensors").exists()


def test_validation_says_so(tmp_path, caplog):
    data = make_data()
    images, labels = data.tensors
    images = images.clone()
    images[3] = float("nan")
    bad = torch.utils.data.TensorDataset(images, labels)
    task = make_task("test_vit")
    fit(task, loader_of(data), loader_of(bad), settings(tmp_path, epochs=1))
    assert "'fine' for 1 of 16 samples are NaN or infinite" in caplog.text
    caplog.clear()
    evaluate(task, loader_of(data))
    assert "NaN" not in caplog.text


@pytest.mark.parametrize("value", [-2, -100, 2, 7])
@pytest.mark.parametrize("where", ["train", "val", "task"])
def test_a_label_outside_its_level(tmp_path, value, where):
    data = make_data()
    images, labels = data.tensors
    labels = labels.clone()
    labels[5, 0] = value
    bad = loader_of(torch.utils.data.TensorDataset(images, labels))
    good = loader_of(data)
    task = make_task()
    config = settings(tmp_path)
    run = {
        "train": lambda: fit(task, bad, None, config),
        "val": lambda: fit(task, good, bad, config),
        "task": lambda: task(images, labels),
    }[where]
    with pytest.raises(ValueError, match=rf"label {value} of level 'coarse' is outside its 2 "):
        run()


@pytest.mark.parametrize(
    ("shape", "at", "where"),
    [
        ((2, 3, 4, 5), (1, 2, 3, 4), "Image 2 of batch 8 holds inf at channel 2, row 3, column 4"),
        ((2, 3, 1, 4, 5), (0, 2, 0, 3, 4), "at frame 2, channel 0, row 3, column 4"),
        ((4, 9), (2, 8), "Image 3 of batch 8 holds inf at column 8"),
    ],
)
def test_where_a_bad_number_is(shape, at, where):
    values = torch.zeros(shape)
    assert bad_pixel(values, 7) is None
    values[at] = float("inf")
    assert where in bad_pixel(values, 7)
