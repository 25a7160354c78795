"""The task's loss against hand-written loops, levels that are off, the flat baseline and the
evaluator."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss
from timm.optim import create_optimizer_v2
from torch import nn

from timm_branches import PoolHead, Taxonomy, create_branch_model
from timm_branches.hierarchy import HierarchyEvaluator
from timm_branches.hierarchy.losses import (
    consistency_loss,
    hxe_loss,
    level_cross_entropy,
    soft_label_loss,
    tree_path_kl,
)
from timm_branches.schedules import PRESETS, LossWeightSchedule, get_schedule
from timm_branches.task import BranchTask, FlatTask, base_model

EVEN = Taxonomy(["a/x/1", "a/x/2", "a/y/3", "b/z/4", "b/z/5"], levels=["coarse", "middle", "fine"])
UNEVEN = Taxonomy(["a", "b/x", "b/y/1", "b/y/2", "c/z/3"], levels=["coarse", "middle", "fine"])


def make_model(hidden=(8,), tree=EVEN, name="test_resnet", taps=(3, 4, 5), **kwargs):
    torch.manual_seed(0)
    return create_branch_model(
        name,
        taps=list(taps),
        head=PoolHead(hidden=hidden),
        taxonomy=tree,
        in_chans=1,
        img_size=32,
        **kwargs,
    )


def make_batch(tree=EVEN, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    leaves = torch.randint(tree.num_leaves, (size,), generator=generator)
    return torch.randn(size, 1, 32, 32, generator=generator), tree.expand(leaves)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def seed_losses(outputs, labels, epoch, switches):
    """The loss function of the forum's question, with its switches as arguments."""
    l1_loss, l2_loss, l3_loss = (
        F.cross_entropy(o, y) for o, y in zip(outputs, labels.unbind(1), strict=True)
    )
    if epoch <= switches[0]:
        total_loss = 0.98 * l1_loss + 0.01 * l2_loss + 0.01 * l3_loss
    if epoch > switches[0] and epoch <= switches[1]:
        total_loss = 0.1 * l1_loss + 0.8 * l2_loss + 0.1 * l3_loss
    if epoch > switches[1] and epoch <= switches[2]:
        total_loss = 0.1 * l1_loss + 0.2 * l2_loss + 0.7 * l3_loss
    if epoch > switches[2]:
        total_loss = l3_loss
    return total_loss


# -- the weighted sum
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "switches"),
    [
        ("bcnn-vgg16-bn", (12, 22, 32)),
        ("bcnn-cifar10", (8, 18, 28)),
        ("bcnn-cifar100", (13, 23, 33)),
    ],
)
def test_weighted_sum_is_the_hand_written_one(preset, switches):
    task = BranchTask(make_model(), preset)
    # no dropout and fixed BatchNorm: both passes compute the same
    model = task.trainable_module.eval()
    images, labels = make_batch()
    for epoch in (0, *(e for s in switches for e in (s, s + 1)), 59):
        model.zero_grad()
        want = seed_losses(list(model(images).values()), labels, epoch, switches)
        want.backward()
        expected = gradients(model)
        model.zero_grad()
        task.set_epoch(epoch)
        result = task(images, labels)
        result["loss"].backward()
        got = gradients(model)
        torch.testing.assert_close(result["loss"], want)
        torch.testing.assert_close(got, expected)
        assert ("heads.coarse.fc.weight" in got) == (epoch <= switches[2])


def test_one_summed_backward_equals_separate_backwards():
    task = BranchTask(make_model(), [0.2, 0.3, 0.5])
    model = task.trainable_module
    images, labels = make_batch()
    result = task(images, labels)
    result["loss"].backward()
    summed = gradients(model)
    model.zero_grad()
    result = task(images, labels)
    for name, w in zip(task.names, (0.2, 0.3, 0.5), strict=True):
        (w * result["losses"][name]).backward(retain_graph=True)
    torch.testing.assert_close(gradients(model), summed)
    assert len(summed) == len(list(model.parameters()))


