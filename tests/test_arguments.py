"""Arguments that nobody thought of: each works and survives saving, or is a clear error."""

import io
import math
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from timm_branches import (
    LSTMHead,
    PoolHead,
    RedNetHead,
    Taxonomy,
    UNetHead,
    cli,
    create_branch_model,
    list_taps,
    load_model,
    save_model,
)
from timm_branches.data import (
    HierarchicalDataset,
    create_dataset,
    create_loader,
    split_dataset,
)
from timm_branches.data.decode import decode_image
from timm_branches.task import BranchTask
from timm_branches.train import FitConfig

# what answers for a mistake of a person; a KeyError or TypeError of some line inside does not
CLEAR = (ValueError, FileNotFoundError, IndexError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"taps": [2.5]}, r"2\.5"),
        ({"taps": None}, "taps= takes a list"),
        ({"taps": [None]}, "None"),
        ({"names": 3}, "names= takes a list"),
        ({"names": [3]}, "names= takes texts"),
        ({"img_size": 32.0}, "img_size= takes"),
        ({"img_size": (32,)}, "a side or"),
        ({"img_size": (32, 0)}, "img_size= takes a whole number from 1"),
        ({"img_size": "32"}, "img_size= takes a list"),
        ({"in_chans": -1}, "in_chans= takes a whole number from 1"),
        ({"in_chans": "3"}, "in_chans= takes a whole number"),
        ({"in_chans": True}, "in_chans= takes a whole number"),
        ({"taxonomy": 3}, "taxonomy= takes a list"),
        ({"taxonomy": "no such tree"}, "no such tree"),
        ({"drop_rate": float("nan")}, "drop_rate= takes a finite number from 0 below 1"),
        ({"drop_rate": "0.1"}, "drop_rate= takes"),
        ({"pretrained": "yes"}, "pretrained= takes True or False"),
        ({"checkpoint_path": 3}, "checkpoint_path= takes a path"),
        ({"num_classes": 10**12}, "num_classes= takes whole numbers"),
        ({"model_name": None}, "a model is named by a text"),
        ({"model_name": "test_resnet.x"}, "has no weights 'x'"),
        ({"output_stride": 7}, "output_stride=7"),
        ({"act_layer": "nose"}, "nose"),
        ({"drop_path_rate": "x"}, "drop_path_rate= takes .* got 'x'"),
        ({"drop_path_rate": 1e9}, "from 0 below 1"),
    ],
)
def test_a_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_branch_model(**{"model_name": "test_resnet", "num_classes": 2, **arguments})


