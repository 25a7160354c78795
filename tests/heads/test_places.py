"""A map knows where it lies on the image: at any size, the answer of the hand-padded image."""

import pytest
import torch
import torch.nn.functional as F

from timm_branches import RedNetHead, UNetHead, create_branch_model
from timm_branches.dense import tiled_inference
from timm_branches.heads import (
    DPTHead,
    FPNHead,
    LeanHead,
    LinearHead,
    SegformerHead,
    UPerNetHead,
)
from timm_branches.heads.alignment import common_multiple, pad_to_multiple

# stems and stages that floor, that pad, that do neither; with what makes them take any size
FAMILIES = {
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_mambaout": {},
    "test_nfnet": {},
    "inception_next_atto": {},
    "edgenext_xx_small": {},
    "vgg11": {},
    "twins_svt_small": {},
    "focalnet_tiny_srf": {},
    "hrnet_w18_small": {},
    "regnetx_002": {},
    "densenet121": {},
    "mobilenetv3_small_050": {},
    "test_vit": {"dynamic_img_pad": True, "dynamic_img_size": True},
    "xcit_nano_12_p8_224": {},
}
HEADS = {
    "unet": UNetHead(),
    "rednet": RedNetHead(),
    "input_skip": UNetHead(input_skip=True),
    "residual": RedNetHead(residual=True),
    "shuffle": UNetHead(upsample="shuffle", attention=True),
    "linear": LinearHead(),
    "lean": LeanHead(channels=8),
    "segformer": SegformerHead(channels=8),
    "fpn": FPNHead(channels=8, branch_channels=6),
    "upernet": UPerNetHead(channels=8),
    "dpt": DPTHead(channels=8),
}


def make(name, head, **options):
    torch.manual_seed(0)
    options = {**FAMILIES.get(name, {}), **options}
    model = create_branch_model(name, taps=[3, 4, 5], head=head, num_classes=3, **options).eval()
    for module in model.modules():  # answers that differ from pixel to pixel
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.5)
    return model


