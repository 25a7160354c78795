"""Exported models give what the models give, under their names, with all that is to be known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches import Taxonomy, create_branch_model, save_model
from timm_branches.cli import main
from timm_branches.hierarchy.decode import DECODERS, decode
from timm_branches.inference import export_model, predict

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TREE = Taxonomy(["animal/cat", "animal/dog", "plant/rose"], levels=["kind", "name"])
QUICK = ["test_resnet", "test_vit"]
FAMILIES = [
    *("resnet10t", "resnet18", "resnext26ts", "seresnet18", "vgg11_bn", "densenet121"),
    *("efficientnet_b0", "mobilenetv3_small_100", "mobilenetv4_conv_small", "mnasnet_small"),
    *("convnext_atto", "convnextv2_atto", "regnetx_002", "regnety_002", "ghostnet_050"),
    *("repvgg_a0", "hardcorenas_a", "fbnetv3_b", "dla34", "hrnet_w18_small", "selecsls42"),
    *("test_efficientnet", "test_convnext", "test_byobnet", "vit_tiny_patch16_224"),
    *("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "edgenext_xx_small"),
    *("mobilevit_xxs", "poolformer_s12", "inception_next_tiny", "fastvit_t8"),
]
HEADS = {
    "pool": {},
    "unet": {"head": "unet", "taps": [[2, 3, 4]]},
    "lstm": {"head": "lstm"},
    "gru of frames": {"head": {"kind": "gru", "output": "frame"}},
}


def make(name="test_resnet", head="pool", size=64):
    torch.manual_seed(0)
    options = {"taps": [3, 4], "img_size": size, "taxonomy": TREE, **HEADS[head]}
    return create_branch_model(name, **options).eval()


def check(model, path, frames=None):
    """Run the file by onnxruntime, on a batch of another size than it was exported with."""
    written = export_model(model, path, frames)
    session = onnxruntime.InferenceSession(str(path))
    name, dims = written.input
    assert [node.name for node in session.get_inputs()] == [name]
    assert [node.name for node in session.get_outputs()] == ["kind", "name"]
    assert dims[0] == "batch"
    shape = [5, *(64 if isinstance(size, str) else size for size in dims[1:])]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
    for output, value in zip(session.run(None, {name: x.numpy()}), expected.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(output), value, rtol=1e-3, atol=1e-4)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["timm_branches"])
    assert Taxonomy.from_dict(facts["model"]["taxonomy"]) == TREE
    assert facts["pretrained_cfg"]["mean"] == list(model.pretrained_cfg["mean"])
    return written


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", QUICK)
def test_onnx(name, head, tmp_path):
    clips = head not in ("pool", "unet")
    written = check(make(name, head), tmp_path / "model.onnx", frames=3 if clips else None)
    assert written.input[0] == ("clips" if clips else "images")
    if head == "unet" and name == "test_resnet":
        assert written.input[1] == ("batch", 3, "height", "width")


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, head, tmp_path):
    """At their own size; what cannot be exported must say so, and is counted in the page."""
    size = 224 if "224" in name else 96
    clips = head not in ("pool", "unet")
    check(make(name, head, size), tmp_path / "model.onnx", frames=2 if clips else None)


def test_names_that_the_exporter_uses_itself(tmp_path):
    """Levels may be called as torch's operations are."""
    tree = Taxonomy(["a/x/p", "a/y/q"], levels=["linear", "view", "conv2d"])
    model = create_branch_model("test_resnet", taps=[3, 4, 5], taxonomy=tree, img_size=64).eval()
    written = export_model(model, tmp_path / "model.onnx", decoder="best-path")
    assert written.outputs == (*tree.levels, "labels", "probabilities")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert tuple(node.name for node in session.get_outputs()) == written.outputs


def test_torch_export(tmp_path):
    model = make(head="unet")
    written = export_model(model, tmp_path / "model.pt2")
    files = {"timm_branches": ""}
    module = torch.export.load(written.path, extra_files=files).module()
    x = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        expected = tuple(model(x).values())
    for output, value in zip(module(x), expected, strict=True):
        torch.testing.assert_close(output, value, rtol=1e-4, atol=1e-5)
    assert json.loads(files["timm_branches"])["model"]["names"] == ["unet"]