def test_a_taxonomy_by_name_and_by_paths():
    """As recipes take it."""
    model = create_branch_model("test_resnet", taps=[3, 4, 5], taxonomy="cifar10", img_size=32)
    assert model.taxonomy.num_classes[-1] == 10
    model = create_branch_model("test_resnet", taps=[4, 5], taxonomy=["a/b", "a/c"], img_size=32)
    assert model.taxonomy == Taxonomy(["a/b", "a/c"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FitConfig(device="x"), "--device x"),
        (lambda: FitConfig(epochs="3"), "--epochs takes a whole number, got '3' of type str"),
        (lambda: FitConfig(epochs=2.5), "--epochs takes a whole number"),
        (lambda: FitConfig(lr=math.inf), "--lr must be above 0 and finite"),
        (lambda: FitConfig(amp="yes"), "--amp takes True or False"),
        (lambda: FitConfig(output=None), "--output takes a text"),
        (lambda: list_taps("test_resnet.x"), "has no weights 'x'"),
        (lambda: Taxonomy(3), "leaves takes a list"),
        (lambda: Taxonomy(["a"], levels=3), "levels must be"),
        (lambda: Taxonomy(["a"], order=3), "order takes a list"),
        (lambda: Taxonomy(["a"]).expand(None), "None"),
        (lambda: Taxonomy(["a"]).encode(3), "names takes a list"),
        (lambda: Taxonomy.from_dict(3), "not a stored taxonomy"),
        (lambda: PoolHead(hidden=3), "hidden= takes a list"),
        (lambda: PoolHead(drop_rate="x"), r"drop_rate= must be in \[0, 1\)"),
        (lambda: LSTMHead(num_layers=10**12), "num_layers= takes a whole number from 1 up to"),
        (lambda: UNetHead(attention="yes"), "attention= takes True or False"),
        (lambda: RedNetHead(channels=3), "channels= takes a list"),
        (lambda: HierarchicalDataset(np.zeros((1, 4, 4), np.uint8), [[0.5]]), "whole numbers"),
        (lambda: HierarchicalDataset(np.zeros((1, 4, 4), np.uint8), None), "rows of class"),
        (lambda: split_dataset(data(), "x"), "fraction takes a finite number"),
        (lambda: split_dataset(data(), math.nan), "fraction takes a finite number"),
        (lambda: data().limit("x"), "count takes a whole number"),
        (lambda: data().subset([0.5]), "whole numbers"),
        (lambda: data().subset([True, False, True, True]), "whole numbers"),
        (lambda: create_loader(data(), "x"), "batch_size takes a whole number"),
        (lambda: create_loader(data(), 2, num_workers=-1), "num_workers takes a whole number"),
        (lambda: create_loader(data(), 2, seed=0.5), "seed takes a whole number"),
        (lambda: BranchTask(None), "model= takes a model"),
        (lambda: save_model(small_model(), "/dev/null", extra=[1]), "extra= takes a dict"),
        (lambda: save_model(small_model(), "/dev/null", extra={"a": object()}), "extra= takes"),
        (lambda: small_model()("x"), "takes a tensor of images"),
    ],
)
def test_elsewhere(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def data():
    return HierarchicalDataset(np.zeros((4, 4, 4), np.uint8), [[0]] * 4, Taxonomy(["a", "b"]))


def small_model():
    return create_branch_model("test_resnet", taps=[1], num_classes=2, img_size=32)


# -- properties

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 100),
    st.sampled_from([10**9, 10**12, -(10**12)]),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=2),
    st.lists(st.one_of(st.integers(-2, 6), st.text(max_size=3), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
    st.sampled_from([np.zeros(2), np.int64(3), torch.tensor(2), object, Taxonomy(["a/b"])]),
)
ARGUMENTS = {
    "taps": st.one_of(odd, st.lists(st.integers(0, 6), max_size=3)),
    "num_classes": st.one_of(odd, st.lists(st.integers(0, 5), max_size=3)),
    "head": st.one_of(odd, st.sampled_from(["pool", "flatten", "lstm", "unet"])),
    "names": st.one_of(odd, st.lists(st.text(max_size=3), max_size=3)),
    "taxonomy": st.one_of(odd, st.lists(st.sampled_from(["a/x", "a/y", "b", "b/z"]), max_size=4)),
    "in_chans": odd,
    "img_size": st.one_of(odd, st.sampled_from([32, (32, 48), [64, 64]])),
    "drop_rate": odd,
    "output_stride": odd,
    "drop_path_rate": odd,
    "act_layer": odd,
}


def answer(make):
    """What a call gives, or None where it is a clear error."""
    message = "none"
    try:
        return make()
    except CLEAR as error:
        message = str(error)
    assert message.strip()
    return None


def check_arguments_of_a_model(tmp_path, arguments):
    model = answer(lambda: create_branch_model("test_resnet", **{"num_classes": 2, **arguments}))
    if model is None:
        return
    model.eval()
    path = answer(lambda: save_model(model, tmp_path / "m.safetensors"))
    if path is None:  # an option that JSON cannot hold
        return
    again = load_model(path)
    assert again.names == model.names
    images = torch.zeros(1, *model.input_size)
    if not model.temporal_heads and max(model.input_size) <= 64:
        with torch.no_grad():
            for name, logits in model(images).items():
                assert torch.equal(again(images)[name], logits)


names = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=6)
paths = st.lists(st.one_of(names, st.text(max_size=3)), max_size=4).map("/".join)


def check_tree(tmp_path, leaves, levels):
    tree = answer(lambda: Taxonomy(leaves, levels))
    if tree is None:
        return
    assert Taxonomy.from_dict(tree.to_dict()) == tree
    tree.save_json(tmp_path / "tree.json")
    assert Taxonomy.from_json(tmp_path / "tree.json") == tree
    rows = tree.expand(torch.arange(tree.num_leaves))
    assert rows.shape == (tree.num_leaves, tree.num_levels)
    assert torch.equal(tree.encode(list(tree.leaves)), torch.arange(tree.num_leaves))


def check_settings(name, value):
    config = answer(lambda: FitConfig(**{name: value}))
    if config is not None:
        assert getattr(config, name) == value or value is None


def check_labels(rows):
    tree = Taxonomy(["a/x", "a/y", "b/z"])
    images = np.zeros((len(rows), 2, 2), np.uint8)
    dataset = answer(lambda: HierarchicalDataset(images, rows, tree))
    if dataset is not None:
        assert dataset.labels.tolist() == [list(row) for row in rows]


