"""Plan -> file: read, compute, cast, write, by threads or processes, in bounded memory.

The plan is cut into work items (`work`). An item owns a range of the output, so workers never meet
and the bytes do not depend on who does what, or when. Copies are moved here; what has to be
computed goes to a `worker`, which is imported with all its arithmetic when there is such work,
while other threads copy. `processes` divides it among copies of this process where threads would
wait for each other. `files` says where the bytes go.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plymix import stops, urls
from plymix.engine.files import (
    AtomicFile,
    Buffers,
    FileTarget,
    MemoryTarget,
    Target,
    finished,
    flushing,
    steps,
)
from plymix.engine.work import SPAN, ChunkItem, CopyItem, Item, SumItem, WholeItem, items
from plymix.errors import Cancelled
from plymix.expr import Tensor, calls, leaves
from plymix.formats.base import Layout, Piece, Source
from plymix.plan import available_cpus

if TYPE_CHECKING:
    from plymix.engine.sets import AtomicFolder, AtomicShards
    from plymix.engine.worker import Worker

__all__ = [
    "ChunkItem",
    "CopyItem",
    "FileTarget",
    "Job",
    "MemoryTarget",
    "Progress",
    "ProgressCallback",
    "SumItem",
    "WholeItem",
    "Written",
    "items",
    "patched",
    "perform",
    "write",
]

COPIED = 1 << 20
"""Bytes read and written at a time where nothing is computed."""

WORTH = 64 << 20
"""Bytes that methods make, beyond sums, from which on processes are worth their start and memory.
Sums stay within 64 MiB, and gain less."""

WAITING = 1
"""Threads more than processors where each waits for the disk to take what it wrote. Where there is
more to compute than that, they would only take turns."""


@dataclass(frozen=True)
class Progress:
    """How far a merge is. `phase` is a word for people: "merging", "hashing" ..."""

    phase: str
    done: int
    total: int
    seconds: float


ProgressCallback = Callable[[Progress], object]
"""Called a few times a second from the calling thread. Returning False stops the merge cleanly."""


def goes_on(
    progress: ProgressCallback | None, phase: str, done: int, total: int, began: float
) -> bool:
    """Tell how far the work is that `began`; whether it goes on. Ctrl-C takes effect here."""
    with stops.heeded():
        now = Progress(phase, done, total, time.monotonic() - began)
        return progress is None or progress(now) is not False


@dataclass
class Job:
    """What the workers share: inputs, target, `prepare` states, progress, the wish to stop."""

    sources: Sequence[Source]
    target: Target
    state: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    spoilt: list[tuple[int, int]] = field(default_factory=list)  # ranges with infinities or NaN
    done: int = 0
    stop: bool = False
    error: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes
        if self.stop:
            raise Cancelled("stopped; nothing was written")

    def halt(self) -> None:
        """Have all workers stop, also those that wait for the web."""
        self.stop = True
        for source in self.sources:
            source.stop()


def perform(
    job: Job,
    tensors: Sequence[Tensor],
    *,
    threads: int = 0,
    progress: ProgressCallback | None = None,
    copies: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Write every one of `tensors` to the job's target. Raises Cancelled or Failure.

    With `copies` what takes long is computed by copies of this process, where it may be copied; the
    target's writes must need nothing but its open files then. `meanwhile` is called when they are
    made: it may start threads.
    """
    work = items(tensors)
    total = sum(item.nbytes for item in work)
    for at, source in enumerate(job.sources):
        if source.remote:
            read = (leaf for tensor in tensors for leaf in leaves(tensor.expr))
            source.expect(leaf.info for leaf in read if leaf.source == at)
    if any(True for tensor in tensors for _ in calls(tensor.expr)):
        from plymix.engine.worker import prepare

        prepare(job, tensors, progress)
    began = time.monotonic()

    def tell() -> None:
        if not job.stop and not goes_on(progress, "merging", job.done, total, began):
            job.halt()

    count = threads or available_cpus()
    slow = sum(item.nbytes for item in work if isinstance(item, (ChunkItem, WholeItem)))
    local = job.device == "cpu" and not any(source.remote for source in job.sources)
    copies = copies and local and count > 1 and slow >= WORTH
    if copies:
        from plymix.engine import processes

        copies = processes.able()
    if copies:
        processes.perform(job, work, _scheduled(work), min(count, len(work)), meanwhile, tell)
    else:
        meanwhile()
        if not threads and job.target.waits and all(map(_light, work)):
            count += WAITING
        _in_threads(job, work, _scheduled(work), min(count, max(1, len(work))), tell)
    if job.error is not None:
        raise job.error
    if job.stop:
        raise Cancelled("stopped; nothing was written")


