"""Frames that the decoder skips to are those that decoding everything gives."""

import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest

from timm_branches import create_branch_model, save_model
from timm_branches.cli import main
from timm_branches.data import (
    ClipDataset,
    FrameSampler,
    create_clip_dataset,
    create_clip_loader,
)
from timm_branches.data.clips import video
from timm_branches.data.clips.video import ClipEndsEarly, read_frames
from timm_branches.inference import predict_clips
from timm_branches.train.facts import facts_of_inputs

av = pytest.importorskip("av")

COUNT = 300
KINDS = {
    "h264 with B-frames": ("mp4", "libx264", {"bf": "3", "b_strategy": "0", "g": "30"}),
    "h264, open groups": ("mp4", "libx264", {"bf": "2", "g": "25", "x264-params": "open-gop=1"}),
    "h264, long groups": ("mkv", "libx264", {"g": "100", "bf": "0"}),
    "h264, all key frames": ("mov", "libx264", {"g": "1"}),
    "hevc": ("mp4", "libx265", {"g": "30", "x265-params": "log-level=none"}),
    "hevc, open groups": (
        "mkv",
        "libx265",
        {"x265-params": "keyint=25:bframes=4:open-gop=1:log-level=none"},
    ),
    "mpeg4": ("mp4", "mpeg4", {"g": "20", "bf": "2"}),
    "mjpeg": ("mov", "mjpeg", {}),
    "vp9": ("webm", "libvpx-vp9", {"g": "40", "deadline": "realtime", "cpu-used": "8"}),
    "vp9, hidden frames": (
        "webm",
        "libvpx-vp9",
        {"g": "60", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"},
    ),
    "av1": ("mkv", "libsvtav1", {"g": "40", "preset": "12"}),
}
# where nothing may be skipped, and nothing is wrong either
OTHERS = {
    "avi": ("avi", "mpeg4", {"g": "20", "bf": "2"}),
    "transport stream": ("ts", "mpeg2video", {"g": "15", "bf": "2"}),
    "vp8": ("webm", "libvpx", {"g": "40", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "gif": ("gif", "gif", {}),
}


def pictures(count=COUNT, size=(48, 64)):
    """Noise that drifts, with a patch of a grey value that tells the frame from its neighbours."""
    rng = np.random.default_rng(0)
    texture = rng.integers(60, 190, (size[0], size[1] + count, 3), np.uint8)
    for number in range(count):
        image = texture[:, number : number + size[1]].copy()
        image[:16, :16] = 20 + (number * 53) % 200
        yield image


def write(path, codec, options, times=None, count=COUNT):
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV was built without {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = 48, 64
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(pictures(count)):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[number]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def compare(path, monkeypatch, count=COUNT):
    """All choices of frames give the pictures of a full decoding; how many frames were decoded."""
    decoded = [0]
    decode = video._decode

    def counting(*args):
        for frame in decode(*args):
            decoded[0] += 1
            yield frame

    with monkeypatch.context() as patch:
        patch.setattr(video, "_WORTH_SEEKING", 10**9)
        everything = read_frames(path, range(count))
    monkeypatch.setattr(video, "_decode", counting)
    rng = np.random.default_rng(0)
    choices = [
        [count - 1],
        [0, count - 1],
        [3, 4, 5, count // 2, count // 2 + 1, count - 2],
        [*range(count - 20, count)],
        [*range(0, count, 37)],
    ]
    choices += [sorted(rng.choice(count, 5, replace=False).tolist()) for _ in range(6)]
    spent = []
    for indices in choices:
        decoded[0] = 0
        for index, frame in zip(indices, read_frames(path, indices), strict=True):
            assert np.array_equal(frame, everything[index]), index
        spent.append((decoded[0], indices[-1] + 1))
    return spent


@pytest.mark.parametrize("kind", KINDS)
def test_same_frames(kind, tmp_path, monkeypatch):
    extension, codec, options = KINDS[kind]
    path = write(tmp_path / f"video.{extension}", codec, options)
    spent = compare(path, monkeypatch)
    fewer, all_of_them = (sum(numbers) for numbers in zip(*spent, strict=True))
    assert fewer < 0.75 * all_of_them, kind


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_decoded_from_the_start(kind, tmp_path, monkeypatch):
    extension, codec, options = OTHERS[kind]
    path = write(tmp_path / f"video.{extension}", codec, options)
    assert all(decoded == last for decoded, last in compare(path, monkeypatch))


def test_frames_at_odd_times(tmp_path, monkeypatch):
    times = np.cumsum(np.random.default_rng(0).integers(1, 300, COUNT))
    path = write(tmp_path / "video.mkv", "libx264", {"g": "20", "bf": "2"}, times)
    spent = compare(path, monkeypatch)
    assert any(decoded < last for decoded, last in spent)


def test_cut_without_decoding(tmp_path, monkeypatch):
    """A file that begins between two key frames: what was cut away is no frame of it."""
    if shutil.which("ffmpeg") is None:
        path = write(tmp_path / "whole.mp4", "libx264", {"g": "50", "bf": "2"})
        cut = str(tmp_path / "cut.mp4")
        # packets from the second group on, with their own times
        with av.open(path) as source, av.open(cut, "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None and packet.pts >= 50 * 512:
                    packet.stream = stream
                    target.mux(packet)
    else:
        path = write(tmp_path / "whole.mp4", "libx264", {"g": "50", "bf": "2"})
        cut = str(tmp_path / "cut.mp4")
        command = ["ffmpeg", "-loglevel", "error", "-ss", "1.5", "-i", path, "-c", "copy", cut]
        subprocess.run(command, check=True)
    with av.open(cut) as container:
        count = sum(1 for _ in container.decode(video=0))
    assert 0 < count < COUNT
    compare(cut, monkeypatch, count)


def test_packets_that_are_no_pictures(tmp_path, monkeypatch):
    """If the packets lie about the order, what they said is not believed."""
    path = write(tmp_path / "video.mp4", "libx264", {"g": "20", "bf": "2"})
    read = video._read_order

    def shifted(given):
        order = read(given)
        times = list(order.times)
        del times[150]  # as if a packet were missing
        return video._Order(times, [times[key] for key in order.keys if key < 150])

    monkeypatch.setattr(video, "_read_order", shifted)
    spent = compare(path, monkeypatch)
    assert spent


def test_too_few_frames(tmp_path):
    path = write(tmp_path / "video.mp4", "libx264", {"g": "20"}, count=100)
    with pytest.raises(ClipEndsEarly, match="only 100 frames"):
        read_frames(path, [5, 120])


def test_clip_at_the_end_of_a_long_video(tmp_path, monkeypatch):
    """A CSV that cuts clips out of it does not decode what is before them."""
    path = write(tmp_path / "video.mp4", "libx264", {"g": "25", "bf": "2"})
    (tmp_path / "clips.csv").write_text(
        "path,label,start,end\nvideo.mp4,a,280,290\nvideo.mp4,b,0,10\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(video, "_WORTH_SEEKING", 10**9)
        expected = read_frames(path, range(280, 290))
    decoded = [0]
    decode = video._decode

    def counting(*args):
        for frame in decode(*args):
            decoded[0] += 1
            yield frame

    monkeypatch.setattr(video, "_decode", counting)
    data = create_clip_dataset(str(tmp_path / "clips.csv"), transform=lambda frame: frame)
    clip = data.images.read(0, range)
    assert decoded[0] < 60
    assert np.array_equal(clip, np.stack(expected))


# ---- when frames are shown


def test_times_are_those_of_the_frames(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(1, 300, 60))
    for name, codec, options in (
        ("a.mkv", "libx264", {"g": "20", "bf": "2"}),
        ("b.mkv", "ffv1", {}),  # no codec whose packets are trusted: decoded
    ):
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, options=options)
            stream.height, stream.width = 48, 64
            stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            for number, image in enumerate(pictures(60)):
                frame = av.VideoFrame.from_ndarray(image, "rgb24")
                frame.pts, frame.time_base = int(times[number]), Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        with av.open(str(path)) as container:
            shown = [frame.time for frame in container.decode(video=0)]
        assert video.frame_times(str(path)) == pytest.approx(np.array(shown) - shown[0], abs=2e-3)


@pytest.mark.parametrize("rate", [0.7, 3, 5.5, 25, 1000])
def test_frames_at_a_rate(rate):
    """At each moment the frame that is shown, by brute force."""
    times = np.cumsum(np.random.default_rng(1).integers(20, 400, 50)) / 1000
    wanted = []
    moment = 0
    while moment / rate <= times[-1] - times[0] + 1e-9:
        shown = [k for k, t in enumerate(times - times[0]) if t <= moment / rate + 1e-9]
        wanted.append(shown[-1])
        moment += 1
    own = FrameSampler(rate=rate)(50, times=times).tolist()
    assert own == sorted(set(wanted))


def test_two_cameras_see_the_same(tmp_path):
    """The same second of the world, filmed at 10 and at 30 frames a second."""
    for name, fps in (("slow", 10), ("fast", 30)):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        with av.open(str(folder / "a.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=fps)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
            stream.bit_rate = 10_000_000
            for number in range(4 * fps):
                value = int(20 + 50 * number / fps)  # brighter by 50 a second
                image = np.full((32, 48, 3), value, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode())
    means = {}
    for name in ("slow", "fast"):
        options = {"num_frames": 4, "sampling": "dense", "rate": 2}
        data = create_clip_dataset(str(tmp_path / name), **options)
        means[name] = data[0][0].mean((1, 2, 3)).numpy() * 255
        by_frame = create_clip_dataset(str(tmp_path / name), num_frames=4, sampling="dense")
        assert np.ptp(by_frame[0][0].mean((1, 2, 3)).numpy() * 255) < 20
    assert means["slow"] == pytest.approx(means["fast"], abs=4)
    assert np.diff(means["fast"]) == pytest.approx([25, 25, 25], abs=4)


def test_what_has_no_times(tmp_path):
    data = ClipDataset(
        [np.zeros((5, 8, 8), np.uint8)], [0], sampler=FrameSampler(rate=2), in_chans=1
    )
    with pytest.raises(ValueError, match="clips in memory have no times"):
        data[0]
    with pytest.raises(ValueError, match="rate= takes"):
        FrameSampler(rate=0)
    with pytest.raises(ValueError, match="rate=2 needs the times"):
        FrameSampler(rate=2)(5)


def test_rate_travels_in_the_models_file(tmp_path, capsys):
    """`predict` and `evaluate` look at the moments that the training looked at."""
    folder = tmp_path / "videos" / "run"
    folder.mkdir(parents=True)
    write(folder / "a.mp4", "mpeg4", {"g": "20"}, count=50)
    (tmp_path / "videos" / "jump").mkdir()
    write(tmp_path / "videos" / "jump" / "b.mp4", "mpeg4", {"g": "20"}, count=50)
    data = create_clip_dataset(str(tmp_path / "videos"), rate=5, is_training=True)
    model = create_branch_model(
        "test_resnet", head="lstm", taxonomy=data.taxonomy, img_size=32
    ).eval()
    model.extra.update(facts_of_inputs(create_clip_loader(data, 1)))
    assert model.extra["frames"]["rate"] == 5
    save_model(model, tmp_path / "model.safetensors")
    records = list(predict_clips(tmp_path / "model.safetensors", str(tmp_path / "videos")))
    assert [record.frames for record in records] == [tuple(range(0, 50, 5))] * 2
    base = [str(tmp_path / "model.safetensors"), str(tmp_path / "videos")]
    assert main(["predict", *base, "--rate", "1", "--format", "json"]) == 0
    assert main(["evaluate", *base, "--split", "train"]) == 0
    assert main(["evaluate", *base, "--split", "train", "--rate", "2"]) == 0
    assert main(["predict", *base, "--rate", "-1"]) == 2
    assert "rate= takes" in capsys.readouterr().err
