"""Whether a LoRA file is what its record makes: made once more and compared."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plymix import loras
from plymix.errors import Refusal, listed
from plymix.formats import Source, open_model
from plymix.loras.record import Record
from plymix.loras.work import HASHES

if TYPE_CHECKING:
    from plymix.engine import ProgressCallback

TOLERANCE = 1e-3
"""So much of a module's change may be different, |D - D'| / |D|, and still be what rounding does.

Singular vectors depend in their last digits on the processor and the library of linear algebra, and
on the number of its threads: 1e-6 of a change in float32, 3e-5 in fp16, more where singular values
are nearly equal at the end of what is kept.
"""


def verified(
    path: Path,
    record: Record,
    files: Mapping[str, Path],
    *,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> tuple[bool, str]:
    """Whether the file `path` is what `record` makes of `files`, and in words how it is or is not.

    Files whose numbers differ by no more than rounding does (`TOLERANCE`) are, too, and the words
    say so.
    """
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "again.safetensors"
        loras.remade(record, files, again, threads=threads, progress=progress)
        with open_model(path) as one, open_model(again) as other:
            return _compared(one, other)


def _compared(file: Source, again: Source) -> tuple[bool, str]:
    name, made = file.path.name, "what its record makes"
    if absent := sorted(again.tensors.keys() - file.tensors.keys()):
        return False, f"{name} lacks {listed(absent, 3)}, which its record makes"
    if foreign := sorted(file.tensors.keys() - again.tensors.keys()):
        return False, f"{name} holds {listed(foreign, 3)}, which its record does not make"
    wrong = {key for key in again.tensors if not _same(key, file, again)}
    words = [k for k in {**file.metadata, **again.metadata} if _word(k, file) != _word(k, again)]
    if wrong:  # of them, hashes are what follows
        words = [word for word in words if word not in HASHES]
    if words:
        return False, f"{name} says something else of itself than {made}: {listed(words, 3)}"
    if not wrong:
        if _header(file) != _header(again):
            return False, f"the tensors of {name} are right, its header differs"
        return True, f"{name} is exactly {made} ({len(again.tensors)} tensors)"
    error = _error(wrong, file, again)
    if error is None or not error <= TOLERANCE:
        count = f"{len(wrong)} of {len(again.tensors)} tensors of {name}"
        return False, f"{count} differ from {made}: {listed(sorted(wrong), 3)}"
    return True, (
        f"{name} is {made}, within rounding: its numbers are others, as another processor or"
        f" library of linear algebra gives them, and of no module's change more than {error:.1e}"
        f" is different ({TOLERANCE:g} may be)"
    )


def _word(key: str, source: Source) -> str | None:
    return source.metadata.get(key)


def _header(source: Source) -> bytearray:
    """The bytes before the tensors of a safetensors file."""
    handle, start = source.handles[0], bytearray(8)
    handle.read_at(0, start)
    header = bytearray(8 + int.from_bytes(start, "little"))
    handle.read_at(0, header)
    return header


def _same(key: str, file: Source, again: Source) -> bool:
    one, other = file.tensors[key], again.tensors[key]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return bytes(file.read(one)) == bytes(again.read(other))


def _error(wrong: set[str], file: Source, again: Source) -> float | None:
    """The largest |D - D'| / |D| of the modules that the tensors `wrong` are of.

    None where these do not tell what a module adds, or of another kind.
    """
    from plymix.adapters import change, read
    from plymix.adapters.lowrank import energy

    try:
        pairs = zip(read(file).modules, read(again).modules, strict=True)
        errors: list[float] = []
        for one, other in pairs:
            touched = wrong.intersection(one.keys)
            wrong = wrong - touched
            if touched:
                d: Any = change(again, other)
                errors.append(float(energy(change(file, one) - d) / energy(d)) ** 0.5)
    except (Refusal, ValueError, ZeroDivisionError):
        return None
    return None if wrong else max(errors)
