"""The backend `fake`: a pattern made of weights and settings, for tests and plug-in authors.

Needs nothing but numpy. One stripe per block of the model, coloured by a checksum of the block's
bytes; over it noise from the other settings. The same bytes and settings give the same picture.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from plymix.expr import Tensor
from plymix.images.base import Options, Picture, Settings, Tick
from plymix.images.live import Live
from plymix.plan import Plan


def open(options: Options) -> Fake:
    return Fake()


class Fake:
    """The checksum of each tensor of the last plan."""

    label = "fake 1"

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}
        self._live = Live(self._put)
        self._blocks: dict[str, int] = {}

    def _put(self, tensor: Tensor, data: memoryview) -> None:
        self._sums[tensor.name] = zlib.crc32(data)

    def use(self, plan: Plan) -> None:
        self._live.become(plan, plan.tensors)
        sums: dict[str, int] = {}
        for tensor in plan.tensors:
            block = plan.places[tensor.name].block
            sums[block] = zlib.crc32(
                self._sums[tensor.name].to_bytes(4, "little"), sums.get(block, 0)
            )
        self._blocks = dict(sorted(sums.items()))

    def draw(self, asked: Sequence[Settings], tick: Tick) -> Iterator[Picture]:
        for settings in asked:
            colours = np.array([list(s.to_bytes(4, "big")[:3]) for s in self._blocks.values()])
            rows = np.arange(settings.height) * len(colours) // settings.height
            seed = zlib.crc32(msgspec.json.encode(settings))
            noise = np.random.Generator(np.random.Philox(key=seed)).integers(
                0, 64, (settings.height, settings.width, 3)
            )
            tick(1)
            yield (colours[rows][:, None, :] * 3 // 4 + noise).astype(np.uint8)

    def close(self) -> None:
        self._sums.clear()
