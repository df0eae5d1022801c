"""LoRA files made of other files: merged, extracted from a model, resized, respelt.

    plymix.loras.merge(["style.safetensors:0.7", "eyes.safetensors:-0.3"], "both.safetensors")
    plymix.loras.extract("tuned.safetensors", "base.safetensors", "lora.safetensors", rank=32)
    plymix.loras.resize("big.safetensors", "small.safetensors", energy=0.99)
    plymix.loras.convert("style.safetensors", "style-d.safetensors", to="diffusers")

All work on what a LoRA adds to the weights, never on its factors: strengths, alphas and ranks are
right whatever the files' are. Each returns `Made`.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from plymix import api, hashes
from plymix.errors import Refusal, listed
from plymix.formats import Source, open_model
from plymix.recipe import LORA_KEY

if TYPE_CHECKING:
    from plymix.adapters import Adapter
    from plymix.adapters.spelling import Dialect
    from plymix.archs import Architecture
    from plymix.engine import ProgressCallback
    from plymix.loras.parts import Part
    from plymix.loras.work import Found, Piece, Policy, Spool

PathLike = Union[str, "os.PathLike[str]"]
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


@dataclass(frozen=True)
class Block:
    """The modules of one block: how many, their ranks (least and most; 0 of none), and what share
    of the change is lost: |D - result| / |D|, None where nothing is reduced."""

    block: str
    modules: int
    rank_min: int
    rank_max: int
    error: float | None


@dataclass(frozen=True)
class Made:
    """A LoRA file, or, where `path` is None, what it would be. `error` is that of all blocks."""

    path: Path | None
    formula: str
    dialect: str
    nbytes: int
    modules: int
    blocks: tuple[Block, ...]
    error: float | None
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path) if self.path else None}


def merge(
    loras: Sequence[str],
    out: PathLike | None = None,
    *,
    rank: int = 0,
    energy: float = 0.0,
    size: int | str = 0,
    lbw: Any = None,
    base: PathLike = "",
    to: str = "",
    dtype: str = "keep",
    seed: int = 0,
    strict: bool = False,
    dry_run: bool = False,
    force: bool = False,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Made:
    """Write the LoRA whose change is the sum of the changes of `loras`, each times its strength.

    `loras` are files with strengths, "style.safetensors:0.7" or with the text encoder's
    "style.safetensors:0.7:0.5", or tags as in prompts. The sum is exact, its factors side by side,
    unless a `rank` is given, the share of `energy` to keep in each module (0.99), or a file `size`
    in bytes ("150MB"). `lbw` are block weights as in a bake. `base` is a model whose names count,
    where plymix does not know the architecture's; `to` the dialect of the result ("kohya",
    "diffusers", "peft", "comfyui", "lycoris", "kohya-diffusers"), by default the first one's.
    `strict` refuses files with tensors that are no part of a LoRA. Raises Refusal.
    """
    from plymix.adapters import asking

    asked = asking.asked(loras, (".",))
    if not asked:
        raise Refusal("no LoRA is named; write plymix lora merge A:0.7 B:0.3 -o OUT")
    if any(one.rules for one in asked):
        raise Refusal("element rules (lbwe) are for plymix lora bake; give --lbw BLOCK=NUMBER")
    formula = _formula([(one.strength, Path(one.file).name) for one in asked])
    if any(one.te_strength not in (None, one.strength) for one in asked):
        text = [one.strength if one.te_strength is None else one.te_strength for one in asked]
        formula += f", text encoder {', '.join(f'{x:.4g}' for x in text)}"
    policy = _policy(rank=rank, energy=energy, size=size)
    job = _Job("merge", formula, out, dtype, seed, dry_run, force, threads, progress)

    def strengths(adapters: Sequence[Adapter], arch: Architecture | None) -> list[Any]:
        blocks = [lbw if one.blocks is None else one.blocks for one in asked]
        return [
            _strength(one.strength, one.te_strength, b, arch)
            for one, b in zip(asked, blocks, strict=True)
        ]

    said = {"strengths": [[one.strength, one.te_strength] for one in asked], "lbw": lbw}
    return _of_loras(
        job, [one.file for one in asked], strengths, policy, base, to, False, strict, said
    )


def resize(
    lora: PathLike,
    out: PathLike | None = None,
    *,
    rank: int = 0,
    conv_rank: int = 0,
    energy: float = 0.0,
    size: int | str = 0,
    base: PathLike = "",
    to: str = "",
    dtype: str = "keep",
    seed: int = 0,
    strict: bool = False,
    dry_run: bool = False,
    force: bool = False,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Made:
    """Write `lora` with the least error at a `rank`, a share of `energy`, or a file `size`.

    With `energy` and `size` every module gets a rank of its own. The strength stays what it was.
    The result is a LoRA whatever family `lora` is of. Other options as for `merge`.
    """
    policy = _policy(rank=rank, conv_rank=conv_rank, energy=energy, size=size)
    if policy.exact:
        raise Refusal("resize to what? give --rank N, --energy 0.99 or --size 150MB")
    formula = f"{Path(lora).name}, {_told(policy)}"
    job = _Job("resize", formula, out, dtype, seed, dry_run, force, threads, progress)
    return _of_loras(job, [lora], _plain, policy, base, to, False, strict, {})


def convert(
    lora: PathLike,
    out: PathLike | None = None,
    *,
    to: str,
    base: PathLike = "",
    dtype: str = "keep",
    strict: bool = False,
    dry_run: bool = False,
    force: bool = False,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Made:
    """Write `lora` in the dialect `to`; its change stays the same.

    Tensors are copied under other names where that is all; fused q, k and v are split, or joined,
    exactly. What the dialect cannot say is refused by name. Other options as for `merge`.
    """
    from plymix.loras.work import Policy

    formula = f"{Path(lora).name} as {to}"
    job = _Job("convert", formula, out, dtype, 0, dry_run, force, threads, progress)
    return _of_loras(job, [lora], _plain, Policy(), base, to, True, strict, {})


def extract(
    tuned: PathLike,
    base: PathLike,
    out: PathLike | None = None,
    *,
    rank: int = 0,
    conv_rank: int = 0,
    energy: float = 0.0,
    size: int | str = 0,
    family: str = "lora",
    factor: int = -1,
    text_encoders: bool = True,
    conv: bool = True,
    diffs: bool = False,
    to: str = "kohya",
    dtype: str = "keep",
    seed: int = 0,
    dry_run: bool = False,
    force: bool = False,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Made:
    """Write the LoRA that comes nearest to making `tuned` of `base`.

    At a `rank` (`conv_rank` for convolution kernels), with a share of `energy` in every module, or
    in a file of some `size`. `family="lokr"` makes Kronecker products, whose smaller factor has
    sides of `factor` at most (-1: about the root), and whose larger one has `rank` (0: is whole).
    `text_encoders` and `conv` say whether theirs are in it, `diffs` whether norms and biases are,
    as whole differences. The same bytes for the same `seed`, whatever `threads`. Raises Refusal.
    """
    from plymix.adapters.spelling import dialect_called
    from plymix.loras import tuned as tuning

    how = dialect_called(to)
    policy = _policy(rank=rank, conv_rank=conv_rank, energy=energy, size=size)
    if family == "lokr":
        if policy.energy or policy.size:
            raise Refusal("LoKr takes --rank, or none for whole factors; not --energy or --size")
        if factor == 0 or factor < -1:
            raise Refusal(f"factor = {factor}: give the largest side of the smaller factor, or -1")
        policy = replace(policy, factor=factor)
    elif family != "lora":
        raise Refusal(f"family = {family!r}: lora and lokr can be extracted")
    elif policy.exact:
        raise Refusal("a LoRA of what size? give --rank N, --energy 0.99 or --size 150MB")
    if how.only_lora and (diffs or family == "lokr"):
        raise Refusal(f"{how.title} knows LoRA only; write kohya, lycoris or comfyui")
    formula = f"{Path(tuned).name} - {Path(base).name}, {_told(policy)}"
    job = _Job("extract", formula, out, dtype, seed, dry_run, force, threads, progress)
    job.check()
    with open_model(tuned) as one, open_model(base) as other:
        found = tuning.parts_of(
            one, other, how, text_encoders=text_encoders, conv=conv, diffs=diffs
        )
        return _finished(
            job, found.parts, policy, how, found.arch, [one, other], {}, found.notes, {}
        )


# --- what they share -----------------------------------------------------------------------------


@dataclass
class _Job:
    made: str
    formula: str
    out: PathLike | None
    dtype: str
    seed: int
    dry_run: bool
    force: bool
    threads: int
    progress: ProgressCallback | None

    @property
    def path(self) -> Path | None:
        return Path(self.out).expanduser() if self.out else None

    def check(self) -> None:
        """Refuse what cannot be written, before any work."""
        if self.path is None:
            if not self.dry_run:
                raise Refusal("where to? name the output file (-o out.safetensors)")
            return
        if self.path.suffix.lower() not in (".safetensors", ".sft"):
            raise Refusal(f"{self.path.name}: LoRAs are written as .safetensors; name it so")
        if not self.dry_run:
            api.ready(self.path, self.force)


def _policy(
    *, rank: int = 0, conv_rank: int = 0, energy: float = 0.0, size: int | str = 0
) -> Policy:
    from plymix.loras.work import Policy

    said = [name for name, x in (("rank", rank), ("energy", energy), ("size", size)) if x]
    if len(said) > 1:
        raise Refusal(f"{listed(said)}: one of them settles the ranks; give one")
    if rank < 0 or conv_rank < 0:
        raise Refusal(f"a rank of {min(rank, conv_rank)}: give 1 or more")
    if not 0 <= energy <= 1:
        raise Refusal(f"energy = {energy:g} is no share: give 0.99 to keep 99 %")
    if conv_rank and not rank:
        raise Refusal("conv-rank goes with rank")
    return Policy(rank, conv_rank, energy, bytes_of(size))


def bytes_of(size: int | str) -> int:
    """'150MB' -> 150000000; MiB are powers of 1024. Raises Refusal."""
    if isinstance(size, int):
        found: float = size
    else:
        match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]?I?)B?\s*", size.upper())
        try:
            found = float(match[1]) * UNITS[match[2]] if match else -1
        except (ValueError, KeyError):
            found = -1
    if found < 0:
        raise Refusal(f"size = {size!r} is no size: write 150MB or 144MiB")
    return int(found)


def _told(policy: Policy) -> str:
    if policy.energy:
        return f"{100 * policy.energy:g} % of the energy"
    if policy.size:
        return f"in {api.size(policy.size)}"
    conv = f", {policy.conv_rank} of convolutions" if policy.conv_rank else ""
    kind = "LoKr" if policy.factor else ""
    return " of ".join(filter(None, (kind, f"rank {policy.rank}{conv}" if policy.rank else "")))


def _formula(terms: Sequence[tuple[float, str]]) -> str:
    from plymix.metadata import signed_sum

    return signed_sum((c, name if abs(c) == 1 else f"{abs(c):.4g} × {name}") for c, name in terms)


def _plain(adapters: Sequence[Adapter], arch: Architecture | None) -> list[Any]:
    return [_strength(1.0, None, None, arch) for _ in adapters]


def _strength(strength: float, te: float | None, blocks: Any, arch: Architecture | None) -> Any:
    from plymix.adapters.strengths import Strength, factors

    if blocks is not None and arch is None:
        raise Refusal("block weights need an architecture that plymix knows: name a --base")
    each = factors(blocks, arch, "lbw") if blocks is not None and arch else {}
    return Strength(strength, strength if te is None else te, each)


def _of_loras(
    job: _Job,
    files: Sequence[PathLike],
    strengths: Callable[[Sequence[Adapter], Architecture | None], list[Any]],
    policy: Policy,
    base: PathLike,
    to: str,
    copy: bool,
    strict: bool,
    said: dict[str, Any],
) -> Made:
    from plymix.adapters import read
    from plymix.adapters.spelling import dialect_called
    from plymix.loras import tuned, words
    from plymix.loras.parts import gather

    job.check()
    how = dialect_called(to) if to else None
    with ExitStack() as stack:
        adapters = [read(stack.enter_context(open_model(file))) for file in files]
        arch = _architecture(adapters)
        model = None
        if base:
            tensors, own = tuned.tensors_of(stack.enter_context(open_model(base)))
            if arch not in (None, own):
                raise Refusal(
                    f"{Path(base).name} is {own.title} and {adapters[0].source.path.name} is"
                    f" {adapters[0].detection.named}: they do not fit"
                )
            arch, model = own, {key: info.shape for key, info in tensors.items()}
        found = gather(
            adapters, strengths(adapters, arch), arch=arch, model=model, to=how, copy=copy
        )
        if strict and any(adapter.others for adapter in adapters):
            raise Refusal(f"{found.notes[0]}; leave out --strict to go on without them")
        carried = words.carried([adapter.source.metadata for adapter in adapters])
        sources = [adapter.source for adapter in adapters]
        return _finished(
            job, found.parts, policy, found.how, arch, sources, carried, found.notes, said
        )


def _architecture(adapters: Sequence[Adapter]) -> Architecture | None:
    """What all the LoRAs are for. Raises Refusal for different ones."""
    from plymix.adapters.spelling import guessed

    found: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.detection.arch:
            found.setdefault(adapter.detection.arch.name, adapter)
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise Refusal(
            f"{one.source.path.name} is {one.detection.named} and {other.source.path.name} is"
            f" {other.detection.named}: they do not fit one another"
        )
    if found:
        return next(iter(found.values())).detection.arch
    return guessed([module for adapter in adapters for module in adapter.modules])


def _finished(
    job: _Job,
    parts: Sequence[Part],
    policy: Policy,
    how: Dialect,
    arch: Architecture | None,
    sources: Sequence[Source],
    carried: dict[str, str],
    notes: Sequence[str],
    said: dict[str, Any],
) -> Made:
    from plymix.loras import words, work

    began = time.monotonic()
    folder = job.path.parent if job.path and not job.dry_run else Path(tempfile.gettempdir())
    spool: Spool = work.Spool(folder)
    try:
        what = {"merge": "merging", "extract": "extracting", "resize": "resizing"}.get(job.made, "")
        found = work.computed(
            parts,
            policy,
            spool,
            seed=job.seed,
            threads=job.threads,
            what=what or "converting",
            progress=job.progress,
        )
        inputs = [s.path.name for s in sources]
        about = words.about(arch, inputs, job.formula, job.path.stem if job.path else "result")
        recipe = {
            "made": job.made,
            "inputs": [
                {"file": s.path.name, "size": s.nbytes, "sha256": hashes.model_sha256(s.files)}
                for s in sources
            ],
            **{k: v for k, v in asdict(policy).items() if v},
            **{k: v for k, v in said.items() if v is not None},
            "dialect": how.name,
            "dtype": job.dtype,
            "seed": job.seed,
        }
        title = {k: v for k, v in carried.items() if k == "modelspec.title" and job.made != "merge"}
        own = {LORA_KEY: json.dumps(recipe, sort_keys=True)}
        said_of_all = {**carried, **about, **title, **own}

        def described(found: Sequence[Found]) -> tuple[list[Piece], dict[str, str]]:
            network = {} if job.made == "convert" else words.network(found)
            return work.pieces(found, spool, how, job.dtype), {**said_of_all, **network}

        settled = work.ranked(found, policy, work.size_of(*described(found)))
        if policy.size:  # once more, with the room of the modules that got no rank
            left = zip(found, settled, strict=True)
            found = [new if new.kind == "nothing" else old for old, new in left]
            settled = work.ranked(found, policy, work.size_of(*described(found)))
        found = settled
        nothing = [f.part.name for f in found if f.kind == "nothing"]
        if len(nothing) == len(found):
            raise Refusal(f"{job.formula}: nothing is changed by it, so there is no LoRA to write")
        notes = [*notes]
        if nothing:
            notes.append(f"{len(nothing)} modules change nothing: {listed(nothing, 3)}")
        pieces, metadata = described(found)
        if job.path and not job.dry_run:
            nbytes = work.written(pieces, metadata, job.path, progress=job.progress)
        else:
            nbytes = work.size_of(pieces, metadata)
    finally:
        spool.close()
    reduced = not policy.exact
    return Made(
        path=job.path if not job.dry_run else None,
        formula=job.formula,
        dialect=how.name,
        nbytes=nbytes,
        modules=len(found) - len(nothing),
        blocks=tuple(_blocks(found, arch, reduced)),
        error=_error(found) if reduced else None,
        notes=tuple(notes),
        seconds=time.monotonic() - began,
    )


def _blocks(found: Sequence[Found], arch: Architecture | None, reduced: bool) -> list[Block]:
    groups: dict[str, list[Found]] = {}
    for f in found:
        groups.setdefault(f.part.block, []).append(f)
    order = ["BASE", "CLIP", "T5", *(arch.blocks if arch else ()), "?"]
    names = [*(n for n in order if n in groups), *(n for n in groups if n not in order)]
    rows = []
    for name in dict.fromkeys(names):
        group = [f for f in groups[name] if f.kind != "nothing"]
        ranks = [f.rank for f in group if f.kind in ("lora", "lokr")] or [0]
        error = _error(groups[name]) if reduced else None
        rows.append(Block(name, len(group), min(ranks), max(ranks), error))
    return rows


def _error(found: Sequence[Found]) -> float:
    """|D - result| / |D| over all of `found`."""
    total = math.fsum(f.energy for f in found)
    return math.sqrt(math.fsum(f.error for f in found) / total) if total else 0.0
