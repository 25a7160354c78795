"""Where the gradient of a skip decoder goes: by each skip and by the deepest map, measured apart.

Decoders read the encoder's maps, so the gradient of the encoder is the sum of what comes back
through each of them.
"""

import copy

import pytest
import torch

from timm_branches import Tap, create_branch_model
from timm_branches.heads import RedNetHead, UNetHead

HEADS = {
    "unet": UNetHead(),
    "rednet": RedNetHead(),
    "bottleneck": RedNetHead(bottleneck=4, act="leaky_relu"),
    "attention": UNetHead(attention=True, upsample="bilinear"),
    "residual": RedNetHead(residual=True, input_skip=True),
}


def make(taps, head, name="test_resnet"):
    torch.manual_seed(0)
    model = create_branch_model(name, taps=taps, head=head, num_classes=3, img_size=32).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    return model.train(), x


def encoder_gradient(model, x, detached=()):
    """The gradient of the backbone's parameters when these taps are detached."""
    twin = copy.deepcopy(model)
    (name,) = twin.names
    maps = [y.detach() if i in detached else y for i, y in enumerate(twin.forward_taps(x)[name])]
    loss = (twin.head(name)(*maps, image=x) - 0.3).square().mean()
    parameters = list(twin.backbone.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def norm(gradient):
    return torch.stack([g.norm() for g in gradient]).norm().item()


@pytest.mark.parametrize(
    ("name", "taps", "kind"),
    [
        *(("test_resnet", (2, 3, 5), kind) for kind in HEADS),
        ("rednet_small", (3, 4, 5), "bottleneck"),
        ("test_vit", (2, 3, 5), "unet"),
        ("test_vit", (2, 3, 5), "rednet"),
    ],
)
def test_paths_add_up(name, taps, kind):
    """Each path alone carries a gradient.

    Together they are the gradient of the model, to rounding.
    """
    model, x = make(taps, HEADS[kind], name)
    everything = set(range(len(taps)))
    total = encoder_gradient(model, x)
    shares = [encoder_gradient(model, x, everything - {i}) for i in everything]
    assert all(norm(share) > 1e-6 * norm(total) for share in shares)
    for whole, parts in zip(total, zip(*shares, strict=True), strict=True):
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-10)
    assert norm(encoder_gradient(model, x, everything)) == 0
    for i in everything:  # without one path: what the others bring
        rest = encoder_gradient(model, x, {i})
        for without, whole, share in zip(rest, total, shares[i], strict=True):
            torch.testing.assert_close(without, whole - share, rtol=1e-5, atol=1e-10)
        assert norm(rest) != pytest.approx(norm(total), rel=1e-6)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_detached_tap_loses_its_share(kind, which):
    """Tap(detach=True) in the whole model takes away what that path brings, no more, and leaves
    the output."""
    taps = (2, 3, 5)
    model, x = make(taps, HEADS[kind])
    total = encoder_gradient(model, x)
    share = encoder_gradient(model, x, {0, 1, 2} - {which})
    cut, _ = make(tuple(Tap(s, detach=i == which) for i, s in enumerate(taps)), HEADS[kind])
    cut.load_state_dict(model.state_dict())
    (y,) = cut(x).values()
    torch.testing.assert_close(y, next(iter(model(x).values())))
    (y - 0.3).square().mean().backward()
    for p, whole, part in zip(cut.backbone.parameters(), total, share, strict=True):
        found = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found, whole - part, rtol=1e-5, atol=1e-10)


def test_share_of_a_skip_by_the_chain_rule():
    """The share of a skip is the gradient at its map times the map's Jacobian, taken apart by
    autograd."""
    model, x = make((2, 3, 5), "unet")
    shares = [encoder_gradient(model, x, {0, 1, 2} - {i}) for i in range(3)]
    maps = model.forward_taps(x)["unet"]
    leaves = [y.detach().requires_grad_() for y in maps]
    loss = (model.head("unet")(*leaves, image=x) - 0.3).square().mean()
    parameters = list(model.backbone.parameters())
    for y, at_map, share in zip(maps, torch.autograd.grad(loss, leaves), shares, strict=True):
        found = torch.autograd.grad(y, parameters, at_map, retain_graph=True, allow_unused=True)
        for g, expected in zip(found, share, strict=True):
            torch.testing.assert_close(
                torch.zeros_like(expected) if g is None else g, expected, rtol=1e-5, atol=1e-10
            )


@pytest.mark.parametrize(
    "head",
    [
        UNetHead(deep_supervision=True, attention=True, input_skip=True),
        RedNetHead(bottleneck=4, deep_supervision=True, input_skip=True, attention=True),
    ],
)
def test_every_parameter_is_trained(head):
    model, x = make((2, 3, 5), head)
    with torch.no_grad():
        for p in model.parameters():  # timm's residual blocks start at zero, and pass nothing on
            p.add_(0.1 * torch.randn_like(p))
    sum((y - 0.3).square().mean() for y in model(x).values()).backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "transposed", "shuffle"])
@pytest.mark.parametrize("head", [UNetHead, RedNetHead])
def test_gradcheck(head, upsample):
    """Against finite differences, at an odd size.

    A smooth activation, so that there are none at a kink.
    """
    model, _ = make(
        (4, 5),
        head(
            channels=(2,) * (5 if head is UNetHead else 4),
            act="silu",
            norm=None,
            upsample=upsample,
            attention=True,
        ),
        "test_resnet",
    )
    decoder = model.head(model.names[0])
    image = torch.zeros(1, 3, 9, 7, dtype=torch.float64)
    maps = [
        torch.randn(1, tap.channels, *size, dtype=torch.float64, requires_grad=True)
        for tap, size in zip(model.taps, [(2, 2), (1, 1)], strict=True)
    ]
    assert torch.autograd.gradcheck(lambda *ys: decoder(*ys, image=image), maps, fast_mode=True)
