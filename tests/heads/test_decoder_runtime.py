"""Skip decoders under compile, export and autocast, and on timm's architectures."""

import copy

import pytest
import torch

from tests.heads.test_decoder import answer, images, make
from tests.taps.test_all_architectures import _MINUTES, _NEED_VALUES, ALL, SMALLEST
from timm_branches import create_branch_model, list_taps
from timm_branches.heads import RedNetHead, UNetHead


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("test_resnet", UNetHead(attention=True, input_skip=True, deep_supervision=True)),
        ("test_vit", RedNetHead(residual=True, bottleneck=4)),
    ],
)
class TestRuntime:
    def test_compile(self, name, head):
        torch.compiler.reset()
        model, x = make((3, 4, 5), head, name=name), images(32, 32)
        twin = copy.deepcopy(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        y, expected = compiled(x), twin(x)
        for key in expected:
            torch.testing.assert_close(y[key], expected[key], rtol=1e-3, atol=1e-4)
        sum(v.square().mean() for v in y.values()).backward()
        sum(v.square().mean() for v in expected.values()).backward()
        for p, q in zip(model.heads.parameters(), twin.heads.parameters(), strict=True):
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-3, atol=1e-3 * max(1e-3, q.grad.abs().max().item())
            )

    def test_export(self, name, head):
        model, x = make((3, 4, 5), head, name=name).eval(), images(32, 32)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(
            answer(program.module(), x), answer(model, x), rtol=1e-4, atol=1e-5
        )

    def test_channels_last_and_autocast(self, name, head):
        model, x = make((3, 4, 5), head, name=name).eval(), images(32, 32)
        expected = answer(model, x)
        last = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            answer(last, x.contiguous(memory_format=torch.channels_last)),
            expected,
            rtol=1e-3,
            atol=1e-4,
        )
        with torch.autocast("cpu", torch.bfloat16):
            y = answer(model, x)
        y.float().square().mean().backward()
        # the image stays what it is
        assert y.dtype == (torch.float32 if head.residual else torch.bfloat16)
        assert all(
            p.grad.isfinite().all()
            for p in model.head(model.names[0]).parameters()
            if p.grad is not None
        )
        assert (y.float() - expected).abs().mean() < 0.05 * expected.abs().mean().clamp(min=1)


def check_decoders(name, taps, kinds):
    """Shapes and gradient paths on the meta device at the backbone's own size."""
    with torch.device("meta"):
        model = create_branch_model(
            name, taps=[taps] * len(kinds), head=kinds, num_classes=3
        ).eval()
        x = torch.empty(2, *model.input_size)
        logits = model(x)
        assert {key: tuple(y.shape) for key, y in logits.items()} == dict.fromkeys(
            kinds, (2, 3, *x.shape[2:])
        )
        sum(y.sum() for y in logits.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


# where maps are odd in number, stride or size: two maps of a stride among others, none of stride 2,
# strides that are no powers of two, maps without padding, all of one stride, channels last
ODD = [
    "csatv2",
    "volo_d1_224",
    "levit_128",
    "efficientvim_m1",
    "pit_xs_224",
    "nest_tiny",
    "convmixer_768_32",
    "crossvit_tiny_240",
    "inception_v3",
    "vit_tiny_r_s16_p8_224",
    "xcit_nano_12_p8_224",
    "hrnet_w18_small",
    "coatnet_pico_rw_224",
    "swin_s3_tiny_224",
    "vgg11",
]


@pytest.mark.parametrize("name", ODD)
def test_odd_architectures(name):
    check_decoders(name, (3, 4, 5), ["unet", "rednet"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in SMALLEST if not n.startswith((_NEED_VALUES, *_MINUTES))]
)
def test_smallest_of_each_module(name):
    check_decoders(name, (3, 4, 5), ["unet", "rednet"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith(_NEED_VALUES)])
def test_all(name):
    with torch.device("meta"):
        stages = tuple(row.stage for row in list_taps(name))
    check_decoders(name, stages, ["unet", "rednet"])
