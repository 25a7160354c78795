"""The benchmarks run from end to end on the smallest of everything, and count what they say."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def run(gpu, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--device", "cpu", *map(str, argv)])
    gpu.main()


class TestGPU:
    def test_pieces(self, gpu, monkeypatch, tmp_path, capsys):
        names = ["roof", "waits", "operations", "trees", "vgg16_bn", "clips", "masks"]
        run(gpu, monkeypatch, "--output", tmp_path, "--pieces", *names)
        kept = json.loads((tmp_path / "cpu.json").read_text())["pieces"]
        assert list(kept) == [name for name in gpu.PIECES if name in names] == names
        for name, piece in kept.items():
            assert "failed" not in piece, (name, piece)
            assert piece["rows"], name
        page = (tmp_path / "cpu.md").read_text()
        assert page.count("Not run.") == len(gpu.PIECES) - len(names)
        capsys.readouterr()
        run(gpu, monkeypatch, "--output", tmp_path, "--pieces", "roof")
        assert "roof: is there already" in capsys.readouterr().out

    def test_a_failure_stops_nothing(self, gpu, monkeypatch, tmp_path):
        def breaks(setting):
            raise OSError("the cable is out")

        monkeypatch.setitem(gpu.PIECES, "waits", gpu.Piece("?", breaks))
        run(gpu, monkeypatch, "--output", tmp_path, "--pieces", "waits", "roof")
        kept = json.loads((tmp_path / "cpu.json").read_text())["pieces"]
        assert "the cable is out" in kept["waits"]["failed"]
        assert "the cable is out" in (tmp_path / "cpu.md").read_text()
        assert kept["roof"]["rows"]
        # it is tried again
        monkeypatch.setitem(gpu.PIECES, "waits", gpu.Piece("?", lambda setting: [{"what": 1}]))
        run(gpu, monkeypatch, "--output", tmp_path, "--pieces", "waits")
        assert json.loads((tmp_path / "cpu.json").read_text())["pieces"]["waits"]["rows"]

    def test_without_data(self, gpu, monkeypatch, tmp_path, capsys):
        argv = ["gpu.py", "--device", "cpu", "--output", str(tmp_path), "--pieces", "camvid"]
        monkeypatch.setattr(sys, "argv", argv)
        gpu.main()
        assert "camvid: not run, --data lacks camvid" in capsys.readouterr().out

    def test_no_device(self, gpu, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["gpu.py"])
        with pytest.raises(SystemExit) as stop:
            gpu.main()
        assert stop.value.code == 2
        assert "no CUDA device" in capsys.readouterr().err


class TestOperations:
    """A step on a GPU brings nothing from the host, and waits for nothing."""

    def test_trees(self, gpu):
        setting = gpu.Setting(torch.device("cpu"), True, 2, None, Path(), 0, 1)
        rows = gpu.operations(setting)
        assert len(rows) > 30
        for row in rows:
            assert row["operations"] > 0, row
            assert (row["copies"], row["waits"]) == (0, 0), row

    @pytest.mark.parametrize("task", ["levels", "marginal", "extras", "smooth", "flat"])
    def test_tasks(self, gpu, task):
        from timm_branches import create_branch_model
        from timm_branches.task import BranchTask, FlatTask
        from timm_branches.taxonomy import Taxonomy

        tree = Taxonomy(["a/x/1", "a/x/2", "a/y", "b/z/3", "b/z/4"])
        meta = torch.device("meta")
        model = create_branch_model("test_resnet", taps=[3, 4, 5], taxonomy=tree)
        if task == "flat":
            leaves = create_branch_model("test_resnet", num_classes=tree.num_leaves)
            made = FlatTask(leaves, tree)
        else:
            weights = {"level3": [1.0, 2.0, 3.0, 4.0]}
            settings = {
                "levels": {},
                "marginal": {"marginal": True},
                "extras": {"consistency": 1.0, "tree_path": 1.0},
                "smooth": {"label_smoothing": 0.1, "class_weights": weights},
            }[task]
            made = BranchTask(model, **settings)
        made = made.to(meta)
        images = torch.randn(4, 3, 64, 64, device=meta)
        labels = torch.zeros(4, 3, dtype=torch.long, device=meta)

        def step():
            made(images, labels)["loss"].backward()

        gpu.count_operations(step)  # tables are made at the first call
        counts = gpu.count_operations(step)
        assert counts.operations > 50
        assert (counts.copies, counts.waits) == (0, 0)

    def test_what_is_counted(self, gpu):
        x = torch.ones(3, device="meta")
        assert gpu.count_operations(lambda: x + 1) == (1, 0, 0)
        assert gpu.count_operations(lambda: x[:2]) == (0, 0, 0)
        assert gpu.count_operations(lambda: bool(x.sum() > 0)).waits == 1
        assert gpu.count_operations(lambda: torch.ones(3).to("meta")).copies == 1
        assert gpu.count_operations(lambda: x + torch.tensor([1.0]).to("meta")).copies == 1


class TestNovelty:
    @pytest.fixture
    def novelty(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        import novelty

        return novelty

    def test_held_out(self, novelty):
        """Of a class held out the lowest node above it is right, which may be none at all."""
        from timm_branches.taxonomy import Taxonomy

        tree = Taxonomy(["a/x/1", "a/x/2", "a/y/3", "b/z/4", "c"])
        known, rows = novelty.without(tree, {1, 2, 3})
        assert known.leaves == (("a", "x", "1"), ("c",))
        assert rows.tolist() == [[0, 0, 0], [0, 0, -1], [0, -1, -1], [-1, -1, -1], [1, -1, -1]]

    def test_digits(self, novelty, monkeypatch, tmp_path):
        path = tmp_path / "novelty.json"
        argv = ["novelty.py", "--steps", "60", "--folds", "2", "--json", str(path)]
        monkeypatch.setattr(sys, "argv", argv)
        novelty.main()
        folds = json.loads(path.read_text())["folds"]
        assert len(folds) == 2
        for fold in folds:
            leaf = fold["flat, always a leaf"]
            assert leaf["new_accuracy"] == 0  # a leaf is never the answer for what has none
            assert leaf["known_accuracy"] > 70
            assert fold["B-CNN, stops by mass"]["new_accuracy"] > 0
            for scores in fold.values():
                both = (scores["known_accuracy"] + scores["new_accuracy"]) / 2
                assert scores["balanced_accuracy"] == pytest.approx(both)


def test_decoders(monkeypatch, tmp_path, capsys):
    pytest.importorskip("segmentation_models_pytorch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import decoders

    path = tmp_path / "decoders.json"
    kinds = ["linear", "lean", "fpn", "unet"]
    argv = ["decoders.py", "--tiny", "--heads", *kinds, "--json", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    decoders.main()
    rows = json.loads(path.read_text())["rows"]
    names = [row["decoder"] for row in rows]
    assert names == ["bare encoder", *kinds, "smp FPN", "smp Unet"]
    parameters = {row["decoder"]: row["parameters"] for row in rows}
    assert parameters["fpn"] == parameters["smp FPN"]
    assert parameters["unet"] == parameters["smp Unet"]
    assert all(row["ratio"] > 0 for row in rows)
    assert "lean" in capsys.readouterr().out


def test_heads_together(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import heads_together

    path = tmp_path / "together.json"
    monkeypatch.setattr(sys, "argv", ["heads_together.py", "--tiny", "--json", str(path)])
    heads_together.main()
    (row,) = json.loads(path.read_text())["rows"]
    assert row["ratio"] == pytest.approx(row["together"] / row["apart"])
    assert "test_convnext" in capsys.readouterr().out


def test_video(monkeypatch, tmp_path, capsys):
    av = pytest.importorskip("av")
    if "libx264" not in av.codecs_available:
        pytest.skip("PyAV was built without libx264")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import video

    path = tmp_path / "video.json"
    monkeypatch.setattr(sys, "argv", ["video.py", "--tiny", "--json", str(path)])
    video.main()
    assert len(json.loads(path.read_text())["rows"]) == 3
    assert "the last frame" in capsys.readouterr().out
