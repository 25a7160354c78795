"""Training checkpoints come back bit for bit, and a kill never leaves half of one."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import nn

from timm_branches import create_branch_model, save_model
from timm_branches.train.checkpoint import load_state, save_state


def assert_same(a, b):
    """Equal in structure, types and bits."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (
            a.contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(b.contiguous().reshape(-1).view(torch.uint8))
        )
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert [type(key) for key in a] == [type(key) for key in b]
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, list)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float) and math.isnan(a):
        assert math.isnan(b)
    else:
        assert type(a) is type(b)
        assert a == b


def test_nested_state_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    shared = torch.randn(3)
    state = {
        "floats": [0.1 + 0.2, 1e-308, -0.0, math.pi, float("inf"), float("-inf"), float("nan")],
        "ints": [0, -1, 2**62],
        "bools": [True, False],
        "none": None,
        "text": 'ä "quoted"\n',
        "empty": {},
        "no": [],
        0: {1: "int key", "1": "text key"},
        2.5: "float key",
        "tensor": "a word that could be mistaken",
        "dict": {"tensor": "t0", "dict": [[1, 2]]},
        "tuple": (0.9, 0.999),
        "tensors": [
            torch.randn(2, 3),
            torch.randn(4).bfloat16(),
            torch.randn(2).half(),
            torch.randn(2).double(),
            torch.arange(5),
            torch.tensor([True, False]),
            torch.tensor(7, dtype=torch.int8),
            torch.tensor(1.5),
            torch.zeros(0, 3),
            torch.tensor([float("nan"), -0.0]),
        ],
        "strided": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "view": torch.randn(5, 5)[1:3, ::2],
        "shared": [shared, shared, shared[1:]],
        "gradient": nn.Parameter(torch.randn(2)),
    }
    path = tmp_path / "new" / "folder" / "last.safetensors"
    save_state(path, state)
    back = load_state(path)
    state["gradient"] = state["gradient"].detach()
    assert_same(state, back)
    assert not back["gradient"].requires_grad


def test_empty_state(tmp_path):
    save_state(tmp_path / "a", {})
    assert load_state(tmp_path / "a") == {}


@pytest.mark.parametrize(
    "opt", ["sgd", "adamw", "lamb", "lion", "adafactor", "lookahead_adamw", "rmsproptf", "muon"]
)
def test_an_optimizer_continues_as_if_nothing_had_happened(tmp_path, opt):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        return model, create_optimizer_v2(model, opt=opt, lr=1e-2, weight_decay=0.1, momentum=0.9)

    def train(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            optimizer.zero_grad()
            model(torch.randn(5, 6)).square().mean().backward()
            optimizer.step()

    model, optimizer = make()
    train(model, optimizer, range(7))
    save_state(tmp_path / "c", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(7, 14))

    other, resumed = make()
    state = load_state(tmp_path / "c")
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    train(other, resumed, range(7, 14))
    assert_same(model.state_dict(), other.state_dict())
    assert_same(dict(optimizer.state_dict()["state"]), dict(resumed.state_dict()["state"]))


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"bytes", 1j, torch.float32, torch.nn.Linear(1, 1)]
)
def test_an_unsupported_type_is_named(tmp_path, value):
    path = tmp_path / "last.safetensors"
    save_state(path, {"good": 1})
    with pytest.raises(TypeError, match=f"cannot hold {type(value).__name__}"):
        save_state(path, {"deep": [{"er": value}]})
    assert load_state(path) == {"good": 1}
    assert os.listdir(tmp_path) == ["last.safetensors"]


@pytest.mark.parametrize("key", [(1, 2), torch.tensor(1), b"k"])
def test_an_unsupported_key_is_named_when_it_is_saved(tmp_path, key):
    with pytest.raises(TypeError, match=f"key of type {type(key).__name__}"):
        save_state(tmp_path / "a", {"in": {key: 1}})
    assert not os.listdir(tmp_path)


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "last.safetensors"
    save_state(path, {"weights": torch.randn(100), "epoch": 3})
    whole = path.read_bytes()
    for size in (0, 4, 8, 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged"):
            load_state(path)
    path.write_bytes(whole)
    assert load_state(path)["epoch"] == 3


def test_a_foreign_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_state(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path)
    torch.save({"epoch": 1}, tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match="damaged"):
        load_state(tmp_path / "pickle.pth")
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="not a training checkpoint"):
        load_state(tmp_path / "plain.safetensors")
    save_model(create_branch_model("test_resnet", num_classes=2), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a training checkpoint"):
        load_state(tmp_path / "model.safetensors")


WRITER = """
import sys, torch
from timm_branches.train.checkpoint import save_state
number = 0
while True:
    save_state(sys.argv[1], {"number": number, "weights": torch.full((400, 1000), float(number))})
    if number == 0:
        print("ready", flush=True)
    number += 1
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_kill_while_saving_leaves_a_whole_file(tmp_path):
    path = tmp_path / "last.safetensors"
    numbers = []
    for delay in (0.003, 0.02, 0.051):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
        ) as process:
            try:
                assert process.stdout.readline() == b"ready\n"
                time.sleep(delay)
            finally:
                process.kill()
        state = load_state(path)
        numbers.append(state["number"])
        assert state["weights"].eq(state["number"]).all()
    assert max(numbers) > 0