def test_equal_weights_by_default():
    task = BranchTask(make_model())
    result = task(*make_batch())
    assert task.weights == (1.0, 1.0, 1.0)
    torch.testing.assert_close(result["loss"], sum(result["losses"].values()))
    assert list(result["output"]) == list(EVEN.levels)


def test_what_a_task_refuses():
    with pytest.raises(ValueError, match="3 levels"):
        BranchTask(make_model(taps=(4, 5), tree=Taxonomy(["a/x", "b/y"])), "bcnn-cifar10")
    with pytest.raises(ValueError, match="label_smoothing"):
        BranchTask(make_model(), label_smoothing=1.0)
    task = BranchTask(make_model())
    images, labels = make_batch()
    with pytest.raises(ValueError, match=r"labels must be \(B, 3\)"):
        task(images, labels[:, 0])
    with pytest.raises(ValueError, match=r"labels must be \(B, 3\)"):
        task(images, labels[:, :2])
    with pytest.raises(ValueError, match=r"soft labels must be \(B, 10\)"):
        task(images, torch.rand(8, 5))


# -- one level's cross-entropy
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unknown_labels_leave_the_mean_over_the_known(smoothing):
    torch.manual_seed(0)
    logits = torch.randn(9, 5, requires_grad=True)
    target = torch.tensor([0, -1, 4, 2, -1, -1, 1, 3, 3])
    known = target >= 0
    want = F.cross_entropy(logits[known], target[known], label_smoothing=smoothing)
    (expected,) = torch.autograd.grad(want, logits)
    got = level_cross_entropy(logits, target, smoothing)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits)[0], expected)
    assert not expected[~known].any()


def test_label_smoothing_is_torchs():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 4), torch.randint(4, (6,))
    torch.testing.assert_close(
        level_cross_entropy(logits, target, 0.3),
        nn.CrossEntropyLoss(label_smoothing=0.3)(logits, target),
    )
    assert level_cross_entropy(logits, target, 0.3) != level_cross_entropy(logits, target)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_without_a_label_poison_nothing(value, soft):
    torch.manual_seed(0)
    target = torch.tensor([1, -1, 0, -1])
    clean = torch.randn(4, 3)
    if soft:
        target = F.one_hot(target.clamp(min=0), 3) * (target >= 0)[:, None].float()
    want = level_cross_entropy(clean, target)
    dirty = clean.clone()
    dirty[[1, 3]] = value
    dirty.requires_grad_()
    got = level_cross_entropy(dirty, target)
    got.backward()
    torch.testing.assert_close(got, want)
    assert dirty.grad.isfinite().all()
    assert not dirty.grad[[1, 3]].any()
    assert dirty.grad[[0, 2]].any()


@pytest.mark.parametrize("target", [torch.full((4,), -1), torch.zeros(4, 3)])
def test_no_known_label_is_zero_with_zero_gradients(target):
    logits = torch.randn(4, 3, requires_grad=True)
    loss = level_cross_entropy(logits, target)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert logits.grad.isfinite().all()


def test_a_batch_without_labels_on_a_level_trains_the_others():
    task = BranchTask(make_model())
    images, labels = make_batch()
    labels[:, 1] = -1
    result = task(images, labels)
    result["loss"].backward()
    assert float(result["losses"]["middle"].detach()) == 0
    assert all(not p.grad.any() for p in task.trainable_module.head("middle").parameters())
    assert all(p.grad.isfinite().all() for p in task.trainable_module.parameters())
    assert task.trainable_module.head("fine").fc.weight.grad.any()


def test_soft_labels_against_the_closed_form():
    torch.manual_seed(0)
    logits, lam = torch.randn(2, 3, dtype=torch.float64), 0.3
    # row 0 mixes classes 0 and 2; row 1 mixes class 1 with an image whose label is unknown
    target = torch.tensor([[lam, 0, 1 - lam], [0, lam, 0]], dtype=torch.float64)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    want = -(lam * np.log(p[0, 0]) + (1 - lam) * np.log(p[0, 2]) + lam * np.log(p[1, 1])) / (
        1 + lam
    )
    got = level_cross_entropy(logits, target)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.item(), want, rtol=1e-12)


