"""Each cause of equal, missing or wrong kernel gradients is planted and must be found, and no
other."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_branches.gradients.kernels import diagnose_kernel_gradients, kernel_gradients

LAYERS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (5, 3), "stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)},
    "same": {"kernel_size": 4, "padding": "same", "bias": False},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "groups": {"kernel_size": 3, "groups": 2},
}
FILTERS = 6


def make(name="plain", channels=4, images=2, seed=0):
    torch.manual_seed(seed)
    layer = nn.Conv2d(channels, FILTERS, **LAYERS[name])
    x = torch.randn(images, channels, 12, 13)
    return layer, x, torch.randn_like(layer(x))


def autograd(layer, x, dy):
    return torch.autograd.grad(layer(x), layer.weight, dy)[0]


def picture(channels, size=40, seed=0):
    """A smooth picture of 0 to 255 whose colours go together, as in a photograph."""
    generator = torch.Generator().manual_seed(seed)
    light, colours = (
        torch.rand(1, 1, 8, 8, generator=generator),
        torch.rand(1, channels, 8, 8, generator=generator),
    )
    return F.interpolate(
        255 * (0.7 * light + 0.3 * colours), (size, size), mode="bilinear", align_corners=True
    )


class TestCollect:
    def test_after_backward(self):
        model = timm.create_model("test_resnet", num_classes=3)
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        found = kernel_gradients(model)
        convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        assert list(found) == list(convolutions)
        assert all(
            torch.equal(grad, convolutions[name].weight.grad) for name, grad in found.items()
        )

    def test_of_a_loss(self):
        layer, x, _ = make()
        loss = layer(x).square().mean()
        found = kernel_gradients(layer, loss)
        assert layer.weight.grad is None
        loss.backward()  # the graph is still there
        assert list(found) == [""]
        torch.testing.assert_close(found[""], layer.weight.grad)

    def test_frozen_and_unreached_layers_are_absent(self):
        model = nn.ModuleDict({name: nn.Conv2d(2, 2, 1) for name in ("used", "frozen", "unused")})
        model["frozen"].requires_grad_(False)
        y = model["used"](model["frozen"](torch.randn(1, 2, 3, 3)))
        assert list(kernel_gradients(model, y.sum())) == ["used"]
        y.sum().backward()
        assert list(kernel_gradients(model)) == ["used"]

    def test_errors(self):
        layer = nn.Conv2d(2, 2, 1)
        with pytest.raises(ValueError, match="backward"):
            kernel_gradients(layer)
        with pytest.raises(ValueError, match="does not depend"):
            kernel_gradients(layer, torch.ones(1, requires_grad=True).sum())
        with pytest.raises(ValueError, match="none of the 0"):
            kernel_gradients(nn.Linear(2, 2), nn.Linear(2, 2)(torch.ones(2)).sum())


class TestCauses:
    @pytest.mark.parametrize("images", [1, 2])
    @pytest.mark.parametrize("name", LAYERS)
    def test_random_data_raises_no_alarm(self, name, images):
        layer, x, dy = make(name, images=images)
        diagnosis = diagnose_kernel_gradients(layer, x, dy)
        assert diagnosis.findings == {}
        assert "Nothing found" in str(diagnosis)
        assert diagnosis.gradient_error < 1e-12
        assert min(diagnosis.channel_deviation, diagnosis.filter_deviation) > 0.3
        torch.testing.assert_close(
            diagnosis.gradient.float(), autograd(layer, x, dy), rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize("name", LAYERS)
    def test_equal_input_channels(self, name):
        layer, x, dy = make(name)
        diagnosis = diagnose_kernel_gradients(layer, x[:, :1].expand_as(x), dy)
        assert list(diagnosis.findings) == ["equal_inputs"]
        assert diagnosis.channel_deviation < 1e-12
        assert diagnosis.filter_deviation > 0.3
        assert torch.allclose(diagnosis.gradient, diagnosis.gradient[:, :1])

    def test_some_equal_input_channels(self):
        layer, x, dy = make()
        x[:, 3] = x[:, 1]
        diagnosis = diagnose_kernel_gradients(layer, x, dy)
        assert diagnosis.findings == {
            "equal_inputs": "Input channels 1 and 3 are identical, so the gradients of these "
            "channels are equal in every filter."
        }
        assert torch.allclose(diagnosis.gradient[:, 1], diagnosis.gradient[:, 3])

    def test_equality_in_one_image_is_none(self):
        layer, x, dy = make(images=2)
        x[0] = x[0, :1]
        assert diagnose_kernel_gradients(layer, x, dy).findings == {}

    @pytest.mark.parametrize("flip", [1, -1])
    def test_a_grey_picture_normalised_per_channel(self, flip):
        layer, _, dy = make(channels=3)
        grey = torch.rand(2, 1, 12, 13)
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1)
            for v in ((0.485, 0.456, 0.406), (0.229, flip * 0.224, 0.225))
        )
        diagnosis = diagnose_kernel_gradients(layer, (grey - mean) / std, dy)
        assert list(diagnosis.findings) == ["rescaled_inputs"]
        assert "channels 0 to 2" in diagnosis.findings["rescaled_inputs"]
        assert diagnosis.channel_deviation > 1e-3
        if flip == 1:
            assert diagnosis.channel_correlation > 0.999
            assert "look so" in str(diagnosis)

    def test_constant_channels_are_like_nothing(self):
        layer, x, dy = make()
        x = (
            torch.tensor([0.1, 0.7, 1 / 3, -12.3], dtype=torch.float64)
            .view(4, 1, 1)
            .expand(x.shape)
        )
        # rounding alone, the same for all pixels
        assert (x - x.mean((0, 2, 3), keepdim=True)).any()
        assert diagnose_kernel_gradients(layer, x, dy).findings == {}

    @pytest.mark.parametrize("name", [name for name in LAYERS if name != "groups"])
    def test_equal_grad_outputs(self, name):
        layer, x, dy = make(name)
        diagnosis = diagnose_kernel_gradients(layer, x, dy[:, :1].expand_as(dy))
        assert list(diagnosis.findings) == ["broadcast_target"]
        assert diagnosis.filter_deviation < 1e-12
        assert diagnosis.channel_deviation > 0.3

    @pytest.mark.parametrize("shape", [(2, 1, 10, 11), (1, 1, 1, 1), (10, 11), ()])
    def test_a_broadcast_target_that_leaves_gradients_different(self, shape):
        """A squared difference depends on the filters' outputs, so only the target's shape
        tells."""
        layer, x, _ = make()
        diagnosis = diagnose_kernel_gradients(
            layer, x, loss=lambda y, t: (y - t).square().mean(), target=torch.randn(shape)
        )
        assert list(diagnosis.findings) == ["broadcast_target"]
        assert (
            f"The target {shape} is broadcast over the 6 filters"
            in diagnosis.findings["broadcast_target"]
        )
        assert diagnosis.filter_deviation > 0.1

    def test_targets_that_are_not_broadcast(self):
        layer, x, dy = make(images=1)
        losses = [(F.mse_loss, dy), (F.cross_entropy, torch.randint(FILTERS, (1, 10, 11)))]
        assert [
            diagnose_kernel_gradients(layer, x, loss=loss, target=target).findings
            for loss, target in losses
        ] == [{}, {}]
        one = nn.Conv2d(4, 1, 3)
        assert diagnose_kernel_gradients(one, x, loss=F.mse_loss, target=dy[:, :1]).findings == {}

    def test_a_target_of_equal_channels(self):
        layer, x, dy = make()
        diagnosis = diagnose_kernel_gradients(
            layer, x, loss=F.mse_loss, target=dy[:, :1].expand_as(dy)
        )
        assert list(diagnosis.findings) == ["broadcast_target"]
        assert "6 channels are identical" in diagnosis.findings["broadcast_target"]

    @pytest.mark.parametrize("name", LAYERS)
    def test_unused_filters(self, name):
        layer, x, _ = make(name)
        diagnosis = diagnose_kernel_gradients(
            layer, x, loss=lambda y: y[:, [0, 1, 3, 5]].square().mean()
        )
        assert list(diagnosis.findings) == ["unused_filters"]
        assert "filters 2 and 4:" in diagnosis.findings["unused_filters"]
        assert diagnosis.gradient.flatten(1).any(1).tolist() == [
            True,
            True,
            False,
            True,
            False,
            True,
        ]

    @pytest.mark.parametrize(
        "loss",
        [
            lambda y: (y * 0).sum(),
            lambda y: torch.ones(()),
            lambda y: torch.ones((), requires_grad=True) * 2,
        ],
    )
    def test_a_loss_that_depends_on_nothing(self, loss):
        layer, x, _ = make()
        diagnosis = diagnose_kernel_gradients(layer, x, loss=loss)
        assert list(diagnosis.findings) == ["unused_filters"]
        assert "filters 0 to 5:" in diagnosis.findings["unused_filters"]
        assert np.isnan([diagnosis.channel_deviation, diagnosis.filter_deviation]).all()

    def test_all_together(self):
        layer, x, dy = make()
        x[:, 2], dy[:, 1], dy[:, 4] = x[:, 0], dy[:, 5], 0
        grad = autograd(layer, x, dy).flip(-1, -2)
        findings = diagnose_kernel_gradients(layer, x, dy, grad=grad).findings
        assert sorted(findings) == [
            "broadcast_target",
            "equal_inputs",
            "unused_filters",
            "wrong_gradient",
        ]
        assert "channels 0 and 2 are" in findings["equal_inputs"]
        assert "filters 1 and 5," in findings["broadcast_target"]
        assert "on filter 4:" in findings["unused_filters"]

    @pytest.mark.parametrize(
        ("equal", "expected"),
        [
            ([0, 1], "Input channels 0 and 1 are identical"),  # of one group
            ([1, 2], None),  # of two groups: no two gradients of a filter
            ([0, 2], None),
        ],
    )
    def test_channels_are_compared_within_groups(self, equal, expected):
        layer, x, dy = make("groups")
        x[:, equal[1]] = x[:, equal[0]]
        findings = diagnose_kernel_gradients(layer, x, dy).findings
        assert findings.get("equal_inputs", "").startswith(expected or "")
        assert list(findings) == (["equal_inputs"] if expected else [])

    def test_depthwise(self):
        """One channel a filter.

        Gradients are equal across filters when inputs and grad_outputs both are.
        """
        torch.manual_seed(0)
        layer, x, dy = (
            nn.Conv2d(4, 4, 3, groups=4),
            torch.randn(2, 4, 8, 8),
            torch.randn(2, 4, 6, 6),
        )
        same_x, same_dy = x[:, :1].expand_as(x), dy[:, :1].expand_as(dy)
        found = {
            key: diagnose_kernel_gradients(layer, *pair)
            for key, pair in {
                "neither": (x, dy),
                "x": (same_x, dy),
                "dy": (x, same_dy),
                "both": (same_x, same_dy),
            }.items()
        }
        assert {key: list(d.findings) for key, d in found.items()} == {
            "neither": [],
            "x": ["equal_inputs"],
            "dy": ["broadcast_target"],
            "both": ["equal_inputs", "broadcast_target"],
        }
        assert {key for key, d in found.items() if d.filter_deviation < 1e-6} == {"both"}
        assert all(np.isnan(d.channel_deviation) for d in found.values())
        assert "Groups 0 to 3 read identical" in found["x"].findings["equal_inputs"]

    def test_kernels_of_one_pixel(self):
        torch.manual_seed(0)
        layer, x, dy = nn.Conv2d(4, 6, 1), torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)
        diagnosis = diagnose_kernel_gradients(layer, x, dy)
        assert diagnosis.findings == {}
        assert np.isnan(diagnosis.channel_correlation)
        assert diagnosis.channel_deviation > 0.3


class TestMeasures:
    def test_deviations_and_correlation(self):
        """Against numpy, for a gradient given by hand."""
        layer, x, dy = make()
        grad = torch.randn_like(layer.weight)
        diagnosis = diagnose_kernel_gradients(layer, x, dy, grad=grad)
        array = grad.double().numpy()
        for found, axis in ((diagnosis.channel_deviation, 1), (diagnosis.filter_deviation, 0)):
            expected = np.sqrt(
                array.var(axis=axis).sum() * array.shape[axis] / np.square(array).sum()
            )
            assert found == pytest.approx(expected)
        correlations = [
            np.corrcoef(kernel.reshape(4, -1))[np.triu_indices(4, 1)] for kernel in array
        ]
        assert diagnosis.channel_correlation == pytest.approx(np.mean(correlations))
        assert np.array_equal(diagnosis.gradient, array)


class SumsOverChannels(torch.autograd.Function):
    """A plausible handwritten layer whose backward sums over the input channels."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        grad = torch.nn.grad.conv2d_weight(x, weight.shape, dy)
        return None, grad.sum(1, keepdim=True).expand_as(weight)


