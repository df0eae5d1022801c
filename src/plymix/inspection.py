"""What a model file is, told from its header alone: `inspect(path)` gives a `Report`.

Any file that can be read is reported on, LoRAs, VAEs and unknown ones too; nothing is refused for
being unfit for a merge. Only hashes read tensor data, and only when asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from plymix import archs, pairing, urls
from plymix.archs import Architecture, Detection, Place, Prediction
from plymix.errors import Refusal
from plymix.formats import open_model
from plymix.formats.base import BITS, Entry, Source, TensorInfo
from plymix.pairing import Paired

if TYPE_CHECKING:
    from plymix.recipe import Recipe

OLD = range(0x100000, 0x110000)
"""The bytes of a file that A1111's old short hash is of."""

BRIEF = 100
"""Characters of a metadata value that people are shown."""

KEYS_SHOWN = 10
"""How many unknown keys a report names."""


class Amount(msgspec.Struct, frozen=True):
    """A group of tensors. `parameters` leaves out buffers (position ids, schedules, markers)."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    dtypes: dict[str, int] = {}  # dtype -> tensors, the most frequent first


class Component(Amount, frozen=True, kw_only=True):
    """A part of the file: the U-Net, a text encoder, the VAE, EMA weights, the LoRA itself ..."""

    name: str
    title: str


class Block(Amount, frozen=True, kw_only=True):
    """One merge block, in the architecture's order; then BASE, VAE, EMA and BUFFER."""

    name: str


class Unknown(msgspec.Struct, frozen=True):
    """Keys that the file's architecture does not know: how many, and the first ten."""

    count: int
    keys: tuple[str, ...]


class Hashes(msgspec.Struct, frozen=True):
    """Names by which the field's tools know a file; None where the format has no such hash.

    `sha256` is of the whole file (of several: see `hashes.model_sha256`) and `autov2` its first 10
    digits; `autov1` is A1111's old short hash. `sshs_model_hash` is of a safetensors file's data
    without its header, and `autov3` its first 12 digits; `sshs_legacy_hash` is what kohya's
    sd-scripts write by that name. `tensors` is `tensors_hash`: the same for
    equal tensors in any file.
    """

    sha256: str
    autov1: str | None
    autov2: str | None
    autov3: str | None
    sshs_model_hash: str | None
    sshs_legacy_hash: str | None
    tensors: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a header says. Sizes are in bytes; `to_dict` is ready for JSON."""

    file: str  # name without folder
    path: str
    size: int
    format: str
    root: str  # what the tensors were nested under in a pickle ("state_dict"), or ""
    title: str  # for people: "SD1 inpainting checkpoint"
    architecture: str  # "sd1", or "" for what cannot be merged as a model
    variant: str
    kind: str
    dialect: str  # "" for the architecture's own names, else whose they are
    total: Amount
    components: tuple[Component, ...]
    blocks: tuple[Block, ...]
    ema: Amount
    prediction: Prediction
    zero_terminal_snr: bool  # by a marker tensor, or by `ss_zero_terminal_snr`
    markers: dict[str, str]  # tensor -> what it says
    quantised: int  # tensors that are scales and tables of quantised weights
    unknown: Unknown
    strided: int  # tensors whose elements do not lie one after the other
    tied: int  # tensors that share their bytes with another
    metadata: dict[str, str]
    recipe: tuple[str, ...]  # the plymix recipe it carries, as formulas, one per line
    webui_recipe: tuple[str, ...]  # `sd_merge_recipe` and `sd_merge_models`, in words
    hashes: Hashes | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers."""
        return dict(msgspec.to_builtins(self))

    @property
    def brief_metadata(self) -> dict[str, str]:
        """The metadata as one printable line of at most 100 characters per key."""
        return {_brief(key): _brief(value) for key, value in self.metadata.items()}


