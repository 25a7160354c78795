"""Dense losses against torch, segmentation_models_pytorch, plain Python and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from timm_branches.dense import (
    boundary_loss,
    charbonnier_loss,
    dice_loss,
    focal_loss,
    get_dense_loss,
    lovasz_loss,
    ohem_loss,
    pixel_cross_entropy,
)

NAMES = ["ce", "dice", "ce+dice", "l1", "l2", "charbonnier"]


def make(classes=4, ignored=255, shape=(2, 5, 7), seed=0):
    """Logits (B, K, H, W) and a mask with some ignored pixels; binary masks for one class."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], classes, *shape[1:], generator=generator) * 2
    target = torch.randint(max(2, classes), shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.3] = ignored
    return logits, target


def plain_dice(logits, target, ignored, smooth):
    """Pixel by pixel, in Python's own floats."""
    batch, classes, height, width = logits.shape
    sums = {k: [0.0, 0.0, 0] for k in ([1] if classes == 1 else range(classes))}
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                label = int(target[b, y, x])
                if label in (ignored, -1):
                    continue
                z = (
                    [0.0, *logits[b, :, y, x].tolist()]
                    if classes == 1
                    else logits[b, :, y, x].tolist()
                )
                total = sum(math.exp(v) for v in z)
                for k, entry in sums.items():
                    p = math.exp(z[k]) / total
                    entry[0] += p * (label == k)
                    entry[1] += p
                    entry[2] += label == k
    scores = [(2 * o + smooth) / (p + g + smooth) for o, p, g in sums.values() if g or classes == 1]
    return 1 - sum(scores) / len(scores)


@pytest.mark.parametrize("ignored", [-1, 11, 255])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs(ignored, weighted):
    logits, target = make(ignored=ignored)
    weights = torch.tensor([0.5, 1, 2, 0]) if weighted else None
    expected = F.cross_entropy(logits, target, weights, ignore_index=ignored, label_smoothing=0.1)
    found = pixel_cross_entropy(logits, target, ignored, weights, label_smoothing=0.1)
    torch.testing.assert_close(found, expected)


