"""The two icon sets: fetched by npm, drawn by resvg, kept as one file of pixels."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from captions import Concept, concepts
from plymix.engine.files import write_whole as write
from plymix.errors import Failure, Refusal
from settings import Settings, needed

SETS = {"A": ("noto", "1.2.9"), "B": ("fluent-emoji-flat", "1.2.6")}
"""A style's package `@iconify-json/NAME` and its version."""

DRAWN = "icons.npz"


class Icons(NamedTuple):
    """Each concept's icon in both styles: uint8 [2, concepts, 4, size, size], RGB times alpha."""

    concepts: list[Concept]
    pixels: Any


def load(work: Path, settings: Settings, given: Path | None, report: Any) -> Icons:
    """The icons of a run: those of `work` where they are drawn already, else drawn into it.

    `given` is a folder with the packages (as npm saves or unpacks them) or with a drawn file.
    Raises Refusal or Failure.
    """
    if (work / DRAWN).is_file():
        return _read(work / DRAWN)
    if given is not None and (given / DRAWN).is_file():
        return _keep(work, _only(_read(given / DRAWN), settings))
    if given is not None:
        sets = {style: _package(given, name) for style, (name, _) in SETS.items()}
    else:
        with tempfile.TemporaryDirectory() as name:
            fetched = Path(name)
            _fetch(fetched)
            sets = {style: _package(fetched, name) for style, (name, _) in SETS.items()}
    known = set(sets["A"][0]["icons"]) & set(sets["B"][0]["icons"])
    try:
        chosen = concepts(known, sets["A"][1]["categories"], settings.concepts, settings.most)
    except ValueError as e:
        raise Failure(str(e)) from None
    return _keep(work, Icons(chosen, _drawn(sets, chosen, settings.size, report)))


def _keep(work: Path, icons: Icons) -> Icons:
    """Write them where a run finds them."""
    data = io.BytesIO()
    table = json.dumps([[c.name, list(c.words)] for c in icons.concepts])
    np.savez_compressed(data, pixels=icons.pixels, concepts=np.array(table))
    write(work / DRAWN, data.getvalue())
    return icons


def _only(icons: Icons, settings: Settings) -> Icons:
    """The concepts that the settings ask for, of those that were drawn. Raises Failure."""
    where = {concept.name: i for i, concept in enumerate(icons.concepts)}
    try:
        chosen = (
            concepts(where, {}, "core", settings.most)
            if settings.concepts == "core"
            else icons.concepts[: settings.most or None]
        )
    except ValueError as e:
        raise Failure(str(e)) from None
    return Icons(chosen, icons.pixels[:, [where[concept.name] for concept in chosen]])


def _read(path: Path) -> Icons:
    with np.load(path, allow_pickle=False) as file:
        table = json.loads(str(file["concepts"]))
        return Icons([Concept(name, tuple(words)) for name, words in table], file["pixels"])


def _fetch(folder: Path) -> None:
    """Both packages, by npm's ordinary client. Raises Refusal without npm, Failure offline."""
    npm = shutil.which("npm")
    if npm is None:
        raise Refusal("npm is needed for the two icon packages; or name a folder with --icons")
    wanted = [f"@iconify-json/{name}@{version}" for name, version in SETS.values()]
    done = subprocess.run(
        [npm, "pack", "--silent", *wanted], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise Failure(f"npm pack {' '.join(wanted)}: {' '.join(last)}; or name a folder: --icons")


def _package(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(icons.json, metadata.json) of a package in `folder`: npm's archive, or unpacked."""
    found: list[dict[str, Any]] = []
    archive = next(folder.glob(f"iconify-json-{name}-*.tgz"), None)
    for file in ("icons.json", "metadata.json"):
        if archive is not None:
            with tarfile.open(archive) as tar:
                member = tar.extractfile(f"package/{file}")
                assert member is not None, f"{archive} has no {file}"
                found.append(json.load(member))
            continue
        path = next((p for p in (folder / name / file, folder / "@iconify-json" / name / file)
                     if p.is_file()), None)  # fmt: skip
        if path is None:
            raise Refusal(
                f"{folder} has neither {DRAWN} nor iconify-json-{name}-*.tgz nor {name}/{file}"
            )
        found.append(json.loads(path.read_text("utf-8")))
    return found[0], found[1]


def _drawn(
    sets: Mapping[str, tuple[dict[str, Any], dict[str, Any]]],
    chosen: list[Concept],
    size: int,
    report: Any,
) -> Any:
    made = np.zeros((2, len(chosen), 4, size, size), np.uint8)
    start, done, total = time.monotonic(), 0, 2 * len(chosen)
    for s, (icons, _) in enumerate(sets.values()):
        for i, concept in enumerate(chosen):
            made[s, i] = draw(svg(icons, concept.name), size)
            done += 1
            report("drawing", done / total, (time.monotonic() - start) / done * (total - done))
    return made


def svg(icons: Mapping[str, Any], name: str) -> str:
    """An icon of an Iconify set as an SVG file's text."""
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, usual))
        for key, usual in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def draw(text: str, size: int) -> Any:
    """An SVG's pixels: uint8 [4, size, size], RGB multiplied by alpha, and alpha."""
    from PIL import Image

    resvg = needed("resvg_py")
    png = resvg.svg_to_bytes(svg_string=text, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        rgba = np.asarray(image.convert("RGBA").resize((size, size)), np.float32)
    rgba = rgba.transpose(2, 0, 1)
    rgba[:3] *= rgba[3:] / 255
    return rgba.round().astype(np.uint8)