CELLS = st.sampled_from(
    ["path", "label", "coarse", "fine", "0.png", "1.png", "cat", "a/b", "", " ", "-1", "0", "3.5"]
    + ['"', ",", ";", "\t", "\ufeff", "\x00", "nan", "é", "train", "split", "/etc/passwd"]
)
ROWS = st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=5)


def check_table(tmp_path, rows, comma):
    """A table of labels, as somebody might have written it."""
    for index in range(2):
        Image.new("RGB", (3, 2)).save(tmp_path / f"{index}.png")
    text = "\n".join(comma.join(row) for row in rows)
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    data = answer(lambda: create_dataset(tmp_path / "labels.csv"))
    if data is None:
        return
    # each row that was read is one of an image that is there, with a label of its own tree
    assert 1 <= len(data) <= len(rows)
    for index in range(len(data)):
        sample = answer(lambda index=index: data[index])
        if sample is None:  # a file that is there and no image
            continue
        image, labels = sample
        assert image.shape == (3, 2, 3)
        for level, label in enumerate(labels.tolist()):
            assert -1 <= label < data.taxonomy.num_classes[level]


WORDS = ["taps", "info", "predict", "test_resnet", "test_resnet.x", "vgg", "-h", "--version"]
WORDS += ["--device", "cpu", "x", "--top", "-1", "0", "/dev/null", "/", ".", "--batch-size", "nan"]


def check_flags(tmp_path, words):
    """A command line either does what it was asked, or says in a line why not."""
    error = io.StringIO()
    status = 0
    with redirect_stdout(io.StringIO()), redirect_stderr(error):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as end:  # argparse
            status = end.code
    assert status in (0, 2), error.getvalue()
    assert bool(error.getvalue().strip()) == (status == 2)
    assert "Traceback" not in error.getvalue()


def check_file(tmp_path, start, rest, where):
    """Bytes that somebody calls an image, or a model."""
    base = FILES[start]
    content = base[: where % (len(base) + 1)] + rest + base[(where + len(rest)) % (len(base) + 1) :]
    path = tmp_path / "file.png"
    path.write_bytes(content)
    pixels = answer(lambda: decode_image(content, 3, str(path)))
    assert pixels is None or (pixels.ndim == 3 and pixels.size)
    if content != FILES["model"]:
        assert answer(lambda: load_model(path)) is None


def written(save):
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
FILES = {
    name: written(lambda buffer, name=name: PICTURE.save(buffer, name))
    for name in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
}
FILES["nothing"] = b""
FILES["model"] = (Path(__file__).parent / "fixtures" / "model-1.safetensors").read_bytes()

QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
EXAMPLES = {
    "models": 80,
    "trees": 100,
    "settings": 100,
    "labels": 70,
    "tables": 50,
    "flags": 50,
    "files": 50,
}


def run_properties(tmp_path, factor, derandomize):
    options = {**QUICK, "derandomize": derandomize, "database": None}
    some = st.dictionaries(st.sampled_from(sorted(ARGUMENTS)), st.none(), min_size=1, max_size=3)
    chosen = some.flatmap(lambda keys: st.fixed_dictionaries({k: ARGUMENTS[k] for k in keys}))
    fields = st.sampled_from(sorted(FitConfig.__dataclass_fields__))
    words = st.one_of(st.sampled_from(WORDS), st.text(max_size=4))
    rows = st.lists(st.lists(st.one_of(st.integers(-3, 4), st.floats()), max_size=3), max_size=4)
    checks = {
        "models": given(chosen)(lambda arguments: check_arguments_of_a_model(tmp_path, arguments)),
        "trees": given(st.lists(paths, max_size=6), st.one_of(st.none(), st.lists(names), odd))(
            lambda leaves, levels: check_tree(tmp_path, leaves, levels)
        ),
        "settings": given(fields, odd)(check_settings),
        "labels": given(rows)(check_labels),
        "tables": given(ROWS, st.sampled_from(",;\t"))(
            lambda rows, comma: check_table(tmp_path, rows, comma)
        ),
        "flags": given(st.lists(words, max_size=4))(lambda words: check_flags(tmp_path, words)),
        "files": given(
            st.sampled_from(sorted(FILES)), st.binary(max_size=12), st.integers(0, 10**6)
        )(lambda start, rest, where: check_file(tmp_path, start, rest, where)),
    }
    for name, check in checks.items():
        settings(max_examples=factor * EXAMPLES[name], **options)(check)()


@pytest.mark.filterwarnings("ignore")
def test_properties(tmp_path):
    """Five hundred cases."""
    run_properties(tmp_path, 1, derandomize=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_properties(tmp_path):
    """Twenty thousand."""
    run_properties(tmp_path, 40, derandomize=False)