def test_hard_and_one_hot_labels_agree():
    task = BranchTask(make_model().eval(), [0.2, 0.3, 0.5])
    images, labels = make_batch()
    labels[2:4, 2] = -1
    soft = torch.cat(
        [
            F.one_hot(y.clamp(min=0), k) * (y >= 0)[:, None]
            for y, k in zip(labels.unbind(1), EVEN.num_classes, strict=True)
        ],
        1,
    ).float()
    torch.testing.assert_close(task(images, soft)["loss"], task(images, labels)["loss"])


def test_half_precision_logits_are_computed_in_single():
    logits = torch.tensor([[30.0, 0.0]], dtype=torch.bfloat16)
    want = F.cross_entropy(logits.double(), torch.tensor([1])).item()
    assert level_cross_entropy(logits, torch.tensor([1])).dtype == torch.float32
    assert level_cross_entropy(logits, torch.tensor([1])).item() == pytest.approx(want, rel=1e-6)


# -- terms beside the levels' cross-entropies
# ----------------------------------------------------------------------


def eval_task(tree=EVEN, *args, **kwargs):
    """A task whose passes can be repeated, and a batch."""
    task = BranchTask(make_model(tree=tree), *args, **kwargs)
    task.trainable_module.eval()
    return task, *make_batch(tree, 12)


@pytest.mark.parametrize("tree", [EVEN, UNEVEN])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_coarse_labels_train_finer_heads(tree, smoothing):
    task, images, labels = eval_task(tree, None, smoothing, marginal=True)
    for row, keep in ((0, 1), (1, 2), (2, 0), (5, 1)):
        labels[row, keep:] = -1
    logits = task.trainable_module(images)
    for level, name in enumerate(tree.levels):
        losses = []
        for row, y in zip(labels.tolist(), logits[name], strict=True):
            known = [depth for depth in range(level + 1) if row[depth] >= 0]
            if row[level] >= 0:
                losses.append(
                    F.cross_entropy(y, torch.tensor(row[level]), label_smoothing=smoothing).item()
                )
            # classes of this level below the deepest label; there are none below a shallow leaf
            elif known:
                node = tree.nodes[known[-1]][row[known[-1]]]
                p = [
                    q.item()
                    for q, path in zip(y.double().softmax(0), tree.nodes[level], strict=True)
                    if path[: len(node)] == node
                ]
                losses += [-math.log(sum(p))] if p else []
        assert task(images, labels)["losses"][name].item() == pytest.approx(
            np.mean(losses), rel=1e-5
        ), name


def test_without_coarse_labels_the_marginal_term_changes_nothing():
    task, images, labels = eval_task(marginal=True)
    torch.testing.assert_close(task(images, labels)["loss"], eval_task()[0](images, labels)["loss"])


def test_extra_terms_are_added_with_their_weights():
    task, images, labels = eval_task(EVEN, [0.2, 0.3, 0.5], consistency=0.7, tree_path=0.4)
    logits = list(task.trainable_module(images).values())
    plain = eval_task(EVEN, [0.2, 0.3, 0.5])[0](images, labels)["loss"]
    result = task(images, labels)
    torch.testing.assert_close(
        result["loss"],
        plain + 0.7 * consistency_loss(logits, EVEN) + 0.4 * tree_path_kl(logits, labels, EVEN),
    )
    assert list(result["losses"]) == [*EVEN.levels, "consistency", "tree_path"]


def test_extra_terms_train_heads_whose_own_weight_is_0():
    task, images, labels = eval_task(EVEN, [0, 0, 1], consistency=1.0)
    task(images, labels)["loss"].backward()
    assert task.trainable_module.head("coarse").fc.weight.grad.abs().sum() > 0
    task, images, labels = eval_task(EVEN, [0, 0, 1])
    task(images, labels)["loss"].backward()
    assert task.trainable_module.head("coarse").fc.weight.grad is None


