"""Batches and augmentation do not depend on workers and ranks."""

import warnings

import numpy as np
import pytest
import torch
from timm.task import evaluation_sample_limit
from torch.utils.data import ConcatDataset, TensorDataset
from torch.utils.data import Subset as TorchSubset

from timm_branches.data import (
    HierarchicalDataset,
    HierarchicalSubset,
    create_loader,
    create_transform,
)


def make(count=24, augment="cifar"):
    """Images that are told apart by their labels."""
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 1), np.uint8)
    transform = create_transform((1, 16, 16), is_training=True, augment=augment)
    return HierarchicalDataset(images, torch.arange(count)[:, None], transform=transform)


def epochs(loader, numbers=(0, 1)):
    """All images of some epochs, sorted by sample, and the orders they came in."""
    images, orders = [], []
    for number in numbers:
        loader.set_epoch(number)
        batches = list(loader)
        order = torch.cat([labels[:, 0] for _, labels in batches])
        images.append(torch.cat([image for image, _ in batches])[order.argsort()])
        orders.append(order.tolist())
    return images, orders


def test_workers_do_not_matter():
    expected, orders = epochs(create_loader(make(), 4, True, seed=5), (0, 1, 2))
    assert not torch.equal(expected[0], expected[1])
    assert orders[0] != orders[1]
    assert not torch.equal(expected[1], expected[2])
    for workers, persistent in [(1, True), (2, True), (2, False)]:
        loader = create_loader(make(), 4, True, workers, seed=5, persistent_workers=persistent)
        images, their_orders = epochs(loader, (0, 1, 2))
        assert their_orders == orders
        for ours, theirs in zip(expected, images, strict=True):
            assert torch.equal(ours, theirs)


def test_seed_and_epoch():
    first, order = epochs(create_loader(make(), 4, True, seed=1))
    again, same_order = epochs(create_loader(make(), 4, True, seed=1))
    other, other_order = epochs(create_loader(make(), 4, True, seed=2))
    assert order == same_order
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert order[0] != other_order[0]
    assert order[1] != other_order[0]  # seed 2's first epoch is not seed 1's second
    assert not torch.equal(first[0], other[0])
    # resumed at epoch 1
    resumed, resumed_order = epochs(create_loader(make(), 4, True, seed=1), (1,))
    assert resumed_order[0] == order[1]
    assert torch.equal(resumed[0], first[1])


def test_equal_images_are_augmented_differently():
    transform = create_transform((1, 16, 16), is_training=True, augment="light", hflip=0.0)
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16), np.uint8)
    data = HierarchicalDataset(image.repeat(200, 0), torch.zeros(200, 1), transform=transform)
    images = next(iter(create_loader(data, 200, True)))[0]
    assert len(images.unique(dim=0)) == 25  # shifts by -2 to 2 in both directions


def test_a_subset_is_augmented_as_the_whole():
    data = make()
    data.set_seed(3)
    data.set_epoch(4)
    part = HierarchicalSubset(data, [5, 7])
    assert torch.equal(part[1][0], data[7][0])
    part.set_epoch(5)
    assert data.epoch == 4  # each has an epoch of its own
    assert not torch.equal(part[1][0], data[7][0])


@pytest.mark.parametrize(
    "wrap", [lambda d: TorchSubset(d, range(24)), lambda d: ConcatDataset([d])]
)
def test_epoch_reaches_wrapped_datasets_in_persistent_workers(wrap):
    expected, _ = epochs(create_loader(make(), 4, True, seed=5))
    images, _ = epochs(create_loader(wrap(make()), 4, True, 1, seed=5))
    assert all(torch.equal(a, b) for a, b in zip(expected, images, strict=True))


def test_timms_loop_sets_the_epoch_on_dataset_or_sampler():
    expected = create_loader(make(), 4, True)
    expected.set_epoch(3)
    for tell in (
        lambda loader: loader.sampler.set_epoch(3),
        lambda loader: loader.dataset.set_epoch(3),
    ):
        loader = create_loader(make(), 4, True)
        tell(loader)
        for ours, theirs in zip(expected, loader, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
        expected._last_epoch = None  # the same epoch again is meant here


@pytest.mark.slow  # the worker imports everything anew
def test_epoch_reaches_spawned_workers():
    expected, _ = epochs(create_loader(make(8), 4, True, seed=5))
    images, _ = epochs(create_loader(make(8), 4, True, 1, seed=5, multiprocessing_context="spawn"))
    assert all(torch.equal(a, b) for a, b in zip(expected, images, strict=True))


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_join_to_the_single_process_batch(drop_last):
    world, batch = 2, 3
    whole = create_loader(make(26), world * batch, True, seed=9, drop_last=drop_last)
    ranks = [
        create_loader(
            make(26), batch, True, seed=9, rank=rank, world_size=world, drop_last=drop_last
        )
        for rank in range(world)
    ]
    for epoch in range(2):
        for loader in [whole, *ranks]:
            loader.set_epoch(epoch)
        steps = list(zip(whole, *ranks, strict=True))
        assert len(steps) == (4 if drop_last else 5) == len(whole) == len(ranks[0])
        for together, *parts in steps:
            images, labels = (
                torch.stack([part[i] for part in parts], 1).flatten(0, 1) for i in range(2)
            )
            assert torch.equal(labels, together[1])
            assert torch.equal(images, together[0])


def test_last_batches_are_even_on_all_ranks():
    loaders = [
        create_loader(make(7), 2, True, rank=rank, world_size=3, drop_last=False)
        for rank in range(3)
    ]
    seen = [torch.cat([labels for _, labels in loader]).flatten().tolist() for loader in loaders]
    assert [len(part) for part in seen] == [3, 3, 3]
    assert set(sum(seen, [])) == set(range(7))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_counts_every_sample_once(world):
    counted = []
    lengths = set()
    for rank in range(world):
        loader = create_loader(make(7, "none"), 2, rank=rank, world_size=world)
        labels = torch.cat([labels for _, labels in loader]).flatten().tolist()
        counted += labels[: evaluation_sample_limit(loader)]
        lengths.add(len(loader))
    assert sorted(counted) == list(range(7))
    assert len(lengths) == 1


def test_evaluation_is_in_order_and_whole():
    labels = torch.cat([labels for _, labels in create_loader(make(7, "none"), 2)])
    assert labels.flatten().tolist() == list(range(7))


def test_other_datasets_and_global_random_state():
    state = torch.get_rng_state()
    loader = create_loader(TensorDataset(torch.arange(8)), 4, True)
    loader.set_epoch(1)
    assert sorted(torch.cat([part for (part,) in loader]).tolist()) == list(range(8))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forgotten_set_epoch_is_warned_about():
    loader = create_loader(make(8), 4, True)
    list(loader)
    with pytest.warns(UserWarning, match=r"call loader\.set_epoch"):
        list(loader)
    loader.set_epoch(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(loader)


def test_errors():
    with pytest.raises(ValueError, match=r"nothing would be left. Take batch_size <= 4"):
        create_loader(make(8), 5, True, rank=0, world_size=2)
    with pytest.raises(ValueError, match="empty"):
        create_loader(TensorDataset(torch.zeros(0)), 5)
    with pytest.raises(ValueError, match="rank 2"):
        create_loader(make(8), 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size"):
        create_loader(make(8), 0)
    assert len(create_loader(make(8), 16, True, drop_last=False)) == 1
