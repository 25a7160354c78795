"""Model files: round trips, damage, and what a kill in the middle of a write leaves behind."""

import json
import os
import random
import signal
import stat
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from timm_branches import (
    FlattenHead,
    PoolHead,
    Tap,
    Taxonomy,
    create_branch_model,
    load_model,
    load_weights,
    save_model,
    save_pretrained,
)
from timm_branches.files import replace_file
from timm_branches.weights import read_metadata

TREE = Taxonomy.from_paths(["a/x", "a/y", "b/z"], levels=["coarse", "fine"])


def small(seed=0, **kwargs):
    torch.manual_seed(seed)
    options = {"taps": [3, 5], "num_classes": [2, 3], "img_size": 32} | kwargs
    model = create_branch_model(options.pop("model_name", "test_resnet"), **options)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model.eval()


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def bits(model):
    return {
        k: (v.dtype, tuple(v.shape), v.contiguous().reshape(-1).view(torch.uint8).clone())
        for k, v in model.state_dict().items()
    }


def assert_same(a, b):
    a, b = (x if isinstance(x, dict) else bits(x) for x in (a, b))
    assert list(a) == list(b)
    for key in a:
        assert a[key][:2] == b[key][:2], key
        assert torch.equal(a[key][2], b[key][2]), key


@pytest.fixture
def file(tmp_path):
    return save_model(small(), tmp_path / "model.safetensors")


class TestRoundTrip:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"model_name": "test_vit", "img_size": 160, "taps": [2, Tap(4, detach=True)]},
            {"taps": ["conv3", "layer4.0.conv1"]},
            {"head": [PoolHead((7, 5), "catavgmax", 0.25), FlattenHead((6,), 0.1)]},
            {"names": ["type", "x.y"], "drop_rate": 0.3, "in_chans": 3, "num_classes": [0, 3]},
            {"taxonomy": TREE, "num_classes": None},
            {"drop_path_rate": 0.1, "output_stride": 16},
            {"img_size": (32, 64)},
        ],
        ids=str,
    )
    def test_bit_for_bit(self, tmp_path, kwargs):
        model = small(**kwargs)
        twin = load_model(save_model(model, tmp_path / "model.safetensors"))
        assert_same(model, twin)
        assert not twin.training
        assert repr(twin) == repr(model)
        assert twin.names == model.names
        assert twin.taps == model.taps
        assert twin.head_specs == model.head_specs
        assert twin.taxonomy == model.taxonomy
        assert twin.input_size == model.input_size
        assert twin.pretrained_cfg == model.pretrained_cfg
        x = torch.randn(2, *model.input_size)
        for y, e in zip(twin(x).values(), model(x).values(), strict=True):
            assert torch.equal(y, e)
        assert_same(model, load_model(save_model(twin, tmp_path / "again.safetensors")))

    def test_channels_last(self, tmp_path):
        model = small().to(memory_format=torch.channels_last)
        twin = load_model(save_model(model, tmp_path / "m.safetensors"))
        assert_same(model, twin)
        weight = twin.backbone.layer3[0].conv1.weight
        assert weight.is_contiguous()
        assert torch.equal(weight, model.backbone.layer3[0].conv1.weight)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_type(self, tmp_path, dtype):
        model = small().to(dtype)
        assert_same(model, load_model(save_model(model, tmp_path / "m.safetensors")))

    def test_mixed_types(self, tmp_path):
        model = small()
        model.backbone.to(torch.bfloat16)
        assert_same(model, load_model(save_model(model, tmp_path / "m.safetensors")))

    def test_tied(self, tmp_path):
        model = small(num_classes=[3, 3], head=PoolHead((4,)))
        model.head("stage5").fc.weight = model.head("stage3").fc.weight
        path = save_model(model, tmp_path / "m.safetensors")
        with safe_open(path, "pt") as f:
            assert len([k for k in f.keys() if k.endswith("fc.weight")]) == 1
        assert_same(model, load_model(path))

    def test_views(self, tmp_path):
        """Slices of one large storage: neither tied to each other nor written whole."""
        model = small(num_classes=[2, 2], taps=[3, Tap(3, detach=True)], names=["a", "b"])
        store = torch.randn(1000, model.taps[0].channels)
        model.head("a").fc.weight = nn.Parameter(store[:2])
        model.head("b").fc.weight = nn.Parameter(store[2:4])
        path = save_model(model, tmp_path / "m.safetensors")
        assert path.stat().st_size < sum(v.nbytes for v in model.state_dict().values()) + 20_000
        assert_same(model, load_model(path))

    def test_preprocessing(self, tmp_path):
        model = small()
        model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), crop_pct=0.7, interpolation="nearest")
        twin = load_model(save_model(model, tmp_path / "m.safetensors"))
        assert twin.pretrained_cfg == model.pretrained_cfg

    def test_after_reset(self, tmp_path):
        model = small(taxonomy=TREE, num_classes=None)
        model.reset_classifier([4, 5])
        twin = load_model(save_model(model, tmp_path / "m.safetensors"))
        assert_same(model, twin)
        assert twin.taxonomy is None

    def test_extra(self, tmp_path):
        extra = {"accuracy": [0.25, 0.5], "command": "python train.py"}
        metadata = read_metadata(save_model(small(), tmp_path / "m.safetensors", extra=extra))
        assert json.loads(metadata["extra"]) == extra

    def test_hub_layout(self, tmp_path):
        model = small(taxonomy=TREE, num_classes=None)
        folder = save_pretrained(model, tmp_path / "a" / "b")
        assert sorted(p.name for p in folder.iterdir()) == [
            "README.md",
            "config.json",
            "model.safetensors",
        ]
        twin = load_model(folder)
        assert_same(model, twin)
        assert twin.taxonomy == TREE
        (folder / "config.json").unlink()  # the file alone suffices
        assert_same(model, load_model(folder))

    def test_load_weights(self, file):
        other = small(seed=1)
        before = other.head("stage3").fc.weight
        load_weights(other, file)
        assert_same(other, small())
        # an optimizer that holds it goes on working
        assert other.head("stage3").fc.weight is before

    def test_checkpoint_path(self, file):
        model = create_branch_model(
            "test_resnet", taps=[3, 5], num_classes=[2, 3], img_size=32, checkpoint_path=file
        )
        assert_same(model, small())


