"""Answers for videos and folders of frames: against the network itself."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from timm_branches import Taxonomy, create_branch_model, load_model, save_model
from timm_branches.cli import main
from timm_branches.data.clips.sampling import FrameSampler
from timm_branches.hierarchy.decode import decode
from timm_branches.inference import model_transform, predict_clips

TREE = Taxonomy(["sport/jump", "sport/run", "rest/sit"])


def make(output, kind="lstm", **options):
    torch.manual_seed(0)
    head = {"kind": kind, "output": output, **options}
    return create_branch_model(
        "test_resnet", taps=[5, 5], head=head, taxonomy=TREE, img_size=32
    ).eval()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two folders of frames, of 7 and of 150."""
    root = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for name, count in (("long", 150), ("short", 7)):
        (root / name).mkdir()
        for index in range(count):
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8) // (1 + index // 40)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = 64, 48
        for index in range(50):
            pixels = random.integers(0, 255, (48, 64, 3), dtype=np.uint8) // (1 + index // 20)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def by_hand(model, folder, frames):
    """What the network and `decode` say of some frames of a folder: (1, L), by frames (T, L)."""
    transform = model_transform(model)
    images = [np.array(Image.open(folder / f"{index}.png")) for index in frames]
    x = torch.stack([transform(image) for image in images])[None]
    with torch.no_grad():
        logits = [model(x)[name] for name in TREE.levels]
    return decode([y.flatten(0, -2) for y in logits], TREE, "best-path")


def test_an_answer_a_clip(clips):
    model = make("clip")
    for record, count in zip(predict_clips(model, clips), (150, 7), strict=True):
        expected = by_hand(model, clips / record.file.split("/")[-1], range(count))
        (answer,) = record.answers
        assert answer.labels == tuple(expected.labels[0].tolist())
        assert answer.probabilities == pytest.approx(expected.probabilities[0].tolist(), rel=1e-4)
        assert answer.path == tuple(TREE.classes[i][k] for i, k in enumerate(answer.labels))
        assert record.frames == tuple(range(count))
        assert record.rate is None


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_answer_a_frame(clips, kind, bidirectional):
    """Long clips go through in pieces where the head can go on; each clip begins anew."""
    model = make("frame", kind, bidirectional=bidirectional)
    twice = list(predict_clips(model, [clips / "long", clips / "short", clips / "long"]))
    assert twice[0].answers == twice[2].answers
    for record, count in zip(twice, (150, 7, 150), strict=True):
        expected = by_hand(model, clips / record.file.split("/")[-1], range(count))
        assert len(record.answers) == count
        for answer, p in zip(record.answers, expected.probabilities.tolist(), strict=True):
            assert answer.probabilities == pytest.approx(p, rel=1e-3)


def test_frames_as_in_training(clips, tmp_path):
    model = make("clip")
    model.extra = {"frames": {"num_frames": 4, "sampling": "uniform", "stride": 1}}
    again = load_model(save_model(model, tmp_path / "model.safetensors"))
    (record,) = predict_clips(again, clips / "short")
    assert record.frames == (0, 2, 4, 6)
    expected = by_hand(model, clips / "short", record.frames)
    assert record.answers[0].probabilities == pytest.approx(
        expected.probabilities[0].tolist(), rel=1e-4
    )
    (record,) = predict_clips(again, clips / "short", sampler=FrameSampler(2, "dense", 2))
    assert record.frames == (2, 4)
    again.extra = {"frames": {"num_frames": "x", "sampling": "uniform", "stride": 1}}
    with pytest.raises(ValueError, match="no settings"):
        predict_clips(again, clips / "short")


def test_a_video(video):
    from timm_branches.data.clips.video import read_frames

    model = make("frame")
    (record,) = predict_clips(model, video)
    assert record.rate == 25
    transform = model_transform(model)
    frames = read_frames(str(video), range(50))
    x = torch.stack([transform(frame) for frame in frames])[None]
    with torch.no_grad():
        logits = [model(x)[name][0] for name in TREE.levels]
    expected = decode(logits, TREE, "best-path")
    for answer, p in zip(record.answers, expected.probabilities.tolist(), strict=True):
        assert answer.probabilities == pytest.approx(p, rel=1e-3)


def test_a_long_video_is_read_in_chunks(video, monkeypatch, capsys, tmp_path):
    """The answers are those of the whole, and never more than a chunk's frames are held."""
    from timm_branches.inference import clips as module

    model = make("frame", "gru")
    (whole,) = predict_clips(model, video)
    monkeypatch.setattr(module, "_CHUNK", 8)
    shapes = []
    go_on = model.forward_stream

    def watched(x, *rest):
        shapes.append(x.shape[1])
        return go_on(x, *rest)

    monkeypatch.setattr(model, "forward_stream", watched)
    (record,) = predict_clips(model, video)
    assert shapes == [8] * 6 + [2]
    assert record.frames == tuple(range(50))
    assert record.rate == 25
    for answer, same in zip(record.answers, whole.answers, strict=True):
        assert answer.labels == same.labels
        assert answer.probabilities == pytest.approx(same.probabilities, rel=1e-4)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[:2000])
    (damaged,) = predict_clips(model, cut, strict=False)
    assert str(cut) in damaged.error


