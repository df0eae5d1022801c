"""Symmetries of a network: permutations and head bases that leave its function unchanged.

A site is a set of axes that must be transformed together: the hidden units of a feed-forward
layer, the channels of an attention head, the hidden channels of a residual block. Sites are found
from key names and shapes by the table `SITES`. Every key is transformed along one axis only, so
the sites do not depend on each other: each is solved once, exactly, and no sweeps are needed.

What cannot be read off names and shapes is asked for (`heads`, `text_heads`) or, for the known
widths in `HEAD_WIDTHS` and `TEXT_WIDTHS`, looked up; attention of other models stays as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from array_api_compat import device

from plymix.errors import Refusal
from plymix.methods import Array, Tensors
from plymix.methods.arrays import like, namespace, to_numpy
from plymix.registry import Range, method

# -- which axes belong together -------------------------------------------------------------------

Unit = Literal["whole", "head", "text head", "norm"]


@dataclass(frozen=True)
class Member:
    """One axis of one key of a site.

    The axis is made of equal parts as long as the site; `parts` are the ones that belong to it, or
    () for all. `inverse` marks the far side of the product that a basis change cancels in.
    """

    suffix: str
    axis: int
    parts: tuple[int, ...] = ()
    inverse: bool = False


@dataclass(frozen=True)
class Site:
    """A kind of site: keys `prefix + suffix`; `axis` of the key at `anchor` gives the length.

    Its units are permuted within blocks: none (`whole`), attention heads, or the groups of a group
    norm, whose statistics any order inside a group leaves unchanged. A missing bias is passed
    over; with any other member missing there is no such site. `within` must match the end of the
    prefix: it keeps away attention that only shares the names, with rotary positions for one.
    """

    anchor: str
    axis: int
    unit: Unit
    members: tuple[Member, ...]
    within: str = ""


def _linear(name: str, axis: int, inverse: bool = False) -> tuple[Member, ...]:
    """A layer's weight along `axis`, and its bias where the axis is the output."""
    weight = Member(f"{name}.weight", axis, inverse=inverse)
    return (weight,) if axis else (weight, Member(f"{name}.bias", 0, inverse=inverse))


def _feed_forward(first: str, second: str) -> Site:
    """Both halves of a gated first layer (GEGLU) are as long as the site, so both are members."""
    return Site(f"{second}.weight", 1, "whole", _linear(first, 0) + _linear(second, 1))


def _attention(q: str, k: str, v: str, o: str, unit: Unit, within: str) -> tuple[Site, Site]:
    """Scores are sums over a head's q k channels, outputs over its v channels."""
    return (
        Site(f"{q}.weight", 0, unit, _linear(q, 0) + _linear(k, 0, True), within),
        Site(f"{v}.weight", 0, unit, _linear(v, 0) + _linear(o, 1, True), within),
    )


_UNET = r"\.transformer_blocks\.\d+"
_CLIP = r"text_model\.encoder\.layers\.\d+"
_OPEN_CLIP = r"(?<!visual\.)transformer\.resblocks\.\d+"
_FUSED = ((".attn.in_proj_weight", 0), (".attn.in_proj_bias", 0))

SITES: tuple[Site, ...] = (
    # U-Net (LDM and diffusers names agree inside transformer blocks)
    _feed_forward(".ff.net.0.proj", ".ff.net.2"),
    *_attention(".attn1.to_q", ".attn1.to_k", ".attn1.to_v", ".attn1.to_out.0", "head", _UNET),
    *_attention(".attn2.to_q", ".attn2.to_k", ".attn2.to_v", ".attn2.to_out.0", "head", _UNET),
    Site(
        ".out_layers.3.weight",
        1,
        "norm",
        _linear(".in_layers.2", 0)
        + _linear(".emb_layers.1", 0)
        + _linear(".out_layers.0", 0)
        + _linear(".out_layers.3", 1),
    ),
    # CLIP text encoders, transformers names
    _feed_forward(".mlp.fc1", ".mlp.fc2"),
    *_attention(
        ".self_attn.q_proj",
        ".self_attn.k_proj",
        ".self_attn.v_proj",
        ".self_attn.out_proj",
        "text head",
        _CLIP,
    ),
    # CLIP text encoders, OpenCLIP names: q, k and v are the thirds of one tensor
    _feed_forward(".mlp.c_fc", ".mlp.c_proj"),
    Site(
        ".attn.out_proj.weight",
        1,
        "text head",
        tuple(Member(k, a, (0,)) for k, a in _FUSED)
        + tuple(Member(k, a, (1,), True) for k, a in _FUSED),
        _OPEN_CLIP,
    ),
    Site(
        ".attn.out_proj.weight",
        1,
        "text head",
        tuple(Member(k, a, (2,)) for k, a in _FUSED) + _linear(".attn.out_proj", 1, True),
        _OPEN_CLIP,
    ),
)

