"""Whether a model file is sound: `check(path)` reads every tensor once and gives a `Health`.

Numbers are judged by their bits. The magnitude bits of a float grow with its size, infinity and
then NaN above all finite ones, so that the largest and the smallest of a chunk, read as integers,
say whether it holds a NaN, an infinity, something too large, or nothing but zeros. Only a chunk
that has such a number is looked at closer.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from plymix import archs, kernels, urls
from plymix.archs import Architecture, Detection
from plymix.archs.model import Names, shared_facts
from plymix.engine import ProgressCallback
from plymix.errors import FormatError, amount, listed, unknown
from plymix.formats import open_model
from plymix.formats.base import BITS, Source, TensorInfo
from plymix.inspection import has_places, paired_or_not, placed
from plymix.pairing import Paired
from plymix.plan import MAX_IDS
from plymix.recipe import DTYPES
from plymix.sweep import sweep

CHUNK = 1 << 20
"""Bytes that a thread reads and judges at a time."""

Severity = Literal["error", "warning", "note"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong with, or should be known of, a file.

    `kind` is "nan", "infinity", "overflow", "zeros", "position_ids", "incomplete", "twice",
    "damaged", "empty", "names", "schedules", "prediction", "vae", "buffers" or "unchecked". `text`
    is a sentence that says what to do. `keys` are all tensors concerned and `elements` how many of
    their numbers.
    """

    severity: Severity
    kind: str
    text: str
    keys: tuple[str, ...] = ()
    elements: int = 0


class Health(msgspec.Struct, frozen=True):
    """What `check` found, errors first."""

    file: str
    title: str  # what the file is, as `inspect` says it; "" for a damaged file
    tensors: int
    nbytes: int  # of tensor data
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """No errors; warnings and notes are allowed."""
        return not any(f.severity == "error" for f in self.findings)

    @property
    def exit_code(self) -> int:
        """Of the command line: 1 for an unhealthy file."""
        return 0 if self.ok else 1

    def to_dict(self) -> dict[str, Any]:
        """The health as dicts, lists, strings and numbers, with `ok`."""
        return {"ok": self.ok, **msgspec.to_builtins(self)}


