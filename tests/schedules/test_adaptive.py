"""Weights that follow the accuracies, against the source's formula."""

import json
import math

import pytest

from timm_branches.schedules import DynamicSchedule, LossWeightSchedule, parse_schedule


def plain_dynamic(base, accuracies):
    """The source's formula."""
    tau = [b * (1 - a) for b, a in zip(base, accuracies, strict=True)]
    return [t / sum(tau) for t in tau]


class TestDynamic:
    def test_follows_the_accuracies(self):
        base = (0.5, 0.3, 0.2)
        schedule = DynamicSchedule(base)
        assert schedule(0) == pytest.approx(base)
        first, second = (0.9, 0.5, 0.2), (0.95, 0.9, 0.6)
        schedule.update(first, 0)
        assert schedule(1) == pytest.approx(plain_dynamic(base, first))
        schedule.update(second, 1)
        assert schedule(2) == schedule(50) == pytest.approx(plain_dynamic(base, second))
        # as it was
        assert schedule(1) == schedule(1.9) == pytest.approx(plain_dynamic(base, first))
        assert schedule.table(3) == [schedule(0), schedule(1), schedule(2)]

    def test_base_weights_are_relative(self):
        a, b = DynamicSchedule((5, 3, 2)), DynamicSchedule((0.5, 0.3, 0.2))
        assert a(0) == pytest.approx((0.5, 0.3, 0.2))
        for schedule in (a, b):
            schedule.update([0.9, 0.5, 0.2], 0)
        assert a(1) == pytest.approx(b(1))

    @pytest.mark.parametrize("floor", [0.01, 0.2])
    def test_floor(self, floor):
        schedule = DynamicSchedule((3, 1), floor)
        schedule.update([1.0, 0.0], 0)  # errors 0 and 1
        assert schedule(1) == pytest.approx([3 * floor / (3 * floor + 1), 1 / (3 * floor + 1)])
        assert schedule(1)[0] >= floor * 0.75
        schedule.update([1.0, 1.0], 1)  # nobody is worse: the base weights again
        assert schedule(2) == pytest.approx((0.75, 0.25))

    def test_unknown_accuracy_keeps_the_weight(self):
        schedule = DynamicSchedule((0.5, 0.3, 0.2))
        schedule.update([math.nan, 0.5, 0.0], 0)
        coarse, *others = schedule(1)
        assert coarse == 0.5
        assert others == pytest.approx([0.5 * w for w in plain_dynamic((0.3, 0.2), (0.5, 0.0))])
        schedule.update([math.nan] * 3, 1)
        assert schedule(2) == schedule(1)

    def test_resumed(self):
        """A run that is cut after each epoch, its state through JSON, goes on as the one that is
        not."""
        history = [(0.5, 0.1), (0.7, math.nan), (math.nan, 0.2), (0.9, 0.6)]
        through = DynamicSchedule((0.4, 0.6), floor=0.03)
        cut = json.loads(json.dumps(through.state_dict()))
        for epoch, accuracies in enumerate(history):
            through.update(accuracies, epoch)
            resumed = DynamicSchedule((0.4, 0.6))
            resumed.load_state_dict(cut)
            resumed.update(accuracies, epoch)
            cut = json.loads(json.dumps(resumed.to_dict()))
            assert resumed == through
            assert resumed.table(epoch + 2) == through.table(epoch + 2)

    def test_taken_up_earlier(self):
        schedule, straight = DynamicSchedule((1, 1)), DynamicSchedule((1, 1))
        for epoch, accuracy in enumerate((0.1, 0.2, 0.3, 0.4)):
            schedule.update([accuracy, 0], epoch)
        schedule.update([0.9, math.nan], 1)
        straight.update([0.1, 0], 0)
        straight.update([0.9, math.nan], 1)
        assert schedule == straight

    def test_table_in_advance(self):
        schedule = DynamicSchedule((1, 1))
        assert schedule.table(1) == [(0.5, 0.5)]
        with pytest.raises(
            ValueError, match="not known in advance: only those of 1 epochs so far, not of 2"
        ):
            schedule.table(2)
        schedule.update([0.5, 0.0], 4)
        assert schedule.table(6)[4:] == [(0.5, 0.5), pytest.approx((1 / 3, 2 / 3))]
        with pytest.raises(ValueError, match="only those of 6 epochs"):
            schedule.table(7)

    @pytest.mark.parametrize(
        ("accuracies", "epoch", "message"),
        [
            ([0.5], 0, "1 accuracies for 2 levels"),
            ([91.7, 80.0], 0, "fractions between 0 and 1, not percent"),
            ([-0.1, 0.5], 0, "fractions"),
            ([0.5, math.inf], 0, "fractions"),
            ([0.5, 0.5], -1, "epoch"),
            ([0.5, 0.5], 1.5, "whole number"),
        ],
    )
    def test_wrong_update(self, accuracies, epoch, message):
        schedule = DynamicSchedule((1, 2))
        with pytest.raises(ValueError, match=message):
            schedule.update(accuracies, epoch)
        assert schedule == DynamicSchedule((1, 2))

    @pytest.mark.parametrize(
        ("base", "floor", "message"),
        [
            ((1, 0), 0.01, "must be positive"),
            ((1, -1), 0.01, "negative"),
            ((), 0.01, "no weights"),
            ((1, 1), 0, "floor"),
            ((1, 1), 1.5, "floor"),
            ((1, 1), math.nan, "floor"),
            ((1, 1), "0.1", "floor"),
        ],
    )
    def test_wrong_definition(self, base, floor, message):
        with pytest.raises(ValueError, match=f"dynamic schedule: .*{message}"):
            DynamicSchedule(base, floor)

    @pytest.mark.parametrize(
        "weights", [[[1, [1, 1]]], [[0, [1, 1, 1]]], [[0]], 3, [[0, [1, 1]], ["x", [1, 1]]]]
    )
    def test_wrong_state(self, weights):
        with pytest.raises(ValueError, match="'weights' of a 'dynamic' schedule"):
            LossWeightSchedule.from_dict({"kind": "dynamic", "base": [1, 1], "weights": weights})

    def test_definition_only(self):
        schedule = LossWeightSchedule.from_dict({"kind": "dynamic", "base": [1, 3]})
        assert schedule == DynamicSchedule((1, 3))
        schedule.update([0.2, 0.4], 0)
        assert parse_schedule(str(schedule)) == DynamicSchedule((1, 3))

    def test_number_of_levels_is_needed(self):
        with pytest.raises(
            ValueError, match=r"how many levels: .*get_schedule\('dynamic', num_levels=3\)"
        ):
            parse_schedule("dynamic")
