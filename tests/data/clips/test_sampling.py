"""Which frames are taken: against definitions in plain Python."""

from collections import Counter

import numpy as np
import pytest

from timm_branches.data import FrameSampler

COUNTS = [1, 2, 3, 5, 7, 8, 16, 31, 100]


@pytest.mark.parametrize("sampling", ["uniform", "dense", "random", "all"])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("count", COUNTS)
def test_positions_ascend_and_exist(sampling, is_training, count):
    for wanted in [None] if sampling == "all" else [1, 2, 5, 8]:
        sampler = FrameSampler(wanted, sampling, is_training=is_training)
        for sample in range(20):
            chosen = sampler(count, (3, 1, sample)).tolist()
            assert chosen == sorted(set(chosen))
            assert 0 <= chosen[0] <= chosen[-1] < count
            assert len(chosen) == (count if wanted is None else min(wanted, count))


def test_uniform_takes_the_centres_as_tsn_does():
    for count in range(1, 60):
        for wanted in range(1, count + 1):
            tick = count / wanted
            expected = [int(tick / 2 + tick * i + 1e-9) for i in range(wanted)]
            assert FrameSampler(wanted)(count, (9, 9, 9)).tolist() == expected


@pytest.mark.parametrize("count", [8, 10, 13])
def test_uniform_draws_one_frame_of_each_segment(count):
    sampler = FrameSampler(4, is_training=True)
    draws = np.array([sampler(count, (0, epoch, 5)) for epoch in range(600)])
    seen = [set(column.tolist()) for column in draws.T]
    # none twice, none never
    assert sorted(position for segment in seen for position in segment) == list(range(count))
    for column, segment in zip(draws.T, seen, strict=True):
        assert len(segment) in (count // 4, -(-count // 4))
        assert min(Counter(column.tolist()).values()) > 600 / len(segment) * 0.7


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_dense(stride):
    for count in range(1, 30):
        places = range(count)
        fitting = [list(places[start::stride][:5]) for start in places]
        longest = max(map(len, fitting))
        fitting = [frames for frames in fitting if len(frames) == longest]
        middle = FrameSampler(5, "dense", stride)(count).tolist()
        assert middle in fitting
        assert abs(middle[0] - (count - 1 - middle[-1])) <= 1  # as many frames before as after
        sampler = FrameSampler(5, "dense", stride, is_training=True)
        drawn = {tuple(sampler(count, (0, epoch, 0)).tolist()) for epoch in range(300)}
        assert drawn == set(map(tuple, fitting))


def test_random_takes_every_frame_equally_often():
    sampler = FrameSampler(3, "random", is_training=True)
    seen = Counter(np.concatenate([sampler(10, (0, 0, sample)) for sample in range(2000)]).tolist())
    assert sorted(seen) == list(range(10))
    assert all(500 < number < 700 for number in seen.values()), seen


@pytest.mark.parametrize("sampling", ["uniform", "dense", "random"])
def test_a_function_of_the_key(sampling):
    training = FrameSampler(4, sampling, is_training=True)
    keys = [
        (seed, epoch, sample) for seed in (-1, 0, 2**40) for epoch in (0, 1) for sample in (0, 1)
    ]
    assert all((training(1000, key) == training(1000, key)).all() for key in keys)
    assert len({tuple(training(1000, key)) for key in keys}) > 0.8 * len(keys)
    evaluation = FrameSampler(4, sampling)
    assert len({tuple(evaluation(1000, (seed, epoch, 7))) for seed, epoch, _ in keys}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 4, "sampling": "even"}, "uniform, dense, random, all"),
        ({"sampling": "uniform"}, "does not go with num_frames=None"),
        ({"num_frames": 4, "sampling": "all"}, "does not go with num_frames=4"),
        ({"num_frames": 0}, "at least 1"),
        ({"num_frames": 4, "sampling": "dense", "stride": 0}, "stride must be at least 1"),
        ({"num_frames": 4, "stride": 2}, "stride=2 has no effect with sampling='uniform'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        FrameSampler(**settings)


def test_a_clip_without_frames():
    with pytest.raises(ValueError, match="at least 1 frame"):
        FrameSampler(4)(0)
