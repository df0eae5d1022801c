"""Ctrl-C wherever it may come: the old file or the new one, and nothing else that stays."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import plymix
from plymix import engine, stops
from plymix.engine.files import write_whole
from plymix.formats.base import Layout, Part
from small import draw, save

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")
OURS = tuple(str(Path(plymix.__file__).parent / name) for name in ("engine", "temporary", "stops"))


def lines(call, stopped=-1):
    """How many lines of ours `call` goes through here; Ctrl-C comes before number `stopped`."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            if count == stopped:
                signal.raise_signal(signal.SIGINT)
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def contents(folder):
    """What a folder holds, what is below it too."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def merged(folder, alpha, **options):
    files = [folder / f"{name}.safetensors" for name in "abo"]
    plymix.merge(*files, arch="any", alpha=alpha, force=True, threads=2, **options)


def as_file(folder, alpha):
    merged(folder, alpha)


def as_checkpoint(folder, alpha):
    files = [folder / name for name in ("a.safetensors", "b.safetensors", "o.ckpt")]
    plymix.merge(*files, arch="any", alpha=alpha, force=True, threads=2)


def as_shards(folder, alpha):
    merged(folder, alpha, shard="20KB")


def as_folder(folder, alpha):
    parts = (Part("x/one.bin", 0, 3000), Part("two.bin", 3000, 2000))
    pieces = [(0, bytes([int(9 * alpha)]) * 3000), (3000, b"2" * 2000)]
    others = {"model_index.json": b"{}", "x/config.json": b"{}"}
    engine.write([], [], Layout({}, 5000, pieces, parts=parts, others=others), folder / "o")


def as_text(folder, alpha):
    write_whole(folder / "o.json", str(alpha).encode())


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "models"
    folder.mkdir()
    for i, name in enumerate("ab"):
        tensors = {key: draw("F16", (40, 60), 10 * i + j) for j, key in enumerate("xyzuvw")}
        save(folder / f"{name}.safetensors", tensors)
    return folder


@pytest.mark.parametrize("over", ["nothing", "an older one"])
@pytest.mark.parametrize("write", [as_file, as_checkpoint, as_shards, as_folder, as_text])
def test_at_every_line_of_the_main_thread(models, write, over):
    inputs, threads = contents(models), set(threading.enumerate())

    def prepare():
        for path in models.iterdir():
            if path.relative_to(models) not in inputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if over != "nothing":
            write(models, 0.1)
        return contents(models)

    old = prepare()
    count = lines(lambda: write(models, 0.5))
    new = contents(models)
    assert old != new
    ends = set()
    for line in range(0, count, max(1, count // 90)):
        if contents(models) != old:
            prepare()
        late = False
        try:
            assert lines(lambda: write(models, 0.5), line) <= line
        except KeyboardInterrupt as e:
            late = "was finished before" in str(e)
        now = contents(models)
        assert set(threading.enumerate()) <= threads
        assert now in (old, new)
        assert not late or now == new
        ends.add(late)
    assert ends == {False, True}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


PROGRAM = """
import os, time
from plymix import stops
stops.PATIENCE = {patience}
stops.once()
try:
    with stops.held("late"):
        print("held", flush=True)
        {held}
    {then}
except KeyboardInterrupt as e:
    print("stopped", e, flush=True)
    {cleaning}
    os._exit(7)  # as the command line ends
"""
SHORT, LONG = "time.sleep(0.5)", "time.sleep(60)"


@pytest.mark.parametrize(
    ("patience", "held", "then", "cleaning", "code", "said"),
    [
        # The first waits for the end, and the others do not disturb.
        (60, SHORT, "pass", SHORT, 7, "stopped late"),
        # Nobody heeds it: a later one need not wait.
        (0.2, LONG, "pass", "pass", 7, "stopped"),
        # Nor for a cleaning up that hangs.
        (0.2, "while True: stops.heed()", "pass", LONG, 130, "stopped"),
        # What was finished is told as long as the program runs.
        (60, "pass", LONG, "pass", 7, "stopped late"),
    ],
)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_many_stops(name, patience, held, then, cleaning, code, said):
    program = PROGRAM.format(patience=patience, held=held, then=then, cleaning=cleaning)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        while process.poll() is None:
            process.send_signal(getattr(signal, name))
            time.sleep(0.1)
        assert process.stdout.read().strip() == said
    assert process.returncode == code


def test_other_threads_hold_nothing_back():
    """Ctrl-C stops the main thread, whatever another is at."""
    inside, done = threading.Event(), threading.Event()

    def hold():
        with stops.held():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    done.set()
    thread.join()


@pytest.fixture
def handle():
    """Sets a handler of a signal until the end of the test."""
    before = {}

    def set_(handler, number=signal.SIGINT):
        before.setdefault(number, signal.getsignal(number))
        signal.signal(number, handler)

    yield set_
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_others_do_about_a_stop_is_done(handle):
    """A program's own handler is called, as late, and may go on; so it is with the next stop."""
    called = []
    handle(lambda number, frame: called.append(number))
    with stops.held():
        for n in (1, 2):
            signal.raise_signal(signal.SIGINT)
            assert len(called) == n - 1
            stops.heed()
            assert len(called) == n
        signal.raise_signal(signal.SIGINT)
    assert len(called) == 3


