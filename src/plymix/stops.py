"""Ctrl-C, and what else stops a program, only where it can be cleaned up after.

Python raises KeyboardInterrupt between any two steps of the main thread: also when a file or a
thread is there that nobody knows of yet, or while it is being removed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

PATIENCE = 3.0
"""Seconds after which a second stop need not wait any more for what the first one waits for."""

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class _Held:
    """The first stop waits, until `heeded`; what comes later is done about as ever."""

    def __init__(self) -> None:
        self.handlers: dict[int, Callable[[int, Any], Any]] = {}
        self.came: tuple[int, float] | None = None
        self.heeded = False
        self.open = False  # it need not wait

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        late = self.came is not None and now - self.came[1] > PATIENCE
        self.came = self.came or (number, now)
        if self.open or self.heeded or late:
            self.heeded = True
            self.handlers[number](number, frame)

    def heed(self) -> None:
        if self.came is not None and not self.heeded:
            self.heeded = True
            self.handlers[self.came[0]](self.came[0], None)


_held: _Held | None = None


@contextmanager
def held(late: str = "") -> Iterator[None]:
    """Have a stop wait for `heed`, or for the end of the block; `late` is what it says then.

    Only in the main thread: the others are never interrupted. Within another such block it is that
    one which ends the waiting.
    """
    global _held
    if _held is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    here = _Held()
    try:
        for number in _numbers():
            if callable(handler := signal.getsignal(number)):
                here.handlers[number] = handler
                signal.signal(number, here)
        _held = here
        yield
    finally:
        _held = None
        for number, handler in reversed(here.handlers.items()):
            signal.signal(number, handler)
    try:
        here.heed()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*[late] * bool(late)) from None


@contextmanager
def heeded() -> Iterator[None]:
    """A stop that came, or comes meanwhile, takes effect: it raises KeyboardInterrupt, mostly."""
    if _held is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    here = _held
    here.heed()
    here.open = True
    try:
        yield
    finally:
        here.open = False


def heed() -> None:
    """Let a stop that came take effect here."""
    with heeded():
        pass


@contextmanager
def running(threads: Sequence[threading.Thread], halt: Callable[[], object]) -> Iterator[None]:
    """Have threads run during the block, and wait for their end after it.

    `halt` tells them to end early: it is called where the block, or one of their starts, fails.
    """
    with held():
        try:
            for thread in threads:
                thread.start()
            yield
        except BaseException:
            halt()
            raise
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


def once() -> None:
    """Have a kill and a closed terminal stop this program as Ctrl-C does: by KeyboardInterrupt.

    Further ones do not disturb the cleaning up after it, unless that takes longer than `PATIENCE`.
    What is ignored (under nohup) or handled by others stays so.
    """
    began: float | None = None

    def stop(number: int, frame: Any) -> None:
        nonlocal began
        if began is None:
            began = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - began > PATIENCE:
            os._exit(130)

    for number in _numbers():
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
