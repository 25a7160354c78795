"""Gradients of convolution kernels: collected, and why they are equal across channels.

A filter's gradient in channel c is a cross-correlation of input channel c with the filter's own map
of dE/dy (the equation is in :mod:`timm_branches.gradients.conv`). So equality has few causes, and
each is looked for on its own:

- across *channels*: input channels that are equal, like those of a grey picture read as RGB. Copies
  that differ in brightness and contrast only, as after a normalisation per channel, give gradients
  that look alike;
- across *filters*: a dE/dy that is the same for all of them. A target broadcast over the filters
  asks that of them;
- zero: a filter that the loss does not depend on;
- else the gradient is wrong: a handwritten backward pass that sums over channels, say.

A well-known case: a colour picture, an untrained 32 x 32 convolution of 3 channels to 3 filters,
and the mean absolute difference to *one* grey picture, whose (1, 1, 225, 225) broadcasts over the
(1, 3, 225, 225) output. The broadcast does nothing to channels. It gives all filters one target,
and where all outputs lie below it, dE/dy is the same constant for all of them: filters, not
channels, get (nearly) equal gradients, those of box sums of the input, and how nearly depends on
the random weights. Channels get equal gradients only if the file is a grey one, read as three equal
channels. For a colour photograph they differ by tens of percent, but as colours go together they
correlate, and pictures that are each scaled to their own extremes then look the same. Panels with
one scale (:func:`timm_branches.gradients.kernel_figures.plot_kernel_gradients`) and numbers
(:func:`diagnose_kernel_gradients`) tell which it was.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from timm_branches.gradients.conv import conv2d_weight_grad

__all__ = ["KernelDiagnosis", "diagnose_kernel_gradients", "kernel_gradients"]

_SAME = 1e-6  # two maps are the same if they differ by less than this part of their norm


def kernel_gradients(model: nn.Module, loss: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The gradients of the kernels of all 2-D convolutions.

    Args:
        model: A network, or one `nn.Conv2d`.
        loss: A scalar to differentiate; `.grad` stays as it is, and so does the graph. None reads
            what `loss.backward()` has left in `.grad`.

    Returns:
        By name of the layer (`''` for the model itself), (O, C / groups, kh, kw) each. Layers
        that are frozen, or that the loss does not reach, are absent.

    Raises:
        ValueError: There is no convolution with a gradient.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> gradients = kernel_gradients(model, model(torch.randn(1, 3, 8, 8)).square().mean())
        >>> {name: tuple(gradient.shape) for name, gradient in gradients.items()}
        {'0': (4, 3, 5, 5), '2': (2, 4, 1, 1)}
    """
    weights = {
        name: layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
        and "weight" in layer._parameters
        and layer.weight.requires_grad
    }
    if loss is None:
        found = [weight.grad for weight in weights.values()]
    else:
        found = list(
            torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
            if weights
            else []
        )
    gradients = {
        name: grad.detach() for name, grad in zip(weights, found, strict=True) if grad is not None
    }
    if not gradients:
        raise ValueError(
            f"none of the {len(weights)} nn.Conv2d with a weight to train has a gradient; "
            + (
                "call loss.backward() before, or give the loss"
                if loss is None
                else "the loss does not depend on them"
            )
        )
    return gradients


@dataclass(frozen=True)
class KernelDiagnosis:
    """What makes a layer's kernel gradients equal, or wrong. `print` it for sentences.

    Attributes:
        findings: For each cause that is there a sentence. Causes are `'equal_inputs'`,
            `'rescaled_inputs'`, `'broadcast_target'`, `'unused_filters'` and
            `'wrong_gradient'`.
        gradient: (O, C / groups, kh, kw), what was examined, in float64.
        channel_deviation: How far channels are from their filter's mean over channels, as a part of
            the gradient's norm: 0 is equal, sqrt(1 - 1 / channels) unrelated; nan if there is one
            channel a filter, or no gradient.
        filter_deviation: The same for filters and their mean.
        channel_correlation: The mean Pearson correlation of a filter's channels, pair by pair; near
            1 they look the same in pictures that are each scaled to their own extremes. nan if
            undefined, as for 1 x 1 kernels.
        gradient_error: The largest difference to the closed form, as a part of that one's largest
            value. None if the layer's forward is not the plain convolution of its settings
            (`StdConv2d`, `Conv2dSame` of timm).
    """

    findings: dict[str, str]
    gradient: torch.Tensor
    channel_deviation: float
    filter_deviation: float
    channel_correlation: float
    gradient_error: float | None

    def __str__(self) -> str:
        lines = list(self.findings.values()) or [
            "Nothing found that makes gradients equal, zero or wrong."
        ]
        if not math.isnan(self.channel_deviation):
            lines.append(
                f"Channels deviate from their mean by {self.channel_deviation:.2%} of the gradient"
                + (
                    "."
                    if math.isnan(self.channel_correlation)
                    else f" and correlate {self.channel_correlation:.3f}."
                )
            )
            if self.channel_deviation > _SAME and self.channel_correlation > 0.9:
                lines.append(
                    "They are not equal, but look so in pictures that are each scaled to their own "
                    "extremes."
                )
        if not math.isnan(self.filter_deviation):
            lines.append(
                f"Filters deviate from their mean by {self.filter_deviation:.2%} of the gradient."
            )
        if self.gradient_error is None:
            lines.append(
                "Not compared with the closed form: the layer's forward is not a plain convolution."
            )
        else:
            lines.append(
                f"The largest difference to the closed form is {self.gradient_error:.1e} of its "
                "largest value."
            )
        return "\n".join(lines)


