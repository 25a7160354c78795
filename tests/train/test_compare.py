"""Paired differences against scipy's t-test, tables, and verdicts that the numbers bear."""

import math

import pytest
from scipy.stats import ttest_rel

from timm_branches.train.compare import comparison_table, paired_difference, verdict

A, B = [93.1, 92.4, 93.9, 92.8], [92.0, 92.1, 92.7, 92.2]


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_is_that_of_the_paired_t_test(confidence):
    expected = ttest_rel(A, B).confidence_interval(confidence)
    found = paired_difference(A, B, confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(0.8)
    assert found.measurable == (ttest_rel(A, B).pvalue < 1 - confidence)


def test_noise_is_not_measurable():
    assert not paired_difference([1.0, 3.0, 2.0], [2.0, 2.0, 2.5]).measurable
    assert paired_difference([1.0, 1.1, 0.9], [2.0, 2.0, 2.0]).measurable


def test_one_pair_says_nothing():
    found = paired_difference([5.0], [1.0])
    assert (found.mean, found.low, found.high) == (4.0, -math.inf, math.inf)
    assert not found.measurable
    assert str(found) == "+4.00"


@pytest.mark.parametrize(
    ("a", "b", "confidence"), [([], [], 0.95), ([1.0], [1.0, 2.0], 0.95), ([1.0], [1.0], 1.0)]
)
def test_refuses(a, b, confidence):
    with pytest.raises(ValueError, match="paired|confidence"):
        paired_difference(a, b, confidence)


def results(a, b):
    return {"B-CNN": [{"full_path": x} for x in a], "flat": [{"full_path": x} for x in b]}


@pytest.mark.parametrize(
    ("a", "b", "lower", "expected"),
    [
        (A, B, False, "A measurable gain. B-CNN against flat, full path: +0.80"),
        (B, A, False, "A measurable loss. B-CNN against flat, full path: -0.80"),
        (B, A, True, "A measurable gain."),
        ([1.0, 3.0], [2.0, 2.1], False, "No measurable gain."),
        ([1.0], [0.0], False, "No verdict from a single seed."),
    ],
)
def test_verdict(a, b, lower, expected):
    assert verdict(results(a, b), "B-CNN", "flat", "full_path", "full path", lower).startswith(
        expected
    )


def test_verdict_refuses_what_was_not_measured():
    with pytest.raises(ValueError, match="no 'full_path' of 'deep'"):
        verdict(results(A, B), "deep", "flat", "full_path")
    with pytest.raises(ValueError, match="no 'top1'"):
        verdict(results(A, B), "B-CNN", "flat", "top1")


def test_table():
    text = comparison_table(
        {"one": [{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 2.0}], "another": [{"x": 5.0}]},
        {"x": "top-1", "y": "top-5"},
    )
    head, rule, one, another = text.splitlines()
    assert head.split() == ["top-1", "top-5"]
    assert set(rule) == {"-"}
    assert one.split() == ["one", "2.00", "±", "1.41", "2.00", "±", "0.00"]
    assert another.split() == ["another", "5.00", "-"]
