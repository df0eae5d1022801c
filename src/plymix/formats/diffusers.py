"""diffusers folders: `model_index.json` and a folder per component, each with weights and configs.

Source: what diffusers' and transformers' `save_pretrained` write. A tensor's name is its
component's folder, "/", and its name in the component: `unet/conv_in.weight`. A folder's name has
no slash, so the first one always ends it, whatever the tensor is called. The folder of a single
component (config.json and weights) opens too; its tensors keep their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from plymix.errors import FormatError, Refusal, listed
from plymix.formats import WEIGHTS, open_file, sharded
from plymix.formats.base import Content, Entry, Handle, Layout, Source, joined

name = "diffusers"
MODEL_INDEX = "model_index.json"
CONFIG = "config.json"
MAX_JSON = 1 << 20
MAX_CONFIG = 64 << 20
CONFIGS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of the small files that go along: configurations, vocabularies, templates."""

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""How weight files of a component are called: by diffusers, by transformers, by its older self."""

_FILE = re.compile(rf"({'|'.join(STEMS)})(\.(?P<variant>[^.]+))?\.(?P<kind>safetensors|bin)")
_INDEX = re.compile(
    rf"({'|'.join(STEMS)})\.(?P<kind>safetensors|bin)\.index(\.(?P<variant>[^.]+))?\.json"
)

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""A scheduler's `prediction_type` -> ModelSpec's; others are passed on as they are."""


# ---- reading


class _Weights(NamedTuple):
    variant: str  # "" for the plain ones, "fp16", "non_ema" ...
    kind: str
    file: Path
    sharded: bool


def open_folder(path: Path) -> Source:
    """The model in a folder: a pipeline, one component of it, or shards with one index.

    Plain weights are taken before variants, safetensors before .bin. `Source.configs` has what
    must be written beside the weights; the scheduler's prediction type becomes metadata
    (`modelspec.prediction_type`; `ss_zero_terminal_snr` for rescaled betas). Raises Refusal for a
    folder without a model, FormatError for a damaged one.
    """
    try:
        return _opened(path if path.name not in ("", "..") else path.resolve())
    except OSError as e:
        raise Refusal(f"cannot read the folder {path}: {e.strerror or e}") from None


def _opened(path: Path) -> Source:
    if (path / MODEL_INDEX).is_file():
        return _pipeline(path)
    found = _weights(path)
    if found and (path / CONFIG).is_file():
        part = _open(found[0], path.name)
        return replace(part, path=path, format=name, configs=dict(_configs(path)))
    indices = [p for p in sorted(path.iterdir()) if sharded.INDEX.fullmatch(p.name)]
    if len(indices) == 1:
        return sharded.open_file(indices[0])
    what = f"{len(indices)} indices of shards; name one" if indices else "no model as a folder"
    raise Refusal(
        f"{path} is a folder with {what} ({MODEL_INDEX}, or {CONFIG} beside its weights);"
        " name the model file in it"
    )


def _pipeline(path: Path) -> Source:
    components = _components(path)
    configs = {MODEL_INDEX: path / MODEL_INDEX}
    notes: list[str] = []
    variants: set[str] = set()
    parts: list[tuple[str, Source]] = []
    with ExitStack() as opened:
        for component in components:
            folder = path / component
            if not folder.is_dir():
                notes.append(f"{component} is named in {MODEL_INDEX} and not there")
                continue
            configs.update((f"{component}/{p}", file) for p, file in _configs(folder))
            if found := _weights(folder):
                part = opened.enter_context(_open(found[0], component))
                parts.append((f"{component}/", part))
                notes += (f"{component}: {note}" for note in part.notes)
                variants.update(w.variant for w in found if w.variant != found[0].variant)
            elif (folder / CONFIG).is_file():
                notes.append(f"{component} has a {CONFIG} and no weights")
        if not parts:
            raise FormatError(f"{path.name} has no component with weights: {listed(notes, 3)}")
        if variants:
            notes.append(f"other variants of the weights, not read: {listed(sorted(variants))}")
        if beside := sorted(p.name for p in path.glob("*.safetensors")):
            notes.append(f"beside the components, not read: {listed(beside)}")
        tensors, metadata, handles = joined(parts)
        metadata.update(_predicted(path, components))
        opened.pop_all()
    return Source(path, name, tensors, metadata, tuple(notes), handles=handles, configs=configs)


def _components(path: Path) -> list[str]:
    """The components that `model_index.json` has, in its order."""
    said = _json(path / MODEL_INDEX)
    found = []
    for key, entry in said.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None:
            if not sharded.is_plain(key):
                raise FormatError(f"{MODEL_INDEX} has {key[:80]!r}, which is not a folder's name")
            found.append(key)
    return found


