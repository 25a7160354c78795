"""Gradients through skips and frames against networks in which each path can be cut by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_branches import Tap, create_branch_model
from timm_branches.gradients import frame_gradients, path_gradients
from timm_branches.heads import LSTMHead


class AutoEncoder(nn.Module):
    """Strided encoder, linear bottleneck, decoder that adds the encoder's maps.

    Skips can be cut by hand.
    """

    def __init__(self, cut=()):
        super().__init__()
        self.enc1, self.enc2 = nn.Conv2d(1, 3, 2, 2), nn.Conv2d(3, 4, 2, 2)
        self.squeeze, self.expand = nn.Linear(16, 5), nn.Linear(5, 16)
        self.dec1, self.dec2 = nn.ConvTranspose2d(4, 3, 2, 2), nn.ConvTranspose2d(3, 1, 2, 2)
        self.cut = cut

    def encode(self, x):
        map1 = F.leaky_relu(self.enc1(x))
        map2 = F.leaky_relu(self.enc2(map1))
        return {"code": self.squeeze(map2.flatten(1)), "skip1": map1}

    def decode(self, code, skip1):
        code = code.detach() if "code" in self.cut else code
        skip1 = skip1.detach() if "skip1" in self.cut else skip1
        x = self.expand(code).view(-1, 4, 2, 2)
        return torch.sigmoid(self.dec2(F.leaky_relu(self.dec1(x) + skip1)))

    def forward(self, x):
        return self.decode(**self.encode(x))


def make(cut=()):
    torch.manual_seed(0)
    return AutoEncoder(cut), (torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8))


def norm(grads):
    return float(torch.cat([g.flatten() for g in grads if g is not None]).norm())


class TestSkips:
    @pytest.mark.parametrize(("path", "other"), [("code", "skip1"), ("skip1", "code")])
    def test_a_path_is_what_is_left_when_the_other_is_cut(self, path, other):
        net, (noisy, clean) = make()
        found = path_gradients(
            net, (noisy, clean), F.mse_loss, encode=net.encode, decode=net.decode
        )
        net.cut = (other,)
        F.mse_loss(net(noisy), clean).backward()
        assert found.stages == ["enc1", "enc2", "squeeze"]
        assert found.norms[path]["enc1"] == pytest.approx(
            norm([p.grad for p in net.enc1.parameters()]), rel=1e-5
        )
        assert found.error < 1e-6
        assert found.shares["code"]["enc1"] + found.shares["skip1"]["enc1"] == pytest.approx(
            1, abs=1e-5
        )
        assert found.norms["skip1"]["enc2"] == 0
        assert found.findings == []

    def test_cut_paths_are_named(self):
        net, batch = make(cut=("skip1",))
        found = path_gradients(net, batch, F.mse_loss, encode=net.encode, decode=net.decode)
        assert [line for line in found.findings if line.startswith("skip1: no gradient arrives")]
        net, batch = make()
        found = path_gradients(
            net,
            batch,
            F.mse_loss,
            decode=net.decode,
            encode=lambda x: {
                k: v.detach() if k == "skip1" else v for k, v in net.encode(x).items()
            },
        )
        assert [line for line in found.findings if line.startswith("skip1: its map is detached")]
        assert found.shares["code"]["enc1"] == pytest.approx(1, abs=1e-6)

    def test_faint_trunk_is_named(self):
        net, batch = make()
        with torch.no_grad():
            net.expand.weight.mul_(1e-5)
        found = path_gradients(net, batch, F.mse_loss, encode=net.encode, decode=net.decode)
        assert [line for line in found.findings if line.startswith("code: brings")]
        assert "add up" in str(found)

    @pytest.mark.parametrize(
        "head",
        [
            "unet",
            "rednet",
            {"kind": "unet", "attention": True, "input_skip": True},
            {"kind": "rednet", "residual": True},
        ],
    )
    def test_our_decoders(self, head):
        torch.manual_seed(0)
        model = create_branch_model(
            "test_resnet",
            taps=[[3, 5, 2], 4],
            head=[head, "pool"],
            names=["map", "class"],
            num_classes=[3, 2],
            img_size=64,
        )
        x, y = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
        found = path_gradients(model, (x, y), F.mse_loss)
        assert found.paths == ["trunk (stage5)", "skip (stage3)", "skip (stage2)"]
        assert found.error < 1e-5
        assert found.stages == [f"stage{k}" for k in range(1, 6)]
        # only the trunk crosses stage 4, and the last skip leaves before stage 3
        assert found.shares["trunk (stage5)"]["stage4"] == pytest.approx(1, abs=1e-5)
        assert found.norms["skip (stage3)"]["stage4"] == found.norms["skip (stage2)"]["stage3"] == 0
        assert all(p.grad is None for p in model.parameters())
        # the same with the other taps detached
        cut = create_branch_model(
            "test_resnet",
            taps=[[Tap(stage=3), Tap(stage=5, detach=True), Tap(stage=2, detach=True)], 4],
            head=[head, "pool"],
            names=["map", "class"],
            num_classes=[3, 2],
            img_size=64,
        )
        cut.load_state_dict(model.state_dict())
        for p in cut.parameters():
            p.requires_grad_(True)
        F.mse_loss(cut(x, heads=["map"])["map"], y).backward()
        grads = [p.grad for n, p in cut.named_parameters() if n.startswith("backbone.layer2.")]
        assert found.norms["skip (stage3)"]["stage3"] == pytest.approx(norm(grads), rel=1e-4)

    def test_refused(self):
        model = create_branch_model("test_resnet", taps=[5], num_classes=2, img_size=32)
        x = torch.rand(2, 3, 32, 32)
        with pytest.raises(ValueError, match="no decoder"):
            path_gradients(model, x, lambda y: y.sum())
        net, batch = make()
        with pytest.raises(ValueError, match="encode= and decode="):
            path_gradients(net, batch, F.mse_loss, encode=net.encode)
        two = create_branch_model(
            "test_resnet",
            taps=[[3, 5], [3, 5]],
            head="unet",
            names=["a", "b"],
            num_classes=2,
            img_size=32,
        )
        with pytest.raises(ValueError, match="give head="):
            path_gradients(two, x, lambda y: y.sum())
        assert path_gradients(two, x, lambda y: y.square().sum(), head="b").error < 1e-5


class Loop(nn.Module):
    """A CNN in a loop over frames, and an LSTM that may forget its state, as people write it."""

    def __init__(self, keep_state=True, no_grad=False, detach=False):
        super().__init__()
        self.cnn = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh())
        self.lstm, self.fc = nn.LSTM(4, 5), nn.Linear(5, 2)
        self.keep_state, self.no_grad, self.detach = keep_state, no_grad, detach

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            with torch.set_grad_enabled(not self.no_grad):
                y = self.cnn(x[:, t])
            y = y.detach() if self.detach else y
            out, new = self.lstm(y[None], state)
            state = new if self.keep_state else None
        return self.fc(out[0])


def clips(time=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, time, 3, 2, 2, generator=generator), torch.tensor([0, 1, 1])


class TestFrames:
    def test_norms_by_hand(self):
        torch.manual_seed(0)
        net, (x, y) = Loop(), clips()
        found = frame_gradients(net, (x, y), F.cross_entropy, features="cnn")
        assert all(p.grad is None for p in net.parameters())
        features = torch.stack([net.cnn(x[:, t]) for t in range(4)]).detach().requires_grad_()
        F.cross_entropy(net.fc(net.lstm(features)[0][-1]), y).backward()
        assert torch.allclose(found.norms_per_clip, features.grad.norm(dim=2).T, rtol=1e-4)
        assert torch.allclose(found.norms, features.grad.flatten(1).norm(dim=1), rtol=1e-4)
        assert found.seen == [0, 1, 2, 3]
        assert found.findings == []

    @pytest.mark.parametrize("no_grad", [False, True])
    def test_a_forgotten_state(self, no_grad):
        found = frame_gradients(
            Loop(keep_state=False, no_grad=no_grad), clips(), F.cross_entropy, features="cnn"
        )
        assert found.seen == [3]
        assert any("only the last frame (3" in line for line in found.findings)
        assert any("run without autograd" in line for line in found.findings) == no_grad
        assert "only the last frame" in str(found)

    def test_a_cnn_without_autograd(self):
        net = Loop(no_grad=True)
        found = frame_gradients(net, clips(), F.cross_entropy, features="cnn")
        assert found.seen == [0, 1, 2, 3]
        assert [line for line in found.findings if line.startswith("cnn is run without autograd")]
        net.cnn.requires_grad_(False)  # asked for: no finding
        assert frame_gradients(net, clips(), F.cross_entropy, features="cnn").findings == []

    def test_detached_features(self):
        found = frame_gradients(Loop(detach=True), clips(), F.cross_entropy, features="cnn")
        assert found.norms is None
        assert any("no gradient of the loss arrives" in line for line in found.findings)

    def test_fading(self):
        net = Loop()
        with torch.no_grad():
            net.lstm.bias_ih_l0[5:10] = -12  # the forget gate stays shut
            net.lstm.weight_hh_l0.mul_(1e-3)
        found = frame_gradients(net, clips(), F.cross_entropy, features="cnn")
        assert any("fades over time" in line and "[0, 1" in line for line in found.findings)

    @pytest.mark.parametrize(
        ("options", "lengths", "seen"),
        [
            ({}, None, [0, 1, 2, 3]),
            ({"readout": "mean"}, [2, 3, 1], [0, 1, 2]),
            ({"output": "frame"}, None, [0, 1, 2, 3]),
            ({"bidirectional": True}, [4, 1, 1], [0, 1, 2, 3]),
        ],
    )
    def test_our_heads(self, options, lengths, seen):
        torch.manual_seed(0)
        model = create_branch_model(
            "test_resnet", head=LSTMHead(hidden_size=8, **options), num_classes=2, img_size=32
        )
        x = torch.randn(3, 4, 3, 32, 32)
        found = frame_gradients(model, x, lambda y: y.square().sum(), lengths=lengths)
        assert found.seen == seen
        assert found.findings == []
        if lengths is not None:
            counts = torch.tensor(lengths)
            assert torch.equal(found.norms_per_clip > 0, torch.arange(4) < counts[:, None])

    def test_refused(self):
        with pytest.raises(ValueError, match="features=None"):
            frame_gradients(Loop(), clips(), F.cross_entropy)
        with pytest.raises(ValueError, match="called 1 times"):
            frame_gradients(Loop(), clips(), F.cross_entropy, features="fc")
        with pytest.raises(ValueError, match="returns tuple"):
            frame_gradients(Loop(), clips(), F.cross_entropy, features="lstm")
        model = create_branch_model("test_resnet", num_classes=2, img_size=32)
        with pytest.raises(ValueError, match="temporal heads are"):
            frame_gradients(model, torch.randn(1, 2, 3, 32, 32), lambda y: y.sum())
