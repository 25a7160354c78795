"""Loss-weight schedules, against the published tables and closed forms written out here."""

import ast
import json
import math
import sys
from pathlib import Path

import pytest

from timm_branches import schedules
from timm_branches.schedules import (
    PRESETS,
    ConstantSchedule,
    CosineSchedule,
    DynamicSchedule,
    LinearSchedule,
    LossWeightSchedule,
    StepSchedule,
    get_schedule,
    parse_schedule,
)

ALL = [
    StepSchedule({0: (0.98, 0.01, 0.01), 9: (0.1, 0.8, 0.1)}),
    LinearSchedule({0: (1, 0), 2.5: (0.5, 0.25), 10: (0, 1)}),
    CosineSchedule({0: (1, 0), 4: (0, 1e-7)}),
    ConstantSchedule((0.2, 0.3, 0.5)),
    DynamicSchedule((0.5, 0.3, 0.2)),
    DynamicSchedule((1, 1), floor=0.05),
]
EPOCHS = 20


def table(schedule):
    """The weights of many epochs, of a dynamic schedule too."""
    return [schedule(epoch) for epoch in range(EPOCHS)]


def keras_weights(epochs, switches):
    """What B-CNN's Keras callback does.

    Start with A, and set new weights at the END of the epochs in `switches`.
    """
    weights, used = (0.98, 0.01, 0.01), []
    for epoch in range(epochs):
        used.append(weights)
        if epoch == switches[0]:
            weights = (0.1, 0.8, 0.1)
        if epoch == switches[1]:
            weights = (0.1, 0.2, 0.7)
        if epoch == switches[2]:
            weights = (0, 0, 1)
    return used


def seed_weights(epoch):
    """The if-chain of the PyTorch rewrite."""
    if epoch <= 12:
        return 0.98, 0.01, 0.01
    if epoch <= 22:
        return 0.1, 0.8, 0.1
    if epoch <= 32:
        return 0.1, 0.2, 0.7
    return 0, 0, 1


class TestPresets:
    def test_cifar10(self):
        schedule = get_schedule("bcnn-cifar10", num_levels=3)
        assert schedule.table(60) == keras_weights(60, (8, 18, 28))
        assert [schedule(e) for e in (0, 8, 9, 18, 19, 28, 29, 500)] == [
            (0.98, 0.01, 0.01),
            (0.98, 0.01, 0.01),
            (0.1, 0.8, 0.1),
            (0.1, 0.8, 0.1),
            (0.1, 0.2, 0.7),
            (0.1, 0.2, 0.7),
            (0, 0, 1),
            (0, 0, 1),
        ]

    def test_cifar100(self):
        assert get_schedule("BCNN-CIFAR100").table(80) == keras_weights(80, (13, 23, 33))

    def test_vgg16_bn(self):
        assert get_schedule("bcnn-vgg16-bn").table(80) == [
            seed_weights(epoch) for epoch in range(80)
        ]

    @pytest.mark.parametrize(
        ("name", "last"), [("bcnn-cifar10", 29), ("bcnn-cifar100", 34), ("bcnn-vgg16-bn", 33)]
    )
    def test_keep(self, name, last):
        """The same, but for the last phase, in which all levels go on."""
        plain, keep = get_schedule(name), get_schedule(f"{name}-keep", num_levels=3)
        assert keep.table(last) == plain.table(last)
        assert keep(last) == keep(1000) == (0.05, 0.15, 0.8)

    @pytest.mark.parametrize("name", ["equal", "constant", "dynamic"])
    def test_equal(self, name):
        schedule = get_schedule(name, num_levels=4)
        assert schedule.kind == ("dynamic" if name == "dynamic" else "constant")
        assert [schedule(0), schedule(1)] == [(0.25,) * 4] * 2
        with pytest.raises(ValueError, match="needs num_levels"):
            get_schedule(name)

    @pytest.mark.parametrize("name", PRESETS)
    def test_wrong_number_of_levels(self, name):
        with pytest.raises(ValueError, match="weights for 3 levels, but there are 2"):
            get_schedule(name, num_levels=2)

    def test_unknown_name(self):
        with pytest.raises(
            ValueError, match=r"'bcnn-cifar'.*bcnn-cifar10, .*equal.*did you mean 'bcnn-cifar10'"
        ):
            get_schedule("bcnn-cifar")