def test_the_model_is_left_as_it_was(tmp_path):
    model = make().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_model(model, tmp_path / "model.onnx")
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_without_torch_as_with_it(tmp_path):
    """The lines that docs/export.md shows, on an image of the model's own size."""
    model = make()
    model.pretrained_cfg["crop_pct"] = 1.0
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (record,) = predict(model, tmp_path / "a.png", decoder="independent")
    export_model(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    cfg = json.loads(session.get_modelmeta().custom_metadata_map["timm_branches"])["pretrained_cfg"]
    x = ((pixels / 255 - cfg["mean"]) / cfg["std"]).transpose(2, 0, 1)[None].astype(np.float32)
    labels = [int(logits.argmax()) for logits in session.run(None, {"images": x})]
    assert labels == list(record.labels)


@pytest.mark.parametrize(
    ("head", "file", "frames", "message"),
    [
        ("pool", "model.txt", None, "the ending says what to write"),
        ("pool", "model.onnx", 3, "reads no clips"),
        ("lstm", "model.onnx", None, "frames= is missing"),
        ("lstm", "model.onnx", 0, "frames= takes"),
    ],
)
def test_refused(head, file, frames, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(make(head=head), tmp_path / file, frames)
    assert not (tmp_path / file).exists()


def test_what_cannot_be_exported(tmp_path):
    model = make()
    model.heads["kind"].register_forward_hook(lambda module, x, y: y if bool(y.sum() > 0) else -y)
    with pytest.raises(ValueError, match="test_resnet .* cannot be exported"):
        export_model(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_an_export_that_computes_something_else(tmp_path, monkeypatch):
    """A wrong file is not written."""
    real = torch.onnx.export

    def wrong(named, *args, **kwargs):
        layer = named.model.heads["kind"].fc
        right = layer.bias
        layer.bias = torch.nn.Parameter(right.detach() + 1)
        program = real(named, *args, **kwargs)
        layer.bias = right
        return program

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(ValueError, match="the export is off by"):
        export_model(make(), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_command(tmp_path, capsys):
    model = save_model(make(head="unet"), tmp_path / "model.safetensors")
    assert main(["export", str(model), str(tmp_path / "model.onnx")]) == 0
    out = capsys.readouterr().out
    assert "images (batch, 3, height, width) -> kind, name" in out
    assert (tmp_path / "model.onnx").exists()
    assert main(["export", str(model), str(tmp_path / "model.foo")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_decoder_inside(tmp_path, decoder, ending):
    """Labels and probabilities are those of `decode`, for a batch of another size."""
    tree = Taxonomy(["animal/cat", "animal/dog", "plant/rose", "rock"], ["kind", "name"])
    torch.manual_seed(0)
    model = create_branch_model("test_resnet", taps=[3, 5], taxonomy=tree, img_size=32).eval()
    path = tmp_path / f"model.{ending}"
    written = export_model(model, path, decoder=decoder)
    assert written.outputs[-2:] == ("labels", "probabilities")
    x = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        logits = list(model(x).values())
    expected = decode(logits, tree, decoder)
    if ending == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        labels, probabilities = map(torch.from_numpy, session.run(None, {"images": x.numpy()})[-2:])
    else:
        labels, probabilities = torch.export.load(path).module()(x)[-2:]
    assert torch.equal(labels, expected.labels)
    torch.testing.assert_close(probabilities, expected.probabilities, rtol=1e-4, atol=1e-5)


def test_a_decoder_that_does_not_fit(tmp_path):
    model = create_branch_model("test_resnet", num_classes=3, img_size=32)
    with pytest.raises(ValueError, match="without a tree"):
        export_model(model, tmp_path / "a.pt2", decoder="best-path")
    with pytest.raises(ValueError, match="choose one of independent"):
        export_model(model, tmp_path / "a.pt2", decoder="nose")
    frames = {"kind": "gru", "output": "frame"}
    clips = create_branch_model("test_resnet", head=frames, taxonomy=["a", "b"], img_size=32)
    with pytest.raises(ValueError, match="not frame by frame"):
        export_model(clips, tmp_path / "a.pt2", frames=3, decoder="best-path")