def stop():
    """Ctrl-C, which is heeded."""
    signal.raise_signal(signal.SIGINT)
    stops.heed()


def test_a_second_stop_does_not_disturb_the_end_of_threads():
    """They would go on, and write to files that are others' by then."""
    main, halted, ended = threading.get_ident(), threading.Event(), []

    def work():
        halted.wait(10)
        time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)  # while it is waited for
        time.sleep(0.1)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt), stops.running([work, work], halted.set):
        stop()
    assert ended == [True, True]


def test_threads_that_nobody_waits_for_write_nowhere(tmp_path, monkeypatch):
    """A stop that need not wait any longer leaves them with what they were given."""
    monkeypatch.setattr(stops, "PATIENCE", 0.0)
    main, go_on, threads = threading.get_ident(), threading.Event(), []

    def hang():
        threads.append(threading.current_thread())
        time.sleep(0.2)
        signal.pthread_kill(main, signal.SIGINT)
        go_on.wait(20)

    def write():
        with stops.held(), engine.AtomicFile(tmp_path / "o.bin", 3) as target:
            targets.append(target)
            with stops.running([hang], lambda: None):
                stop()

    targets = []
    with pytest.raises(KeyboardInterrupt):
        write()
    assert stops.astray()
    assert list(tmp_path.iterdir()) == []
    with open(tmp_path / "others", "wb+") as others:
        assert others.fileno() != targets[0].fd
        targets[0].write_at(0, b"xyz")
    assert (tmp_path / "others").read_bytes() == b""
    go_on.set()
    threads[0].join()
    os.close(targets[0].fd)
    with engine.AtomicFile(tmp_path / "o.bin", 3) as target:
        assert not stops.astray()
    with pytest.raises(OSError, match="Bad file descriptor"):  # its number is free again
        os.fstat(target.fd)


def test_a_stop_is_not_lost_where_the_work_fails():
    """Or a loop that goes on with the next file would do so after Ctrl-C."""
    with pytest.raises(KeyboardInterrupt), stops.held():
        raise [OSError("disk"), signal.raise_signal(signal.SIGINT)][0]


def test_all_handlers_are_put_back(handle, monkeypatch):
    """Also where one of them raises while the others are not back yet."""
    put = signal.signal

    def raises(number, frame):
        raise RuntimeError("stopped")

    def spy(number, handler):
        put(number, handler)
        if handler is raises:
            signal.raise_signal(number)

    handle(raises, signal.SIGTERM)
    monkeypatch.setattr(signal, "signal", spy)
    with pytest.raises(RuntimeError, match="stopped"), stops.held():
        pass
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is raises


def test_a_handler_that_is_set_meanwhile_stays(handle):
    handle(signal.default_int_handler)

    def own(number, frame):
        raise AssertionError

    with stops.held():
        signal.signal(signal.SIGINT, own)
    assert signal.getsignal(signal.SIGINT) is own


def test_a_merge_within_a_callback():
    """What is held in it is held; after it the callback may be stopped at once, as before."""

    def merge():
        with stops.held():
            signal.raise_signal(signal.SIGINT)
            went_on.append("in a merge")
            stops.heed()

    def callback():
        with pytest.raises(KeyboardInterrupt):
            merge()
        signal.raise_signal(signal.SIGINT)
        went_on.append("in the callback")

    went_on = []
    with pytest.raises(KeyboardInterrupt), stops.held(), stops.heeded():
        callback()
    assert went_on == ["in a merge"]


def test_threads_that_cannot_start_leave_none(monkeypatch):
    halted, done, start = threading.Event(), [], threading.Thread.start

    def work():
        halted.wait(10)
        done.append(True)

    def third_fails(thread):
        started.append(thread)
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    started = []
    monkeypatch.setattr(threading.Thread, "start", third_fails)
    with pytest.raises(RuntimeError, match="can't start"), stops.running([work] * 4, halted.set):
        raise AssertionError
    assert done == [True, True]
    assert not any(thread.is_alive() for thread in started)


def test_what_is_called_back_is_stopped_at_once(models):
    """Whose function takes long, or waits for something, need not wait for the end of it."""
    inputs = contents(models)

    def waits(progress):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it goes on")

    with pytest.raises(KeyboardInterrupt):
        merged(models, 0.5, progress=waits)
    assert contents(models) == inputs
