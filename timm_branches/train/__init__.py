"""Training: the loop, its settings, checkpoints, logs and plots."""

from timm_branches.train.calibrate import calibrate
from timm_branches.train.config import FitConfig, add_fit_arguments
from timm_branches.train.evaluation import evaluate, try_evaluation
from timm_branches.train.loop import FitResult, fit
from timm_branches.train.lr import PiecewiseLR
from timm_branches.train.process import is_primary, setup_device

__all__ = [
    "FitConfig",
    "FitResult",
    "PiecewiseLR",
    "add_fit_arguments",
    "calibrate",
    "evaluate",
    "fit",
    "is_primary",
    "setup_device",
    "try_evaluation",
]
