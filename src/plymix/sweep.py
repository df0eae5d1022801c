"""Many tensors looked at in threads: results in order, progress told, stopped cleanly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from plymix.engine import ProgressCallback, goes_on
from plymix.errors import Cancelled
from plymix.plan import available_cpus

T = TypeVar("T")
R = TypeVar("R")

EVERY = 0.1
"""Seconds between two calls of a progress callback."""


def sweep(
    work: Callable[[T], R],
    over: Sequence[T],
    nbytes: Callable[[T], int],
    *,
    phase: str,
    stop: threading.Event,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Iterator[tuple[T, R]]:
    """Each of `over` with what `work` makes of it; `nbytes` is what progress counts.

    `stop` is set when the work shall end early, which `work` must look at. Raises Cancelled when
    `progress` returns False.
    """
    total, done = sum(map(nbytes, over)), 0
    began = told = time.monotonic()
    with ThreadPoolExecutor(threads or available_cpus()) as pool:
        try:
            for one, result in zip(over, pool.map(work, over), strict=True):
                yield one, result
                done += nbytes(one)
                now = time.monotonic()
                if progress is None or (now - told < EVERY and done < total):
                    continue
                told = now
                if not goes_on(progress, phase, done, total, began):
                    raise Cancelled(f"stopped while {phase}")
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
