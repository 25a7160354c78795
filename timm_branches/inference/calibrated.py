"""A model's calibration: read, checked against the model, and held against new data."""

import logging
import math
from collections import OrderedDict
from typing import Any

import torch

from timm_branches.hierarchy.calibration import (
    Calibration,
    information,
    is_wrong,
    labels_to_leaves,
)
from timm_branches.hierarchy.metrics import expected_calibration_error
from timm_branches.model import BranchModel
from timm_branches.taxonomy import Taxonomy
from timm_branches.weights import digest_weights

__all__ = [
    "CalibratedEvaluator",
    "binomial_tail",
    "confidence_drift",
    "kolmogorov_smirnov",
    "model_calibration",
]

_logger = logging.getLogger(__name__)

_UNLIKELY = 0.01  # below this a difference is said


def model_calibration(model: BranchModel, taxonomy: Taxonomy | None) -> Calibration | None:
    """What a model was calibrated to, if it was, and if nothing has changed since.

    Raises:
        ValueError: What the model keeps is no calibration of its tree.
    """
    if model.calibration is None or taxonomy is None:
        return None
    calibration = Calibration.from_dict(model.calibration, taxonomy)
    if calibration.weights != digest_weights(model):
        _logger.warning(
            "The model's weights have changed since it was calibrated: its calibration is not "
            "used. Calibrate it again."
        )
        return None
    return calibration


class CalibratedEvaluator:
    """Whether calibrated answers keep their promise on labelled data.

    Args:
        calibration: What to answer by.
        taxonomy: The tree.
        to_levels: From a model's output to the logits of each level.
    """

    def __init__(self, calibration: Calibration, taxonomy: Taxonomy, to_levels: Any) -> None:
        self.calibration, self.taxonomy, self.to_levels = calibration, taxonomy, to_levels
        self._right: list[torch.Tensor] = []
        self._answers: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []
        self._sure: list[torch.Tensor] = []
        self._sure_before: list[torch.Tensor] = []  # without the temperature
        self._leaf_right: list[torch.Tensor] = []
        self._leaf_known: list[torch.Tensor] = []

    def update(self, output: Any, target: torch.Tensor) -> None:
        """Take a batch: the model's output, and labels (B, L)."""
        levels = [logits.float() for logits in self.to_levels(output)]
        answers = self.calibration.answer(levels, self.taxonomy)
        self._answers.append(answers.prediction.labels.cpu())
        self._sure.append(answers.log_posterior.amax(1).exp().cpu())
        before = (answers.log_posterior * self.calibration.temperature).log_softmax(1)
        self._sure_before.append(before.amax(1).exp().cpu())
        leaf = labels_to_leaves(target, self.taxonomy)
        self._leaf_right.append((answers.log_posterior.argmax(1) == leaf).cpu())
        self._leaf_known.append((leaf >= 0).cpu())
        self._labels.append(target.cpu())

    def compute(self) -> OrderedDict[str, float]:
        """The metrics, in percent, of the samples whose leaf is known; nan without any.

        `answers_right` and `information`; `answers_at_LEVEL` and `answers_none`, which say where
        answers end; `leaf_ece` and `leaf_ece_before`, the expected calibration error of the
        likeliest leaf with the temperature and without.
        """
        answers, labels = self._known()
        depth = (answers >= 0).sum(1)
        result = OrderedDict()
        result["answers_right"] = 100 * float((~is_wrong(answers, labels)).double().mean())
        result["information"] = 100 * float(information(answers, self.taxonomy).mean())
        for level, name in enumerate(self.taxonomy.levels):
            result[f"answers_at_{name}"] = 100 * float((depth == level + 1).double().mean())
        result["answers_none"] = 100 * float((depth == 0).double().mean())
        known = torch.cat(self._leaf_known)
        right_leaf = torch.cat(self._leaf_right)[known]
        for name, sure in (("leaf_ece", self._sure), ("leaf_ece_before", self._sure_before)):
            error = expected_calibration_error(torch.cat(sure)[known], right_leaf)
            result[name] = 100 * float(error)
        return result

    def _known(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers and labels (N, L) where the leaf is known: others cannot judge any answer."""
        known = torch.cat(self._leaf_known)
        return torch.cat(self._answers)[known], torch.cat(self._labels)[known]

    def warnings(self) -> list[str]:
        """Sentences on what speaks against the promise on these data; none if nothing does."""
        answers, labels = self._known()
        found = []
        for level, target in self.calibration.targets.items():
            wrong = is_wrong(answers, labels)
            if level:
                column = self.taxonomy.level_index(level)
                wrong = is_wrong(answers[:, column : column + 1], labels[:, column : column + 1])
            if not len(wrong):
                continue
            right = int((~wrong).sum())
            chance = binomial_tail(right, len(wrong), target)
            if chance < _UNLIKELY:
                whose = f" of {level}" if level else ""
                share = 100 * right / len(wrong)
                found.append(
                    f"{100 * target:g} % right was promised{whose}, and {share:.1f} % of "
                    f"{len(wrong)} are: these data are not like those of the calibration "
                    f"(p = {chance:.1g})."
                )
        drift = confidence_drift(self.calibration, torch.cat(self._sure))
        return found + ([drift] if drift else [])


def confidence_drift(calibration: Calibration, confidences: torch.Tensor) -> str | None:
    """A sentence, if confidences (N,) are not distributed as those of the calibration were."""
    earlier = torch.tensor(calibration.confidences, dtype=torch.double)
    if not len(earlier) or not len(confidences):
        return None
    chance = kolmogorov_smirnov(earlier, confidences.double(), calibration.count)
    if chance >= _UNLIKELY:
        return None
    return (
        f"The model is sure of these data otherwise than of those of its calibration (median "
        f"probability of the likeliest leaf {float(confidences.median()):.2f}, then "
        f"{float(earlier.median()):.2f}; p = {chance:.1g}): its promise may not hold for them."
    )


def binomial_tail(successes: int, count: int, share: float) -> float:
    """P(X <= successes) of a binomial X of `count` trials of probability `share`."""
    k = torch.arange(successes + 1, dtype=torch.double)
    n = torch.tensor(float(count), dtype=torch.double)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    terms = log_choose + k * math.log(share) + (n - k) * math.log1p(-share)
    return min(1.0, float(terms.logsumexp(0).exp()))


def kolmogorov_smirnov(a: torch.Tensor, b: torch.Tensor, count: int | None = None) -> float:
    """The p-value of the two-sample Kolmogorov-Smirnov test, by its asymptotic series.

    Args:
        a: (M,) values, or quantiles of more.
        b: (N,) values.
        count: How many values `a` stands for, if more than it has.
    """
    at = torch.cat([a, b])
    cdf_a = torch.searchsorted(a.sort().values, at, right=True).double() / len(a)
    cdf_b = torch.searchsorted(b.sort().values, at, right=True).double() / len(b)
    m, n = count or len(a), len(b)
    scaled = float((cdf_a - cdf_b).abs().max()) * math.sqrt(m * n / (m + n))
    if scaled < 0.2:  # where the series converges slowly it is 1
        return 1.0
    terms = [(-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101)]
    return min(1.0, max(0.0, 2 * sum(terms)))
