"""Checkpoints of other programs: every key that fits is loaded, the rest is said or refused."""

import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from timm_branches import FlattenHead, create_branch_model, load_model, save_model
from timm_branches.taxonomy import Taxonomy

TREE = Taxonomy(["a/x", "a/y", "b/z"], levels=["coarse", "fine"])
TURNED = Taxonomy(["b/z", "a/y", "a/x"], levels=["coarse", "fine"])
OTHER = Taxonomy(["c/u", "c/v", "d/w"], levels=["coarse", "fine"])


def build(seed=0, name="test_resnet", **options):
    torch.manual_seed(seed)
    options = {"taps": [3, 5], "taxonomy": TREE, "img_size": 32} | options
    return create_branch_model(name, **options).eval()


def assert_same(a, b, prefix=""):
    ours, theirs = a.state_dict(), b.state_dict()
    compared = [key for key in theirs if key.startswith(prefix)]
    assert compared
    for key in compared:
        assert torch.equal(ours[key], theirs[key]), key


def prefixed(prefix):
    return lambda state: {f"{prefix}{key}": value for key, value in state.items()}


def inside(state):
    """torch.compile of the backbone alone."""
    return {key.replace("backbone.", "backbone._orig_mod."): state[key] for key in state}


@pytest.mark.parametrize(
    "wrap",
    [
        prefixed(""),
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("model."),
        prefixed("module.model."),
        prefixed("net."),
        prefixed("trainable_module."),  # a BranchTask, in accelerate or Trainer
        prefixed("task.trainable_module."),  # and in a LightningModule
        inside,
        lambda state: {"state_dict": prefixed("model.")(state), "epoch": 3},
        lambda state: {"state_dict": {}, "state_dict_ema": state},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    ],
)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_every_key_is_loaded(wrap, name, tmp_path, caplog):
    size = {"test_vit": 160}.get(name, 32)
    model = build(1, name, img_size=size)
    torch.save(wrap(model.state_dict()), tmp_path / "a.ckpt")
    twin = build(2, name, img_size=size, checkpoint_path=tmp_path / "a.ckpt")
    assert_same(twin, model)
    assert not caplog.records


def test_a_pruned_backbone(tmp_path, caplog):
    """vgg11 loses its classifier; what is left keeps timm's names."""
    model = build(1, "vgg11", taps=[1, 2])
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert_same(build(2, "vgg11", taps=[1, 2], checkpoint_path=tmp_path / "a.pth"), model)
    with pytest.raises(ValueError, match="does not fit VGG: 12 tensors missing"):
        build(2, "vgg11", checkpoint_path=tmp_path / "a.pth")
    assert not caplog.records


def test_a_deeper_checkpoint(tmp_path):
    model = build(1)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    options = {"taps": [3], "taxonomy": None, "names": ["coarse"], "num_classes": 2}
    twin = build(2, **options, checkpoint_path=tmp_path / "a.pth")
    assert_same(model, twin)


def test_timms_saver(tmp_path):
    """With EMA weights, which timm prefers, and its arguments in the file."""
    model = build(1)
    ema = ModelEmaV3(build(3))
    saver = CheckpointSaver(
        model, create_optimizer_v2(model), model_ema=ema, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(0)
    assert_same(build(2, checkpoint_path=tmp_path / "last.pth.tar"), ema.module)


def test_safetensors_of_others(tmp_path):
    """As accelerate and Trainer write it."""
    model = build(1)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(build(2, checkpoint_path=tmp_path / "model.safetensors"), model)
    with pytest.raises(ValueError, match=r"create_branch_model\(..., checkpoint_path=\)"):
        load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("old", [False, True])
def test_load_model_says_what_to_do(tmp_path, old):
    torch.save(build().state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"torch.save.*create_branch_model\(..., checkpoint_path="):
        load_model(tmp_path / "a.pth")


def test_an_encoder_of_smp(tmp_path, caplog):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(3)
    unet = smp.Unet("resnet18", encoder_weights=None, classes=4)
    torch.save(unet.state_dict(), tmp_path / "a.pth")
    model = create_branch_model("resnet18", num_classes=2, checkpoint_path=tmp_path / "a.pth")
    encoder = unet.encoder.state_dict()
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, encoder[key]), key
    assert "left out of the file: decoder." in caplog.text


def test_what_is_left_out_is_said(tmp_path, caplog):
    state = build(1).state_dict()
    state["criterion.weight"] = torch.ones(3)
    state["heads.old.fc.weight"] = torch.ones(3, 3)
    torch.save(state, tmp_path / "a.pth")
    build(2, checkpoint_path=tmp_path / "a.pth")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    file = tmp_path / "a.pth"
    assert record.getMessage() == (
        f"{file}: loaded what fits; left out of the file: criterion.weight, heads.old."
    )


def test_another_number_of_classes(tmp_path, caplog):
    """The body of the head stays, its last layer starts anew."""
    options = {"taxonomy": None, "names": ["coarse", "fine"], "head": FlattenHead((8,))}
    model = build(1, num_classes=[2, 3], **options)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    twin = build(2, num_classes=[2, 5], **options, checkpoint_path=tmp_path / "a.pth")
    assert_same(twin, model, "heads.coarse")
    assert_same(twin, build(2, num_classes=[2, 5], **options), "heads.fine.fc")
    body = [key for key in model.state_dict() if "heads.fine" in key and ".fc." not in key]
    assert len(body) > 2
    for key in body:
        assert torch.equal(twin.state_dict()[key], model.state_dict()[key])
    assert "starts anew: the last layer of 'fine'." in caplog.text


