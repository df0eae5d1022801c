"""Who may import whom, and that the base install never needs torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import plymix
from tiny import write

SOURCE = Path(plymix.__file__).parent

# Rooms from the ground up. A file may import from its own room and from those it names.
GROUND = {"errors", "registry"}
WEB = {"urls", "cache"}
FORMATS = {"errors", "texts", "formats"} | WEB
ARCHS = {"errors", "texts", "archs"}
METHODS = {"errors", "registry", "methods"}
BOTTOM = GROUND | FORMATS | ARCHS | METHODS
BOTTOM |= {"recipe", "weights", "kernels", "hashes", "expr"}
ALLOWED = {
    "errors": set(),
    "urls": {"errors"},
    "outputs": {"errors"},
    "cache": set(),
    "texts": {"errors"},
    "registry": GROUND,
    "formats": FORMATS,
    "archs": ARCHS,
    "methods": METHODS,
    "recipe": GROUND | {"texts", "urls", "weights", "recipe"},
    "weights": {"errors", "texts", "weights"},
    "kernels": {"errors", "kernels"},
    "hashes": FORMATS | {"hashes"},
    "expr": {"errors", "registry", "formats", "expr"},
    "pairing": FORMATS | ARCHS | {"expr", "pairing"},
    "respelling": ARCHS | {"pairing", "respelling"},
    "adapters": BOTTOM | {"pairing", "adapters"},
    "plan": BOTTOM | {"pairing", "respelling", "plan", "adapters"},
    "folder": FORMATS | ARCHS | {"plan", "metadata", "images", "folder"},
    "temporary": {"temporary"},
    "stops": set(),
    "engine": BOTTOM | {"plan", "engine", "gpu", "stops", "temporary", "adapters"},
}
TOP = {"cli", "web"}
"""Imported by nobody but each other and `__main__`."""


def files():
    return sorted(SOURCE.rglob("*.py"))


def room(path):
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports(path):
    """(room, line) of everything in plymix that a file imports, at the top or inside functions.

    Imports for type checkers only are left out, as are names from `plymix` itself that are no room.
    """
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    rooms = {room(p) for p in files()}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "plymix" and len(parts) > 1 and parts[1] in rooms:
                yield parts[1], node.lineno


def top_level(path):
    """Modules that importing the file imports."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    here = room(path)
    for used, line in imports(path):
        if here in ALLOWED:
            assert used in ALLOWED[here], f"{path}:{line}: {here} may not import {used}"
        if used in TOP:
            assert here in TOP | {"__main__"}, f"{path}:{line}: {used} is imported by nobody"


def test_the_check_sees_imports():
    """It would find one: the plan does import the recipe, and from inside a function too."""
    assert {r for r, _ in imports(SOURCE / "plan" / "__init__.py")} >= {
        "archs",
        "errors",
        "formats",
        "recipe",
    }
    tree = ast.parse("def f():\n    from plymix.cli import main\n    import plymix.web\n")
    assert len([n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]) == 2


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_heavy_libraries_wait_until_they_are_used(path):
    heavy = {"torch", "scipy", "ml_dtypes", "diffusers", "optuna", "ray", "starlette"}
    assert not heavy & set(top_level(path))


def test_methods_load_no_more_of_numpy_than_they_use():
    """The compatibility layer loads all of it, which costs a merge 12 MiB."""
    code = """
import sys, numpy as np
from plymix.methods.arrays import namespace
namespace(np.zeros(3), None, np.float32(1))
assert not hasattr(np, "unstack") or not {"numpy.f2py", "numpy.testing"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_formats_and_methods_share_nothing():
    for path in (SOURCE / "methods").rglob("*.py"):
        assert not {r for r, _ in imports(path)} & {"formats", "archs", "plan", "engine", "recipe"}
        assert "open(" not in path.read_text("utf-8"), path
    for folder in ("formats", "archs"):
        for path in (SOURCE / folder).glob("*.py"):
            assert not {r for r, _ in imports(path)} & {"methods", "registry", "plan", "engine"}


WORK = """
import sys
sys.modules["torch"] = None          # any import of it fails
import plymix
loaded = [m for m in sys.modules if m.split(".")[0] in ("numpy", "numkong", "rich", "cyclopts")]
assert not loaded, loaded            # importing does nothing
a, b, out = sys.argv[1:]
plymix.explain(a, b, alpha="GRAD_V")
plymix.inspect(a)
plymix.merge(a, b, out + ".safetensors", alpha="GRAD_V", vae="b", dtype="bf16")
plymix.merge(out + ".safetensors", b, out + ".ckpt", alpha=0.5)
plymix.merge(out + ".ckpt", a, out + "2.safetensors", alpha=0.5)
assert sys.modules["torch"] is None
bad = [m for m in sys.modules if m.split(".")[0] in ("scipy", "ml_dtypes", "safetensors", "pandas")]
assert not bad, bad
"""


def test_no_torch_in_the_base_install(tmp_path):
    files = [write(tmp_path / f"{n}.safetensors", "sd1", i) for i, n in enumerate("ab")]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", WORK, *map(str, files), str(tmp_path / "o")],
        env=os.environ | {"PLYMIX_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