def test_class_weights_and_smoothing_of_each_level_are_torchs():
    weights = {"fine": [1.0, 2.0, 0.5, 0.0, 3.0]}
    task, images, labels = eval_task(EVEN, None, [0.0, 0.1, 0.2], weights)
    logits = task.trainable_module(images)
    want = {
        "coarse": F.cross_entropy(logits["coarse"], labels[:, 0]),
        "middle": F.cross_entropy(logits["middle"], labels[:, 1], label_smoothing=0.1),
        "fine": F.cross_entropy(
            logits["fine"], labels[:, 2], torch.tensor(weights["fine"]), label_smoothing=0.2
        ),
    }
    torch.testing.assert_close(task(images, labels)["losses"], want)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"label_smoothing": [0.1, 0.1]}, "one number or one for each"),
        ({"class_weights": {"fine": [1.0, 2.0]}}, "one weight from 0 upwards"),
        ({"class_weights": {"leaf": [1.0]}}, "one of the heads"),
        ({"class_weights": {"coarse": [1.0, -1.0]}}, "one weight from 0 upwards"),
        ({"consistency": -1.0}, "consistency must be"),
        ({"tree_path": math.inf}, "tree_path must be"),
    ],
)
def test_settings_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BranchTask(make_model(), **kwargs)


@pytest.mark.parametrize("kwargs", [{"consistency": 1.0}, {"tree_path": 1.0}, {"marginal": True}])
def test_terms_that_need_a_taxonomy(kwargs):
    model = create_branch_model(
        "test_resnet", taps=[4, 5], num_classes=[2, 3], in_chans=1, img_size=32
    )
    with pytest.raises(ValueError, match="needs a taxonomy"):
        BranchTask(model, **kwargs)


def test_learned_weights_are_kendalls():
    task, images, labels = eval_task(uncertainty=True)
    labels[:, 1] = -1
    s = torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():
        task.uncertainty.log_var.copy_(s)
    logits = task.trainable_module(images)
    want = sum(
        torch.exp(-s[i]) * F.cross_entropy(logits[name], labels[:, i]) + s[i] / 2
        for i, name in ((0, "coarse"), (2, "fine"))
    )
    loss = task(images, labels)["loss"]
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert task.uncertainty.log_var.grad[1] == 0  # the level without labels must not drift
    assert (task.uncertainty.log_var.grad[[0, 2]] != 0).all()
    assert [id(p) for p in task.parameters_of_loss()] == [id(task.uncertainty.log_var)]
    other = eval_task(uncertainty=True)[0]
    other.load_task_state(task.get_task_state())
    assert torch.equal(other.uncertainty.log_var, s)


@pytest.mark.parametrize("other", [{"schedule": "bcnn-cifar10"}, {"marginal": True}])
def test_learned_weights_alone(other):
    with pytest.raises(ValueError, match="uncertainty="):
        BranchTask(make_model(), uncertainty=True, **other)


# -- levels that are off
# -------------------------------------------------------------------------------------------


def head_state(task, optimizer, name):
    """Parameters, buffers and optimizer state of a head."""
    head = base_model(task).head(name)
    state = {k: v.clone() for k, v in head.state_dict().items()}
    for key, p in head.named_parameters():
        for slot, value in optimizer.state.get(p, {}).items():
            state[f"{key}/{slot}"] = torch.as_tensor(0.0 if value is None else value).clone()
    return state


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def steps(task, optimizer, count=2, seed=0):
    task.train()
    for i in range(count):
        images, labels = make_batch(seed=seed + i)
        optimizer.zero_grad()
        task(images, labels)["loss"].backward()
        optimizer.step()


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
def test_a_level_that_is_off_does_not_move(opt):
    task = BranchTask(make_model(), "0:1,1,1;1:0,0.5,0.5;2:0,0,1;3:1,0,0;4:1,1,1")
    optimizer = create_optimizer_v2(
        task.trainable_module, opt=opt, lr=1e-2, weight_decay=0.1, momentum=0.9
    )
    for epoch in range(5):
        task.set_epoch(epoch)
        before = {name: head_state(task, optimizer, name) for name in task.names}
        steps(task, optimizer, seed=10 * epoch)
        for name, w in zip(task.names, task.weights, strict=True):
            assert same(before[name], head_state(task, optimizer, name)) == (w == 0), (epoch, name)
    # there is optimizer state that could have moved
    assert any("/" in key for key in before["coarse"])