def bad_files(good):
    """Name, content and what the error says."""
    header = int.from_bytes(good[:8], "little")
    for length in (
        1,
        7,
        8,
        9,
        8 + header // 2,
        8 + header,
        8 + header + 1,
        len(good) // 2,
        len(good) - 1,
    ):
        yield f"cut at {length}", good[:length], "not a whole safetensors file"
    yield "longer", good + b"\0", "not a whole safetensors file"
    yield "empty", b"", "not a whole safetensors file"
    yield (
        "text",
        b"These are not the weights you are looking for.\n" * 100,
        "not a whole safetensors file",
    )
    yield "zeros", bytes(len(good)), "not a whole safetensors file|not one of timm_branches"
    for place in (8 + header, 8 + header + 1001, len(good) - 1):
        data = bytearray(good)
        data[place] ^= 1
        yield f"bit {place}", bytes(data), "checksum"


class TestDamage:
    def check_refused(self, path, match="model.safetensors"):
        """Both ways of reading say so, and a model at hand stays as it was."""
        model = small(seed=5)
        before = bits(model)
        with pytest.raises(ValueError, match=match) as error:
            load_weights(model, path)
        assert str(path) in str(error.value)
        assert_same(model, before)
        with pytest.raises(ValueError, match=match):
            load_model(path)

    def test_bytes(self, file):
        good = file.read_bytes()
        for _name, data, match in bad_files(good):
            file.write_bytes(data)
            self.check_refused(file, match)
        file.write_bytes(good)
        assert_same(load_model(file), small())

    def test_any_bit_of_the_header(self, file):
        """Wherever a bit of the header flips: an error, or at the least the same model."""
        good = file.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little")
        chosen = random.Random(0).sample(range(header), 80)
        accepted = 0
        for place in chosen:
            data = bytearray(good)
            data[place] ^= 1 << (place % 7)
            file.write_bytes(data)
            model = small(seed=5)
            before = bits(model)
            try:
                load_weights(model, file)
            except ValueError as error:
                message = str(error)
            else:
                accepted, message, before = accepted + 1, str(file), bits(small())
            assert str(file) in message
            assert_same(model, before)
        assert accepted < 5  # spaces that pad the header

    def test_foreign(self, file):
        save_file({"weight": torch.ones(3)}, file)
        self.check_refused(file, "not one of timm_branches")

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"model_name": "test_efficientnet"}, "tensors missing"),
            ({"taps": [3, 4]}, "missing"),
            ({"num_classes": [2, 4]}, "of another shape"),
            ({"head": PoolHead((3,))}, "unexpected|missing|shape"),
        ],
    )
    def test_of_another_model(self, file, options, match):
        model = small(**options)
        before = bits(model)
        with pytest.raises(ValueError, match=match):
            load_weights(model, file)
        assert_same(model, before)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                lambda t: t.pop("heads.stage3.fc.bias"),
                r"1 tensors missing \['heads.stage3.fc.bias'\]",
            ),
            (lambda t: t.update(more=torch.ones(2)), r"1 unexpected \['more'\]"),
            (
                lambda t: t.update({"heads.stage3.fc.bias": torch.ones(5)}),
                r"fc.bias: \(5,\) in the file, \(2,\)",
            ),
        ],
    )
    def test_tensors(self, file, change, match):
        """A file whose checksum is right but whose tensors are not those of the model that it
        describes."""
        from timm_branches import weights

        tensors = dict(small().state_dict())
        change(tensors)
        metadata = read_metadata(file)
        metadata["sha256"] = weights.digest_tensors(tensors, metadata)
        save_file(tensors, file, metadata)
        self.check_refused(file, match)

    @pytest.mark.parametrize("key", ["config", "tied", "extra", "sha256"])
    def test_metadata(self, file, key):
        metadata = read_metadata(file)
        with safe_open(file, "pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        save_file(tensors, file, metadata | {key: metadata[key][:-2]})
        self.check_refused(file, "damaged")
        save_file(tensors, file, {k: v for k, v in metadata.items() if k != key})
        self.check_refused(file, "damaged")

    def test_later_version(self, file):
        metadata = read_metadata(file)
        save_file(small().state_dict(), file, metadata | {"version": "99"})
        self.check_refused(file, "later timm_branches")

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            "{}",
            '{"model": 3}',
            '{"model": {"nose": 1}, "pretrained_cfg": {}}',
            '{"model": {"model_name": "test_resnet"}}',
            "\udcff",
        ],
    )
    def test_hub_config(self, tmp_path, text):
        folder = save_pretrained(small(), tmp_path / "hub")
        (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match="config.json"):
            load_model(folder)

    def test_nothing_there(self, tmp_path):
        for path in (tmp_path, tmp_path / "none.safetensors"):
            with pytest.raises(FileNotFoundError, match="no such file"):
                load_model(path)


