"""Learning and answering on a label hierarchy: losses, decoders, metrics."""

from timm_branches.hierarchy.class_balance import class_weights
from timm_branches.hierarchy.decode import (
    DECODERS,
    Prediction,
    back_off,
    decode,
    leaf_log_probs,
    register_decoder,
)
from timm_branches.hierarchy.evaluator import HierarchyEvaluator
from timm_branches.hierarchy.metric_registry import METRICS, EvaluationBatch, register_metric
from timm_branches.hierarchy.metrics import (
    consistency,
    full_path_accuracy,
    level_accuracy,
    sum_upwards,
)

__all__ = [
    "DECODERS",
    "METRICS",
    "EvaluationBatch",
    "HierarchyEvaluator",
    "Prediction",
    "back_off",
    "class_weights",
    "consistency",
    "decode",
    "full_path_accuracy",
    "leaf_log_probs",
    "level_accuracy",
    "register_decoder",
    "register_metric",
    "sum_upwards",
]