@pytest.mark.parametrize("preset", list(PRESETS))
def test_all_transitions_of_the_presets(preset):
    task = BranchTask(make_model(), preset)
    optimizer = create_optimizer_v2(
        task.trainable_module, opt="sgd", lr=1e-2, weight_decay=0.1, momentum=0.9
    )
    for start in PRESETS[preset]:
        for epoch in (start, start + 1):
            task.set_epoch(epoch)
            before = {name: head_state(task, optimizer, name) for name in task.names}
            steps(task, optimizer, 1, epoch)
            moved = [
                not same(before[name], head_state(task, optimizer, name)) for name in task.names
            ]
            assert moved == [w > 0 for w in PRESETS[preset][start]]
    assert moved == [preset.endswith("keep")] * 2 + [True]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_infinite_loss_of_a_level_that_is_off_poisons_nothing(value):
    model = make_model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.head("coarse").parameters():
            p.fill_(value)
    for m in (model, twin):
        task = BranchTask(m, [0, 0.5, 0.5])
        steps(task, create_optimizer_v2(m, opt="sgd", lr=1e-2), 2)
    good = {k: v for k, v in twin.state_dict().items() if not k.startswith("heads.coarse.")}
    got = model.state_dict()
    assert all(torch.equal(got[key], good[key]) for key in good)
    assert all(v.isfinite().all() for v in good.values())


def test_a_level_that_comes_back_learns():
    model = make_model(hidden=())
    task = BranchTask(model, "0:0,0,1;1:1,0,0")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2)
    steps(task, optimizer, 2)
    task.set_epoch(1)
    losses = []
    images, labels = make_batch()
    for _ in range(30):
        optimizer.zero_grad()
        loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# -- the flat baseline
# ---------------------------------------------------------------------------------------------


def flat_task(tree, **kwargs):
    torch.manual_seed(0)
    model = create_branch_model(
        "test_resnet",
        taps=[5],
        num_classes=tree.num_leaves,
        names=["leaf"],
        in_chans=1,
        img_size=32,
    )
    return FlatTask(model, tree, **kwargs)


def leaf_by_hand(tree, row):
    """Index of the leaf whose path the labels give in full, else -1."""
    for leaf, path in enumerate(tree.expand(torch.arange(tree.num_leaves)).tolist()):
        if list(row) == path:
            return leaf
    return -1


@pytest.mark.parametrize("tree", [EVEN, UNEVEN])
def test_flat_targets(tree):
    task = flat_task(tree, label_smoothing=0.1)
    task.trainable_module.eval()
    images, labels = make_batch(tree, 12)
    for row, keep in ((0, 1), (1, 2), (2, 0)):  # known down to some level only
        labels[row, keep:] = -1
    want = torch.tensor([leaf_by_hand(tree, row) for row in labels.tolist()])
    assert (want >= 0).sum() >= 9
    assert (want[2] < 0) & (len(set(want.tolist())) > 3)
    torch.testing.assert_close(task._targets(labels)["leaf"], want)
    logits = task.trainable_module(images)["leaf"]
    p = logits.double().softmax(1)
    # where the leaf is known cross-entropy, else -log of what the leaves below the label have
    # together
    losses = []
    for row, leaf, q, y in zip(labels.tolist(), want.tolist(), p, logits, strict=True):
        below = [
            i
            for i, path in enumerate(tree.expand(torch.arange(tree.num_leaves)).tolist())
            if all(a == b for a, b in zip(path, row, strict=True) if b >= 0)
        ]
        if leaf >= 0:
            losses.append(F.cross_entropy(y, torch.tensor(leaf), label_smoothing=0.1).item())
        elif max(row) >= 0:
            losses.append(-math.log(sum(float(q[i]) for i in below)))
    assert len(losses) == 11
    assert task(images, labels)["loss"].item() == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "strength", "function"),
    [
        ("hxe", None, lambda y, rows, tree: hxe_loss(y, rows, tree, 0.1)),
        ("hxe", 0.7, lambda y, rows, tree: hxe_loss(y, rows, tree, 0.7)),
        ("soft", None, lambda y, rows, tree: soft_label_loss(y, rows, tree, 10.0)),
        ("soft", 3.0, lambda y, rows, tree: soft_label_loss(y, rows, tree, 3.0)),
    ],
)
def test_flat_hierarchical_losses(loss, strength, function):
    task = flat_task(UNEVEN, loss=loss, strength=strength)
    task.trainable_module.eval()
    images, labels = make_batch(UNEVEN, 12)
    labels[3, 1:] = -1
    want = function(task.trainable_module(images)["leaf"], labels, UNEVEN)
    torch.testing.assert_close(task(images, labels)["loss"], want)
    with pytest.raises(ValueError, match="does not go with mixup"):
        task(images, torch.rand(12, sum(UNEVEN.num_classes)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss": "focal"}, "choose one of marginal, hxe, soft"),
        ({"loss": "hxe", "label_smoothing": 0.1}, "label_smoothing has no effect"),
        ({"strength": 0.5}, "strength= has no effect"),
    ],
)
def test_flat_settings_without_effect(kwargs, message):
    with pytest.raises(ValueError, match=message):
        flat_task(EVEN, **kwargs)