def inspect(
    path: str | os.PathLike[str], *, hashes: bool = False, arch: str | os.PathLike[str] = ""
) -> Report:
    """Report on the model file at `path` from its header; with `hashes`, read all of it too.

    `arch` is a file that describes an architecture of your own. Raises Refusal or FormatError when
    it is no readable model file, or when the description is wrong.
    """
    described = archs.described(arch)
    with open_model(path) as source:
        return _report(source, hashes, described)


def _report(source: Source, hashed: bool, own: Architecture | None) -> Report:
    paired = paired_or_not(source, own)
    detection = paired.detection
    rows = list(placed(source, paired))
    total = _amount(rows)
    formulas, notes = _own_recipe(source.metadata)
    arch = detection.arch
    return Report(
        file=source.path.name,
        path=urls.text(source.path),
        size=source.nbytes,
        format=source.format,
        root=source.root,
        title=detection.title,
        architecture=arch.name if arch else "",
        variant=detection.variant,
        kind=detection.kind,
        dialect=paired.dialect or detection.dialect,
        total=total,
        components=tuple(_components(rows, detection)),
        blocks=tuple(_blocks(rows, detection)) if has_places(detection) else (),
        ema=_amount(row for row in rows if row[1] and row[1].component == "ema"),
        prediction=_prediction(source, detection),
        zero_terminal_snr=archs.zero_terminal_snr(source.tensors, source.metadata),
        markers=archs.markers(source.tensors),
        quantised=len(archs.quantised(source.tensors)),
        unknown=_unknown(rows, detection),
        strided=sum(info.strides is not None for info, _ in rows),
        tied=_tied(source.tensors.values()),
        metadata=dict(source.metadata),
        recipe=formulas,
        webui_recipe=_webui_recipe(source.metadata),
        hashes=_hashes(source, paired) if hashed else None,
        notes=(*source.notes, *notes),
    )


# --- groups of tensors --------------------------------------------------------------------------

Row = tuple[TensorInfo, "Place | None"]


def paired_or_not(source: Source, own: Architecture | None = None) -> Paired:
    """The file's tensors paired with its architecture's; by their own names where that fails."""
    try:
        return pairing.pair(source, own=own)
    except Refusal:
        return pairing.unpaired(source, own)


def has_places(detection: Detection) -> bool:
    """Whether the file's architecture says where each of its keys belongs: it is a model."""
    return (
        detection.arch is not None
        and detection.kind in ("checkpoint", "denoiser")
        and not detection.dialect
    )


def placed(source: Source, paired: Paired) -> Iterator[Row]:
    """Every tensor with its place; None for unknown keys and for files that are no model."""
    known = has_places(paired.detection)
    for key, info in source.tensors.items():
        yield info, paired.place(key) if known else None


def _amount(rows: Iterable[Row]) -> Amount:
    tensors = parameters = nbytes = 0
    dtypes: Counter[str] = Counter()
    for info, place in rows:
        tensors += 1
        parameters += 0 if place and place.buffer else info.numel
        nbytes += info.nbytes
        dtypes[info.encoding or info.dtype] += 1
    return Amount(tensors, parameters, nbytes, dict(dtypes.most_common()))


def _components(rows: list[Row], detection: Detection) -> Iterator[Component]:
    """The architecture's own components first; a file of another kind is one component."""
    if not has_places(detection):
        amount = _amount(rows)
        yield Component(*_fields(amount), name=detection.kind, title=detection.title)
        return
    assert detection.arch is not None
    titles = {c.name: c.title for c in detection.arch.components}
    titles |= {"ema": "EMA weights", "extra": "buffers and markers", "": "unknown keys"}
    grouped: dict[str, list[Row]] = {name: [] for name in titles}
    for row in rows:
        grouped[row[1].component if row[1] else ""].append(row)
    for name, group in grouped.items():
        if group:
            yield Component(*_fields(_amount(group)), name=name, title=titles[name])


