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
from contextlib import ExitStack, contextmanager
from typing import Any

PATIENCE = 3.0
"""Seconds after which one more stop need not wait any longer for what the first one waits for."""


class _Held:
    """A stop that waits to be heeded. Those that follow in the next seconds say the same."""

    def __init__(self) -> None:
        self.handlers: dict[int, Callable[[int, Any], Any]] = {}
        self.number = 0  # of the stop that came
        self.since: float | None = None  # when it came or, later, was heeded
        self.heeded = False
        self.open = False  # none need wait

    def __call__(self, number: int, frame: Any) -> None:
        waited = self.since is not None and time.monotonic() - self.since > PATIENCE
        if self.open or waited:
            self._act(number, frame)
        elif self.since is None:
            self.number, self.since = number, time.monotonic()

    def heed(self) -> None:
        if self.since is not None and not self.heeded:
            self._act(self.number, None)

    def _act(self, number: int, frame: Any) -> None:
        self.since, self.heeded = time.monotonic(), True
        self.handlers[number](number, frame)
        self.since, self.heeded = None, False  # nothing was raised: the work goes on


_held: _Held | None = None
_finished = ""
_going: list[threading.Event] = []


@contextmanager
def held(late: str = "") -> Iterator[None]:
    """Have a stop wait for `heed`, or for the end of the block; `late` is what it says then.

    Only in the main thread: the others are never interrupted. Within another such block it is that
    one which ends the waiting.
    """
    global _held, _finished
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _held is not None:
        with _opened(_held, False):
            yield
        return
    here = _Held()
    try:
        with ExitStack() as after:
            for number in numbers():
                if callable(handler := signal.getsignal(number)):
                    here.handlers[number] = handler
                    after.callback(_put_back, number, here, handler)
                    signal.signal(number, here)
            _held = here
            after.callback(_let_go)
            yield
    except BaseException:
        here.heed()
        raise
    _finished = late or _finished
    try:
        here.heed()
    except KeyboardInterrupt:
        raise _stopped(late) from None


def _let_go() -> None:
    global _held
    _held = None


def _put_back(number: int, here: _Held, handler: Callable[[int, Any], Any]) -> None:
    if signal.getsignal(number) is here:  # else somebody meanwhile set one of his own
        signal.signal(number, handler)


def _stopped(text: str) -> KeyboardInterrupt:
    return KeyboardInterrupt(text) if text else KeyboardInterrupt()


@contextmanager
def _opened(here: _Held, value: bool) -> Iterator[None]:
    before, here.open = here.open, value
    try:
        yield
    finally:
        here.open = before


@contextmanager
def heeded() -> Iterator[None]:
    """A stop that came, or comes meanwhile, takes effect: it raises KeyboardInterrupt, mostly."""
    if _held is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _held.heed()
    with _opened(_held, True):
        yield


def heed() -> None:
    """Let a stop that came take effect here."""
    with heeded():
        pass


@contextmanager
def running(
    works: Sequence[Callable[[], object]], halt: Callable[[], object]
) -> Iterator[threading.Event]:
    """Have each of `works` done by a thread during the block, and wait for their end after it.

    What is given is set when all have ended. `halt` tells them to end early: it is called where the
    block, or the start of a thread, fails.
    """
    ended, lock, left, begun = threading.Event(), threading.Lock(), len(works), 0

    def end() -> None:
        nonlocal left
        with lock:
            left -= 1
            if left == 0:
                ended.set()

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        finally:
            end()

    if not works:
        ended.set()
    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    with held():
        if threading.current_thread() is threading.main_thread():
            _going.append(ended)
        try:
            for thread in threads:
                thread.start()
                begun += 1
            yield ended
        except BaseException:
            halt()
            raise
        finally:
            for _ in threads[begun:]:
                end()
            ended.wait()  # not `join`: one that is broken off takes a thread for ended
            for thread in threads[:begun]:
                thread.join()
            if ended in _going:
                _going.remove(ended)


def astray() -> bool:
    """Whether threads still run in the main thread's name, and use what they were given.

    So it is where nobody waits for them any longer.
    """
    here = threading.current_thread() is threading.main_thread()
    return here and not all(ended.is_set() for ended in _going)


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
            raise _stopped(_finished)
        if time.monotonic() - began > PATIENCE:
            os._exit(130)

    for number in numbers():
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


def numbers() -> list[signal.Signals]:
    """The signals that stop a program, as far as this system has them."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