@pytest.mark.parametrize("tree", [EVEN, UNEVEN])
def test_flat_soft_targets(tree):
    task = flat_task(tree)
    rows = tree.expand(torch.arange(tree.num_leaves))
    dense = torch.cat(
        [
            F.one_hot(y.clamp(min=0), k) * (y >= 0)[:, None]
            for y, k in zip(rows.unbind(1), tree.num_classes, strict=True)
        ],
        1,
    ).float()
    mixed = 0.3 * dense + 0.7 * dense.flip(0)
    one_hot = torch.eye(tree.num_leaves)
    torch.testing.assert_close(task._targets(mixed)["leaf"], 0.3 * one_hot + 0.7 * one_hot.flip(0))
    with pytest.raises(ValueError, match="soft labels"):
        task._targets(mixed[:, :-1])


@pytest.mark.parametrize("tree", [EVEN, UNEVEN])
def test_flat_level_probabilities_are_sums_over_leaves(tree):
    task = flat_task(tree)
    logits = torch.randn(6, tree.num_leaves) * 3
    p = logits.double().softmax(-1)
    table = tree.expand(torch.arange(tree.num_leaves)).tolist()
    for level, got in enumerate(task.level_logits({"leaf": logits})):
        want = torch.zeros(6, tree.num_classes[level], dtype=torch.float64)
        for leaf, path in enumerate(table):
            if path[level] >= 0:
                want[:, path[level]] += p[:, leaf]
        torch.testing.assert_close(got.exp().double(), want, rtol=1e-5, atol=1e-7)


def test_flat_task_refuses_other_heads():
    with pytest.raises(ValueError, match="one head of the taxonomy's 5 leaves"):
        FlatTask(make_model(), EVEN)
    model = create_branch_model("test_resnet", taps=[5], num_classes=4)
    with pytest.raises(ValueError, match="5 leaves"):
        FlatTask(model, EVEN)


# -- the evaluator
# -------------------------------------------------------------------------------------------------


def valid_by_hand(tree, row):
    """A prediction is consistent if it follows the tree down to a leaf.

    What it says below a leaf does not count.
    """
    paths = tree.expand(torch.arange(tree.num_leaves)).tolist()
    return any(all(a == b for a, b in zip(row, path, strict=True) if b >= 0) for path in paths)


def random_case(tree, size=41, seed=0):
    torch.manual_seed(seed)
    labels = tree.expand(torch.randint(tree.num_leaves, (size,)))
    logits = {}
    for i, (name, k) in enumerate(zip(tree.levels, tree.num_classes, strict=True)):
        logits[name] = torch.randn(size, k) + 3 * F.one_hot(labels[:, i].clamp(min=0), k)
    for row in range(0, size, 5):
        labels[row, 2:] = -1
    labels[7, 1:] = -1
    labels[11] = -1
    return logits, labels


