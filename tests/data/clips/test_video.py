"""Videos written with PyAV, whose frames tell by their grey value which one they are."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from timm_branches.data import ClipDataset, FrameSampler, create_clip_dataset
from timm_branches.data.clips import sources as clip_sources
from timm_branches.data.clips.sources import FileClips
from timm_branches.data.clips.video import ClipError, count_frames, read_frames

av = pytest.importorskip("av")

LOSSY = [
    ("mp4", "libx264"),
    ("mov", "mpeg4"),
    ("avi", "mpeg4"),
    ("webm", "libvpx-vp9"),
    ("gif", "gif"),
]
# what cameras, discs and broadcasters write
CAMERAS = [
    ("m4v", "mpeg4"),
    ("mpg", "mpeg2video"),
    ("mpeg", "mpeg2video"),
    ("wmv", "wmv2"),
    ("ts", "mpeg2video"),
    ("mts", "mpeg2video"),
    ("m2ts", "mpeg2video"),
    ("flv", "flv"),
    ("3gp", "mpeg4"),
]
FORMATS = [("mkv", "ffv1"), ("avi", "ffv1"), *LOSSY, *CAMERAS]


def grey(number):
    return 6 * number + 5


def write(path, codec, count=40, size=(32, 48), images=None, options=None):
    """A video of `count` frames, height x width, each of one grey value."""
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV was built without {codec}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = size
        stream.bit_rate = 10_000_000
        stream.pix_fmt = {"ffv1": "bgr0", "gif": "gray"}.get(codec, "yuv420p")
        for number in range(count):
            image = (
                np.full((*size, 3), grey(number), np.uint8) if images is None else images[number]
            )
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames):
    """Which frames these are, by their grey value; at most 2.5 off, as lossy codecs are."""
    values = torch.as_tensor(np.stack(list(frames))).float().flatten(1)
    number = (values.mean(1) - 5) / 6
    assert (number - number.round()).abs().max() < 0.42
    return number.round().int().tolist()


@pytest.mark.parametrize(("extension", "codec"), FORMATS)
def test_frame_k_is_the_kth(tmp_path, extension, codec):
    path = write(tmp_path / f"video.{extension}", codec)
    assert count_frames(str(path)) == 40
    for wanted in ([0], [39], [0, 1, 2], [3, 17, 18, 31, 39], list(range(40))):
        frames = read_frames(str(path), wanted)
        assert numbers(frames) == wanted
        assert {frame.shape for frame in frames} == {(32, 48, 3)}
        assert {frame.dtype for frame in frames} == {np.dtype(np.uint8)}


def test_lossless_frames_come_back_exactly(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), np.uint8)
    path = write(tmp_path / "video.mkv", "ffv1", 6, images=images)
    assert np.array_equal(np.stack(read_frames(str(path), [1, 4])), images[[1, 4]])
    weights = np.array([0.299, 0.587, 0.114])
    one = read_frames(str(path), [5], in_chans=1)[0]
    assert one.shape == (32, 48, 1)
    assert np.abs(one[:, :, 0] - images[5] @ weights).max() <= 1


@pytest.mark.parametrize("bframes", [0, 3])
def test_presentation_order_not_coding_order(tmp_path, bframes):
    path = tmp_path / "video.mp4"
    if "libx264" not in av.codecs_available:
        pytest.skip("PyAV was built without libx264")
    with av.open(str(path), "w") as container:
        options = {"bf": str(bframes), "b_strategy": "0", "sc_threshold": "0", "g": "12"}
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for number in range(40):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.full((32, 48, 3), grey(number), np.uint8))
                )
            )
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        coded = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert (coded != sorted(coded)) == bool(bframes)
    assert numbers(read_frames(str(path), range(0, 40, 3))) == list(range(0, 40, 3))


def test_variable_frame_rate(tmp_path):
    path = tmp_path / "video.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "bgr0"
        stream.codec_context.time_base = Fraction(1, 1000)
        times = np.cumsum(np.random.default_rng(0).integers(1, 400, 30))
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), grey(number), np.uint8))
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        written = [frame.time for frame in container.decode(video=0)]
    assert len(set(np.diff(written).round(3))) > 5
    assert count_frames(str(path)) == 30
    assert numbers(read_frames(str(path), [0, 11, 29])) == [0, 11, 29]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_rotation_of_an_upright_phone_video(tmp_path, quarter, mirrored):
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24] = 255
    path = write(tmp_path / "video.mp4", "mpeg4", 3, images=[image] * 3)
    data = bytearray(path.read_bytes())
    # the track header's matrix [a b u; c d v; x y w] maps a pixel's (x, y) to (ax + cy, bx + dy), y
    # pointing down
    turn = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][quarter]
    if mirrored:  # left and right are exchanged before it is turned, as by a front camera
        turn = (-turn[0], -turn[1], turn[2], turn[3])
    matrix = [turn[0], turn[1], 0, turn[2], turn[3], 0, 0, 0, 0x4000]
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = b"".join(
        (value * 0x10000).to_bytes(4, "big", signed=True) for value in matrix
    )
    path.write_bytes(data)
    frame = read_frames(str(path), [1])[0]
    expected = image[:, ::-1] if mirrored else image
    for _ in range(quarter):  # clockwise
        expected = np.stack([expected[::-1, column] for column in range(expected.shape[1])])
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 10


@pytest.mark.parametrize(("extension", "codec"), FORMATS)
def test_dataset_of_videos(tmp_path, extension, codec):
    write(tmp_path / f"run/10.{extension}", codec, 20)
    write(tmp_path / f"run/9.{extension}", codec, 3)
    write(
        tmp_path / f"jump/1.{extension.upper()}" if extension != "gif" else tmp_path / "jump/1.gif",
        codec,
        12,
    )
    data = create_clip_dataset(tmp_path, num_frames=4)
    assert data.taxonomy.leaf_names == ("jump", "run")
    assert data.labels.tolist() == [[0], [1], [1]]
    assert [numbers(clip.mul(255)) for clip, _ in data] == [
        [1, 4, 7, 10],
        [0, 1, 2],
        [2, 7, 12, 17],
    ]
    assert data[0][0].shape == (4, 3, 32, 48)
    assert create_clip_dataset(tmp_path, num_frames=4, in_chans=1)[0][0].shape == (4, 1, 32, 48)
    assert len(create_clip_dataset(tmp_path)[2][0]) == 20


def test_csv_cuts_clips_out_of_a_video(tmp_path):
    write(tmp_path / "videos/long.mkv", "ffv1")
    path = tmp_path / "clips.csv"
    path.write_text(
        "path,start,end,label\nvideos/long.mkv,10,20,a\nvideos/long.mkv,30,,b\nvideos/long.mkv,,5,a\n"
        "videos/long.mkv,38,44,b\nvideos/long.mkv,50,,b\n"
    )
    data = create_clip_dataset(path, strict=True)
    ranges = [list(range(10, 20)), list(range(30, 40)), list(range(5))]
    assert [numbers(data[i][0].mul(255)) for i in range(3)] == ranges
    with pytest.raises(
        ClipError, match=r"frame 40 of .*long\.mkv: it has only 40 frames, where 44 are expected"
    ):
        data[3]
    with pytest.raises(ClipError, match=r"frame 50 of .*long\.mkv: it has only 40 frames"):
        data[4]


def patch_count(path, count):
    """Another number of frames in an AVI's stream header (dwLength)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"strh") + 8 + 32
    data[at : at + 4] = count.to_bytes(4, "little")
    path.write_bytes(data)


