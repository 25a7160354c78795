"""Metrics of restored images over a whole validation set, accumulated batch by batch.

They are exact over all processes.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

__all__ = ["RestorationEvaluator", "peak_signal_noise_ratio", "structural_similarity"]

_RADIUS = 5  # of SSIM's window: a Gaussian of deviation 1.5, cut off at 3.5 deviations


class RestorationEvaluator:
    """PSNR and SSIM of restored images: means over images of each image's value.

    It has the interface of :class:`timm_branches.hierarchy.HierarchyEvaluator`.

    That is how the denoising literature reports Set12 and BSD68; the PSNR of the pooled error,
    which some libraries give, is lower. An image that is restored without any error has an infinite
    PSNR, and so has the mean then. `psnr` is in dB, `ssim` at most 1; see
    :func:`peak_signal_noise_ratio` and :func:`structural_similarity`.

    Args:
        data_range: The images' largest minus their smallest possible value; they begin at 0.
        border: Pixels to leave out along each edge.
        eight_bit: Clip the output to the range and round it to 256 levels, as it would be stored in
            a file.
        device: Where totals are kept.
        max_samples: Ignore the images that come after this many (padding of a distributed sampler).
        to_image: Turns a model's output into images; by default output is a tensor, or a dict with
            one.

    Attributes:
        metric_names: What :meth:`compute` returns, in this order.
        headline: The same.
        default_metric: What the best epoch is chosen by.

    Raises:
        ValueError: `data_range` is not above 0, or `border` is negative.

    Example:
        >>> evaluator = RestorationEvaluator()
        >>> evaluator.update(torch.full((1, 1, 16, 16), 0.6), torch.full((1, 1, 16, 16), 0.5))
        >>> round(evaluator.compute()['psnr'], 3)  # 10 log10(1 / 0.1^2)
        20.0
    """

    metric_names = headline = ("psnr", "ssim")
    default_metric = "psnr"

    def __init__(
        self,
        data_range: float = 1.0,
        border: int = 0,
        eight_bit: bool = False,
        device: torch.device | str | None = None,
        *,
        max_samples: int | None = None,
        to_image: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        if not 0 < data_range < math.inf or border < 0:
            raise ValueError(
                f"data_range must be above 0 and border at least 0, got {data_range} and {border}."
            )
        self.data_range, self.border, self.eight_bit = data_range, border, eight_bit
        self.device = torch.device(device or "cpu")
        self.max_samples = max_samples
        self.to_image = to_image or _only_image
        self.metrics: dict[str, float] = {}
        self.reset()

    @staticmethod
    def lower_is_better(name: str) -> bool:
        """Of neither metric."""
        return False

    def reset(self) -> None:
        """Forget all images."""
        self.num_samples = 0
        # psnr, ssim, images
        self._sums = torch.zeros(3, dtype=_exact(self.device), device=self.device)

    @torch.no_grad()
    def update(self, output: Any, target: torch.Tensor) -> None:
        """Take one batch.

        Args:
            output: What the model returned; `to_image` makes images (B, C, H, W) of it.
            target: The clean images (B, C, H, W).

        Raises:
            ValueError: The shapes differ, or less than 11 pixels are left between the borders.
        """
        restored = self.to_image(output)
        keep = (
            len(target) if self.max_samples is None else max(0, self.max_samples - self.num_samples)
        )
        _check_images(restored, target)
        restored, target = (
            x[:keep].to(self.device, _exact(self.device)) for x in (restored, target)
        )
        if self.eight_bit:
            step = self.data_range / 255
            restored = (restored.clamp(0, self.data_range) / step).round() * step
        if self.border:
            inside = slice(self.border, -self.border)
            restored, target = restored[..., inside, inside], target[..., inside, inside]
        psnr = peak_signal_noise_ratio(restored, target, self.data_range)
        ssim = structural_similarity(restored, target, self.data_range)
        self._sums += torch.stack([psnr.sum(), ssim.sum(), torch.ones_like(psnr).sum()])
        self.num_samples += len(target)

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """Both metrics, nan without an image.

        Args:
            distributed: Join the sums of all processes. This process's own stay, so that it may go
                on.
        """
        sums = self._sums.clone()
        if distributed:
            dist.all_reduce(sums)
        psnr, ssim, images = sums.tolist()
        if not images:
            return OrderedDict(psnr=math.nan, ssim=math.nan)
        return OrderedDict(psnr=psnr / images, ssim=ssim / images)

    def summary(self) -> OrderedDict[str, float]:
        """Metrics of this process so far."""
        return self.compute()


def peak_signal_noise_ratio(
    output: torch.Tensor, target: torch.Tensor, data_range: float = 1.0
) -> torch.Tensor:
    """PSNR of each image, 10 log10(data_range^2 / mean squared error over its pixels and channels).

    Args:
        output: (B, C, H, W).
        target: The same shape.
        data_range: The images' largest minus their smallest possible value.

    Returns:
        (B,) in dB; infinite without any error.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> output, target = torch.full((1, 1, 2, 2), 10.), torch.zeros(1, 1, 2, 2)
        >>> peak_signal_noise_ratio(output, target, data_range=100)
        tensor([20.])
    """
    _check_images(output, target)
    return 10 * (data_range**2 / (output - target).square().mean((1, 2, 3))).log10()


def structural_similarity(
    output: torch.Tensor, target: torch.Tensor, data_range: float = 1.0
) -> torch.Tensor:
    """SSIM of each image, with the paper's Gaussian window of 11 x 11 pixels and deviation 1.5.

    The mean over channels, and over the pixels whose window lies within the image, as in the
    authors' code and in scikit-image with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False`. (torchmetrics also counts the windows that stick out over the
    edge, on reflected pixels, and gives other values.)

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity",
    IEEE Transactions on Image Processing 13, 2004, equation (13), K1 = 0.01, K2 = 0.03.

    Args:
        output: (B, C, H, W), at least 11 x 11 pixels.
        target: The same shape.
        data_range: The images' largest minus their smallest possible value.

    Returns:
        (B,), 1 for equal images.

    Raises:
        ValueError: The shapes differ, or the images are smaller than the window.

    Example:
        >>> image = torch.rand(1, 3, 16, 16)
        >>> round(float(structural_similarity(image, image)), 6)
        1.0
    """
    _check_images(output, target)
    size = 2 * _RADIUS + 1
    if min(output.shape[2:]) < size:
        raise ValueError(
            f"SSIM takes images of at least {size} x {size} pixels, got {tuple(output.shape)}."
        )
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, dtype=output.dtype, device=output.device)
    window = (-(offsets / 1.5).square() / 2).exp()
    window = window / window.sum()
    x, y = (image.flatten(0, 1)[:, None] for image in (output, target))
    maps = torch.cat([x, y, x * x, y * y, x * y])
    maps = F.conv2d(F.conv2d(maps, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mean_x, mean_y, xx, yy, xy = maps.chunk(5)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (
        (2 * mean_x * mean_y + c1)
        * (2 * (xy - mean_x * mean_y) + c2)
        / (
            (mean_x.square() + mean_y.square() + c1)
            * (xx - mean_x.square() + yy - mean_y.square() + c2)
        )
    )
    return similarity.view(len(output), -1).mean(1) if len(output) else output.new_zeros(0)


def _check_images(output: torch.Tensor, target: torch.Tensor) -> None:
    if output.ndim != 4 or output.shape != target.shape:
        raise ValueError(
            f"images must both be (B, C, H, W), got {tuple(output.shape)} and "
            f"{tuple(target.shape)}."
        )


def _only_image(output: Any) -> torch.Tensor:
    if not isinstance(output, Mapping):
        return output
    if len(output) != 1:
        raise ValueError(f"which of the outputs {list(output)} is the image? Say it with to_image.")
    return next(iter(output.values()))


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