def check(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    arch: str | os.PathLike[str] = "",
    progress: ProgressCallback | None = None,
) -> Health:
    """Read the whole model file at `path` and judge it.

    With `dtype` ("fp16", "bf16", "fp32") numbers too large for it are errors; without, those too
    large for fp16 are a warning. `arch` is a file that describes an architecture of your own,
    looked for first. A damaged or truncated file is a finding. Raises Refusal when there is no such
    file or dtype, and Cancelled when `progress` returns False.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    name, own = urls.name(urls.given(path, "path")), archs.described(arch)
    try:
        with open_model(path) as source:
            return _health(source, DTYPES[dtype] if dtype else "", own, progress)
    except FormatError as e:
        return Health(name, "", 0, 0, (Finding("error", "damaged", str(e)),))


def _health(
    source: Source, dtype: str, own: Architecture | None, progress: ProgressCallback | None
) -> Health:
    paired = paired_or_not(source, own)
    detection = paired.detection
    from plymix.known_bad import known_bad

    source.expect(source.tensors.values())
    scans = _scanned(source, dtype or "F16", progress)
    buffers = _buffers(source, paired)
    vae = frozenset(
        info.name for info, place in placed(source, paired) if place and place.component == "vae"
    )
    found = [
        *_not_finite(scans, buffers, vae),
        *_too_large(scans, buffers, dtype),
        *_all_zero(scans, buffers, vae, detection),
        *position_ids(source),
        *_missing(source, paired),
        *known_bad(source, paired),
        *_unchecked(source),
    ]
    if not source.tensors:
        found.append(Finding("error", "empty", "no tensor is in the file; fetch it again"))
    found.sort(key=lambda f: ("error", "warning", "note").index(f.severity))
    nbytes = sum(info.nbytes for info in source.tensors.values())
    return Health(source.path.name, detection.title, len(source.tensors), nbytes, tuple(found))


# --- one tensor ---------------------------------------------------------------------------------


class Bits(NamedTuple):
    """A float dtype as integers without the sign bit."""

    signed: str  # numpy's name of the integers that hold it
    largest: int  # the largest finite number
    nan: int  # the smallest NaN; infinity, where there is one, lies between


BITWISE = {
    "F64": Bits("<i8", 0x7FEF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0001),
    "F32": Bits("<i4", 0x7F7F_FFFF, 0x7F80_0001),
    "F16": Bits("<i2", 0x7BFF, 0x7C01),
    "BF16": Bits("<i2", 0x7F7F, 0x7F81),
    "F8_E5M2": Bits("i1", 0x7B, 0x7D),
    "F8_E4M3": Bits("i1", 0x7E, 0x7F),  # no infinity
}
"""IEEE 754 binary64, 32 and 16; bfloat16; OCP 8-bit floating point specification 1.0."""

OVERFLOW = {"F16": 2.0**16 - 2.0**4, "BF16": 2.0**128 - 2.0**119, "F32": 2.0**128 - 2.0**103}
"""The smallest number that rounds to infinity: half a step above the largest finite one."""


def overflow_bits(dtype: str, target: str) -> int:
    """The smallest magnitude of `dtype`, as its bits, that is infinite in `target`.

    Without such a number it is one more than the largest finite one.
    """
    limit, none = OVERFLOW[target], BITWISE[dtype].largest + 1
    if dtype == "F64":
        return int(np.float64(limit).view(np.int64))
    if dtype in ("F32", "BF16") and target != "F32":
        bits = int(np.float32(limit).view(np.int32))
        return min(none, bits if dtype == "F32" else -(-bits >> 16))
    return none


class Scan(NamedTuple):
    """What the elements of a tensor are: counts, and whether all are zero."""

    nan: int = 0
    infinite: int = 0
    large: int = 0  # finite, but not in the target dtype
    zeros: bool = True

    def __add__(self, other: Scan) -> Scan:  # type: ignore[override]
        return Scan(
            self.nan + other.nan,
            self.infinite + other.infinite,
            self.large + other.large,
            self.zeros and other.zeros,
        )


def scan(data: Any, dtype: str, target: str = "F16") -> Scan:
    """Judge a buffer of `dtype`; `large` counts what is finite here and infinite in `target`."""
    signed, largest, nan = BITWISE[dtype]
    x = np.frombuffer(data, signed)
    if not x.size:
        return Scan()
    # The greatest positive number, and the negative one of greatest magnitude (its bits, unsigned,
    # are the largest of all). A side that is not there gives 0 or less.
    mask = int(np.iinfo(x.dtype).max)
    positive, negative = int(x.max()), int(x.view(f"u{x.itemsize}").max()) - mask - 1
    limit = overflow_bits(dtype, target)
    if max(positive, negative) < limit:
        return Scan(zeros=max(positive, negative) <= 0)
    magnitude = x & mask
    not_finite = int(np.count_nonzero(magnitude > largest))
    nans = int(np.count_nonzero(magnitude >= nan))
    large = int(np.count_nonzero(magnitude >= limit)) - not_finite
    return Scan(nans, not_finite - nans, large, False)


def _dense(info: TensorInfo) -> bool:
    """Whether the elements, in whatever order, lie side by side: then order is of no concern."""
    if info.strides is None:
        return True
    pairs = sorted((s, d) for d, s in zip(info.shape, info.strides, strict=True) if d > 1)
    size = 1
    for stride, length in pairs:
        if stride != size:
            return False
        size *= length
    return True


def _halves(info: TensorInfo) -> Iterator[TensorInfo]:
    """A strided tensor in parts that need no more than CHUNK bytes, stored or gathered."""
    assert info.strides is not None
    size = BITS[info.dtype] // 8
    reach = [(d - 1) * max(s, 1) for d, s in zip(info.shape, info.strides, strict=True)]
    if max(sum(reach) + 1, info.numel) * size <= CHUNK:
        yield info
        return
    axis = reach.index(max(reach))
    length, stride = info.shape[axis], info.strides[axis]
    for start, stop in ((0, length // 2), (length // 2, length)):
        shape = (*info.shape[:axis], stop - start, *info.shape[axis + 1 :])
        yield from _halves(replace(info, shape=shape, offset=info.offset + start * stride * size))


class _Scanner:
    """Scans tensors of one file; a buffer per thread, reused."""

    def __init__(self, source: Source, target: str) -> None:
        self.source = source
        self.target = target
        self.stop = threading.Event()
        self._local = threading.local()

    def __call__(self, info: TensorInfo) -> Scan:
        total = Scan()
        for data in self._chunks(info):
            if self.stop.is_set():
                break
            total += scan(data, info.dtype, self.target)
        return total

    def _chunks(self, info: TensorInfo) -> Iterator[Any]:
        if not _dense(info):
            yield from (self.source.read(part) for part in _halves(info))
            return
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(bytearray(CHUNK))
        for at in range(0, info.nbytes, CHUNK):
            part = self._local.buffer[: min(CHUNK, info.nbytes - at)]
            self.source.read_at(info.file, info.offset + at, part)
            yield part


def _scanned(
    source: Source, target: str, progress: ProgressCallback | None
) -> dict[TensorInfo, Scan]:
    """Every float tensor but position ids with its scan, in the file's order."""
    infos = [i for i in source.tensors.values() if i.is_float and i.numel and not _is_ids(i.name)]
    scanner = _Scanner(source, target)
    size = attrgetter("nbytes")
    found = sweep(scanner, infos, size, phase="checking", stop=scanner.stop, progress=progress)
    return dict(found)


