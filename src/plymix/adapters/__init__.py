"""LoRA and its relatives: what a file changes in a model, and by how much.

    adapter = read(open_model("style.safetensors"))
    for module in adapter.modules:          # what the file holds, in any family and spelling
        module.name, module.algorithm, module.rank, module.scale
        change(adapter.source, module)      # as a matrix, for families that need no weight

    names = Names(arch, shapes)             # of a model, by canonical key
    names.find(module)                      # the tensor it is for, or the part of one

`families` holds the mathematics, `files` reads, `names` knows the spellings, `placing` makes the
terms that the plan adds to a model's tensors.
"""

from __future__ import annotations

from typing import Any

from plymix.adapters.families import Family, families
from plymix.adapters.files import MAGNITUDE, Adapter, Module, read
from plymix.adapters.names import Names, Target
from plymix.errors import Refusal
from plymix.formats.base import Source

__all__ = [
    "MAGNITUDE",
    "Adapter",
    "Family",
    "Module",
    "Names",
    "Target",
    "change",
    "factor",
    "families",
    "read",
]


def factor(source: Source, module: Module, name: str) -> Any:
    """One of a module's tensors as a float32 numpy array in the file's shape."""
    from plymix import kernels

    info = module.factors[name]
    return kernels.float32(source.read(info), info.dtype).reshape(info.shape)


def change(source: Source, module: Module) -> Any:
    """What `module` adds to its weight at strength 1: a float32 matrix (rows, all other axes).

    Raises Refusal for a family whose change depends on the weight (`module.on_weight`).
    """
    if module.on_weight:
        raise Refusal(f"{module.name} is {module.algorithm}: what it changes depends on the weight")
    arrays = {name: factor(source, module, name) for name in module.factors}
    return families()[module.family].function(**arrays)(slice(None)) * module.scale
