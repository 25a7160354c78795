"""The tap notation and the table of stages."""

import math

import pytest
import timm
import torch

from timm_branches import Tap, create_branch_model, list_taps
from timm_branches.taps.notation import stage_table


def sizes(name, taps, **kwargs):
    """Shapes of the maps at taps, measured on the meta device at the backbone's own input size."""
    with torch.device("meta"):
        model = create_branch_model(name, taps=taps, num_classes=2, **kwargs)
        maps = model.forward_taps(torch.empty(1, *model.input_size))
    return [tuple(y.shape[1:]) for y in maps.values()]


class TestNotation:
    @pytest.mark.parametrize(
        "spec", [3, "3", "conv3", "stage3", " stage3 ", Tap(3), Tap(stage="conv3"), {"stage": 3}]
    )
    def test_stage(self, spec):
        tap = Tap.parse(spec)
        assert (tap.stage, tap.module, tap.detach, tap.name) == (3, None, False, "stage3")

    @pytest.mark.parametrize(
        "path", ["layer3.2.conv2", "stages.3", "blocks", "conv1.weight", "stage3.0", "conv_stem"]
    )
    def test_module(self, path):
        tap = Tap.parse(path)
        assert (tap.stage, tap.module, tap.name) == (None, path, path.replace(".", "_"))

    def test_detach(self):
        assert Tap.parse({"stage": 4, "detach": True}) == Tap(4, detach=True)

    @pytest.mark.parametrize(
        "tap",
        [Tap(3), Tap(5, detach=True), Tap(module="layer1.0"), Tap(module="layer1.0", detach=True)],
    )
    def test_dict(self, tap):
        assert Tap.parse(tap.to_dict()) == tap

    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"stage": 3, "module": "layer3"},
            {"stage": "layer3"},
            {"stage": 3.0},
            {"stage": True},
        ],
    )
    def test_refused(self, kwargs):
        with pytest.raises(ValueError, match="[Tt]ap|stage"):
            Tap(**kwargs)


class TestVGG:
    @pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg16_bn"])
    def test_stage_is_a_block_with_its_pool(self, name):
        assert sizes(name, [1, 2, 3, 4, 5]) == [
            (64, 112, 112),
            (128, 56, 56),
            (256, 28, 28),
            (512, 14, 14),
            (512, 7, 7),
        ]
        assert [(s.stage, s.stride) for s in list_taps(name)] == [(k, 2**k) for k in range(1, 6)]

    def test_module_is_the_pool(self):
        features = timm.create_model("vgg16_bn").features
        modules = [features[int(s.module.removeprefix("features."))] for s in list_taps("vgg16_bn")]
        assert all(isinstance(m, torch.nn.MaxPool2d) for m in modules)
        assert [s.module for s in list_taps("vgg16_bn")][2:] == [
            "features.23",
            "features.33",
            "features.43",
        ]


class TestPyramids:
    @pytest.mark.parametrize(
        ("name", "stages"),
        [
            ("levit_128", {3: 16, 4: 32, 5: 64}),
            ("convnext_atto", {2: 4, 3: 8, 4: 16, 5: 32}),
            ("swin_tiny_patch4_window7_224", {2: 4, 3: 8, 4: 16, 5: 32}),
            ("resnet18", {k: 2**k for k in range(1, 6)}),
            ("efficientnet_b0", {k: 2**k for k in range(1, 6)}),
            ("darknet53", {k: 2**k for k in range(6)}),
            ("hrnet_w18_small", {k: 2**k for k in range(1, 6)}),
        ],
    )
    def test_last_stage_is_five(self, name, stages):
        table = list_taps(name)
        assert {row.stage: row.stride for row in table} == stages
        size = timm.get_pretrained_cfg(name).input_size[-1]
        assert sizes(name, list(stages)) == [
            (row.channels, math.ceil(size / row.stride), math.ceil(size / row.stride))
            for row in table
        ]