class TestShapes:
    def test_step_holds_within_an_epoch(self):
        schedule = StepSchedule({5: (0, 1), 0: (1, 0)})  # the order of the keys does not matter
        assert [schedule(e) for e in (0, 4, 4.99, 5, 5.5)] == [
            (1, 0),
            (1, 0),
            (1, 0),
            (0, 1),
            (0, 1),
        ]

    def test_linear(self):
        schedule = LinearSchedule({0: (1, 0), 4: (0.2, 0.8), 10: (0, 2)})
        for epoch in (0, 1, 2.5, 4, 7, 9.75, 10, 30):
            if epoch <= 4:
                expected = (1 - 0.2 * epoch, 0.2 * epoch)
            else:
                share = min(epoch - 4, 6) / 6
                expected = (0.2 - 0.2 * share, 0.8 + 1.2 * share)
            assert schedule(epoch) == pytest.approx(expected)

    def test_cosine(self):
        schedule = CosineSchedule({0: (1, 0), 8: (0, 1)})
        for epoch in (0, 0.5, 2, 4, 7, 8, 9):
            fine = math.sin(math.pi * min(epoch, 8) / 16) ** 2  # (1 - cos x) / 2 = sin^2(x / 2)
            assert schedule(epoch) == pytest.approx((1 - fine, fine))

    @pytest.mark.parametrize("kind", [StepSchedule, LinearSchedule, CosineSchedule])
    def test_points_are_met_exactly(self, kind):
        points = {0: (0.98, 0.01, 0.01), 9: (0.1, 0.8, 0.1), 19: (0.1, 0.2, 0.7)}
        schedule = kind(points)
        assert {epoch: schedule(epoch) for epoch in points} == points
        assert schedule.points == points
        assert schedule(1000) == points[19]

    def test_weights_that_add_up_to_one_keep_doing_so(self):
        for kind in (LinearSchedule, CosineSchedule):
            schedule = kind(PRESETS["bcnn-cifar10"])
            assert [sum(schedule(e / 7)) for e in range(300)] == pytest.approx([1] * 300)


def like(schedule, weights):
    """Another schedule of the same kind."""
    return type(schedule)(weights if schedule.kind in ("constant", "dynamic") else {0: weights})


@pytest.mark.parametrize("schedule", ALL, ids=str)
class TestEveryKind:
    def test_dict(self, schedule):
        again = LossWeightSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
        assert again == schedule
        assert table(again) == table(schedule)
        assert get_schedule(schedule.to_dict(), num_levels=schedule.num_levels) == schedule

    def test_text(self, schedule):
        assert parse_schedule(str(schedule)) == schedule
        assert get_schedule(str(schedule)) == schedule

    def test_repr(self, schedule):
        assert eval(repr(schedule)) == schedule

    def test_state(self, schedule):
        other = like(schedule, [3.0] * schedule.num_levels)
        assert other != schedule
        other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        assert other == schedule
        assert table(other) == table(schedule)

    def test_state_of_another(self, schedule):
        before = schedule.to_dict()
        with pytest.raises(ValueError, match="checkpoint holds"):
            schedule.load_state_dict(next(s for s in ALL if s.kind != schedule.kind).state_dict())
        wider = like(schedule, [1] * (schedule.num_levels + 1))
        with pytest.raises(
            ValueError, match=f"{wider.num_levels} levels, but there are {schedule.num_levels}"
        ):
            schedule.load_state_dict(wider.state_dict())
        assert schedule.to_dict() == before

    @pytest.mark.parametrize("epoch", [-1, -0.5, math.nan, math.inf, None, True, "x"])
    def test_wrong_epoch(self, schedule, epoch):
        with pytest.raises(ValueError, match="epoch must be a"):
            schedule(epoch)

    def test_table(self, schedule):
        if schedule.kind != "dynamic":
            assert schedule.table(3) == [schedule(0), schedule(1), schedule(2)]
        assert schedule.table(0) == []
        for epochs in (-1, 2.0):
            with pytest.raises(ValueError, match="whole number"):
                schedule.table(epochs)

    def test_update(self, schedule):
        schedule = LossWeightSchedule.from_dict(schedule.to_dict())
        before = table(schedule)
        changed = schedule.update([0.9, *[0.3] * (schedule.num_levels - 1)], epoch=3)
        assert changed == (schedule.kind == "dynamic")
        assert (table(schedule) != before) == changed


