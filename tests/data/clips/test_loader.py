"""Batches of clips: padding, lengths, and independence of the number of workers and ranks."""

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches.data import (
    ClipBatch,
    ClipDataset,
    FrameSampler,
    collate_clips,
    create_clip_dataset,
    create_clip_loader,
    create_transform,
)


def make(count=12, is_training=True, lengths=(3, 9)):
    """Ragged clips that are told apart by their labels."""
    rng = np.random.default_rng(0)
    clips = [
        rng.integers(0, 256, (rng.integers(*lengths), 16, 16, 1), np.uint8) for _ in range(count)
    ]
    transform = create_transform((1, 16, 16), is_training, "light")
    return ClipDataset(
        clips, range(count), transform=transform, sampler=FrameSampler(6, is_training=is_training)
    )


def test_padding_and_lengths():
    clips = [torch.randn(length, 3, 4, 5) for length in (2, 5, 1)]
    inputs, labels = collate_clips([(clip, torch.tensor([i, -1])) for i, clip in enumerate(clips)])
    assert isinstance(inputs, ClipBatch)
    assert inputs.clips.shape == (3, 5, 3, 4, 5)
    assert inputs.lengths.tolist() == [2, 5, 1]
    assert labels.tolist() == [[0, -1], [1, -1], [2, -1]]
    for padded, clip in zip(inputs.clips, clips, strict=True):
        assert torch.equal(padded[: len(clip)], clip)
        assert not padded[len(clip) :].any()


def test_clips_of_different_sizes():
    with pytest.raises(ValueError, match=r"shapes \[\(1, 4, 4\), \(1, 4, 5\)\]; a transform"):
        collate_clips([(torch.zeros(2, 1, 4, side), torch.tensor(0)) for side in (5, 4)])


def epochs(loader, numbers=(0, 1, 2)):
    """By epoch and label, the clip without its padding; and the orders."""
    found, orders = {}, []
    for number in numbers:
        loader.set_epoch(number)
        order = []
        for (clips, lengths), labels in loader:
            assert clips.shape[1] == lengths.max()
            for clip, length, label in zip(clips, lengths, labels.tolist(), strict=True):
                found[number, label] = clip[:length]
                order.append(label)
        orders.append(order)
    return found, orders


def test_workers_do_not_matter():
    expected, orders = epochs(create_clip_loader(make(), 4, True, seed=5))
    assert orders[0] != orders[1]
    assert not all(torch.equal(expected[0, i], expected[1, i]) for i in range(12))
    for workers, persistent in [(2, True), (2, False)]:
        loader = create_clip_loader(
            make(), 4, True, num_workers=workers, seed=5, persistent_workers=persistent
        )
        found, their_orders = epochs(loader)
        assert their_orders == orders
        assert all(torch.equal(found[key], clip) for key, clip in expected.items())
    other, _ = epochs(create_clip_loader(make(), 4, True, seed=6))
    assert not all(torch.equal(other[key], clip) for key, clip in expected.items())


def test_ranks_see_what_one_process_sees():
    expected, _ = epochs(create_clip_loader(make(), 4, True, seed=1), (1,))
    found = {}
    for rank in range(2):
        found |= epochs(create_clip_loader(make(), 2, True, seed=1, rank=rank, world_size=2), (1,))[
            0
        ]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], clip) for key, clip in expected.items())


def test_evaluation_repeats_itself():
    loader = create_clip_loader(make(is_training=False), 5)
    first, orders = epochs(loader, (0, 1))
    assert orders == [list(range(12))] * 2
    assert all(torch.equal(first[0, i], first[1, i]) for i in range(12))


def test_evaluation_with_random_frames_is_warned_about():
    with pytest.warns(UserWarning, match="draws frames at random"):
        create_clip_loader(make(), 4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_batches_stay_full_when_clips_are_broken(tmp_path):
    path = tmp_path / "list.csv"
    (tmp_path / "good").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "good/1.png")
    (tmp_path / "broken").touch()
    path.write_text("path,label\n" + "broken,a\n" * 7 + "good,b\n")
    data = create_clip_dataset(path)
    batches = list(create_clip_loader(data, 4, True, num_workers=2))
    assert [inputs.clips.shape[0] for inputs, _ in batches] == [4, 4]
    assert all((labels == 1).all() for _, labels in batches)
    assert data.errors == 7
