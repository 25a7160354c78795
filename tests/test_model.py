"""The branch model: its forward pass, its options, and timm's contract."""

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch import nn

from timm_branches import FlattenHead, PoolHead, Tap, Taxonomy, create_branch_model


def images(size=32, batch=2, in_chans=3):
    return torch.randn(batch, in_chans, size, size, generator=torch.Generator().manual_seed(0))


class HandWrittenBCNN(nn.Module):
    """The network of the forum question (seed 4), cut by hand, with the branches behind conv
    blocks 3, 4 and 5."""

    def __init__(self, features, widths, classes, size):
        super().__init__()
        layers = list(features.children())
        self.conv3 = nn.Sequential(*layers[0:24])
        self.conv4 = nn.Sequential(*layers[24:34])
        self.conv5 = nn.Sequential(*layers[34:44])
        flat = [256 * (size // 8) ** 2, 512 * (size // 16) ** 2, 512 * (size // 32) ** 2]
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Linear(f, w),
                nn.ReLU(),
                nn.BatchNorm1d(w),
                nn.Dropout(0.5),
                nn.Linear(w, w),
                nn.ReLU(),
                nn.BatchNorm1d(w),
                nn.Dropout(0.5),
                nn.Linear(w, k),
            )
            for f, w, k in zip(flat, widths, classes, strict=True)
        )

    def forward(self, x):
        maps = []
        for block in (self.conv3, self.conv4, self.conv5):
            x = block(x)
            maps.append(x.reshape(len(x), -1))
        return [branch(y) for branch, y in zip(self.branches, maps, strict=True)]


class TestSeedNetwork:
    @pytest.fixture(scope="class")
    def both(self):
        torch.manual_seed(0)
        model = create_branch_model(
            "vgg16_bn",
            taps=[3, 4, 5],
            num_classes=[2, 7, 25],
            img_size=32,
            head=[FlattenHead((16, 16)), FlattenHead((24, 24)), FlattenHead((32, 32))],
        )
        plain = timm.create_model("vgg16_bn")
        plain.features.load_state_dict(model.backbone.features.state_dict(), strict=False)
        own = HandWrittenBCNN(plain.features, (16, 24, 32), (2, 7, 25), 32)
        for branch, name in zip(own.branches, model.names, strict=True):
            values = list(model.head(name).state_dict().values())
            branch.load_state_dict(dict(zip(branch.state_dict(), values, strict=True)))
        return model, own

    def test_eval(self, both):
        model, own = both[0].eval(), both[1].eval()
        logits = model(images(batch=4))
        assert list(logits) == ["stage3", "stage4", "stage5"]
        assert [tuple(y.shape) for y in logits.values()] == [(4, 2), (4, 7), (4, 25)]
        for y, e in zip(logits.values(), own(images(batch=4)), strict=True):
            torch.testing.assert_close(y, e)

    def test_train(self, both):
        """Dropout included: the heads draw from the generator in the same order."""
        model, own = both[0].train(), both[1].train()
        torch.manual_seed(3)
        logits = list(model(images(batch=4)).values())
        torch.manual_seed(3)
        for y, e in zip(logits, own(images(batch=4)), strict=True):
            torch.testing.assert_close(y, e)
        sum(y.square().sum() for y in logits).backward()
        sum(y.square().sum() for y in own(images(batch=4))).backward()
        assert model.backbone.features[0].weight.grad.abs().sum() > 0

    def test_same_size(self, both):
        assert sum(p.numel() for p in both[0].parameters()) == sum(
            p.numel() for p in both[1].parameters()
        )


