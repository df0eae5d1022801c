"""The doctor's rows, its measurements, and what it leaves behind: nothing."""

import platform
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib import metadata

import numpy as np
import pytest

from plymix import doctor as room
from plymix import kernels
from plymix.doctor import Row, deviation, disk_speed, doctor, paths_agree
from plymix.errors import Refusal


@pytest.fixture(autouse=True)
def no_torch_process(monkeypatch):
    """Starting torch takes seconds."""
    done = subprocess.CompletedProcess([], 0, "warm-up\nno CUDA device\n", "")
    monkeypatch.setattr(room.subprocess, "run", lambda *a, **k: done)


def by_topic(rows):
    found = {row.topic: row for row in rows}
    assert len(found) == len(rows)
    return found


def test_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(room, "disk_speed", lambda folder: (1.0, 2.0))
    rows = by_topic(doctor(tmp_path))
    assert platform.python_version() in rows["python"].text
    assert rows["numpy"].text == np.__version__
    assert rows["numkong"].text == metadata.version("numkong")
    assert str(tmp_path / "cache") in rows["cache"].text
    assert "1.00 GB/s" in rows["disk"].text
    assert "2.00 GB/s" in rows["disk"].text
    assert not [r for r in rows.values() if r.status == "error"]
    assert all(r.to_dict().keys() == {"topic", "text", "status"} for r in rows.values())


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(Refusal, match="not a folder"):
        doctor(tmp_path / "none")


# --- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_deviation_of_the_kernels(dtype):
    share, ulp = deviation(dtype, 50_000)
    assert share <= 0.001
    assert ulp <= 1


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_deviation_sees_a_kernel_that_is_off(dtype, monkeypatch):
    """A kernel that gives the next number up in every fourth element, by two in one."""

    class Off(kernels.Sum):
        def __call__(self, n, inputs, out):
            super().__call__(n, inputs, out)
            bits = out.view(f"u{out.itemsize}")
            bits[::4] += 1
            bits[0] += 1

    monkeypatch.setattr(kernels, "Sum", Off)
    share, ulp = deviation(dtype, 4096)
    assert share == pytest.approx(0.25, abs=0.001)
    assert ulp == 2


def test_bfloat16_reference_rounds_as_ml_dtypes_does():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(0).standard_normal(10_000)
    x[:3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0  # ties go to even
    want = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(room._stored(x, "BF16"), want)
    assert np.array_equal(room._values(want, "BF16"), want.view(ml_dtypes.bfloat16).astype(float))


def test_ordinals_count_numbers():
    """Neighbours differ by one, across zero too."""
    x = np.float16([-1, np.nextafter(np.float16(-1), np.float16(0)), -0.0, 0.0, 6e-8, 65504])
    found = room._ordinals(x, "F16").tolist()
    assert found[1] - found[0] == 1
    assert found[2:5] == [0, 0, 1]
    assert found[5] == 0x7BFF


def test_a_kernel_that_deviates_is_an_error(monkeypatch):
    monkeypatch.setattr(kernels, "disagreements", lambda backend: ["blend F16"])
    monkeypatch.setattr(room, "deviation", lambda dtype: (0.37, 1))
    rows = by_topic(list(room._kernels()))
    assert rows["kernel check"].status == "error"
    assert "blend F16" in rows["kernel check"].text
    assert rows["exactness f16"] == Row(
        "exactness f16",
        "37.0000% of elements differ from float64 rounded once, by at most 1 ulp",
        "error",
    )


def test_numpy_kernels_are_a_note(monkeypatch):
    monkeypatch.setattr(kernels, "best_backend", kernels.Backend)
    monkeypatch.setenv("PLYMIX_KERNEL", "numpy")
    row = by_topic(list(room._kernels()))["kernel"]
    assert (row.status, row.text) == ("note", "numpy (PLYMIX_KERNEL=numpy)")


# --- input and output ---------------------------------------------------------------------------


def test_paths_agree_here():
    assert paths_agree()


def test_paths_agree_without_kernel_copies(monkeypatch):
    monkeypatch.setattr(room.engine.FileTarget, "copy_from", lambda *a: 0)
    assert paths_agree()


def test_a_kernel_copy_that_goes_wrong_is_seen(monkeypatch):
    def wrong(self, handle, offset, at, nbytes):
        self.write_at(at, bytes(nbytes))
        return nbytes

    monkeypatch.setattr(room.engine.FileTarget, "copy_from", wrong)
    assert not paths_agree()
    assert by_topic(list(room._calls()))["file copies"].status == "error"


def test_the_disk_test_leaves_nothing(tmp_path, monkeypatch):
    write, read = disk_speed(tmp_path, 3 << 20)
    assert write > 0
    assert read > 0
    assert list(tmp_path.iterdir()) == []

    def broken(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room.os, "fsync", broken)
    monkeypatch.setattr(room, "disk_speed", lambda folder: disk_speed(folder, 1 << 20))
    row = room._disk(tmp_path)
    assert row.status == "note"
    assert "No space left" in row.text
    assert list(tmp_path.iterdir()) == []


def test_the_disk_test_is_left_out_when_there_is_little_room(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, (1 << 30) - 1))
    monkeypatch.setattr(room, "disk_speed", lambda folder: pytest.fail("measured"))
    row = room._disk(tmp_path)
    assert row.status == "note"
    assert "not measured" in row.text


def test_the_disk_test_ends(tmp_path):
    """On a slow disk it stops at the time limit and still measures."""
    write, _ = disk_speed(tmp_path, 1 << 40, limit=0.05)
    assert write > 0


# --- torch --------------------------------------------------------------------------------------


def torch_row(monkeypatch, version, run):
    known = room._version
    monkeypatch.setattr(room, "_version", lambda p: version if p == "torch" else known(p))
    monkeypatch.setattr(room.subprocess, "run", run)
    (row,) = room._gpu()
    return row


def test_without_torch(monkeypatch):
    row = torch_row(monkeypatch, "", lambda *a, **k: pytest.fail("asked"))
    assert (row.status, "plymix[torch]" in row.text) == ("ok", True)


def test_torch_with_and_without_cuda(monkeypatch):
    def says(code, out, err=""):
        return lambda *a, **k: subprocess.CompletedProcess(a, code, out, err)

    row = torch_row(monkeypatch, "2.9", says(0, "CUDA: Some GPU\n"))
    assert row == Row("torch", "2.9; CUDA: Some GPU")
    row = torch_row(monkeypatch, "2.9", says(0, "no CUDA device\n"))
    assert row == Row("torch", "2.9; no CUDA device")
    row = torch_row(monkeypatch, "2.9", says(1, "", "Traceback\nOSError: libcudart missing\n"))
    assert row.status == "note"
    assert "libcudart missing" in row.text


def test_torch_that_hangs(monkeypatch):
    def hangs(*a, **k):
        raise subprocess.TimeoutExpired("python", k["timeout"])

    assert torch_row(monkeypatch, "2.9", hangs).status == "note"


def test_torch_is_not_imported_here():
    code = (
        "import sys; import plymix.doctor as d; d.subprocess.run = lambda *a, **k: "
        "d.subprocess.CompletedProcess(a, 0, 'no CUDA device', ''); list(d.rows());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.Popen([sys.executable, "-c", code]).wait() == 0
