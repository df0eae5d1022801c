"""Merge methods: pure functions on float32 arrays, one file (or folder) per family.

No file, no key, no architecture is in sight here. `plymix.registry` says how a function declares
itself. Functions are written to the Python array API standard (`array_api_compat`), so the same
code serves numpy on the CPU and torch on a GPU:

    xp = array_namespace(a, b)

A method with `prepare` looks at all keys first:

    def prepare(tensors, **params): ...

`tensors` is a `plymix.methods.Tensors`: iterate over its keys, `tensors[key]` gives the tuple of
arrays of that key (one per input model, float32), read when asked for. What `prepare` returns is
given to the method as `state`. For a "cross" method `prepare` should hold no more than one key's
arrays at a time; a "group" method (re-basin) asks for the keys it needs together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from plymix.errors import Refusal

Array = Any
"""A float32 array of any namespace that follows the array API standard."""


class Tensors(Protocol):
    """All keys of the models given to a `prepare` function."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, key: object) -> bool: ...

    def __getitem__(self, key: str) -> tuple[Array, ...]: ...

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the first model's tensor, without reading it."""
        ...


def model_weights(
    weights: Sequence[float], count: int, *, default: float = 1.0, normalize: bool = False
) -> list[float]:
    """One weight per model: `weights`, or `default` for each when it is empty.

    With `normalize` they are divided by their sum. Raises Refusal when there is not one weight per
    model, or when weights that sum to 0 are to be normalised.
    """
    if weights and len(weights) != count:
        raise Refusal(f"{len(weights)} weights for {count} models: give one number per model")
    ws = [float(w) for w in weights] or [default] * count
    if not normalize:
        return ws
    total = math.fsum(ws)
    if total == 0:
        raise Refusal(f"weights {ws} sum to 0 and cannot be normalised: change one of them")
    return [w / total for w in ws]