def _blocks(rows: list[Row], detection: Detection) -> Iterator[Block]:
    assert detection.arch is not None
    grouped: dict[str, list[Row]] = {name: [] for name in detection.arch.blocks}
    for row in rows:
        if row[1]:
            grouped.setdefault(row[1].block, []).append(row)
    for name, group in grouped.items():
        if group:
            yield Block(*_fields(_amount(group)), name=name)


def _fields(amount: Amount) -> tuple[int, int, int, dict[str, int]]:
    return amount.tensors, amount.parameters, amount.nbytes, amount.dtypes


def _unknown(rows: list[Row], detection: Detection) -> Unknown:
    """A file of unknown kind has nothing but unknown keys; a LoRA or VAE file has none."""
    whole = detection.kind == "unknown"
    keys = [info.name for info, place in rows if whole or (has_places(detection) and not place)]
    return Unknown(len(keys), tuple(keys[:KEYS_SHOWN]))


def _tied(infos: Iterable[TensorInfo]) -> int:
    """Tensors that begin at the same byte as another one."""
    starts = Counter((info.file, info.offset) for info in infos if info.numel)
    return sum(n for n in starts.values() if n > 1)


def _prediction(source: Source, detection: Detection) -> Prediction:
    """As declared; convention speaks of models only."""
    said = archs.prediction(source.tensors, source.metadata, detection.arch)
    if said.told == "convention" and not has_places(detection):
        return Prediction("", "unknown")
    return said


# --- what the metadata says ---------------------------------------------------------------------


def _brief(text: str) -> str:
    line = "".join(c if c.isprintable() else " " for c in text[: 2 * BRIEF])
    return line if len(text) <= BRIEF else line[: BRIEF - 3] + "..."


def formulas(found: Recipe) -> tuple[str, ...]:
    """A recipe as one line per step, with file names: 'mix = weighted_sum(a.ckpt, alpha=0.5)'."""
    files = {name: urls.name(model.file) for name, model in found.models.items()}
    lines = []
    for name in found.order():
        step = found.steps[name]
        given = [files.get(i, i) for i in step.inputs if i]
        given += [f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in step.params.items()]
        given += [f"rules={list(step.rules)}"] if step.rules else []
        given += [f"seed={step.seed}"] if step.seed else []
        lines.append(f"{name} = {step.method}({', '.join(given)})")
    final = files.get(found.final, found.final)
    settings = msgspec.to_builtins(found.output)
    if isinstance(settings.get("arch"), dict):  # a description, which is long
        settings["arch"] = settings["arch"].get("name", "")
    others = (f"{k}={v}" for k, v in settings.items() if k not in ("from_", "file", "title"))
    return (*lines, " ".join(["output", "=", final, *others]))