class TestHeads:
    def test_as_deep_as_needed(self):
        model = create_branch_model("resnet18", taps=[3, 4, 5], num_classes=2).eval()
        calls = []
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda m, a, y, name=name: calls.append(name))

        def ran(part):
            return sum(name.startswith(f"backbone.{part}.") for name in calls)

        model(images(), heads=["stage3"])
        assert (ran("layer2") > 0, ran("layer3"), ran("layer4")) == (True, 0, 0)
        assert not [name for name in calls if name.startswith(("heads.stage4", "heads.stage5"))]
        calls.clear()
        model(images(), heads=["stage5", "stage3"])
        once = (ran("layer2"), ran("layer3"), ran("layer4"))
        assert min(once) > 0
        calls.clear()
        model(images())
        assert (ran("layer2"), ran("layer3"), ran("layer4")) == once  # one pass feeds all
        assert calls.count("backbone.conv1") == 1

    def test_order_and_values(self):
        model = create_branch_model(
            "resnet18", taps=[5, 2, "layer3.0.bn1"], num_classes=[2, 3, 4]
        ).eval()
        everything = model(images())
        assert list(everything) == ["stage5", "stage2", "layer3_0_bn1"]
        some = model(images(), heads=("layer3_0_bn1", "stage5"))
        assert list(some) == ["stage5", "layer3_0_bn1"]
        for name, y in some.items():
            assert torch.equal(y, everything[name])
        assert torch.equal(model(images(), heads="stage2")["stage2"], everything["stage2"])

    @pytest.mark.parametrize("heads", [["stage4"], [], ["stage3", "nose"]])
    def test_unknown(self, heads):
        model = create_branch_model("test_resnet", taps=[3, 5], num_classes=2)
        with pytest.raises(ValueError, match=r"the model's heads are \['stage3', 'stage5'\]"):
            model(images(), heads=heads)

    def test_one_per_tap(self):
        model = create_branch_model(
            "test_resnet",
            taps=[2, 3, 4, 5],
            num_classes=[2, 3, 4, 0],
            img_size=32,
            head=[
                "pool",
                PoolHead((8,), "catavgmax", 0.25),
                FlattenHead(()),
                {"kind": "flatten", "hidden": [6, 5]},
            ],
        )
        model.eval()
        maps, logits = model.forward_taps(images()), model(images())
        assert [tuple(y.shape) for y in logits.values()] == [(2, 2), (2, 3), (2, 4), (2, 5)]
        first, second, third, fourth = (model.head(n) for n in model.names)
        y = maps["stage2"].mean((2, 3)) @ first.fc.weight.T + first.fc.bias
        torch.testing.assert_close(logits["stage2"], y)
        y = torch.cat([maps["stage3"].mean((2, 3)), maps["stage3"].amax((2, 3))], 1)
        y = second.hidden[2](torch.relu(second.hidden[0](y)))
        torch.testing.assert_close(logits["stage3"], second.fc(y))
        torch.testing.assert_close(logits["stage4"], third.fc(maps["stage4"].flatten(1)))
        assert [m.p for m in model.heads.modules() if isinstance(m, nn.Dropout)] == [
            0.0,
            0.25,
            0.5,
            0.5,
        ]
        assert isinstance(fourth.fc, nn.Identity)

    @pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
    def test_pooling(self, pool):
        model = create_branch_model(
            "test_resnet", taps=[4], num_classes=3, head=PoolHead(pool_type=pool)
        ).eval()
        y, head = model.forward_taps(images())["stage4"], model.head("stage4")
        avg, top = y.mean((2, 3)), y.amax((2, 3))
        v = {
            "avg": avg,
            "max": top,
            "avgmax": (avg + top) / 2,
            "catavgmax": torch.cat([avg, top], 1),
        }[pool]
        torch.testing.assert_close(model(images())["stage4"], head.fc(v))

    def test_default_hidden_widths(self):
        """Twice the channels.

        The 256, 512 and 1024 of B-CNN's branches on maps of 128, 256 and 512 channels.
        """
        model = create_branch_model(
            "vgg11", taps=[2, 3, 5], num_classes=2, head="flatten", img_size=32
        )
        assert [
            [m.out_features for m in model.head(n).hidden if isinstance(m, nn.Linear)]
            for n in model.names
        ] == [[256, 256], [512, 512], [1024, 1024]]
        kinds = [type(m).__name__ for m in model.head("stage2").hidden]
        assert kinds == ["Linear", "ReLU", "BatchNorm1d", "Dropout"] * 2

    def test_flatten_is_bound_to_a_size(self):
        model = create_branch_model(
            "test_resnet", taps=[4], num_classes=3, head="flatten", img_size=64
        ).eval()
        with pytest.raises(
            ValueError, match=r"'flatten' head at tap 'stage4' was made for a map of 4x4, got 2x2"
        ):
            model(images(32))

    @pytest.mark.parametrize(
        ("head", "match"),
        [
            ("nose", "Unknown head 'nose'"),
            ({"kind": "pool", "width": 3}, "head 'pool'"),
            (["pool"], "entries in head="),
            (None, "Unknown head"),
            (3, "Unknown head"),
        ],
    )
    def test_refused(self, head, match):
        with pytest.raises(ValueError, match=match):
            create_branch_model("test_resnet", taps=[3, 4], num_classes=2, head=head)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"hidden": (0,)},
            {"hidden": (1.5,)},
            {"drop_rate": 1.0},
            {"drop_rate": -1},
            {"pool_type": "min"},
        ],
    )
    def test_bad_options(self, kwargs):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            PoolHead(**kwargs)


