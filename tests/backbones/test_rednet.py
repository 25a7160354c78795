"""The strided autoencoder with additive skips, from one call, against the same network written
by hand."""

import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_branches import create_branch_model, list_taps
from timm_branches.heads import RedNetHead

SIZE, CODE = 32, 5


class ByHand(nn.Module):
    """As a beginner writes it.

    Strided convolutions, linear code, deconvolutions that add the encoder's maps.
    """

    def __init__(self, chans=3):
        super().__init__()
        side = SIZE // 8
        self.enc_conv_1 = nn.Conv2d(chans, 16, 3, stride=2, padding=1)
        self.enc_conv_2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.enc_conv_3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.enc_linear = nn.Linear(64 * side * side, CODE)
        self.dec_linear_1 = nn.Linear(CODE, 64 * side * side)
        self.dec_deconv_1 = nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1)
        self.dec_deconv_2 = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1)
        self.dec_deconv_3 = nn.ConvTranspose2d(16, chans, 4, stride=2, padding=1)

    def forward(self, image):
        map1 = F.leaky_relu(self.enc_conv_1(image))
        map2 = F.leaky_relu(self.enc_conv_2(map1))
        map3 = F.leaky_relu(self.enc_conv_3(map2))
        x = self.dec_linear_1(self.enc_linear(map3.flatten(1))).view(-1, 64, SIZE // 8, SIZE // 8)
        x = F.leaky_relu(self.dec_deconv_1(x) + map2)
        x = F.leaky_relu(self.dec_deconv_2(x) + map1)
        return torch.sigmoid(F.leaky_relu(self.dec_deconv_3(x)))


def autoencoder(**kwargs):
    head = RedNetHead(bottleneck=CODE, act="leaky_relu", out_act=("leaky_relu", "sigmoid"))
    return create_branch_model("rednet_small", taps=[3, 4, 5], head=head, img_size=SIZE, **kwargs)


def test_one_call_is_the_network_written_by_hand():
    """The same parameters, one for one and none besides; the same output and gradients."""
    torch.manual_seed(0)
    ours, hand = autoencoder(num_classes=3), ByHand()
    pairs = list(zip(ours.parameters(), hand.parameters(), strict=True))
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p)
    x = torch.rand(2, 3, SIZE, SIZE)
    y, expected = ours(x)["rednet"], hand(x)
    torch.testing.assert_close(y, expected)
    (y - x).square().mean().backward()
    (expected - x).square().mean().backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad)


def test_nominal_size_gives_the_map_of_the_code():
    """A 512 px image ends as 64 channels of 64x64."""
    with torch.device("meta"):
        backbone = timm.create_model("rednet_small")
        assert backbone.default_cfg["input_size"] == (3, 512, 512)
        assert backbone.forward_features(torch.empty(1, 3, 512, 512)).shape == (1, 64, 64, 64)
    assert [(row.stage, row.channels, row.stride) for row in list_taps("rednet_small")] == [
        (3, 16, 2),
        (4, 32, 4),
        (5, 64, 8),
    ]


def test_grey_images():
    x = torch.rand(1, 1, SIZE, SIZE)
    assert autoencoder(num_classes=1, in_chans=1)(x)["rednet"].shape == x.shape


def test_it_learns_to_denoise():
    """A few steps on noisy stripes beat the noise itself."""
    torch.manual_seed(0)
    model = create_branch_model(
        "rednet_small",
        taps=[3, 4, 5],
        num_classes=1,
        in_chans=1,
        img_size=SIZE,
        head=RedNetHead(residual=True, input_skip=True),
    )
    clean = torch.sin(
        torch.arange(SIZE) * torch.rand(8, 1, 1, 1) + 6 * torch.rand(8, 1, 1, 1)
    ).expand(8, 1, SIZE, SIZE)
    noisy = clean + 0.5 * torch.randn(clean.shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = (model(noisy)["rednet"] - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * (noisy - clean).square().mean()


class TestBackbone:
    def test_classifier(self):
        model = timm.create_model("rednet_small", num_classes=5, drop_rate=0.5).eval()
        x = torch.rand(2, 3, 33, 17)
        maps = model.forward_features(x)
        torch.testing.assert_close(
            model(x), maps.mean((2, 3)) @ model.head.fc.weight.T + model.head.fc.bias
        )
        assert model.get_classifier() is model.head.fc
        model.reset_classifier(2)
        assert model(x).shape == (2, 2)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), maps)

    def test_intermediates_and_pruning(self):
        model = timm.create_model("rednet_small").eval()
        x = torch.rand(1, 3, 33, 17)
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, maps[-1])
        assert [tuple(y.shape[1:]) for y in maps] == [(16, 17, 9), (32, 9, 5), (64, 5, 3)]
        assert model.prune_intermediate_layers([0, 1]) == [0, 1]
        assert torch.equal(model.forward_features(x), maps[1])
        assert model.num_features == 32
        assert {name.split(".")[1] for name, _ in model.named_parameters()} == {"0", "1"}

    def test_gradient_checkpointing(self):
        model = timm.create_model("rednet_small", num_classes=2)
        x = torch.rand(1, 3, 16, 16)
        plain = torch.autograd.grad(model(x).sum(), list(model.parameters()))
        model.set_grad_checkpointing()
        for a, b in zip(
            plain, torch.autograd.grad(model(x).sum(), list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(a, b)
