"""Healthy models of every head pass; every planted fault is found, named, and nothing else is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_branches import FlattenHead, Tap, Taxonomy, create_branch_model
from timm_branches.gradients import check_model
from timm_branches.gradients.structure import watch_linear_pairs
from timm_branches.heads import LSTMHead
from timm_branches.task import BranchTask, FlatTask

TREE = Taxonomy(["a/x/1", "a/x/2", "a/y/3", "b/z/4", "b/z/5"], levels=["coarse", "middle", "fine"])
LEAVES = torch.tensor([4, 1, 2, 3, 0, 4])


def make_task(taps=(3, 4, 5), backbone="test_resnet", head="pool", **options):
    torch.manual_seed(0)
    model = create_branch_model(backbone, taps=list(taps), taxonomy=TREE, img_size=64, head=head)
    return BranchTask(model, **options)


def images():
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def mlp(*layers):
    """The layers one after the other, their weights drawn anew: the same in every run."""
    torch.manual_seed(0)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return nn.Sequential(*layers)


def vectors():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)


def only_problem(diagnosis, *words):
    assert not diagnosis.ok
    assert len(diagnosis.problems) == 1, diagnosis.problems
    for word in words:
        assert word in diagnosis.problems[0]
    return True


class TestHealthy:
    @pytest.mark.parametrize("head", ["pool", "flatten", "lstm", "gru"])
    @pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
    def test_classifiers(self, head, backbone):
        x = (
            images()
            if head in ("pool", "flatten")
            else images().view(3, 2, 3, 64, 64).repeat(2, 1, 1, 1, 1)
        )
        diagnosis = check_model(make_task((4, 4, 5), backbone, head), (x, TREE.expand(LEAVES)))
        assert diagnosis.problems == []
        assert diagnosis.ok
        assert diagnosis.skipped == []

    @pytest.mark.parametrize(
        "head", ["unet", "rednet", {"kind": "rednet", "bottleneck": 6, "residual": True}]
    )
    def test_decoders(self, head):
        torch.manual_seed(0)
        model = create_branch_model(
            "test_resnet", taps=[[3, 5]], head=head, num_classes=3, img_size=64, names=["map"]
        )
        x = torch.rand(2, 3, 64, 64)
        diagnosis = check_model(
            model, (x, x.flip(0)), lambda output, y: F.mse_loss(output["map"], y)
        )
        assert diagnosis.problems == []
        assert diagnosis.skipped == ["labels"]

    def test_what_is_asked_for(self):
        task = make_task((3, Tap(stage=4, detach=True), 5), schedule=[0.5, 0.5, 0.0])
        task.trainable_module.freeze(stages=2)
        assert check_model(task, (images(), TREE.expand(LEAVES))).problems == []

    def test_frozen_recurrence_over_many_frames(self):
        torch.manual_seed(0)
        model = create_branch_model(
            "test_resnet", head=LSTMHead(hidden_size=4), num_classes=2, img_size=32
        ).freeze()
        # what the state keeps of a frame is soon less than float32 can add to the others
        with torch.no_grad():
            model.head("stage5").rnn.bias_ih_l0[4:8] = -8
        x = torch.randn(2, 12, 3, 32, 32)
        assert check_model(BranchTask(model), (x, torch.tensor([[0], [1]]))).problems == []

    def test_soft_labels_and_flat_baseline(self):
        task = make_task()
        soft = torch.cat(
            [
                F.one_hot(column, count).float()
                for column, count in zip(
                    TREE.expand(LEAVES).unbind(1), TREE.num_classes, strict=True
                )
            ],
            1,
        )
        assert check_model(task, (images(), soft)).problems == []
        flat = create_branch_model("test_resnet", num_classes=5, img_size=64)
        assert check_model(FlatTask(flat, TREE), (images(), TREE.expand(LEAVES))).problems == []

    def test_nothing_is_changed(self):
        task = make_task(head=FlattenHead(hidden=(8,)))
        task.train()
        task.trainable_module.head("fine").eval()  # a mixed state
        before = {name: value.clone() for name, value in task.state_dict().items()}
        modes, random = [m.training for m in task.modules()], torch.get_rng_state()
        batch = images(), TREE.expand(LEAVES)
        kept = batch[0].clone()
        assert check_model(task, batch).ok
        assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
        assert [m.training for m in task.modules()] == modes
        assert torch.equal(random, torch.get_rng_state())
        assert all(p.grad is None for p in task.parameters())
        assert torch.equal(batch[0], kept)


class TestLabels:
    LABELS = TREE.expand(LEAVES)

    @pytest.mark.parametrize(
        ("labels", "words"),
        [
            (
                LABELS.flip(1),
                [
                    "out of range",
                    "'coarse' go from 0 to 4",
                    "in another order: fine, middle, coarse",
                ],
            ),
            (LABELS[:, [1, 2, 0]], ["out of range", "in another order: middle, fine, coarse"]),
            (
                LABELS[:, [0, 0, 1]],
                ["does not lie under", "shifted by one level: column 1 fits 'coarse'"],
            ),
            (
                LABELS[:, [1, 2, 2]],
                ["out of range", "shifted by one level: column 0 fits 'middle'"],
            ),
            (LABELS + 1, ["out of range", "count from 1"]),
            (LABELS[:, :2], ["(6, 2)", "one column for each"]),
            (
                LABELS.clone().index_fill_(0, torch.tensor([0]), 99),
                ["go from 0 to 99", "Legal are 0"],
            ),
            (LABELS - 2, ["out of range"]),
            (
                torch.stack([LABELS[:, 0].flip(0), LABELS[:, 1], LABELS[:, 2]], 1),
                [
                    "in 2 of 6 rows the label of 'middle' does not lie under that of 'coarse'",
                    "taxonomy.expand",
                ],
            ),
        ],
    )
    def test_faults(self, labels, words):
        assert only_problem(check_model(make_task(), (images(), labels), steps=0), *words)

    def test_heads_in_the_wrong_order_without_a_taxonomy(self):
        model = create_branch_model(
            "test_resnet", taps=[4, 5], num_classes=[5, 2], names=["coarse", "fine"], img_size=64
        )
        assert only_problem(
            check_model(BranchTask(model), (images(), self.LABELS[:, [0, 2]])),
            "'fine' go from 0 to 4",
            "another order",
        )

    def test_unknown_labels_are_fine(self):
        labels = self.LABELS.clone()
        labels[0, 2] = labels[1, 0] = -1
        labels[2] = -1
        assert check_model(make_task(), (images(), labels), steps=0).problems == []


class Cut(nn.Module):
    """A head that stops its gradient in its forward pass."""

    def __init__(self, head):
        super().__init__()
        self.head, self.num_classes = head, head.num_classes

    def forward(self, x):
        return self.head(x.detach())


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Between(nn.Module):
    """Linear, what is given, Linear."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last, self.function = (
            nn.Linear(4, 6),
            nn.Tanh(),
            nn.Linear(6, 3),
            function,
        )

    def forward(self, x):
        return self.last(self.function(self.act(self.first(x))))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.used, self.forgotten = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        y = self.trunk(x).tanh()
        return self.used(y), self.forgotten(y)