@pytest.mark.parametrize("kind", [StepSchedule, LinearSchedule, CosineSchedule])
@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({0: (1, -0.1)}, "epoch 0: weights must not be negative"),
        ({0: (1, 1), 3: (math.nan, 1)}, "epoch 3: weights must be finite"),
        ({0: (math.inf, 1)}, "finite"),
        ({0: (1, 1), 3: (1, 1, 1)}, "epoch 0: 2, epoch 3: 3"),
        ({1: (1, 1)}, r"no weights for epoch 0.*\[1\]"),
        ({}, "no weights for epoch 0"),
        ({0: (1, 1), 4: (0, 0)}, "epoch 4: all weights are 0"),
        ({0: ()}, "no weights given"),
        ({0: 1.0}, "must be a sequence"),
        ({0: "11"}, "must be a sequence"),
        ({0: ("a", "b")}, "must be numbers"),
        ({0: (1, 1), -1: (1, 1)}, "number from 0"),
        ({0: (1, 1), "x": (1, 1)}, "number from 0"),
        ({0: (1, 1), "0": (1, 1)}, "epoch 0 is given twice"),
        ([(1, 1)], "must map an epoch"),
    ],
)
def test_wrong_points(kind, points, message):
    with pytest.raises(ValueError, match=message):
        kind(points)


def test_step_needs_whole_epochs():
    with pytest.raises(ValueError, match=r"whole number.*2\.5"):
        StepSchedule({0: (1, 0), 2.5: (0, 1)})


@pytest.mark.parametrize("weights", [(), (0, 0), (1, -1), (math.nan,), None])
def test_wrong_constant(weights):
    with pytest.raises(ValueError, match="constant schedule: "):
        ConstantSchedule(weights)


class TestReading:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (
                "0:0.98,0.01,0.01;9:0.1,0.8,0.1",
                StepSchedule({0: (0.98, 0.01, 0.01), 9: (0.1, 0.8, 0.1)}),
            ),
            (" step: 0: 1, 0; 3: 0, 1; ", StepSchedule({0: (1, 0), 3: (0, 1)})),
            ("linear:0:1,0;2.5:0,1e-3", LinearSchedule({0: (1, 0), 2.5: (0, 0.001)})),
            ("Cosine:0:1,0;3:0,1", CosineSchedule({0: (1, 0), 3: (0, 1)})),
            ("0.5,0.5", ConstantSchedule((0.5, 0.5))),
            ("constant:1", ConstantSchedule((1,))),
            ("dynamic:0.5,0.3,0.2", DynamicSchedule((0.5, 0.3, 0.2))),
            (" Dynamic: 1, 2; floor = 0.1", DynamicSchedule((1, 2), floor=0.1)),
        ],
    )
    def test_text(self, text, expected):
        assert get_schedule(text) == expected

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("0:1,0;3", "cannot read '3'"),
            ("linear:0:1:0", "cannot read '0:1:0'"),
            ("linaer:0:1,0", "cannot read 'linaer:0:1,0'"),
            ("0:1,x", "must be numbers"),
            ("x:1,0", "number from 0"),
            ("0:1,0;0:0,1", "epoch 0 is given twice"),
            ("3:1,0", "no weights for epoch 0"),
            ("step:", "no weights for epoch 0"),
            ("1,,2", "must be numbers"),
            ("dynamic:1,x", "must be numbers"),
            ("dynamic:", "'dynamic:' does not say for how many levels"),
            ("dynamic:1,1;flor=0.1", "cannot read 'flor=0.1' in .*floor=0.01"),
            ("dynamic:1,1;floor=x", "cannot read 'floor=x'"),
            ("dynamic:1,1;", "cannot read ''"),
            ("dynamic:1,1;floor=0", "floor must be a number above 0"),
        ],
    )
    def test_wrong_text(self, text, message):
        with pytest.raises(ValueError, match=message):
            get_schedule(text)

    def test_other_ways(self):
        schedule = ALL[0]
        assert get_schedule(schedule) is schedule
        assert get_schedule({0: (1, 0), 3: (0, 1)}) == StepSchedule({0: (1, 0), 3: (0, 1)})
        assert get_schedule(
            {"kind": "linear", "points": {"0": [1, 0], "3": [0, 1]}}
        ) == LinearSchedule({0: (1, 0), 3: (0, 1)})
        assert get_schedule([1, 2], num_levels=2) == ConstantSchedule((1, 2))
        with pytest.raises(ValueError, match="A schedule is"):
            get_schedule(3)

    @pytest.mark.parametrize(
        "spec",
        [
            [1, 2],
            "1,2",
            "0:1,2",
            {0: (1, 2)},
            ConstantSchedule((1, 2)),
            {"kind": "constant", "weights": [1, 2]},
        ],
    )
    def test_number_of_levels_is_checked_for_each(self, spec):
        with pytest.raises(ValueError, match="weights for 2 levels, but there are 3"):
            get_schedule(spec, num_levels=3)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({}, "needs a 'kind', one of .*cosine"),
            ({"kind": "stair"}, "needs a 'kind'"),
            ("step", "needs a 'kind'"),
            ({"kind": "step"}, "needs 'points'"),
            ({"kind": "step", "points": [[0]]}, "must hold pairs"),
            ({"kind": "step", "points": [[0, [1]], [0, [2]]]}, "twice"),
            ({"kind": "constant"}, "no weights given"),
        ],
    )
    def test_wrong_dict(self, data, message):
        with pytest.raises(ValueError, match=message):
            LossWeightSchedule.from_dict(data)