def _weights(folder: Path) -> list[_Weights]:
    """The weights in a component's folder, best first. Raises FormatError for lone shards."""
    found: list[_Weights] = []
    shards = False
    for file in sorted(folder.iterdir()):
        if sharded.SHARD.fullmatch(file.name):
            shards = True
        elif match := _FILE.fullmatch(file.name) or _INDEX.fullmatch(file.name):
            index = file.suffix == ".json"
            found.append(_Weights(match["variant"] or "", match["kind"], file, index))
    if shards and not any(w.sharded for w in found):
        raise FormatError(
            f"{folder.name} has shards and no index of them (*.index.json); fetch it too"
        )
    return sorted(found, key=lambda w: (w.variant, w.kind != "safetensors", w.sharded))


def _open(weights: _Weights, folder: str) -> Source:
    try:
        if weights.sharded:
            return sharded.open_file(weights.file)
        return open_file(weights.file, WEIGHTS)
    except FormatError as e:
        raise FormatError(f"{folder}/{e}") from None  # the same file names are in every folder


def _configs(folder: Path) -> Iterator[tuple[str, Path]]:
    """The small files that belong to a component, by name."""
    for file in sorted(folder.iterdir()):
        index = sharded.INDEX.fullmatch(file.name)
        if file.suffix in CONFIGS and not index and file.is_file():
            if file.stat().st_size > MAX_CONFIG:
                raise FormatError(
                    f"{folder.name}/{file.name} has {file.stat().st_size:,} bytes, too many for a"
                    f" configuration (limit {MAX_CONFIG:,})"
                )
            yield file.name, file


def _predicted(path: Path, components: Sequence[str]) -> dict[str, str]:
    """What the scheduler's configuration says about the model, as metadata."""
    file = path / "scheduler" / "scheduler_config.json"
    if "scheduler" not in components or not file.is_file():
        return {}
    said = _json(file)
    found: dict[str, str] = {}
    kind = said.get("prediction_type")
    if isinstance(kind, str):
        found["modelspec.prediction_type"] = PREDICTIONS.get(kind, kind)
    if said.get("rescale_betas_zero_snr") is True:
        found["ss_zero_terminal_snr"] = "True"  # the name sd-scripts gave it
    return found


def _json(file: Path) -> dict[str, Any]:
    handle = Handle(file)
    try:
        if handle.size > MAX_JSON:
            raise FormatError(f"{file.name} has {handle.size:,} bytes (limit {MAX_JSON:,})")
        return sharded.parsed(handle.head(handle.size), file.name)
    finally:
        handle.close()


# ---- writing


@dataclass(frozen=True)
class Folder:
    """A folder to be written: weight files by their path in it, and the other files."""

    files: Sequence[tuple[str, Layout]]
    others: Mapping[str, Content]


def layout_folder(
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    configs: Mapping[str, Content],
    *,
    limit: int = 0,
    variant: str = "",
) -> Folder:
    """The files of a diffusers folder whose tensors are `entries` (named `component/tensor`).

    `configs` are the other files by their path in the folder: `model_index.json` and for each
    component its `config.json`; where no name has a component they are one component's own.
    The layouts' offsets are by the entries' names. `limit` is the most bytes of tensors per file
    (0: any). The configs of components that have no tensors are kept: tokenizers, the scheduler.
    Raises Refusal where a config is missing that loaders need.
    """
    by_component: dict[str, list[Entry]] = {}
    for e in entries:
        component, slash, inner = e.name.partition("/")
        place, inner = (component, inner) if slash else ("", e.name)
        by_component.setdefault(place, []).append(replace(e, name=inner))
    if "" in by_component and len(by_component) > 1:
        lost = [e.name for e in by_component[""]]
        raise Refusal(
            f"{listed(lost, 3)} are in no component, so there is no place for them in a"
            " diffusers folder"
        )
    if "" not in by_component and MODEL_INDEX not in configs:
        raise Refusal(f"a diffusers folder needs a {MODEL_INDEX}; none is given")
    metadata = {**metadata, "format": "pt"}  # without it the loaders refuse the files
    files: list[tuple[str, Layout]] = []
    others: dict[str, Content] = dict(configs)
    for component, group in by_component.items():
        folder = f"{component}/" if component else ""
        stem = _stem(folder, configs)
        size = limit or max(1, sum(e.nbytes for e in group))
        shards = sharded.layout_shards(group, metadata, size, stem, variant)
        for file, layout in shards.files:
            offsets = {folder + key: at for key, at in layout.offsets.items()}
            files.append((folder + file, replace(layout, offsets=offsets)))
        others.update((folder + file, text) for file, text in shards.others.items())
    return Folder(files, others)


def _stem(folder: str, configs: Mapping[str, Content]) -> str:
    """How the component's loader wants its weights called; its config tells whose it is."""
    content = configs.get(folder + CONFIG)
    if content is None:
        raise Refusal(f"{folder}{CONFIG} is missing; without it nothing can load {folder or 'it'}")
    said = _json(content) if isinstance(content, Path) else sharded.parsed(content, folder + CONFIG)
    return STEMS[0] if "_class_name" in said else STEMS[1]
