"""HierarchicalMixup against timm's own images and hand-computed soft labels."""

import numpy as np
import pytest
import torch
from timm.data import Mixup

from timm_branches.data import HierarchicalMixup, split_levels

SIZES = [2, 3]
LABELS = torch.tensor([[0, 2], [1, -1], [1, 0], [0, 1]])  # mixed as 0 with 3, 1 with 2


def fixed(lam, **kwargs):
    """A mixup that draws the given ratio."""
    mixup = HierarchicalMixup(num_classes=SIZES, **kwargs)
    mixup._params_per_batch = lambda: (lam, False)
    return mixup


def test_soft_labels_by_hand():
    _, target = fixed(0.75, label_smoothing=0.0)(torch.zeros(4, 3, 8, 8), LABELS)
    expected = [
        [1, 0, 0, 0.25, 0.75],  # coarse 0 + 0; fine 2 with 1
        [0, 1, 0.25, 0, 0],  # its own fine label is unknown: only the partner's quarter is left
        [0, 1, 0.75, 0, 0],
        [1, 0, 0, 0.75, 0.25],
    ]
    torch.testing.assert_close(target, torch.tensor(expected))
    torch.testing.assert_close(target[:, 2:].sum(1), torch.tensor([1, 0.25, 0.75, 1]))


def test_smoothing_is_per_level_and_spares_the_unknown():
    target = HierarchicalMixup(num_classes=SIZES, label_smoothing=0.3).soft_labels(LABELS)
    torch.testing.assert_close(target[0], torch.tensor([0.85, 0.15, 0.1, 0.1, 0.8]))
    torch.testing.assert_close(target[1], torch.tensor([0.15, 0.85, 0, 0, 0]))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_equals_timm_on_each_level(mode, alphas):
    labels = LABELS.clamp(min=0)
    images = torch.rand(4, 3, 16, 16)
    options = {
        "mixup_alpha": alphas[0],
        "cutmix_alpha": alphas[1],
        "mode": mode,
        "label_smoothing": 0.1,
    }
    np.random.seed(3)
    mixed, target = HierarchicalMixup(num_classes=SIZES, **options)(images.clone(), labels)
    for level, part in enumerate(split_levels(target, SIZES)):
        np.random.seed(3)
        timm_mixed, timm_target = Mixup(num_classes=SIZES[level], **options)(
            images.clone(), labels[:, level]
        )
        torch.testing.assert_close(mixed, timm_mixed, rtol=0, atol=0)
        torch.testing.assert_close(part, timm_target)


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_odd_batches(mode):
    images, target = HierarchicalMixup(num_classes=SIZES, mode=mode)(
        torch.rand(3, 1, 8, 8), LABELS[[0, 2, 3]]
    )
    assert images.shape == (3, 1, 8, 8)
    torch.testing.assert_close(target.sum(1), torch.full((3,), 2.0))


def test_disabled_gives_plain_labels():
    mixup = HierarchicalMixup(num_classes=SIZES, label_smoothing=0.0)
    mixup.mixup_enabled = False
    images = torch.rand(4, 1, 8, 8)
    mixed, target = mixup(images.clone(), LABELS)
    assert torch.equal(mixed, images)
    assert target.tolist()[1] == [0, 1, 0, 0, 0]


def test_half_precision_images_leave_the_target_in_float():
    _, target = HierarchicalMixup(num_classes=SIZES, mode="elem")(
        torch.rand(4, 1, 8, 8).bfloat16(), LABELS
    )
    assert target.dtype == torch.float32
    torch.testing.assert_close(target[:, :2].sum(1), torch.ones(4))


def test_errors():
    with pytest.raises(ValueError, match="mode='pair' needs an even batch, not 3"):
        HierarchicalMixup(num_classes=SIZES, mode="pair")(torch.rand(3, 1, 8, 8), LABELS[:3])
    with pytest.raises(ValueError, match="one column for each of the levels"):
        HierarchicalMixup(num_classes=SIZES)(torch.rand(4, 1, 8, 8), LABELS[:, :1])
    with pytest.raises(ValueError, match="level 0 has 2 classes"):
        HierarchicalMixup(num_classes=SIZES)(torch.rand(4, 1, 8, 8), LABELS + 1)
    with pytest.raises(ValueError, match="4 images but 3 labels"):
        HierarchicalMixup(num_classes=SIZES)(torch.rand(4, 1, 8, 8), LABELS[:3])
    with pytest.raises(ValueError, match="nothing to mix"):
        HierarchicalMixup(mixup_alpha=0.0, num_classes=SIZES)
    with pytest.raises(ValueError, match="num_classes"):
        HierarchicalMixup(num_classes=10)
    with pytest.raises(ValueError, match="mode must be"):
        HierarchicalMixup(num_classes=SIZES, mode="half")
    with pytest.raises(ValueError, match="need 5"):
        split_levels(torch.zeros(2, 4), SIZES)
