"""What plymix finds on this machine: `doctor(folder)` gives rows to show, in a few seconds.

Nothing is changed: the temporary file of the disk test is deleted whatever happens. torch is never
imported here; whether it sees a GPU is asked in a process of its own.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from plymix import engine, kernels
from plymix.cache import cache_folder
from plymix.errors import Refusal, amount
from plymix.formats.base import Handle
from plymix.plan import available_cpus

DISK_TEST = 256 << 20
"""Bytes written and read to measure a disk."""

FREE_AT_LEAST = 1 << 30
"""Free bytes without which the disk test is left out."""


class Row(msgspec.Struct, frozen=True):
    """One line: what was looked at, what was found, and whether that is well.

    `status` is "ok", "note" (slower, or optional and not there) or "error" (results cannot be
    trusted).
    """

    topic: str
    text: str
    status: Literal["ok", "note", "error"] = "ok"

    def to_dict(self) -> dict[str, Any]:
        return dict(msgspec.to_builtins(self))


def doctor(folder: Path | None = None) -> list[Row]:
    """Look at versions, processor, kernels, system calls, memory, GPU, and the disk of `folder`.

    Without a folder the disk is not measured. A row tells of everything that goes wrong; only a
    folder that does not exist raises Refusal.
    """
    if folder is not None and not folder.is_dir():
        raise Refusal(f"{folder} is not a folder; name the one where your models are")
    return [*rows(folder)]


def rows(folder: Path | None = None) -> Iterator[Row]:
    """The rows of `doctor`, each as soon as it is known."""
    yield from _versions()
    yield Row("system", f"{platform.system()} {platform.release()} ({platform.machine()})")
    yield Row("processor", f"{_processor()}; plymix uses {amount(available_cpus(), 'thread')}")
    yield from _kernels()
    yield from _calls()
    yield from _memory()
    yield from _gpu()
    yield _cache()
    if folder is not None:
        yield _disk(folder)


# --- software -----------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _versions() -> Iterator[Row]:
    yield Row("python", f"{platform.python_version()} ({platform.python_implementation()})")
    for package in ("plymix", "numpy"):
        yield Row(package, _version(package) or "not installed as a package")
    numkong = _version("numkong")
    slow = "not installed: plymix computes with numpy, several times slower; pip install numkong"
    yield Row("numkong", numkong, "ok") if numkong else Row("numkong", slow, "note")


def _processor() -> str:
    """The processor's name where the system tells it, and how many there are."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, name)}, {os.cpu_count()} processors"


def _gpu() -> Iterator[Row]:
    version = _version("torch")
    if not version:
        yield Row("torch", 'not installed (needed for --device cuda: pip install "plymix[torch]")')
        return
    question = (
        "import torch; a = torch.cuda.is_available();"
        "print('CUDA: ' + torch.cuda.get_device_name(0) if a else 'no CUDA device')"
    )
    try:
        asked = subprocess.run(
            [sys.executable, "-c", question], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        yield Row("torch", f"{version}; asking it for a GPU failed: {e}", "note")
        return
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Row("torch", f"{version} cannot be imported: {last}", "note")
    else:
        yield Row("torch", f"{version}; {asked.stdout.strip().splitlines()[-1]}")


def _cache() -> Row:
    folder = cache_folder()
    known = "with hashes of known files" if (folder / "sha256.json").exists() else "empty"
    return Row("cache", f"{folder} ({known})")


# --- arithmetic ---------------------------------------------------------------------------------


def _kernels() -> Iterator[Row]:
    backend = kernels.best_backend()
    wish = os.environ.get("PLYMIX_KERNEL")
    chosen = f" (PLYMIX_KERNEL={wish})" if wish else ""
    yield Row("kernel", f"{backend.name}{chosen}", "ok" if backend.name == "numkong" else "note")
    wrong = kernels.disagreements(backend)
    if wrong:
        yield Row("kernel check", f"deviates from numpy in {', '.join(wrong)}", "error")
    else:
        yield Row("kernel check", "the same bytes as numpy on this processor")
    for dtype in ("F16", "BF16", "F32"):
        share, ulp = deviation(dtype)
        text = f"{share:.4%} of elements differ from float64 rounded once, by at most {ulp} ulp"
        good = ulp <= 1 and (share <= 0.001 or dtype == "F32")
        yield Row(f"exactness {dtype.lower()}", text, "ok" if good else "error")


def deviation(dtype: str, n: int = 1 << 18) -> tuple[float, int]:
    """How a sum of two `dtype` tensors differs from numpy's float64 sum rounded once.

    Returns the share of elements that differ and the largest difference in units in the last
    place. `dtype` is "F16", "BF16" or "F32".
    """
    rng = np.random.default_rng(1)
    # Not simple fractions: with those, many exact results lie halfway between two numbers, where
    # float64's own rounding decides.
    terms = ((0.6180339887498949, dtype), (0.3819660112501051, dtype))
    a, b = (_stored(rng.standard_normal(n) * 0.05, dtype) for _ in terms)
    out = np.empty_like(a)
    kernels.Sum(terms, dtype)(n, [a, b], out)
    exact = terms[0][0] * _values(a, dtype) + terms[1][0] * _values(b, dtype)
    steps = np.abs(_ordinals(out, dtype) - _ordinals(_stored(exact, dtype), dtype))
    return float(np.count_nonzero(steps) / n), int(steps.max())


def _stored(values: Any, dtype: str) -> Any:
    """float64 rounded once to `dtype`, ties to even; bfloat16 as its bits."""
    if dtype != "BF16":
        return values.astype(kernels.NUMPY[dtype])
    mantissa, exponent = np.frexp(values)
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8).astype(np.float32)
    return (rounded.view(np.uint32) >> 16).astype(np.uint16)


