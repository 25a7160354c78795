"""A model file from a stranger: its checksum is right, and what it says is not to be obeyed."""

import copy
import json
import resource
import sys
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from timm_branches import Taxonomy, create_branch_model, load_model, save_model, save_pretrained
from timm_branches.tensor_files import digest_tensors
from timm_branches.weights import load_weights, read_weights

TREE = Taxonomy(["a/x", "a/y", "b/z"], levels=["coarse", "fine"])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model = create_branch_model("test_resnet", taps=[1, 2], taxonomy=TREE, img_size=32)
    return save_model(model, tmp_path_factory.mktemp("good") / "model.safetensors")


def claim(good, path, change, also=None):
    """The good file with another description, and its checksum made right again."""
    metadata, tensors = read_weights(good)
    config = json.loads(metadata["config"])
    change = copy.deepcopy(change)
    config["model"].update(change.pop("model", {}))
    config["pretrained_cfg"].update(change.pop("pretrained_cfg", {}))
    config.update(change)
    metadata["config"] = json.dumps(config)
    metadata.update(also or {})
    metadata["sha256"] = digest_tensors(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


POOL = {"kind": "pool", "hidden": [], "pool_type": "avg", "drop_rate": None}
LSTM = {"kind": "lstm", "hidden_size": 10**6, "num_layers": 10**6}
HOSTILE = {
    # places to load from
    "pretrained": {"pretrained": True},
    "pretrained=1": {"pretrained": 1},
    "not pretrained": {"pretrained": False},
    "hub": {"model_name": "hf-hub:someone/model"},
    "hub with underscore": {"model_name": "hf_hub:someone/model"},
    "folder": {"model_name": "local-dir:/etc"},
    "hub without a scheme": {"model_name": "timm/resnet18.a1_in1k"},
    "checkpoint": {"checkpoint_path": "/etc/passwd"},
    "no checkpoint": {"checkpoint_path": ""},
    "cache": {"cache_dir": "/tmp/here"},
    "overlay": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x"}},
    "overlay of a file": {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
    "configuration": {"pretrained_cfg": {"hf_hub_id": "someone/model"}},
    "nested": {"block_args": {"a": [{"url": "http://127.0.0.1:9/x"}]}},
    # beyond all measure
    "classes": {"num_classes": [2, 10**7]},
    "more classes": {"num_classes": [10**12, 3]},
    "channels": {"in_chans": 10**9},
    "many channels": {"in_chans": 999_999},
    "size": {"img_size": [10**9, 10**9]},
    "large size": {"img_size": [999_999, 999_999], "model_name": "test_vit"},
    "layers": {"layers": [10**6] * 4},
    "more layers": {"layers": [10**12] * 4},
    "depth": {"model_name": "vit_tiny_patch16_224", "depth": 10**6},
    "width": {"model_name": "vit_tiny_patch16_224", "embed_dim": 999_999},
    "window": {"model_name": "swin_tiny_patch4_window7_224", "window_size": 999_999},
    "hidden": {"head": [{**POOL, "hidden": [10**6] * 1000}, POOL]},
    "endless head": {"head": [{**POOL, "hidden": [3] * 10**5}, POOL]},
    "lstm": {"head": [LSTM, LSTM]},
    "many heads": {"taps": [1] * 9999, "num_classes": [2] * 9999, "head": [POOL] * 9999},
    "long text": {"act_layer": "relu" * 1000},
    # wrong types
    "no name": {"model_name": None},
    "unknown name": {"model_name": "resnet5000"},
    "name of a number": {"model_name": 18},
    "name in a list": {"model_name": ["test_resnet"]},
    "path for a name": {"model_name": "../../test_resnet"},
    "classes as text": {"num_classes": ["2", "3"]},
    "negative classes": {"num_classes": [-2, 3]},
    "half classes": {"num_classes": [2, 3.5]},
    "true classes": {"num_classes": [True, True]},
    "no classes": {"num_classes": None},
    "other classes": {"num_classes": [3, 2]},
    "one count": {"num_classes": [2]},
    "taps as text": {"taps": "12"},
    "no taps": {"taps": []},
    "empty tap": {"taps": [[], []]},
    "unknown tap": {"taps": [{"stage": 99}, {"stage": 2}]},
    "tap with more": {"taps": [{"stage": 1, "run": "x"}, {"stage": 2}]},
    "tap of a module": {"taps": [{"module": "__class__"}, {"stage": 2}]},
    "half a tap": {"taps": [{"stage": 1.5}, {"stage": 2}]},
    "unknown head": {"head": [{"kind": "eval"}, POOL]},
    "head as text": {"head": ["pool", "pool"]},
    "head without a kind": {"head": [{}, POOL]},
    "head with more": {"head": [{**POOL, "run": "x"}, POOL]},
    "wrong pooling": {"head": [{**POOL, "pool_type": 3}, POOL]},
    "wrong dropout": {"head": [{**POOL, "drop_rate": "x"}, POOL]},
    "names as numbers": {"names": [1, 2]},
    "same names": {"names": ["a", "a"]},
    "too few names": {"names": ["a"]},
    "dropout": {"drop_rate": 2},
    "dropout as text": {"drop_rate": "0.1"},
    "negative channels": {"in_chans": -1},
    "channels as text": {"in_chans": "3"},
    "size as text": {"img_size": "32"},
    "size of three": {"img_size": [32, 32, 32]},
    "size of nothing": {"img_size": [0, 0]},
    "unknown argument": {"nose": 1},
    "no argument": {"a b": 1},
    "inner name": {"__class__": 1},
    "list as a tree": {"taxonomy": ["a/x"]},
    "empty tree": {"taxonomy": {}},
    "tree of numbers": {"taxonomy": {**TREE.to_dict(), "leaves": [1, 2, 3]}},
    "tree of one leaf": {"taxonomy": {**TREE.to_dict(), "leaves": [["a", "x"]]}},
    "tree of twins": {"taxonomy": {**TREE.to_dict(), "leaves": [["a", "x"], ["a", "x"]]}},
    "tree of a later version": {"taxonomy": {**TREE.to_dict(), "version": 99}},
    "levels of numbers": {"taxonomy": {**TREE.to_dict(), "levels": [1, 2]}},
    "number of leaves": {"taxonomy": {**TREE.to_dict(), "leaves": 3}},
    "number of levels": {"taxonomy": {**TREE.to_dict(), "levels": 3}},
    "deep leaf": {"taxonomy": {**TREE.to_dict(), "leaves": [["a"] * 10**5]}},
}
PREPROCESSING = {
    "unknown": {"run": "x"},
    "source": {"url": "http://127.0.0.1:9/x"},
    "mean as text": {"mean": "0.5"},
    "mean of texts": {"mean": ["a", "b", "c"]},
    "mean of two": {"mean": [0.5, 0.5]},
    "no spread": {"std": [0.0, 1.0, 1.0]},
    "negative spread": {"std": [-1.0, 1.0, 1.0]},
    "huge mean": {"mean": [1e400, 0, 0]},
    "crop": {"crop_pct": -1},
    "crop as text": {"crop_pct": "0.9"},
    "interpolation": {"interpolation": "../x"},
    "crop mode": {"crop_mode": 3},
    "size": {"input_size": [3, -1, 32]},
    "size of two": {"input_size": [32, 32]},
    "range": {"value_range": [1, 1]},
    "raw": {"raw_inputs": "yes"},
}

watching = None


def _watch(event, arguments):
    if watching is None:
        return
    if event.startswith(("socket.", "subprocess.", "os.system")):
        watching.append(f"{event} {arguments}")
    elif event == "open":
        path = str(arguments[0])
        if not path.startswith((sys.prefix, sys.base_prefix, "/proc", "/sys")):
            watching.append(f"open {path}")


sys.addaudithook(_watch)


def check_refused(path, read, name):
    """A clear error that names the file; nothing else is opened, little memory is taken."""
    global watching
    watching = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=name) as error:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        seen, watching = watching, None
    assert len(str(error.value)) < 2000
    assert peak < 100 * 2**20
    # tensors, too, which tracemalloc does not see; in KiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10
    here = str(path.parent if path.is_file() else path)
    foreign = [event for event in seen if here not in event and "timm_branches" not in event]
    assert foreign == []


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_arguments(good, tmp_path, change):
    path = claim(good, tmp_path / "m.safetensors", {"model": change})
    check_refused(path, load_model, "m.safetensors")


@pytest.mark.parametrize("change", PREPROCESSING.values(), ids=PREPROCESSING)
def test_preprocessing(good, tmp_path, change):
    path = claim(good, tmp_path / "m.safetensors", {"pretrained_cfg": change})
    check_refused(path, load_model, "m.safetensors")


@pytest.mark.parametrize(
    "also",
    [
        {"config": "[" * 10**5 + "]" * 10**5},
        {"config": '{"model": ' * 1000},
        {"config": "3"},
        {"config": '{"model": 3, "pretrained_cfg": {}}'},
        {"config": '{"model": {}, "pretrained_cfg": {}}'},
        {"config": '{"model": {"model_name": NaN}}'},
        {"tied": '{"more": "none"}'},
        {"tied": "[]"},
        {"tied": '{"a": ["heads"]}'},
        {"data_summary": "[" * 10**5},
        {"data_summary": "3"},
        {"version": "-1"},
        {"version": "9" * 5000},
        {"version": "\u00b2"},
    ],
    ids=lambda also: next(f"{key} {value[:20]}" for key, value in also.items()),
)
def test_metadata(good, tmp_path, also):
    path = claim(good, tmp_path / "m.safetensors", {}, also)
    check_refused(path, load_model, "m.safetensors")


def test_types_of_tensors(good, tmp_path):
    """Other numbers than the model's are refused, another precision is kept."""
    metadata, tensors = read_weights(good)
    name = next(name for name in tensors if name.endswith("fc.weight"))
    for kind in (torch.int64, torch.bool):
        changed = {**tensors, name: tensors[name].to(kind)}
        path = tmp_path / "m.safetensors"
        save_file(changed, path, {**metadata, "sha256": digest_tensors(changed, metadata)})
        check_refused(path, load_model, "of another type")
    changed = {**tensors, name: tensors[name].bfloat16()}
    save_file(changed, path, {**metadata, "sha256": digest_tensors(changed, metadata)})
    assert load_model(path).state_dict()[name].dtype == torch.bfloat16


@pytest.mark.parametrize("change", [HOSTILE["hub"], HOSTILE["pretrained"], HOSTILE["unknown name"]])
def test_other_ways_in(good, tmp_path, change):
    """The Hub's config.json, and a file whose weights are read into a model at hand."""
    model = load_model(good)
    folder = save_pretrained(model, tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    config["model"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    check_refused(folder, load_model, "config.json")
    path = claim(good, tmp_path / "m.safetensors", {"model": change})
    check_refused(path, lambda path: load_weights(model, path), "m.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        {"model_name": "vit_tiny_patch16_224", "img_size": 64, "dynamic_img_size": True},
        {"model_name": "swin_tiny_patch4_window7_224", "drop_path_rate": 0.2},
        {"model_name": "test_resnet", "device": "cpu", "scriptable": True},
        {
            "model_name": "test_resnet",
            "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x", "crop_pct": 0.5},
        },
        {"model_name": "test_efficientnet", "act_layer": "relu", "head": "flatten"},
    ],
    ids=lambda options: options["model_name"],
)
def test_what_people_save_is_loaded(tmp_path, options):
    torch.manual_seed(0)
    model = create_branch_model(**{"taps": [3], "num_classes": 3, **options}).eval()
    again = load_model(save_model(model, tmp_path / "m.safetensors"))
    images = torch.randn(1, *model.input_size)
    with torch.no_grad():
        for name, logits in model(images).items():
            assert torch.equal(again(images)[name], logits)
