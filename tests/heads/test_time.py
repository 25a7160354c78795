"""Heads of time against loops, closed forms and other libraries with the same weights."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import nn

from timm_branches import create_branch_model
from timm_branches.heads import (
    AttentionHead,
    Clips,
    GRUHead,
    MeanHead,
    MinGRUHead,
    TCNHead,
    TransformerHead,
)
from timm_branches.heads.min_gru import MinGRU, linear_scan
from timm_branches.inference import StreamingStep
from timm_branches.inference.export import export_model

B, T, C, K = 2, 7, 96, 3
STREAMING = [
    MeanHead(),
    AttentionHead(hidden_size=8, num_heads=2),
    TransformerHead(hidden_size=8, num_heads=2, num_layers=2, causal=True, max_frames=4),
    TransformerHead(hidden_size=8, num_heads=2, causal=True, max_frames=2, output="frame"),
    TCNHead(hidden_size=6, num_layers=2),
    MinGRUHead(hidden_size=5, num_layers=2),
    GRUHead(hidden_size=5),
]
ALL = [
    *STREAMING,
    TransformerHead(hidden_size=8, num_heads=2),
    TransformerHead(hidden_size=8, num_heads=2, pool_type="none"),
    MinGRUHead(hidden_size=5, bidirectional=True, readout="attention"),
    TCNHead(hidden_size=6, readout="mean"),
]


def name_of(head):
    return "-".join([head.kind, *(f for f in ("causal", "output") if getattr(head, f, 0) is True)])


def make(head, seed=0, **options):
    torch.manual_seed(seed)
    model = create_branch_model("test_resnet", head=head, num_classes=K, img_size=32, **options)
    for p in model.head("stage5").parameters():
        with torch.no_grad():
            p.add_(0.2 * torch.randn_like(p))  # norms and biases are no identity
    return model.eval()


def vectors(batch=B, time=T, channels=C):
    return torch.randn(batch, time, channels, generator=torch.Generator().manual_seed(1))


def run(head_module, x, lengths=None, state=None):
    """A head on vectors (B, T, C), as maps of one position."""
    clips = Clips(x[..., None, None], lengths)
    return head_module(clips.fold(x[..., None, None]), clips, state)


# ---- minGRU


def gru_loop(layer, x, h):
    """The paper's recurrence, frame by frame, in float64."""
    outputs = []
    for t in range(x.shape[1]):
        gate, candidate = layer(x[:, t]).chunk(2, -1)
        z = gate.sigmoid()
        g = torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())
        h = (1 - z) * h + z * g
        outputs.append(h)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("time", [1, 7, 1000])
