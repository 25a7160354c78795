"""Every architecture of timm: three heads, no parameter without a gradient, and a table of stages
that is true.

All of it on the meta device: shapes and gradient paths, no arithmetic. One architecture of every
timm module by default; ``pytest -m slow tests/test_all_architectures.py`` takes all of them.
"""

import re

import pytest
import timm
import torch

from timm_branches import create_branch_model, list_taps

# words that give away a variant's size, from small to large; numbers count as they are
_WORDS = (
    "test atto xxs xxtiny femto nano t0 s0 pico b0 a0 m0 xs tiny ti mini micro s small 6.5 m "
    "medium b base "
    "l large xl xlarge h huge giant g gigantic so400m"
).split()
# timm modules without padding in some layers, and how many pixels a map may lack for it
_UNPADDED = {"inception_v3": 2, "inception_v4": 2, "inception_resnet_v2": 2, "pit": 1}
_MINUTES = ("sequencer",)  # its LSTMs are unrolled step by step on the meta device
_NEED_VALUES = "gemma4_vit"  # its forward pass calls .item(), which meta tensors have not


def _size(name):
    words = name.split("_")
    rank = min((_WORDS.index(w) for w in words if w in _WORDS), default=_WORDS.index("6.5"))
    return rank, sum(map(int, re.findall(r"\d+", name))), len(name), name


def _module(name):
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


ALL = [
    name
    for name in timm.list_models()
    if timm.model_entrypoint(name).__module__.startswith("timm.")
]
SMALLEST = [
    min((name for name in ALL if _module(name) == module), key=_size)
    for module in sorted({_module(name) for name in ALL})
]


def check_taps(name):
    with torch.device("meta"):
        model = create_branch_model(name, taps=[3, 4, 5], num_classes=[2, 3, 4])
        maps = {}
        for key in model.names:
            model.head(key).register_forward_pre_hook(
                lambda head, args, key=key: maps.update({key: args[0]})
            )
        logits = model.eval()(torch.empty(2, *model.input_size))
        assert {key: tuple(y.shape) for key, y in logits.items()} == {
            "stage3": (2, 2),
            "stage4": (2, 3),
            "stage5": (2, 4),
        }
        sum(y.sum() for y in logits.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    trained = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    assert trained > 0.95 * sum(p.numel() for p in model.backbone.parameters())
    table = {row.stage: row for row in list_taps(name)}
    height, width = model.input_size[1:]
    for stage, y in zip((3, 4, 5), maps.values(), strict=True):
        row = table[stage]
        assert y.shape[1] == row.channels
        for pixels, found in zip((height, width), y.shape[2:], strict=True):
            # a network that does not pad loses up to that many pixels; one more or less is rounding
            assert (
                pixels // row.stride - _UNPADDED.get(_module(name), 0)
                <= found
                <= -(-pixels // row.stride)
            )


@pytest.mark.parametrize(
    "name", [n for n in SMALLEST if not n.startswith((_NEED_VALUES, *_MINUTES))]
)
def test_smallest_of_each_module(name):
    check_taps(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith(_NEED_VALUES)])
def test_all(name):
    check_taps(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SMALLEST if n.startswith(_NEED_VALUES)])
def test_those_that_need_values(name):
    model = create_branch_model(name, taps=[3, 4, 5], num_classes=[2, 3, 4]).eval()
    logits = model(torch.zeros(1, *model.input_size))
    assert [tuple(y.shape) for y in logits.values()] == [(1, 2), (1, 3), (1, 4)]
    sum(y.sum() for y in logits.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
