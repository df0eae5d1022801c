"""Small checkpoints with the true key names of real ones.

    python scripts/tiny_checkpoints.py OUTDIR                 one SD1 checkpoint
    python scripts/tiny_checkpoints.py OUTDIR --arch sdxl --pair

A header is a golden one (tests/golden/headers) with every width divided by 32 or 40: the same
tensors in the same order and ranks, in 1 to 5 MB. Values are random, drawn per key from
(seed, key), so they do not depend on what else is in the file.

Nothing here uses plymix: names, bytes and files are an independent reference for its tests.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Array = np.ndarray[Any, Any]
Header = dict[str, tuple[str, Shape]]
State = dict[str, Array]

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "headers"
UNET, TEXT, NAI = (
    "model.diffusion_model.",
    "cond_stage_model.transformer.text_model.",
    "text_model.",
)
INPUT_CHANNELS = {"base": 4, "inpainting": 9, "pix2pix": 8, "depth": 5}
MARKERS: Header = {"v_pred": ("F32", (0,)), "ztsnr": ("F32", (0,))}

# How numpy holds each dtype; bfloat16 and float8 as their bits.
NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip


@cache
def golden(name: str) -> dict[str, tuple[str, Shape, str, str]]:
    """The true header of a model: key -> (dtype, shape, component, block)."""
    raw = json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))
    return {key: (d, tuple(s), component, block) for key, (d, s, component, block) in raw.items()}


def narrow(n: int) -> int:
    """A width made small: 320 -> 8, 768 -> 24, 1024 -> 32; sums of widths stay sums.

    Short dimensions (kernels, channels), 77 positions and 1000 steps stay; 49408 tokens become 64.
    """
    exact = {49408: 64, 2048: 768 // 32 + 1280 // 40, 2816: 1280 // 40 + 1536 // 32}
    if n in exact:
        return exact[n]
    if n < 64 or n in (77, 1000):
        return n
    return n // 40 if n % 320 == 0 else max(1, n // 32)


def header(
    arch: str = "sd1",
    variant: str = "base",
    *,
    dtype: str | None = "F16",
    ema: bool = False,
    nai: bool = False,
    bare: bool = False,
    markers: tuple[str, ...] = (),
    full_width: bool = False,
) -> Header:
    """The header of a small model: key -> (dtype, shape), in the order of the real one.

    `arch` is a golden header's name, also as "sd1-inpainting", "sd1-pix2pix". `dtype` is for all
    floating tensors but the schedule's (None: as in the golden header). `ema` adds EMA weights;
    `nai` spells the SD1 text encoder as NovelAI's files do; `bare` gives the denoiser alone,
    without prefix; `markers` are names of MARKERS; `full_width` keeps the true shapes.
    """
    base, _, suffix = arch.rpartition("-")
    if suffix in INPUT_CHANNELS and base:
        arch, variant = base, suffix
    out: Header = {}
    for key, (true_dtype, shape, component, _) in golden(arch).items():
        kept = component == "schedule" or true_dtype == "I64" or dtype is None
        small = shape if full_width else tuple(map(narrow, shape))
        out[key] = (true_dtype if kept else str(dtype), small)
    first = UNET + "input_blocks.0.0.weight"
    if variant != "base":
        kind, (width, _, *kernel) = out[first]
        out[first] = (kind, (width, INPUT_CHANNELS[variant], *kernel))
    if ema:
        out |= {ema_name(key): out[key] for key in list(out) if key.startswith(UNET)}
        out |= {"model_ema.decay": ("F32", ()), "model_ema.num_updates": ("I32", ())}
    if nai:
        out = {k.replace(TEXT, TEXT.removesuffix(NAI)): v for k, v in out.items()}
    if bare:
        parts = {"unet", "transformer"}
        own = [k for k, row in golden(arch).items() if row[2] in parts]
        out = {key.removeprefix(UNET): out[key] for key in own}
    return out | {name: MARKERS[name] for name in markers}


def ema_name(key: str) -> str:
    """'model.diffusion_model.out.0.bias' -> 'model_ema.diffusion_modelout0bias'."""
    return "model_ema." + "".join(key.split(".")[1:])


def state(header: Header, seed: int = 0) -> State:
    """Values for a header: normal with standard deviation 0.02 (norm weights around 1).

    position_ids are 0..76; other integers small. bfloat16 and float8 come as their bits.
    """
    return {key: _values(key, dtype, shape, seed) for key, (dtype, shape) in header.items()}


def _values(key: str, dtype: str, shape: Shape, seed: int) -> Array:
    if key.endswith("position_ids"):
        return np.arange(math.prod(shape), dtype=NUMPY[dtype]).reshape(shape)
    rng = np.random.Generator(np.random.Philox(key=(seed << 32) | zlib.crc32(key.encode())))
    if dtype[0] in "IUB":
        return rng.integers(0, 2 if dtype == "BOOL" else 100, shape).astype(NUMPY[dtype])
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    if "norm" in key and key.endswith(".weight"):
        values += 1
    return encode(values, dtype)


def encode(values: Array, dtype: str) -> Array:
    """float32 values in `dtype`, rounded to nearest even (float8: see `_nearest`)."""
    values = np.asarray(values, dtype=np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32).astype(np.uint64)
        rounded: Array = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype(NUMPY[dtype])
    if dtype.startswith("F8"):
        return _nearest(values, float8_values(dtype))
    return values.astype(NUMPY[dtype])


@cache
def float8_values(dtype: str) -> Array:
    """The float32 value of each of the 256 bytes; NaN where it is none (OFP8, 2023)."""
    mantissa = 3 if dtype == "F8_E4M3" else 2
    bias = 7 if dtype == "F8_E4M3" else 15
    code = np.arange(128)
    exponent, fraction = code >> mantissa, (code & (2**mantissa - 1)) / 2**mantissa
    values = np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias)
    )
    values[127 if dtype == "F8_E4M3" else 124 :] = np.nan
    if dtype == "F8_E5M2":
        values[124] = np.inf
    return np.concatenate([values, -values]).astype(np.float32)


def _nearest(values: Array, table: Array) -> Array:
    """The byte whose value is nearest; a tie goes to the even byte."""
    steps = table[np.isfinite(table) & ~np.signbit(table)]
    size = np.abs(values)
    up = np.clip(np.searchsorted(steps, size), 1, len(steps) - 1)
    below, above = size - steps[up - 1], steps[up] - size
    code: Array = np.where((above < below) | ((above == below) & (up % 2 == 0)), up, up - 1)
    code = code + 128 * np.signbit(values)
    return code.astype(np.uint8)


def decode(values: Array, dtype: str) -> Array:
    """What `encode` gave, as float32 (integers stay as they are)."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype.startswith("F8"):
        return float8_values(dtype)[values]
    return values if dtype[0] in "IUB" else values.astype(np.float32)


