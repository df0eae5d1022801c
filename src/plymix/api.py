"""The calls a user makes: open, explain, merge. The command line and notebooks share them.

    import plymix

    plymix.merge("a.safetensors", "b.safetensors", "out.safetensors", alpha="GRAD_V")
    print(plymix.explain("a.safetensors", "b.safetensors", alpha=0.3))

`alpha` is always the share of the second model.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, cast

import msgspec

from plymix import hashes, metadata, outputs, urls, weights
from plymix import plan as planning
from plymix import recipe as recipes
from plymix.archs.views import CLASSIC
from plymix.errors import Refusal, listed, unknown
from plymix.expr import Leaf, Tensor
from plymix.finding import find, hashing, named, needed
from plymix.formats import Source, is_folder_name, open_model, writer_for
from plymix.formats.base import Content, Layout
from plymix.formats.diffusers import MODEL_INDEX
from plymix.plan import Input, Plan, available_cpus
from plymix.recipe import BLEND, Recipe
from plymix.registry import Method, get_method

if TYPE_CHECKING:
    from plymix.engine import ProgressCallback
    from plymix.expression import Expression

PathLike = Union[str, "os.PathLike[str]"]


@dataclass(frozen=True)
class Result:
    """A finished merge."""

    path: Path
    formula: str
    nbytes: int
    seconds: float
    merged: int
    copied: int
    dropped: int
    unmatched: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "path": str(self.path), "notes": list(self.notes)}

    def __str__(self) -> str:
        return (
            f"{self.path.name} = {self.formula}  [{size(self.nbytes)}, {self.seconds:.1f} s,"
            f" {self.merged} merged, {self.copied} copied, {self.dropped} dropped,"
            f" {self.unmatched} unmatched]" + "".join(f"\nnote: {text}" for text in self.notes)
        )


@dataclass(frozen=True)
class Share:
    """How much of each input a block of the result holds: file name -> coefficient."""

    block: str
    component: str
    tensors: int
    merged: int
    copied: int
    shares: Mapping[str, float]
    method: str = ""  # the methods at work where shares do not say it all


@dataclass(frozen=True)
class Explanation:
    """What a merge would do. Nothing is written to find it out."""

    formula: str
    architecture: str
    block_view: str  # whose blocks they are
    blocks: tuple[Share, ...]
    merged: int
    copied: int
    dropped: Mapping[str, Mapping[str, int]]
    unmatched: Mapping[str, tuple[str, ...]]
    bytes_read: int
    bytes_written: int
    memory: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [self.formula, self.architecture]
        for b in self.blocks:
            shares = ", ".join(f"{100 * c:.4g} % {name}" for name, c in b.shares.items())
            how = f" by {b.method}" if b.method else ""
            lines.append(f"{b.block:<6} {b.merged:>4} merged {b.copied:>4} copied  {shares}{how}")
        lines += self.notes
        return "\n".join(lines)


def open(path: PathLike) -> Source:
    """Open a model file: its tensors, metadata and positioned reads. Close it, or use `with`.

    Raises Refusal or FormatError; reads the header only.
    """
    return open_model(path)


def two_models(
    a: PathLike,
    b: PathLike,
    *,
    alpha: Any = 0.5,
    presets: PathLike = "",
    base: float | None = None,
    method: str = "weighted_sum",
    c: PathLike | None = None,
    vae: PathLike = "a",
    text_encoder: PathLike = "",
    text_encoder_2: PathLike = "",
    unet: PathLike = "",
    dtype: str | Mapping[str, str] = "keep",
    rounding: str = "nearest",
    seed: int = 0,
    layout: str = "",
    shard: int | str = 0,
    ema: str = "drop",
    union: bool = False,
    arch: PathLike = "",
    block_view: str = "classic",
    allow_mixed_prediction: bool = False,
) -> Recipe:
    """The recipe of a merge of two models (three with `c`): what the command `merge` runs.

    `alpha` is the share of `b`: a number, a preset's name, a list of block weights, or a mapping as
    in a recipe. `presets` is a file of presets of your own (MBW's preset.tsv, supermerger's
    mbwpresets.txt), whose names `alpha` may use. `base` is the text encoder's share where `alpha`
    is not a plain number. `vae` is "a", "b", "blend" or a file; `text_encoder` (all there are),
    `text_encoder_2` and `unet` (or transformer) are "a", "b", a file, or "" to be merged. `dtype`
    is one for all or a mapping of components to dtypes; `rounding` and `seed` are for fp8. `layout`
    is "ldm" or "diffusers", `shard` the most bytes a file may have ("5GB"). `arch` is "any" for a
    plain merge by key, or a file that describes an architecture of your own. `block_view` says
    whose blocks the weights are for. Raises Refusal.
    """
    models = {"a": urls.given(a, "a"), "b": urls.given(b, "b")}
    step: dict[str, Any] = {"method": method, "a": "a", "b": "b"}
    _takes_these(get_method(method), c is not None)
    if c is not None:
        models["c"] = urls.given(c, "c")
        step["c"] = "c"
    step["alpha"] = with_base(alpha, base, own_presets(presets))
    parts = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "unet": unet}
    named = {part: urls.given(p, part) for part, p in {"vae": vae, **parts}.items()}
    letters = {part: p.lower() for part, p in named.items() if p.lower() in (*models, BLEND)}
    named |= letters | ({"vae": ""} if letters.get("vae") == "a" else {})
    output = {
        "from": "merge",
        "dtype": dict(dtype) if isinstance(dtype, Mapping) else dtype,
        "rounding": rounding,
        "seed": seed,
        "layout": layout,
        "shard": shard,
        **named,
        "ema": ema,
        "union": union,
        "arch": urls.given(arch, "arch"),
        "block_view": block_view,
        "allow_mixed_prediction": allow_mixed_prediction,
    }
    return recipes.from_dict({"models": models, "steps": {"merge": step}, "output": output})


def _takes_these(method: Method, three: bool) -> None:
    """Refuse a method that two models (three with `c`) and `alpha` cannot be given to."""
    names = method.inputs
    if names not in (("a", "b"), ("a", "b", "c")) or method.several:
        lacking = f"takes {method.takes}"
    elif "alpha" not in (p.name for p in method.params):
        lacking = "has no alpha"
    elif three and "c" not in names:
        raise Refusal(
            f"{method.name} takes two models; leave out --c or use a --method of three,"
            " such as add_difference"
        )
    elif not three and len(names) - method.optional > 2:
        raise Refusal(f"{method.name} takes {method.takes}: name the third model with --c")
    else:
        return
    raise Refusal(
        f"{method.name} {lacking}, and plymix merge is for a, b (and c) with alpha: write a recipe"
        f" for plymix run, with the step that plymix methods {method.name} shows"
    )


def own_presets(file: PathLike) -> Mapping[str, Sequence[float]]:
    """The presets of a user's file; none for no file."""
    return weights.load_preset_file(urls.given(file, "presets")) if file else {}


