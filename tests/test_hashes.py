"""Hashes against hashlib over the whole file, and a cache that never lies."""

import hashlib
import json
import os
import threading

import pytest

from plymix import hashes
from plymix.errors import Cancelled
from small import draw, save


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("size", [0, 1, hashes.CHUNK - 1, hashes.CHUNK, 3 * hashes.CHUNK + 17])
def test_sha256(tmp_path, size):
    path = tmp_path / "f"
    content = os.urandom(size)
    path.write_bytes(content)
    want = hashlib.sha256(content).hexdigest()
    assert hashes.known_sha256(path) is None
    assert hashes.sha256(path) == want
    assert hashes.known_sha256(path) == want
    assert hashes.sha256(path) == want


def test_parts_of_a_file(tmp_path):
    content = os.urandom(0x120000)
    path = tmp_path / "f"
    path.write_bytes(content)
    assert hashes.data_sha256(path, 1000) == hashlib.sha256(content[1000:]).hexdigest()
    old = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert hashes.legacy_hash(path) == old


def test_autov3_is_that_of_the_data(tmp_path):
    """The header does not count: other metadata, same value."""
    tensors = {"x": draw("F16", (50,))}
    values = set()
    for i, metadata in enumerate(({"a": "b"}, {"title": "another"})):
        path = save(tmp_path / f"{i}.safetensors", tensors, metadata)
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        values.add(hashes.data_sha256(path, start))
    assert values == {hashlib.sha256(tensors["x"][1].tobytes()).hexdigest()}


def changed(path, how):
    stat = path.stat()
    if how == "place" and os.name == "nt":
        pytest.skip("Windows has no time of change")
    probe = path.with_name("probe")
    probe.write_bytes(b"")
    while probe.stat().st_ctime_ns <= stat.st_ctime_ns:
        probe.write_bytes(b"")  # the system's clock for files goes in steps of milliseconds
    if how == "time":
        path.write_bytes(b"other")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif how == "size":
        path.write_bytes(b"longer now")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif how == "place":  # of the same size, and its old time set again
        with path.open("r+b") as file:
            file.write(b"other")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    else:  # another file moved to the same name, with the same size and time
        fresh = path.with_name("fresh")
        fresh.write_bytes(b"other")
        os.utime(fresh, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(fresh, path)


@pytest.mark.parametrize("how", ["time", "size", "place", "file"])
def test_a_changed_file_is_hashed_again(tmp_path, how):
    path = tmp_path / "f"
    path.write_bytes(b"first")
    hashes.sha256(path)
    changed(path, how)
    assert hashes.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_entry_of_older_versions_is_passed_over(tmp_path, cache):
    """They had no time of change; the file is hashed again, and the entry is replaced."""
    path = tmp_path / "f"
    path.write_bytes(b"x")
    stat = path.stat()
    old = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    cache.mkdir()
    (cache / "sha256.json").write_text(json.dumps({old: "0" * 64}))
    assert hashes.known_sha256(path) is None
    want = hashlib.sha256(b"x").hexdigest()
    assert hashes.sha256(path) == want
    assert [*json.loads((cache / "sha256.json").read_text()).values()] == [want]


def test_the_second_time_the_file_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"x")
    want = hashes.sha256(path)
    monkeypatch.setattr(hashes, "_digest", lambda *_: pytest.fail("read again"))
    assert hashes.sha256(path) == want


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"a": 1}', "\x00"])
def test_a_damaged_cache_is_no_reason_to_fail(tmp_path, cache, content):
    cache.mkdir()
    (cache / "sha256.json").write_text(content)
    path = tmp_path / "f"
    path.write_bytes(b"x")
    assert hashes.sha256(path) == hashlib.sha256(b"x").hexdigest()


def test_a_cache_that_cannot_be_written(tmp_path, cache):
    cache.write_text("a file where the folder should be")
    path = tmp_path / "f"
    path.write_bytes(b"x")
    assert hashes.sha256(path) == hashlib.sha256(b"x").hexdigest()


def test_one_entry_per_file_and_no_stray_files(tmp_path, cache):
    path = tmp_path / "f"
    for i in range(5):
        path.write_bytes(b"x" * i)
        hashes.sha256(path)
    assert len(hashes._load()) == 1
    assert [p.name for p in cache.iterdir()] == ["sha256.json"]


def test_the_cache_keeps_the_last_ones(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(hashes, "KEPT", 3)
    paths = [tmp_path / str(i) for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(b"x" * i)
        hashes.sha256(path)
    known = [hashes.known_sha256(path) for path in paths]
    assert known == [None, None, *(hashlib.sha256(b"x" * i).hexdigest() for i in (2, 3, 4))]
    hashes._remember(hashes.identity(paths[2]), known[2])  # the last one now
    hashes.sha256(paths[0])
    known = [hashes.known_sha256(path) is not None for path in paths]
    assert known == [True, False, True, False, True]


def test_many_threads(tmp_path):
    paths = [tmp_path / f"{i}" for i in range(8)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 1000)
    threads = [threading.Thread(target=hashes.sha256, args=(p,)) for p in paths]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for path in paths:
        assert hashes.known_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_can_be_stopped(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(3 * hashes.CHUNK))
    with pytest.raises(Cancelled):
        hashes.sha256(path, lambda: True)
    assert hashes.known_sha256(path) is None
