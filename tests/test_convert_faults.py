"""A conversion that dies leaves nothing: full disks, unwritable places, and kill -9."""

import errno
import os
import resource
import subprocess
import sys

import mlx.core as mx
import pytest

import ksa_mlx
from ksa_mlx.cache.rollback import ROLLBACK

from ._convert_helpers import GOLDENS, convert, refused

HYBRID = GOLDENS / "hybrid_mix1"

# Runs a conversion, says "here" at the point named by its first argument, and waits.
CHILD = """
import sys, time
import ksa_mlx.convert, ksa_mlx.checkpoint.write as save

where, source, destination = sys.argv[1:]
flush, rename = save.ShardWriter.flush, save.os.rename

def wait():
    print("here", flush=True)
    time.sleep(60)

def slow_flush(self):
    flush(self)
    if where == "first shard":
        wait()

def slow_rename(a, b):
    if where == "before the end" and str(b) == destination:
        wait()
    rename(a, b)
    if where == "after the end" and str(b) == destination:
        wait()

save.ShardWriter.flush, save.os.rename = slow_flush, slow_rename
ksa_mlx.convert.convert(source, destination, max_shard_bytes=200_000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["first shard", "before the end", "after the end"])
def test_kill_9(where, tmp_path, capsys):
    destination = tmp_path / "mlx"
    command = [sys.executable, "-c", CHILD, where, str(HYBRID), str(destination)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        try:
            assert child.stdout.readline() == b"here\n"
            if where != "after the end":
                assert not destination.exists()
                assert "another conversion is writing it" in refused(capsys, HYBRID, destination)
        finally:
            child.kill()
    if where == "after the end":
        assert [p.name for p in tmp_path.iterdir()] == ["mlx"]
    else:
        assert [p.name for p in tmp_path.iterdir()] == [".mlx.converting"]
        assert convert(HYBRID, destination) == 0
        assert [p.name for p in tmp_path.iterdir()] == ["mlx"]
    model, _ = ksa_mlx.load_model(destination)
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item()


def test_full_disk(tmp_path, capsys):
    """A limit on the size of files is a full disk, for who writes a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = refused(capsys, HYBRID, tmp_path / "mlx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}: not writable, perhaps full" in message and "GB free" in message


def test_full_disk_in_the_small_files(tmp_path, capsys, monkeypatch):
    def full(source, destination):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination))

    monkeypatch.setattr("shutil.copyfile", full)
    assert "No space left on device" in refused(capsys, HYBRID, tmp_path / "mlx")


def test_unwritable(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert convert(HYBRID, tmp_path / "file" / "mlx") == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Not a directory" in message

    def mkdir(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    # A folder's mode does not stop root, under whom containers run.
    monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
    assert "Permission denied" in refused(capsys, HYBRID, tmp_path / "mlx")


def test_parents_are_made_and_unmade(tmp_path, capsys):
    assert convert(tmp_path / "nope", tmp_path / "a" / "b" / "mlx") == 1
    assert not list(tmp_path.iterdir())
    assert convert(HYBRID, tmp_path / "a" / "b" / "mlx") == 0
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["mlx"]


def test_interrupted(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ksa_mlx.checkpoint.write.mx.save_safetensors", interrupt)
    assert convert(HYBRID, tmp_path / "mlx") == 130
    assert not list(tmp_path.iterdir())


def test_a_wrong_environment_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(ROLLBACK, "some")
    message = refused(capsys, HYBRID, tmp_path / "mlx", "-q")
    assert message == f"error: {ROLLBACK}: found 'some', expected an integer of at least 0"