def with_own_presets(recipe: Recipe, own: Mapping[str, Sequence[float]]) -> Recipe:
    """`recipe` with every weight that names one of `own` presets said in numbers."""
    if not own:
        return recipe

    def said(setting: Any, field: str) -> Any:
        return weights.to_json(weights.from_toml(setting, field=field, own=own))

    found = recipes.to_dict(recipe)
    for name, step in found["steps"].items():
        method = get_method(step["method"])
        for param in method.params:
            field, value = f"steps.{name}.{param.name}", step.get(param.name)
            if param.type is float and value is not None:
                step[param.name] = said(value, field)
            elif param.type is tuple and isinstance(value, list) and not method.adapters:
                each = enumerate(value, 1)
                step[param.name] = [said(v, f"{field}: value {i}") for i, v in each]
    return recipes.from_dict(found)


def with_base(
    alpha: Any, base: float | None, own: Mapping[str, Sequence[float]] | None = None
) -> Any:
    """A weight setting with the text encoder's share said apart (`--base`)."""
    if hasattr(alpha, "tolist"):  # a numpy array
        alpha = alpha.tolist()
    read = weights.parse if isinstance(alpha, str) else weights.from_toml
    setting = read(alpha, field="alpha", own=own or {})
    value = weights.to_json(setting)
    if base is None:
        return value
    if isinstance(value, dict):
        if value.get("base", base) != base:
            raise Refusal(f"BASE is said twice: {value['base']} in alpha and {base} by --base")
        return {**value, "base": base}
    if isinstance(value, (int, float)):
        return {"base": base, "default": value, "blocks": {}}
    return {"base": base, "blocks": value}


