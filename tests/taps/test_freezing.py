"""Freezing up to a stage: what is frozen, what still learns, what autograd keeps."""

import copy

import pytest
import torch

from timm_branches import Tap, create_branch_model, load_model, save_model
from timm_branches.heads import LSTMHead

# prefixes of the parameters of stages 1..3, written down from timm's code
FROZEN = {
    "resnet18": ("conv1", "bn1", "layer1", "layer2"),
    # three conv blocks, pools at 3, 7 and 14
    "vgg11_bn": tuple(f"features.{i}." for i in range(14)),
    "test_convnext": ("stem", "stages.0", "stages.1"),  # its stages are 2 to 5
    "vit_tiny_patch16_224": (
        "cls_token",
        "pos_embed",
        "patch_embed",
        *(f"blocks.{i}." for i in range(6)),
    ),
    "swin_tiny_patch4_window7_224": ("patch_embed", "layers.0", "layers.1"),
    "efficientnet_b0": ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2"),
}
OPTIONS = {
    "vit_tiny_patch16_224": {"img_size": 32},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2},
}


def make(name="resnet18", taps=(5,), **kwargs):
    torch.manual_seed(0)
    return create_branch_model(
        name,
        taps=list(taps),
        num_classes=2,
        drop_rate=0.2,
        **{"img_size": 64, **OPTIONS.get(name, {}), **kwargs},
    )


def images(model, batch=3):
    return torch.randn(batch, *model.input_size, generator=torch.Generator().manual_seed(0))


def trained(model):
    return [n for n, p in model.backbone.named_parameters() if p.requires_grad]


