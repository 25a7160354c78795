"""What single pixels tell: a baseline that a network for segmentation has to beat.

It is in the package, not beside its recipe, for whoever measures a network of their own.
"""

from typing import Any

import numpy as np
import torch

__all__ = ["PixelBaseline"]


class PixelBaseline:
    """Logistic regression on a pixel's own colour, squares and products: no neighbourhood.

    Optionally the height in the image counts, too.

    Args:
        data: Training images and masks, as they are.
        num_classes: Classes of the masks.
        height: Whether it knows the pixel's row, from 0 at the top to 1.
        pixels: How many to learn from, drawn at random, as many from each image.

    Shapes: images (B, C, H, W) -> log-probabilities (B, num_classes, H, W); a class that no pixel
        has stays near 0.

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> images = torch.rand(4, 3, 16, 16)
        >>> masks = (images[:, 0] > 0.5).long()                     # what is red
        >>> baseline = PixelBaseline(list(zip(images, masks)), 2, height=False)
        >>> bool((baseline(images).argmax(1) == masks).float().mean() > 0.9)
        True
    """

    def __init__(self, data: Any, num_classes: int, height: bool, pixels: int = 20_000):
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import PolynomialFeatures, StandardScaler

        rng = np.random.default_rng(0)
        self.height, self.num_classes = height, num_classes
        features, labels = [], []
        for image, mask in (data[i] for i in range(len(data))):
            where = np.flatnonzero(mask.flatten().numpy() >= 0)
            where = rng.choice(where, min(len(where), -(-pixels // len(data))), replace=False)
            features.append(self.features(image)[where])
            labels.append(mask.flatten().numpy()[where])
        self.model = make_pipeline(
            PolynomialFeatures(2, include_bias=False),
            StandardScaler(),
            LogisticRegression(max_iter=1000),
        )
        self.model.fit(np.concatenate(features), np.concatenate(labels))

    def features(self, image: torch.Tensor) -> np.ndarray:
        """(C, H, W) -> (H * W, C or C + 1)."""
        rows = torch.linspace(0, 1, image.shape[1]).view(1, -1, 1).expand(1, *image.shape[1:])
        return torch.cat([image, rows] if self.height else [image]).flatten(1).T.numpy()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> log-probabilities (B, K, H, W)."""
        probabilities = images.new_zeros(len(images), self.num_classes, *images.shape[2:])
        for image, out in zip(images.cpu(), probabilities, strict=True):
            found = torch.from_numpy(self.model.predict_proba(self.features(image))).T.to(out)
            out[self.model.classes_] = found.view(-1, *out.shape[1:])
        return probabilities.clamp(min=1e-12).log()
