"""Probes of stages, against scikit-learn, and a planted answer."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score

from timm_branches import Taxonomy, create_branch_model
from timm_branches.cli import main
from timm_branches.data import HierarchicalDataset
from timm_branches.train.suggest_taps import (
    _choose,
    _fit,
    adjusted_rand_index,
    suggest_taps,
    tree_agreement,
)

TREE = Taxonomy(
    ["warm/red", "warm/orange", "warm/pink", "cold/blue", "cold/green", "cold/cyan"],
    levels=["kind", "name"],
)


def test_probe_is_logistic_regression():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=g)
    y = (x @ torch.randn(5, 3, generator=g) + torch.randn(200, 3, generator=g)).argmax(1)
    weight, bias = _fit(x, y, 3, 0.05)
    # sklearn's C is the inverse of N times the penalty
    want = LogisticRegression(C=1 / (200 * 0.05), tol=1e-8, max_iter=1000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weight.T.numpy(), want.coef_, atol=2e-3)
    np.testing.assert_allclose(
        (bias - bias.mean()).numpy(), want.intercept_ - want.intercept_.mean(), atol=2e-3
    )


def test_rand_index():
    g = torch.Generator().manual_seed(0)
    for groups in (2, 3, 10):
        a, b = torch.randint(groups, (2, 30), generator=g)
        assert adjusted_rand_index(a, b) == pytest.approx(adjusted_rand_score(a, b))
    assert adjusted_rand_index(a, (a + 1) % 10) == pytest.approx(1)
    assert adjusted_rand_index(torch.zeros(4).long(), torch.zeros(4).long()) == 1


def cell(right, count=100):
    return (torch.arange(count) < right).double()


def test_choice():
    """The shallowest within a standard error of the best, and never above the level before."""
    assert _choose([[cell(50)], [cell(90)], [cell(90)]]) == [1]
    # ten images to one side and eleven to the other are within an error
    assert _choose([[cell(80)], [cell(90)], [cell(91).roll(10)]]) == [1]
    assert _choose([[cell(90)], [cell(80)], [cell(91).roll(10)]]) == [0]
    assert _choose([[cell(50), cell(95)], [cell(90), cell(95)]]) == [1, 1]
    assert _choose([[cell(90), cell(50)], [cell(90), cell(90)]]) == [0, 1]


def colours(count, seed):
    """Patches whose colour says all: a wide layer reads it at once."""
    random = np.random.default_rng(seed)
    values = [(200, 40, 40), (210, 120, 30), (220, 120, 160), (30, 40, 200), (40, 180, 60)]
    values.append((40, 180, 190))
    leaf = random.integers(0, 6, count)
    pixels = np.array(values)[leaf][:, None, None] + random.normal(0, 25, (count, 32, 32, 3))
    images = pixels.clip(0, 255).astype(np.uint8)
    return images, leaf


def dataset(count, seed):
    images, leaf = colours(count, seed)
    labels = TREE.expand(torch.from_numpy(leaf))
    return HierarchicalDataset(images, labels, TREE)


def make_model():
    torch.manual_seed(0)
    return create_branch_model("test_resnet", taps=[2, 5], num_classes=2, img_size=32)


def test_colours_are_read_everywhere():
    found = suggest_taps(make_model(), dataset(240, 0), dataset(120, 1))
    assert found.stages == (2, 5)
    assert (found.accuracy > 90).all()
    assert found.taps[0] == 2
    assert found.count == (120, 120)
    share = found.accuracy[0, 1].item() / 100
    assert found.error[0, 1].item() == pytest.approx(100 * (share * (1 - share) / 120) ** 0.5)
    assert str(found).splitlines()[0].split() == ["stage", "kind", "name"]
    again = suggest_taps(make_model(), dataset(240, 0), dataset(120, 1))
    assert torch.equal(found.accuracy, again.accuracy)


def test_labels_that_are_known_coarsely_count_for_their_level():
    train, val = dataset(240, 0), dataset(120, 1)
    val.labels[:100, 1] = -1
    found = suggest_taps(make_model(), train, val)
    assert found.count == (120, 20)


def test_what_cannot_be_read():
    data = dataset(60, 0)
    one_kind = HierarchicalDataset(
        data.images, TREE.expand(torch.zeros(60, dtype=torch.long)), TREE
    )
    with pytest.raises(ValueError, match="'kind' has fewer than two classes"):
        suggest_taps(make_model(), one_kind, data)
    flat = HierarchicalDataset(data.images, torch.zeros(60, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="have no tree"):
        suggest_taps(make_model(), flat, data)
    model = create_branch_model("test_resnet", taps=["layer1"], num_classes=2, img_size=32)
    with pytest.raises(ValueError, match="compares stages, not the module layer1"):
        suggest_taps(model, data, data)


def test_agreement_of_a_tree():
    g = torch.Generator().manual_seed(0)
    leaf = torch.arange(6).repeat(20)
    centres = torch.randn(2, 8, generator=g).repeat_interleave(3, 0) * 5
    centres += torch.randn(6, 8, generator=g)
    x = centres[leaf] + 0.1 * torch.randn(120, 8, generator=g)
    same = tree_agreement(x, TREE.expand(leaf), TREE)
    assert same.index == (1.0,)
    assert same.elsewhere == ()
    other = Taxonomy(["a/red", "b/orange", "a/pink", "b/blue", "a/green", "b/cyan"])
    mixed = tree_agreement(x, other.expand(leaf), other)
    assert mixed.index[0] < same.index[0]
    assert mixed.elsewhere
    assert "is seen next to" in str(mixed)
    flat = Taxonomy(["a", "b", "c"])
    assert tree_agreement(x[:60], flat.expand(leaf[:60] % 3), flat).index == ()


def test_command_line(tmp_path, capsys):
    for split, count in (("train", 90), ("val", 60)):
        images, leaf = colours(count, len(split))
        for i, (image, at) in enumerate(zip(images, leaf, strict=True)):
            folder = tmp_path.joinpath("photos", split, *TREE.leaves[at])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    picture = tmp_path / "taps.png"
    photos = str(tmp_path / "photos")
    command = ["suggest-taps", "test_resnet", photos, "--img-size", "32"]
    assert main([*command, "--picture", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert "the weights are random" in err
    taps = out.split("--taps ")[1].splitlines()[0].split()
    assert len(taps) == 2
    assert "Percent of 60 validation images, probes of 90 images" in out
    assert picture.stat().st_size > 3000
    for arguments, message in (
        (["suggest-taps", "resnet", photos], "no architecture of timm"),
        (["suggest-taps", "test_resnet", photos + "/train/warm"], "one level of labels"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
