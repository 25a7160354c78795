"""The closed form against autograd, torch's own gradient functions and the sum written out, in
float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from timm_branches.gradients.conv import conv2d_bias_grad, conv2d_input_grad, conv2d_weight_grad

# N, C, H, W, filters per group, kernel, stride, padding, dilation, groups
GRID = [
    (2, 3, 9, 8, 4, (3, 3), 1, 0, 1, 1),
    (1, 3, 9, 9, 10, (5, 3), 1, 2, 1, 1),
    (3, 4, 11, 7, 2, (3, 2), 2, 1, 1, 2),
    (2, 6, 10, 13, 1, (3, 3), (3, 2), (0, 2), 1, 6),
    (1, 4, 12, 11, 3, (2, 4), (2, 3), (1, 0), (3, 2), 2),
    (2, 2, 7, 7, 2, (7, 7), 1, 0, 1, 1),
    (2, 5, 6, 6, 3, (1, 1), 1, 0, 1, 1),
    (1, 3, 8, 7, 2, (1, 1), 2, 1, 1, 3),
    (2, 1, 9, 10, 1, (3, 4), 4, 3, 2, 1),
    (2, 4, 8, 9, 2, (4, 3), 1, "same", (1, 2), 2),
    (1, 2, 9, 8, 3, (2, 2), 1, "same", 3, 1),
    (2, 3, 9, 8, 2, (3, 4), 2, "valid", 2, 3),
]


def tensors(n, c, h, w, filters, kernel, stride, padding, dilation, groups):
    generator = torch.Generator().manual_seed(h * w)
    x = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(
        filters * groups,
        c // groups,
        *kernel,
        generator=generator,
        dtype=torch.float64,
        requires_grad=True,
    )
    bias = torch.zeros(filters * groups, dtype=torch.float64, requires_grad=True)
    output = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    dy = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return x, weight, bias, output, dy


@pytest.mark.parametrize("case", GRID, ids=str)
def test_all_gradients_are_those_of_autograd(case):
    *_, kernel, stride, padding, dilation, groups = case
    x, weight, bias, output, dy = tensors(*case)
    dx, dw, db = torch.autograd.grad(output, (x, weight, bias), dy)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    found = conv2d_weight_grad(x, dy, kernel, **settings)
    torch.testing.assert_close(found, dw, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(conv2d_bias_grad(dy), db, rtol=1e-10, atol=1e-10)
    for size in (x.shape, x.shape[2:]):
        torch.testing.assert_close(
            conv2d_input_grad(dy, weight, size, **settings), dx, rtol=1e-10, atol=1e-10
        )
    if not isinstance(padding, str):
        torch.testing.assert_close(
            found,
            torch.nn.grad.conv2d_weight(x, weight.shape, dy, **settings),
            rtol=1e-10,
            atol=1e-10,
        )


def test_the_sum_written_out():
    """dE/dW[o, c, i, j], a loop for each letter.

    Two groups, a stride, padding and dilation that differ by side.
    """
    n, c, h, w, filters, groups = 2, 4, 6, 7, 6, 2
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (2, 3), (2, 1), (1, 2), (2, 1)
    x = torch.randn(n, c, h, w, dtype=torch.float64)
    rows, columns = (
        (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1,
        (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1,
    )
    dy = torch.randn(n, filters, rows, columns, dtype=torch.float64)
    expected = torch.zeros(filters, c // groups, kh, kw, dtype=torch.float64)
    for o, k, i, j in itertools.product(range(filters), range(c // groups), range(kh), range(kw)):
        first = o // (filters // groups) * (c // groups)
        for b, p, q in itertools.product(range(n), range(rows), range(columns)):
            u, v = p * sh + i * dh - ph, q * sw + j * dw - pw
            if 0 <= u < h and 0 <= v < w:
                expected[o, k, i, j] += dy[b, o, p, q] * x[b, first + k, u, v]
    found = conv2d_weight_grad(x, dy, (kh, kw), (sh, sw), (ph, pw), (dh, dw), groups)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(2, 1), "same"])
def test_padding_modes(mode, padding):
    layer = torch.nn.Conv2d(4, 6, (4, 3), padding=padding, groups=2, padding_mode=mode).double()
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    output = layer(x)
    dy = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, layer.weight, dy)
    found = conv2d_weight_grad(x, dy, (4, 3), padding=padding, groups=2, padding_mode=mode)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_is_differentiable():
    """As a second derivative needs it."""
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, dy: conv2d_weight_grad(x, dy, 3, 2, 1, 1, 2), (x, dy))


def test_no_images_no_gradient():
    found = conv2d_weight_grad(torch.zeros(0, 2, 5, 5), torch.zeros(0, 3, 3, 3), 3)
    assert found.shape == (3, 2, 3, 3)
    assert not found.any()


def test_float32_and_integers_of_torch_size():
    x, dy = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 4, 4)
    weight = torch.randn(4, 3, 3, 3)
    found = conv2d_weight_grad(x, dy, weight.shape[2:])
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, torch.nn.grad.conv2d_weight(x, weight.shape, dy), rtol=1e-4, atol=1e-4
    )


X, DY = torch.zeros(2, 4, 8, 8), torch.zeros(2, 6, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x\[None\]"),
        ({"grad_output": DY[0]}, "N, O, P, Q"),
        ({"grad_output": DY[..., :5]}, r"gives \(2, 6, 6, 6\)"),
        ({"grad_output": DY[:1]}, r"gives \(2, 6, 6, 6\)"),
        ({"stride": 2}, r"gives \(2, 6, 3, 3\)"),
        ({"padding": 1}, r"gives \(2, 6, 8, 8\)"),
        ({"padding": "same"}, r"gives \(2, 6, 8, 8\)"),
        ({"dilation": 2}, r"gives \(2, 6, 4, 4\)"),
        ({"groups": 4}, "groups must divide the 4 input channels and the 6 filters, got 4"),
        ({"groups": 3}, "groups must divide"),
        ({"groups": 0}, "groups must divide"),
        ({"kernel_size": 9}, "9 x 9 pixels, more than the padded input's 8 x 8"),
        ({"kernel_size": 5, "dilation": (1, 2)}, "5 x 9 pixels"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be"),
        ({"kernel_size": 0}, "kernel_size must be an int >= 1"),
        ({"stride": 0}, "stride must be"),
        ({"stride": 1.5}, "stride must be"),
        ({"dilation": "2"}, "dilation must be"),
        ({"padding": -1}, "padding must be an int >= 0"),
        ({"padding": "full"}, "'same', 'valid'"),
        ({"padding": "same", "stride": 2}, "stride of 1"),
        ({"padding_mode": "mirror"}, "'reflect'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv2d_weight_grad(**{"x": X, "grad_output": DY, "kernel_size": 3} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(5, 4, 3, 3)}, "must have one O"),
        ({"input_size": (2, 3, 8, 8)}, r"\(2, 4\) and H, W"),
        ({"input_size": (8,)}, "input_size must be"),
        ({"input_size": (7, 8)}, r"gives \(2, 6, 5, 6\)"),
    ],
)
def test_errors_of_the_input_gradient(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv2d_input_grad(
            **{"grad_output": DY, "weight": torch.zeros(6, 4, 3, 3), "input_size": (8, 8)}
            | arguments
        )


def test_error_of_the_bias_gradient():
    with pytest.raises(ValueError, match="N, O, P, Q"):
        conv2d_bias_grad(DY[0])
