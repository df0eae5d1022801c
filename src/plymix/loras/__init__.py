"""LoRA files made of other files: merged, extracted from a model, resized, respelt.

    plymix.loras.merge(["style.safetensors:0.7", "eyes.safetensors:-0.3"], "both.safetensors")
    plymix.loras.extract("tuned.safetensors", "base.safetensors", "lora.safetensors", rank=32)
    plymix.loras.resize("big.safetensors", "small.safetensors", energy=0.99)
    plymix.loras.convert("style.safetensors", "style-d.safetensors", to="diffusers")

All work on what a LoRA adds to the weights, never on its factors: strengths, alphas and ranks are
right whatever the files' are. Each returns `Made`.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from plymix import api, outputs
from plymix.errors import Refusal, listed
from plymix.formats import Source, open_model
from plymix.recipe import LORA_KEY, Model

if TYPE_CHECKING:
    from plymix.adapters import Adapter
    from plymix.adapters.spelling import Dialect
    from plymix.adapters.strengths import Strength
    from plymix.archs import Architecture
    from plymix.engine import ProgressCallback
    from plymix.loras.parts import Gathered
    from plymix.loras.record import Input, Record
    from plymix.loras.work import Found, Piece, Spool

PathLike = Union[str, "os.PathLike[str]"]
WORKING = {
    "merge": "merging",
    "extract": "extracting",
    "resize": "resizing",
    "convert": "converting",
}
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
    rank: int | None = None,
    energy: float | None = None,
    size: int | str | None = None,
    lbw: Any = None,
    folders: Sequence[PathLike] = (".",),
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
    "style.safetensors:0.7:0.5", or tags as in prompts, which are looked for in `folders`. The sum
    is exact, its factors side by side, unless a `rank` is given, the share of `energy` to keep in
    each module (0.99), or a file `size` in bytes ("150MB"). `lbw` are block weights as in a bake.
    `base` is a model whose names count, where plymix does not know the architecture's; `to` the
    dialect of the result ("kohya", "diffusers", "peft", "comfyui", "lycoris", "kohya-diffusers"),
    by default the first one's.
    `strict` refuses files with tensors that are no part of a LoRA, and modules that are in no model
    that plymix knows. Raises Refusal.
    """
    from plymix.adapters import asking
    from plymix.loras.record import Input, Record

    asked = asking.asked(loras, folders)
    if not asked:
        raise Refusal("no LoRA is named; write plymix lora merge A:0.7 B:0.3 -o OUT")
    if any(one.rules for one in asked):
        raise Refusal("element rules (lbwe) are for plymix lora bake; give --lbw BLOCK=NUMBER")
    record = Record(
        "merge",
        tuple(
            Input(
                one.file,
                strength=one.strength,
                te_strength=one.te_strength,
                blocks=lbw if one.blocks is None else one.blocks,
            )
            for one in asked
        ),
        base=_base(base),
        dialect=to,
        dtype=dtype,
        seed=seed,
        **_limits(rank=rank, energy=energy, size=size),
    )
    return _made(record, _Job(out, strict, dry_run, force, threads, progress))