def test_one_channel_is_binary_cross_entropy():
    logits, target = make(classes=1, ignored=-1)
    known = target >= 0
    expected = F.binary_cross_entropy_with_logits(logits[:, 0][known], target[known].float())
    torch.testing.assert_close(pixel_cross_entropy(logits, target), expected)


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("smooth", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("absent", [False, True])
def test_dice_by_hand(classes, smooth, absent):
    logits, target = make(classes)
    if absent:
        target[target == 1] = 0  # of a binary mask that is all of the foreground
    expected = plain_dice(logits, target, 255, smooth)
    assert float(dice_loss(logits, target, 255, smooth)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("smooth", [0.0, 2.0])
def test_dice_is_smps_where_all_classes_occur(classes, smooth):
    from segmentation_models_pytorch.losses import DiceLoss

    logits, target = make(classes)
    # smp adds its smooth to (I + s) / (I + FP / 2 + FN / 2 + s), which is ours divided by 2
    reference = DiceLoss(
        "binary" if classes == 1 else "multiclass", smooth=smooth / 2, ignore_index=255
    )
    torch.testing.assert_close(dice_loss(logits, target, 255, smooth), reference(logits, target))


def test_dice_of_sure_answers():
    target = torch.tensor([[[0, 1], [1, 0]]])
    right = 100 * F.one_hot(target, 2).movedim(-1, 1).float()
    assert float(dice_loss(right, target, smooth=0)) == 0
    assert float(dice_loss(-right, target, smooth=0)) == 1
    # without foreground, a binary answer of 4 foreground pixels: 1 - 1 / (4 + 1)
    assert float(
        dice_loss(torch.full((1, 1, 2, 2), 100.0), torch.zeros(1, 2, 2).long())
    ) == pytest.approx(0.8)


def test_charbonnier_by_hand_and_towards_l1():
    a, b = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    differences = (a - b).flatten().tolist()
    expected = sum(math.sqrt(d * d + 0.01) for d in differences) / len(differences)
    assert float(charbonnier_loss(a, b, eps=0.1)) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(charbonnier_loss(a, b, eps=1e-9), F.l1_loss(a, b))
    a.requires_grad_()
    charbonnier_loss(a, a.detach()).backward()
    assert a.grad.abs().max() == 0


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("classes", [1, 3])
def test_gradient_against_differences(name, classes):
    logits, target = make(classes, shape=(1, 3, 2))
    loss = get_dense_loss(name, ignore_index=255)
    assert torch.autograd.gradcheck(lambda z: loss(z, target), logits.double().requires_grad_())


@pytest.mark.parametrize("name", NAMES[3:])
def test_gradient_of_restoration_against_differences(name):
    a, b = torch.rand(1, 2, 3, 2, dtype=torch.float64), torch.rand(1, 2, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: get_dense_loss(name)(x, b), a.requires_grad_())


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("ignored", [-1, 255])
@pytest.mark.parametrize("value", [0.0, math.inf])
def test_nothing_labelled_costs_nothing(name, classes, ignored, value):
    logits = torch.full((1, classes, 2, 3), value, requires_grad=True)
    smooth = {} if name == "ce" else {"smooth": 0}
    loss = get_dense_loss(name, ignore_index=ignored, **smooth)(
        logits, torch.full((1, 2, 3), ignored)
    )
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("name", NAMES[:3])
def test_ignored_pixels_have_no_part(name):
    logits, target = make()
    ignored = (target == 255)[:, None].expand_as(logits)
    loss = get_dense_loss(name, ignore_index=255)
    changed = torch.where(ignored, 1e4, logits).requires_grad_()
    expected = loss(logits, target)
    found = loss(changed, target)
    found.backward()
    assert found == expected
    assert changed.grad[ignored].abs().max() == 0
    assert changed.grad[~ignored].abs().min() > 0


def test_a_sum_is_the_sum_of_its_parts():
    logits, target = make()
    weights = torch.tensor([1.0, 2, 3, 4])
    found = get_dense_loss("ce+dice", ignore_index=255, class_weights=weights, smooth=3)(
        logits, target
    )
    expected = pixel_cross_entropy(logits, target, 255, weights) + dice_loss(
        logits, target, 255, smooth=3
    )
    torch.testing.assert_close(found, expected)


def test_l1_and_l2_are_torchs():
    a, b = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    assert get_dense_loss("l1")(a, b) == F.l1_loss(a, b)
    assert get_dense_loss("l2")(a, b) == F.mse_loss(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_float32_inside_under_autocast(name):
    logits, target = make(classes=3, ignored=-1)
    if name in NAMES[3:]:
        target = torch.rand_like(logits).bfloat16()
    half = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = get_dense_loss(name)(half, target)
    assert found.dtype == torch.float32
    whole = target.float() if target.is_floating_point() else target
    torch.testing.assert_close(found, get_dense_loss(name)(half.float(), whole))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_dense_loss("jaccard"), "ce, dice, focal"),
        (lambda: get_dense_loss("dice", class_weights=torch.ones(3)), "no setting 'class_weights'"),
        (lambda: get_dense_loss("l1", ignore_index=3), "no setting 'ignore_index'"),
        (lambda: get_dense_loss("ce", share=True), "no setting 'share'"),
        (
            lambda: get_dense_loss("dice")(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 3)),
            "holds 3",
        ),
        (
            lambda: get_dense_loss("ce")(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 255)),
            "holds 255",
        ),
        (
            lambda: get_dense_loss("ce")(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), -2)),
            "holds -2",
        ),
        (
            lambda: get_dense_loss("ce")(torch.zeros(1, 1, 2, 2), torch.full((1, 2, 2), 2)),
            "holds 2",
        ),
        (
            lambda: dice_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long(), ignore_index=2),
            "one of the 3",
        ),
        (
            lambda: get_dense_loss("ce")(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4).long()),
            r"\(1, 4, 4\)",
        ),
        (lambda: get_dense_loss("ce")(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2)), "integers"),
        (
            lambda: get_dense_loss("l2")(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2)),
            "one shape",
        ),
        (
            lambda: charbonnier_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), eps=0),
            "above 0",
        ),
        (
            lambda: dice_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long(), smooth=-1),
            "upwards",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- losses that look at hard pixels, at regions and at borders