def explain(
    a: PathLike | Recipe | Expression, b: PathLike | None = None, **options: Any
) -> Explanation:
    """What `merge` with the same arguments would do, without doing it.

    Takes two models and the options of `two_models`, a Recipe, or an expression with the fields of
    a recipe's [output] as options. `models` names folders to look for files in; `strict` refuses
    keys without a partner. Raises Refusal.
    """
    recipe, folders, strict = _asked(a, b, options)
    recipe, path = target(recipe, dry=True)
    paths = find(needed(recipe), folders)
    with planning.build(recipe, folders=folders, paths=paths, strict=strict) as plan:
        return rehearsed(plan, path)


def merge(
    a: PathLike | Recipe | Expression,
    b: PathLike | None = None,
    out: PathLike | None = None,
    *,
    force: bool = False,
    threads: int = 0,
    device: str = "cpu",
    configs: PathLike = "",
    progress: ProgressCallback | None = None,
    **options: Any,
) -> Result:
    """Merge two models, or run a Recipe or an expression, into the file or folder `out`.

        merge("a.safetensors", "b.safetensors", "out.safetensors", alpha=0.3)
        merge((plymix.model("a.ckpt") + plymix.model("b.ckpt")) / 2, "out.ckpt", dtype="fp16")

    Options are those of `two_models` or, for an expression, the fields of a recipe's [output]; and
    `models` and `strict` as for `explain`. `out` ends in .safetensors, .ckpt or .gguf; without an
    ending it is a diffusers folder, whose configurations may be those of the folder `configs`. What
    exists is replaced only with `force`. `threads` 0 means one per processor. `progress` is called
    a few times a second with a `Progress`; if it returns False the merge stops and leaves nothing.
    Raises Refusal before anything is read, Failure or Cancelled after.
    """
    if out is None and not _is_path(a):
        b, out = None, b
    recipe, folders, strict = _asked(a, b, options)
    recipe, path = target(recipe, out, force, folders)
    paths = find(needed(recipe), folders)
    with planning.build(recipe, folders=folders, paths=paths, strict=strict) as plan:
        assert path is not None
        return run(plan, path, threads=threads, device=device, configs=configs, progress=progress)


