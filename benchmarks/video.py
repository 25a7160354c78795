"""What does skipping to the frames wanted save, over decoding a video from its start?

    python benchmarks/video.py
    python benchmarks/video.py --frames 20000 --group 250

The video is drifting noise in H.264 with B-frames. Times are medians of interleaved repeats, given
as ratios; both ways give equal pictures, which is checked first.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from measure import print_header, time_all

from timm_branches.data.clips import video
from timm_branches.files import replace_file
from timm_branches.train.script import hardware


def write(path: Path, count: int, group: int, size: tuple[int, int] = (240, 320)) -> str:
    """A video of drifting noise."""
    rng = np.random.default_rng(0)
    texture = rng.integers(60, 190, (size[0] // 8, size[1] // 8 + count, 3), np.uint8)
    with av.open(str(path), "w") as container:
        options = {"g": str(group), "bf": "2", "preset": "ultrafast"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(count):
            small = texture[:, number : number + size[1] // 8]
            image = small.repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=3000, help="of the video")
    parser.add_argument("--group", type=int, default=50, help="frames from one key frame on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="the smallest of everything")
    parser.add_argument("--json", type=Path, help="keep the numbers in this file")
    args = parser.parse_args()
    if args.tiny:
        args.frames, args.group, args.repeats = 200, 20, 1
    device = torch.device("cpu")
    print_header(
        device,
        f"{args.frames} frames of 240 x 320, a key frame every {args.group}, median of "
        f"{args.repeats}",
    )
    last = args.frames - 1
    wanted = {
        "16 frames of equal segments": np.linspace(0, last, 16).astype(int).tolist(),
        "16 frames at the end": list(range(last - 15, last + 1)),
        "the last frame": [last],
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "video.mp4", args.frames, args.group)

        def skip(indices: list[int]) -> list[np.ndarray]:
            return video.read_frames(path, indices)

        def decode(indices: list[int]) -> list[np.ndarray]:
            worth, video._WORTH_SEEKING = video._WORTH_SEEKING, 10**9
            try:
                return video.read_frames(path, indices)
            finally:
                video._WORTH_SEEKING = worth

        for what, indices in wanted.items():
            for a, b in zip(skip(indices), decode(indices), strict=True):
                assert np.array_equal(a, b), what
            steps = {
                "skipping": lambda indices=indices: skip(indices),  # type: ignore[misc]
                "decoding": lambda indices=indices: decode(indices),  # type: ignore[misc]
            }
            seconds = time_all(steps, args.repeats, device)
            ratio = seconds["skipping"] / seconds["decoding"]
            rows.append({"what": what, "ratio": ratio, **seconds})
            print(f"{what:28} {1e3 * seconds['skipping']:8.1f} ms, ratio {ratio:.3f}")
    if args.json is not None:
        facts = {"hardware": hardware(device), "settings": {**vars(args), "json": None}}
        text = json.dumps({**facts, "rows": rows}, indent=2) + "\n"
        replace_file(args.json, lambda path: Path(path).write_text(text))


if __name__ == "__main__":
    main()
