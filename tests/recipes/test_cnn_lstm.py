"""``recipes/cnn_lstm.py`` as a user runs it: a script, started from some other folder."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tests.recipes.script import RECIPES, read_table, run_recipe
from timm_branches import load_model
from timm_branches.data.clips.digits import counting_digits, digit_clips

RECIPE = RECIPES / "cnn_lstm.py"
CLASSES = ("jump", "walk")
TINY = (
    "--model",
    "test_resnet",
    "--img-size",
    "32",
    "--hidden-size",
    "8",
    "--frames",
    "3",
    "--epochs",
    "1",
    "-b",
    "4",
    "--val-fraction",
    "0.25",
    "--no-plots",
)


def moving_square(kind, start, count=5, size=32):
    """Frames of a square that goes up and down (jump) or to the right (walk)."""
    frames = np.zeros((count, size, size, 3), np.uint8)
    for t, frame in enumerate(frames):
        x, y = (start, 12 + 6 * (t % 2)) if kind == "jump" else (start + 3 * t, 12)
        frame[y : y + 8, x : x + 8] = 255
    return frames


def write_video(path, frames):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def write_frames(folder, frames):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The same clips as videos, as nested folders of frames, and named by a CSV.

    And damaged ones.
    """
    root = tmp_path_factory.mktemp("clips")
    rows = ["path,label,split,start,end"]
    for kind in CLASSES:
        for i in range(8):
            frames = moving_square(kind, i, count=4 + i % 3)
            write_video(root / "videos" / kind / f"{i}.mp4", frames)
            write_frames(root / "nested" / "moves" / kind / str(i), frames)
            rows.append(f"videos/{kind}/{i}.mp4,{kind},{'test' if i > 5 else 'train'},{i % 2},")
        for i in range(4):
            write_frames(root / "nested" / "rests" / f"{kind}ed" / str(i), frames)
            write_video(root / "damaged" / kind / f"{i}.mp4", frames)
    (root / "clips.csv").write_text("\n".join(rows) + "\n")
    (root / "damaged" / "walk" / "bad.mp4").write_bytes(b"no video")
    for i in range(4):
        for kind in CLASSES:
            (root / "broken" / kind).mkdir(parents=True, exist_ok=True)
            (root / "broken" / kind / f"{i}.mp4").write_bytes(b"no video")
    return root


