"""Weights of classes, against the closed forms."""

import pytest
import torch

from timm_branches.hierarchy.class_balance import SCHEMES, class_counts, class_weights
from timm_branches.taxonomy import Taxonomy, cifar10

TREE = Taxonomy(["animal/cat", "animal/dog", "transport/ship"], levels=["coarse", "fine"])
# 6 animals, of which one is only known to be an animal; 2 ships
LABELS = torch.tensor([[0, 0]] * 4 + [[0, 1], [0, -1]] + [[1, 2]] * 2)


def closed_form(counts, raw):
    """Weights scaled so that the mean over all samples is 1."""
    mean = sum(n * w for n, w in zip(counts, raw, strict=True)) / sum(counts)
    return [w / mean for w in raw]


@pytest.mark.parametrize(
    ("scheme", "weight"),
    [
        ("inverse", lambda n: 1 / n),
        ("sqrt", lambda n: n**-0.5),
        # 1 + b + ... + b ** (n - 1) samples are as good as n
        ("effective", lambda n: 1 / sum(0.9999**i for i in range(n))),
    ],
)
def test_closed_forms(scheme, weight):
    weights = class_weights(LABELS, TREE, scheme)
    for level, counts in (("coarse", [6, 2]), ("fine", [4, 1, 2])):
        want = closed_form(counts, [weight(n) for n in counts])
        assert weights[level].tolist() == pytest.approx(want, rel=1e-6)
    counts = {"coarse": torch.tensor([6, 2]), "fine": torch.tensor([4, 1, 2])}
    assert {k: n.tolist() for k, n in class_counts(LABELS, TREE).items()} == {
        k: n.tolist() for k, n in counts.items()
    }
    for level, given in class_weights(counts, TREE, scheme).items():
        assert torch.equal(given, weights[level])
    assert list(class_weights(LABELS, TREE, scheme, ["fine"])) == ["fine"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_class_without_a_sample(scheme):
    weights = class_weights(LABELS[:4], TREE, scheme)
    assert weights["coarse"].tolist() == [1, 0]
    assert weights["fine"].tolist() == [1, 0, 0]


def test_many_samples():
    """At n samples of a million classes' worth, the effective number is 1 / (1 - b)."""
    counts = {"coarse": torch.tensor([10**7, 1]), "fine": torch.tensor([1, 1, 1])}
    first, second = class_weights(counts, TREE, "effective")["coarse"].tolist()
    assert second / first == pytest.approx(10_000, rel=1e-4)


def test_what_is_refused():
    with pytest.raises(ValueError, match="no scheme 'cubic'.*'inverse', 'sqrt', 'effective'"):
        class_weights(LABELS, TREE, "cubic")
    with pytest.raises(ValueError, match="No sample has a label of level 'fine'"):
        class_weights(torch.tensor([[0, -1]]), TREE)
    with pytest.raises(ValueError, match="label 3 of level 'fine' is out of range"):
        class_weights(torch.tensor([[0, 3]]), TREE)
    with pytest.raises(ValueError, match=r"shape \(8, 3\), one column per level"):
        class_weights(LABELS, cifar10())
    with pytest.raises(ValueError, match="each of the 3 classes of level 'fine'"):
        class_weights({"coarse": torch.tensor([1, 1]), "fine": torch.tensor([1, 1])}, TREE)
    with pytest.raises(ValueError, match="'coarse' must be numbers from 0 upwards"):
        class_weights({"coarse": torch.tensor([1, -1])}, TREE, levels=["coarse"])