def _in_threads(
    job: Job, work: Sequence[Item], order: Sequence[int], count: int, tell: Callable[[], None]
) -> None:
    """Have `work` done by `count` threads of this process."""
    take = taking(job, order)
    with stops.running([partial(lend_a_hand, job, work, take)] * count, job.halt) as ended:
        while not ended.is_set():
            tell()
            ended.wait(0.1)
        tell()


def _light(item: Item) -> bool:
    """Whether the disk takes longer for what an item makes than making it does."""
    if isinstance(item, SumItem):
        return len(item.operands) <= 2 and all(o.dtype == item.dtype for o in item.operands)
    return isinstance(item, CopyItem)


def _scheduled(work: Sequence[Item]) -> list[int]:
    """The indices of what is computed, after those of the copies but for its first item.

    The thread that gets that one imports the arithmetic; the others have something to do meanwhile.
    """
    copied = [i for i, item in enumerate(work) if isinstance(item, CopyItem)]
    computed = [i for i, item in enumerate(work) if not isinstance(item, CopyItem)]
    return computed[:1] + copied + computed[1:]


def taking(job: Job, order: Iterable[int]) -> Callable[[], int | None]:
    """What gives one of `order` after the other, to whoever asks, and then None."""
    position = iter(order)

    def take() -> int | None:
        with job.lock:
            return next(position, None)

    return take


def lend_a_hand(job: Job, work: Sequence[Item], take: Callable[[], int | None]) -> None:
    """A thread's part of `work`."""
    try:
        with closing(Hand(job)) as hand:
            while not job.stop and (index := take()) is not None:
                hand.do(work[index])
    except BaseException as e:
        with job.lock:
            job.error = job.error or e
        job.halt()


