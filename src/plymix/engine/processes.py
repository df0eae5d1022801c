"""The work of a merge divided among processes, where threads would wait for each other.

Python runs one thread at a time between any two calls of its arithmetic: two threads get the use of
one processor and a third, eight of not many more. Linux copies this process as it stands, with the
plan in it, in milliseconds; a copy shares its memory until one of both writes to it. Each computes
items and writes them to the same open file; here is only told which, and what came of it.
"""

from __future__ import annotations

import gc
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, cast

from plymix import stops
from plymix.engine.work import Item
from plymix.errors import Failure

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from plymix.engine import Job

AHEAD = 2
"""Items that a process is given before it has done the first, so that it need not wait."""

Crew = dict["Connection", "BaseProcess"]
"""The processes by what they are spoken to through."""


def able() -> bool:
    """Whether this process may be copied: by Linux, with no thread that holds what a copy needs.

    Others' threads, such as torch's, are not known to survive it.
    """
    alone = threading.active_count() == 1 and "torch" not in sys.modules
    return sys.platform == "linux" and alone


def start(job: Job, work: Sequence[Item], count: int) -> Crew:
    """`count` copies of this process, which wait for numbers of items of `work`."""
    import multiprocessing

    import plymix.engine.worker  # noqa: F401 (once, for all of them)

    context = multiprocessing.get_context("fork")
    crew: Crew = {}
    gc.freeze()  # a collection would write to, and so copy, every object's page
    # What stops a program is for who began this, and not for its copies, who inherit the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops.numbers())
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(job, work, there, [*crew, here]), daemon=True
            )
            with warnings.catch_warnings():  # that BLAS has threads; it stops them for this
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            there.close()
            crew[here] = process
    except BaseException:
        stop(crew)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        gc.unfreeze()
    return crew


def stop(crew: Crew) -> None:
    """End all that still run."""
    for process in crew.values():
        process.kill()
    for connection, process in crew.items():
        process.join()
        connection.close()


def perform(
    job: Job,
    work: Sequence[Item],
    order: Sequence[int],
    count: int,
    meanwhile: Callable[[], object],
    tell: Callable[[], None],
) -> None:
    """Have `work` done, in about the given order, by a thread here and `count` - 1 processes.

    `meanwhile` is called when these are made; `tell` a few times a second. Raises what went wrong
    in a process; what did in the thread is the job's error.
    """
    from multiprocessing.connection import wait

    from plymix.engine import lend_a_hand, taking

    crew = start(job, work, count - 1)
    take = taking(job, order)
    dismissed: set[Connection] = set()

    def give(connection: Connection) -> None:
        if connection not in dismissed:
            index = take()
            if index is None:
                dismissed.add(connection)
            with suppress(BrokenPipeError):  # what it said last tells why
                connection.send(index)

    busy = dict(crew)
    try:
        meanwhile()
        for connection in crew:
            for _ in range(AHEAD):
                give(connection)
        with stops.running([lambda: lend_a_hand(job, work, take)], job.halt) as ended:
            while (busy or not ended.is_set()) and not job.stop:
                tell()
                if not busy:
                    ended.wait(0.1)
                for ready in wait(list(busy), timeout=0.1) if busy else ():
                    connection = cast("Connection", ready)
                    try:
                        said = connection.recv()
                    except (EOFError, OSError):
                        busy[connection].join()
                        raise Failure(_ended(busy[connection].exitcode)) from None
                    if isinstance(said, BaseException):
                        raise said
                    done, spoilt = said
                    job.spoilt += spoilt
                    if done is None:
                        busy.pop(connection).join()
                        continue
                    with job.lock:  # not by `add`, which would tell of a stop and not of its cause
                        job.done += work[done].nbytes
                    give(connection)
            tell()
    finally:
        stop(crew)


def _ended(code: int | None) -> str:
    """Why a process is gone that did not say so."""
    how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else "unexpectedly"
    return (
        f"a process of the merge was ended {how}; if the computer ran out of memory, fewer"
        " --threads take less; nothing was written"
    )


def _serve(job: Job, work: Sequence[Item], there: Connection, others: Sequence[Connection]) -> None:
    """In a copy: do what is asked for until None is."""
    for connection in others:
        connection.close()  # or nobody would notice that the first process is gone
    with suppress(EOFError, BrokenPipeError):
        try:
            _work_off(job, work, there)
        except BaseException as e:
            there.send(_portable(e))


def _work_off(job: Job, work: Sequence[Item], there: Connection) -> None:
    from plymix.engine import Hand

    with closing(Hand(job)) as hand:
        while (index := there.recv()) is not None:
            hand.do(work[index])
            there.send((index, _taken(job.spoilt)))
    there.send((None, _taken(job.spoilt)))


def _taken(spoilt: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found = spoilt[:]
    spoilt.clear()
    return found


def _portable(error: BaseException) -> Any:
    """`error`, or what it says, where it cannot be sent."""
    import pickle

    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return Failure(f"{type(error).__name__}: {error}")