def test_a_header_that_counts_a_frame_too_many(tmp_path):
    path = write(tmp_path / "video.avi", "ffv1")
    patch_count(path, 41)
    assert count_frames(str(path)) == 41
    clips = FileClips([str(path)])
    assert numbers(clips.read(0, range)) == list(range(40))
    asked = []
    clips.read(0, lambda count: asked.append(count) or [0])
    assert asked == [40]  # it is remembered
    patch_count(path, 60)
    with pytest.raises(
        ClipError, match=r"cannot read frame 40 of .*video\.avi.* where 60 are expected"
    ):
        FileClips([str(path)]).read(0, range)


def test_decodes_a_video_without_a_count_only_once(tmp_path, monkeypatch):
    path = write(tmp_path / "video.mkv", "ffv1", 12)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    clips = FileClips([str(path)])
    assert len(clips.read(0, range)) == 12
    monkeypatch.setattr(clip_sources, "count_frames", lambda path: pytest.fail("counted again"))
    assert len(clips.read(0, range)) == 12


@pytest.mark.parametrize(
    ("extension", "codec"),
    [("mp4", "libx264"), ("mov", "mpeg4"), ("avi", "mpeg4"), ("avi", "ffv1")],
)
@pytest.mark.parametrize("faststart", [False, True])
def test_truncated_video(tmp_path, extension, codec, faststart):
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), np.uint8)
    options = {"movflags": "faststart"} if faststart and extension != "avi" else {}
    path = write(tmp_path / f"video.{extension}", codec, images=noise, options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(ClipError, match=rf"video\.{extension}"):
        FileClips([str(path)]).read(0, range)


def test_truncated_video_without_a_count_is_warned_about(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), np.uint8)
    path = write(tmp_path / "video.mkv", "ffv1", images=noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    clips = FileClips([str(path)])
    with pytest.warns(
        UserWarning, match=r"frames of .*video\.mkv stands at .* 4\.00 s; is the file complete"
    ):
        assert 10 < len(clips.read(0, range)) < 40


def test_damage_in_the_middle_names_the_frame(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), np.uint8)
    path = write(tmp_path / "video.mp4", "libx264", images=noise)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) * 3 // 4] = bytes(len(data) * 3 // 4 - len(data) // 2)
    path.write_bytes(data)
    with pytest.raises(ClipError, match=r"cannot decode frame \d+ of .*video\.mp4"):
        FileClips([str(path)]).read(0, range)
    # what comes before is good
    assert len(FileClips([str(path)]).read(0, lambda count: [0, 3])) == 2


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\0" * 5000])
def test_no_video_at_all(tmp_path, content):
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    with pytest.raises(ClipError, match=r"cannot open the video .*video\.mp4"):
        FileClips([str(path)]).read(0, range)


