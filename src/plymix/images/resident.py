"""Merges on a GPU, of models that stay in its memory: bounded by that memory's speed.

A component's parameters lie in one line there, and so do the tensors of each model in the same
order, read from disk once. Neighbours with the same coefficients are one sum, whatever the number
of tensors, so a change of the whole model is a few calls. What is no sum of tensors, or finds no
room, goes the way of `live`.

The bytes are those of `kernels.Sum`, as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plymix import gpu
from plymix.expr import Leaf, Tensor, changed, leaf_terms
from plymix.images.live import Live, Sources
from plymix.plan import Plan

SPAN = 1 << 24
"""Elements summed at a time: their float64 copies need room, too."""

SPARE = 4 << 30
"""Bytes of the GPU's memory that are left to the pictures."""


@dataclass
class Line:
    """Tensors one after the other: the parameters, and each source's values, as far as read."""

    values: Any  # torch tensor, 1-D
    at: dict[str, int]  # name -> its first element
    stores: dict[tuple[int, str], Any] = field(default_factory=dict)  # (source, dtype) -> tensor
    held: dict[tuple[int, str, str], Leaf] = field(default_factory=dict)  # and name -> what is read


@dataclass(frozen=True)
class Run:
    """Neighbouring tensors of a line with the same coefficients: elements [start, stop)."""

    line: int
    start: int
    stop: int
    terms: tuple[tuple[float, int, str], ...]  # coefficient, source, dtype
    dtype: str


class Resident:
    """As `Live`, with `lines` that hold the parameters on `device`."""

    def __init__(
        self, put: Callable[[Tensor, memoryview], None], lines: Sequence[Line], device: str
    ) -> None:
        self._rest = Live(put)
        self._lines = lines
        self._home = {name: i for i, line in enumerate(lines) for name in line.at}
        self._device = device
        self._sources = Sources()
        self._made: tuple[Tensor, ...] = ()
        self.moved = 0  # bytes made by the last `become`

    def become(self, plan: Plan, tensors: Sequence[Tensor]) -> None:
        """Compute what differs from the last call. Raises Failure; then everything is made anew."""
        tensors = self._sources.numbered(plan, tensors)
        names = set(changed(self._made, tensors))
        self._made = ()
        here: list[Tensor] = []
        rest: list[Tensor] = []
        for tensor in tensors:
            if tensor.name in names:
                (here if self._read(tensor) else rest).append(tensor)
        for run in self._runs(here):
            self._sum(run)
        self._rest.make(self._sources.all, rest)
        self.moved = sum(t.nbytes for t in (*here, *rest))
        self._made = tensors

    def _read(self, tensor: Tensor) -> bool:
        """Bring what a tensor is a sum of to the device. False: it is none, or there is no room."""
        terms = leaf_terms(tensor.expr)
        if not terms or tensor.dtype not in gpu.SUMMED:
            return False
        line = self._lines[self._home[tensor.name]]
        return all(self._held(line, tensor, leaf) for _, leaf in terms)

    def _held(self, line: Line, tensor: Tensor, leaf: Leaf) -> bool:
        import torch

        key = (leaf.source, leaf.info.dtype)
        place = (*key, tensor.name)
        if line.held.get(place) == leaf:
            return True
        if leaf.info.dtype not in gpu.SUMMED or leaf.info.numel != tensor.numel:
            return False
        if key not in line.stores:
            dtype = gpu.torch_dtype(leaf.info.dtype)
            size = line.values.numel() * dtype.itemsize
            if room(self._device) < size + SPARE:
                return False
            line.stores[key] = torch.empty(line.values.numel(), dtype=dtype, device=self._device)
        data = self._sources.all[leaf.source].read(leaf.info)
        at = line.at[tensor.name]
        store = line.stores[key]
        store[at : at + tensor.numel].copy_(torch.frombuffer(data, dtype=store.dtype))
        line.held[place] = leaf
        return True

    def _runs(self, tensors: Sequence[Tensor]) -> Iterator[Run]:
        last: Run | None = None
        for tensor in sorted(tensors, key=self._place):
            number, at = self._place(tensor)
            terms = tuple((c, x.source, x.info.dtype) for c, x in leaf_terms(tensor.expr))
            run = Run(number, at, at + tensor.numel, terms, tensor.dtype)
            if last and (last.line, last.stop, last.terms, last.dtype) == (
                number, at, terms, tensor.dtype,
            ):  # fmt: skip
                last = Run(number, last.start, run.stop, terms, tensor.dtype)
                continue
            if last:
                yield last
            last = run
        if last:
            yield last

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        number = self._home[tensor.name]
        return number, self._lines[number].at[tensor.name]

    def _sum(self, run: Run) -> None:
        line = self._lines[run.line]
        total = gpu.Sum([(c, dtype) for c, _, dtype in run.terms], run.dtype)
        for start in range(run.start, run.stop, SPAN):
            part = slice(start, min(start + SPAN, run.stop))
            inputs = [line.stores[source, dtype][part] for _, source, dtype in run.terms]
            line.values[part].copy_(total(inputs))


def lined_up(module: Any, names: Mapping[str, str], dtype: Any, device: str) -> Line:
    """Give a network's parameters, which are nowhere yet, room in one line on `device`.

    `names` are plymix's names of its parameters. Their values are undefined.
    """
    import torch

    total = sum(module.get_parameter(key).numel() for key in names)
    values = torch.empty(total, dtype=dtype, device=device)
    at, starts = 0, {}
    for key, name in names.items():
        shape = module.get_parameter(key).shape
        starts[name] = at
        view = values[at : at + shape.numel()].view(shape)
        owner, _, leaf = key.rpartition(".")
        setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(view, requires_grad=False))
        at += shape.numel()
    return Line(values, starts)


def room(device: str) -> int:
    """Bytes of memory that a device has left, as far as is known."""
    if device == "cpu":
        return 1 << 62
    import torch

    return int(torch.cuda.mem_get_info(device)[0])
