"""Learned loss weights, against the closed form of their optimum and of their gradients."""

import math

import pytest
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from timm_branches.task.uncertainty import UncertaintyWeighting

LEVELS = ("coarse", "middle", "fine")


def weighting(*values):
    module = UncertaintyWeighting(LEVELS[: len(values)])
    module.log_var.data = torch.tensor(values)
    return module


def scalars(*values):
    return {
        level: torch.tensor(value, requires_grad=True)
        for level, value in zip(LEVELS, values, strict=False)
    }


def test_value_and_gradients():
    module, losses = weighting(0.3, -1.0, 2.0), scalars(0.5, 1.5, 2.5)
    total = module(losses, dict.fromkeys(LEVELS, torch.tensor(True)))
    pairs = [(0.3, 0.5), (-1.0, 1.5), (2.0, 2.5)]
    assert total.item() == pytest.approx(sum(math.exp(-s) * loss + s / 2 for s, loss in pairs))
    total.backward()
    assert module.log_var.grad.tolist() == pytest.approx(
        [0.5 - math.exp(-s) * loss for s, loss in pairs]
    )
    assert [x.grad.item() for x in losses.values()] == pytest.approx(
        [math.exp(-s) for s, _ in pairs]
    )
    assert list(module.weights.values()) == pytest.approx([math.exp(-s) for s, _ in pairs])


def test_starts_as_the_plain_sum():
    assert (
        UncertaintyWeighting(LEVELS)(scalars(1.0, 2.0, 4.0), dict.fromkeys(LEVELS, True)).item()
        == 7
    )


@pytest.mark.parametrize("factor", [1, 20])
def test_optimum(factor):
    """s settles at log(2 L), where a level's weight is 1 / (2 L): factors on the losses cancel."""
    module = UncertaintyWeighting(LEVELS[:2])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    for _ in range(500):
        optimizer.zero_grad()
        module(scalars(0.1 * factor, 3.0 * factor), dict.fromkeys(LEVELS, True)).backward()
        optimizer.step()
    expected = [math.log(2 * 0.1 * factor), math.log(2 * 3 * factor)]
    assert module.log_var.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("off", ["left out", "unknown"])
def test_levels_that_do_not_count(off):
    module, losses = weighting(0.3, -1.0, 2.0), scalars(0.5, 0.0, 2.5)
    known = dict.fromkeys(LEVELS, True)
    if off == "left out":
        del losses["middle"], known["middle"]
    else:
        known["middle"] = torch.tensor(False)
    total = module(losses, known)
    assert total.item() == pytest.approx(math.exp(-0.3) * 0.5 + 0.15 + math.exp(-2) * 2.5 + 1)
    total.backward()
    assert module.log_var.grad[1] == 0
    assert module.log_var.grad[[0, 2]].all()


@pytest.mark.parametrize(
    ("losses", "known"), [({}, {}), (scalars(0.0, 0.0), dict.fromkeys(LEVELS, False))]
)
def test_nothing_counts(losses, known):
    module = weighting(0.3, -1.0)
    total = module(losses, known)
    total.backward()
    assert total.item() == 0
    assert not module.log_var.grad.any()


def test_weight_decay_leaves_it_alone():
    module = weighting(0.3, -1.0)
    groups = param_groups_weight_decay(module, 0.1)
    assert [len(group["params"]) for group in groups if group["weight_decay"] == 0] == [1]
    optimizer = create_optimizer_v2(module, opt="adamw", lr=0.1, weight_decay=0.5)
    module.log_var.grad = torch.zeros(2)
    optimizer.step()
    assert module.log_var.tolist() == pytest.approx([0.3, -1.0])


def test_state():
    module = weighting(0.3, -1.0)
    state = module.state_dict()
    assert list(state) == ["log_var"]
    other = UncertaintyWeighting(LEVELS[:2])
    other.load_state_dict(state)
    assert other.weights == module.weights


def test_wrong_arguments():
    with pytest.raises(
        ValueError, match="no such level: genus; the levels are coarse, middle, fine"
    ):
        UncertaintyWeighting(LEVELS)({"genus": torch.tensor(1.0)}, {"genus": True})
    for levels in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="different names"):
            UncertaintyWeighting(levels)
