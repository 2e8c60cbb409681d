"""Outputs that are no files, outputs that two runs share, and what killed runs left."""

import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmdoctor.errors import StorageError, UsageError
from llmdoctor.files import atomic_path, is_stream, locked, open_to_append, require_file, write_json


def write(path: Path, text: str = "new") -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@pytest.fixture
def fifo(tmp_path):
    """A FIFO, and what its reader has read once it is closed."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    reader.start()

    def closed() -> bytes:
        reader.join(10)
        return read[0]

    return path, closed


def test_a_fifo_gets_the_bytes_and_stays_a_fifo(fifo, tmp_path):
    path, closed = fifo
    write(path, "Ärztin")
    assert closed().decode() == "Ärztin"
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_and_a_link_to_one_stay_what_they_are(tmp_path):
    write(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link").symlink_to("/dev/null")
    write(tmp_path / "link")
    assert (tmp_path / "link").readlink() == Path("/dev/null")
    with pytest.raises(StorageError, match="No space left on device"):
        write(Path("/dev/full"))


@pytest.mark.parametrize("target", ["pipe", "file", "terminal"])
def test_standard_output_is_written_to_and_what_is_in_it_stays(target, tmp_path):
    """A file that stdout was sent to would be replaced by another, and the shell's own be lost."""
    code = (
        "import sys; from pathlib import Path; from llmdoctor.files import atomic_path\n"
        "print('before', flush=True)\n"
        "with atomic_path(Path('/dev/stdout')) as temporary: temporary.write_text('written ')\n"
        "print('after', flush=True)"
    )
    command = [sys.executable, "-c", code]
    if target == "pipe":
        out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    elif target == "file":
        with (tmp_path / "out").open("wb") as file:
            subprocess.run(command, stdout=file, check=True)
        out = (tmp_path / "out").read_bytes()
    else:
        ours, theirs = os.openpty()
        subprocess.run(command, stdout=theirs, check=True)
        out = os.read(ours, 1000).replace(b"\r", b"")
    assert out.split() == [b"before", b"written", b"after"]


def test_a_failure_writes_nothing_to_a_stream(tmp_path):
    out = tmp_path / "out"
    code = (
        "from pathlib import Path; from llmdoctor.files import atomic_path\n"
        "with atomic_path(Path('/dev/stdout')) as temporary: temporary.write_text('x'); 1/0"
    )
    with out.open("wb") as file:
        done = subprocess.run([sys.executable, "-c", code], stdout=file, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == 1
    assert out.read_bytes() == b""


def test_folders_sockets_and_disks_are_refused_and_stay(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="is a folder: give the name of a file"):
        require_file(tmp_path / "folder")
    with pytest.raises(StorageError, match="cannot write"):
        write(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for refused in (require_file, write, open_to_append):
            with pytest.raises(UsageError, match="is a socket"):
                refused(Path("socket"))
        assert Path("socket").is_socket()
    monkeypatch.setattr("llmdoctor.files._mode", lambda _path: 0o060000)
    with pytest.raises(UsageError, match="is a disk"):
        write(tmp_path / "sda")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "socket"]


def test_a_stream_is_no_folder(fifo):
    path, _ = fifo
    with pytest.raises(UsageError, match="is no folder"), atomic_path(path) as temporary:
        temporary.mkdir()
    path.write_bytes(b"")  # let the reader go


def test_lines_are_added_to_files_and_streams(fifo, tmp_path):
    path, closed = fifo
    assert is_stream(path)
    for where in (path, tmp_path / "deep" / "file"):
        with open_to_append(where) as file:
            file.write("é\n")
    assert closed() == (tmp_path / "deep" / "file").read_bytes() == "é\n".encode()


HOLDER = """
import sys, time
from pathlib import Path
from llmdoctor.files import atomic_path, locked

with locked(Path(sys.argv[1]), beside=True), atomic_path(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    (temporary / "half").touch()
    print("held", flush=True)
    time.sleep(100)
"""


def test_the_lock_of_a_folder_that_is_replaced_is_beside_it_and_clears_what_a_killed_run_left(tmp_path):
    folder = tmp_path / "outputs" / "doctor"
    link = tmp_path / "link"
    link.symlink_to(folder)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for name in (folder, link):
            with pytest.raises(UsageError, match="another run is writing to"), locked(name, beside=True):
                pass
        holder.kill()
    left = {path.name for path in folder.parent.iterdir()}
    assert len(left) == 2
    (folder.parent / ".doctor2.0a1b2c3d.partial").mkdir()  # of another output, which may be alive
    with locked(folder, beside=True):
        assert {path.name for path in folder.parent.iterdir()} == {".doctor.lock", ".doctor2.0a1b2c3d.partial"}
    assert [path.name for path in folder.parent.iterdir()] == [".doctor2.0a1b2c3d.partial"]


def test_a_run_killed_between_the_two_renames_gives_the_old_folder_back(tmp_path):
    folder = tmp_path / "doctor"
    (tmp_path / ".doctor.0a1b2c3d.retired").mkdir()
    (tmp_path / ".doctor.0a1b2c3d.retired" / "doctor.json").write_text("{}")
    (tmp_path / ".doctor.0a1b2c3d.partial").mkdir()
    with locked(folder, beside=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["doctor"]
    assert (folder / "doctor.json").read_text() == "{}"
    shutil.copytree(folder, tmp_path / ".doctor.00000000.retired")
    with locked(folder, beside=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["doctor"]


def test_a_file_that_outgrows_its_limit_is_one_line_and_the_old_one_stays(tmp_path):
    """A quota, as `ulimit -f` sets it: the real error of the system, in the middle of writing."""
    path = tmp_path / "a.json"
    write_json(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match="File too large"):
            write_json(path, "x" * 10000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == '"old"\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("target", ["loop", "nowhere/file"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, target):
    """It would be replaced by a file, or a folder would be made somewhere else."""
    (tmp_path / "loop").symlink_to(tmp_path / target)
    with pytest.raises(UsageError, match="is a link that leads nowhere"):
        require_file(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()
