"""What a method that needs whole tensors takes of memory: law 8, for everything registered.

Inputs count, and so does everything that is alive at the same time. The limit is four times the
tensor, or the `room` that a method declares, for methods of up to three models; a method of more
takes a tensor more for each.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from plymix.registry import methods

SLACK = 0.2
"""Of the tensor: a piece or two, a sample, a few per cent of the elements to be sorted."""

SMALL = {"BLOCK": 1 << 11, "SAMPLE": 1 << 10}
"""What pieces and samples have here, so that they are small beside these small tensors."""

WHOLE = [m for m in methods().values() if m.kind not in ("linear", "elementwise")]


@pytest.mark.parametrize("kind", ["matrix", "convolution"])
@pytest.mark.parametrize("m", WHOLE, ids=lambda m: m.name)
def test_memory(m, kind, monkeypatch):
    for module in [v for k, v in sys.modules.items() if k.startswith("plymix.methods")]:
        for name, small in SMALL.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, small)
    if m.room > 4:  # slow ones
        shape = (320, 256) if kind == "matrix" else (96, 64, 3, 3)
    else:
        shape = (768, 512) if kind == "matrix" else (256, 192, 3, 3)
    for count in counts(m):
        taken = memory(m, inputs(m, count, shape))
        assert taken <= m.room + SLACK


def counts(m):
    """The least number of models, and three where it takes so many."""
    fixed = len(m.inputs)
    least = fixed + m.min_variadic if m.variadic else fixed
    if m.variadic and m.optional:
        least -= m.optional
    return sorted({least, max(least, 3)} if m.variadic else {fixed - m.optional, fixed})


def inputs(m, count, shape):
    """`count` models that differ a little, as files of 16 bits do; None for what is left out."""
    r = np.random.default_rng(1)
    common = r.standard_normal(shape, np.float32)
    own = [0.25 * r.standard_normal(shape, np.float32) for _ in range(count)]
    xs = [(common + x).astype(np.float16).astype(np.float32) for x in own]
    if m.variadic and m.optional and count < len(m.inputs) + m.min_variadic:
        return [*[None] * m.optional, *xs]
    return xs


def memory(m, xs):
    """Bytes alive at a time at most while `m` works on `xs`, as multiples of a tensor."""
    given = {}
    if "key" in m.given:
        given["key"] = "to_q.weight"
    if "rng" in m.given:
        given["rng"] = lambda model: np.random.Generator(np.random.Philox(key=[7, model]))
    if "state" in m.given:
        given["state"] = m.prepare(Keys({"to_q.weight": tuple(xs), "to_k.weight": tuple(xs)}))
    there = [x for x in xs if x is not None]
    with np.errstate(all="ignore"):
        m.function(*(None if x is None else x[:8, :8] for x in xs), **given)  # what is kept for all
        tracemalloc.start()
        try:
            m.function(*xs, **given)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    return len(there) + peak / (4 * math.prod(there[0].shape))


class Keys(dict):
    """The `Tensors` a `prepare` function is given."""

    def shape(self, key):
        return tuple(self[key][0].shape)


SIZES = [1 << 20, 20 << 20, 28 << 20, 40 << 20]
"""Bytes of arrays, below and above what C libraries map apart."""

GROWING = f"""
from pathlib import Path
import numpy as np
from plymix.engine.worker import _keep_memory
from plymix.methods.arrays import Pool

def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10

_keep_memory()
pool, before = Pool(), resident()
for size in {SIZES}:
    arrays = [pool.empty((size,), np.uint8) for _ in range(4)]
    for x in arrays:
        x[:] = 1
    del arrays, x
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_that_grow_leave_nothing_behind():
    """After small tensors and large ones a pool takes what the large ones took."""
    done = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, check=True)
    assert int(done.stdout) <= 4 * SIZES[-1] + (6 << 20)