@pytest.mark.parametrize("tree", [EVEN, UNEVEN])
@pytest.mark.parametrize("max_samples", [None, 30])
def test_evaluator_against_sklearn(tree, max_samples):
    logits, labels = random_case(tree)
    evaluator = HierarchyEvaluator(tree.levels, tree.num_classes, tree, max_samples=max_samples)
    for start in range(0, len(labels), 9):
        part = slice(start, start + 9)
        evaluator.update({name: y[part] for name, y in logits.items()}, labels[part])
    metrics = evaluator.compute()
    n = max_samples or len(labels)
    assert evaluator.num_samples == n
    predictions = torch.stack([y.argmax(1) for y in logits.values()], 1)[:n]
    labels = labels[:n]
    losses, paths = [], []
    for i, (name, k) in enumerate(zip(tree.levels, tree.num_classes, strict=True)):
        known = (labels[:, i] >= 0).numpy()
        truth, guess = labels[known, i].numpy(), predictions[known, i].numpy()
        assert metrics[f"{name}_top1"] == pytest.approx(
            100 * accuracy_score(truth, guess), rel=1e-12
        )
        np.testing.assert_array_equal(
            evaluator.confusion_matrices()[i].numpy(),
            confusion_matrix(truth, guess, labels=range(k)),
        )
        p = logits[name][:n][known].double().softmax(1).numpy()
        losses += [log_loss(truth, p, labels=range(k), normalize=False), known.sum()]
    for guess, truth in zip(predictions.tolist(), labels.tolist(), strict=True):
        if any(t >= 0 for t in truth):
            paths.append(all(g == t for g, t in zip(guess, truth, strict=True) if t >= 0))
    assert metrics["full_path"] == pytest.approx(100 * np.mean(paths), rel=1e-12)
    consistent = [valid_by_hand(tree, row) for row in predictions.tolist()]
    assert 0 < sum(consistent) < n
    assert metrics["consistency"] == pytest.approx(100 * np.mean(consistent), rel=1e-12)
    assert metrics["loss"] == pytest.approx(sum(losses[::2]) / sum(losses[1::2]), rel=1e-6)


def test_evaluator_keeps_timms_contract():
    from timm.task import ClassificationEvaluator

    logits, labels = random_case(EVEN)
    evaluator = HierarchyEvaluator(EVEN.levels, EVEN.num_classes, EVEN)
    evaluator.update(logits, labels)
    for name in (
        "update",
        "compute",
        "summary",
        "reset",
        "default_metric",
        "metric_names",
        "num_samples",
    ):
        assert hasattr(ClassificationEvaluator(), name), "timm has changed"
        assert hasattr(evaluator, name)
    assert evaluator.default_metric in evaluator.metric_names
    assert tuple(evaluator.compute()) == tuple(evaluator.summary()) == evaluator.metric_names
    assert evaluator.compute() == evaluator.compute(distributed=False)
    evaluator.reset()
    evaluator.update(logits, labels)
    evaluator.update(logits, labels)
    assert evaluator.num_samples == 2 * len(labels)
    assert "consistency" not in HierarchyEvaluator(["a"], [3]).metric_names


def test_evaluator_without_labels_and_wrong_shapes():
    evaluator = HierarchyEvaluator(["a"], [3])
    evaluator.update({"a": torch.randn(2, 3)}, torch.tensor([[-1], [-1]]))
    assert np.isnan(evaluator.compute()["a_top1"])
    assert np.isnan(evaluator.compute()["full_path"])
    for bad in (
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2, 2, dtype=torch.long),
        torch.zeros(2, 1),
    ):
        with pytest.raises(ValueError, match=r"labels \(B, 1\)"):
            evaluator.update({"a": torch.randn(2, 3)}, bad)