class TestGradients:
    def test_a_detach_in_one_head(self):
        task = make_task()
        model = task.trainable_module
        model.heads["coarse"] = Cut(model.heads["coarse"])
        diagnosis = check_model(task, (images(), TREE.expand(LEAVES)))
        assert len(diagnosis.problems) == 3  # stages 1 to 3, which it reads
        assert all("coarse depends on it" in p and "detach()" in p for p in diagnosis.problems)

    def test_a_detach_before_everything(self):
        assert only_problem(
            check_model(Between(torch.Tensor.detach), vectors(), F.cross_entropy),
            "first: 2 trainable",
            "take away the detach()",
        )

    def test_an_unused_head(self):
        diagnosis = check_model(
            TwoHeads(), vectors(), lambda output, y: F.cross_entropy(output[0], y)
        )
        assert only_problem(diagnosis, "forgotten: 2 trainable", "not used by any loss")

    def test_dead_relus(self):
        net = mlp(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        with torch.no_grad():
            net[1].bias.fill_(-50)
        diagnosis = check_model(net, vectors(), F.cross_entropy)
        assert "the ReLU in 2 gives only zeros" in diagnosis.problems[0]
        assert any("does not depend on the input" in problem for problem in diagnosis.problems)

    def test_in_place(self):
        def overwrite(y):
            z = y.exp()
            y.add_(z.sigmoid())
            z.mul_(2)
            return z + y

        assert only_problem(
            check_model(Between(overwrite), vectors(), F.cross_entropy), "in-place", "x = x + y"
        )

    def test_not_finite(self):
        assert only_problem(
            check_model(Between(lambda y: (y - 2).log()), vectors(), F.cross_entropy),
            "not finite",
            "log in the model's own forward",
        )
        assert only_problem(
            check_model(Between(lambda y: y), vectors(), lambda o, y: F.cross_entropy(o, y) / 0),
            "it is the loss function",
        )
        x, y = vectors()
        x[0, 0] = float("nan")
        assert only_problem(
            check_model(Between(lambda y: y), (x, y), F.cross_entropy), "the batch's input itself"
        )

    def test_not_finite_gradient_only(self):
        diagnosis = check_model(
            Between(lambda y: y + (y - y.detach()).abs().sqrt()),
            vectors(),
            F.cross_entropy,
            steps=0,
        )
        assert any(
            "first: 2 trainable" in problem and "square root" in problem
            for problem in diagnosis.problems
        )

    def test_no_gradient_at_all(self):
        diagnosis = check_model(
            Between(torch.relu), vectors(), lambda o, y: F.cross_entropy(o.detach(), y)
        )
        assert only_problem(diagnosis, "no gradient at all")
        assert "learning" in diagnosis.skipped

    def test_vanishing(self):
        diagnosis = check_model(Between(lambda y: y * 1e-9), vectors(), F.cross_entropy, steps=0)
        assert "first: the gradient is only" in diagnosis.problems[0]


class TestStructure:
    @pytest.mark.parametrize(
        "between",
        [
            (nn.BatchNorm1d(6), nn.Dropout(0.5)),
            (),
            (nn.Identity(), nn.Unflatten(1, (2, 3)), nn.Flatten()),
        ],
    )
    def test_linear_after_linear(self, between):
        net = mlp(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), *between, nn.Linear(6, 3))
        assert only_problem(
            check_model(net, vectors(), F.cross_entropy),
            f"'2' and '{3 + len(between)}' are Linear",
            "nn.ReLU()",
        )

    @pytest.mark.parametrize(
        ("between", "inner"),
        [
            ((nn.ReLU(),), 6),
            ((nn.LayerNorm(6),), 6),
            ((nn.Softplus(), nn.Dropout(0.1)), 6),
            ((), 2),
        ],
    )
    def test_legal_pairs(self, between, inner):
        # the last one is a bottleneck of rank 2
        net = mlp(nn.Linear(4, inner), *between, nn.Linear(inner, 3))
        with watch_linear_pairs(net) as pairs:
            assert net(torch.randn(5, 4)).shape == (5, 3)
        assert pairs == []

    @pytest.mark.parametrize("where", ["model", "exp", "loss"])
    def test_softmax_before_cross_entropy(self, where):
        last = {"model": [nn.Softmax(1)], "exp": [nn.LogSoftmax(1)], "loss": []}[where]
        net = mlp(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), *last)
        model = net if where != "exp" else Exp(net)
        loss = F.cross_entropy if where != "loss" else lambda o, y: F.cross_entropy(o.softmax(1), y)
        assert only_problem(check_model(model, vectors(), loss), "probabilities, not logits")

    def test_softmax_with_its_own_loss(self):
        net = mlp(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Softmax(1))
        assert check_model(net, vectors(), lambda p, y: F.nll_loss(p.log(), y)).problems == []

    def test_softmax_in_a_branch(self):
        task = make_task()
        task.trainable_module.heads["middle"] = Probability(task.trainable_module.heads["middle"])
        assert only_problem(
            check_model(task, (images(), TREE.expand(LEAVES))), "middle: cross-entropy is given"
        )


