"""Loss weights that are learned by gradient, from the uncertainty of each level."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

__all__ = ["UncertaintyWeighting"]


class UncertaintyWeighting(nn.Module):
    """Adds up the levels' losses with learned weights: homoscedastic uncertainty weighting.

    L = sum over levels k of exp(-s_k) L_k + s_k / 2, with s_k = log sigma_k^2 learned: the form for
    classification, L_k / sigma_k^2 + log sigma_k. For a constant loss s_k settles at log(2 L_k), so
    a level whose loss is small counts more; and a constant factor on L_k changes nothing in the
    long run, so fixed weights cannot be combined with it. The sum may become negative.

    Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for
    Scene Geometry and Semantics", CVPR 2018 (arXiv 1705.07115), equation (10) and the text below
    it.

    The parameter `log_var` (L,) must be given to the optimizer beside the model's. timm's optimizer
    factory does not decay it, since it has one dimension only.

    Args:
        levels: the levels' names. All weights start at 1 (s = 0).

    Raises:
        ValueError: if there are no names, or a name occurs twice.

    Example:
        >>> weighting = UncertaintyWeighting(['coarse', 'fine'])
        >>> losses = {'coarse': torch.tensor(1.), 'fine': torch.tensor(2.)}
        >>> weighting(losses, {'coarse': True, 'fine': True}).item()
        3.0
    """

    def __init__(self, levels: Sequence[str]):
        super().__init__()
        self.levels = tuple(levels)
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise ValueError(f"levels must be different names, at least one, got {list(levels)}.")
        self.log_var = nn.Parameter(torch.zeros(len(self.levels)))

    def forward(
        self, losses: Mapping[str, torch.Tensor], known: Mapping[str, "torch.Tensor | bool"]
    ) -> torch.Tensor:
        """The weighted sum.

        Args:
            losses: scalars by level. Levels that are off are left out; neither of their terms
                counts.
            known: by level, whether any label of the batch was known (of all processes' batches
                where the losses are means over these). Where not, neither term counts: s / 2 alone
                would pull s down.

        Returns:
            A scalar; 0, with zero gradients, where nothing is known.

        Raises:
            ValueError: if a loss is of an unknown level.
        """
        if unknown := sorted(set(losses) - set(self.levels)):
            raise ValueError(
                f"no such level: {', '.join(unknown)}; the levels are {', '.join(self.levels)}."
            )
        total = self.log_var.sum() * 0  # so that the result has a gradient whatever is off
        for s, level in zip(self.log_var, self.levels, strict=True):
            if level in losses:
                counts = torch.as_tensor(known[level], device=s.device)
                total = total + torch.where(counts, (-s).exp() * losses[level] + s / 2, 0)
        return total

    @property
    def weights(self) -> dict[str, float]:
        """The weight exp(-s) of each level's loss as it stands."""
        return dict(zip(self.levels, self.log_var.detach().neg().exp().tolist(), strict=True))