class TestWithoutPyramid:
    @pytest.mark.parametrize(
        ("name", "blocks"),
        [
            ("vit_tiny_patch16_224", [1, 3, 6, 9, 12]),
            ("mixer_s32_224", [1, 2, 4, 6, 8]),
            ("vit_large_patch16_224", [1, 6, 12, 18, 24]),
            ("test_vit", [1, 2, 3, 5, 6]),
            ("beit_base_patch16_224", [1, 3, 6, 9, 12]),
        ],
    )
    def test_blocks_by_depth(self, name, blocks):
        table = list_taps(name)
        assert [row.stage for row in table] == [1, 2, 3, 4, 5]
        assert [row.module for row in table] == [f"blocks.{number - 1}" for number in blocks]

    def test_vit_is_a_grid(self):
        assert sizes("vit_tiny_patch16_224", [1, 2, 3, 4, 5]) == [(192, 14, 14)] * 5

    @pytest.mark.parametrize(
        ("name", "blocks"),
        [("crossvit_tiny_240", [1, 1, 2, 3, 3]), ("crossvit_18_240", [1, 1, 2, 3, 3])],
    )
    def test_crossvit_counts_its_coarse_branch(self, name, blocks):
        """timm lists all blocks of one branch, then all of the other.

        A stage must not lie before the one below it.
        """
        table = list_taps(name)
        assert [row.module for row in table] == [f"blocks.{number - 1}" for number in blocks]
        depth = len(timm.create_model(name).blocks)
        assert [row.index - depth for row in table] == [number - 1 for number in blocks]
        assert len({row.channels for row in table}) == 1
        assert sizes(name, [3, 4]) == [(table[0].channels, 14, 14)] * 2


class TestListTaps:
    def test_table(self):
        assert str(list_taps("resnet50")) == (
            "stage  module  channels  stride\n"
            "1      act1    64        2\n"
            "2      layer1  256       4\n"
            "3      layer2  512       8\n"
            "4      layer3  1024      16\n"
            "5      layer4  2048      32"
        )

    def test_of_a_model(self):
        assert list(list_taps(timm.create_model("resnet18"))) == list(list_taps("resnet18"))

    def test_options(self):
        assert [row.stride for row in list_taps("resnet18", output_stride=8)] == [2, 4, 8, 8, 8]
        assert list_taps("resnet18", in_chans=1)[0].channels == 64

    def test_needs_no_memory(self, monkeypatch):
        def create(*args, **kwargs):
            made.append(timm.create_model(*args, **kwargs))
            return made[-1]

        made = []
        monkeypatch.setattr("timm_branches.taps.notation.create_model", create)
        table = list_taps("vit_giant_patch14_224")  # 1 G parameters, 4 GB
        assert [row.module for row in table] == [f"blocks.{i}" for i in (0, 9, 19, 29, 39)]
        assert {t.device.type for t in made[0].state_dict().values()} == {"meta"}

    def test_unknown_model(self):
        with pytest.raises(ValueError, match=r"no model 'resnet5O'.*resnet50"):
            list_taps("resnet5O")

    def test_a_model_without_features(self):
        with pytest.raises(ValueError, match="Linear cannot be tapped by stage"):
            stage_table(torch.nn.Linear(2, 2))


class TestMissingTaps:
    @pytest.mark.parametrize("tap", [0, 6, -1, "stage7"])
    def test_stage(self, tap):
        with pytest.raises(ValueError, match="resnet18 has no stage") as error:
            create_branch_model("resnet18", taps=[3, tap])
        assert str(list_taps("resnet18")) in str(error.value)

    def test_stage_of_a_short_pyramid(self):
        with pytest.raises(ValueError, match="levit_128 has no stage 2") as error:
            create_branch_model("levit_128", taps=[2])
        assert str(list_taps("levit_128")) in str(error.value)

    @pytest.mark.parametrize(
        "path", ["layer3.7", "layer3.0.conv9", "Layer3", "layer2.0.conv1.weight"]
    )
    def test_module(self, path):
        with pytest.raises(ValueError, match="resnet18 has no module") as error:
            create_branch_model("resnet18", taps=[path])
        assert str(list_taps("resnet18")) in str(error.value)

    def test_nearest_module(self):
        with pytest.raises(ValueError, match=r"Did you mean .*'layer3.1.conv2'"):
            create_branch_model("resnet18", taps=["layer3.2.conv2"])

    def test_none(self):
        with pytest.raises(ValueError, match="taps= is empty"):
            create_branch_model("resnet18", taps=[])
