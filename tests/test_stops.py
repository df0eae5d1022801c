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


HANGS = """
import os, time
from plymix import stops
stops.PATIENCE = {patience}
stops.once()
try:
    with stops.held("late"):
        print("held", flush=True)
        {work}
except KeyboardInterrupt as e:
    print("stopped", e, flush=True)
    time.sleep({cleaning})
    os._exit(7)  # as the command line ends
"""


@pytest.mark.parametrize(
    ("patience", "work", "cleaning", "code", "said"),
    [
        (
            60,
            "time.sleep(0.5)",
            0.5,
            7,
            "stopped late",
        ),  # the first waits, and the others do not disturb
        (0.2, "time.sleep(60)", 0, 7, "stopped"),  # nobody looks: a later one need not wait
        (0.2, "while True: stops.heed()", 60, 130, "stopped"),  # nor for a cleaning up that hangs
    ],
)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_many_stops(name, patience, work, cleaning, code, said):
    program = HANGS.format(patience=patience, work=work, cleaning=cleaning)
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


def test_what_others_do_about_a_stop_is_done():
    """A program's own handler is called, as late, and may go on."""
    called = []
    before = signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
    try:
        with stops.held():
            signal.raise_signal(signal.SIGINT)
            assert called == []
            stops.heed()
            assert called == [signal.SIGINT]
        assert called == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_that_cannot_start_leave_none(monkeypatch):
    halted = threading.Event()
    pool = [threading.Thread(target=halted.wait, args=(10,)) for _ in range(3)]
    monkeypatch.setattr(pool[2], "start", lambda: (_ for _ in ()).throw(RuntimeError("no more")))
    with pytest.raises(RuntimeError, match="no more"), stops.running(pool, halted.set):
        raise AssertionError
    assert [thread.ident is not None for thread in pool] == [True, True, False]
    assert not any(thread.is_alive() for thread in pool)


def test_what_is_called_back_is_stopped_at_once(models):
    """Whose function takes long, or waits for something, need not wait for the end of it."""
    inputs = contents(models)

    def waits(progress):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it goes on")

    with pytest.raises(KeyboardInterrupt):
        merged(models, 0.5, progress=waits)
    assert contents(models) == inputs
