"""Learning and answering on a label hierarchy: losses, decoders, metrics."""

from timm_branches.hierarchy.class_balance import class_weights
from timm_branches.hierarchy.cost import (
    COSTS,
    answer_costs,
    best_hf_nodes,
    cost_decoder,
    cost_matrix,
    least_cost,
)
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
    "COSTS",
    "DECODERS",
    "METRICS",
    "EvaluationBatch",
    "HierarchyEvaluator",
    "Prediction",
    "answer_costs",
    "back_off",
    "best_hf_nodes",
    "class_weights",
    "consistency",
    "cost_decoder",
    "cost_matrix",
    "decode",
    "full_path_accuracy",
    "leaf_log_probs",
    "least_cost",
    "level_accuracy",
    "register_decoder",
    "register_metric",
    "sum_upwards",
]
