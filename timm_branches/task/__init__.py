"""Training tasks in timm's sense: a model with its loss, usable from anyone's own loop."""

from timm_branches.task.base import HeadsTask, base_model
from timm_branches.task.branch import BranchTask, FlatTask
from timm_branches.task.dense import DenseTask
from timm_branches.task.evaluator import Evaluator
from timm_branches.task.joint import JointTask

__all__ = [
    "BranchTask",
    "DenseTask",
    "Evaluator",
    "FlatTask",
    "HeadsTask",
    "JointTask",
    "base_model",
]