def convert(
    file: PathLike,
    out: PathLike,
    *,
    layout: str = "",
    dtype: str | Mapping[str, str] = "keep",
    rounding: str = "nearest",
    seed: int = 0,
    shard: int | str = 0,
    configs: PathLike = "",
    arch: PathLike = "",
    force: bool = False,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> Result:
    """Write the model `file` as `out`: in another container, layout or number format.

        convert("model.ckpt", "model.safetensors", dtype="fp16")
        convert("model.safetensors", "folder")         # a diffusers folder
        convert("folder", "model.safetensors")         # and back

    The options are those of `merge`. Tensors that keep their dtype keep their bytes. Raises as
    `merge` does.
    """
    path = output_path("", out)
    ready(path, force, (urls.given(file, "file"),))
    said: dict[str, Any] = {"layout": layout, "dtype": dtype, "rounding": rounding}
    with conversion(file, path, arch, seed=seed, shard=shard, **said) as plan:
        return run(plan, path, threads=threads, configs=configs, progress=progress)


def conversion(file: PathLike, path: Path, arch: PathLike = "", **output: Any) -> Plan:
    """The plan of a conversion: a model, no steps, and the fields of [output].

    What is no model (a VAE, a LoRA) is taken key by key, where no `arch` is named. Raises Refusal.
    """
    with ExitStack() as stack:
        source = stack.enter_context(open_model(file))
        found = of_one(file, "a", arch=os.fspath(arch) or by_key(source), ema="keep", **output)
        plan = planning.build(aimed(found, path), open_file=lambda _: source)
        stack.pop_all()
    return plan


def of_one(file: PathLike, name: str, **output: Any) -> Recipe:
    """The recipe of one model, called `name`, without steps. Raises Refusal."""
    if isinstance(output.get("dtype"), Mapping):
        output["dtype"] = dict(output["dtype"])
    return recipes.from_dict({"models": {name: urls.given(file, "file")}, "output": output})


def by_key(source: Source) -> str:
    """The `arch` "any" for a file that is no model of an architecture that plymix knows, or ""."""
    from plymix import pairing

    found = pairing.pair(source).detection
    return "" if found.arch and found.kind in ("checkpoint", "denoiser") else "any"


def aimed(recipe: Recipe, path: Path) -> Recipe:
    """`recipe` as it is written to `path`: what goes to a folder has diffusers' names."""
    if not is_folder_name(path) or recipe.output.layout == "diffusers":
        return recipe
    if recipe.output.layout:
        raise Refusal(
            f"{path} is to be a diffusers folder, which has no {recipe.output.layout} names: name a"
            f" file ({path.name}.safetensors), or leave out --layout"
        )
    return msgspec.structs.replace(
        recipe, output=msgspec.structs.replace(recipe.output, layout="diffusers")
    )


def target(
    recipe: Recipe,
    out: PathLike | None = None,
    force: bool = False,
    folders: Sequence[PathLike] = (),
    *,
    dry: bool = False,
) -> tuple[Recipe, Path | None]:
    """`recipe` as it is written to `out` (default: what its [output] says), and that path.

    With `dry` nothing is to be written: then there may be no path, and the recipe's own may exist.
    `folders` are those where models are looked for. Raises Refusal for what cannot be written.
    """
    if dry and not (out or recipe.output.file):
        return recipe, None
    path = output_path(recipe, out)
    inputs = (planning.locate(model.file, folders) for model in recipe.models.values())
    ready(path, force or (dry and not out), inputs)
    return aimed(recipe, path), path


def _asked(
    a: PathLike | Recipe | Expression, b: PathLike | None, options: dict[str, Any]
) -> tuple[Recipe, Sequence[str], bool]:
    """The recipe of what `merge` and `explain` are given, folders of models, whether `strict`."""
    folders = named(options.pop("models", ()), "models")
    strict: bool = options.pop("strict", False)
    if not isinstance(a, Recipe) and not _is_path(a):
        from plymix.expression import Expression

        if not isinstance(a, Expression):
            raise Refusal(
                f"{a!r} is no model's file, Recipe or expression (plymix.model(...)), of which a"
                " merge is made"
            )
        said = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
        a, options = a.recipe(**said), {}
    if isinstance(a, Recipe):
        if b is not None or options:
            raise Refusal("a Recipe says it all: give no second model and no merge options with it")
        return a, folders, strict
    if b is None:
        raise Refusal(
            "a merge of files needs two of them; to run a recipe's file, give"
            f" plymix.recipe.load({os.fspath(cast('PathLike', a))!r})"
        )
    known = two_models.__kwdefaults__ or {}
    for name in options:
        if name not in known:
            raise unknown("option", name, [*known, "models", "strict"])
    return two_models(cast("PathLike", a), b, **options), folders, strict


def _is_path(value: object) -> bool:
    return isinstance(value, (str, os.PathLike))


def output_path(a: PathLike | Recipe | Expression, out: PathLike | None) -> Path:
    file = out or (a.output.file if isinstance(a, Recipe) else "")
    if not file:
        raise Refusal("where to? name the output file (-o out.safetensors)")
    return outputs.path_of(urls.given(file, "out"))


def ready(path: Path, force: bool, inputs: Iterable[PathLike] = ()) -> None:
    """Refuse an output that cannot or should not be written, before any work.

    `inputs` are the files that go into it, as far as they are known.
    """
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):
        raise Refusal(f"{path} is a device or a pipe; name a file")
    if path.name in ("", ".."):
        raise Refusal(f"{path} has no name of its own; say which folder or file it is to be")
    if not is_folder_name(path):
        writer_for(path)
        if os.path.isdir(path):
            raise Refusal(f"{path} is a folder; name a file in it")
    outputs.writable(path)
    if os.path.ismount(path):
        raise Refusal(f"{path} is where a disk begins, and cannot be replaced; name a folder in it")
    empty = path.is_dir() and not any(path.iterdir())
    if path.is_dir() and force and not empty:
        from plymix.engine.sets import is_model

        if not is_model(path):
            raise Refusal(
                f"{path} is a folder that holds no model, and would be replaced as a whole: choose"
                " another name"
            )
    outputs.free(path, force or empty, inputs)
    outputs.free(path.with_name(f"{path.stem}.safetensors.index.json"), force)