class TestNamesAndClasses:
    TREE = Taxonomy.from_paths(["a/x", "a/y", "b/z"], levels=["coarse", "fine"])

    def test_backbones_own_classes(self):
        assert create_branch_model("resnet18").num_classes == {"stage5": 1000}
        assert create_branch_model("resnet18", taps=[3, 4]).num_classes == {
            "stage3": 1000,
            "stage4": 1000,
        }

    def test_a_backbone_without_classes(self):
        with pytest.raises(ValueError, match="give num_classes="):
            create_branch_model("vit_small_patch14_dinov2")

    def test_taxonomy(self):
        model = create_branch_model("test_resnet", taps=[3, 5], taxonomy=self.TREE)
        assert model.num_classes == {"coarse": 2, "fine": 3}
        assert create_branch_model(
            "test_resnet", taps=[3, 5], taxonomy=self.TREE, names=["u", "v"]
        ).names == ("u", "v")
        with pytest.raises(ValueError, match="2 levels .* for 1 taps"):
            create_branch_model("test_resnet", taps=[3], taxonomy=self.TREE)
        with pytest.raises(ValueError, match="does not fit the taxonomy"):
            create_branch_model("test_resnet", taps=[3, 5], taxonomy=self.TREE, num_classes=[2, 4])

    def test_names(self):
        names = ["type", "a.b", "values", "keys"]
        model = create_branch_model(
            "test_resnet", taps=[2, 3, 4, 5], names=names, num_classes=2
        ).eval()
        assert list(model(images())) == names
        assert torch.equal(model(images(), heads=["a.b"])["a.b"], model(images())["a.b"])

    @pytest.mark.parametrize(
        "names", [["a"], ["a", "a"], ["a", ""], ["a.b", "a_b"], ["type", "type_"]]
    )
    def test_bad_names(self, names):
        with pytest.raises(ValueError, match="names"):
            create_branch_model("test_resnet", taps=[3, 4], names=names, num_classes=2)

    def test_same_tap_twice(self):
        with pytest.raises(ValueError, match="give names="):
            create_branch_model("test_resnet", taps=[3, "conv3"], num_classes=2)
        model = create_branch_model(
            "test_resnet", taps=[3, Tap(3, detach=True)], names=["a", "b"], num_classes=2
        )
        a, b = model.eval().forward_taps(images()).values()
        assert torch.equal(a, b)

    @pytest.mark.parametrize("classes", [[2], [2, 3, 4], [2, -1], [2, 1.5], "ab", [True, 2]])
    def test_bad_classes(self, classes):
        with pytest.raises(ValueError, match="num_classes"):
            create_branch_model("test_resnet", taps=[3, 4], num_classes=classes)


