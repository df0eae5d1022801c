"""What a LoRA's tensors mean: pure functions of arrays, one file per family.

A family is a way to write a change of a weight W (out, in, ...) in fewer numbers. Its function
takes the factors by name, as float32 arrays in the shapes a file has, and gives either

* the change in rows: a function of a slice of W's rows, whose result is a matrix (rows, in * ...),
  so that a large change is never whole in memory; or
* for a family that depends on W (`on_weight`), the change itself, in W's shape.

The functions are written to the array API, as `plymix.methods` are; there is no file, no key and no
strength here. To add a family, add its file and name it in `_MODULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from plymix.methods import Array

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Rows = Callable[[slice], Array]
"""Rows of a change, as a matrix."""

Size = tuple["int | None", "int | None"]
"""Rows of a weight, and the product of its other dimensions; None: the factors do not tell."""


@dataclass(frozen=True)
class Family:
    """How files spell a family, and what its factors mean.

    `suffixes` are the ends of its tensors' keys and the factor each is; a factor "bias x" is the
    factor x of a change of the module's bias. From the factors' shapes `holds` tells whether they
    are complete and of this family, `fits` whether they can be multiplied, `size` the changed
    weight's size, and `rank` the family's rank, which is 0 where alpha does not scale the change
    (`alpha / rank`). `numbers` are the factors of
    one element that `function` takes as Python numbers. `product` gives the two matrices that the
    change is the product of, for a family where it is: several such changes are one product.
    """

    name: str
    suffixes: Mapping[str, str]
    holds: Callable[[Shapes], bool]
    function: Callable[..., Any]
    size: Callable[[Shapes], Size]
    rank: Callable[[Shapes], int]
    fits: Callable[[Shapes], bool] = lambda shapes: True
    on_weight: bool = False
    numbers: tuple[str, ...] = ()
    product: Callable[..., tuple[Array, Array]] | None = None


def meet(rank: int, down: Shape, mid: Shape | None = None) -> bool:
    """Whether (out, rank), a core (p, q, ...) if there is one, and (q, ...) are a product."""
    return rank == down[0] if mid is None else (rank, down[0]) == mid[:2]


_MODULES = ("lora", "loha", "lokr", "glora", "oft", "ia3", "full")


@cache
def families() -> Mapping[str, Family]:
    """Every family by its name, those with the most telling factors first."""
    found: dict[str, Family] = {}
    for module in _MODULES:
        for family in import_module(f"plymix.adapters.families.{module}").FAMILIES:
            found[family.name] = family
    return found