def on_device(device: str) -> None:
    """Refuse to compute where this machine cannot. Raises Refusal."""
    if device != "cpu":
        from plymix import gpu

        gpu.require(str(device))


def run(
    plan: Plan,
    path: Path,
    *,
    threads: int = 0,
    device: str = "cpu",
    configs: PathLike = "",
    progress: ProgressCallback | None = None,
    made: tuple[Source, Plan] | None = None,
) -> Result:
    """Carry out a plan into the file or folder `path` (checked by `ready`).

    `configs` is a diffusers folder whose small files go into a folder that is written. `made` is an
    earlier result and its plan: tensors that both plans make alike are copied from it.
    """
    from plymix import engine

    on_device(device)
    if type(threads) is not int or threads < 0:
        raise Refusal(
            f"threads = {threads!r} is not a whole number from 0 on; 0 means one per processor"
        )
    if progress is not None and not callable(progress):
        raise Refusal(f"progress is {progress!r}, not a function to be called with a Progress")
    notes: list[str] = []
    _laid_out(plan, path, {}, configs, [])  # what is refused is, before models are looked into
    said = metadata.build(plan, hashing(progress, (), len(plan.inputs)))
    tensors, layout = _laid_out(plan, path, said, configs, notes)
    notes.extend(_damaged_ids(plan))
    notes.extend(_replaced(plan, path, layout))
    late = {metadata.pending(i): _hasher(i.source.files, plan.recipe, i) for i in plan.inputs}
    sources = plan.sources
    if made is not None:
        source, old = made
        changed = set(old.changes(plan))
        tensors = tuple(
            t if t.name in changed else replace(t, expr=Leaf(len(sources), source.tensors[t.name]))
            for t in tensors
        )
        sources = (*sources, source)
    written = engine.write(
        tensors,
        sources,
        layout,
        path,
        threads=threads,
        device=device,
        late=late,
        progress=progress,
    )
    return Result(
        path=path.parent / layout.index if layout.index else path,
        formula=metadata.formula(plan.recipe),
        nbytes=written.nbytes,
        seconds=written.seconds,
        merged=plan.merged,
        copied=plan.copied,
        dropped=plan.unused,
        unmatched=sum(map(len, plan.unmatched.values())),
        notes=(*plan.notes, *notes, *_spoilt(written.nonfinite)),
    )