# --- findings -----------------------------------------------------------------------------------

Scans = Mapping[TensorInfo, Scan]

_MAY_BE_INFINITE = Names(("*attn_mask",))  # OpenCLIP stores its causal mask: 0 and -infinity
_MAY_BE_ZERO = re.compile(r"bias$|pos_emb|position_emb|positional_emb|pad_token")
"""Names of tensors that training often leaves at the zeros they began with."""


def _buffers(source: Source, paired: Paired) -> frozenset[str]:
    """Keys of what is no weight: schedules, masks, markers."""
    known = Names(shared_facts().unblended)
    return frozenset(
        info.name
        for info, place in placed(source, paired)
        if (place and place.buffer) or info.name in known
    )


def _finding(
    severity: Severity, kind: str, found: Mapping[str, int], what: str, todo: str
) -> Iterator[Finding]:
    """One finding on all of `found` (key -> number of elements), if there are any."""
    if found:
        elements = sum(found.values())
        said = what.format(elements=f"{elements:,}")
        text = f"{amount(len(found))} {said}: {listed(found)}; {todo}"
        yield Finding(severity, kind, text, tuple(found), elements)


TAKE_A_VAE = 'take one whole: --vae FILE in a merge, or vae = "FILE" in a recipe\'s [output]'


def _mend(found: Mapping[str, int], vae: frozenset[str], otherwise: str, so: str = "") -> str:
    """What to do about `found`; a VAE alone can be had from elsewhere."""
    return f"that is its VAE{so}: {TAKE_A_VAE}" if found.keys() <= vae else otherwise


def _not_finite(scans: Scans, buffers: Container[str], vae: frozenset[str]) -> Iterator[Finding]:
    spoilt = "fetch the file again, or make it again from sound models"
    nan = {i.name: s.nan for i, s in scans.items() if s.nan}
    todo = _mend(nan, vae, spoilt)
    yield from _finding("error", "nan", nan, "with NaN ({elements} in all)", todo)
    inf = {
        i.name: s.infinite
        for i, s in scans.items()
        if s.infinite and i.name not in _MAY_BE_INFINITE
    }
    weights = {key: n for key, n in inf.items() if key not in buffers}
    what = "with infinite numbers ({elements} in all)"
    yield from _finding("error", "infinity", weights, what, _mend(weights, vae, spoilt))
    tables = {key: n for key, n in inf.items() if key in buffers}
    todo = "so it is in schedules of zero-terminal SNR; programs make their own, nothing to do"
    yield from _finding("note", "buffers", tables, f"of no weights {what}", todo)


def _too_large(scans: Scans, buffers: Container[str], dtype: str) -> Iterator[Finding]:
    large = {i.name: s.large for i, s in scans.items() if s.large and i.name not in buffers}
    name = next(name for name, d in DTYPES.items() if d == (dtype or "F16"))
    what = f"with numbers that would be infinite in {name} ({{elements}} in all)"
    severity: Severity = "error" if dtype else "warning"
    todo = "write it as bf16 or fp32" if name == "fp16" else "write it as fp32"
    yield from _finding(severity, "overflow", large, what, todo)


