"""Mixup and CutMix for labels on several levels, some of which may be unknown."""

from collections.abc import Sequence

import torch
from timm.data import Mixup

__all__ = ["HierarchicalMixup", "split_levels"]


def split_levels(target: torch.Tensor, num_classes: Sequence[int]) -> list[torch.Tensor]:
    """Cut a dense target (or concatenated logits) into its levels.

    Args:
        target: (..., sum(num_classes)).
        num_classes: Classes of each level.

    Returns:
        One tensor (..., K_l) a level, views of `target`.

    Raises:
        ValueError: If the last dimension is not sum(num_classes).

    Example:
        >>> [part.shape[1] for part in split_levels(torch.zeros(4, 9), [2, 7])]
        [2, 7]
    """
    sizes = [int(size) for size in num_classes]
    if target.shape[-1] != sum(sizes):
        raise ValueError(
            f"the target has {target.shape[-1]} columns (shape {tuple(target.shape)}), but the "
            f"levels {sizes} need {sum(sizes)}."
        )
    return list(target.split(sizes, dim=-1))


class HierarchicalMixup(Mixup):
    """timm's Mixup/CutMix with one soft label a level.

    Images are mixed by timm's own code, in its modes `'batch'`, `'pair'` and `'elem'`. Labels (B,
    L) become one dense target (B, sum(num_classes)), the levels side by side, each smoothed on its
    own. A level whose label is unknown (-1) is a row of zeros, so it costs nothing in a soft
    cross-entropy; mixed with a known label, the level keeps only the known part's share of the mass
    (`lam`), because nothing is known of the rest.

    All other arguments are timm's. As in timm, the mixing ratios come from numpy's global random
    state.

    Args:
        mixup_alpha: Mixup is active if > 0.
        cutmix_alpha: CutMix is active if > 0.
        cutmix_minmax: Smallest and largest CutMix box as a share of the image; replaces
            `cutmix_alpha`.
        prob: Probability of mixing, per batch or element.
        switch_prob: Probability of CutMix rather than mixup where both are active.
        mode: `'batch'`, `'pair'` or `'elem'`.
        correct_lam: Correct the ratio where the CutMix box is clipped by the border.
        label_smoothing: Smoothing of every known level: 1 - s + s/K for the label, s/K for the
            others.
        num_classes: Classes of each level, e.g. `taxonomy.num_classes`.

    Raises:
        ValueError: For an unknown mode, or if neither mixup nor CutMix is active, or num_classes is
            empty.

    Example:
        >>> mixup = HierarchicalMixup(num_classes=[2, 7], label_smoothing=0.0)
        >>> labels = torch.tensor([[0, 3], [1, -1], [1, 5], [0, 0]])
        >>> images, target = mixup(torch.rand(4, 3, 32, 32), labels)
        >>> target.shape
        torch.Size([4, 9])
    """

    # What timm takes as one number is a list here: it is timm's `mixup_target` alone that reads it,
    # and that is ours.
    num_classes: list[int]

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: Sequence[int] = (),
    ) -> None:
        if mode not in ("batch", "pair", "elem"):
            raise ValueError(f"mode must be 'batch', 'pair' or 'elem', not {mode!r}.")
        if not (mixup_alpha > 0 or cutmix_alpha > 0 or cutmix_minmax is not None):
            raise ValueError(
                f"nothing to mix: mixup_alpha={mixup_alpha} and cutmix_alpha={cutmix_alpha}; one "
                "must be above 0, or cutmix_minmax given."
            )
        if isinstance(num_classes, int) or not len(num_classes):
            raise ValueError(
                "num_classes must hold the classes of each level, e.g. [2, 7, 10], not "
                f"{num_classes!r}."
            )
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}.")
        super().__init__(
            mixup_alpha,
            cutmix_alpha,
            cutmix_minmax,
            prob,
            switch_prob,
            mode,
            correct_lam,
            label_smoothing,
        )
        self.num_classes = [int(size) for size in num_classes]

    def soft_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """The dense target of labels that are not mixed.

        Args:
            labels: (B, L) class indices, -1 for unknown.

        Returns:
            (B, sum(num_classes)) float32, smoothed, zero where the level is unknown.

        Raises:
            ValueError: If the number of levels differs from num_classes, or an index is out of
                range (checked on the CPU only, where it costs no synchronisation).
        """
        if labels.ndim == 1 and len(self.num_classes) == 1:
            labels = labels[:, None]
        if labels.ndim != 2 or labels.shape[1] != len(self.num_classes):
            raise ValueError(
                f"labels must be (batch, {len(self.num_classes)}), one column for each of the "
                f"levels {self.num_classes}, not {tuple(labels.shape)}."
            )
        labels = labels.long()
        parts = []
        for level, size in enumerate(self.num_classes):
            label = labels[:, level : level + 1]
            if labels.device.type == "cpu" and ((label >= size) | (label < -1)).any():
                raise ValueError(
                    f"level {level} has {size} classes, but its labels range from "
                    f"{int(label.min())} to "
                    f"{int(label.max())}; classes are 0 to {size - 1}, -1 is unknown."
                )
            off = self.label_smoothing / size
            part = torch.full((len(labels), size), off, device=labels.device)
            part.scatter_(1, label.clamp(min=0), 1.0 - self.label_smoothing + off)
            parts.append(part * (label >= 0))
        return torch.cat(parts, dim=1)

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch with itself in reverse order.

        Args:
            x: Images (B, C, H, W), changed in place as in timm.
            target: (B, L) class indices, -1 for unknown.

        Returns:
            The images, and the dense target (B, sum(num_classes)).

        Raises:
            ValueError: If the batch sizes differ, or mode 'pair' is given an odd batch. The other
                modes take any: the middle element is then mixed with itself.
        """
        if len(x) != len(target):
            raise ValueError(f"{len(x)} images but {len(target)} labels.")
        if self.mode == "pair" and len(x) % 2:
            raise ValueError(
                f"mode='pair' needs an even batch, not {len(x)} images: take an even batch size "
                "with drop_last=True, or mode='batch' or 'elem'."
            )
        # first: a wrong label must not leave the images half mixed
        clean = self.soft_labels(target)
        if self.mode == "elem":
            lam = self._mix_elem(x)
        elif self.mode == "pair":
            lam = self._mix_pair(x)
        else:
            lam = self._mix_batch(x)
        if isinstance(lam, torch.Tensor):
            # images in half precision would give ratios in half precision
            lam = lam.to(clean.dtype)
        return x, clean * lam + clean.flip(0) * (1.0 - lam)