@torch.enable_grad()
def diagnose_kernel_gradients(
    layer: nn.Conv2d,
    x: torch.Tensor,
    grad_output: torch.Tensor | None = None,
    *,
    loss: Callable[..., torch.Tensor] | None = None,
    target: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
    rtol: float | None = None,
) -> KernelDiagnosis:
    """Say why a convolution's kernel gradients are equal across channels or filters.

    Or why they are zero, or wrong.

    Give either dE/dy or what yields it. Everything is computed on a float64 copy; the layer stays
    as it is.

    Args:
        layer: Any `nn.Conv2d`: with groups, stride, dilation and every kind of padding. A
            subclass' own backward is put to the test.
        x: (N, C, H, W), what enters the layer.
        grad_output: (N, O, P, Q), the loss' gradient with respect to the layer's output.
        loss: A scalar of the layer's output, `loss(output)` or `loss(output, target)`.
        target: What the loss compares the output with. That a target is broadcast over the filters
            shows only here, as a loss that squares gives filters gradients that differ.
        grad: (O, C / groups, kh, kw), a gradient to examine: of a handwritten pass, or
            `layer.weight.grad`. None examines what autograd gives for the layer.
        rtol: How far the gradient may be off the closed form, as a part of the same sum over
            absolute values. None is rounding in grad's dtype; autocast and TF32 need more, say
            1e-2.

    Returns:
        The findings and what was measured.

    Raises:
        ValueError: Arguments contradict each other, do not fit the layer, or hold nan or inf.

    Example:
        >>> layer, grey = nn.Conv2d(3, 2, 5), torch.rand(1, 1, 16, 16)
        >>> x = grey.expand(1, 3, 16, 16)
        >>> diagnosis = diagnose_kernel_gradients(layer, x, loss=lambda y: y.square().mean())
        >>> diagnosis.findings['equal_inputs'].split(',')[0]
        'Input channels 0 to 2 are identical'
        >>> one = torch.rand(1, 1, 12, 12)      # for two filters
        >>> list(diagnose_kernel_gradients(layer, torch.rand(1, 3, 16, 16), target=one,
        ...                                loss=lambda y, t: (y - t).abs().mean()).findings)
        ['broadcast_target']
    """
    if (grad_output is None) == (loss is None):
        raise ValueError("give either grad_output or a loss.")
    if target is not None and loss is None:
        raise ValueError("a target has no effect without a loss; give loss(output, target).")
    _check_layer(layer, x, grad)
    if grad_output is None:
        grad_output = _differentiate(layer, x, loss, target)
    twin = copy.deepcopy(layer).to("cpu", torch.float64).requires_grad_()
    x = x.detach().to("cpu", torch.float64)  # (N, C, H, W)
    dy = grad_output.detach().to("cpu", torch.float64)  # (N, O, P, Q)
    output = twin(x)
    if output.shape != dy.shape:
        raise ValueError(
            f"grad_output must have the output's shape {tuple(output.shape)}, got "
            f"{tuple(dy.shape)}."
        )
    eps = torch.finfo(torch.float64 if grad is None else grad.dtype).eps
    if rtol is None:  # half types are summed in float32 and rounded at the end
        rtol = 1000 * eps if eps < 1e-4 else 4 * eps
    if grad is None:
        (grad,) = torch.autograd.grad(output, twin.weight, dy)
    grad = grad.detach().to("cpu", torch.float64)  # (O, C / groups, kh, kw)
    for name, tensor in (("x", x), ("grad_output", dy), ("the gradient", grad)):
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds nan or inf.")

    findings = _input_findings(x, layer.groups) | _filter_findings(dy, target, layer)
    error = None
    # a subclass may compute something else, of which there is no closed form
    plain = nn.Conv2d.forward(twin, x).detach()
    if plain.shape == output.shape and torch.allclose(plain, output.detach()):
        error, wrong = _compare_with_closed_form(layer, x, dy, grad, rtol)
        if wrong is not None:
            findings["wrong_gradient"] = wrong
    return KernelDiagnosis(
        findings, grad, _deviation(grad, 1), _deviation(grad, 0), _correlation(grad), error
    )


