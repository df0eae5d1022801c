"""What the arithmetic of each merge method takes: ns per element of the result, in one thread.

    python benchmarks/run.py --only methods                           every method
    OPENBLAS_NUM_THREADS=1 python benchmarks/methods.py ties della    some

The tensor has 4 million elements (those that decompose it: 65 thousand), two models and a base that
differ as fine-tunes stored in 16 bits do, the default settings, and pieces and memory as a worker
has them. Best of three, sorted, without reading and writing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plymix.engine.work import CHUNK
from plymix.engine.worker import _keep_memory, generator
from plymix.methods.arrays import Pool
from plymix.registry import Method, get_method, methods

KEY = "model.diffusion_model.middle_block.1.proj_in.weight"
LARGE, SMALL = (2048, 2048), (256, 256)
DECOMPOSES = 12
"""Tensors of room from which a method is given the small one."""

Array = np.ndarray[Any, Any]


class Keys(dict[str, tuple[Array, ...]]):
    """The `Tensors` a `prepare` is given."""

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self[key][0].shape)


def models(shape: tuple[int, int]) -> list[Array]:
    """Three models whose differences are a quarter of what they share."""
    common, *own = (np.random.default_rng(i).standard_normal(shape, np.float32) for i in range(4))
    return [((common + x / 4) / 50).astype(np.float16).astype(np.float32) for x in own]


def nanoseconds(method: Method, xs: Sequence[Array], runs: int = 3) -> float:
    """Of the fastest run, per element."""
    given: dict[str, Any] = {"key": KEY, "rng": lambda i: generator(0, KEY, i)}
    params: Mapping[str, Any] = {
        p.name: 0.5 for p in method.params if p.name == "alpha" and p.default in (0, 1)
    }
    if method.prepare is not None:
        given["state"] = method.prepare(Keys({KEY: tuple(xs)}), **params)
    chosen = {name: value for name, value in given.items() if name in method.given}
    by_elements = method.kind in ("linear", "elementwise")
    rows = CHUNK // xs[0].shape[1] if by_elements else xs[0].shape[0]
    best, pool = float("inf"), Pool()
    with pool.serving(), np.errstate(all="ignore"):
        for _ in range(runs):
            start = time.perf_counter()
            for i in range(0, xs[0].shape[0], rows):
                method.function(*(x[i : i + rows] for x in xs), **chosen, **params)
            best = min(best, time.perf_counter() - start)
    return best / xs[0].size * 1e9


def main() -> None:
    wanted = [get_method(name) for name in sys.argv[1:]] or [*methods().values()]
    large, small = models(LARGE), models(SMALL)
    _keep_memory()
    rows = []
    for method in wanted:
        xs = small if method.room >= DECOMPOSES else large
        count = 3 if method.variadic else len(method.inputs) - method.optional
        rows.append((nanoseconds(method, xs[:count]), method))
    for ns, method in sorted(rows, key=lambda row: -row[0]):
        print(f"{ns:9.2f}  {method.name} ({method.kind})")


if __name__ == "__main__":
    main()
