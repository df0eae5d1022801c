"""The checkpoints that the benchmarks merge: true keys and shapes, synthetic values.

    python benchmarks/files.py FOLDER GROUP... [--small] [--check]

A file that is there already is left. Values are normal numbers taken from a pool of 16 million,
from a place that depends on the key, so that gigabytes are made at the disk's speed. Files of one
group are fine-tunes of one model: what they share is four times what they do not. `--check` only
tells whether the disk has room.

A process of its own: the runner must stay small (see measure.py), and numpy is not.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from cases import FILES, LORA_RANK, SPARSE
from tiny_checkpoints import NUMPY, UNET, Header, header

from plymix.formats import writer_for
from plymix.formats.base import Entry

POOL = 1 << 24
SPREAD = 0.02  # standard deviation of the weights

Array = np.ndarray[Any, Any]


def pool(seed: int) -> Array:
    """The values a file is made of, as float32."""
    common, own = (np.random.Generator(np.random.Philox(key=s)) for s in (0, seed + 1))
    values = common.standard_normal(POOL, dtype=np.float32)
    values += np.float32(0.25) * own.standard_normal(POOL, dtype=np.float32)
    values *= np.float32(SPREAD)
    return values


def data(key: str, dtype: str, shape: tuple[int, ...], values: Array) -> Iterable[Array]:
    """The bytes of one tensor, in pieces. Integers count 0, 1, 2 ... as position ids do."""
    left = math.prod(shape)
    if dtype[0] == "I":
        yield np.arange(left, dtype=NUMPY[dtype])
        return
    at = zlib.crc32(key.encode()) % POOL
    while left:
        piece = values[at : at + left].astype(NUMPY[dtype], copy=False)
        yield piece
        left -= len(piece)
        at = 0


def write(path: Path, tensors: Header, seed: int, sparse: bool = False) -> None:
    """Write a checkpoint in the format its name says. One that is there already is left.

    Of a sparse one only the header is written: all values are zero, and take no room.
    """
    entries = [Entry(key, dtype, shape) for key, (dtype, shape) in tensors.items()]
    layout = writer_for(path).layout(entries, {})
    if path.exists() and path.stat().st_size == layout.size:
        return
    values = pool(seed) if not sparse else None
    unfinished = path.with_name(f"{path.name}.part")
    with open(unfinished, "w+b", buffering=0) as file:

        def put(at: int, pieces: Iterable[Any]) -> None:
            file.seek(at)
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while view:
                    view = view[file.write(view) :]

        def read_at(at: int, out: Any) -> None:
            file.seek(at)
            file.readinto(out)

        file.truncate(layout.size)
        for at, piece in layout.pieces:
            put(at, [piece])
        for e in entries if values is not None else ():
            put(layout.offsets[e.name], data(e.name, e.dtype, e.shape, values))
        if layout.finish:
            # One checksum reader at a time: `read_at` moves the file's own position.
            for at, piece in list(layout.finish(locked(read_at))):
                put(at, [piece])
    unfinished.replace(path)


def locked(function: Any) -> Any:
    from threading import Lock

    lock = Lock()

    def call(*args: Any) -> Any:
        with lock:
            return function(*args)

    return call


def room(folder: Path, groups: Iterable[str], small: bool) -> int:
    """Bytes that the files of these groups still need, with one result of the largest."""
    missing, largest = 0, 0
    for group in groups:
        for name, tensors, _ in contents(group, small):
            size = sum(Entry("", dtype, shape).nbytes for dtype, shape in tensors.values())
            largest = max(largest, size)
            if group not in SPARSE and not (folder / name).exists():
                missing += size
    return missing + largest


def contents(group: str, small: bool) -> Iterable[tuple[str, Header, int]]:
    """Name, header and seed of each file of a group."""
    arch, dtype, names = FILES[group]
    tensors = header(arch, dtype=dtype, full_width=not small)
    for seed, name in enumerate(names):
        yield name, lora(tensors, dtype) if name.startswith("lora-") else tensors, seed


def lora(model: Header, dtype: str) -> Header:
    """A LoRA of kohya's kind for every linear layer of the U-Net's transformer blocks."""
    found: Header = {}
    for key, (_, shape) in model.items():
        if ".transformer_blocks." in key and key.endswith(".weight") and len(shape) == 2:
            name = key.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
            found[f"lora_unet_{name}.lora_up.weight"] = dtype, (shape[0], LORA_RANK)
            found[f"lora_unet_{name}.lora_down.weight"] = dtype, (LORA_RANK, shape[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the files that the benchmarks merge.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("groups", nargs="+", choices=FILES, metavar="GROUP")
    parser.add_argument("--small", action="store_true", help="small shapes, for a trial")
    parser.add_argument("--check", action="store_true", help="only check that there is room")
    args = parser.parse_args()
    need, free = room(args.folder, args.groups, args.small), shutil.disk_usage(args.folder).free
    if need > free:
        sys.exit(f"{need / 1e9:.0f} GB needed and {free / 1e9:.0f} GB free: name another --folder")
    if args.check:
        return
    for group in args.groups:
        for name, tensors, seed in contents(group, args.small):
            write(args.folder / name, tensors, seed, group in SPARSE)


if __name__ == "__main__":
    main()