_HEADS_OF_64 = ("width", 64)
HEAD_WIDTHS: Mapping[int, tuple[str, int]] = {
    768: ("heads", 8),
    1024: _HEADS_OF_64,
    1280: _HEADS_OF_64,
    2048: _HEADS_OF_64,
}
"""U-Net heads by the width of the text that its `attn2.to_k` reads: SD1 has 8 of them at every
width; SD2, the SDXL refiner and SDXL have heads of 64 channels (the models' published configs)."""

TEXT_WIDTHS: Mapping[int, int] = {768: 12, 1024: 16, 1280: 20}
"""Heads of CLIP ViT-L, ViT-H and bigG text encoders by their width (the models' configs)."""


@dataclass(frozen=True)
class Found:
    """A site of a model: its (key, member) pairs, and its length as `blocks` of `size` units."""

    name: str
    members: tuple[tuple[str, Member], ...]
    blocks: int
    size: int

    @property
    def length(self) -> int:
        return self.blocks * self.size


def find_sites(
    tensors: Tensors, *, heads: int = 0, text_heads: int = 0, norm_groups: int = 32
) -> Iterator[Found]:
    """The sites of a model, with what they are divided into.

    heads, text_heads: attention heads of the U-Net and of the text encoders; 0 looks them up by
    width. norm_groups: groups of the group norms. Sites with unknown or unfitting division, and
    those whose shapes do not fit together, are left out.
    """
    for key in tensors:
        for number, site in enumerate(SITES):
            if not key.endswith(site.anchor) or len(tensors.shape(key)) <= site.axis:
                continue
            prefix, length = key[: -len(site.anchor)], tensors.shape(key)[site.axis]
            if not re.search(f"{site.within}$", prefix):
                continue
            members = _members(tensors, prefix, site, length)
            blocks = _blocks(tensors, prefix, site, length, heads, text_heads, norm_groups)
            if members and blocks and length % blocks == 0:
                yield Found(f"{prefix}/{number}", members, blocks, length // blocks)


def _members(
    tensors: Tensors, prefix: str, site: Site, length: int
) -> tuple[tuple[str, Member], ...]:
    found = []
    for m in site.members:
        key = prefix + m.suffix
        if key not in tensors:
            if m.suffix.endswith("bias"):
                continue
            return ()
        shape = tensors.shape(key)
        if len(shape) <= m.axis or shape[m.axis] % length:
            return ()
        if m.parts and shape[m.axis] != 3 * length:
            return ()
        found.append((key, m))
    return tuple(found)


def _blocks(
    tensors: Tensors,
    prefix: str,
    site: Site,
    length: int,
    heads: int,
    text_heads: int,
    norm_groups: int,
) -> int:
    """How many blocks the site's units are permuted within; 0 where that is not known."""
    if site.unit == "whole":
        return 1
    if site.unit == "norm":
        return norm_groups
    if site.unit == "text head":
        return text_heads or TEXT_WIDTHS.get(length, 0)
    if heads:
        return heads
    context = f"{prefix}.attn2.to_k.weight"
    if context not in tensors:
        return 0
    how, number = HEAD_WIDTHS.get(tensors.shape(context)[1], ("", 0))
    if how == "width":
        return length // number if length % number == 0 else 0
    return number


def _spans(found: Found, key_length: int, member: Member) -> list[int]:
    """The starts of the parts of a key's axis that belong to the site."""
    parts = member.parts or range(key_length // found.length)
    return [p * found.length for p in parts]


# -- permutations ---------------------------------------------------------------------------------

Permutations = dict[str, tuple[int, Any]]
"""key -> (axis, the new order of its indices)."""


def _record(orders: Permutations, tensors: Tensors, found: Found, chosen: Any) -> None:
    """Add a site's permutation, `(blocks, size)` indices inside each block, to every member."""
    new = (chosen + np.arange(found.blocks)[:, None] * found.size).reshape(-1)
    for key, member in found.members:
        length = tensors.shape(key)[member.axis]
        _, order = orders.setdefault(key, (member.axis, np.arange(length)))
        for start in _spans(found, length, member):
            order[start : start + found.length] = start + new


def _permuted(x: Array, key: str, orders: Permutations) -> Array:
    xp = namespace(x)
    if key not in orders:
        return xp.asarray(x, copy=True)
    axis, order = orders[key]
    return xp.take(x, xp.asarray(order, device=device(x)), axis=axis)


def _blocked(x: Array, found: Found, member: Member) -> list[Any]:
    """Each part of a key that belongs to the site as (blocks, size, everything else)."""
    rows = np.moveaxis(to_numpy(x), member.axis, 0).reshape(x.shape[member.axis], -1)
    spans = _spans(found, rows.shape[0], member)
    shape = (found.blocks, found.size, -1)
    return [rows[start : start + found.length].reshape(shape) for start in spans]


def _match(
    tensors: Tensors, *, heads: int = 0, text_heads: int = 0, norm_groups: int = 32
) -> Permutations:
    """The permutations of the first model that bring it nearest to the second."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise Refusal(
            'rebasin solves assignment problems with scipy: pip install "plymix[scipy]"'
        ) from None
    orders: Permutations = {}
    for found in find_sites(tensors, heads=heads, text_heads=text_heads, norm_groups=norm_groups):
        likeness: Any = 0.0
        for key, member in found.members:
            a, ref = tensors[key]
            pairs = zip(_blocked(ref, found, member), _blocked(a, found, member), strict=True)
            for r, x in pairs:
                likeness = likeness + r @ np.swapaxes(x, -1, -2)
        known = np.where(np.isfinite(likeness), likeness, 0)  # NaN is like nothing
        chosen = [linear_sum_assignment(block, maximize=True)[1] for block in known]
        _record(orders, tensors, found, np.stack(chosen))
    return orders


@method("group", prepare=_match)
def rebasin(
    a: Array,
    ref: Array,
    *,
    key: str,
    state: Permutations,
    heads: Annotated[int, Range(0)] = 0,
    text_heads: Annotated[int, Range(0)] = 0,
    norm_groups: Annotated[int, Range(1)] = 32,
) -> Array:
    """Git Re-Basin: Reorder A's Hidden Units to Match Another Model

    For each set of hidden units the permutation P with the largest sum over its tensors of
    <ref, P A>, found exactly by linear assignment;  R = P A

    The result computes what A computes, with its units in the order of `ref`: merge it with `ref`
    by any method afterwards. Matched are the feed-forward units (both halves of a GEGLU together),
    the channels inside each attention head (q with k, v with the output) and the channels inside
    each group of the second group norm of a residual block, in U-Nets of Stable Diffusion 1, 2 and
    XL and in CLIP text encoders; anything else is A's.
    heads: attention heads of the U-Net; 0 knows them for SD1 (8 heads), SD2 and SDXL (64 channels
    each) and leaves the attention of other U-Nets alone, since heads cannot be read from a file.
    text_heads: the same for the text encoders; 0 knows CLIP-L, CLIP-H and bigG. A wrong number
    here changes what the model computes. norm_groups: groups of the residual blocks' norms; a
    multiple of the true number is safe too.
    Each tensor is permuted along one axis only, so one pass finds the best permutations of all and
    there are no iterations to set. meh's and SD.Next's re-basin with one iteration changes nothing.
    Source: Git Re-Basin (weight matching), arXiv:2209.04836; sd-mecha `rebasin`.
    """
    return _permuted(a, key, state)


def _shuffle(
    tensors: Tensors, *, seed: int = 0, heads: int = 0, text_heads: int = 0, norm_groups: int = 32
) -> Permutations:
    orders: Permutations = {}
    for found in find_sites(tensors, heads=heads, text_heads=text_heads, norm_groups=norm_groups):
        digest = hashlib.sha256(f"randperm/{seed}/{found.name}".encode()).digest()
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        chosen = [draw.permutation(found.size) for _ in range(found.blocks)]
        _record(orders, tensors, found, np.stack(chosen))
    return orders


@method("group", prepare=_shuffle)
def randperm(
    a: Array,
    *,
    key: str,
    state: Permutations,
    seed: int = 0,
    heads: Annotated[int, Range(0)] = 0,
    text_heads: Annotated[int, Range(0)] = 0,
    norm_groups: Annotated[int, Range(1)] = 32,
) -> Array:
    """Random Reordering of Hidden Units

    R = P A with random permutations P of what `rebasin` permutes: other numbers, same function.

    For tests of `rebasin`, which undoes it, and to see how much a merge depends on the order of
    units. seed: draws the permutations, together with each site's name. heads, text_heads,
    norm_groups: as in `rebasin`.
    Source: sd-mecha `randperm`.
    """
    return _permuted(a, key, state)


# -- bases of attention heads ---------------------------------------------------------------------

Bases = dict[str, list[tuple[int, int, Any]]]
"""key -> (axis, start, (blocks, size, size) matrices that multiply that part of the axis)."""


def _balance(
    tensors: Tensors,
    *,
    power: float = 0.5,
    epsilon: float = 1e-6,
    heads: int = 0,
    text_heads: int = 0,
) -> Bases:
    bases: Bases = {}
    for found in find_sites(tensors, heads=heads, text_heads=text_heads):
        if not any(m.inverse for _, m in found.members):
            continue
        grams = []
        for side in (False, True):
            total = np.eye(found.size) * epsilon
            for key, member in found.members:
                if member.inverse is side:
                    for part in _blocked(tensors[key][0], found, member):
                        part = part.astype(np.float64)
                        total = total + part @ np.swapaxes(part, -1, -2)
            grams.append(total)
        near, far = grams
        root, inverse_root = _symmetric_power(near, 0.5), _symmetric_power(near, -0.5)
        s = inverse_root @ _symmetric_power(root @ far @ root, 0.5) @ inverse_root
        factors = [_symmetric_power(s, p).astype(np.float32) for p in (power, -power)]
        for key, member in found.members:
            for start in _spans(found, tensors.shape(key)[member.axis], member):
                bases.setdefault(key, []).append((member.axis, start, factors[member.inverse]))
    return bases


def _symmetric_power(x: Any, exponent: float) -> Any:
    """A symmetric positive definite matrix (or a stack of them) to a real power; NaN where one is
    not finite."""
    finite = np.isfinite(x).all((-1, -2), keepdims=True)
    x = np.where(finite, (x + np.swapaxes(x, -1, -2)) / 2, np.eye(x.shape[-1]))
    values, vectors = np.linalg.eigh(x)
    values = np.maximum(values, values[..., -1:] * 1e-15)
    power = (vectors * values[..., None, :] ** exponent) @ np.swapaxes(vectors, -1, -2)
    return np.where(finite, power, np.nan)


@method("group", prepare=_balance)
def balance_attention(
    a: Array,
    *,
    key: str,
    state: Bases,
    power: Annotated[float, Range(0, 1)] = 0.5,
    epsilon: Annotated[float, Range(1e-12)] = 1e-6,
    heads: Annotated[int, Range(0)] = 0,
    text_heads: Annotated[int, Range(0)] = 0,
) -> Array:
    """Balance Attention Heads

    Per head, with G_q = W_q W_q^T + epsilon I and G_k alike (biases as one more column),
    S = G_q^-1/2 (G_q^1/2 G_k G_q^1/2)^1/2 G_q^-1/2;  W_q <- S^power W_q,  W_k <- S^-power W_k,
    and the same for W_v and W_o^T.

    S is symmetric, so q^T k and W_o v stay what they were and the model computes the same; what
    changes is how a head's strength is shared between its two factors. Use it on all models before
    they are averaged.
    power: 1/2 gives both factors the same Gram matrix; 1, which is what sd-mecha computes, swaps
    the two Gram matrices instead. heads, text_heads: as in `rebasin`; attention whose heads are not
    known, and everything else, is copied. Models that normalise q or k inside the attention (Flux,
    SD3.5) have other names and are not touched. The matrices of all heads are held in memory:
    about 180 MB for SDXL.
    Source: sd-mecha `balance_attention`.
    """
    xp = namespace(a)
    if key not in state:
        return xp.asarray(a, copy=True)
    x = to_numpy(a)
    for axis, start, factor in state[key]:
        rows = np.moveaxis(x, axis, 0).astype(np.float64)
        blocks, size, _ = factor.shape
        part = rows[start : start + blocks * size].reshape(blocks, size, -1)
        rows[start : start + blocks * size] = (factor @ part).reshape(
            blocks * size, *rows.shape[1:]
        )
        x = np.moveaxis(rows, 0, axis)
    return like(np.ascontiguousarray(x), a)