class Handwritten(nn.Conv2d):
    def forward(self, x):
        return SumsOverChannels.apply(x, self.weight)


class TestWrongGradients:
    def test_a_layer_with_a_wrong_backward(self):
        torch.manual_seed(0)
        layer = Handwritten(3, 5, 3, bias=False)
        diagnosis = diagnose_kernel_gradients(
            layer, torch.randn(2, 3, 8, 8), loss=lambda y: y.square().mean()
        )
        assert list(diagnosis.findings) == ["wrong_gradient"]
        assert "summed over the channels of each filter" in diagnosis.findings["wrong_gradient"]
        assert diagnosis.channel_deviation < 1e-12  # the symptom, on an input of unequal channels

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda g: 2 * g, "It is 2 times the closed form."),
            (lambda g: -g, "It is -1 times the closed form."),
            (
                lambda g: g.sum(1, keepdim=True).expand_as(g) / 4,
                "0.25 times the closed form summed over the channels",
            ),
            (lambda g: g.mean(0, keepdim=True).expand_as(g), "summed over filters"),
            (lambda g: g.flip(-1, -2), "reversed"),
            (lambda g: g.mT, "off by"),
            (lambda g: torch.zeros_like(g), "off by up to 100.00%"),
            (lambda g: g + 1e-3 * g.abs().max() * torch.ones(3, 3).tril(), "off by up to 0.10%"),
        ],
    )
    def test_a_gradient_given(self, spoil, words):
        layer, x, dy = make()
        diagnosis = diagnose_kernel_gradients(layer, x, dy, grad=spoil(autograd(layer, x, dy)))
        assert list(diagnosis.findings) == ["wrong_gradient"]
        assert words in diagnosis.findings["wrong_gradient"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_rounding_is_no_mistake(self, dtype):
        layer, x, dy = make("strided")
        layer, x, dy = layer.to(dtype), x.to(dtype), dy.to(dtype)
        grad = torch.nn.grad.conv2d_weight(
            x.float(), layer.weight.shape, dy.float(), layer.stride, layer.padding, layer.dilation
        ).to(dtype)
        assert diagnose_kernel_gradients(layer, x, dy, grad=grad).findings == {}
        assert list(diagnose_kernel_gradients(layer, x, dy, grad=1.2 * grad).findings) == [
            "wrong_gradient"
        ]

    def test_rtol(self):
        layer, x, dy = make()
        grad = autograd(layer, x, dy)
        wrong = 1.05 * grad
        assert list(diagnose_kernel_gradients(layer, x, dy, grad=wrong).findings) == [
            "wrong_gradient"
        ]
        assert diagnose_kernel_gradients(layer, x, dy, grad=wrong, rtol=0.1).findings == {}

    def test_another_forward_is_not_compared(self):
        torch.manual_seed(0)
        layer, x = timm.layers.StdConv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
        diagnosis = diagnose_kernel_gradients(
            layer, x[:, :1].expand_as(x), loss=lambda y: y.square().mean()
        )
        assert list(diagnosis.findings) == ["equal_inputs"]
        assert diagnosis.gradient_error is None
        assert "Not compared" in str(diagnosis)


class TestGreyTargetOfAColourPicture:
    """An untrained 3 to 3 convolution, the mean absolute difference to one grey picture for all
    three filters."""

    def diagnose(self, image, weights=0.0):
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 3, 8)
        nn.init.constant_(layer.bias, weights)
        grey = image.mean(1, keepdim=True)[..., :33, :33]
        return diagnose_kernel_gradients(
            layer, image, loss=lambda y, t: (y - t).abs().mean(), target=grey
        )

    def test_a_colour_picture(self):
        """Nothing makes channels equal, they only look so.

        The filters are what the target binds together.
        """
        diagnosis = self.diagnose(picture(3))
        assert list(diagnosis.findings) == ["broadcast_target"]
        assert diagnosis.channel_deviation > 0.01
        assert diagnosis.channel_correlation > 0.9
        assert "look so in pictures" in str(diagnosis)

    def test_all_outputs_below_the_target(self):
        """The same slope everywhere.

        Equal filters, each the sum of the window that a kernel's pixel sees.
        """
        image = picture(3)
        diagnosis = self.diagnose(image, weights=-1e4)
        assert (
            "grad_output is identical for filters 0 to 2" in diagnosis.findings["broadcast_target"]
        )
        assert diagnosis.filter_deviation < 1e-12
        boxes = -F.avg_pool2d(image.double(), 33, stride=1) / 3
        torch.testing.assert_close(
            diagnosis.gradient, boxes.expand(3, 3, 8, 8), rtol=1e-5, atol=1e-5
        )

    def test_a_grey_file_read_as_colour(self):
        diagnosis = self.diagnose(picture(1).expand(1, 3, 40, 40))
        assert list(diagnosis.findings) == ["equal_inputs", "broadcast_target"]
        assert diagnosis.channel_deviation < 1e-12