def test_kinds_are_told_apart():
    points = {0: (1, 0), 4: (0, 1)}
    assert StepSchedule(points) != LinearSchedule(points)
    assert StepSchedule(points) != "step"
    with pytest.raises(TypeError):
        hash(StepSchedule(points))


class Alternating(LossWeightSchedule):
    """A kind from outside: level k alone counts in epochs k, k + L, ..."""

    kind = "test-alternating"

    def __init__(self, levels):
        self.levels = int(levels)

    @property
    def num_levels(self):
        return self.levels

    def __call__(self, epoch):
        return tuple(float(int(epoch) % self.levels == k) for k in range(self.levels))

    def to_dict(self):
        return {"kind": self.kind, "levels": self.levels}

    @classmethod
    def from_settings(cls, data):
        return cls(data["levels"])

    @classmethod
    def from_text(cls, text):
        return cls(text)

    @classmethod
    def for_levels(cls, num_levels):
        return cls(num_levels)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "test-alternating", "levels": 2},
        "test-alternating",
        "Test-Alternating: 2",
        Alternating(2),
    ],
)
def test_a_new_kind_joins_the_registry(given):
    schedule = get_schedule(given, num_levels=2)
    assert schedule.table(3) == [(1, 0), (0, 1), (1, 0)]
    assert LossWeightSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    with pytest.raises(ValueError, match="weights for 2 levels, but there are 3"):
        get_schedule(schedule, num_levels=3)


def test_a_kind_is_taken_once():
    with pytest.raises(ValueError, match=r"StepSchedule is the schedule of kind 'step' already"):

        class Another(StepSchedule):
            kind = "step"


def test_a_kind_without_a_text_form_says_so():
    class Silent(Alternating):
        kind = "test-silent"
        from_text = LossWeightSchedule.__dict__["from_text"]
        for_levels = LossWeightSchedule.__dict__["for_levels"]

    with pytest.raises(ValueError, match="'test-silent' cannot be written as text"):
        get_schedule("test-silent:2")
    with pytest.raises(ValueError, match="'test-silent' needs settings"):
        get_schedule("test-silent", num_levels=2)


def test_needs_no_torch():
    """Schedules are plain arithmetic: they import the standard library and each other."""
    folder = Path(schedules.__file__).parent
    for file in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            else:
                continue
            for module in modules:
                inside = module.startswith("timm_branches.schedules")
                assert inside or module.split(".")[0] in sys.stdlib_module_names, (
                    file.name,
                    module,
                )