def test_min_gru_is_its_recurrence(time):
    torch.manual_seed(0)
    rnn = MinGRU(4, 5, num_layers=2)
    x = 3 * vectors(time=time, channels=4)
    state = torch.rand(2, B, 5)
    out, new = rnn(x, state)
    expected = x.double()
    for number, layer in enumerate(rnn.double().layers):
        expected = gru_loop(layer, expected, state[number].double())
        torch.testing.assert_close(new[number].double(), expected[:, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_min_gru_gradient():
    torch.manual_seed(0)
    rnn = MinGRU(4, 5).double()
    x = vectors(channels=4).double()
    parameters = list(rnn.parameters())
    weights = torch.randn(B, T, 5).double()
    # the scan works in float32, whatever it is given
    own = torch.autograd.grad((rnn(x)[0] * weights).sum(), parameters)
    loop = gru_loop(rnn.layers[0], x, torch.zeros(B, 5).double())
    by_loop = torch.autograd.grad((loop * weights).sum(), parameters)
    for a, b in zip(own, by_loop, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_min_gru_backwards_over_valid_frames():
    torch.manual_seed(0)
    rnn = MinGRU(4, 5, bidirectional=True)
    x = vectors(channels=4)
    out, state = rnn(x, None, torch.tensor([3, T]))
    alone, alone_state = rnn(x[:1, :3])
    torch.testing.assert_close(out[:1, :3], alone)
    torch.testing.assert_close(state[:, :1], alone_state)
    backwards = gru_loop(rnn.layers[1], x[:1, :3].flip(1), torch.zeros(1, 5)).flip(1)
    torch.testing.assert_close(alone[..., 5:], backwards, rtol=1e-4, atol=1e-5)


def test_scan_keeps_nothing_and_all():
    keep = torch.tensor([0.0, 1.0, 0.0, 1.0, 1e-30, 1e-30]).view(1, 6, 1)
    add = torch.tensor([1.0, 0.0, 3.0, 0.0, 0.0, 2.0]).view(1, 6, 1)
    h = linear_scan(keep, add, torch.full((1, 1), 5.0))
    assert h.flatten().tolist() == pytest.approx([1, 1, 3, 3, 3e-30, 2])


# ---- the mean


def test_mean():
    head = make(MeanHead(output="frame")).head("stage5")
    x = vectors()
    y, _ = run(head, x)
    means = torch.stack([x[:, : t + 1].mean(1) for t in range(T)], 1)
    torch.testing.assert_close(y, head.fc(means), rtol=1e-4, atol=1e-5)


# ---- attention


@pytest.mark.parametrize("mlp_ratio", [0, 2])
def test_attention_is_timms(mlp_ratio):
    width = 16
    torch.manual_seed(0)
    spec = AttentionHead(hidden_size=width, num_heads=4, mlp_ratio=mlp_ratio)
    head = _attention_of_width(spec, width)
    theirs = AttentionPoolLatent(
        width, num_heads=4, mlp_ratio=max(mlp_ratio, 1), norm_layer=nn.LayerNorm
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
        key, value = theirs.kv.weight.chunk(2)
        key_bias, value_bias = theirs.kv.bias.chunk(2)
        query = theirs.q(theirs.latent)[0, 0].view(4, -1) * theirs.scale
        pool = head.to_vector
        pool.score.weight.copy_(torch.einsum("hd,hdc->hc", query, key.view(4, -1, width)))
        pool.score.bias.copy_((query * key_bias.view(4, -1)).sum(1))
        pool.value.weight.copy_(value)
        pool.value.bias.copy_(value_bias)
        head.proj.load_state_dict(theirs.proj.state_dict())
        if mlp_ratio:
            head.norm.load_state_dict(theirs.norm.state_dict())
            head.mlp.load_state_dict(theirs.mlp.state_dict())
        else:
            theirs.mlp = None
        maps = torch.randn(B * T, width, 2, 3)
        own, _ = head(maps, Clips(torch.zeros(B, T, 1, 1, 1)))
        tokens = pool.norm(maps.unflatten(0, (B, T)).permute(0, 1, 3, 4, 2).flatten(1, 3))
        torch.testing.assert_close(own, head.fc(theirs(tokens)), rtol=1e-4, atol=1e-5)


def _attention_of_width(spec, width):
    tap = SimpleNamespace(channels=width, size=(2, 3), tap=SimpleNamespace(name="x"))
    head = spec.build([tap], K).eval()
    nn.init.normal_(head.to_vector.norm.weight)
    return head


# ---- the transformer


def test_transformer_is_multihead_attention():
    """One layer without feed-forward part, written with nn.MultiheadAttention."""
    head = make(TransformerHead(hidden_size=8, num_heads=2)).head("stage5")
    layer = head.layers[0]
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(layer.qkv.weight)
        attention.in_proj_bias.copy_(layer.qkv.bias)
        attention.out_proj.load_state_dict(layer.proj.state_dict())
    x, lengths = vectors(), torch.tensor([4, T])
    own, _ = run(head, x, lengths)
    tokens = torch.cat([head.cls.expand(B, 1, 8), head.embed(x) + head.positions[:T]], 1)
    hidden = torch.arange(T + 1) > lengths[:, None]
    normed = layer.norm1(tokens)
    y = tokens + attention(normed, normed, normed, key_padding_mask=hidden)[0]
    torch.testing.assert_close(own, head.fc(head.norm(y[:, 0])), rtol=1e-4, atol=1e-5)


def test_transformer_of_positions():
    """Tokens of one frame share its position; one layer, by hand."""
    spec = TransformerHead(hidden_size=8, num_heads=2, pool_type="none", output="frame")
    head = make(spec).head("stage5")
    maps = torch.randn(B * 3, C, 2, 2)
    own, _ = head(maps, Clips(torch.zeros(B, 3, 1, 1, 1)))
    tokens = head.embed(maps.unflatten(0, (B, 3)).permute(0, 1, 3, 4, 2).flatten(2, 3))
    x = (tokens + head.positions[:3, None]).flatten(1, 2)
    x, _ = head.layers[0](x, torch.zeros(1, 1, 12, 12))
    expected = head.fc(head.norm(x).unflatten(1, (3, 4)).mean(2))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "window"), [(1, 3), (2, 2), (1, 64)])
def test_causal_transformer_sees_its_window(layers, window):
    spec = TransformerHead(
        hidden_size=8, num_heads=2, num_layers=layers, causal=True, max_frames=window,
        output="frame",
    )  # fmt: skip
    head = make(spec).head("stage5")
    x = vectors().requires_grad_()
    y, _ = run(head, x)
    for t in range(T):
        (gradient,) = torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)
        seen = gradient.abs().sum((0, 2)).nonzero().flatten().tolist()
        assert seen == list(range(max(0, t - layers * (window - 1)), t + 1))


def test_causal_transformer_knows_distance():
    spec = TransformerHead(hidden_size=8, num_heads=2, causal=True)
    head = make(spec).head("stage5")
    x = vectors()
    swapped = x[:, [1, 0, *range(2, T)]]
    assert not torch.allclose(run(head, x)[0], run(head, swapped)[0], atol=1e-4)


# ---- convolutions


def test_tcn_is_padded_convolutions():
    head = make(TCNHead(hidden_size=6, num_layers=3, kernel_size=3, output="frame")).head("stage5")
    x = vectors()
    y = x
    for number in range(3):
        z = y
        for conv in head.convs[2 * number : 2 * number + 2]:
            padded = F.pad(z.transpose(1, 2), (2 * 2**number, 0))
            z = F.conv1d(padded, conv.conv.weight, conv.conv.bias, dilation=2**number)
            z = conv.norm(z.transpose(1, 2)).relu()
        y = (z + head.skips[number](y)).relu()
    torch.testing.assert_close(run(head, x)[0], head.fc(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "kernel"), [(1, 3), (2, 3), (3, 2)])
def test_tcn_looks_as_far_back_as_it_says(layers, kernel):
    spec = TCNHead(hidden_size=16, num_layers=layers, kernel_size=kernel, output="frame")
    head = make(spec).head("stage5")
    reach = 1 + 2 * (kernel - 1) * (2**layers - 1)
    x = vectors(time=reach + 4).requires_grad_()
    y, _ = run(head, x)
    (gradient,) = torch.autograd.grad(y[:, -1].square().sum(), x)
    seen = gradient.abs().sum((0, 2)).nonzero().flatten().tolist()
    assert seen == list(range(4, reach + 4))


# ---- what all of them do


@pytest.mark.parametrize("head", ALL, ids=name_of)
def test_order(head):
    """Mean and attention do not see the order of the frames, the others do."""
    module = make(head).head("stage5")
    x = vectors()
    alike = torch.allclose(run(module, x)[0], run(module, x.flip(1))[0], rtol=1e-4, atol=1e-5)
    assert alike == (head.kind in ("mean", "attention"))


@pytest.mark.parametrize("head", STREAMING, ids=name_of)
def test_stream_in_pieces_of_any_size(head):
    """Far longer than any cache; the end of one clip before that of the other."""
    module = make(head).head("stage5")
    x = vectors(time=40)
    whole, end = run(module, x)
    state = None
    answers = []
    for piece in x.split([1, 1, 5, 2, 20, 11], 1):
        y, state = run(module, piece, state=state)
        answers.append(y)
    last = torch.cat(answers, 1) if head.output == "frame" else answers[-1]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)
    for a, b in zip(state, end, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    _, ragged = run(module, x, lengths=[3, 40])
    _, short = run(module, x[:1, :3])
    for a, b in zip(ragged, short, strict=True):
        torch.testing.assert_close(a[:, :1], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", STREAMING, ids=name_of)
def test_state_of_constant_size(head):
    module = make(head).head("stage5")
    _, after_one = run(module, vectors(time=1))
    _, after_many = run(module, vectors(time=100))
    assert [a.shape for a in after_one] == [b.shape for b in after_many]
    module.check_stream("x", B, after_many)
    with pytest.raises(ValueError, match="begin a new stream"):
        module.check_stream("x", B + 1, after_many)


@pytest.mark.parametrize("head", [h for h in ALL if h.kind != "gru"], ids=name_of)
def test_graph_without_a_break(head):
    torch.compiler.reset()
    model = make(head)
    clips = torch.randn(B, 4, 3, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(clips)["stage5"], model(clips)["stage5"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("head", ALL, ids=name_of)
def test_half_precision(head):
    model = make(head)
    clips = torch.randn(B, 4, 3, 32, 32)
    exact = model(clips)["stage5"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(clips)["stage5"]
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)
    model.bfloat16()
    y = model(clips.bfloat16())["stage5"]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("head", ALL, ids=name_of)
def test_classes_that_come_back(head):
    model = make(head).double()
    model.reset_classifier(0)
    model.reset_classifier(4)
    assert model(torch.randn(1, 3, 3, 32, 32).double())["stage5"].dtype == torch.float64


@pytest.mark.parametrize(
    ("make_wrong", "words"),
    [
        (lambda: TransformerHead(hidden_size=10, num_heads=4), "must divide hidden_size=10"),
        (lambda: TransformerHead(max_frames=0), "max_frames= takes"),
        (lambda: TransformerHead(max_frames=1, causal=True), "sees? itself alone"),
        (lambda: TransformerHead(causal="yes"), "causal= takes True or False"),
        (lambda: TransformerHead(pool_type="all"), "pool_type= must be one of.*'none'"),
        (lambda: AttentionHead(mlp_ratio=-1), "mlp_ratio= takes"),
        (lambda: AttentionHead(drop_rate=1), "drop_rate= must be"),
        (lambda: AttentionHead(output="frames"), "output= must be one of"),
        (lambda: MeanHead(pool_type="none"), "pool_type= must be one of"),
        (lambda: TCNHead(kernel_size=0), "kernel_size= takes"),
        (lambda: TCNHead(num_layers=40), "frames back"),
        (lambda: TCNHead(output="frame", readout="max"), "readout='max' has no effect"),
        (lambda: MinGRUHead(activation="relu"), "stands behind the projection"),
    ],
)
def test_refused(make_wrong, words):
    with pytest.raises(ValueError, match=words):
        make_wrong()


def test_clip_that_is_too_long(tmp_path):
    model = make(TransformerHead(hidden_size=8, max_frames=3))
    with pytest.raises(ValueError, match="a clip has 4 frames.*max_frames=3"):
        model(torch.randn(1, 4, 3, 32, 32))
    with pytest.raises(ValueError, match="a clip has 4 frames.*max_frames=3"):
        export_model(model, tmp_path / "model.pt2", frames=4)


def test_export_of_any_number_of_frames():
    """Heads without a recurrence by steps take clips of any length in one program."""
    frames = torch.export.Dim("frames", min=2, max=64)
    for head in (
        MeanHead(),
        AttentionHead(hidden_size=8, num_heads=2),
        TransformerHead(hidden_size=8, num_heads=2),
        TransformerHead(hidden_size=8, num_heads=2, causal=True, max_frames=4),
        TCNHead(hidden_size=6),
    ):
        model = make(head)
        program = torch.export.export(
            model, (torch.randn(1, 5, 3, 32, 32),), dynamic_shapes={"x": {1: frames}}
        )
        for time in (2, 9):
            clips = torch.randn(1, time, 3, 32, 32)
            (own,) = program.module()(clips).values()
            torch.testing.assert_close(own, model(clips)["stage5"], rtol=1e-3, atol=1e-4)


def test_states_have_names():
    names = StreamingStep(make(TransformerHead(causal=True))).state_names
    assert names == ["stage5_keys_values", "stage5_seen"]
    assert StreamingStep(make(MinGRUHead())).state_names == ["stage5_h"]
