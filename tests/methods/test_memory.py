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

SLACK = 0.25
"""Of the tensor: a piece or two, a sample, a few per cent of the elements to be sorted, masks in
bits."""

SMALL = {"BLOCK": 1 << 11, "SAMPLE": 1 << 10, "GROUPS": 48}
"""What pieces and samples have here, so that they are small beside these small tensors, and groups
that are told by so small a sample."""

WHOLE = [m for m in methods().values() if m.kind not in ("linear", "elementwise")]


MORE = [
    ("ties_dare", {"epsilon": 0.2}),
    ("ties_dare", {"keep": 1.0}),
    ("sce", {"select": 0.5}),
    ("dropout", {"overlap": 0.5}),
    ("dropout", {"overlap": 2.0}),
    ("plus_random", {"alpha": 0.1}),
    ("channel_cosine_gate", {"beta": 0.5}),
    ("deturbo", {"damping": 0.5}),
    ("breadcrumbs", {"gamma": 0.0}),
    ("truncate_rank", {"iterations": 0}),
    ("truncate_kronecker", {"iterations": 0}),
    ("rotate", {"alignment": 0.5}),
    ("rotate", {"alpha": 0.5}),
    ("crossover", {"tilt": 0.5}),
]
"""Numbers that choose another way of computing."""


def settings():
    """Every method with its defaults, with each other choice or switch, and with `MORE`."""
    for m in WHOLE:
        yield m, {}
        for p in m.params:
            others = p.choices or ((True, False) if p.type is bool else ())
            yield from ((m, {p.name: value}) for value in others if value != p.default)
    yield from ((methods()[name], params) for name, params in MORE)


def shown(value):
    return getattr(value, "name", None) or " ".join(f"{k}={v}" for k, v in value.items())


@pytest.mark.parametrize("kind", ["matrix", "convolution"])
@pytest.mark.parametrize(("m", "params"), list(settings()), ids=shown)
def test_memory(m, params, kind, monkeypatch):
    for module in [v for k, v in sys.modules.items() if k.startswith("plymix.methods")]:
        for name, small in SMALL.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, small)
    if m.room > 5:  # slow ones
        shape = (320, 256) if kind == "matrix" else (96, 64, 3, 3)
    else:
        shape = (768, 512) if kind == "matrix" else (256, 192, 3, 3)
    for count in counts(m):
        taken = memory(m, inputs(m, count, shape), params)
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


def memory(m, xs, params):
    """Bytes alive at a time at most while `m` works on `xs`, as multiples of a tensor."""
    given = {**params}
    if "key" in m.given:
        given["key"] = "to_q.weight"
    if "rng" in m.given:
        given["rng"] = lambda model: np.random.Generator(np.random.Philox(key=[7, model]))
    if "state" in m.given:
        given["state"] = m.prepare(
            Keys({"to_q.weight": tuple(xs), "to_k.weight": tuple(xs)}), **params
        )
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
