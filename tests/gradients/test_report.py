"""The report against autograd by hand and closed forms.

What gets no gradient and why; nothing is disturbed.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_branches import Tap, Taxonomy, create_branch_model
from timm_branches.gradients import (
    branch_cosines,
    gradient_report,
    group_by_stage,
    plot_conflicts,
    plot_report,
)
from timm_branches.task import BranchTask

TREE = Taxonomy(["a/x/1", "a/x/2", "a/y/3", "b/z/4", "b/z/5"], levels=["coarse", "middle", "fine"])


def make_task(taps=(3, 4, 5), schedule=None, **kwargs):
    torch.manual_seed(0)
    model = create_branch_model(
        "test_resnet", taps=list(taps), taxonomy=TREE, img_size=64, **kwargs
    )
    return BranchTask(model, schedule=schedule)


def make_batch(size=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 64, 64, generator=generator), TREE.expand(torch.arange(size) % 5)


def flat(grads):
    return torch.cat([g.flatten() for g in grads]).double()


class Linears(nn.Module):
    """A trunk and two heads; what stands between them is given."""

    def __init__(self, between=lambda x: x, extra=False):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.between = between
        if extra:
            self.extra = nn.Linear(4, 1)

    def forward(self, x):
        y = self.between(self.trunk(x))
        return {"a": self.a(y), "b": self.b(y)}


def squares(output):
    return {name: y.square().mean() for name, y in output.items()}


def state(model):
    return (
        {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict(keep_vars=True).items()},
        {
            n: (p.grad, None if p.grad is None else p.grad.clone())
            for n, p in model.named_parameters()
        },
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )


def assert_same(before, after):
    for (p, x), (q, y) in zip(before[0].values(), after[0].values(), strict=True):
        assert p == q
        assert torch.equal(x, y)
    for (p, x), (q, y) in zip(before[1].values(), after[1].values(), strict=True):
        assert p is q
        assert x is None or torch.equal(x, y)
    assert before[2] == after[2]
    assert torch.equal(before[3], after[3])


class TestNumbers:
    def test_of_a_module_by_hand(self):
        torch.manual_seed(0)
        net, x, target = Linears(torch.tanh), torch.randn(5, 3), torch.randn(5, 1)
        report = gradient_report(
            net,
            (x, target),
            lambda out, y: {k: (v - y).square().mean() for k, v in out.items()},
            weights={"a": 3.0, "b": 0.5},
        )
        grads = {}
        for name in "ab":
            net.zero_grad()
            (net(x)[name] - target).square().mean().backward()
            grads[name] = flat([p.grad for p in net.trunk.parameters()])
        size = flat(net.trunk.parameters()).detach().norm()
        total = 3 * grads["a"] + 0.5 * grads["b"]
        for name, weight in (("a", 3.0), ("b", 0.5)):
            cell = report.cell(name, "trunk")
            assert cell.norm == pytest.approx(float(grads[name].norm()), rel=1e-5)
            assert cell.relative == pytest.approx(float(grads[name].norm() / size), rel=1e-5)
            assert cell.share == pytest.approx(
                float(weight * grads[name] @ total / total.square().sum()), rel=1e-4
            )
        assert report.cell("total", "trunk").norm == pytest.approx(float(total.norm()), rel=1e-5)
        cosine = float(F.cosine_similarity(grads["a"], grads["b"], dim=0))
        assert report.cosines == {("a", "b"): {"trunk": pytest.approx(cosine, abs=1e-6)}}
        assert report.cell("a", "b").status == "none"
        assert report.stages == ["trunk", "a", "b"]
        assert report.silent == []

    def test_opposed_losses(self):
        net = Linears(torch.tanh)
        report = gradient_report(
            net,
            torch.randn(4, 3),
            {"up": lambda out: out["a"].mean(), "down": lambda out: -2 * out["a"].mean()},
        )
        assert report.cosines["up", "down"]["trunk"] == pytest.approx(-1)
        assert report.cell("up", "trunk").share == pytest.approx(-1)
        assert report.cell("down", "trunk").share == pytest.approx(2)

    @pytest.mark.parametrize("uncertainty", [False, True])
    def test_a_task_with_its_weights(self, uncertainty):
        task = make_task(schedule=None if uncertainty else [0.7, 0.2, 0.1])
        if uncertainty:
            task = BranchTask(task.trainable_module, uncertainty=True)
        images, labels = make_batch()
        report = gradient_report(task, (images, labels))
        assert report.heads == ["coarse", "middle", "fine"]
        assert report.stages[-3:] == ["heads.coarse", "heads.middle", "heads.fine"]
        task.zero_grad()
        task(images, labels)["loss"].backward()
        for stage, group in group_by_stage(task.trainable_module).items():
            grad = flat([p.grad for p in group.values()])
            assert report.cell("total", stage).norm == pytest.approx(
                float(grad.norm()), rel=1e-3
            ), stage
            assert sum(report.cell(h, stage).share or 0 for h in report.heads) == pytest.approx(
                1, abs=1e-4
            )
        assert report.cell("coarse", "stage4").status == "none"
        assert report.cell("fine", "stage4").status == "ok"
        if not uncertainty:
            assert report.weights == pytest.approx({"coarse": 0.7, "middle": 0.2, "fine": 0.1})

    def test_stages_of_a_resnet(self):
        groups = group_by_stage(make_task().trainable_module)
        assert list(groups) == [
            *(f"stage{k}" for k in range(1, 6)),
            *(f"heads.{n}" for n in TREE.levels),
        ]
        for k in range(2, 6):
            assert all(name.startswith(f"backbone.layer{k - 1}.") for name in groups[f"stage{k}"])
        every = [name for group in groups.values() for name in group]
        assert sorted(every) == sorted(
            name for name, _ in make_task().trainable_module.named_parameters()
        )

    def test_stages_of_ones_own(self):
        net = Linears()
        report = gradient_report(
            net, torch.randn(4, 3), squares, stages={"bias": [net.trunk.bias], "head": net.a}
        )
        assert report.stages == ["bias", "head"]
        (grad,) = torch.autograd.grad(squares(net(torch.ones(2, 3)))["a"], net.trunk.bias)
        ones = gradient_report(net, torch.ones(2, 3), squares, stages={"bias": [net.trunk.bias]})
        assert ones.cell("a", "bias").norm == pytest.approx(float(grad.norm()), rel=1e-5)


def no_grad(x):
    with torch.no_grad():
        return x * 1


class Parallel(nn.Module):
    """Of two children one is used in full; what happens to the other is given."""

    def __init__(self, use):
        super().__init__()
        self.one, self.two, self.use = nn.Linear(3, 2), nn.Linear(3, 2), use

    def forward(self, x):
        return self.one(x) + self.use(self.two(x))


class TestReasons:
    @pytest.mark.parametrize(
        ("use", "reason"),
        [
            (lambda y: y.detach(), "detached"),
            (no_grad, "detached"),
            (lambda y: torch.tensor(y.tolist()), "detached"),
            (lambda y: 0, "unused"),
            (lambda y: 0 * y, "zero"),
            (lambda y: F.relu(-y.abs() - 1), "dead"),
            # detached, and then nothing is left of it
            (lambda y: y.detach().relu_().neg_().relu_(), "unused"),
            (lambda y: (y - y.detach()).sqrt(), "not finite"),
        ],
    )
    def test_every_reason(self, use, reason):
        report = gradient_report(Parallel(use), torch.randn(4, 3), lambda y: y.sum())
        assert {item.parameter: item.reason for item in report.silent} == {
            "two.weight": reason,
            "two.bias": reason,
        }
        status = {"unused": "none"}.get(reason, reason)
        assert report.cell("loss", "two").status == report.cell("total", "two").status == status
        assert report.cell("loss", "one").status == "ok"
        assert any(line.startswith("two: all 2 parameters") for line in report.findings)
        assert reason != "dead" or report.dead == ["the model's own forward"]

    def test_a_faint_dependence_is_one(self):
        report = gradient_report(
            Parallel(lambda y: 1e-5 * y.detach()), torch.randn(4, 3), torch.mean
        )
        assert {item.reason for item in report.silent} == {"detached"}

    def test_frozen(self):
        net = Parallel(lambda y: y)
        net.two.requires_grad_(False)
        report = gradient_report(net, torch.randn(4, 3), lambda y: y.sum())
        assert report.cell("loss", "two").status == "frozen"
        assert {item.reason for item in report.silent} == {"frozen"}

    @pytest.mark.parametrize(("scale", "status"), [(1e-9, "vanishing"), (1e-3, "ok")])
    def test_vanishing(self, scale, status):
        net = Parallel(lambda y: scale * y)
        report = gradient_report(net, torch.ones(4, 3), torch.mean)
        assert report.cell("loss", "two").status == status
        assert (
            gradient_report(net, torch.ones(4, 3), torch.mean, vanishing=0)
            .cell("loss", "two")
            .status
            == "ok"
        )
        assert any("vanishes" in line for line in report.findings) == (status == "vanishing")

    def test_dead_relu_is_named(self):
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
        with torch.no_grad():
            net[0].bias.fill_(-100)
        report = gradient_report(net, torch.randn(4, 3), lambda y: y.sum())
        assert report.dead == ["1"]
        assert [(i.parameter, i.reason) for i in report.silent] == [
            ("0.weight", "dead"),
            ("0.bias", "dead"),
            ("2.weight", "dead"),
        ]

    def test_frozen_and_detached_as_asked_for(self):
        task = make_task(taps=(3, Tap(stage=4, detach=True), 5))
        task.trainable_module.freeze(stages=2)
        report = gradient_report(task, make_batch())
        assert [report.cell("middle", f"stage{k}").status for k in range(1, 6)] == [
            "frozen",
            "frozen",
            "detached",
            "detached",
            "none",
        ]
        assert report.cell("fine", "stage4").status == "ok"
        assert any("Tap(detach=True)" in line for line in report.findings)

    def test_levels_that_are_off(self):
        report = gradient_report(make_task(schedule=[0.0, 1.0, 0.0]), make_batch())
        assert report.heads == ["middle"]
        assert {
            i.reason for i in report.silent if i.stage in ("stage5", "heads.coarse", "heads.fine")
        } == {"off"}
        # norms that begin at 0
        assert {i.reason for i in report.silent if i.stage == "stage4"} == {"zero"}


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x):
        x.mul_(self.drop(self.norm(x)))
        raise RuntimeError("out of order")


class TestUndisturbed:
    @pytest.mark.parametrize("training", [True, False])
    def test_model_is_as_before(self, training):
        task = make_task(drop_rate=0.5)
        images, labels = make_batch()
        task(images, labels)["loss"].backward()
        task.train(training)
        task.trainable_module.head("fine").eval()  # a mixed state
        before, copied = state(task), images.clone()
        first = gradient_report(task, (images, labels))
        assert_same(before, state(task))
        assert torch.equal(images, copied)
        torch.rand(3)
        assert gradient_report(task, (images, labels)).rows == first.rows

    def test_after_a_failure(self):
        net, x = Fails(), torch.randn(4, 3)
        before, copied = state(net), x.clone()
        with pytest.raises(RuntimeError, match="out of order"):
            gradient_report(net, x, lambda y: y.sum())
        assert_same(before, state(net))
        assert torch.equal(x, copied)

    def test_weights_after_looking_for_reasons(self):
        net, x = Parallel(lambda y: y.detach()), torch.randn(4, 3)
        before = state(net)
        with torch.no_grad():
            assert gradient_report(net, x, lambda y: y.sum()).cell("loss", "one").status == "ok"
        assert_same(before, state(net))


class TestRefused:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({}, "losses= is missing"),
            ({"losses": lambda out: {}}, "no loss"),
            ({"losses": lambda out: out["a"]}, "must be a scalar"),
            ({"losses": lambda out: 1.0}, "must be a scalar"),
            ({"losses": squares, "weights": {"c": 1}}, "the losses are"),
            ({"losses": squares, "stages": {"other": nn.Linear(1, 1)}}, "of the model itself"),
        ],
    )
    def test_a_module(self, kwargs, match):
        with pytest.raises(ValueError, match=match):
            gradient_report(Linears(), torch.randn(2, 3), **kwargs)

    def test_a_task(self):
        with pytest.raises(ValueError, match="no effect on a task"):
            gradient_report(make_task(), make_batch(), squares)
        with pytest.raises(ValueError, match="input, target"):
            gradient_report(make_task(), make_batch()[0])


class TestForms:
    def test_text_data_and_picture(self, tmp_path):
        report = gradient_report(Linears(lambda x: x.detach()), torch.randn(4, 3), squares)
        text = str(report)
        assert "detached" in text
        assert all(
            word in text
            for word in ("gradient norm", "relative to the weights", "share of the total")
        )
        data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert len(data["rows"]) == 3 * 3
        assert {item["reason"] for item in data["silent"]} == {"detached"}
        path = plot_report(report, tmp_path / "new" / "report.png")
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_figure_says_what_the_cells_are(self):
        from timm_branches.gradients.report_figures import report_figure

        figure = report_figure(gradient_report(make_task(), make_batch()))
        top, bottom = figure.axes[:2]
        assert [t.get_text() for t in top.get_yticklabels()] == [
            "coarse",
            "middle",
            "fine",
            "total",
        ]
        assert [t.get_text() for t in bottom.get_yticklabels()] == [
            "coarse, middle",
            "coarse, fine",
            "middle, fine",
        ]


class TestConflicts:
    @pytest.mark.parametrize(("taps", "where"), [((3, 4, 5), "stage3"), ((4, 4, 5), "stage4")])
    def test_at_the_deepest_shared_stage(self, taps, where):
        task, batch = make_task(taps), make_batch()
        report = gradient_report(task, batch)
        before = state(task)
        cosines = branch_cosines(task, batch)
        assert_same(before, state(task))
        assert list(cosines) == [("coarse", "middle"), ("coarse", "fine"), ("middle", "fine")]
        assert cosines == {pair: pytest.approx(report.cosines[pair][where]) for pair in cosines}
        assert branch_cosines(task, batch, where="stage1") == {
            pair: pytest.approx(values["stage1"]) for pair, values in report.cosines.items()
        }

    def test_a_tap_inside_a_stage(self):
        task, (images, labels) = make_task((Tap(module="layer3.0.bn1"), 4, 5)), make_batch()
        block = task.trainable_module.backbone.layer3[0]
        with torch.no_grad():
            block.bn3.weight.fill_(1)  # at 0 the block's gradients would be 0
        losses = task(images, labels)["losses"]
        shared = [block.conv1.weight, block.bn1.weight, block.bn1.bias]
        a, b = (
            flat(torch.autograd.grad(losses[name], shared, retain_graph=True))
            for name in ("coarse", "fine")
        )
        expected = float(F.cosine_similarity(a, b, dim=0))
        assert branch_cosines(task, (images, labels))["coarse", "fine"] == pytest.approx(
            expected, abs=1e-4
        )

    def test_nothing_to_compare(self):
        assert branch_cosines(make_task(schedule=[0.0, 0.0, 1.0]), make_batch()) == {}
        task = make_task()
        task.trainable_module.freeze()
        assert branch_cosines(task, make_batch()) == {}
        assert list(branch_cosines(make_task(schedule=[0.5, 0.0, 0.5]), make_batch())) == [
            ("coarse", "fine")
        ]
        with pytest.raises(ValueError, match="the stages are"):
            branch_cosines(task, make_batch(), where="stage9")

    def test_picture(self, tmp_path):
        from timm_branches.gradients.report_figures import conflicts_figure

        rows = [
            {
                "epoch": e,
                "weight_a": 1 - e / 4,
                "weight_b_c": e / 4,
                "cosine_a_b_c": None if e % 2 else e / 8,
            }
            for e in range(5)
        ]
        (line,) = [
            entry
            for entry in conflicts_figure(rows).axes[0].get_lines()
            if entry.get_label() == "a, b_c"
        ]
        assert list(line.get_xdata()) == [1, 3, 5]  # people count epochs from 1
        assert list(line.get_ydata()) == [0, 0.25, 0.5]
        assert plot_conflicts(rows, tmp_path / "c.png").exists()
        with pytest.raises(ValueError, match="nothing to plot"):
            plot_conflicts([{"epoch": 0, "cosine_a_b": None}], tmp_path / "d.png")
