"""Temporal heads: against networks written by hand, and what is refused."""

import pytest
import torch
from torch import nn

from timm_branches import create_branch_model, load_model, save_model
from timm_branches.heads import GRUHead, LSTMHead, head_to_dict, parse_head

HEADS = {"lstm": LSTMHead, "gru": GRUHead}


def clips(batch=2, time=4, size=32, in_chans=3, seed=0):
    return torch.randn(
        batch, time, in_chans, size, size, generator=torch.Generator().manual_seed(seed)
    )


def make(head, name="test_resnet", num_classes=3, seed=0, **kwargs):
    torch.manual_seed(seed)
    return create_branch_model(
        name,
        taps=[5],
        head=head,
        num_classes=num_classes,
        **{"img_size": 32, "names": ["y"], **kwargs},
    )


class SeedCNNLSTM(nn.Module):
    """A network of the first forum question, corrected.

    All frames through one CNN, its vectors into an LSTM.
    """

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc = nn.Linear(3 * 9 * 50, 20)
        self.lstm = nn.LSTM(20, 50, 1, batch_first=True)
        self.out = nn.Linear(50, 1)

    def forward(self, x):
        vectors = []
        for t in range(x.shape[1]):
            y = nn.functional.max_pool2d(torch.relu(self.conv1(x[:, t])), 2)
            y = nn.functional.max_pool2d(torch.relu(self.conv2(y)), 2)
            vectors.append(torch.relu(self.fc(y.reshape(len(y), -1))))
        _, (h, _) = self.lstm(torch.stack(vectors, 1))
        return self.out(h[-1])


class TestSmallFrames:
    """30 frames of 24x48x1, one CNN for all, an LSTM, one 0/1 label."""

    @pytest.fixture
    def both(self):
        torch.manual_seed(0)
        head = LSTMHead(pool_type="flatten", projection=20, activation="relu", hidden_size=50)
        model = create_branch_model("conv2_24x48", taps=[5], head=head, num_classes=1)
        own = SeedCNNLSTM()
        values = list(model.state_dict().values())
        keys = [
            k
            for part in ("conv1", "conv2", "out", "fc", "lstm")
            for k in own.state_dict()
            if k.startswith(part)
        ]
        # the classifier is the first layer that a head makes
        own.load_state_dict(dict(zip(keys, values, strict=True)))
        return model, own

    def test_forward_and_gradients(self, both):
        model, own = both
        x = torch.randn(2, 30, 1, 24, 48)
        y, expected = model(x)["stage5"], own(x)
        assert y.shape == (2, 1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-6)
        label = torch.tensor([[0.0], [1.0]])
        for logits in (y, expected):
            nn.functional.binary_cross_entropy_with_logits(logits, label).backward()
        first = model.backbone.blocks[0].conv.weight.grad
        assert first.abs().sum() > 0
        torch.testing.assert_close(first, own.conv1.weight.grad, rtol=1e-3, atol=1e-7)

    def test_every_parameter_learns(self, both):
        model, _ = both
        model(torch.randn(3, 5, 1, 24, 48))["stage5"].square().sum().backward()
        assert [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0] == []

    def test_refuses_another_size(self, both):
        with pytest.raises(ValueError, match="made for a map of 3x9, got 5x9"):
            both[0](torch.randn(1, 2, 1, 32, 48))


class SeedVideo(nn.Module):
    """The network of the second forum question in its corrected form.

    A loop over frames that hands on the state.
    """

    def __init__(self, backbone, width, layers, hidden):
        super().__init__()
        self.backbone = backbone
        self.project = nn.Linear(width, 300)
        self.lstm = nn.LSTM(300, hidden, layers)
        self.fc1, self.fc2 = nn.Linear(hidden, 128), nn.Linear(128, 2)

    def forward(self, x):
        hidden = None
        for t in range(x.shape[1]):
            with torch.no_grad():
                y = self.backbone.forward_intermediates(
                    x[:, t], indices=[4], intermediates_only=True
                )[0].mean((2, 3))
            _, hidden = self.lstm(self.project(y)[None], hidden)
        return self.fc2(torch.relu(self.fc1(hidden[0][-1])))


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("resnet101", 2048)])
def test_video_network(name, width):
    """resnet, frozen, projected to 300, a deep LSTM, 256 -> 128 -> 2."""
    head = LSTMHead(projection=300, num_layers=3, hidden_size=256, hidden=(128,))
    model = make(head, name, num_classes=2, img_size=64).freeze().eval()
    own = SeedVideo(model.backbone, width, 3, 256).eval()
    own.project.load_state_dict(model.head("y").projection[0].state_dict())
    own.lstm.load_state_dict(model.head("y").rnn.state_dict())
    own.fc1.load_state_dict(model.head("y").hidden[0].state_dict())
    own.fc2.load_state_dict(model.head("y").fc.state_dict())
    x = clips(1, 3, 64)
    y = model(x)["y"]
    assert y.shape == (1, 2)
    torch.testing.assert_close(y, own(x), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.heads.parameters())