class Exp(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).exp()


class Probability(Exp):
    def __init__(self, net):
        super().__init__(net)
        self.num_classes = net.num_classes

    def forward(self, x):
        return self.net(x).softmax(1)


class Ones(nn.Module):
    def forward(self, x):
        return torch.ones_like(x)


class Silenced(Between):
    def __init__(self):
        super().__init__(torch.tanh)
        self.side = nn.Linear(4, 3)

    def forward(self, x):
        return super().forward(x) + 0 * self.side(x)


class Forgets(nn.Module):
    """An LSTM that begins anew at each frame."""

    def __init__(self, keep):
        super().__init__()
        torch.manual_seed(0)
        self.cnn, self.lstm, self.fc, self.keep = (
            nn.Linear(12, 4),
            nn.LSTM(4, 5),
            nn.Linear(5, 2),
            keep,
        )

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            out, new = self.lstm(self.cnn(x[:, t].flatten(1))[None], state)
            state = new if self.keep else None
        return self.fc(out[0])


class TestBehaviour:
    def test_frozen_batchnorm_left_on(self):
        task = make_task()
        for name, p in task.trainable_module.backbone.named_parameters():
            p.requires_grad_(not name.startswith(("conv1", "bn1", "layer1")))
        diagnosis = check_model(task, (images(), TREE.expand(LEAVES)))
        assert only_problem(
            diagnosis, "BatchNorm layers (", "running statistics still change", "model.freeze()"
        )

    @pytest.mark.parametrize("frozen", [False, True])
    def test_batchnorm_without_weights_belongs_to_what_it_stands_in(self, frozen):
        part = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU()
        ).requires_grad_(not frozen)
        diagnosis = check_model(mlp(part, nn.Linear(6, 3)), vectors(), F.cross_entropy)
        assert diagnosis.ok != frozen
        assert not frozen or only_problem(diagnosis, "1 BatchNorm layers (0.1)")

    def test_dropout_in_evaluation(self):
        assert only_problem(
            check_model(Between(lambda y: F.dropout(y, 0.5)), vectors(), F.cross_entropy),
            "two passes in eval mode differ",
        )

    @pytest.mark.parametrize("keep", [False, True])
    def test_every_frame_counts(self, keep):
        x, y = torch.randn(4, 5, 3, 2, 2), torch.tensor([0, 1, 0, 1])
        diagnosis = check_model(Forgets(keep), (x, y), F.cross_entropy, steps=0)
        frames = [p for p in diagnosis.problems if "frames [0, 1, 2, 3]" in p]
        assert len(frames) == (not keep)
        if keep:
            assert diagnosis.ok

    def test_input_is_not_used(self):
        net = mlp(Ones(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        assert only_problem(
            check_model(net, vectors(), F.cross_entropy), "does not depend on the input"
        )

    def test_learning_the_wrong_way(self):
        net = Between(Reverse.apply)
        net.last.requires_grad_(False)
        assert only_problem(
            check_model(net, vectors(), F.cross_entropy), "does not fall on this one batch"
        )
        assert check_model(net, vectors(), F.cross_entropy, steps=0).ok

    def test_zero_for_ever(self):
        assert only_problem(
            check_model(Silenced(), vectors(), F.cross_entropy),
            "side.bias, side.weight",
            "exactly 0",
        )

    def test_failing_forward(self):
        assert only_problem(
            check_model(mlp(nn.Linear(4, 6), nn.Linear(5, 3)), vectors(), F.cross_entropy),
            "the forward pass fails in 1",
            "RuntimeError",
        )

    def test_text_and_refusal(self):
        text = str(check_model(Between(torch.Tensor.detach), vectors(), F.cross_entropy, steps=0))
        assert text.startswith("problem: first: 2 trainable")
        assert "passed: forward pass, structure" in text
        assert "not checked: labels, learning" in text
        with pytest.raises(ValueError, match="steps="):
            check_model(make_task(), (images(), TREE.expand(LEAVES)), steps=-1)