def _all_zero(
    scans: Scans, buffers: Container[str], vae: frozenset[str], detection: Detection
) -> Iterator[Finding]:
    """Trained weights are not all zero; parts that an adapter never trained are."""
    zeros = {
        i.name: i.numel
        for i, s in scans.items()
        if s.zeros and i.numel > 1 and i.name not in buffers and not _MAY_BE_ZERO.search(i.name)
    }
    if detection.kind in ("checkpoint", "denoiser", "vae", "text_encoder"):
        todo = "such weights switch their layer off; compare with the model it was made from"
        todo = _mend(zeros, vae, todo, ", which draws grey pictures then")
        yield from _finding("warning", "zeros", zeros, "of zeros only", todo)
    else:
        todo = "they add nothing; an adapter's untrained parts look like this"
        yield from _finding("note", "zeros", zeros, "of zeros only", todo)


def _is_ids(key: str) -> bool:
    return key == "position_ids" or key.endswith(".position_ids")


def position_ids(source: Source) -> Iterator[Finding]:
    """Position ids are 0, 1, 2 ... as int64; blending them as weights gives wrong integers."""
    for key, info in source.tensors.items():
        if not _is_ids(key):
            continue
        if info.numel > MAX_IDS or not (info.is_float or info.dtype in _INTEGERS):
            text = f"{key} is {info.dtype} {list(info.shape)}; expected I64 [1, 77]"
            yield Finding("error", "position_ids", text, (key,))
            continue
        ids = _numbers(source.read(info), info.dtype)
        wrong = [str(i) for i, value in enumerate(ids) if value != i]
        last = len(ids) - 1
        if wrong:
            text = (
                f"{key} ({info.dtype}) is not 0..{last}: wrong at {listed(wrong)}; the text encoder"
                " misplaces these tokens of a prompt; plymix repair puts them right"
            )
            yield Finding("error", "position_ids", text, (key,), len(wrong))
        elif info.dtype != "I64":
            text = (
                f"{key} is {info.dtype}; expected I64. Its values 0..{last} are right, but a tool"
                " that blends or casts it will spoil them; plymix repair puts it right"
            )
            yield Finding("warning", "position_ids", text, (key,))


_INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
             "U16": "<u2", "U32": "<u4", "U64": "<u8"}  # fmt: skip


def _numbers(data: bytearray, dtype: str) -> list[float]:
    if dtype in _INTEGERS:
        return list(np.frombuffer(data, _INTEGERS[dtype]).tolist())
    return list(kernels.float32(data, dtype).tolist())


def _missing(source: Source, paired: Paired) -> Iterator[Finding]:
    """Blocks and components that a model of this architecture has and this file has not."""
    detection = paired.detection
    if not has_places(detection):
        return
    arch = detection.arch
    assert arch is not None
    places = [place for _, place in placed(source, paired) if place]
    there = {place.block for place in places}
    gone = [block for block in arch.blocks if block not in there and _expected(arch, block, there)]
    if gone:
        text = (
            f"{detection.title} without the blocks {listed(gone, 30)}: the file is incomplete;"
            " fetch it again"
        )
        yield Finding("error", "incomplete", text)
    components = {place.component for place in places if not place.buffer}
    lacking = [c.title for c in arch.components if c.name not in components]
    if lacking and detection.kind == "checkpoint":
        text = f"no {' and no '.join(lacking)} in it; programs need one from another file"
        yield Finding("note", "incomplete", text)


def _expected(arch: Architecture, block: str, there: Container[str]) -> bool:
    """Whether every model of `arch` that has the blocks `there` has `block` too.

    All U-Nets of an architecture have one depth. Transformers come in several (SD3.5, Flux lite),
    and the blocks are the deepest one's: there, a later block with the same stem must be present.
    """
    if arch.denoiser.name == "unet":
        return True
    stem = block.rstrip("0123456789")
    later = arch.blocks[arch.blocks.index(block) + 1 :]
    return any(b in there for b in later if b.rstrip("0123456789") == stem)


def _unchecked(source: Source) -> Iterator[Finding]:
    """Numbers that cannot be judged: those of quantised weights and of rare dtypes."""
    scales = dict.fromkeys(archs.quantised(source.tensors), 0)
    todo = "the weights beside them were judged as stored, not as what they stand for"
    yield from _finding("note", "unchecked", scales, "of scales for quantised weights", todo)
    plain = {*_INTEGERS, "BOOL", *BITWISE}
    rare = {i.name: i.numel for i in source.tensors.values() if i.numel and i.dtype not in plain}
    kinds = ", ".join(sorted({source.tensors[key].dtype for key in rare}))
    yield from _finding("note", "unchecked", rare, f"of {kinds}", "plymix does not judge these")
