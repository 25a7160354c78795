"""Every file of tensors has a checksum: whatever bit flips, wherever it is cut, it is refused."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from timm_branches import create_branch_model, save_model
from timm_branches.tensor_files import MAX_JSON_DEPTH, MAX_JSON_LENGTH, parse_json
from timm_branches.train.checkpoint import load_state, save_state
from timm_branches.weights import load_weights, read_metadata

STATE = {
    "epoch": 3,
    "optimizer": {"state": {0: {"momentum": torch.arange(300.0)}}, "rate": 0.1},
    "labels": {"levels": ["coarse", "fine"]},
}


def checkpoint(path):
    save_state(path, STATE)
    return load_state


def model(path):
    save_model(create_branch_model("test_resnet", num_classes=3, names=["kind"]), path)
    target = create_branch_model("test_resnet", num_classes=3, names=["kind"])
    return lambda file: load_weights(target, file)


def description(path):
    model(path)
    return read_metadata


def damages(data, count, seed=0):
    """Flips of a bit, two thirds of them in the header, and cuts."""
    draw = random.Random(seed)
    header = 8 + int.from_bytes(data[:8], "little")
    for number in range(count):
        changed = bytearray(data)
        place = draw.randrange(header if number % 3 else len(data))
        changed[place] ^= 1 << draw.randrange(8)
        yield f"bit of byte {place}", bytes(changed)
        yield "cut", data[: draw.randrange(len(data))]


@pytest.mark.parametrize("make", [checkpoint, model, description])
@pytest.mark.parametrize(
    "count", [60, pytest.param(600, marks=pytest.mark.slow)], ids=["quick", "long"]
)
def test_every_damage_is_refused(tmp_path, make, count):
    path = tmp_path / "file.safetensors"
    read = make(path)
    good = path.read_bytes()
    for what, data in damages(good, count):
        path.write_bytes(data)
        message = ""
        try:
            read(path)
        except ValueError as error:
            message = str(error)
        assert str(path) in message, what
    path.write_bytes(good)
    read(path)


@pytest.mark.parametrize("make", [checkpoint, model, description])
def test_every_bit_of_the_producer(tmp_path, make):
    """Of its name and of the word before it: none makes a foreign file of ours."""
    path = tmp_path / "file.safetensors"
    read = make(path)
    good = path.read_bytes()
    start = good.index(b'"producer":"')
    end = good.index(b'"', start + len(b'"producer":"')) + 1
    for place in range(start, end):
        for bit in range(8):
            changed = bytearray(good)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(ValueError, match="file.safetensors"):
                read(path)


def test_a_checkpoint_of_the_first_version_is_read(tmp_path):
    """It had no checksum; one that lost its checksum on the way is not taken for it."""
    path = tmp_path / "last.safetensors"
    skeleton = {"dict": [["epoch", 3], ["weights", {"tensor": "t0"}]]}
    metadata = {"producer": "timm_branches.checkpoint", "state": json.dumps(skeleton)}
    save_file({"t0": torch.arange(3.0)}, path, metadata)
    state = load_state(path)
    assert state["epoch"] == 3
    assert torch.equal(state["weights"], torch.arange(3.0))
    for extra in ({"version": "2"}, {"version": "2", "format": "pt"}, {"sha256": "0" * 64}):
        save_file({"t0": torch.arange(3.0)}, path, {**metadata, **extra})
        with pytest.raises(ValueError, match="damaged"):
            load_state(path)
    save_file({"t0": torch.arange(3.0)}, path, {**metadata, "state": '{"dict": [["a", {"b": 1}]]}'})
    with pytest.raises(ValueError, match="damaged: its state cannot be read"):
        load_state(path)


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "last.safetensors"
    metadata = {"producer": "timm_branches.checkpoint", "version": "99", "state": "{}"}
    save_file({"t0": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match="later timm_branches"):
        load_state(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * (MAX_JSON_DEPTH + 1) + "]" * (MAX_JSON_DEPTH + 1), "nested deeper"),
        ("[" * 10**6, "nested deeper"),
        (" " * (MAX_JSON_LENGTH + 1), "characters"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ("{", "Expecting"),
    ],
    ids=["deep", "very deep", "long", "nan", "infinity", "twice", "cut"],
)
def test_json_of_strangers(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_brackets_in_a_string_are_not_depth():
    text = json.dumps({"name": "[{" * 1000, "quote": '"' + "[" * 1000})
    assert parse_json(text) == json.loads(text)