class TestOptions:
    def test_drop_rate(self):
        def rates(**kwargs):
            model = create_branch_model(
                "vit_tiny_patch16_224",
                taps=[3, 5],
                num_classes=2,
                img_size=32,
                head=["pool", "flatten"],
                **kwargs,
            )
            return [
                {m.p for m in model.head(n).modules() if isinstance(m, nn.Dropout)}
                for n in model.names
            ]

        assert rates() == [{0.0}, {0.5}]
        assert rates(drop_rate=0.25) == [{0.25}, {0.25}]
        assert rates(drop_rate=0.0) == [{0.0}, {0.0}]

    def test_in_chans(self):
        model = create_branch_model("test_resnet", taps=[3], num_classes=2, in_chans=5).eval()
        assert model(images(in_chans=5))["stage3"].shape == (2, 2)
        assert model.in_chans == 5
        data = resolve_model_data_config(model)
        assert data["input_size"][0] == len(data["mean"]) == len(data["std"]) == 5

    @pytest.mark.parametrize(
        ("name", "size"),
        [
            ("resnet18", 48),
            ("resnet18", (32, 64)),
            ("test_convnext", 64),
            ("vit_tiny_patch16_224", 64),
            ("vit_tiny_patch16_224", (32, 64)),
        ],
    )
    def test_img_size(self, name, size):
        model = create_branch_model(
            name, taps=[4], num_classes=2, img_size=size, head="flatten"
        ).eval()
        height, width = (size, size) if isinstance(size, int) else size
        assert model.input_size == (3, height, width)
        assert model.taps[0].size == (height // 16, width // 16)
        assert model(torch.randn(1, 3, height, width))["stage4"].shape == (1, 2)
        assert resolve_model_data_config(model)["input_size"] == (3, height, width)

    def test_output_stride(self):
        model = create_branch_model(
            "resnet18", taps=[3, 4, 5], num_classes=2, output_stride=8, img_size=64
        ).eval()
        assert [t.stride for t in model.taps] == [8, 8, 8]
        assert [y.shape[-1] for y in model.forward_taps(images(64)).values()] == [8, 8, 8]

    def test_drop_path_rate(self):
        model = create_branch_model("resnet18", taps=[5], num_classes=2, drop_path_rate=0.5)
        plain = timm.create_model("resnet18", drop_path_rate=0.5)

        def rates(m):
            return [x.drop_prob for x in m.modules() if type(x).__name__ == "DropPath"]

        assert rates(model.backbone) == rates(plain) != []

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"features_only": True}, "features_only=: .*forward_taps"),
            ({"global_pool": "max"}, "global_pool=: .*PoolHead"),
            ({"global_pool": ""}, "global_pool=: .*PoolHead"),
            ({"out_indices": (1, 2)}, "out_indices=: choose taps="),
            ({"nose": 3}, "nose"),
            ({"img_size": 32, "nose": 3}, "nose"),
        ],
    )
    def test_refused(self, kwargs, match):
        with pytest.raises(ValueError, match=match):
            create_branch_model("test_resnet", taps=[3], num_classes=2, **kwargs)

    def test_unknown_model(self):
        with pytest.raises(ValueError, match=r"no model 'vgg16bn'.*vgg16_bn"):
            create_branch_model("vgg16bn")


class TestFreeze:
    def test_freeze(self):
        model = create_branch_model(
            "test_resnet", taps=[3, 5], num_classes=2, head=PoolHead((4,)), img_size=64
        )
        before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
        heads_before = {k: v.clone() for k, v in model.heads.state_dict().items()}
        assert model.freeze() is model
        model.train()
        assert model.frozen
        assert model.training
        assert model.heads.training
        assert not any(m.training for m in model.backbone.modules())
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1
        )
        seen = []
        model.head("stage5").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for _ in range(2):
            sum(y.square().sum() for y in model(images(64)).values()).backward()
            optimizer.step()
        assert seen[0].grad_fn is None
        assert not seen[0].requires_grad
        assert all(p.grad is None for p in model.backbone.parameters())
        for key, value in model.backbone.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert not torch.equal(
            model.heads.state_dict()["stage3.fc.weight"], heads_before["stage3.fc.weight"]
        )
        assert torch.is_grad_enabled()

    def test_without_it_the_statistics_move(self):
        model = create_branch_model("test_resnet", taps=[3], num_classes=2).train()
        before = model.backbone.bn1.running_mean.clone()
        model(images())
        assert not torch.equal(model.backbone.bn1.running_mean, before)