def _laid_out(
    plan: Plan, path: Path, said: Mapping[str, str], configs: PathLike, notes: list[str]
) -> tuple[tuple[Tensor, ...], Layout]:
    """The tensors and the layout of what is written to `path`, with the metadata that is `said`.

    `notes` gets what a user should know. Raises Refusal for what cannot be written there.
    """
    if configs and not is_folder_name(path):
        raise Refusal(
            f"--configs is for diffusers folders, and {path.name} is a file; leave it out"
        )
    if plan.folder and is_folder_name(path) and (path.parent / MODEL_INDEX).is_file():
        raise Refusal(
            f"{path} would be a component of the pipeline {path.parent.name}, and the result is a"
            " pipeline itself; name a folder outside"
        )
    tensors, layout = plan.layout(path, said, small_files(configs, notes))
    if layout.index:
        names = (layout.index, *(part.name for part in layout.parts))
        outputs.writable(path, beside=max(map(len, names)) - len(path.name))
    return tensors, layout


def _damaged_ids(plan: Plan) -> Iterator[str]:
    """Tells of position ids that are copied into the result and are not 0, 1, 2 ... as int64."""
    for t in plan.tensors:
        if not t.name.endswith("position_ids") or not isinstance(t.expr, Leaf):
            continue
        source, info = plan.sources[t.expr.source], t.expr.info
        sound = info.dtype == "I64" and info.numel <= planning.MAX_IDS
        if sound and source.read(info) == struct.pack(f"<{info.numel}q", *range(info.numel)):
            continue
        from plymix.health import position_ids  # it needs numpy, which a plan does without

        for found in position_ids(source):
            if info.name in found.keys:
                yield f"{plan.inputs[t.expr.source].label}: {found.text}"


def rehearsed(
    plan: Plan, path: Path | None = None, *, device: str = "cpu", configs: PathLike = ""
) -> Explanation:
    """The account of a plan, refused where `run` would refuse it before the first tensor is read.

    `path` is where it would go, checked by `target`. Raises Refusal.
    """
    on_device(device)
    notes: list[str] = []
    if path is not None:
        _laid_out(plan, path, {}, configs, notes)
    elif configs:
        raise Refusal("--configs is for diffusers folders; name one (-o FOLDER), or leave it out")
    notes.extend(_damaged_ids(plan))
    found = explained(plan)
    return replace(found, notes=(*found.notes, *notes))


def _replaced(plan: Plan, path: Path, layout: Layout) -> Iterator[str]:
    """Says which inputs the result takes the place of."""
    home = path if is_folder_name(path) else path.parent
    new = {(home / part.name).resolve() for part in layout.parts} | {path.resolve()}
    for i in plan.inputs:
        local = (file for file in i.source.files if not urls.is_url(file))
        if any(not new.isdisjoint((file.resolve(), *file.resolve().parents)) for file in local):
            yield (
                f"the result replaced {i.label}, which it is made of: plymix replay needs a copy of"
                " that file as it was"
            )


def small_files(given: PathLike, notes: list[str]) -> Callable[[Plan], Mapping[str, Content]]:
    """What gives the small files of a folder; `notes` gets what a user should know of them."""

    def found(plan: Plan) -> Mapping[str, Content]:
        from plymix import folder

        files = folder.configs(plan, urls.given(given or "", "configs"))
        notes.extend(folder.remarks(plan, files))
        return files

    return found


def _spoilt(nonfinite: Mapping[str, int]) -> list[str]:
    if not nonfinite:
        return []
    named = listed((f"{name} ({count})" for name, count in nonfinite.items()), 5)
    return [
        f"the result holds infinities or NaN: {named}; plymix check tells whether an input has"
        " them, and --dtype bf16 or fp32 has room for numbers beyond fp16's 65504"
    ]


def _hasher(files: Sequence[Path], recipe: Recipe, i: Input) -> Callable[[Callable[[], bool]], str]:
    """Computes the SHA-256 of an input, and refuses it if the recipe names another one."""
    known = recipe.models[i.name].sha256

    def value(stopped: Callable[[], bool]) -> str:
        found = hashes.model_sha256(files, stopped)
        if known and found != known.lower():
            raise Refusal(
                f"{i.label} is not the file that the recipe names: its SHA-256 begins"
                f" {found[:10]}, not {known[:10]}; nothing was written"
            )
        return found

    return value


