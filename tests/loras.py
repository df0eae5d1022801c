"""LoRA files for tests: factors drawn, spelled as a tool spells them; deltas from the formulas.

Nothing here uses plymix. A `Change` is one module's: its tensors by the ends of their keys, and
what it adds to a weight, computed in float64 with einsum and kron.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

ALPHA = 1.5


@dataclass(frozen=True)
class Change:
    tensors: dict[str, Any]
    delta: Callable[[Any], Any]  # weight in float64 -> what is added at strength 1


def draw(seed: int):
    rng = np.random.default_rng(seed)
    return lambda *shape: (rng.standard_normal(shape) * 0.3).astype(np.float32)


def double(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def lora(shape, seed=0, rank=3, alpha=ALPHA):
    new = draw(seed)
    out, *rest = shape
    kernel = rest[1:]
    up = new(out, rank, *(1 for _ in kernel))
    down = new(rank, *rest)
    tensors = {"lora_up.weight": up, "lora_down.weight": down}
    if alpha is not None:
        tensors["alpha"] = np.float32(alpha)
    scale = 1.0 if alpha is None else alpha / rank
    u, d = double(up.reshape(out, rank), down)
    value = scale * np.einsum("or,r...->o...", u, d)
    return Change(tensors, lambda w: value)


def locon_cp(shape, seed=0, rank=3):
    new = draw(seed)
    out, in_, *kernel = shape
    up, mid, down = new(out, rank, 1, 1), new(rank, rank, *kernel), new(rank, in_, 1, 1)
    u, m, d = double(up[..., 0, 0], mid, down[..., 0, 0])
    value = ALPHA / rank * np.einsum("op,pqhw,qi->oihw", u, m, d, optimize=True)
    tensors = {
        "lora_up.weight": up,
        "lora_mid.weight": mid,
        "lora_down.weight": down,
        "alpha": np.float32(ALPHA),
    }
    return Change(tensors, lambda w: value)


def loha(shape, seed=0, rank=3):
    new = draw(seed)
    out, n = shape[0], math.prod(shape[1:])
    parts = {"hada_w1_a": (out, rank), "hada_w1_b": (rank, n)}
    parts |= {"hada_w2_a": (out, rank), "hada_w2_b": (rank, n)}
    tensors = {name: new(*size) for name, size in parts.items()}
    a, b, c, d = double(*tensors.values())
    value = (ALPHA / rank * (a @ b) * (c @ d)).reshape(shape)
    return Change(tensors | {"alpha": np.float32(ALPHA)}, lambda w: value)


def loha_cp(shape, seed=0, rank=3):
    new = draw(seed)
    out, in_, *kernel = shape
    tensors = {}
    for i in "12":
        tensors[f"hada_t{i}"] = new(rank, rank, *kernel)
        tensors[f"hada_w{i}_a"] = new(rank, out)
        tensors[f"hada_w{i}_b"] = new(rank, in_)
    t, a, b, u, c, d = double(*tensors.values())
    pairs = ((t, b, a), (u, d, c))
    one, two = (np.einsum("ijkl,jr,ip->prkl", *xyz, optimize=True) for xyz in pairs)
    value = ALPHA / rank * one * two
    return Change(tensors | {"alpha": np.float32(ALPHA)}, lambda w: value)


def lokr(shape, seed=0, rank=3, first=False, second=True):
    """`first`, `second`: whether the factor is a product itself."""
    new = draw(seed)
    out, in_, *kernel = shape
    p, q = 2, 2
    o, i = out // p, in_ // q
    tensors = {}
    if first:
        tensors |= {"lokr_w1_a": new(p, rank), "lokr_w1_b": new(rank, q)}
        (a, b) = double(*tensors.values())
        w1 = a @ b
    else:
        tensors["lokr_w1"] = new(p, q)
        (w1,) = double(tensors["lokr_w1"])
    if second:
        n = i * math.prod(kernel)
        more = {"lokr_w2_a": new(o, rank), "lokr_w2_b": new(rank, n)}
        (a, b) = double(*more.values())
        w2 = (a @ b).reshape(o, i, *kernel)
    else:
        more = {"lokr_w2": new(o, i, *kernel)}
        (w2,) = double(*more.values())
    scale = ALPHA / rank if first or second else 1.0
    value = scale * np.kron(w1.reshape(p, q, *(1 for _ in kernel)), w2)
    return Change(tensors | more | {"alpha": np.float32(ALPHA)}, lambda w: value)


def lokr_cp(shape, seed=0, rank=3):
    new = draw(seed)
    out, in_, *kernel = shape
    tensors = {
        "lokr_w1": new(2, 2),
        "lokr_t2": new(rank, rank, *kernel),
        "lokr_w2_a": new(rank, out // 2),
        "lokr_w2_b": new(rank, in_ // 2),
    }
    w1, t, a, b = double(*tensors.values())
    w2 = np.einsum("ijkl,jr,ip->prkl", t, b, a, optimize=True)
    value = ALPHA / rank * np.kron(w1[:, :, None, None], w2)
    return Change(tensors | {"alpha": np.float32(ALPHA)}, lambda w: value)


def glora(shape, seed=0, rank=3, old=False, core=False):
    """`core`: of a convolution, with the product b1 b2 in Tucker form."""
    new = draw(seed)
    out, in_, *kernel = shape
    ones = [1] * len(kernel)
    a1, a2 = new(in_, rank, *ones), new(rank, in_, *ones)
    b1, b2 = new(out, rank, *ones), new(rank, in_, *(ones if core else kernel))
    x1, x2, y1, y2 = double(a1, a2, b1, b2)
    a = x1.reshape(in_, rank) @ x2.reshape(rank, in_)
    b = np.einsum("or,r...->o...", y1.reshape(out, rank), y2)
    more = {}
    if core:
        more["bm.weight"] = new(rank, rank, *kernel)
        (m,) = double(more["bm.weight"])
        b = np.einsum("op,pqhw,qi->oihw", y1[..., 0, 0], m, y2[..., 0, 0], optimize=True)
    if old:
        a1, a2, b1, b2 = a2, a1, b2, b1
    tensors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    scale = ALPHA / rank
    return Change(
        tensors | more | {"alpha": np.float32(ALPHA)},
        lambda w: scale * (np.einsum("oi...,ij->oj...", w, a) + b),
    )


def ia3(shape, seed=0, on_input=False):
    new = draw(seed)
    out, in_, *kernel = shape
    n = in_ if on_input else out
    weight = new(1, n, *(1 for _ in kernel)) if kernel else new(n)
    (factor,) = double(weight.reshape(-1))
    factor = factor.reshape((1, -1) if on_input else (-1, 1)).reshape(
        (1, in_) if on_input else (out, 1)
    )
    factor = factor.reshape(*factor.shape, *(1 for _ in kernel))
    tensors = {"weight": weight, "on_input": np.asarray(int(on_input), np.int64)}
    return Change(tensors, lambda w: w * factor)


def rotations(blocks, limit):
    (b,) = double(blocks)
    q = b - np.swapaxes(b, -1, -2)
    length = np.sqrt((q**2).sum()) + 1e-8
    if 0 < limit < length:
        q = q * limit / length
    one = np.eye(b.shape[-1])
    return (one + q) @ np.linalg.inv(one - q)


def oft(shape, seed=0, constraint=0.0, rescaled=False):
    new = draw(seed)
    out = shape[0]
    n = out // 2
    blocks = new(2, n, n)
    tensors = {"oft_blocks": blocks, "alpha": np.float32(constraint)}
    factor = np.ones((out, *(1 for _ in shape[1:])))
    if rescaled:
        tensors["rescale"] = 1 + new(*factor.shape)
        (factor,) = double(tensors["rescale"])
    r = rotations(blocks, np.float64(np.float32(constraint)) * out)

    def delta(w):
        turned = np.einsum("knm,kn...->km...", r, w.reshape(2, n, *shape[1:]))
        return factor * turned.reshape(w.shape) - w

    return Change(tensors, delta)


def boft(shape, seed=0, constraint=0.0):
    new = draw(seed)
    out, b = shape[0], 4
    assert out % b == 0
    k = out // b
    rounds = k.bit_length()
    blocks = new(rounds, k, b, b)
    r = rotations(blocks, np.float64(np.float32(constraint)) * out)

    def delta(w):
        x = w.reshape(out, -1)
        for i in range(rounds):
            run = 2**i * b // 2
            # rows in pairs of runs: (pair, which of the two, place in the run)
            at = np.arange(out).reshape(-1, 2, run).transpose(0, 2, 1).reshape(-1)
            y = np.einsum("kij,kjc->kic", r[i], x[at].reshape(k, b, -1)).reshape(out, -1)
            x = np.empty_like(y)
            x[at] = y
        return x.reshape(w.shape) - w

    return Change({"oft_blocks": blocks, "alpha": np.float32(constraint)}, delta)


def full(shape, seed=0):
    diff = draw(seed)(*shape)
    (value,) = double(diff)
    return Change({"diff": diff}, lambda w: value)


def set_(shape, seed=0):
    new = draw(seed)(*shape)
    (value,) = double(new)
    return Change({"set_weight": new}, lambda w: value - w)


def dora(inner: Change, shape, seed=0, rows=True, norm="trained") -> Change:
    out, in_, *kernel = shape
    size = (out, 1) if rows else (1, in_)
    size = (*size, *(1 for _ in kernel))
    magnitude = 1 + draw(seed + 7)(*size)
    (m,) = double(magnitude)
    others = tuple(i for i in range(len(shape)) if i != (0 if rows else 1))

    def delta(w):
        v = w + inner.delta(w)
        of = w if rows and norm == "comfyui" else v
        return v * m / np.sqrt((of**2).sum(axis=others, keepdims=True)) - w

    return Change(inner.tensors | {"dora_scale": magnitude}, delta)


LINEAR = {
    "LoRA": lora,
    "LoRA without alpha": lambda s, seed=0: lora(s, seed, alpha=None),
    "LoHa": loha,
    "LoKr": lokr,
    "LoKr, both products": lambda s, seed=0: lokr(s, seed, first=True),
    "LoKr, first a product": lambda s, seed=0: lokr(s, seed, first=True, second=False),
    "LoKr, both whole": lambda s, seed=0: lokr(s, seed, second=False),
    "GLoRA": glora,
    "old GLoRA": lambda s, seed=0: glora(s, seed, old=True),
    "IA3": ia3,
    "IA3 on input": lambda s, seed=0: ia3(s, seed, on_input=True),
    "OFT": oft,
    "OFT, limited": lambda s, seed=0: oft(s, seed, constraint=0.02),
    "OFT, rescaled": lambda s, seed=0: oft(s, seed, rescaled=True),
    "BOFT": boft,
    "BOFT, limited": lambda s, seed=0: boft(s, seed, constraint=0.02),
    "full": full,
    "set": set_,
    "DoRA": lambda s, seed=0: dora(lora(s, seed), s, seed),
    "DoRA of columns": lambda s, seed=0: dora(lora(s, seed), s, seed, rows=False),
    "DoRA LoHa": lambda s, seed=0: dora(loha(s, seed), s, seed),
    "DoRA LoKr": lambda s, seed=0: dora(lokr(s, seed), s, seed),
    "DoRA GLoRA": lambda s, seed=0: dora(glora(s, seed), s, seed),
}
"""Families on the matrix of a linear layer."""

CONV = {name: LINEAR[name] for name in LINEAR if name != "old GLoRA"} | {
    "GLoRA-CP": lambda s, seed=0: glora(s, seed, core=True),
    "LoCon-CP": locon_cp,
    "LoHa-CP": loha_cp,
    "LoKr-CP": lokr_cp,
    "DoRA LoCon-CP": lambda s, seed=0: dora(locon_cp(s, seed), s, seed),
}
"""Families on the kernel of a convolution."""
