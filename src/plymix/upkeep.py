"""What is done to one model around a merge: take a component out, prune it, repair it.

    plymix.extract("a.safetensors", "vae", "vae.safetensors")
    plymix.prune("a.ckpt", "a-pruned.safetensors", dtype="fp16").saved
    plymix.repair("old.safetensors", "mended.safetensors").repairs

Each is a recipe with one model, no step and a few fields of the output; so it streams, its result
says what it was made from, and `replay` and `verify` work on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from plymix import api, archs, metadata, pairing, urls
from plymix import plan as planning
from plymix import recipe as recipes
from plymix.archs import Architecture
from plymix.errors import Refusal
from plymix.formats import Source, open_model
from plymix.plan import MAX_IDS, Plan
from plymix.recipe import Recipe

if TYPE_CHECKING:
    from plymix.engine import ProgressCallback

PathLike = Union[str, "os.PathLike[str]"]


@dataclass(frozen=True)
class LeftOut:
    """Tensors that a rule kept out of the result; `nbytes` is their size in the file.

    Of an extracted component the rest of the model is not told.
    """

    rule: str
    nbytes: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Repair:
    """One thing put right. `kind` is "position_ids", "names" or "contiguous"."""

    kind: str
    key: str
    text: str


@dataclass(frozen=True)
class Upkeep:
    """What became of a model, or, where `path` is None, what would.

    `before` and `after` are the sizes of its files in bytes, `tensors` how many the result has.
    """

    path: Path | None
    formula: str
    tensors: int
    before: int
    after: int
    left_out: tuple[LeftOut, ...] = ()
    repairs: tuple[Repair, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def saved(self) -> int:
        """Bytes by which the result is smaller."""
        return self.before - self.after

    def to_dict(self) -> dict[str, Any]:
        path = str(self.path) if self.path else None
        return {**asdict(self), "path": path, "saved": self.saved}


def extract(
    model: PathLike,
    component: str,
    out: PathLike | None = None,
    *,
    keep_prefix: bool = False,
    dtype: str | Mapping[str, str] = "keep",
    ema: str = "drop",
    layout: str = "",
    shard: int | str = 0,
    configs: PathLike = "",
    arch: PathLike = "",
    dry_run: bool = False,
    force: bool = False,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Upkeep:
    """Write one component of `model` into the file or folder `out`.

    `component` is one that `plymix archs NAME` lists: "vae", "text_encoder", "unet", ... The result
    has the names that such files usually have, or, with `keep_prefix`, those it has in the model.
    `ema="use"` takes the EMA weights of the denoiser. `layout`, `shard`, `configs` and `arch` are
    as for `merge`; a folder has diffusers' names. With `dry_run` nothing is written. Raises
    Refusal.
    """
    recipe = _recipe(
        model,
        component=component,
        prefix=keep_prefix,
        dtype=dtype,
        ema=ema,
        layout=layout,
        shard=shard,
        arch=os.fspath(arch),
    )
    with open_model(model) as source:
        return _made(source, recipe, out, configs, dry_run, force, threads, progress)


def prune(
    model: PathLike,
    out: PathLike | None = None,
    *,
    drop: Sequence[str] = (),
    ema: str = "drop",
    dtype: str | Mapping[str, str] = "keep",
    layout: str = "",
    shard: int | str = 0,
    configs: PathLike = "",
    arch: PathLike = "",
    dry_run: bool = False,
    force: bool = False,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Upkeep:
    """Write `model` into the file or folder `out` without what only training needs.

    EMA weights are left out, kept, or with `ema="use"` put in place of the others. `drop` names
    more: components, "schedules" (of noise), keys "unknown" to the architecture, "metadata" that
    says nothing of the model. `dtype`, `layout`, `shard`, `configs` and `arch` are as for `merge`.
    With `dry_run` nothing is written. Raises Refusal.
    """
    with open_model(model) as source:
        recipe = _recipe(
            model,
            drop=list(dict.fromkeys(("leftovers", *_names(drop)))),
            ema=ema,
            dtype=dtype,
            layout=layout,
            shard=shard,
            arch=os.fspath(arch) or api.by_key(source),
        )
        return _made(source, recipe, out, configs, dry_run, force, threads, progress)


def repair(
    model: PathLike,
    out: PathLike | None = None,
    *,
    shard: int | str = 0,
    configs: PathLike = "",
    arch: PathLike = "",
    dry_run: bool = False,
    force: bool = False,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Upkeep:
    """Write `model` into the file or folder `out` with what is broken put right, and nothing else.

    CLIP position ids that are not 0..76 in int64, text encoder names of the NovelAI era, tensors
    that do not lie in one piece. Where nothing is broken, nothing is written. `shard` and
    `configs` are as for `merge`, `arch` is a file that describes an architecture of your own.
    Raises Refusal.
    """
    if out is not None:
        api.ready(api.output_path("", out), force, (urls.given(model, "model"),))
    with open_model(model) as source:
        broken = tuple(_broken(source, archs.described(arch)))
        if not broken:
            nbytes = source.nbytes
            return Upkeep(None, source.path.name, len(source.tensors), nbytes, nbytes)
        kinds = {one.kind for one in broken}
        named = [name for name in recipes.REPAIRS if name in kinds]
        known = os.fspath(arch) or api.by_key(source)
        recipe = _recipe(model, repair=named, ema="keep", shard=shard, arch=known)
        made = _made(source, recipe, out, configs, dry_run, force, threads, progress)
    return replace(made, repairs=broken)


def _names(drop: str | Sequence[str]) -> Sequence[str]:
    if not isinstance(drop, (str, Sequence)):
        raise Refusal(f"drop is {drop!r}, not a list of names")
    return (drop,) if isinstance(drop, str) else drop


def _recipe(model: PathLike, **output: Any) -> Recipe:
    return api.of_one(model, recipes.model_name(urls.given(model, "model"), ()), **output)


def _made(
    source: Source,
    recipe: Recipe,
    out: PathLike | None,
    configs: PathLike,
    dry_run: bool,
    force: bool,
    threads: int,
    progress: ProgressCallback | None,
) -> Upkeep:
    if out is not None or not dry_run:
        path = api.output_path(recipe, out)
        api.ready(path, force, source.files)
    else:
        path = Path("result.safetensors")
    recipe = api.aimed(recipe, path)
    with planning.build(recipe, open_file=lambda _: source) as plan:
        told = Upkeep(
            path=None,
            formula=metadata.formula(recipe),
            tensors=len(plan.tensors),
            before=plan.base.source.nbytes,
            after=0,
            left_out=tuple(_left_out(plan)),
            notes=plan.notes,
        )
        if dry_run:
            notes: list[str] = []
            files = api.small_files(configs, notes)
            after = plan.layout(path, metadata.build(plan), files)[1].size
            return replace(told, after=after, notes=(*plan.notes, *notes))
        done = api.run(plan, path, threads=threads, configs=configs, progress=progress)
    return replace(told, path=done.path, after=done.nbytes, notes=done.notes, seconds=done.seconds)


def _left_out(plan: Plan) -> Iterator[LeftOut]:
    base = plan.base
    rules = {**plan.dropped[base.name], "not in the result": plan.unmatched[base.name]}
    for rule, keys in rules.items():
        stored = rule in base.source.left_out  # scales: their numbers are in the weights
        if keys and not stored and not rule.startswith("component ="):
            yield LeftOut(rule, sum(_size(base, key) for key in keys), tuple(keys))


def _size(base: planning.Input, key: str) -> int:
    info = base.source.tensors.get(key) or base.paired.tensors[key]
    return info.nbytes


# --- what is broken -----------------------------------------------------------------------------


def _broken(source: Source, own: Architecture | None) -> Iterator[Repair]:
    """What `repair` puts right in a file."""
    from plymix.health import position_ids

    for finding in position_ids(source):
        (key,) = finding.keys
        info = source.tensors[key]
        if info.numel > MAX_IDS:
            continue
        wrong = f"{finding.elements} wrong" if finding.elements else "right"
        text = f"{info.dtype}, {wrong} of {info.numel}; now 0..{info.numel - 1} as I64"
        yield Repair("position_ids", key, text)
    arch = pairing.unpaired(source, own).detection.arch
    for key, info in source.tensors.items():
        if arch and (name := arch.old_name(key)):
            yield Repair("names", key, f"now {name}")
        if info.strides is not None:
            yield Repair(
                "contiguous", key, f"lay in strides of {[*info.strides]}; now in one piece"
            )
