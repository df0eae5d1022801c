"""Run commands as whole processes and measure them, in pairs.

Time of day, processor time (user and system, with that of its children) and peak resident memory
come from the kernel's account of the child itself (wait4). A child begins as a copy of its parent
and inherits its peak: the runner must stay smaller than what it measures, so it imports nothing
but the standard library. Where a child has children, their memory counts with its own: the largest
sum that was seen, ten times a second, with what they share counted once.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

Run = Callable[[], "Usage"]


@dataclass(frozen=True)
class Usage:
    """What one process took. `error` is empty when it ended with exit code 0."""

    wall: float
    cpu: float
    mib: float
    error: str = ""


@dataclass(frozen=True)
class Figures:
    """A command's runs: median, least and most wall seconds, median CPU seconds, peak memory."""

    wall: float
    low: float
    high: float
    cpu: float
    mib: float


def process(
    line: str, folder: Path, env: Mapping[str, str], limit: float = 600, shell: bool = False
) -> Usage:
    """Run one command line in `folder`. It is ended after `limit` seconds."""
    clear(folder)
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(
            ["sh", "-c", line] if shell else line.split(),
            cwd=folder,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(limit, end)
        timer.start()
        together = Together(child.pid)
        together.start()
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:  # Ctrl-C: the child has a session of its own
            end()
            child.wait()
            raise
        finally:
            timer.cancel()
            wall = time.perf_counter() - start
            together.stop()
        child.returncode = os.waitstatus_to_exitcode(status)
        error = ""
        if late.is_set():
            error = f"not done after {limit:g} s"
        elif child.returncode:
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines()
            error = lines[-1].strip() if lines else f"exit code {child.returncode}"
            error = error.replace(f"{folder}/", "")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    mib = max(used.ru_maxrss * unit / 2**20, together.mib)
    return Usage(wall, used.ru_utime + used.ru_stime, mib, error)


class Together(threading.Thread):
    """Watches a process and its descendants while it has any: the most memory of all, in MiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.mib = 0.0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.1):
            found = list(family(self.pid))
            if len(found) > 1:
                self.mib = max(self.mib, sum(map(proportional, found)))

    def stop(self) -> None:
        self._done.set()
        self.join()


def family(pid: int) -> Iterator[int]:
    """A process and its descendants, by Linux's account."""
    yield pid
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in listed.read_text().split():
                yield from family(int(child))


def proportional(pid: int) -> float:
    """A process's resident memory in MiB; what n of them share counts 1 / n. 0 if it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def clear(folder: Path) -> None:
    """Remove results and let the disk finish: no run pays for the pages another one wrote."""
    for path in folder.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()


def rounds(runs: Sequence[Run], count: int, warmup: int = 1) -> list[list[Usage]]:
    """Run A B A B ...: one list of usages per entry of `runs`, without the first `warmup` rounds.

    A run that fails is not run again; its list ends with the failure.
    """
    found: list[list[Usage]] = [[] for _ in runs]
    for _ in range(warmup + count):
        for run, usages in zip(runs, found, strict=True):
            if not (usages and usages[-1].error):
                usages.append(run())
    return [u if u[-1].error else u[warmup:] for u in found]


def figures(usages: Sequence[Usage]) -> Figures:
    walls = [u.wall for u in usages]
    return Figures(
        wall=median(walls),
        low=min(walls),
        high=max(walls),
        cpu=median(u.cpu for u in usages),
        mib=max(u.mib for u in usages),
    )


def ratio(usages: Sequence[Usage], others: Sequence[Usage]) -> float:
    """The median of the ratios of wall time, pair by pair."""
    return median(u.wall / o.wall for u, o in zip(usages, others, strict=True))