def test_sound_only(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ClipError, match=r"sound\.mp4 has no pictures, only audio"):
        FileClips([str(path)]).read(0, range)


def test_videos_from_several_workers(tmp_path, monkeypatch):
    for number in range(6):
        write(tmp_path / f"a/{number}.mkv", "ffv1", 10 + number)
    data = create_clip_dataset(tmp_path, num_frames=3)
    expected = [numbers(data[i][0].mul(255)) for i in range(6)]
    fresh = create_clip_dataset(tmp_path, num_frames=3)
    loaded = [clip for clip, _ in DataLoader(fresh, None, num_workers=2)]
    assert [numbers(clip.mul(255)) for clip in loaded] == expected
    # counted in the workers, known here
    monkeypatch.setattr(clip_sources, "count_frames", lambda path: pytest.fail("counted again"))
    assert [numbers(fresh[i][0].mul(255)) for i in range(6)] == expected


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_decoding_leaves_no_threads_behind(tmp_path):
    """A worker forked later would wait for ever for threads that are in its parent alone."""
    path = tmp_path / "1.mkv"
    write(path, "ffv1", 4)
    code = (
        "import os, sys, av\nfrom timm_branches.data.clips import video\n"
        "tasks = lambda: len(os.listdir('/proc/self/task'))\nframes = []\n"
        "kept = video._decode\n"
        "def decode(*args):\n    for frame in kept(*args):\n"
        "        frames.append(frame)\n        yield frame\n"
        "video._decode = decode\nbefore = tasks()\n"
        f"video.read_frames({str(path)!r}, [0, 1, 2])\n"
        "print(len(frames), tasks() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["3", "0"]


def test_without_pyav(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.mp4").write_bytes(b"")
    code = (
        "import sys\nsys.modules['av'] = None\nfrom timm_branches.data import create_clip_dataset\n"
        f"try:\n    create_clip_dataset({str(tmp_path)!r})[0]\n"
        "except ImportError as error:\n    print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install 'timm_branches[video]'" in result.stdout


def test_training_draws_other_frames_each_epoch(tmp_path):
    path = write(tmp_path / "video.mkv", "ffv1")
    data = ClipDataset(FileClips([str(path)]), [0], sampler=FrameSampler(4, is_training=True))
    seen = set()
    for epoch in range(8):
        data.set_epoch(epoch)
        seen.add(tuple(numbers(data[0][0].mul(255))))
    assert len(seen) > 4
