"""Temporaries of runs that ended without a word are removed; nobody else's ever is."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from plymix import engine, temporary

fcntl = pytest.importorskip("fcntl")

WRITER = """
import sys, time
from pathlib import Path
from plymix import engine
with engine.AtomicFile(Path(sys.argv[1]), 1000) as target:
    target.write_at(0, b"x" * 1000)
    print(flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is in the middle of writing old.ckpt."""
    command = [sys.executable, "-c", WRITER, tmp_path / "old.ckpt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def write(path):
    with (file := engine.AtomicFile(path, 3)) as target:
        target.write_at(0, b"abc")
        file.commit()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def left(folder, kernel, *, age=0.0):
    """A temporary that nobody has open, made on `kernel` (None: this one)."""
    path = folder / f".x.ckpt.{kernel or temporary._kernel()}-1{temporary.ENDING}"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_killed_run_is_swept_by_a_run_with_another_name(tmp_path, writer):
    assert len(names(tmp_path)) == 1
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    write(tmp_path / "new.ckpt")
    assert names(tmp_path) == ["new.ckpt"]


def test_a_living_one_is_left(tmp_path, writer):
    [held] = tmp_path.iterdir()
    os.utime(held, (0, 0))  # however long ago it wrote
    write(tmp_path / "new.ckpt")
    assert names(tmp_path) == [held.name, "new.ckpt"]


def test_so_is_another_of_this_process(tmp_path):
    with engine.AtomicFile(tmp_path / "a", 3) as target:
        write(tmp_path / "b")
        target.write_at(0, b"abc")
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == ["b"]


def test_another_hosts_may_be_at_work_without_a_lock_that_is_seen_here(tmp_path):
    fresh = left(tmp_path, "another0")
    abandoned = left(tmp_path, "another1", age=temporary.ABANDONED + 60)
    locked = left(tmp_path, "another2", age=temporary.ABANDONED + 60)
    with locked.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        temporary.sweep(tmp_path)
    assert names(tmp_path) == sorted([fresh.name, locked.name])
    assert not abandoned.exists()


@pytest.mark.parametrize("system", ["no locks on this file system", "no locks at all"])
def test_without_locks_a_day_must_have_passed(tmp_path, monkeypatch, system):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if system == "no locks at all":
        monkeypatch.setattr(temporary, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", refused)
    fresh = left(tmp_path, None)
    left(tmp_path, "another0", age=temporary.ABANDONED + 60)
    write(tmp_path / "new.ckpt")
    assert names(tmp_path) == [fresh.name, "new.ckpt"]


def test_a_number_used_again_is_not_in_the_way(tmp_path):
    """In a container every run may be process 1."""
    fd, path = temporary.create(tmp_path / "a")
    os.close(fd)
    write(tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert not path.exists()


def test_what_is_swept_before_its_lock_is_made_again(tmp_path, monkeypatch):
    real, calls = temporary._lock, []

    def lock(fd, wait=False):
        calls.append(fd)
        if len(calls) == 1:
            temporary._sweep(next(tmp_path.iterdir()))
        return real(fd, wait)

    monkeypatch.setattr(temporary, "_lock", lock)
    fd, path = temporary.create(tmp_path / "a")
    os.close(fd)
    assert path.exists()
    assert len(calls) == 3  # its own, the sweeper's, its own again


@pytest.mark.parametrize("before", [None, b"old"])
def test_it_is_locked_until_it_has_its_name(tmp_path, monkeypatch, before):
    path = tmp_path / "a"
    if before:
        path.write_bytes(before)

    def after_a_sweep(real):
        def name(*paths):
            temporary.sweep(tmp_path)
            real(*paths)

        return name

    monkeypatch.setattr(os, "link", after_a_sweep(os.link))
    monkeypatch.setattr(os, "replace", after_a_sweep(os.replace))
    write(path)
    assert path.read_bytes() == b"abc"
    assert names(tmp_path) == ["a"]


def test_what_only_looks_like_one_is_left(tmp_path):
    (tmp_path / f".folder{temporary.ENDING}").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / f".link{temporary.ENDING}").symlink_to("model.safetensors")
    before = names(tmp_path)
    temporary.sweep(tmp_path)
    assert names(tmp_path) == before