class Hand:
    """What one thread or process does items with: its buffers, and a worker from when it needs one.

    Close it to have all written.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._buffers = Buffers()
        self._worker: Worker | None = None

    def do(self, item: Item) -> None:
        if isinstance(item, CopyItem):
            self._copy(item)
            return
        if self._worker is None:
            from plymix.engine.worker import Worker

            self._worker = Worker(self.job, self._buffers)
        self._worker.run(item)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()

    def _copy(self, item: CopyItem) -> None:
        job, moved = self.job, 0
        handle = job.sources[item.source].handles[item.file]
        while moved < item.nbytes:
            left = item.nbytes - moved
            n = job.target.copy_from(handle, item.offset + moved, item.at + moved, left)
            if not n:
                break
            moved += n
            job.add(n)
        for start, n in steps(item.at + moved, item.nbytes - moved, COPIED):
            at = item.at + moved + start
            buffer = self._buffers(0, n, at)
            handle.read_at(item.offset + moved + start, buffer)
            job.target.write_at(at, buffer)
            job.add(n)


@dataclass(frozen=True)
class Written:
    """A finished file."""

    path: Path
    nbytes: int
    seconds: float
    nonfinite: Mapping[str, int] = field(default_factory=dict)  # tensor -> infinities and NaN


def write(
    tensors: Sequence[Tensor],
    sources: Sequence[Source],
    layout: Layout,
    path: Path,
    *,
    threads: int = 0,
    device: str = "cpu",
    late: Mapping[str, Callable[[Callable[[], bool]], str]] | None = None,
    progress: ProgressCallback | None = None,
) -> Written:
    """Write a whole file, or several: tensors, then the pieces around them, then the name.

    `late` gives, for each place-holder in the layout's pieces, a function that computes its value
    (of the same length); they run beside the merge. Raises Failure or Cancelled; then nothing is
    left behind and a file that had the name before is as it was.
    """
    began = time.monotonic()
    file: AtomicFile | AtomicFolder | AtomicShards
    if layout.parts:
        from plymix.engine.sets import several

        file = several(path, layout)
    else:
        file = AtomicFile(path, layout.size, read_back=layout.finish is not None)
    with stops.held(finished(path)), file as target:
        within: Target = target if layout.through is None else layout.through(target)
        job = Job(sources, within, device=device)
        values = _Late(late or {}, lambda: job.stop)
        with ExitStack() as beside:

            def meanwhile() -> None:
                values.ended = beside.enter_context(stops.running(values.works, job.halt))
                beside.enter_context(flushing(target.files))

            alone = layout.through is None  # what it keeps in memory, a copy would keep apart
            perform(
                job, tensors, threads=threads, progress=progress, copies=alone, meanwhile=meanwhile
            )
            found = values.wait(progress, began)
        for at, piece in patched(layout.pieces, found):
            target.write_at(at, piece)
        if layout.finish is not None:
            for at, piece in layout.finish(target.read_at):
                stops.heed()
                target.write_at(at, piece)
        for source in sources:
            if _same_file(source, path):
                source.close()  # an open file cannot be replaced on Windows
        nonfinite = _nonfinite(job, tensors)
        file.commit()
    return Written(path, layout.size, time.monotonic() - began, nonfinite)


def _nonfinite(job: Job, tensors: Sequence[Tensor]) -> dict[str, int]:
    """How many infinities and NaN each computed tensor holds, where there are any."""
    found: dict[str, int] = {}
    if not job.spoilt:
        return found
    from plymix import kernels

    for tensor in tensors:
        end = tensor.offset + tensor.nbytes
        if any(a < end and tensor.offset < b for a, b in job.spoilt):
            count = 0
            for at in range(tensor.offset, end, SPAN):
                data = bytearray(min(SPAN, end - at))
                job.target.read_at(at, data)
                count += kernels.nonfinite(data, tensor.dtype)
            if count:
                found[tensor.name] = count
    return found


def patched(pieces: Sequence[Piece], values: Mapping[str, str]) -> Iterator[Piece]:
    """`pieces` with every place-holder replaced by its value, which has the same length."""
    for at, piece in pieces:
        for placeholder, value in values.items():
            piece = piece.replace(placeholder.encode(), value.encode())
        yield at, piece


def _same_file(source: Source, path: Path) -> bool:
    local = (h.path for h in source.handles if not urls.is_url(h.path))
    return path.exists() and any(os.path.samefile(file, path) for file in local)


class _Late:
    """Values that `works` compute, each in a thread of its own, until `ended` is set."""

    def __init__(
        self,
        late: Mapping[str, Callable[[Callable[[], bool]], str]],
        stopped: Callable[[], bool],
    ) -> None:
        self.found: dict[str, str] = {}
        self.error: BaseException | None = None
        self._stopped = stopped
        self._total = len(late)
        work = iter(late.items())
        lock = threading.Lock()

        def loop() -> None:
            try:
                while True:
                    with lock:
                        entry = next(work, None)
                    if entry is None:
                        return
                    self.found[entry[0]] = entry[1](self._stopped)
            except BaseException as e:
                self.error = e

        self.works = [loop] * min(2, len(late))
        self.ended = threading.Event()

    def wait(self, progress: ProgressCallback | None, began: float) -> dict[str, str]:
        while not self.ended.wait(0.1):
            hashed = len(self.found)
            if not goes_on(progress, "hashing the inputs", hashed, self._total, began):
                raise Cancelled("stopped; nothing was written")
        if self.error is not None:
            raise self.error
        return self.found