def test_joined_counts_stay_apart_from_the_own(monkeypatch):
    """Two processes that happen to hold the same counts.

    The sum doubles counts, and no call adds to the own ones.
    """
    import torch.distributed as dist

    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    logits, labels = random_case(EVEN)
    evaluator = HierarchyEvaluator(EVEN.levels, EVEN.num_classes, EVEN)
    evaluator.update(logits, labels)
    alone = evaluator.confusion_matrices()[0]
    want = evaluator.compute()
    for _ in range(2):
        assert evaluator.compute(distributed=True) == want
        assert torch.equal(evaluator.confusion_matrices()[0], 2 * alone)
    evaluator.update(logits, labels)
    assert torch.equal(evaluator.confusion_matrices()[0], 2 * alone)
    assert evaluator.num_samples == 2 * len(labels)


def test_task_evaluators_take_the_models_output():
    images, labels = make_batch()
    for task in (BranchTask(make_model()), flat_task(EVEN)):
        task.eval()
        evaluator = task.create_evaluator(max_samples=5)
        evaluator.update(task.get_eval_model()(images), labels)
        assert evaluator.num_samples == 5
        assert {"loss", "coarse_top1", "middle_top1", "fine_top1", "full_path", "consistency"} <= {
            *evaluator.compute()
        }


# -- use outside of fit
# --------------------------------------------------------------------------------------------


def test_in_a_plain_loop():
    task = BranchTask(make_model(), "0:0.8,0.1,0.1;3:0.1,0.2,0.7;6:0,0,1")
    optimizer = torch.optim.SGD(task.parameters(), lr=0.05, momentum=0.9)
    images, labels = make_batch(size=16)
    for epoch in range(12):
        task.set_epoch(epoch)
        task.train()
        for half in (slice(0, 8), slice(8, 16)):
            optimizer.zero_grad()
            task(images[half], labels[half])["loss"].backward()
            optimizer.step()
    model = task.get_eval_model().train()
    evaluator = task.create_evaluator()
    evaluator.update(model(images), labels)
    assert evaluator.compute()["fine_top1"] > 80


def test_state_round_trip():
    task = BranchTask(make_model(), "cosine:0:1,0,0;4:0,0,1")
    task.set_epoch(3)
    state = task.get_checkpoint_state()
    other = BranchTask(make_model(), "equal")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_checkpoint_state(copy.deepcopy(state["state_dict"]), state["task_state"])
    assert other.schedule == get_schedule("cosine:0:1,0,0;4:0,0,1")
    assert (other.epoch, other.weights, other.active) == (3, task.weights, task.active)
    assert isinstance(other.schedule, LossWeightSchedule)
    for key, value in task.trainable_module.state_dict().items():
        assert torch.equal(other.trainable_module.state_dict()[key], value)
    two = BranchTask(make_model(taps=(4, 5), tree=Taxonomy(["a/x", "b/y"])))
    with pytest.raises(ValueError, match="3 levels"):
        two.load_task_state(state["task_state"])


def test_ema_state_round_trip():
    task = BranchTask(make_model())
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    for step in range(3):
        steps(task, optimizer, 1, step)
        task.update_ema(step + 1)
    state = task.get_checkpoint_state(ema=True)
    other = BranchTask(make_model())
    other.setup_ema(decay=0.5)
    other.load_checkpoint_state(state["state_dict_ema"], ema=True)
    own, averaged = base_model(task).state_dict(), base_model(other, ema=True).state_dict()
    assert all(
        torch.equal(averaged[key], base_model(task, ema=True).state_dict()[key]) for key in own
    )
    assert not torch.equal(averaged["heads.fine.fc.weight"], own["heads.fine.fc.weight"])


def test_compiled_model_goes_through_the_schedule():
    schedule = "0:0.98,0.01,0.01;1:0,0.8,0.2;2:0,0,1;3:1,0,0"
    model = make_model()
    plain, compiled = BranchTask(copy.deepcopy(model), schedule), BranchTask(model, schedule)
    compiled.compile(backend="eager")
    assert base_model(compiled) is model
    for task in (plain, compiled):
        optimizer = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9)
        for epoch in range(4):
            task.set_epoch(epoch)
            steps(task, optimizer, 2, epoch)
    want, got = base_model(plain).state_dict(), base_model(compiled).state_dict()
    assert want.keys() == got.keys()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