class TestPerFrame:
    def test_shape_of_the_question(self):
        """(16, 30, 1): one answer a frame."""
        model = make(
            LSTMHead(hidden_size=4, output="frame"), "conv2_24x48", num_classes=1, img_size=None
        )
        assert model(torch.randn(16, 30, 1, 24, 48))["y"].shape == (16, 30, 1)

    @pytest.mark.parametrize("kind", HEADS)
    def test_causal(self, kind):
        """A unidirectional answer at a frame knows that frame and those before it, and nothing
        else."""
        model = make(HEADS[kind](hidden_size=5, output="frame")).eval()
        x = clips(1, 4).requires_grad_()
        y = model(x)["y"]
        for t in range(4):
            (grad,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
            seen = grad[0].flatten(1).abs().sum(1) > 0
            assert seen.tolist() == [i <= t for i in range(4)]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("readout", ["last", "mean", "max", "attention"])
def test_every_frame_matters(kind, bidirectional, readout):
    model = make(HEADS[kind](hidden_size=6, bidirectional=bidirectional, readout=readout)).eval()
    x = clips(1, 5)
    y = model(x)["y"]
    for t in range(5):
        other = x.clone()
        other[:, t] += 1
        assert not torch.allclose(model(other)["y"], y, rtol=0, atol=1e-7), t


class TestReadouts:
    """The recurrence and its readouts, step by step in plain arithmetic."""

    def by_hand(self, head, vectors):
        """LSTM equations for one layer, one clip (T, F): the outputs (T, H)."""

        def direction(x, suffix):
            w, u, b, c_ = (
                getattr(head.rnn, f"{n}_l0{suffix}")
                for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h = c = torch.zeros(u.shape[1])
            out = []
            for v in x:
                i, f, g, o = (w @ v + b + u @ h + c_).chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                out.append(h)
            return torch.stack(out)

        forward = direction(vectors, "")
        if not head.spec.bidirectional:
            return forward, forward[-1]
        backward = direction(vectors.flip(0), "_reverse").flip(0)
        return torch.cat([forward, backward], 1), torch.cat([forward[-1], backward[0]])

    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("readout", ["last", "mean", "max", "attention", "frame"])
    def test_against_equations(self, bidirectional, readout):
        options = {"output": "frame"} if readout == "frame" else {"readout": readout}
        model = make(LSTMHead(hidden_size=6, bidirectional=bidirectional, **options)).eval()
        head, x, lengths = model.head("y"), clips(3, 5), [5, 2, 1]
        y = model(x, lengths=lengths)["y"]
        for b, n in enumerate(lengths):
            vectors = torch.stack(
                [model.forward_taps(x[b, t : t + 1])["y"][0].mean((1, 2)) for t in range(n)]
            )
            out, last = self.by_hand(head, vectors)
            if readout == "frame":
                torch.testing.assert_close(y[b, :n], out @ head.fc.weight.T + head.fc.bias)
                assert not y[b, n:].any()
                continue
            vector = {"last": last, "mean": out.mean(0), "max": out.amax(0)}.get(readout)
            if readout == "attention":
                score = head.attention.score
                weights = (
                    torch.tanh(out @ score[0].weight.T + score[0].bias) @ score[2].weight.T
                ).softmax(0)
                vector = (weights * out).sum(0)
            torch.testing.assert_close(y[b], head.fc(vector))


class TestPooling:
    @pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", "attention", "flatten"])
    def test_pool(self, pool):
        model = make(GRUHead(hidden_size=4, pool_type=pool), img_size=64).eval()
        x = clips(1, 2, 64)
        maps, head = model.forward_taps(x[0])["y"], model.head("y")
        avg, top = maps.mean((2, 3)), maps.amax((2, 3))
        vectors = {
            "avg": avg,
            "max": top,
            "avgmax": (avg + top) / 2,
            "catavgmax": torch.cat([avg, top], 1),
            "flatten": maps.flatten(1),
        }.get(pool)
        if pool == "attention":
            score = head.to_vector.score
            flat = maps.flatten(2)
            weight = (
                score[2].weight @ torch.tanh(score[0].weight @ flat + score[0].bias[:, None])
            ).softmax(2)
            vectors = (weight * flat).sum(2)
        out, _ = head.rnn(vectors[None])
        torch.testing.assert_close(model(x)["y"], head.fc(out[:, -1]))

    def test_attention_takes_any_size(self):
        model = make(LSTMHead(hidden_size=4, pool_type="attention")).eval()
        assert model(clips(1, 2, 64))["y"].shape == (1, 3)


class TestOptions:
    def test_drop_rate(self):
        model = make(LSTMHead(hidden_size=4, num_layers=2, hidden=(6,)), drop_rate=0.25)
        head = model.head("y")
        assert head.rnn.dropout == 0.25
        assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]
        model = make(LSTMHead(hidden_size=4, num_layers=1, drop_rate=0.5), drop_rate=0.25)
        assert [m.p for m in model.head("y").modules() if isinstance(m, nn.Dropout)] == [0.5]
        assert make("lstm").head("y").drop.p == 0.0

    @pytest.mark.parametrize("cls", [LSTMHead, GRUHead])
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"hidden_size": 0}, "hidden_size= takes a whole number from 1, got 0"),
            ({"hidden_size": True}, "hidden_size="),
            ({"pool_type": "min"}, "'flatten'"),
            ({"num_layers": 1.5}, "num_layers="),
            ({"projection": 0}, "projection="),
            ({"hidden": (0,)}, "hidden="),
            ({"drop_rate": 1.0}, "drop_rate="),
            ({"bidirectional": 1}, "bidirectional="),
            ({"output": "video"}, "output= must be one of 'clip', 'frame'"),
            ({"readout": "first"}, "readout="),
            ({"output": "frame", "readout": "mean"}, "no effect with output='frame'"),
            ({"activation": "relu"}, "give projection="),
            ({"projection": 2, "activation": "nose"}, "not one of timm's"),
        ],
    )
    def test_refused(self, cls, kwargs, match):
        with pytest.raises(ValueError, match=match):
            cls(**kwargs)

    @pytest.mark.parametrize(
        "head",
        [
            LSTMHead(8, 2, True, 0.1, "attention", 7, "gelu", "clip", "attention", (5, 4)),
            GRUHead(output="frame"),
        ],
    )
    def test_round_trip(self, head, tmp_path):
        assert parse_head(head_to_dict(head)) == head
        model = make(head).eval()
        twin = load_model(save_model(model, tmp_path / "model.safetensors"))
        assert twin.head_specs == (head,)
        assert torch.equal(twin(clips())["y"], model(clips())["y"])

    def test_reset_classifier(self):
        model = make(GRUHead(hidden_size=4, output="frame")).to(torch.bfloat16)
        x = clips().to(torch.bfloat16)
        assert model.get_classifier()["y"].out_features == 3
        model.reset_classifier(0)
        assert model(x)["y"].shape == (2, 4, 4)
        model.reset_classifier(7)
        assert model(x)["y"].shape == (2, 4, 7)
        assert model.head("y").fc.weight.dtype == torch.bfloat16

    def test_optimizer_groups(self):
        """Biases of the recurrence are not decayed.

        The head is in the last group of layer decay.
        """
        from timm.optim import create_optimizer_v2

        model = make(LSTMHead(hidden_size=4, projection=5, hidden=(3,)))
        optimizer = create_optimizer_v2(
            model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5
        )
        names = {id(p): n for n, p in model.named_parameters()}
        groups = {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
        own = {n: g for n, g in groups.items() if n.startswith("heads.")}
        assert set(own) == {n for n, _ in model.named_parameters() if n.startswith("heads.")}
        assert {g["lr_scale"] for g in own.values()} == {1.0}
        assert {n for n, g in own.items() if g["weight_decay"]} == {
            n for n in own if n.endswith("weight") or ".rnn.weight" in n
        }
