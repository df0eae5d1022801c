"""Work divided among copies of the process: the same bytes, and every way that it can end."""

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

import plymix
from plymix import engine
from plymix.engine import processes, worker
from plymix.errors import Cancelled, Failure
from plymix.recipe import from_dict
from small import coded, draw, save

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux")


@pytest.fixture(autouse=True)
def crews(tmp_path, monkeypatch):
    """Any work is worth it; the list of the crews that were started."""
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engine, "WORTH", 1)
    monkeypatch.setattr(processes, "able", lambda: True)  # other tests may have loaded torch
    started, start = [], processes.start

    def spy(*args):
        started.append(start(*args))
        return started[-1]

    monkeypatch.setattr(processes, "start", spy)
    yield started
    assert multiprocessing.active_children() == []


def recipe(folder, steps, values=None):
    """Two files of tensors of several sizes, and `steps` on them."""
    for i, n in enumerate("ab"):
        shapes = {"bias": (320,), "matrix": (300, 700), "long": (250_001,), "small": (3, 5)}
        tensors = {k: draw("F16", shape, 10 * i + len(k)) for k, shape in shapes.items()}
        tensors["ids"] = ("I64", np.arange(77))
        if values is not None:
            tensors["values"] = coded(values, "F16")
        save(folder / f"{n}.safetensors", tensors)
    models = {n: str(folder / f"{n}.safetensors") for n in "ab"}
    return from_dict({"models": models, "steps": steps, "output": {"arch": "any"}})


STEPS = {
    "one": {"method": "geometric_sum", "a": "a", "b": "b", "alpha": 0.3},
    "two": {"method": "dare_ties", "base": "a", "models": ["one", "b"], "seed": 3},
    "three": {"method": "cosine_a", "a": "two", "b": "b", "alpha": 0.4},
}
ONE = {"one": STEPS["one"]}


@pytest.mark.parametrize("steps", [STEPS, ONE], ids=["nest", "one step"])
def test_the_bytes_are_those_of_one_thread(tmp_path, monkeypatch, crews, steps):
    monkeypatch.setattr(engine.work, "SPAN", 1 << 16)
    found = recipe(tmp_path, steps)
    plymix.merge(found, tmp_path / "1.safetensors", threads=1)
    assert crews == []
    for threads in (2, 3):
        out = tmp_path / f"{threads}.safetensors"
        plymix.merge(found, out, threads=threads)
        assert len(crews.pop()) == threads - 1
        assert out.read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_infinities_are_told(tmp_path, crews):
    values = np.zeros(5000)
    values[[7, 4000]] = np.inf
    done = plymix.merge(recipe(tmp_path, ONE, values), tmp_path / "o.safetensors", threads=2)
    assert crews
    assert any("values (2)" in note for note in done.notes)


def test_sums_and_little_work_stay_here(tmp_path, monkeypatch, crews):
    linear = {"s": {"method": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5}}
    plymix.merge(recipe(tmp_path, linear), tmp_path / "o.safetensors", threads=2)
    monkeypatch.setattr(engine, "WORTH", 1 << 30)
    plymix.merge(recipe(tmp_path, ONE), tmp_path / "p.safetensors", threads=2)
    assert crews == []


class Odd(Exception):
    """An error that cannot be sent: it cannot be made again from what it says."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Failure("the disk is gone"), "the disk is gone"),
        (OSError(errno.ENOSPC, "No space left"), "no room for o.safetensors"),
        (OSError(errno.EIO, "Input/output error"), "writing o.safetensors failed"),
        (Odd("one", "two"), "one and two"),
    ],
)
def test_an_error_comes_back(tmp_path, monkeypatch, crews, error, told):
    def run(self, item):
        raise error

    found = recipe(tmp_path, ONE)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(worker.Worker, "run", run)
    with pytest.raises((Failure, Odd), match=told):  # whoever was first, a process or a thread here
        plymix.merge(found, tmp_path / "o.safetensors", threads=2)
    assert crews
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "cache"] == before


def test_a_process_that_is_killed_is_told(tmp_path, monkeypatch, crews):
    here, run = os.getpid(), worker.Worker.run

    def die(*args):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        run(*args)

    monkeypatch.setattr(worker.Worker, "run", die)
    with pytest.raises(Failure, match="ended by SIGKILL; if the computer ran out of memory"):
        plymix.merge(recipe(tmp_path, ONE), tmp_path / "o.safetensors", threads=2)
    assert crews
    assert not list(tmp_path.glob("*o.safetensors*"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_what_stops_a_program_is_not_for_its_copies(tmp_path, monkeypatch, crews, name):
    """A closed terminal tells all of them at once: who began the merge ends it, and says so."""
    made = processes.start

    def start(*args):
        crew = made(*args)
        for process in crew.values():
            os.kill(process.pid, getattr(signal, name))
        return crew

    monkeypatch.setattr(processes, "start", start)
    plymix.merge(recipe(tmp_path, ONE), tmp_path / "o.safetensors", threads=3)
    assert crews


def interrupted(now):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("progress", "error"), [(lambda now: False, Cancelled), (interrupted, KeyboardInterrupt)]
)
def test_a_stop_ends_all(tmp_path, crews, progress, error):
    with pytest.raises(error):
        plymix.merge(
            recipe(tmp_path, ONE), tmp_path / "o.safetensors", threads=2, progress=progress
        )
    assert crews
    assert not list(tmp_path.glob("*o.safetensors*"))


def test_copies_are_made_before_threads(tmp_path, monkeypatch):
    """A thread may hold a lock that its copy would wait for, for ever."""
    before, seen = threading.active_count(), []
    start = processes.start
    monkeypatch.setattr(
        processes, "start", lambda *x: seen.append(threading.active_count()) or start(*x)
    )
    plymix.merge(recipe(tmp_path, ONE), tmp_path / "o.safetensors", threads=2)
    assert seen == [before]


def test_who_may_be_copied(monkeypatch):
    monkeypatch.undo()
    for name in [n for n in sys.modules if n == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    assert processes.able()
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert not processes.able()
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "torch", object())
    assert not processes.able()


def test_what_goes_wrong_here_is_told_while_others_go_on(tmp_path, monkeypatch, crews):
    """Not that it was stopped, which it was in consequence."""
    monkeypatch.setattr(engine.work, "SPAN", 1 << 13)
    here, run = os.getpid(), worker.Worker.run

    def full(*args):
        if os.getpid() == here:
            time.sleep(0.1)
            raise OSError(errno.ENOSPC, "No space left")
        run(*args)

    found = recipe(tmp_path, ONE)
    monkeypatch.setattr(worker.Worker, "run", full)
    with pytest.raises(Failure, match=r"no room for o\.safetensors"):
        plymix.merge(  # while it is asked to wait, the thread fails and processes say what they did
            found, tmp_path / "o.safetensors", threads=3, progress=lambda now: time.sleep(0.3)
        )
    assert crews