def _values(stored: Any, dtype: str) -> Any:
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def _ordinals(stored: Any, dtype: str) -> Any:
    """Integers that count the representable numbers, so that neighbours differ by one."""
    bits = stored.view(f"i{stored.itemsize}").astype(np.int64)
    return np.where(bits < 0, np.iinfo(f"i{stored.itemsize}").min - bits, bits)


# --- input and output ---------------------------------------------------------------------------

CALLS = ("preadv", "pwrite", "copy_file_range", "posix_fallocate", "O_DIRECTORY")
"""What plymix uses where the system has it; elsewhere it seeks, reads and writes."""


def _calls() -> Iterator[Row]:
    there = [name for name in CALLS if hasattr(os, name)]
    lacking = [name for name in CALLS if name not in there]
    text = ", ".join(there) + (f"; not here: {', '.join(lacking)}" if lacking else "")
    yield Row("system calls", text or "none of the fast ones", "note" if lacking else "ok")
    try:
        same = paths_agree()
    except OSError as e:
        yield Row("file copies", f"no temporary file can be written: {e.strerror}", "note")
        return
    if same:
        yield Row("file copies", "positioned, plain and kernel copies give the same bytes")
    else:
        yield Row("file copies", "positioned or kernel copies give other bytes", "error")


def paths_agree(nbytes: int = (1 << 20) + 13) -> bool:
    """Whether each way plymix has to move bytes from file to file gives what was written."""
    data = np.random.default_rng(2).bytes(nbytes)
    with tempfile.TemporaryDirectory(prefix="plymix-") as folder:
        source, copy = Path(folder, "source"), Path(folder, "copy")
        source.write_bytes(data)
        handle = Handle(source)
        fd = os.open(copy, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
        try:
            target = engine.FileTarget(fd)
            target.write_at(0, handle.head(nbytes))  # positioned
            moved = 0
            while n := target.copy_from(handle, moved, nbytes + moved, nbytes - moved):
                moved += n  # by the kernel; 0 where it cannot
            if moved == 0:
                target.write_at(nbytes, source.read_bytes())
        finally:
            os.close(fd)
            handle.close()
        return copy.read_bytes() == data * 2


def _memory() -> Iterator[Row]:
    n = kernels.BLOCK
    a, b, out = (np.full(n, 0x3C00, np.uint16).view(np.float16) for _ in range(3))
    total = kernels.Sum(((0.7, "F16"), (0.3, "F16")), "F16")
    speed = _speed(lambda: total(n, (a, b), out), 3 * a.nbytes)
    yield Row("sum in cache", f"{speed:.1f} GB/s (two fp16 inputs and the result, one thread)")
    big, copy = np.ones(32 << 20, np.uint8), np.ones(32 << 20, np.uint8)
    speed = _speed(lambda: np.copyto(copy, big), 2 * big.nbytes)
    yield Row("memory copy", f"{speed:.1f} GB/s (read and written, one thread)")


def _speed(work: Callable[[], object], nbytes: int, seconds: float = 0.2) -> float:
    """GB/s of the fastest of several calls, each of which moves `nbytes`."""
    best = float("inf")
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end or best == float("inf"):
        work()
        best = min(best, time.perf_counter() - began)
    return nbytes / best / 1e9


def _disk(folder: Path) -> Row:
    free = shutil.disk_usage(folder).free
    if free < FREE_AT_LEAST:
        text = f"{folder} has {free / 1e9:.1f} GB free: not measured (it wants 1 GiB)"
        return Row("disk", text, "note")
    try:
        write, read = disk_speed(folder)
    except OSError as e:
        return Row("disk", f"{folder} cannot be written: {e.strerror}", "note")
    return Row("disk", f"{folder}: write and sync {write:.2f} GB/s, read back {read:.2f} GB/s")


def disk_speed(folder: Path, nbytes: int = DISK_TEST, limit: float = 3.0) -> tuple[float, float]:
    """(write, read) in GB/s of a temporary file in `folder`, synced; it stops after `limit` s.

    Reading asks the system to forget the file first, where that can be asked.
    """
    block = memoryview(np.random.default_rng(3).bytes(1 << 20))
    # A file without a name where the system can; it is gone even after a kill.
    with tempfile.TemporaryFile(dir=folder, prefix=".plymix-", buffering=0) as file:
        began, written = time.perf_counter(), 0
        while written < nbytes and time.perf_counter() - began < limit:
            written += file.write(block[: nbytes - written]) or 0
        os.fsync(file.fileno())
        write = written / (time.perf_counter() - began) / 1e9
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = memoryview(bytearray(1 << 20))
        file.seek(0)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < limit and (n := file.readinto(buffer)):
            done += n
        return write, done / (time.perf_counter() - began) / 1e9
