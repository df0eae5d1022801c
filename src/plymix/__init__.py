"""plymix merges diffusion checkpoints layer by layer.

    import plymix

    with plymix.open("model.safetensors") as model:
        print(len(model.tensors), model.metadata)
    print(plymix.explain("a.safetensors", "b.safetensors", alpha="GRAD_V"))
    plymix.merge("a.safetensors", "b.safetensors", "out.safetensors", alpha="GRAD_V")

Importing it does nothing; each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own costs more than all the rest of this file
if TYPE_CHECKING:
    from typing import Any

    from plymix.api import Explanation, Result, convert, explain, merge, open, two_models
    from plymix.difference import diff
    from plymix.errors import Cancelled, Failure, FormatError, PlymixError, Refusal
    from plymix.expression import Expression, merge_method, model
    from plymix.health import check
    from plymix.importers import import_recipe
    from plymix.inspection import inspect
    from plymix.recipe import Recipe
    from plymix.upkeep import extract, prune, repair

_HOMES = {
    "Cancelled": "errors",
    "Explanation": "api",
    "Expression": "expression",
    "Failure": "errors",
    "FormatError": "errors",
    "PlymixError": "errors",
    "Progress": "engine",
    "Recipe": "recipe",
    "Refusal": "errors",
    "Result": "api",
    "Session": "session",
    "check": "health",
    "convert": "api",
    "diff": "difference",
    "explain": "api",
    "extract": "upkeep",
    "import_recipe": "importers",
    "inspect": "inspection",
    "merge": "api",
    "merge_method": "expression",
    "model": "expression",
    "open": "api",
    "prune": "upkeep",
    "repair": "upkeep",
    "two_models": "api",
}

__all__ = [
    "Cancelled",
    "Explanation",
    "Expression",
    "Failure",
    "FormatError",
    "PlymixError",
    "Progress",
    "Recipe",
    "Refusal",
    "Result",
    "Session",
    "__version__",
    "check",
    "convert",
    "diff",
    "explain",
    "extract",
    "import_recipe",
    "inspect",
    "merge",
    "merge_method",
    "model",
    "open",
    "prune",
    "repair",
    "two_models",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'plymix' has no attribute {name!r}")
    return getattr(import_module(f"plymix.{home}"), name)


def __dir__() -> list[str]:
    return __all__