class TestPickle:
    def test_never_read(self, tmp_path, monkeypatch):
        model = small()
        path = tmp_path / "model.pth"
        torch.save(model.state_dict(), path)

        def refuse(*args, **kwargs):
            raise AssertionError("a pickle was opened")

        for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
            monkeypatch.setattr(name, refuse)
        with pytest.raises(ValueError, match="was written by torch.save"):
            load_model(path)
        with pytest.raises(ValueError, match="was written by torch.save"):
            load_weights(model, path)
        good = save_model(model, tmp_path / "model.safetensors")
        assert_same(load_model(good), model)


class TestWriting:
    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_mode(self, tmp_path, umask, mode):
        before = os.umask(umask)
        try:
            folder = save_pretrained(small(), tmp_path / "hub")
        finally:
            os.umask(before)
        assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {mode}

    def test_a_failed_write_leaves_the_old_file(self, file):
        before = file.read_bytes()

        def fail(temporary):
            with open(temporary, "wb") as f:
                f.write(b"half")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            replace_file(file, fail)
        assert file.read_bytes() == before
        assert [p.name for p in file.parent.iterdir()] == [file.name]

    @pytest.mark.parametrize(
        ("key", "value"), [("norm_layer", nn.BatchNorm2d), ("act_layer", nn.SiLU)]
    )
    def test_an_option_that_no_file_can_hold(self, file, key, value):
        before = file.read_bytes()
        model = create_branch_model("test_resnet", taps=[3, 5], num_classes=2, **{key: value})
        with pytest.raises(ValueError, match=f"made with {key}="):
            save_model(model, file)
        assert file.read_bytes() == before

    def test_extra_that_no_file_can_hold(self, file):
        before = file.read_bytes()
        with pytest.raises((ValueError, TypeError), match="JSON|extra"):
            save_model(small(), file, extra={"x": torch.ones(2)})
        assert file.read_bytes() == before

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_killed_while_writing(self, tmp_path):
        """SIGKILL at random moments.

        The file is always whole, with the weights of one write and no other.
        """
        path = save_model(small(), tmp_path / "model.safetensors")
        draw = random.Random(0)
        found = []
        for _ in range(8):
            child = os.fork()
            if child == 0:
                try:
                    model, count = small(), 0
                    while True:
                        count += 1
                        with torch.no_grad():
                            for tensor in model.state_dict().values():
                                tensor.fill_(count)
                        save_model(model, path)
                finally:
                    os._exit(1)
            time.sleep(0.4)
            for _ in range(2):  # as long as it writes, whoever reads finds a whole file
                time.sleep(0.03 * draw.random())
                load_model(path)
            time.sleep(0.03 * draw.random())
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
            values = {t.flatten()[0].item() for t in load_model(path).state_dict().values()}
            found.append(values)
        # all tensors are of one write
        assert all(len(values) == 1 and max(values) > 1 for values in found)