def _check_layer(layer: nn.Conv2d, x: torch.Tensor, grad: torch.Tensor | None) -> None:
    """Refuse what is no convolution, and tensors that do not fit it."""
    if not isinstance(layer, nn.Conv2d) or "weight" not in layer._parameters:
        raise ValueError(
            f"layer must be an nn.Conv2d with a weight of its own (not parametrized), got {layer}."
        )
    if x.dim() != 4 or x.shape[1] != layer.in_channels:
        raise ValueError(f"x must be (N, {layer.in_channels}, H, W), got {tuple(x.shape)}.")
    if grad is not None and grad.shape != layer.weight.shape:
        raise ValueError(
            f"grad must have the weight's shape {tuple(layer.weight.shape)}, got "
            f"{tuple(grad.shape)}."
        )


def _compare_with_closed_form(
    layer: nn.Conv2d, x: torch.Tensor, dy: torch.Tensor, grad: torch.Tensor, rtol: float
) -> tuple[float, str | None]:
    """How far a gradient is off the closed form, and a sentence if that is beyond rounding.

    Rounding is bounded by the same sum over absolute values.
    """
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    rest = (layer.groups, layer.padding_mode)
    true = conv2d_weight_grad(x, dy, *geometry, *rest)
    bound = conv2d_weight_grad(x.abs(), dy.abs(), *geometry, *rest)
    off = (grad - true).abs()
    largest = true.abs().max().clamp_min(torch.finfo(true.dtype).tiny)
    error = (off.max() / largest).item()
    if not (off > rtol * bound).any():
        return error, None
    return error, (
        f"The gradient is not that of the layer: it is off by up to {error:.2%} of the largest "
        f"value of the closed form{_name_mistake(grad, true)}."
    )


def _differentiate(
    layer: nn.Conv2d,
    x: torch.Tensor,
    loss: Callable[..., torch.Tensor] | None,
    target: torch.Tensor | None,
) -> torch.Tensor:
    """dE/dy."""
    assert loss is not None
    output = layer(x.detach()).detach().requires_grad_()
    value = loss(output) if target is None else loss(output, target)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else value
        raise ValueError(f"loss must return a tensor of one number, got {got}.")
    if not value.requires_grad:
        return torch.zeros_like(output)
    (found,) = torch.autograd.grad(value, output, allow_unused=True)
    return torch.zeros_like(output) if found is None else found


def _input_findings(x: torch.Tensor, groups: int) -> dict[str, str]:
    """Input channels that are copies of each other."""
    findings, width = {}, x.shape[1] // groups
    rows = x.transpose(0, 1).flatten(1)
    equal, rescaled = [], []
    # a filter reads the channels of one group
    for start in range(0, len(rows) if width > 1 else 0, width):
        part = rows[start : start + width]
        same = _sets(_same(part))
        for one in same:
            equal.append([start + channel for channel in one])
        for one in _sets(_proportional(part)):
            if one not in same:
                rescaled.append([start + channel for channel in one])
    where = "in every filter" if groups == 1 else "in every filter of their group"
    clauses = [
        f"input channels {_listed(one)} are identical, so the gradients of these channels are "
        f"equal {where}"
        for one in equal
    ]
    parts = x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1)
    clauses += [
        f"groups {_listed(one)} read identical channels, so their filters' gradients differ only "
        "by grad_output"
        for one in _sets(_same(parts))
    ]
    if clauses:
        findings["equal_inputs"] = _sentence(clauses)
    if rescaled:
        findings["rescaled_inputs"] = _sentence(
            [
                f"input channels {_listed(one)} are copies up to brightness and contrast, as of a "
                "grey picture normalised per channel, so the gradients of these channels look "
                f"alike {where}"
                for one in rescaled
            ]
        )
    return findings