def to_bytes(
    header: Header, state: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A safetensors file: 8 bytes of header length, JSON padded to 8, data in header order."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data: list[bytes] = []
    at = 0
    for key, (dtype, shape) in header.items():
        raw = np.ascontiguousarray(state[key], dtype=NUMPY[dtype]).tobytes()
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        data.append(raw)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def write_safetensors(
    path: Path,
    header: Header,
    state: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a safetensors file and give its path."""
    path.write_bytes(to_bytes(header, state, metadata))
    return path


def read_safetensors(path: Path) -> tuple[Header, State, dict[str, str]]:
    """The header, values (as `state` gives them) and metadata of a safetensors file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:start])
    metadata = table.pop("__metadata__", {})
    header = {k: (e["dtype"], tuple(e["shape"])) for k, e in table.items()}
    values: State = {}
    for key, entry in table.items():
        begin, end = (start + n for n in entry["data_offsets"])
        values[key] = np.frombuffer(raw[begin:end], NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return header, values, metadata


def write(path: Path, arch: str = "sd1", seed: int = 0, **options: Any) -> Path:
    """Make a small checkpoint and write it: `header`, `state` and `write_safetensors` in one."""
    made = header(arch, **options)
    return write_safetensors(path, made, state(made, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write small checkpoints with real key names.")
    parser.add_argument("folder", type=Path, metavar="OUTDIR")
    parser.add_argument(
        "--arch", default="sd1", help="sd1, sd1-inpainting, sd2, sdxl, flux-dev, ..."
    )
    parser.add_argument("--pair", action="store_true", help="write two, ARCH-a and ARCH-b")
    parser.add_argument("--dtype", default="F16", choices=["F32", "F16", "BF16", "F8_E4M3"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        header(args.arch)
    except (FileNotFoundError, KeyError):
        known = sorted(p.name.removesuffix(".json.gz") for p in GOLDEN.glob("*.json.gz"))
        parser.exit(2, f"{parser.prog}: no --arch {args.arch}; there are {', '.join(known)}\n")
    args.folder.mkdir(parents=True, exist_ok=True)
    for i, suffix in enumerate(("-a", "-b") if args.pair else ("",)):
        path = args.folder / f"{args.arch}{suffix}.safetensors"
        write(path, args.arch, args.seed + i, dtype=args.dtype)
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