def probabilities_and_target(classes=4, ignored=True):
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(2, classes, 7, 6, generator=generator)
    target = torch.randint(max(2, classes), (2, 7, 6), generator=generator)
    if ignored:
        target[0, :2] = 255
    return logits, target


class TestFocal:
    @pytest.mark.parametrize("gamma", [0, 0.5, 2])
    def test_formula(self, gamma):
        logits, target = probabilities_and_target()
        weights = torch.tensor([1.0, 0.5, 2.0, 0.0])
        p = logits.double().softmax(1)
        values = []
        for b, i, j in (target != 255).nonzero().tolist():
            k = int(target[b, i, j])
            right = p[b, k, i, j]
            values.append(float((1 - right) ** gamma * weights[k] * -right.log()))
        own = focal_loss(logits, target, 255, gamma, weights)
        assert float(own) == pytest.approx(sum(values) / len(values), rel=1e-5)

    def test_binary_is_torchvisions(self):
        from torchvision.ops import sigmoid_focal_loss

        logits, target = probabilities_and_target(1, ignored=False)
        theirs = sigmoid_focal_loss(logits[:, 0], target.float(), -1, 2, "mean")
        torch.testing.assert_close(focal_loss(logits, target), theirs)

    def test_without_gamma_it_is_cross_entropy(self):
        logits, target = probabilities_and_target()
        expected = F.cross_entropy(logits, target, ignore_index=255)
        torch.testing.assert_close(focal_loss(logits, target, 255, 0), expected)


class TestOhem:
    @pytest.mark.parametrize(
        ("threshold", "kept"), [(0.7, 0.0625), (0.05, 0.5), (1e-6, 0.1), (1, 1)]
    )
    def test_by_hand(self, threshold, kept):
        logits, target = probabilities_and_target()
        loss = F.cross_entropy(logits, target, ignore_index=255, reduction="none")
        values = sorted(loss[target != 255].tolist(), reverse=True)
        least = math.ceil(kept * len(values))
        hard = [v for i, v in enumerate(values) if i < least or v > -math.log(threshold)]
        own = ohem_loss(logits, target, 255, threshold, kept)
        assert float(own) == pytest.approx(sum(hard) / len(hard), rel=1e-5)

    def test_easy_pixels_have_no_gradient(self):
        logits = torch.tensor([[[[9.0, 0.0]], [[0.0, 0.0]]]]).requires_grad_()
        ohem_loss(logits, torch.tensor([[[0, 0]]])).backward()
        assert not logits.grad[..., 0].any()
        assert logits.grad[..., 1].any()


class TestLovasz:
    def test_is_smps(self):
        smp = pytest.importorskip("segmentation_models_pytorch")
        logits, target = probabilities_and_target()
        logits.requires_grad_()
        theirs = smp.losses.LovaszLoss("multiclass", per_image=False, ignore_index=255)
        own, expected = lovasz_loss(logits, target, 255), theirs(logits, target)
        torch.testing.assert_close(own, expected)
        (mine,) = torch.autograd.grad(own, logits)
        (other,) = torch.autograd.grad(expected, logits)
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-4)

    @pytest.mark.parametrize("classes", [1, 3])
    def test_sure_answers_give_one_minus_iou(self, classes):
        """At the corners of the cube of errors the extension is the Jaccard loss itself."""
        generator = torch.Generator().manual_seed(0)
        answer = torch.randint(max(2, classes), (2, 5, 5), generator=generator)
        target = torch.randint(max(2, classes), (2, 5, 5), generator=generator)
        if classes == 1:
            logits = (2.0 * answer[:, None] - 1) * 200
        else:
            logits = F.one_hot(answer, classes).movedim(-1, 1) * 400.0
        ious = []
        for k in range(1, 2) if classes == 1 else range(classes):
            a, b = answer == k, target == k
            ious.append(float((a & b).sum() / (a | b).sum()))
        expected = 1 - sum(ious) / len(ious)
        assert float(lovasz_loss(logits, target)) == pytest.approx(expected, abs=1e-5)


