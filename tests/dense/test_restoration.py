"""PSNR and SSIM against scikit-image and torchmetrics."""

import math

import numpy as np
import pytest
import torch

from timm_branches.dense import RestorationEvaluator, peak_signal_noise_ratio, structural_similarity

SIZES = [(1, 11, 11), (1, 24, 31), (3, 17, 40)]


def make(shape=(1, 24, 31), data_range=1.0, images=3, seed=0):
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 0.7, shape[-1])
    clean = np.clip(ramp + 0.3 * rng.random((images, *shape)), 0, 1)
    noisy = clean + rng.normal(0, 0.1, clean.shape) * np.arange(1, images + 1).reshape(-1, 1, 1, 1)
    return torch.from_numpy(noisy * data_range), torch.from_numpy(clean * data_range)


def skimage_ssim(output, target, data_range):
    from skimage.metrics import structural_similarity as reference

    return [
        reference(
            b.numpy(),
            a.numpy(),
            data_range=data_range,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(output, target, strict=True)
    ]


def skimage_psnr(output, target, data_range):
    from skimage.metrics import peak_signal_noise_ratio as reference

    return [
        reference(b.numpy(), a.numpy(), data_range=data_range)
        for a, b in zip(output, target, strict=True)
    ]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_values_are_scikit_images(shape, data_range):
    output, target = make(shape, data_range)
    assert structural_similarity(output, target, data_range).tolist() == pytest.approx(
        skimage_ssim(output, target, data_range), abs=1e-9
    )
    assert peak_signal_noise_ratio(output, target, data_range).tolist() == pytest.approx(
        skimage_psnr(output, target, data_range), abs=1e-9
    )


def test_ssim_is_torchmetrics_away_from_the_edge():
    from torchmetrics.functional.image import structural_similarity_index_measure

    output, target = make((2, 30, 20))
    _, maps = structural_similarity_index_measure(
        output, target, data_range=1.0, return_full_image=True, reduction="none"
    )
    torch.testing.assert_close(
        structural_similarity(output, target), maps[..., 5:-5, 5:-5].mean((1, 2, 3))
    )


@pytest.mark.parametrize("border", [0, 3])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_evaluator_gives_means_over_images(border, data_range, eight_bit):
    output, target = make((3, 26, 33), data_range)
    evaluator = RestorationEvaluator(data_range, border, eight_bit)
    for i in range(0, 3, 2):
        evaluator.update({"clean": output[i : i + 2]}, target[i : i + 2])
    if eight_bit:  # what comes back from a file
        stored = np.uint8(np.rint(np.clip(output.numpy() / data_range, 0, 1) * 255))
        output = torch.from_numpy(stored.astype(np.float64)) * data_range / 255
    if border:
        output, target = (x[..., border:-border, border:-border] for x in (output, target))
    metrics = evaluator.compute()
    assert metrics["psnr"] == pytest.approx(
        np.mean(skimage_psnr(output, target, data_range)), abs=1e-9
    )
    assert metrics["ssim"] == pytest.approx(
        np.mean(skimage_ssim(output, target, data_range)), abs=1e-9
    )
    pooled = 10 * math.log10(data_range**2 / float((output - target).square().mean()))
    # noise differs from image to image: the two definitions do
    assert metrics["psnr"] > pooled + 0.1


def test_float32_images_are_measured_in_float64():
    output, target = (x.float() for x in make(images=2))
    evaluator = RestorationEvaluator()
    evaluator.update(output, target)
    expected = skimage_psnr(output.double(), target.double(), 1.0)
    assert evaluator.compute()["psnr"] == pytest.approx(np.mean(expected), rel=1e-12)


def test_padding_of_the_sampler_does_not_count_and_reset_forgets():
    output, target = make()
    limited, expected = RestorationEvaluator(max_samples=2), RestorationEvaluator()
    limited.update(output.flip(0), target)
    limited.reset()
    expected.update(output[:2], target[:2])
    for part in (slice(0, 1), slice(1, 3), slice(0, 3)):
        limited.update(output[part], target[part])
    assert limited.num_samples == 2
    assert limited.compute() == pytest.approx(expected.compute(), rel=1e-12)


def test_without_error_and_without_images():
    evaluator = RestorationEvaluator()
    assert all(math.isnan(value) for value in evaluator.compute().values())
    evaluator.update(torch.ones(1, 1, 12, 12), torch.ones(1, 1, 12, 12))
    assert evaluator.compute()["psnr"] == math.inf
    assert evaluator.compute()["ssim"] == pytest.approx(1)
    assert not any(map(RestorationEvaluator.lower_is_better, evaluator.metric_names))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RestorationEvaluator(0), "data_range"),
        (lambda: RestorationEvaluator(border=-1), "border"),
        (
            lambda: RestorationEvaluator().update(
                torch.zeros(1, 1, 10, 20), torch.zeros(1, 1, 10, 20)
            ),
            "11 x 11",
        ),
        (
            lambda: RestorationEvaluator(border=6).update(
                torch.zeros(1, 1, 22, 22), torch.zeros(1, 1, 22, 22)
            ),
            "11 x 11",
        ),
        (
            lambda: RestorationEvaluator().update(
                torch.zeros(1, 3, 20, 20), torch.zeros(1, 1, 20, 20)
            ),
            "must both",
        ),
        (
            lambda: RestorationEvaluator().update({"a": 1, "b": 2}, torch.zeros(1, 1, 20, 20)),
            "to_image",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