def test_a_head_of_another_kind(tmp_path, caplog):
    torch.save(build(1).state_dict(), tmp_path / "a.pth")
    twin = build(2, head=["pool", FlattenHead((8,))], checkpoint_path=tmp_path / "a.pth")
    assert_same(twin, build(1), "heads.coarse")
    assert "starts anew: head 'fine'." in caplog.text


class TestOurFile:
    def test_on_a_new_tree(self, tmp_path, caplog):
        """As many classes, but others: no head may take over the old answers."""
        path = save_model(build(1), tmp_path / "model.safetensors")
        twin = build(2, taxonomy=OTHER, checkpoint_path=path)
        assert_same(twin, build(1), "backbone")
        assert_same(twin, build(2, taxonomy=OTHER), "heads")
        (record,) = caplog.records
        assert "starts anew: head 'coarse', head 'fine'." in record.getMessage()
        assert "only in" in record.getMessage()

    def test_in_another_order(self, tmp_path, caplog):
        path = save_model(build(1), tmp_path / "model.safetensors")
        twin = build(2, taxonomy=TURNED, checkpoint_path=path)
        images = torch.rand(2, 3, 32, 32)
        rows = [TREE.classes[1].index(name) for name in TURNED.classes[1]]
        assert rows != [0, 1, 2]
        with torch.no_grad():
            ours, theirs = twin(images)["fine"], build(1)(images)["fine"]
        torch.testing.assert_close(ours, theirs[:, rows])
        assert not caplog.records

    def test_with_a_head_more(self, tmp_path, caplog):
        path = save_model(build(1), tmp_path / "model.safetensors")
        options = {"taps": [3, 5, 5], "names": ["coarse", "fine", "more"]}
        twin = build(2, **options, num_classes=[None, None, 4], checkpoint_path=path)
        assert_same(twin, build(1))
        assert "starts anew: head 'more'." in caplog.text

    def test_of_another_backbone(self, tmp_path):
        path = save_model(build(1), tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="model.safetensors does not fit EfficientNet"):
            build(2, "test_efficientnet", checkpoint_path=path)


@pytest.mark.parametrize("in_chans", [1, 2, 5])
@pytest.mark.parametrize("branch", [False, True])
def test_other_channels(tmp_path, in_chans, branch):
    """The numbers that timm's own loader gives."""
    torch.manual_seed(1)
    plain = timm.create_model("test_resnet", num_classes=11)
    torch.save(plain.state_dict(), tmp_path / "a.pth")
    overlay = {"file": str(tmp_path / "a.pth"), "num_classes": 11, "hf_hub_id": None, "url": ""}
    expected = timm.create_model(
        "test_resnet",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        in_chans=in_chans,
        num_classes=0,
    ).state_dict()
    if branch:
        state = {f"backbone.{key}": value for key, value in plain.state_dict().items()}
        torch.save(state, tmp_path / "a.pth")
    model = build(2, in_chans=in_chans, checkpoint_path=tmp_path / "a.pth")
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, expected[key]), key


class TestRefused:
    def refuse(self, tmp_path, content, match, **options):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=match):
            build(2, checkpoint_path=tmp_path / "a.pth", **options)

    def test_nothing_fits(self, tmp_path):
        state = {"weight": torch.ones(3)}
        self.refuse(tmp_path, state, "none of its tensors, such as 'weight'")

    def test_no_tensors(self, tmp_path):
        self.refuse(tmp_path, {"epoch": 3, "lr": 0.1}, r"holds \['epoch', 'lr'\]")

    def test_two_models(self, tmp_path):
        state = build(1).state_dict()
        both = {"a": state, "b": state}
        self.refuse(tmp_path, both, r"no state dict that could be told.*\['a', 'b'\]")
        both = prefixed("model.")(state) | prefixed("net.")(state)
        self.refuse(tmp_path, both, "several tensors for")

    def test_heads_alone(self, tmp_path):
        state = build(1).state_dict()
        heads = {key: value for key, value in state.items() if key.startswith("heads.")}
        self.refuse(tmp_path, heads, "tensors missing")

    def test_more_blocks(self, tmp_path):
        """A deeper network of the same widths has all that a shallower one needs."""
        state = timm.create_model("resnet34", num_classes=0).state_dict()
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"unexpected \['layer1.2.conv1.weight'"):
            create_branch_model("resnet18", num_classes=2, checkpoint_path=tmp_path / "a.pth")

    def test_a_whole_module(self, tmp_path):
        self.refuse(tmp_path, nn.Linear(2, 2), "weights_only")

    def test_what_a_training_resumes_from(self, tmp_path):
        from timm_branches.train.checkpoint import save_state

        save_state(tmp_path / "last.safetensors", {"model": build().state_dict()})
        with pytest.raises(ValueError, match=r"model.safetensors beside it.*--resume"):
            build(checkpoint_path=tmp_path / "last.safetensors")