class TestArguments:
    def test_the_layer_stays_as_it_is(self):
        layer, x, dy = make()
        before = layer.weight.detach().clone()
        x.requires_grad_()
        with torch.no_grad():
            diagnose_kernel_gradients(layer, x, loss=lambda y: (y * dy).sum())
        assert layer.weight.grad is None
        assert x.grad is None
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, before)

    def test_a_frozen_layer(self):
        layer, x, dy = make()
        expected = autograd(layer, x, dy)
        found = diagnose_kernel_gradients(layer.requires_grad_(False), x, dy).gradient
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
        assert not layer.weight.requires_grad

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "either grad_output or a loss"),
            ({"grad_output": "dy", "loss": torch.sum}, "either grad_output or a loss"),
            ({"grad_output": "dy", "target": torch.ones(1)}, "no effect without a loss"),
            ({"grad_output": torch.ones(2, 6, 3, 3)}, r"output's shape \(2, 6, 10, 11\)"),
            (
                {"grad_output": "dy", "grad": torch.ones(6, 4, 3, 2)},
                r"weight's shape \(6, 4, 3, 3\)",
            ),
            ({"grad_output": "dy", "x": torch.ones(2, 3, 12, 13)}, r"x must be \(N, 4, H, W\)"),
            ({"grad_output": "dy", "x": torch.ones(4, 12, 13)}, r"x must be \(N, 4, H, W\)"),
            ({"grad_output": "dy", "x": torch.full((2, 4, 12, 13), torch.nan)}, "x holds nan"),
            (
                {"grad_output": "dy", "grad": torch.full((6, 4, 3, 3), torch.inf)},
                "gradient holds nan or inf",
            ),
            ({"loss": lambda y: y}, "of one number"),
            ({"loss": lambda y: 3.0}, "of one number"),
            ({"grad_output": "dy", "layer": nn.Linear(2, 2)}, "nn.Conv2d"),
            (
                {
                    "grad_output": "dy",
                    "layer": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
                },
                "parametrized",
            ),
        ],
    )
    def test_errors(self, arguments, message):
        layer, x, dy = make()
        arguments = {"layer": layer, "x": x} | {
            k: dy if isinstance(v, str) else v for k, v in arguments.items()
        }
        with pytest.raises(ValueError, match=message):
            diagnose_kernel_gradients(**arguments)
