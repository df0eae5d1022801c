"""What several tests need: small files, and sums computed the slow and certain way.

Nothing here uses plymix but `merged`: values, bytes and files come from `tiny`.
"""

from dataclasses import replace

import numpy as np

import plymix
from plymix import engine, plan
from plymix.recipe import from_dict
from tiny import decode, encode, read_safetensors, to_bytes

# significant bits with the hidden one, exponent of the least step
PRECISION = {"F32": (24, -149), "F16": (11, -24), "BF16": (8, -133)}


def save(path, tensors, metadata=None):
    """Write {key: (dtype, array)} as safetensors; bf16 and fp8 arrays hold codes (see `coded`)."""
    header = {key: (dtype, np.shape(x)) for key, (dtype, x) in tensors.items()}
    path.write_bytes(to_bytes(header, {k: x for k, (_, x) in tensors.items()}, metadata))
    return path


def coded(values, dtype):
    """(dtype, array) of float values, for `save`."""
    with np.errstate(over="ignore"):
        return dtype, encode(np.asarray(values), dtype)


def draw(dtype, shape, seed=0, scale=1.0):
    """Normal values in `dtype`, for `save`."""
    return coded(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


def load(path):
    """{key: (dtype, array)} and the metadata of a safetensors file."""
    header, state, metadata = read_safetensors(path)
    return {key: (header[key][0], state[key]) for key in header}, metadata


def data(path):
    """{key: bytes} of a safetensors file."""
    return {key: x.tobytes() for key, (_, x) in load(path)[0].items()}


def real(tensor):
    """The values of (dtype, array) in long double, which holds every product of two floats."""
    dtype, x = tensor
    return decode(x, dtype).astype(np.longdouble) if dtype != "F64" else x.astype(np.longdouble)


def exact(coefficients, tensors):
    """sum(c * x) in long double (64 significant bits on x86), as float64."""
    pairs = zip(coefficients, map(real, tensors), strict=True)
    return sum(np.longdouble(c) * x for c, x in pairs).astype(np.float64)


def deviation(got, want, dtype, noise=0.0):
    """How far `got` (dtype, array) is from the float64 array `want` rounded once.

    Returns (share of the elements that differ, largest difference in units of the last place of
    what is wanted). Elements within 1e-6 of a tie, and those below `noise`, are left out.
    """
    bits, least = PRECISION[dtype]
    _, exponent = np.frexp(want)
    step = np.ldexp(1.0, np.maximum(exponent - bits, least))
    scaled = want / step
    tie = np.abs(np.abs(scaled - np.floor(scaled)) - 0.5) <= 1e-6 * np.abs(scaled)
    counted = (np.abs(want) >= noise) & np.isfinite(want)
    error = np.abs(real(got).astype(np.float64) - np.round(scaled) * step)[counted]
    if not error.size:
        return 0.0, 0.0
    return np.mean((error > 0) & ~tie[counted]), np.max(error / step[counted])


def merged(tmp_path, models, alpha=0.5, out="out.safetensors", method="weighted_sum", **output):
    """Merge {name: tensors} by key, whatever they are; returns the result's tensors."""
    for name, tensors in models.items():
        save(tmp_path / f"{name}.safetensors", tensors)
    found = recipe({n: tmp_path / f"{n}.safetensors" for n in models}, alpha, method, **output)
    plymix.merge(found, out=tmp_path / out, force=True)
    return load(tmp_path / out)[0]


def recipe(files, alpha=0.5, method="weighted_sum", arch="any", **output):
    """A recipe of one step whose inputs a, b, ... are `files`."""
    step = {"method": method, **{name: name for name in files}, "alpha": alpha}
    return from_dict(
        {
            "models": {name: str(path) for name, path in files.items()},
            "steps": {"mix": step},
            "output": {"arch": arch, **output},
        }
    )


def result_bytes(found, **options):
    """What a recipe gives, through plan and engine, as {key: bytes} without a file."""
    with plan.build(found) as planned:
        target = engine.MemoryTarget(planned.nbytes)
        placed, at = [], 0
        for tensor in planned.tensors:
            placed.append(replace(tensor, offset=at))
            at += tensor.nbytes
        engine.perform(engine.Job(planned.sources, target), placed, **options)
        return {t.name: bytes(target.data[t.offset : t.offset + t.nbytes]) for t in placed}