class TestBoundary:
    def test_by_hand(self):
        """Each pixel's distance to the nearest one on the other side, by brute force."""
        logits, target = probabilities_and_target(3)
        target[1] = torch.where(target[1] == 2, 0, target[1])  # a class that one image lacks
        p = logits.softmax(1)
        total, count = 0.0, 0
        places = [(i, j) for i in range(7) for j in range(6)]
        for b in range(2):
            for k in range(3):
                inside = {q for q in places if int(target[b][q]) == k}
                for q in places:
                    if int(target[b][q]) == 255:
                        continue
                    count += 1
                    others = inside if q not in inside else set(places) - inside
                    if not inside or not others:
                        continue
                    distance = min(math.dist(q, other) for other in others)
                    sign = -1 if q in inside else 1
                    total += sign * distance / math.hypot(7, 6) * float(p[b, k][q])
        own = boundary_loss(logits, target, 255)
        assert float(own) == pytest.approx(total / count, rel=1e-4)

    def test_a_mask_that_leaves_its_class_costs_more_the_further(self):
        target = torch.zeros(1, 9, 9, dtype=torch.long)
        target[:, 3:6, 3:6] = 1
        losses = []
        for row in (4, 2, 0):
            logits = torch.full((1, 1, 9, 9), -20.0)
            logits[0, 0, row, 4] = 20
            losses.append(float(boundary_loss(logits, target)))
        assert losses[0] < 0 < losses[1] < losses[2]


@pytest.mark.parametrize("name", ["focal", "ohem", "lovasz", "boundary", "ce+lovasz", "dice+focal"])
class TestAllOfThem:
    def test_nothing_labelled(self, name):
        logits = torch.randn(2, 3, 4, 4, requires_grad=True)
        loss = get_dense_loss(name, ignore_index=255)(logits, torch.full((2, 4, 4), 255))
        assert float(loss) == 0
        loss.backward()
        assert not logits.grad.any()

    def test_unlabelled_pixels_do_not_matter(self, name):
        logits, target = probabilities_and_target()
        other = logits.clone()
        other[:, :, :2][target[:, None, :2].expand(-1, 4, -1, -1) == 255] = float("nan")
        loss = get_dense_loss(name, ignore_index=255)
        assert torch.equal(loss(logits, target), loss(other, target))

    def test_half_precision(self, name):
        logits, target = probabilities_and_target()
        loss = get_dense_loss(name, ignore_index=255)
        rough = loss(logits.bfloat16(), target)
        assert rough.dtype == torch.float32
        assert float(rough) == pytest.approx(float(loss(logits, target)), rel=0.05, abs=0.02)

    def test_it_is_learned(self, name):
        torch.manual_seed(0)
        logits = torch.zeros(1, 3, 8, 8, requires_grad=True)
        target = torch.zeros(1, 8, 8, dtype=torch.long)
        target[:, :4, :4], target[:, 4:, 4:] = 1, 2
        loss = get_dense_loss(name)
        optimizer = torch.optim.Adam([logits], 0.1)
        for _ in range(100):
            optimizer.zero_grad()
            loss(logits, target).backward()
            optimizer.step()
        assert float((logits.argmax(1) == target).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: get_dense_loss("jaccard"), "no dense loss 'jaccard'.*lovasz"),
        (lambda: get_dense_loss("ce+ce"), "different ones"),
        (lambda: get_dense_loss("ce+l1"), "one of masks to one of images"),
        (lambda: get_dense_loss("lovasz", class_weights=None), "no setting 'class_weights'"),
        (lambda: focal_loss(*probabilities_and_target(), 255, -1), "gamma must be"),
        (lambda: ohem_loss(*probabilities_and_target(), 255, 0), "threshold must be"),
        (lambda: ohem_loss(*probabilities_and_target(), 255, min_kept=2), "min_kept must be"),
        (lambda: lovasz_loss(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), 5)), "holds 5"),
    ],
)
def test_refused_losses(make, words):
    with pytest.raises(ValueError, match=words):
        make()
