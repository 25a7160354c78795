"""Tars that are not whole: tarfile reads what is there and says nothing."""

import gzip
import io
import tarfile

import pytest

from timm_branches.data.images import open_tar


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
@pytest.mark.parametrize("cut", ["at a header", "in a header", "damaged header", "joined"])
def test_a_tar_without_its_end(tmp_path, ending, cut):
    """tarfile takes all of these for a shorter tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i in range(3):
            member = tarfile.TarInfo(f"{'cat' if i % 2 else 'dog'}/{i}.png")
            member.size = 512
            archive.addfile(member, io.BytesIO(bytes(512)))
    whole = buffer.getvalue()
    data = {
        "at a header": whole[:2048],
        "in a header": whole[:2300],
        "damaged header": whole[:2048] + b"x" * 512 + whole[2560:],
        "joined": whole + whole,
    }[cut]
    path = tmp_path / f"photos.{ending}"
    path.write_bytes(gzip.compress(data) if ending == "tar.gz" else data)
    with pytest.raises(ValueError, match="as a tar"):
        open_tar(str(path))
    path.write_bytes(gzip.compress(whole) if ending == "tar.gz" else whole)
    assert len(open_tar(str(path))[0]) == 3
