"""The gradients of a 2-D convolution in closed form, for several channels and filters.

With input x (N, C, H, W), weight (O, C/groups, kh, kw), output y (N, O, P, Q), loss E and
grad_output = dE/dy::

    y[n, o, p, q]       = b[o] + sum over c, i, j of
                          W[o, c, i, j] * xp[n, f(o) + c, p*s + i*d, q*s + j*d]
    dE/dW[o, c, i, j]   = sum over n, p, q of
                          grad_output[n, o, p, q] * xp[n, f(o) + c, p*s + i*d, q*s + j*d]
    dE/db[o]            = sum over n, p, q of  grad_output[n, o, p, q]
    dE/dxp[n, c', u, v] = sum over o, c, i, j, p, q with
                          c' = f(o) + c, u = p*s + i*d, v = q*s + j*d of
                            grad_output[n, o, p, q] * W[o, c, i, j]

xp is x after padding, s the stride, d the dilation, and f(o) = (o // (O/groups)) * C/groups the
first channel that filter o reads. So channel c of filter o's gradient is a cross-correlation of
*one* input channel with *one* map of grad_output, summed over the batch alone: nothing is summed
over channels or filters, and depths need not match. Two channels of a filter get equal gradients
when the input channels are equal, two filters of a group when their grad_outputs are. (Dumoulin and
Visin, "A guide to convolution arithmetic for deep learning", arXiv 1603.07285, has the arithmetic
of shapes; the equations are the chain rule.)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

__all__ = ["conv2d_bias_grad", "conv2d_input_grad", "conv2d_weight_grad"]

Pair = int | Sequence[int]


def conv2d_weight_grad(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """The gradient of a convolution's weight.

    ::

        dE/dW[o, c, i, j] = sum over n, p, q of
                            grad_output[n, o, p, q] * xp[n, f(o) + c, p*stride + i*dilation,
                            q*stride + j*dilation]

    with xp the padded input and f(o) the first channel of filter o's group (see the module). It is
    differentiable.

    Args:
        x: (N, C, H, W), what entered the convolution.
        grad_output: (N, O, P, Q), the loss' gradient with respect to what left it.
        kernel_size: kh and kw, or one number for both; `weight.shape[2:]`.
        stride: numbers >= 1, for rows and columns or one for both.
        dilation: the same.
        padding: numbers >= 0 alike, or `'same'` or `'valid'`, as of `nn.Conv2d`.
        groups: C and O are divided into so many groups.
        padding_mode: `'zeros'`, `'reflect'`, `'replicate'` or `'circular'`.

    Returns:
        (O, C / groups, kh, kw).

    Raises:
        ValueError: Shapes or settings do not fit; the message says what would.

    Example:
        >>> x = torch.arange(2 * 3 * 3.0).reshape(1, 2, 3, 3)  # two channels, 0 to 8 and 9 to 17
        >>> grad_output = torch.zeros(1, 2, 2, 2)                  # two filters, of a 2 x 2 kernel
        >>> grad_output[0, 0, 0, 0], grad_output[0, 1] = 1, 1      # E = y[0, 0, 0] + sum of y[1]
        >>> gradient = conv2d_weight_grad(x, grad_output, kernel_size=2)
        >>> gradient[0].flatten(1)                             # the first window, by channel
        tensor([[ 0.,  1.,  3.,  4.],
                [ 9., 10., 12., 13.]])
        >>> gradient[1].flatten(1)                             # the sum of all four windows
        tensor([[ 8., 12., 20., 24.],
                [44., 48., 56., 60.]])
    """
    if x.dim() != 4 or grad_output.dim() != 4:
        raise ValueError(
            f"x and grad_output must be (N, C, H, W) and (N, O, P, Q), got {tuple(x.shape)} and "
            f"{tuple(grad_output.shape)}; an image without a batch dimension needs x[None]."
        )
    kernel, step, spread = (
        _pair(value, name, 1)
        for value, name in (
            (kernel_size, "kernel_size"),
            (stride, "stride"),
            (dilation, "dilation"),
        )
    )
    _check_shapes(x.shape, grad_output, kernel, step, padding, spread, groups)
    if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
        raise ValueError(
            "padding_mode must be 'zeros', 'reflect', 'replicate' or 'circular', got "
            f"{padding_mode!r}."
        )
    (top, bottom), (left, right) = _pads(kernel, padding, spread, step)
    x = F.pad(
        x, [left, right, top, bottom], mode="constant" if padding_mode == "zeros" else padding_mode
    )
    weight_size = (grad_output.shape[1], x.shape[1] // groups, *kernel)  # (O, C/groups, kh, kw)
    # x is padded already, in ways that the library's own padding does not know
    return conv2d_weight(
        x, weight_size, grad_output, stride=step, padding=0, dilation=spread, groups=groups
    )


def conv2d_bias_grad(grad_output: torch.Tensor) -> torch.Tensor:
    """The gradient of a convolution's bias.

    `dE/db[o] = sum over n, p, q of grad_output[n, o, p, q]`.

    Args:
        grad_output: (N, O, P, Q).

    Returns:
        (O,).

    Raises:
        ValueError: grad_output has another number of dimensions.

    Example:
        >>> conv2d_bias_grad(torch.ones(2, 3, 4, 4))
        tensor([32., 32., 32.])
    """
    if grad_output.dim() != 4:
        raise ValueError(f"grad_output must be (N, O, P, Q), got {tuple(grad_output.shape)}.")
    return grad_output.sum((0, 2, 3))


def conv2d_input_grad(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> torch.Tensor:
    """The gradient of a convolution's input, for zero padding.

    ::

        dE/dxp[n, f(o) + c, p*stride + i*dilation, q*stride + j*dilation] += grad_output[n, o, p, q]
        * W[o, c, i, j]

    over all o, c, i, j, p and q, and without the padding in the end. Here filters *are* summed
    over.

    Args:
        grad_output: (N, O, P, Q).
        weight: (O, C / groups, kh, kw).
        input_size: (N, C, H, W), or (H, W) alone; a stride lets several sizes give the same output.
        stride: As of :func:`conv2d_weight_grad`.
        padding: As there.
        dilation: As there.
        groups: As there.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: Shapes or settings do not fit; the message says what would.

    Example:
        >>> ones = torch.ones(1, 1, 2, 2)
        >>> conv2d_input_grad(ones, ones, (3, 3))[0, 0]        # windows on each pixel
        tensor([[1., 2., 1.],
                [2., 4., 2.],
                [1., 2., 1.]])
    """
    if weight.dim() != 4 or grad_output.dim() != 4 or weight.shape[0] != grad_output.shape[1]:
        raise ValueError(
            f"grad_output (N, O, P, Q) and weight (O, C / groups, kh, kw) must have one O, got "
            f"{tuple(grad_output.shape)} and {tuple(weight.shape)}."
        )
    kernel = weight.shape[2], weight.shape[3]
    step, spread = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
    shape = (len(grad_output), weight.shape[1] * groups, *input_size[-2:])
    if len(input_size) not in (2, 4) or tuple(input_size) not in (shape, shape[2:]):
        raise ValueError(
            f"input_size must be (H, W) or {shape[:2]} and H, W, got {tuple(input_size)}."
        )
    _check_shapes(shape, grad_output, kernel, step, padding, spread, groups)
    columns = (
        torch.einsum(
            "ngopq,gocij->ngcijpq",
            grad_output.unflatten(1, (groups, -1)),
            weight.unflatten(0, (groups, -1)),
        )
        .flatten(-2)
        .flatten(1, 4)
    )
    (top, bottom), (left, right) = _pads(kernel, padding, spread, step)
    padded = F.fold(
        columns, (shape[2] + top + bottom, shape[3] + left + right), kernel, spread, 0, step
    )
    return padded[..., top : top + shape[2], left : left + shape[3]]


def _pair(value: Pair, name: str, least: int) -> tuple[int, int]:
    """A setting for rows and columns."""
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) != 2 or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(f"{name} must be an int >= {least} or two of them, got {value!r}.")
    return values[0], values[1]


def _pads(
    kernel: tuple[int, int], padding: Pair | str, dilation: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[int, int]]:
    """What is added before and after rows and columns."""
    if padding == "valid":
        return [(0, 0), (0, 0)]
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding 'same' needs a stride of 1, got {stride}.")
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        # an odd one more goes to the end
        return [(total // 2, total - total // 2) for total in totals]
    if isinstance(padding, str):
        raise ValueError(
            f"padding must be 'same', 'valid', an int or two of them, got {padding!r}."
        )
    rows, columns = _pair(padding, "padding", 0)
    return [(rows, rows), (columns, columns)]


def _check_shapes(
    shape: Sequence[int],
    grad_output: torch.Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: Pair | str,
    dilation: tuple[int, int],
    groups: int,
) -> tuple[int, int]:
    """The output's size, if such an input has an output of grad_output's shape."""
    filters = grad_output.shape[1]
    if not isinstance(groups, int) or groups < 1 or shape[1] % groups or filters % groups:
        raise ValueError(
            f"groups must divide the {shape[1]} input channels and the {filters} filters, got "
            f"{groups}."
        )
    pads = _pads(kernel, padding, dilation, stride)
    whole = [n + sum(pad) for n, pad in zip(shape[2:], pads, strict=True)]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if any(n < r for n, r in zip(whole, reach, strict=True)):
        raise ValueError(
            f"the kernel reaches over {reach[0]} x {reach[1]} pixels, more than the padded input's "
            f"{whole[0]} x {whole[1]}."
        )
    rows, columns = ((n - r) // s + 1 for n, r, s in zip(whole, reach, stride, strict=True))
    fits = (shape[0], filters, rows, columns)
    if tuple(grad_output.shape) != fits:
        raise ValueError(
            f"grad_output {tuple(grad_output.shape)} does not fit: an input {tuple(shape)} with "
            f"kernel {kernel}, stride {stride}, padding {padding!r}, dilation {dilation} and "
            f"{filters} filters gives {fits}."
        )
    return rows, columns
