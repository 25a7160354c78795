"""What the pictures show is read off the figures' own objects; the files are opened again."""

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches.gradients.kernel_figures import (
    kernel_causes,
    kernel_causes_figure,
    kernel_gradients_figure,
    plot_kernel_causes,
    plot_kernel_gradients,
)


def images(figure):
    return [
        axes.images[0]
        for axes in figure.findobj(
            lambda a: hasattr(a, "images") and a.images and not hasattr(a, "_colorbar")
        )
    ]


class TestFigures:
    def test_kernels_share_a_symmetric_scale(self):
        grad = torch.randn(4, 3, 5, 5) * torch.logspace(-2, 0, 12).view(4, 3, 1, 1)
        shown = images(kernel_gradients_figure(grad, "conv1"))
        assert len(shown) == 12
        assert {image.get_clim() for image in shown} == {
            (-grad.abs().max().item(), grad.abs().max().item())
        }
        for image, kernel in zip(shown, grad.flatten(0, 1), strict=True):
            assert np.allclose(image.get_array(), kernel)
            assert image.axes.get_title() == f"{kernel.norm():.2g}"

    def test_of_many_the_largest_are_drawn_and_all_norms_shown(self):
        grad = 0.1 * torch.rand(64, 48, 3, 3)
        grad[[50, 3]] += 10
        grad[:, [40, 20, 30]] += 10
        *kernels, norms = images(kernel_gradients_figure(grad, max_filters=2, max_channels=3))
        expected = [grad[o, c] for o in (3, 50) for c in (20, 30, 40)]
        assert np.allclose(
            np.stack([image.get_array() for image in kernels]), torch.stack(expected)
        )
        assert np.allclose(norms.get_array(), grad.double().flatten(2).norm(dim=2))
        assert kernels[3].axes.get_ylabel() == "filter 50"
        assert kernels[5].axes.get_xlabel() == "channel 40"

    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (8, 3, 32, 32), (64, 64, 3, 3), (96, 1, 7, 7)])
    def test_texts_neither_overlap_nor_are_cut(self, shape):
        figure = kernel_gradients_figure(torch.randn(shape) * 1e-5, "a title")
        figure.canvas.draw()
        boxes = [
            text.get_window_extent()
            for axes in figure.findobj(lambda a: hasattr(a, "get_ylabel"))
            for text in (axes.title, axes.xaxis.label, axes.yaxis.label)
            if text.get_text()
        ]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        width, height = figure.get_size_inches() * figure.dpi
        assert all(
            0 <= box.x0 <= box.x1 <= width and 0 <= box.y0 <= box.y1 <= height for box in boxes
        )

    def test_zero_is_drawn(self):
        (image,) = images(kernel_gradients_figure(torch.zeros(1, 1, 3, 3)))
        assert image.get_clim() == (-1, 1)

    def test_files(self, tmp_path):
        file = plot_kernel_gradients(
            torch.randn(2, 2, 3, 3, requires_grad=True), tmp_path / "new" / "kernels.png"
        )
        assert Image.open(file).format == "PNG"
        assert Image.open(plot_kernel_causes(tmp_path / "causes.png")).width > 1000
        assert (tmp_path / "causes.png").stat().st_size < 150_000

    @pytest.mark.parametrize("seed", range(5))
    def test_causes(self, seed):
        cases = kernel_causes(seed)
        assert [list(case.findings) for case in cases.values()] == [
            [],
            ["equal_inputs"],
            ["broadcast_target"],
            ["unused_filters"],
            ["wrong_gradient"],
        ]
        assert [name for name, case in cases.items() if case.channel_deviation < 1e-6] == [
            "equal input channels",
            "wrong backward",
        ]
        assert [name for name, case in cases.items() if case.filter_deviation < 1e-6] == [
            "broadcast target"
        ]

    def test_causes_figure(self):
        cases = kernel_causes()
        shown = iter(images(kernel_causes_figure()))
        for case in cases.values():
            limit = case.gradient.abs().max().item()
            for kernel in case.gradient.flatten(0, 1):
                image = next(shown)
                assert np.allclose(image.get_array(), kernel)
                assert image.get_clim() == (-limit, limit)
        assert next(shown, None) is None

    @pytest.mark.parametrize(
        ("grad", "limits", "message"),
        [
            (torch.randn(3, 3, 3), (8, 8), "O, C / groups"),
            (torch.zeros(0, 3, 3, 3), (8, 8), "O, C / groups"),
            (torch.full((1, 1, 2, 2), torch.nan), (8, 8), "nan"),
            (torch.randn(1, 1, 2, 2), (0, 8), "at least 1"),
            (torch.randn(1, 1, 2, 2), (8, 0), "at least 1"),
        ],
    )
    def test_errors(self, grad, limits, message):
        with pytest.raises(ValueError, match=message):
            kernel_gradients_figure(grad, "", *limits)