def images(height, width, batch=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


MULTIPLES = {"test_vit": 16, "xcit_nano_12_p8_224": 8}  # of patches; all others have strides to 32


def by_hand(x, multiple=32):
    """The image with zeros to the right and below."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple))


def answer(model, x):
    (y,) = model(x).values()
    return y


def check_padded(model, height, width, batch=1, multiple=32):
    x = images(height, width, batch)
    with torch.no_grad():
        y = answer(model, x)
        expected = answer(model, by_hand(x, multiple))[..., :height, :width]
    assert y.shape == (batch, 3, height, width)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = make(name, HEADS["unet"])
    check_padded(model, 95, 70, multiple=MULTIPLES.get(name, 32))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_vit"])
@pytest.mark.parametrize("size", [(95, 95), (33, 64), (65, 97)])
def test_heads(name, kind, size):
    check_padded(make(name, HEADS[kind]), *size, batch=2, multiple=MULTIPLES.get(name, 32))


def test_deep_supervision():
    model = make("test_convnext", UNetHead(deep_supervision=True)).train()
    x = images(61, 95, 2)
    y, padded = model(x), model(by_hand(x))
    assert list(y) == list(padded)
    assert len(y) > 1
    for name in y:
        torch.testing.assert_close(y[name], padded[name][..., :61, :95], rtol=1e-4, atol=1e-4)


def test_sizes_that_fit_cost_nothing():
    """The backbone is given the very tensor."""
    model = make("test_convnext", UNetHead())
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            break
    x = images(96, 64)
    model(x)
    assert seen[0].shape == x.shape
    assert pad_to_multiple(x, 32) is x


def test_other_heads_are_not_changed():
    """A classifier beside the decoder answers as it would alone."""
    torch.manual_seed(0)
    model = create_branch_model(
        "test_convnext",
        taps=[4, 5, (3, 4, 5)],
        head=["pool", "pool", "unet"],
        num_classes=[2, 3, 3],
        names=["coarse", "fine", "mask"],
    ).eval()
    x = images(95, 70)
    together = model(x)
    alone = model(x, heads=["coarse", "fine"])
    assert list(together) == ["coarse", "fine", "mask"]
    for name, y in alone.items():
        assert torch.equal(y, together[name])
    padded = model(by_hand(x))["mask"][..., :95, :70]
    torch.testing.assert_close(together["mask"], padded, rtol=1e-4, atol=1e-5)


def test_a_size_that_cannot_be_read_names_the_padding():
    """The size in the message is not that of the image; it says why."""
    name = "vit_tiny_patch16_224"
    model = create_branch_model(name, taps=[(4, 5)], head="unet", num_classes=2, img_size=64).eval()
    with pytest.raises(ValueError, match=r"3x80x80.*padded to multiples of 16"):
        model(torch.zeros(1, 3, 70, 70))


def test_clips():
    model = make("test_convnext", UNetHead())
    x = images(61, 45, 4)
    frames = answer(model, x)
    torch.testing.assert_close(answer(model, x.view(2, 2, 3, 61, 45)).flatten(0, 1), frames)
    model.frames_per_pass = 3
    again = answer(model, x.view(2, 2, 3, 61, 45)).flatten(0, 1)
    torch.testing.assert_close(again, frames, rtol=1e-4, atol=1e-5)


def test_tiles():
    """Tiles that the stride does not divide give what the whole image gives, away from its edge."""
    model = make("test_convnext", UNetHead())
    x = images(130, 130)
    with torch.no_grad():
        whole = answer(model, x)
        tiles = tiled_inference(lambda t: answer(model, t), x, tile=130, overlap=0)
    torch.testing.assert_close(tiles, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("test_resnet", "rednet"), pytest.param("test_convnext", "unet", marks=pytest.mark.slow)],
)
def test_compile(name, kind):
    torch.compiler.reset()
    model = make(name, HEADS[kind])
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for size in ((64, 64), (61, 70)):
        x = images(*size)
        torch.testing.assert_close(answer(compiled, x), answer(model, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("test_resnet", "unet"),
        ("test_resnet", "rednet"),
        ("test_resnet", "input_skip"),
        ("test_resnet", "residual"),
        ("test_convnext", "rednet"),
        ("test_convnext", "residual"),
    ],
)
def test_exported_graph_takes_any_size(name, kind):
    model = make(name, HEADS[kind])
    sides = {
        2: torch.export.Dim("height", min=33, max=512),
        3: torch.export.Dim("width", min=33, max=512),
    }
    program = torch.export.export(model, (images(70, 95),), dynamic_shapes=({**sides},)).module()
    for size in ((70, 95), (64, 64), (33, 97), (128, 61), (96, 65)):
        x = images(*size)
        torch.testing.assert_close(answer(program, x), answer(model, x), rtol=1e-3, atol=1e-4)


def test_exported_graph_of_layer_norms_takes_any_size():
    """ConvNeXt with a U-Net: torch cannot prove a guard for named dimensions, DYNAMIC ones do."""
    model = make("test_convnext", HEADS["unet"])
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (images(70, 95),), dynamic_shapes=(sides,)).module()
    for size in ((70, 95), (64, 64), (33, 97), (128, 61), (96, 65)):
        x = images(*size)
        torch.testing.assert_close(answer(program, x), answer(model, x), rtol=1e-3, atol=1e-4)


def test_bottleneck_at_a_nominal_size_that_does_not_fit():
    model = make("test_convnext", UNetHead(bottleneck=4), img_size=45)
    check_padded(model, 45, 45)


def test_common_multiple():
    assert common_multiple([4, 8, 16, 32]) == 32
    assert common_multiple([7, 9, 11]) == 11  # not 693


def squares(side, count, seed):
    """Images with a bright square, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(count, 3, side, side, generator=generator)
    mask = torch.zeros(count, side, side, dtype=torch.long)
    for i in range(count):
        size = int(torch.randint(10, 24, (), generator=generator))
        top, left = (int(torch.randint(side - size, (), generator=generator)) for _ in range(2))
        x[i, :, top : top + size, left : left + size] += 2
        mask[i, top : top + size, left : left + size] = 1
    return x, mask


@pytest.mark.parametrize(("name", "steps"), [("test_convnext", 80), ("test_resnet", 40)])
def test_what_is_found_lies_where_it_lies(name, steps):
    """Trained at a size that fits, a U-Net finds squares as well at one that does not."""
    torch.manual_seed(0)
    model = create_branch_model(name, taps=[2, 3, 4, 5], head=UNetHead(), num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        x, mask = squares(96, 8, step)
        loss = F.cross_entropy(answer(model, x), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    found = {}
    for side in (96, 95, 90):
        x, mask = squares(side, 32, 999)
        with torch.no_grad():
            predicted = answer(model, x).argmax(1)
        both = ((predicted == 1) & (mask == 1)).sum()
        either = ((predicted == 1) | (mask == 1)).sum()
        found[side] = float(both / either)
    assert found[96] > 0.8
    assert min(found[95], found[90]) > found[96] - 0.03, found