def _filter_findings(
    dy: torch.Tensor, target: torch.Tensor | None, layer: nn.Conv2d
) -> dict[str, str]:
    """Filters that are asked for the same, or for nothing."""
    findings, filters = {}, dy.shape[1]
    rows = dy.transpose(0, 1).flatten(1)
    dead = (rows == 0).all(1)
    clauses = []
    if target is not None and target.is_floating_point() and filters > 1:
        if target.dim() < 3 or target.shape[-3] == 1:
            clauses.append(
                f"the target {tuple(target.shape)} is broadcast over the {filters} filters of the "
                f"output {tuple(dy.shape)}: all are asked for one map"
            )
        elif (
            target.shape[-3] == filters
            and _same(target.detach().to("cpu", torch.float64).movedim(-3, 0).flatten(1)).all()
        ):
            clauses.append(
                f"the target's {filters} channels are identical: all filters are asked for one map"
            )
    scope = "" if layer.groups == 1 else ", within a group or where groups read the same"
    alive = [i for i in range(filters) if not dead[i]]
    for one in _sets(_same(rows[alive])):
        clauses.append(
            f"grad_output is identical for filters {_listed([alive[i] for i in one])}, so their "
            f"gradients are equal{scope}"
        )
    if clauses:
        findings["broadcast_target"] = _sentence(clauses)
    if dead.any():
        unused = dead.nonzero().flatten().tolist()
        findings["unused_filters"] = (
            f"The loss does not depend on filter{'s' * (len(unused) > 1)} {_listed(unused)}: "
            f"grad_output is 0 there, and so is the gradient (left out of the loss, cut off "
            f"by a ReLU behind, or at a minimum)."
        )
    return findings


def _same(rows: torch.Tensor) -> torch.Tensor:
    """Which rows (K, n) are the same, (K, K)."""
    squares = rows.square().sum(1)
    distance = squares[:, None] + squares - 2 * rows @ rows.T
    return distance <= _SAME**2 * torch.maximum(squares[:, None], squares)


def _proportional(rows: torch.Tensor) -> torch.Tensor:
    """Which rows are the same up to a factor and an offset.

    A constant is like nothing, two numbers always are.
    """
    size = rows.norm(dim=1)
    rows = rows - rows.mean(1, keepdim=True)
    spread = rows.norm(dim=1)
    known = (spread > 1e-9 * size) & (rows.shape[1] > 2)
    return known[:, None] & known & ((rows @ rows.T).abs() > (1 - _SAME) * spread[:, None] * spread)


def _sets(same: torch.Tensor) -> list[list[int]]:
    """The sets of two or more, from a matrix of who is the same as whom."""
    sets: list[list[int]] = []
    seen: set[int] = set()
    for i, row in enumerate(same):
        if i not in seen:
            one = [j for j in row.nonzero().flatten().tolist() if j >= i and j not in seen]
            seen.update(one)
            sets += [one] if len(one) > 1 else []
    return sets


def _listed(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    shown = [str(number) for number in numbers[:8]]
    if len(numbers) > 8:
        shown.append(f"{len(numbers) - 8} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _sentence(clauses: list[str]) -> str:
    more = len(clauses) - 4  # a wide layer may have hundreds
    text = "; ".join(clauses[:4]) + (f"; and {more} more such sets" if more > 0 else "") + "."
    return text[0].upper() + text[1:]


def _name_mistake(grad: torch.Tensor, true: torch.Tensor) -> str:
    """The usual mistakes of a handwritten backward pass, up to a factor."""
    convolution = (
        "the closed form with rows and columns reversed (a convolution, not a cross-correlation)"
    )
    usual = {
        "the closed form": true,
        "the closed form summed over the channels of each filter": true.sum(
            1, keepdim=True
        ).expand_as(true),
        "the closed form summed over filters": true.sum(0, keepdim=True).expand_as(true),
        convolution: true.flip(-2, -1),
    }
    for name, wrong in usual.items():
        factor = (grad * wrong).sum() / wrong.square().sum()
        if (grad - factor * wrong).norm() < 1e-3 * grad.norm():
            return f". It is {factor:.3g} times {name}"
    return ""


def _deviation(grad: torch.Tensor, dim: int) -> float:
    """The part of the norm that is not common along a dimension."""
    if grad.shape[dim] == 1 or not grad.any():
        return math.nan
    return ((grad - grad.mean(dim, keepdim=True)).norm() / grad.norm()).item()


def _correlation(grad: torch.Tensor) -> float:
    """The mean of Pearson's correlation over pairs of channels of a filter."""
    kernels = grad.flatten(2)
    kernels = kernels - kernels.mean(2, keepdim=True)
    norms = kernels.norm(dim=2, keepdim=True)
    kernels = kernels / norms  # nan for what has no variance
    pairs = torch.triu_indices(grad.shape[1], grad.shape[1], 1)
    return (kernels @ kernels.transpose(1, 2))[:, pairs[0], pairs[1]].nanmean().item()