GROUPED = [
    "vit_tiny_patch16_224",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "resnet18",
    "test_efficientnet",
    "vgg11_bn",
    "beit_base_patch16_224",
    "levit_128s",
]


def groups(model, **kwargs):
    """(weight decay, learning rate) of every parameter, by name."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, **kwargs)
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group["weight_decay"], group.get("lr_scale", 1.0), group["lr"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


class TestTimmContract:
    @pytest.mark.parametrize("layer_decay", [None, 0.65])
    @pytest.mark.parametrize("name", GROUPED)
    def test_optimizer_groups(self, name, layer_decay):
        with torch.device("meta"):
            plain, model = (
                timm.create_model(name),
                create_branch_model(name, taps=[3, 5], num_classes=2),
            )
        expected = groups(plain, layer_decay=layer_decay)
        actual = groups(model, layer_decay=layer_decay)
        assert set(actual) == {n for n, p in model.named_parameters() if p.requires_grad}
        backbone = {
            n.removeprefix("backbone."): v for n, v in actual.items() if n.startswith("backbone.")
        }
        assert set(backbone) <= set(expected)
        different = {n: (v, expected[n]) for n, v in backbone.items() if v[0] != expected[n][0]}
        assert not different
        scales = {n: (v[1], expected[n][1]) for n, v in backbone.items()}
        # VGG's classifier has hidden layers of its own, which are pruned: the same decay counted
        # from fewer layers
        shift = {round(a / b, 6) for a, b in scales.values()}
        assert shift == {1.0} if name != "vgg11_bn" else len(shift) == 1
        assert {v[1] for n, v in actual.items() if n.startswith("heads.")} == {1.0}
        assert {n for n, v in actual.items() if n.startswith("heads.") and v[0]} == {
            n for n, p in model.heads.named_parameters(prefix="heads") if p.ndim > 1
        }

    @pytest.mark.parametrize("name", GROUPED)
    @pytest.mark.parametrize("coarse", [False, True])
    def test_group_matcher(self, name, coarse):
        from timm.models import group_parameters

        with torch.device("meta"):
            plain, model = (
                timm.create_model(name),
                create_branch_model(name, taps=[3, 5], num_classes=2),
            )
        a = group_parameters(plain, plain.group_matcher(coarse=coarse), reverse=True)
        b = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        kept = {n.removeprefix("backbone."): v for n, v in b.items() if n.startswith("backbone.")}
        assert kept == {n: a[n] for n in kept}
        assert len(kept) == len(list(model.backbone.parameters()))
        assert min(v for n, v in b.items() if n.startswith("heads.")) >= max(kept.values())

    def test_no_weight_decay(self):
        model = create_branch_model("vit_tiny_patch16_224", taps=[3], num_classes=2)
        assert (
            model.no_weight_decay()
            == {
                "backbone." + n for n in timm.create_model("vit_tiny_patch16_224").no_weight_decay()
            }
            >= {"backbone.pos_embed", "backbone.cls_token"}
        )
        assert create_branch_model("resnet18", taps=[3], num_classes=2).no_weight_decay() == set()

    @pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "test_convnext"])
    def test_data_config(self, name):
        assert resolve_model_data_config(
            create_branch_model(name, num_classes=2)
        ) == resolve_model_data_config(timm.create_model(name))

    def test_pretrained_cfg(self):
        model = create_branch_model(
            "resnet18", taps=[3, 5], names=["a", "type"], num_classes=[2, 3]
        )
        modules = dict(model.named_modules())
        assert modules[model.pretrained_cfg["first_conv"]] is model.backbone.conv1
        assert [modules[n] for n in model.pretrained_cfg["classifier"]] == [
            model.head("a").fc,
            model.head("type").fc,
        ]
        assert model.default_cfg is model.pretrained_cfg

    def test_features(self):
        model = create_branch_model("resnet18", taps=[5, 3], num_classes=2, img_size=64).eval()
        assert model.num_features == 512
        assert torch.equal(
            model.forward_features(images(64)), model.forward_taps(images(64))["stage5"]
        )
        assert model.feature_info == [
            {"num_chs": 512, "reduction": 32, "module": "backbone.layer4", "stage": 5},
            {"num_chs": 128, "reduction": 8, "module": "backbone.layer2", "stage": 3},
        ]

    @pytest.mark.parametrize(
        ("taps", "deepest"),
        [
            (["layer3.1.conv1", "layer3.0.conv1"], "layer3_1_conv1"),
            (["layer3.0.conv1", "layer3.1.conv1"], "layer3_1_conv1"),
            ([3, "layer3.0.conv1"], "layer3_0_conv1"),
            (["layer3.0.conv1", 4], "stage4"),
            (["layer2.0", 3], "stage3"),
            (["layer2.0", "layer1.0", 2], "layer2_0"),
        ],
    )
    def test_deepest(self, taps, deepest):
        model = create_branch_model("resnet18", taps=taps, num_classes=2, img_size=64).eval()
        maps = model.forward_taps(images(64))
        assert torch.equal(model.forward_features(images(64)), maps[deepest])
        assert model.num_features == maps[deepest].shape[1]

    def test_classifier(self):
        model = create_branch_model("test_resnet", taps=[3, 5], num_classes=[2, 3]).eval()
        assert [m.out_features for m in model.get_classifier().values()] == [2, 3]
        kept = model.head("stage3").fc
        model.reset_classifier({"stage5": 7})
        assert model.head("stage3").fc is kept
        assert [y.shape[1] for y in model(images()).values()] == [2, 7]
        model.reset_classifier(4)
        assert [y.shape[1] for y in model(images()).values()] == [4, 4]
        model.reset_classifier([5, 0])
        assert model.num_classes == {"stage3": 5, "stage5": 0}
        assert model(images())["stage5"].shape == (2, model.taps[1].channels)
        model.reset_classifier([5, 6])
        assert model.pretrained_cfg["num_classes"] == 5
        assert model.config["num_classes"] == [5, 6]

    @pytest.mark.parametrize("args", [([1, 2, 3],), ({"nose": 3},), (3, "max")])
    def test_classifier_refused(self, args):
        model = create_branch_model("test_resnet", taps=[3, 5], num_classes=[2, 3])
        with pytest.raises(ValueError, match="class counts|heads are|global_pool"):
            model.reset_classifier(*args)
        assert model.num_classes == {"stage3": 2, "stage5": 3}

    def test_reset_keeps_type(self):
        model = create_branch_model("test_resnet", taps=[3], num_classes=2).to(torch.bfloat16)
        model.reset_classifier(3)
        assert model.head("stage3").fc.weight.dtype == torch.bfloat16

    def test_grad_checkpointing(self):
        model = create_branch_model("test_vit", taps=[3], num_classes=2)
        model.set_grad_checkpointing()
        assert model.backbone.grad_checkpointing
        model.set_grad_checkpointing(False)
        assert not model.backbone.grad_checkpointing
        with pytest.raises(ValueError, match="vgg11 does not support gradient checkpointing"):
            create_branch_model("vgg11", taps=[3], num_classes=2).set_grad_checkpointing()


class TestLoading:
    @pytest.fixture(scope="class")
    def plain(self):
        torch.manual_seed(1)
        return timm.create_model("test_resnet", num_classes=11)

    @pytest.fixture(params=["pth", "safetensors"])
    def file(self, request, plain, tmp_path):
        path = tmp_path / f"weights.{request.param}"
        if request.param == "pth":
            torch.save(plain.state_dict(), path)
        else:
            from safetensors.torch import save_file

            save_file(plain.state_dict(), path)
        return path

    def check_backbone(self, model, plain):
        state = plain.state_dict()
        backbone = {
            k.removeprefix("backbone."): v
            for k, v in model.state_dict().items()
            if k.startswith("backbone.")
        }
        assert len(backbone) > 20
        assert set(backbone) <= set(state)
        for key, value in backbone.items():
            assert torch.equal(value, state[key]), key

    @pytest.mark.parametrize("taps", [[3, 5], [3], ["layer3.0"]])
    def test_checkpoint_path(self, file, plain, taps):
        self.check_backbone(
            create_branch_model("test_resnet", taps=taps, num_classes=2, checkpoint_path=file),
            plain,
        )

    def test_pretrained(self, file, plain):
        """Through timm's own loader.

        The classifier there has another number of classes than any head.
        """
        overlay = {"file": str(file), "num_classes": 11, "hf_hub_id": None, "url": ""}
        self.check_backbone(
            create_branch_model(
                "test_resnet",
                taps=[3, 5],
                num_classes=[2, 3],
                pretrained=True,
                pretrained_cfg_overlay=overlay,
            ),
            plain,
        )

    def test_of_a_branch_model(self, tmp_path):
        """Weights of a pruned backbone under ``backbone.``, as a training checkpoint holds them."""
        first = create_branch_model("test_vit", taps=[2, 3], num_classes=2)
        torch.save({"state_dict": first.state_dict()}, tmp_path / "checkpoint.pth")
        second = create_branch_model(
            "test_vit", taps=[2, 3], num_classes=5, checkpoint_path=tmp_path / "checkpoint.pth"
        )
        for key, value in second.backbone.state_dict().items():
            assert torch.equal(value, first.backbone.state_dict()[key])

    def test_of_another_model(self, file):
        with pytest.raises(ValueError, match=r"weights.* does not fit ResNet: \d+ tensors missing"):
            create_branch_model("resnet18", taps=[3], num_classes=2, checkpoint_path=file)
        with pytest.raises(ValueError, match="does not fit"):
            create_branch_model("test_vit", taps=[3], num_classes=2, checkpoint_path=file)

    @pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
    def test_not_a_checkpoint(self, tmp_path, name):
        (tmp_path / name).write_text("nothing of the kind")
        with pytest.raises(ValueError, match=name):
            create_branch_model(
                "test_resnet", taps=[3], num_classes=2, checkpoint_path=tmp_path / name
            )

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            create_branch_model(
                "test_resnet", taps=[3], num_classes=2, checkpoint_path=tmp_path / "none.pth"
            )


class TestSources:
    def test_local_dir(self, tmp_path):
        """A backbone from a folder in timm's layout; the model's file does not need that folder."""
        from timm_branches import load_model, save_model

        plain = timm.create_model("test_resnet", num_classes=7, act_layer="silu")
        timm.models.save_for_hf(
            plain, tmp_path / "folder", model_args={"act_layer": "silu"}, safe_serialization=True
        )
        model = create_branch_model(
            f"local-dir:{tmp_path / 'folder'}", taps=[3, 5], num_classes=2, pretrained=True
        )
        model.eval()
        assert torch.equal(model.backbone.conv1[0].weight, plain.conv1[0].weight)
        save_model(model, tmp_path / "model.safetensors")
        (tmp_path / "folder").rename(tmp_path / "elsewhere")
        twin = load_model(tmp_path / "model.safetensors")
        for name, y in model(images()).items():
            assert torch.equal(twin(images())[name], y)
        assert str(tmp_path) not in str(model.config)

    def test_tag(self):
        model = create_branch_model("resnet18.a1_in1k", taps=[3], num_classes=2)
        assert model.pretrained_cfg["tag"] == "a1_in1k"


class TestHeadsBesideTheLevels:
    """A taxonomy names the first heads; those after them are free."""

    def make(self, **kwargs):
        tree = Taxonomy(["a/x", "a/y", "b/z"], levels=["coarse", "fine"])
        return create_branch_model("test_resnet", taps=[3, 5, 5], taxonomy=tree, **kwargs)

    def test_free_head(self):
        model = self.make(num_classes=[None, None, 7])
        assert {k: v.shape[1] for k, v in model(torch.randn(1, 3, 64, 64)).items()} == {
            "coarse": 2,
            "fine": 3,
            "stage5": 7,
        }

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({}, r"not of \['stage5'\].*num_classes=\[None, None, '...'\]"),
            ({"num_classes": [2, 4, 7]}, r"does not fit the taxonomy's \[2, 3\]"),
            ({"num_classes": [None, None, None]}, "takes whole numbers"),
        ],
    )
    def test_classes_that_do_not_fit(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            self.make(**kwargs)