def explained(plan: Plan) -> Explanation:
    """The account of a plan, for people and for JSON."""
    from plymix.expr import calls, deltas, leaf_terms, shares

    order = [*plan.view.blocks, "BASE", "VAE", "EMA", "BUFFER"]
    rows: dict[tuple[str, str], list[Any]] = {}
    for tensor in plan.tensors:
        place = plan.places[tensor.name]
        rows.setdefault((place.block, place.component), []).append(tensor)
    blocks = []
    mixed: list[str] = []  # blocks whose tensors do not all have the same shares
    labels = [i.label for i in plan.inputs]
    if len(set(labels)) < len(labels):
        labels = [f"{i.name}: {i.label}" for i in plan.inputs]
    for (block, component), tensors in sorted(
        rows.items(), key=lambda r: order.index(r[0][0]) if r[0][0] in order else len(order)
    ):
        seen: Counter[tuple[tuple[str, float], ...]] = Counter()
        adapted: Counter[tuple[tuple[str, float], ...]] = Counter()  # those with a LoRA's part
        methods: set[str] = set()
        for t in tensors:
            terms = shares(t.expr)
            plain = bool(leaf_terms(t.expr))  # most are: neither a Call nor a Delta in them
            if not plain:
                methods.update(call.method for call in calls(t.expr))
                methods.update(delta.family for delta in deltas(t.expr) if delta.of is not None)
            if terms:
                total: dict[str, float] = {}
                for coefficient, source in dict.fromkeys(terms):  # a LoRA's q, k, v count once
                    name = labels[source]
                    total[name] = total.get(name, 0.0) + coefficient
                with_lora = not plain and any(True for _ in deltas(t.expr))
                (adapted if with_lora else seen)[tuple(total.items())] += 1
        typical = (adapted or seen).most_common(1)
        common = dict(typical[0][0]) if typical else {}
        if len({tuple(sorted(s)) for s in seen}) > 1 and block not in ("BUFFER", "EMA"):
            mixed.append(f"{block}: {_spread(list(map(dict, seen)))}")
        merged = sum(plan.fates[t.name].how == "merged" for t in tensors)
        blocks.append(
            Share(
                block=block,
                component=component,
                tensors=len(tensors),
                merged=merged,
                copied=len(tensors) - merged,
                shares=common,
                method=", ".join(sorted(methods)),
            )
        )
    return Explanation(
        formula=metadata.formula(plan.recipe),
        architecture=plan.base.detection.title
        + (f", blocks of {plan.view.title}" if plan.recipe.output.block_view != CLASSIC else ""),
        block_view=plan.recipe.output.block_view,
        blocks=tuple(blocks),
        merged=plan.merged,
        copied=plan.copied,
        dropped={
            name: {rule: len(keys) for rule, keys in rules.items()}
            for name, rules in plan.dropped.items()
        },
        unmatched=plan.unmatched,
        bytes_read=plan.bytes_read,
        bytes_written=plan.nbytes,
        memory=plan.memory(available_cpus()),
        notes=(*plan.notes, *mixed),
    )


def _spread(shares: Sequence[Mapping[str, float]]) -> str:
    """The lowest and highest share of each model over the tensors of a block."""
    names = dict.fromkeys(name for each in shares for name in each)
    told = []
    for name in names:
        found = [100 * each.get(name, 0.0) for each in shares]
        ends = dict.fromkeys(f"{x:.4g}" for x in (min(found), max(found)))
        told.append(f"{' to '.join(ends)} % {name}")
    return f"its tensors differ: {', '.join(told)}"


def size(nbytes: float) -> str:
    """Bytes for people: '2.13 GB' (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


__all__ = [
    "Explanation",
    "Result",
    "Share",
    "convert",
    "explain",
    "merge",
    "open",
    "two_models",
]
