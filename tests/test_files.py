"""Files are replaced whole: links are followed, modes kept, failures named, and no litter stays."""

import errno
import os
import signal
import stat
import subprocess
import sys

import pytest

from timm_branches.files import atomic_write, remove_abandoned, replace_file


def litter(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "last.bin"
    link.symlink_to("disk/real.bin")
    for content in (b"first", b"second"):  # a link to nothing, then to a file
        atomic_write(link, content)
        assert link.is_symlink()
        assert (tmp_path / "disk" / "real.bin").read_bytes() == content
    assert litter(tmp_path) == litter(tmp_path / "disk") == []


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_file_keeps_its_mode(tmp_path, mode):
    path = atomic_write(tmp_path / "a", b"1")
    path.chmod(mode)
    atomic_write(path, b"2")
    assert (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) == (mode, b"2")


def test_a_failed_write_names_the_path(tmp_path):
    path = atomic_write(tmp_path / "model.bin", b"old")

    def full(temporary):
        with open(temporary, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: '.*model.bin'") as error:
        replace_file(path, full)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert litter(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_device_is_written_not_replaced(tmp_path):
    link = tmp_path / "out"
    link.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*out'"):
        atomic_write(link, b"x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_folder_or_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        atomic_write(tmp_path / "folder", b"x")
    atomic_write(tmp_path / "file", b"x")
    with pytest.raises(OSError, match="below"):
        atomic_write(tmp_path / "file" / "below", b"x")
    assert litter(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
def test_a_limit_of_the_system_is_an_error(tmp_path):
    """A model beyond the allowed size of files: the reason, the path, and the old file whole."""
    code = """
import resource, signal, sys, torch
from timm_branches.tensor_files import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_tensors(sys.argv[1], {"a": torch.zeros(100_000)}, {"producer": "x", "version": "1"})
except OSError as error:
    print(error)
"""
    path = atomic_write(tmp_path / "model.safetensors", b"old")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    assert str(path) in done.stdout
    assert path.read_bytes() == b"old"
    assert litter(tmp_path) == []


WRITER = """
import sys, time
from timm_branches.files import replace_file

def write(temporary):
    with open(temporary, "wb") as file:
        file.write(b"half")
    print("writing", flush=True)
    time.sleep(60)

replace_file(sys.argv[1], write)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_what_a_killed_writer_left_is_removed(tmp_path):
    path = tmp_path / "last.bin"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout.readline() == b"writing\n"
            # while it writes, neither a look nor another write of the same file disturbs it
            assert remove_abandoned(tmp_path) == []
            atomic_write(path, b"other")
            assert len(litter(tmp_path)) == 1
        finally:
            process.kill()
    (tmp_path / ".hidden.tmp").write_text("of somebody else")
    (tmp_path / ".last.bin.12345678.tmp").write_text("of somebody else")
    assert len(litter(tmp_path)) == 3
    atomic_write(path, b"new")
    assert sorted(litter(tmp_path)) == [".hidden.tmp", ".last.bin.12345678.tmp"]
    assert path.read_bytes() == b"new"