def resize(
    lora: PathLike,
    out: PathLike | None = None,
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    energy: float | None = None,
    size: int | str | None = None,
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
    from plymix.loras.record import Input, Record

    record = Record(
        "resize",
        (Input(os.fspath(lora)),),
        base=_base(base),
        dialect=to,
        dtype=dtype,
        seed=seed,
        **_limits(rank=rank, conv_rank=conv_rank, energy=energy, size=size),
    )
    if record.policy.exact:
        raise Refusal("resize to what? give --rank N, --energy 0.99 or --size 150MB")
    return _made(record, _Job(out, strict, dry_run, force, threads, progress))


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
    from plymix.loras.record import Input, Record

    files = (Input(os.fspath(lora)),)
    record = Record("convert", files, base=_base(base), dialect=to, dtype=dtype)
    return _made(record, _Job(out, strict, dry_run, force, threads, progress))


def extract(
    tuned: PathLike,
    base: PathLike,
    out: PathLike | None = None,
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    energy: float | None = None,
    size: int | str | None = None,
    family: str = "lora",
    factor: int | None = None,
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
    sides of `factor` at most (-1, or none given: about the root), and whose larger one has `rank`
    (none given: is whole). `text_encoders` and `conv` say whether theirs are in it, `diffs` whether
    norms and biases are, as whole differences. The same bytes for the same `seed`, whatever
    `threads`. Raises Refusal.
    """
    from plymix.adapters.spelling import dialect_called
    from plymix.loras.record import Input, Record

    how = dialect_called(to)
    limits = _limits(rank=rank, conv_rank=conv_rank, energy=energy, size=size)
    if family == "lokr":
        if limits["energy"] or limits["size"]:
            raise Refusal("LoKr takes --rank, or none for whole factors; not --energy or --size")
        if factor is not None and (factor == 0 or factor < -1):
            raise Refusal(f"factor = {factor}: give the largest side of the smaller factor, or -1")
        limits["factor"] = -1 if factor is None else factor
    elif family != "lora":
        raise Refusal(f"family = {family!r}: lora and lokr can be extracted")
    elif factor is not None:
        raise Refusal(f"factor = {factor} is for LoKr: say --family lokr with it, or leave it out")
    elif not any(limits.values()):
        raise Refusal("a LoRA of what size? give --rank N, --energy 0.99 or --size 150MB")
    if how.only_lora and (diffs or family == "lokr"):
        raise Refusal(f"{how.title} knows LoRA only; write kohya, lycoris or comfyui")
    record = Record(
        "extract",
        (Input(os.fspath(tuned)),),
        base=Model(os.fspath(base)),
        dialect=to,
        dtype=dtype,
        text_encoders=text_encoders,
        conv=conv,
        diffs=diffs,
        seed=seed,
        **limits,
    )
    return _made(record, _Job(out, False, dry_run, force, threads, progress))


# --- what they share -----------------------------------------------------------------------------


@dataclass
class _Job:
    out: PathLike | None
    strict: bool
    dry_run: bool
    force: bool
    threads: int
    progress: ProgressCallback | None

    @property
    def path(self) -> Path | None:
        return outputs.path_of(self.out) if self.out else None

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


def _base(file: PathLike) -> Model | None:
    return Model(os.fspath(file)) if file else None


def _limits(
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    energy: float | None = None,
    size: int | str | None = None,
) -> dict[str, Any]:
    """What limits the result, as fields of a Record; 0 for what is not said. Raises Refusal."""
    said = {"rank": rank, "energy": energy, "size": size}
    if len(several := [name for name, x in said.items() if x is not None]) > 1:
        raise Refusal(f"{listed(several)}: one of them settles the ranks; give one")
    for name, n in (("rank", rank), ("conv-rank", conv_rank)):
        if n is not None and n < 1:
            raise Refusal(f"{name} = {n}: give 1 or more, or leave it out")
    if energy is not None and not 0 < energy <= 1:
        raise Refusal(f"energy = {energy:g} is no share: give 0.99 to keep 99 %")
    if conv_rank and not rank:
        raise Refusal("conv-rank goes with rank")
    return {
        "rank": rank or 0,
        "conv_rank": conv_rank or 0,
        "energy": energy or 0.0,
        "size": 0 if size is None else bytes_of(size),
    }


def bytes_of(size: int | str) -> int:
    """'150MB' -> 150000000; MiB are powers of 1024. Raises Refusal."""
    if isinstance(size, int):
        found: float = size
    else:
        match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]?I?)B?\s*", size.upper())
        try:
            found = float(match[1]) * UNITS[match[2]] if match else 0
        except (ValueError, KeyError):
            found = 0
    if found < 1:
        raise Refusal(f"size = {size!r} is no size: write 150MB or 144MiB")
    return int(found)


def remade(
    record: Record,
    files: Mapping[str, PathLike],
    out: PathLike,
    *,
    force: bool = False,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Made:
    """Write once more what `record` says, into `out`. `files` are where its `models` are."""
    return _made(record, _Job(out, False, False, force, threads, progress), files)


def _made(record: Record, job: _Job, files: Mapping[str, PathLike] | None = None) -> Made:
    from plymix.adapters.spelling import dialect_called
    from plymix.loras import tuned

    job.check()
    how = dialect_called(record.dialect) if record.dialect else None
    if files is None:
        files = {name: model.file for name, model in record.models.items()}
    with ExitStack() as stack:
        opened = {n: stack.enter_context(open_model(file)) for n, file in files.items()}
        base = opened.pop("base", None)
        sources = list(opened.values())
        if record.made == "extract":
            assert base is not None
            assert how is not None
            gathered = tuned.gather(
                sources[0],
                base,
                how,
                text_encoders=record.text_encoders,
                conv=record.conv,
                diffs=record.diffs,
            )
        else:
            gathered = _gathered(record, sources, base, how, job.strict)
        return _finished(record, job, gathered, sources, base)


def _gathered(
    record: Record,
    sources: Sequence[Source],
    base: Source | None,
    how: Dialect | None,
    strict: bool,
) -> Gathered:
    from plymix.adapters import read
    from plymix.loras import tuned
    from plymix.loras.parts import gather

    adapters = [read(source) for source in sources]
    arch = _architecture(adapters)
    model = None
    if base is not None:
        tensors, own, named = tuned.tensors_of(base)
        if arch not in (None, own):
            raise Refusal(
                f"{base.path.name} is {named} and {adapters[0].source.path.name} is"
                f" {adapters[0].detection.named}: they do not fit"
            )
        arch, model = own, {key: info.shape for key, info in tensors.items()}
    strengths = [_strength(one, arch) for one in record.inputs]
    copy = record.made == "convert"
    return gather(adapters, strengths, arch=arch, model=model, to=how, copy=copy, strict=strict)


def _strength(one: Input, arch: Architecture | None) -> Strength:
    from plymix.adapters.strengths import Strength, factors

    if one.blocks is not None and arch is None:
        raise Refusal("block weights need an architecture that plymix knows: name a --base")
    each = factors(one.blocks, arch, "lbw") if one.blocks is not None and arch else {}
    text = one.strength if one.te_strength is None else one.te_strength
    return Strength(one.strength, text, each)


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
    record: Record,
    job: _Job,
    gathered: Gathered,
    sources: Sequence[Source],
    base: Source | None,
) -> Made:
    from plymix.loras import record as records
    from plymix.loras import words, work

    began = time.monotonic()
    policy, formula, how = record.policy, records.formula(record), gathered.how
    folder = job.path.parent if job.path and not job.dry_run else Path(tempfile.gettempdir())
    spool: Spool = work.Spool(folder)
    try:
        found = work.computed(
            gathered.parts,
            policy,
            spool,
            seed=record.seed,
            threads=job.threads,
            what=WORKING[record.made],
            progress=job.progress,
        )
        if all(f.kind == "nothing" for f in found):
            raise Refusal(f"{formula}: nothing is changed by it, so there is no LoRA to write")
        title = record.title or (job.path.stem if job.path else "result")
        record = records.settled(record, sources, base, dialect=how.name, title=title)
        said = {
            **words.about(gathered.arch, record, [source.metadata for source in sources]),
            LORA_KEY: records.to_json(record),
        }

        def described(found: Sequence[Found]) -> tuple[list[Piece], dict[str, str]]:
            network = {} if record.made == "convert" else words.network(found)
            return work.pieces(found, spool, how, record.dtype), {**said, **network}

        settled = work.ranked(found, policy, work.size_of(*described(found)))
        if policy.size:  # once more, with the room of the modules that got no rank
            left = zip(found, settled, strict=True)
            found = [new if new.kind == "nothing" else old for old, new in left]
            settled = work.ranked(found, policy, work.size_of(*described(found)))
        found = settled
        nothing = [f.part.name for f in found if f.kind == "nothing"]
        notes = [*gathered.notes]
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
        formula=formula,
        dialect=how.name,
        nbytes=nbytes,
        modules=len(found) - len(nothing),
        blocks=tuple(_blocks(found, gathered.arch, reduced)),
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