class TestDigits:
    def test_every_frame_is_equally_likely_in_both_classes(self, recipe):
        """What the docstring claims: counted, not believed."""
        for part in counting_digits():
            labels = part.labels[:, 0].tolist()
            assert labels == [0, 1] * (len(part) // 2)
            clips = part.images.clips
            for up, down in zip(clips[::2], clips[1::2], strict=True):
                assert len(up) == len(down)
                assert np.array_equal(up[-1], down[-1])
                assert not np.array_equal(up[-2], down[-2])
            assert {len(clip) for clip in clips} == {3, 4, 5, 6}

    def test_digits_count_up_or_down(self, recipe):
        from sklearn.datasets import load_digits

        digits = load_digits()
        known = {
            np.kron(image, np.ones((2, 2))).astype(np.uint8).tobytes(): int(y)
            for image, y in zip(digits.images, digits.target, strict=True)
        }
        seen = Counter()
        used = []
        for part in counting_digits():
            used.append(set())
            for clip, (label,) in zip(part.images.clips, part.labels.tolist(), strict=True):
                names = [known[(frame // 15).tobytes()] for frame in clip]
                used[-1] |= {frame.tobytes() for frame in clip}
                assert all(
                    (b - a) % 3 == (1, 2)[label] for a, b in zip(names[:-1], names[1:], strict=True)
                )
                seen[label, names[0]] += 1
        assert not used[0] & used[1]
        assert not (used[0] | used[1]) & used[2]
        # three digits at the start of clips of two classes
        assert min(seen.values()) > 0.8 * max(seen.values())
        assert len(seen) == 6

    def test_without_arguments_cut_short(self, tmp_path, here):
        status, out, err = here("--epochs", "1", "--limit", "64", "--no-plots", "--stream")
        assert status == 0, err
        rows = read_table(out)[1]
        assert list(rows) == ["CNN+LSTM", "last frame alone", "chance"]
        assert rows["last frame alone"] == rows["chance"] == [50]
        assert len(re.findall(r"^  frame \d: (up|down) \d+ %$", out, re.MULTILINE)) in (3, 4, 5, 6)
        facts = json.loads((tmp_path / "output" / "cnn_lstm" / "results.json").read_text())
        assert {
            name: [found["order_top1"]] for name, found in facts["results"].items()
        } == pytest.approx({name: pytest.approx(row, abs=0.006) for name, row in rows.items()})
        assert (facts["train_clips"], facts["clips"], facts["judged"]) == (64, 600, "test")
        model = load_model(
            tmp_path / "output" / "cnn_lstm" / "cnn_lstm" / "model.safetensors"
        ).eval()
        assert model.taxonomy.leaves == (("up",), ("down",))
        assert model(torch.rand(2, 5, 1, 16, 16))["order"].shape == (2, 2)

    def test_resume(self, tmp_path, here):
        tiny = ("--limit", "32", "--no-baseline", "--no-plots", "--output", "mine")
        assert here(*tiny, "--epochs", "1")[0] == 0
        status, out, _ = here(*tiny, "--epochs", "2", "--resume", "auto")
        assert status == 0
        assert "epoch 2/2" in out
        assert "epoch 1/2" not in out
        assert here(*tiny, "--epochs", "1")[0] == 0
        assert (tmp_path / "mine-1" / "cnn_lstm" / "model.safetensors").exists()


class TestOwnData:
    def check_run(self, result, rows=("CNN+LSTM", "last frame alone", "chance")):
        status, out, err = result
        assert status == 0, err
        assert list(read_table(out)[1]) == list(rows)
        return out

    def test_videos_with_another_head(self, clips, tmp_path, here):
        extra = (
            "--head",
            "gru",
            "--layers",
            "2",
            "--bidirectional",
            "--rnn-output",
            "frame",
            "--projection",
            "6",
            "--activation",
            "relu",
            "--hidden",
            "5",
            "--pool",
            "max",
            "--augment",
            "light",
            "--frames-per-pass",
            "4",
            "--freeze",
            "3",
            "--sampling",
            "dense",
            "--stride",
            "2",
        )
        args = [*TINY, *extra]
        args[args.index("--frames") + 1] = "2"
        out = self.check_run(
            here(clips / "videos", *args), ("CNN+GRU", "last frame alone", "chance")
        )
        assert "0 clips could not be read." in out
        model = load_model(
            tmp_path / "output" / "cnn_lstm" / "cnn_gru" / "model.safetensors"
        ).eval()
        assert model.taxonomy.leaves == tuple((kind,) for kind in CLASSES)
        spec = model.head_specs[0]
        assert (
            spec.kind,
            spec.num_layers,
            spec.bidirectional,
            spec.output,
            spec.projection,
            spec.activation,
            spec.hidden,
            spec.pool_type,
            spec.hidden_size,
        ) == ("gru", 2, True, "frame", 6, "relu", (5,), "max", 8)

    @pytest.mark.parametrize(
        ("head", "flags", "expected"),
        [
            ("transformer", ["--causal", "--num-heads", "2", "--stream"], {"causal": True}),
            ("transformer", ["--pool", "none", "--max-frames", "5"], {"pool_type": "none"}),
            ("attention", ["--num-heads", "4", "--rnn-output", "frame"], {"output": "frame"}),
            ("tcn", ["--kernel-size", "2", "--readout", "max"], {"kernel_size": 2}),
            ("mingru", ["--layers", "2"], {"num_layers": 2}),
        ],
    )
    def test_other_heads(self, head, flags, expected, clips, tmp_path, here):
        name = {"tcn": "CNN+TCN", "mingru": "CNN+minGRU"}.get(head, f"CNN+{head}")
        args = (*TINY, "--head", head, *flags, "--no-baseline")
        self.check_run(here(clips / "videos", *args), (name, "chance"))
        (path,) = (tmp_path / "output" / "cnn_lstm").rglob("model.safetensors")
        spec = load_model(path).head_specs[0]
        assert spec.kind == head
        assert {option: getattr(spec, option) for option in expected} == expected

    def test_nested_frame_folders_have_a_head_a_level(self, clips, tmp_path, here):
        out = self.check_run(here(clips / "nested", *TINY, "--taps", "4", "5", "--stream"))
        assert all(len(row) == 2 for row in read_table(out)[1].values())
        assert read_table(out)[1]["chance"] == pytest.approx([100 * 4 / 6, 100 * 2 / 6], abs=0.006)
        model = load_model(tmp_path / "output" / "cnn_lstm" / "cnn_lstm" / "model.safetensors")
        assert [info.tap.stage for info in model.taps] == [4, 5]
        assert list(model.num_classes.values()) == [2, 4]

    def test_frames_by_time(self, clips, tmp_path, here):
        """Videos of 5 frames a second, looked at 2.5 times a second."""
        args = [*TINY, "--rate", "2.5", "--sampling", "dense", "--no-baseline"]
        args[args.index("--frames") + 1] = "2"
        self.check_run(here(clips / "videos", *args), ("CNN+LSTM", "chance"))
        (path,) = (tmp_path / "output" / "cnn_lstm").rglob("model.safetensors")
        frames = load_model(path).extra["frames"]
        assert frames == {"num_frames": 2, "sampling": "dense", "stride": 1, "rate": 2.5}

    def test_csv_with_splits_and_cuts(self, clips, here):
        assert "on the 4 test clips" in self.check_run(
            here(clips / "clips.csv", *TINY, "--readout", "mean")
        )

    def test_frozen_and_cached(self, clips, tmp_path, here, recwarn):
        frozen = (*TINY, "--freeze", "all", "--cache", "features", "--epochs", "2")
        cached = read_table(self.check_run(here(clips / "clips.csv", *frozen, "--output", "a")))[1]
        files = {
            path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")
        }
        assert len(files) == 4  # training and validation, all frames and the last ones
        again = self.check_run(
            here(clips / "clips.csv", *frozen, "--output", "b", "--no-baseline"),
            ("CNN+LSTM", "chance"),
        )
        assert read_table(again)[1]["CNN+LSTM"] == cached["CNN+LSTM"]
        assert {
            path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")
        } == files
        assert not [str(w.message) for w in recwarn if "stale" in str(w.message)]

    def test_views(self, clips, tmp_path, here):
        args = (
            "--freeze",
            "all",
            "--cache",
            "features",
            "--augment",
            "light",
            "--views",
            "2",
            "--no-baseline",
        )
        self.check_run(here(clips / "clips.csv", *TINY, *args), ("CNN+LSTM", "chance"))
        indices = [json.loads(path.read_text()) for path in (tmp_path / "features").rglob("*.json")]
        assert sorted(index["fingerprint"]["views"] for index in indices) == [1, 2]

    def test_unreadable_clips_are_counted(self, clips, here):
        out = self.check_run(here(clips / "damaged", *TINY))
        assert re.search(r"Left out: \S*bad\.mp4", out)
        assert "1 clips could not be read; they were left out." in out


class TestCompare:
    def test_digits(self, tmp_path, here):
        args = ("--compare", "mean", "gru", "--seeds", "2", "--epochs", "1", "--no-plots")
        status, out, err = here("digits-majority", *args)
        assert status == 0, err
        titles, rows = read_table(out)
        assert titles == ["digit (4)", "k parameters", "seconds"]
        assert list(rows) == ["mean", "GRU"]
        assert "digit (4): " in out
        facts = json.loads((tmp_path / "output" / "cnn_lstm" / "compare.json").read_text())
        accuracy = [run["digit (4)"] for run in facts["results"]["GRU"]]
        assert rows["GRU"][0] == pytest.approx(sum(accuracy) / 2, abs=0.06)
        # 64 (3 (50 + 64) + 6) of the recurrence, 64 x 4 + 4 of the classifier
        assert rows["GRU"][1] == pytest.approx(((50 + 64 + 2) * 3 * 64 + 65 * 4) / 1e3, abs=0.06)
        assert [path.name for path in (tmp_path / "output").iterdir()] == ["cnn_lstm"]
        # both heads pool: training and validation features are there once, for both seeds
        files = list((tmp_path / "output" / "cnn_lstm" / "features").rglob("*.safetensors"))
        assert len(files) == 2

    @pytest.mark.filterwarnings("error:.*views=1")
    def test_own_clips(self, clips, here):
        args = ("--freeze", "all", "--compare", "tcn", "attention", "--num-heads", "2")
        status, out, err = here(clips / "nested", *TINY, *args)
        assert status == 0, err
        titles, rows = read_table(out)
        assert titles == ["level1 (2)", "level2 (4)", "k parameters", "seconds"]
        assert list(rows) == ["TCN", "attention"]


class TestHarderDigits:
    @pytest.fixture(scope="class")
    def names(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        known = {}
        for image, digit in zip(digits.images, digits.target, strict=True):
            known[np.kron(image, np.ones((2, 2))).astype(np.uint8).tobytes()] = int(digit)
        return lambda clip: [known[(frame // 15).tobytes()] for frame in clip]

    @pytest.mark.parametrize(
        ("task", "answer", "least", "most"),
        [
            ("first", lambda digits: digits[0], 12, 32),
            ("after", lambda digits: digits[digits.index(9) + 1], 8, 24),
            ("majority", lambda digits: Counter(digits).most_common(1)[0][0], 8, 24),
        ],
    )
    def test_labels_are_what_they_say(self, names, task, answer, least, most):
        used = []
        for part in digit_clips(task):
            used.append({frame.tobytes() for clip in part.images.clips for frame in clip})
            lengths = {len(clip) for clip in part.images.clips}
            assert (min(lengths), max(lengths)) == (least, most)
            for clip, (label,) in zip(part.images.clips, part.labels.tolist(), strict=True):
                digits = names(clip)
                assert answer(digits) == label
                assert digits.count(9) == (task == "after")
            shares = part.labels[:, 0].bincount() / len(part)
            assert shares.max() < 0.32
        assert not used[0] & used[1]
        assert not (used[0] | used[1]) & used[2]

    def test_unknown_task(self):
        with pytest.raises(ValueError, match="'last'.*order, first, after, majority"):
            digit_clips("last")


MISTAKES = {
    "model": (["--model", "resnet5000"], "resnet5000"),
    "no folder": (["nowhere/videos"], "nowhere/videos"),
    "taps": (["--taps", "3", "4"], "--taps 3 4"),
    "tap": (["--taps", "conv9"], "no stage 9"),
    "stage": (["--freeze", "9"], "stages=9"),
    "no projection": (["--activation", "relu"], "projection"),
    "pass": (["--frames-per-pass", "0"], "frames_per_pass"),
    "frames": (["--frames", "0"], "num_frames"),
    "width": (["--hidden-size", "0"], "hidden_size"),
    "activation": (["--projection", "4", "--activation", "reluu"], "reluu"),
    "size": (["--img-size", "1", "2", "3"], "--img-size"),
    "limit": (["--limit", "0"], "--limit"),
    "mean": (["--mean", "0.5", "0.5"], "--mean"),
    "augment": (["--augment", "strong"], "strong"),
    "batch": (["-b", "0"], "batch_size"),
    "all broken": (["{clips}/broken"], "none of the"),
    "strict": (["{clips}/broken", "--strict"], ".mp4"),
    "stride": (["{clips}/videos", "--stride", "2"], "stride"),
    "cache of a damaged clip": (["{clips}/damaged", "--freeze", "all", "--cache", "f"], "bad.mp4"),
}


@pytest.mark.filterwarnings("ignore:.*The next clip that can be read")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, clips, here):
    args, needle = MISTAKES[name]
    args = [arg.format(clips=clips) for arg in args]
    own = [
        "--model",
        "test_resnet",
        "--epochs",
        "1",
        "--limit",
        "16",
        "--img-size",
        "32",
        "--no-baseline",
    ]
    status, out, err = (
        here(*own, *args) if args[0].startswith("-") else here(args[0], *own, *args[1:])
    )
    assert status == 2, err
    lines = err.splitlines()
    assert lines[-1].startswith("cnn_lstm.py: ")
    assert needle in lines[-1]
    assert "Traceback" not in err
    assert read_table(out)[1] == {}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cache", "f"], "--cache has no effect"),
        (["--cache", "f", "--freeze", "3"], "--cache has no effect"),
        (["--views", "2"], "--views has no effect"),
        (["videos", "--freeze", "all", "--cache", "f", "--augment", "light"], "needs --views"),
        (["--freeze", "3", "--freeze-backbone"], "contradict"),
        (["--freeze", "all", "--no-freeze-backbone"], "contradict"),
        (["--freeze", "all", "--grad-checkpointing"], "--grad-checkpointing has no effect"),
        (["--hflip", "0.5"], "--hflip has no effect"),
        (["videos", "--hflip", "0.5", "--augment", "none"], "--hflip has no effect"),
        (["--rnn-output", "frame", "--readout", "mean"], "--readout mean has no effect"),
        (["--head", "mean", "--hidden-size", "8"], "--hidden-size has no effect on the head"),
        (["--causal"], "--causal has no effect on the head 'lstm'"),
        (["--head", "transformer", "--stream"], "needs --causal"),
        (["--seeds", "3"], "--seeds has no effect without --compare"),
        (["--compare", "lstm", "gru", "--kernel-size", "2"], "--kernel-size has no effect on any"),
        (["--compare", "unet"], "--compare unet: choose among"),
        (["--compare", "gru", "gru"], "twice"),
        (["--compare", "--head", "gru"], "--head has no effect with --compare"),
        (["--compare", "--stream"], "--stream has no effect with --compare"),
        (["--stream", "--bidirectional"], "--stream"),
        (["--strict"], "--strict has no effect on the digits"),
        (["--in-chans", "3"], "--in-chans 3 has no effect"),
        (["--resume", "last.safetensors"], "--resume auto"),
    ],
)
def test_what_has_no_effect_is_refused(recipe, capsys, args, message):
    with pytest.raises(SystemExit) as stopped:
        recipe.parse_args(args)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "frozen"),
    [
        ([], False),
        (["--freeze", "all"], True),
        (["--freeze-backbone"], True),
        (["--freeze", "2"], False),
    ],
)
def test_both_spellings_of_freezing_mean_the_same(recipe, args, frozen):
    parsed = recipe.parse_args(args)
    assert parsed.freeze_backbone is frozen
    assert (parsed.freeze == "all") is frozen


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_only_the_order_tells(tmp_path, seed):
    done = run_recipe(RECIPE, "--no-plots", "--seed", seed, cwd=tmp_path)
    rows = read_table(done.stdout)[1]
    assert rows["CNN+LSTM"][0] >= 95, done.stderr
    assert rows["last frame alone"] == [50]


@pytest.mark.slow
def test_two_processes(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    args = (
        "--epochs",
        "1",
        "--limit",
        "64",
        "--device",
        "cpu",
        "--no-plots",
        "--freeze",
        "all",
        "--cache",
        "f",
    )
    done = run_recipe(RECIPE, *args, cwd=tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert list(read_table(done.stdout)[1]) == ["CNN+LSTM", "last frame alone", "chance"]
    assert done.stdout.count("chance") == 2  # the row and its explanation, from one process
