"""Loss-weight schedules: how much each level's loss counts in each epoch.

A branch network is trained on one loss, the weighted sum of its levels' losses. B-CNN's "branch
training strategy" moves the weight from the coarse level to the fine one as training proceeds. A
schedule answers one question, `schedule(epoch)`: the weights used *during* that epoch. Epochs count
from 0, as timm's training loop does, and a key in a schedule is the first epoch in which its
weights act. Keras code that switches weights "at the end of epoch 8", as B-CNN's does, is therefore
written with key 9 here.

Nothing in this package needs torch: a schedule can be printed, plotted or stored anywhere. (Weights
that are learned by gradient are in `timm_branches.task.uncertainty`.)

Source: Zhu and Bain, "B-CNN: Branch Convolutional Neural Network for Hierarchical Classification",
arXiv:1709.09890.
"""

from timm_branches.schedules.adaptive import DynamicSchedule
from timm_branches.schedules.base import LossWeightSchedule
from timm_branches.schedules.keyed import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    StepSchedule,
)
from timm_branches.schedules.parse import PRESETS, get_schedule, parse_schedule

__all__ = [
    "PRESETS",
    "ConstantSchedule",
    "CosineSchedule",
    "DynamicSchedule",
    "LinearSchedule",
    "LossWeightSchedule",
    "StepSchedule",
    "get_schedule",
    "parse_schedule",
]