def test_refused(clips, tmp_path):
    with pytest.raises(ValueError, match="reads no clips"):
        predict_clips(create_branch_model("test_resnet", num_classes=3), clips)
    with pytest.raises(FileNotFoundError, match="nose"):
        predict_clips(make("clip"), tmp_path / "nose")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no videos or folders of frames"):
        predict_clips(make("clip"), tmp_path / "empty")
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.mp4"):
        list(predict_clips(make("clip"), tmp_path / "bad.mp4"))
    (record,) = predict_clips(make("clip"), tmp_path / "bad.mp4", strict=False)
    assert "bad.mp4" in record.error


class TestCommand:
    @pytest.fixture(scope="class")
    def models(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("models")
        for output in ("clip", "frame"):
            save_model(make(output), folder / f"{output}.safetensors")
        return folder

    def test_text(self, models, clips, tmp_path, capsys):
        (tmp_path / "bad.mp4").write_bytes(b"nothing")
        command = ["predict", str(models / "clip.safetensors"), str(clips)]
        assert main([*command, str(tmp_path / "bad.mp4")]) == 1
        out, err = capsys.readouterr()
        assert [line.split()[0] for line in out.splitlines()] == [
            str(clips / "long"),
            str(clips / "short"),
        ]
        assert "bad.mp4" in err
        assert "1 of 3 clips" in err

    def test_tables(self, models, clips, tmp_path, capsys):
        model = models / "frame.safetensors"
        assert main(["predict", str(model), str(clips / "short"), "--format", "csv"]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        (record,) = predict_clips(model, clips / "short")
        assert [int(row["frame"]) for row in rows] == list(range(7))
        for row, answer in zip(rows, record.answers, strict=True):
            assert (row["level1"], row["level2"]) == answer.path
            assert float(row["level2_probability"]) == pytest.approx(
                answer.probabilities[1], rel=1e-5
            )
        out = tmp_path / "out.json"
        assert main(["predict", str(model), str(clips), "--output", str(out)]) == 0
        for entry in json.loads(out.read_text()):
            frames = [f for run in entry["runs"] for f in range(run["first"], run["last"] + 1)]
            assert frames == list(range({"long": 150, "short": 7}[entry["file"].split("/")[-1]]))

    @pytest.mark.parametrize("output", ["clip", "frame"])
    def test_into_a_folder(self, models, clips, tmp_path, capsys, monkeypatch, output):
        """Answers are kept as they come; what is there is not asked for again."""
        from timm_branches.inference.clips import ClipPredictions

        folder, file = tmp_path / "out", tmp_path / "answers.csv"
        run = ["predict", str(models / f"{output}.safetensors"), str(clips), "--output"]
        assert main([*run, str(file)]) == 0
        real, asked = ClipPredictions._forward, []

        def stops(self, clip, name):
            asked.append(name)
            if len(asked) == 2:
                raise KeyboardInterrupt
            return real(self, clip, name)

        monkeypatch.setattr(ClipPredictions, "_forward", stops)
        with pytest.raises(KeyboardInterrupt):
            main([*run, f"{folder}/"])
        assert not (folder / "answers.csv").exists()
        capsys.readouterr()
        assert main([*run, str(folder)]) == 0
        assert "1 of 2 are there already" in capsys.readouterr().err
        assert len(asked) == 3
        assert (folder / "answers.csv").read_text() == file.read_text()
        # with other frames it would be another answer
        assert main([*run, str(folder), "--frames", "3"]) == 2
        assert "with other settings" in capsys.readouterr().err

    def test_subtitles(self, models, video, clips, tmp_path, capsys):
        model, out = str(models / "frame.safetensors"), tmp_path / "out.srt"
        assert main(["predict", model, str(video), "--output", str(out)]) == 0
        blocks = out.read_text().strip().split("\n\n")
        assert [block.split("\n")[0] for block in blocks] == [
            str(number) for number in range(1, len(blocks) + 1)
        ]
        times = [block.split("\n")[1].split(" --> ") for block in blocks]
        assert times[0][0] == "00:00:00,000"
        assert times[-1][1] == "00:00:02,000"  # 50 frames of 25 a second
        for (_, end), (begin, _) in zip(times[:-1], times[1:], strict=True):
            assert end == begin
        other = tmp_path / "other"
        shutil.copytree(clips / "short", other)
        for command in (
            [str(models / "clip.safetensors"), str(video)],
            [model, str(video), str(other)],
            [model, str(other)],
        ):
            assert main(["predict", *command, "--format", "srt"]) == 2
            assert "srt" in capsys.readouterr().err

    @pytest.mark.parametrize("flag", [["--overlay"], ["--tile", "128"], ["--picture", "a.png"]])
    def test_flags_without_effect(self, models, clips, capsys, flag):
        command = ["predict", str(models / "clip.safetensors"), str(clips)]
        assert main([*command, *flag]) == 2
        assert f"{flag[0]} has no effect" in capsys.readouterr().err