def _own_recipe(metadata: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(formulas, notes) of the recipe that a result of plymix carries."""
    if not any(key.startswith("plymix.") for key in metadata):
        return (), ()  # what follows loads every merge method
    from plymix import recipe

    text = metadata.get(recipe.METADATA_KEY)
    if text is None:
        return (), ()
    try:
        return formulas(recipe.from_json(text)), ()
    except Refusal as e:
        return (), (f"its plymix recipe cannot be read: {e}",)


def _webui_recipe(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """A1111's and supermerger's recipe in words, and the models it names.

    Field names as in AUTOMATIC1111's `modules/extras.py` (run_modelmerger, add_merge_recipe).
    """
    said = json_object(metadata.get("sd_merge_recipe"))
    models = json_object(metadata.get("sd_merge_models"))
    names = {key: str(m.get("name", key)) for key, m in models.items() if isinstance(m, dict)}
    lines = []
    if said:
        hashed = (said.get(f"{n}_model_hash") for n in ("primary", "secondary", "tertiary"))
        of = [names.get(str(h), str(h)[:10]) for h in hashed if h]
        what = str(said.get("interp_method") or said.get("mode") or said.get("type") or "merge")
        by = f", multiplier {said['multiplier']}" if "multiplier" in said else ""
        lines.append(_brief(f"{what} of {', '.join(of) or 'unnamed models'}{by}"))
    lines += [_brief(f"made from {name} ({key[:10]})") for key, name in names.items()]
    return tuple(lines)


def json_object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# --- hashes -------------------------------------------------------------------------------------


def _hashes(source: Source, paired: Paired) -> Hashes:
    from concurrent.futures import ThreadPoolExecutor

    from plymix import hashes

    path = source.files[0]
    alone = len(source.files) == 1
    with ThreadPoolExecutor(3) as pool:
        whole = pool.submit(hashes.model_sha256, source.files)
        data = None
        if source.format == "safetensors":
            length = bytearray(8)
            source.read_at(0, 0, length)
            start = 8 + int.from_bytes(length, "little")
            data = pool.submit(hashes.data_sha256, path, start)
        plain = not any(info.encoding for info in source.tensors.values())
        tensors = tensors_hash(source, paired)
        model_hash = data.result() if data else None
        return Hashes(
            sha256=whole.result(),
            autov1=hashes.legacy_hash(path) if alone else None,
            autov2=whole.result()[:10] if alone else None,
            autov3=model_hash[:12] if model_hash else None,
            sshs_model_hash=model_hash,
            sshs_legacy_hash=sshs_legacy_hash(source) if alone and data and plain else None,
            tensors=tensors,
        )


def sshs_legacy_hash(source: Source) -> str:
    """The old short hash of the file as sd-scripts save it: `ss_*` metadata alone, 8 hex digits.

    The safetensors library puts larger dtypes first and sorts by name within one; the hash is of
    64 KiB at offset 1 MiB (sd-scripts: library/train_util.py, precalculate_safetensors_hashes).
    """
    from plymix.formats import safetensors

    sizes = {dtype: at for at, dtype in enumerate(BITS)}  # in the library's order
    infos = sorted(source.tensors.values(), key=lambda i: (-sizes[i.dtype], i.name))
    metadata = {key: text for key, text in source.metadata.items() if key.startswith("ss_")}
    entries = [Entry(i.name, i.dtype, i.shape) for i in infos]
    layout = safetensors.layout(entries, metadata)
    digest = hashlib.sha256()
    ((_, header),) = layout.pieces
    digest.update(header[OLD.start : OLD.stop])
    for info in infos:
        at = layout.offsets[info.name]
        start, stop = max(OLD.start, at), min(OLD.stop, at + info.nbytes)
        if start < stop:
            part = bytearray(stop - start)
            source.read_at(info.file, info.offset + start - at, part)
            digest.update(part)
    return digest.hexdigest()[:8]


def tensors_hash(source: Source, paired: Paired) -> str:
    """A hash of the tensors that does not depend on format, layout, order, spelling or metadata.

    SHA-256 over one line per tensor, lines sorted by their bytes. A line is a compact ASCII JSON
    list `[key, dtype, shape, digest]` and a newline: the key in its architecture's canonical
    spelling (as it stands, where there is none), the safetensors name of the dtype, the shape as a
    list, and the SHA-256 of the elements as row-major little-endian bytes, lower-case hex.
    """
    arch = paired.detection.arch if has_places(paired.detection) else None
    buffer = memoryview(bytearray(1 << 20))
    source.expect(source.tensors.values())
    lines = []
    alone = (*paired.unpaired, *(key for keys in paired.left_out.values() for key in keys))
    for key, info in (*paired.tensors.items(), *((key, source.tensors[key]) for key in alone)):
        place = arch.place(key) if arch else None
        row = [place.key if place else key, info.dtype, info.shape, _digest(source, info, buffer)]
        lines.append(json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n")
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def _digest(source: Source, info: TensorInfo, buffer: memoryview) -> str:
    if info.strides is not None or info.parts:
        return hashlib.sha256(source.read(info)).hexdigest()
    digest = hashlib.sha256()
    for at in range(0, info.nbytes, len(buffer)):
        part = buffer[: min(len(buffer), info.nbytes - at)]
        source.read_at(info.file, info.offset + at, part)
        digest.update(part)
    return digest.hexdigest()