def saved_bytes(model, x):
    """Bytes that autograd keeps for the backward pass, but for parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(x)
    assert outputs is not None  # the graph must live until here
    return sum(size for size, _ in seen.values())


class TestStages:
    @pytest.mark.parametrize("name", FROZEN)
    def test_parameters(self, name):
        with torch.device("meta"):
            model = make(name)
        assert model.freeze(stages=3) is model
        expected = [
            n for n, _ in model.backbone.named_parameters() if not n.startswith(FROZEN[name])
        ]
        assert trained(model) == expected != []
        assert model.frozen_stages == 3
        assert not model.frozen
        assert all(p.requires_grad for p in model.heads.parameters())

    @pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "test_convnext"])
    def test_a_step(self, name):
        """Nothing of the frozen part moves, statistics included; everything behind it does."""
        model = make(name).freeze(stages=3).train()
        before = copy.deepcopy(model.backbone.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(images(model))["stage5"].square().sum().backward()
            optimizer.step()
        after = model.backbone.state_dict()
        moved = {n for n in after if not torch.equal(after[n], before[n])}
        assert not [n for n in moved if n.startswith(FROZEN[name])]
        statistics = {n for n in after if n.endswith(("running_mean", "running_var"))}
        assert moved >= {n for n in statistics if not n.startswith(FROZEN[name])} | set(
            trained(model)
        )

    def test_dropout_of_the_frozen_part(self):
        """The map of the last frozen stage is the one of eval; later ones have their dropout."""
        model = make("vit_tiny_patch16_224", [3, 5], proj_drop_rate=0.5, drop_path_rate=0.5)
        eval_maps = model.eval().forward_taps(images(model))
        model.freeze(stages=3).train()
        maps = model.forward_taps(images(model))
        torch.testing.assert_close(maps["stage3"], eval_maps["stage3"])
        assert not torch.allclose(maps["stage5"], eval_maps["stage5"])
        assert model.training
        assert model.eval().train().backbone.blocks[6].training
        assert not model.backbone.blocks[5].training

    def test_no_autograd_memory(self):
        """Autograd keeps as much as for a network that begins behind the frozen part."""
        model = make().train()
        x = images(model)
        whole = saved_bytes(model, x)
        model.freeze(stages=3)
        part = saved_bytes(model, x)
        with torch.no_grad():
            y = model.eval().backbone.forward_intermediates(
                x, indices=[2], intermediates_only=True, stop_early=True
            )[0]
        model.train()

        class Rest(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.rest = torch.nn.Sequential(
                    model.backbone.layer3, model.backbone.layer4, model.head("stage5")
                )

            def forward(self, z):
                return self.rest(z)

        assert part == saved_bytes(Rest(), y)
        assert part < whole / 4
        model.freeze()
        assert saved_bytes(model, x) < part / 4

    def test_heads_at_a_frozen_stage_learn(self):
        model = make("test_resnet", [3, 5]).freeze(stages=4)
        sum(y.sum() for y in model(images(model)).values()).backward()
        assert model.head("stage3").fc.weight.grad.abs().sum() > 0
        assert {n for n, p in model.backbone.named_parameters() if p.grad is not None} == set(
            trained(model)
        )

    def test_the_last_stage_is_everything(self):
        model = make("test_resnet").freeze(stages=5)
        assert model.frozen
        assert trained(model) == []
        assert not any(m.training for m in model.train().backbone.modules())

    @pytest.mark.parametrize("stages", [3, "conv3", "stage3"])
    def test_spellings(self, stages):
        assert make("test_resnet").freeze(stages).frozen_stages == 3

    @pytest.mark.parametrize(
        ("name", "taps", "stages"),
        [
            ("test_resnet", [3], 4),
            ("test_convnext", [5], 1),
            ("resnet18", [5], 6),
            ("resnet18", ["layer3.0"], 4),
        ],
    )
    def test_no_such_stage(self, name, taps, stages):
        model = make(name, taps)
        before = trained(model)
        for change in (model.freeze, model.unfreeze):
            with pytest.raises(ValueError, match=rf"stages={stages}: .* has the stages \["):
                change(stages=stages)
        assert trained(model) == before

    @pytest.mark.parametrize("stages", [True, 2.0, "layer3"])
    def test_no_stage_at_all(self, stages):
        with pytest.raises(ValueError, match="stage"):
            make("test_resnet").freeze(stages=stages)


class TestUnfreeze:
    def test_step_by_step(self):
        model = make().train()
        everything, counts = trained(model), []
        model.freeze()
        for stage in (5, 4, 3):
            model.unfreeze(stages=stage)
            assert model.frozen_stages == stage - 1
            counts.append({n.split(".")[0] for n in trained(model)})
        assert counts == [{"layer4"}, {"layer3", "layer4"}, {"layer2", "layer3", "layer4"}]
        assert model.backbone.layer2[0].bn1.training
        assert not model.backbone.layer1[0].bn1.training
        assert model.unfreeze(stages=1) is model
        assert trained(model) == everything
        assert model.frozen_stages is None
        assert all(m.training for m in model.modules())

    def test_all(self):
        model = make("test_resnet").eval().freeze().unfreeze()
        assert all(p.requires_grad for p in model.parameters())
        assert not model.frozen
        assert not model.training
        model(images(model))["stage5"].sum().backward()
        assert model.backbone.conv1[0].weight.grad is not None

    def test_freezing_only_adds_and_unfreezing_only_frees(self):
        model = make()
        assert model.freeze(stages=4).freeze(stages=2).frozen_stages == 4
        assert model.unfreeze(stages=5).frozen_stages == 4
        assert model.freeze().freeze(stages=2).frozen

    def test_what_others_froze_stays_frozen(self):
        model = make("resnet18", [3, Tap(5, detach=True)])
        model.backbone.layer1.requires_grad_(False)
        before = trained(model)
        # detached: nothing trains them
        assert not [n for n in before if n.startswith(("layer1", "layer3", "layer4"))]
        model.freeze(stages=2)
        assert trained(model) == [n for n in before if n.startswith("layer2")]
        model.unfreeze()
        assert trained(model) == before


def test_files_do_not_hold_it(tmp_path):
    model = make("test_resnet", head=LSTMHead(hidden_size=4)).freeze(stages=3)
    twin = load_model(save_model(model, tmp_path / "model.safetensors"))
    assert list(twin.state_dict()) == list(model.state_dict())
    assert twin.frozen_stages is None
    assert all(p.requires_grad for p in twin.parameters())


def test_a_copy_is_frozen_too():
    model = copy.deepcopy(make("test_resnet").freeze(stages=3)).train()
    assert model.frozen_stages == 3
    assert not model.backbone.bn1.training
    assert trained(model.unfreeze()) == [n for n, _ in model.backbone.named_parameters()]
