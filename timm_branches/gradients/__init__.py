"""See the gradient, of our models and of any module.

- :func:`gradient_report`: which loss reaches which stage, how strongly, and why one does not.
- :func:`path_gradients`, :func:`frame_gradients`: through which skip of a decoder, through which
  frames of a clip.
- :func:`check_model`: a check-up before a long training, in sentences.
- :func:`conv2d_weight_grad`, :func:`diagnose_kernel_gradients`: the kernels of a convolution.
- :func:`branch_cosines`: whether the branches pull the shared layers the same way.

Example:
    >>> from torch import nn, randn
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> report = gradient_report(net, randn(16, 4), lambda output: output.square().mean())
    >>> [report.cell('loss', stage).status for stage in report.stages]
    ['ok', 'ok']
"""

from timm_branches.gradients.conflicts import branch_cosines
from timm_branches.gradients.conv import conv2d_weight_grad
from timm_branches.gradients.doctor import Diagnosis, check_model
from timm_branches.gradients.frames import FrameGradients, frame_gradients
from timm_branches.gradients.kernel_figures import plot_kernel_gradients
from timm_branches.gradients.kernels import diagnose_kernel_gradients
from timm_branches.gradients.objective import group_by_stage
from timm_branches.gradients.report import GradientReport, gradient_report
from timm_branches.gradients.report_figures import plot_conflicts, plot_report
from timm_branches.gradients.routes import PathGradients, path_gradients

__all__ = [
    "Diagnosis",
    "FrameGradients",
    "GradientReport",
    "PathGradients",
    "branch_cosines",
    "check_model",
    "conv2d_weight_grad",
    "diagnose_kernel_gradients",
    "frame_gradients",
    "gradient_report",
    "group_by_stage",
    "path_gradients",
    "plot_conflicts",
    "plot_kernel_gradients",
    "plot_report",
]
