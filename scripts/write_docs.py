"""`make docs`: the pages of docs/ that the program itself tells, and the README's picture.

    docs/reference/*.md           commands, methods, recipes, presets, architectures, LoRA files,
                                  Python
    docs/images/block-table.svg   the block table of a merge

`made()` gives them as path -> text; a test compares that with what lies in docs/. What stands here
by hand is looked up by name, so that a field or kind without its sentence stops the script.
"""

from __future__ import annotations

import inspect
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import tiny_checkpoints  # noqa: E402
from cyclopts import Parameter  # noqa: E402

import lora_matrix  # noqa: E402
import loras as lora_changes  # noqa: E402
import plymix  # noqa: E402
from plymix import api, archs, cli, recipe, registry, weights  # noqa: E402
from plymix.adapters import families as lora_families  # noqa: E402
from plymix.adapters.spelling import DIALECTS  # noqa: E402
from plymix.archs.views import CLASSIC, view  # noqa: E402
from plymix.cli import architectures as architectures_of  # noqa: E402
from plymix.cli import looking, merging, screen, showing  # noqa: E402

GENERATED = (
    "<!-- Written by scripts/write_docs.py from the program itself. To change this page, change"
    " the program and run: make docs -->"
)


TELLS_METAVARS = "metavar" in inspect.signature(Parameter).parameters
"""Whether this is cyclopts 5. In 4, which Python 3.10 gets, an option cannot say what its value is
called, so that the page of the commands cannot be written."""


def made() -> dict[str, str]:
    """Every generated file: path below docs/ -> text."""
    pages = {
        "reference/commands.md": commands() if TELLS_METAVARS else (),
        "reference/methods.md": methods(),
        "reference/recipe.md": recipes(),
        "reference/presets.md": presets(),
        "reference/architectures.md": architectures(),
        "reference/loras.md": lora_files(),
        "reference/python.md": python(),
        "images/block-table.svg": picture(),
    }
    return {name: "\n".join(lines).rstrip() + "\n" for name, lines in pages.items() if lines}


# --- Markdown -----------------------------------------------------------------------------------


def page(title: str, *intro: str) -> Iterator[str]:
    yield from (f"# {title}", "", GENERATED, "")
    for text in intro:
        yield from (text, "")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def fence(text: str, language: str = "text") -> Iterator[str]:
    yield from (f"```{language}", *text.strip("\n").splitlines(), "```", "")


def code(*words: str) -> str:
    return ", ".join(f"`{word}`" for word in words)


def anchor(heading: str) -> str:
    """The link to a heading, as GitHub makes it."""
    return "#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- commands -----------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    yield from page(
        "Commands",
        "`plymix COMMAND --help` shows the same in the terminal. The exit code is 0 when all went"
        " well, 1 when the work failed or a file was found unhealthy, 2 when plymix refused, and"
        " 130 when you stopped it. With `--json`, stdout holds exactly one JSON document.",
    )
    names = list(cli.COMMANDS)
    yield from table(
        ("command", "what it does"),
        [(f"[`{n}`]({anchor(f'plymix {n}')})", cli.COMMANDS[n][1]) for n in names],
    )
    yield from ("`merge_block_weighted` is `plymix mbw` under its old name.", "")
    for name in names:
        yield from command(name)


def command(name: str) -> Iterator[str]:
    app = cli.app(name)
    home = import_module(f"plymix.cli.{cli.COMMANDS[name][0].partition(':')[0]}")
    given = [a for a in app.assemble_argument_collection() if a.names != ("*",)]
    words = [a for a in given if a.index is not None]
    options = [a for a in given if a.index is None]
    usage = " ".join(f"{w.name}" if w.required else f"[{w.name}]" for w in words)
    yield from (f"## plymix {name}", "")
    yield from (str(app.help), "")
    yield from fence(f"plymix {name} {usage}{' [options]' if options else ''}")
    yield from table(
        ("option", "meaning"),
        [(f"`{spelling(a)}`", a.parameter.help + choices(a)) for a in (*words, *options)],
    )
    example = home.EXAMPLES[name].replace("PROG", f"plymix {name}").partition("\n")[2]
    yield from fence(inspect.cleandoc(example))


def spelling(argument: Any) -> str:
    if argument.index is not None:
        return str(argument.name)
    metavar = argument.parameter.metavar
    if metavar is None and not argument.get_choices() and argument.hint is not bool:
        metavar = "VALUE"
    return " ".join([", ".join(argument.names), *([metavar] if metavar else [])])


def choices(argument: Any) -> str:
    said = []
    if found := argument.get_choices():
        said.append(f"One of {code(*found)}.")
    if argument.parameter.show_default and argument.field_info.default is not None:
        said.append(f"Default {code(str(argument.field_info.default))}.")
    return "".join(f" {text}" for text in said)


# --- methods ------------------------------------------------------------------------------------

KINDS = {
    "linear": "a sum of its models with fixed numbers; folded with its neighbours, run in one pass",
    "elementwise": "an element of the result depends on that element of the models; run in chunks",
    "tensor": "needs the whole tensor of one key in memory",
    "cross": "as `tensor`, after a first pass over all keys",
    "group": "keys are solved together first, then applied key by key",
}


def methods() -> Iterator[str]:
    if set(KINDS) != set(get_args(registry.Kind)):
        raise SystemExit(f"KINDS of {__file__} are not those of plymix.registry")
    own = [m for m in registry.methods().values() if m.function.__module__.startswith("plymix.")]
    families: dict[str, list[registry.Method]] = {}
    for found in own:
        family = ".".join(found.function.__module__.split(".")[:3])  # may be a folder
        families.setdefault(family, []).append(found)
    order = [f"plymix.methods.{name}" for name in registry._FAMILIES]
    yield from page(
        "Merge methods",
        f"plymix brings {len(own)} merge methods. Each is one plain function on float32 arrays in"
        " a file of `src/plymix/methods`; this page is what the functions say of themselves, and"
        " `plymix methods NAME` shows the same in the terminal.",
        "In formulas A, B, C are the models in their order, X_0 or `base` the common base,"
        " d_i = X_i - X_0 the difference of model i from it, R the result, N the number of"
        " elements of a tensor. A parameter that is a number may be"
        " [a weight for each block](recipe.md#weights) in a recipe.",
    )
    yield from table(("kind", "meaning"), [(f"`{k}`", text) for k, text in KINDS.items()])
    for module in order:
        yield from (f"- [{title(module)}]({anchor(title(module))})",)
    yield ""
    for module in order:
        yield from (f"## {title(module)}", "")
        rest = (import_module(module).__doc__ or "").strip().partition("\n")[2].strip()
        if rest:
            yield from fence(rest)
        yield from table(
            ("method", "models", "what it does"),
            [
                (f"[`{m.name}`]({anchor(m.name)})", f"`{looking._models(m)}`", m.label)
                for m in families[module]
            ],
        )
        for found in families[module]:
            yield from method(found)


def title(module: str) -> str:
    return (import_module(module).__doc__ or "").strip().splitlines()[0].rstrip(".")


def method(found: registry.Method) -> Iterator[str]:
    yield from (f"### {found.name}", "", f"**{found.label}.**", "")
    yield from fence(found.doc.partition("\n")[2])
    said = [f"Models: `{looking._models(found)}`.", f"Kind: `{found.kind}`."]
    if found.random:
        said.append("Random: set `seed` in the step.")
    if found.delta:
        said.append("Gives a difference, to be added to a model by a later step.")
    yield from (" ".join(said), "")
    if found.params:
        yield from table(
            ("parameter", "what it takes"),
            [(f"`{p.name}`", looking._param(p)) for p in found.params],
        )


# --- recipe -------------------------------------------------------------------------------------

MODEL_FIELDS = {
    "file": 'The file\'s name, or its path. `name = "file"` alone says the same.',
    "size": "Its size in bytes. Recorded by a merge; a replay checks it.",
    "sha256": "Its SHA-256. Recorded by a merge; a replay checks it.",
}
STEP_FIELDS = {
    "method": "The name of a [merge method](methods.md). Required.",
    "inputs": "The method's models by their names: `a`, `b`, `c`, `base` ..., and `models` (a list)"
    " where it takes any number of them. Each is the name of a model or of another step.",
    "params": "The method's parameters by their names: `alpha`, `weights`, `density` ...",
    "rules": "[Element rules](#element-rules), as one text or a list of them.",
    "seed": "A whole number for methods that draw at random.",
}
OUTPUT_FIELDS = {
    "from_": "The step, or model, that is written. Left out: the last step.",
    "file": "Where to: a `.safetensors`, `.ckpt` or `.gguf` file, or without an ending a diffusers"
    " folder. `plymix run -o` comes before it.",
    "dtype": "Number format of the weights, or a table of components and theirs, with `default` for"
    " the rest. `keep`: each tensor as the base model has it."
    " [Buffers keep theirs](../decisions/01-buffers-are-never-cast.md).",
    "rounding": "How fp8 rounds: `stochastic` is up or down by chance.",
    "seed": "For stochastic rounding.",
    "layout": "Whose names the result has: `diffusers`, or the architecture's own (`ldm` for any,"
    " and by their right name `sgm`, `sai`, `bfl`). Left out:"
    " [the base model's](../guide/convert.md#names).",
    "shard": "The most bytes of a file, as a number or as `5GB`, `2GiB`. Left out: all in one.",
    "vae": "Whose VAE: a model of the recipe, a file, or `blend` (merged like the text encoder)."
    " Left out: [that of the base model](../decisions/02-the-vae-is-the-first-models.md).",
    "text_encoder": "Whose text encoders, all that it has: a model of the recipe or a file. Left"
    " out: merged by the steps.",
    "text_encoder_2": "The same for the second text encoder.",
    "unet": "The same for the U-Net or transformer, with its markers (`v_pred`).",
    "component": "Write this component alone: `vae`, `text_encoder`, `unet` ..., as `plymix archs"
    " NAME` lists them, by the names that such files usually have.",
    "prefix": "With `component`: by the names of a checkpoint.",
    "drop": "What to leave out: components, `schedules` (of noise), `leftovers` (losses,"
    " optimizers), keys `unknown` to the architecture, `metadata` other than ModelSpec's.",
    "ema": "EMA weights: `drop` them, `keep` the base model's as they are, `use` them as the"
    " weights, or `exchange` both."
    " [Why they are dropped](../decisions/03-ema-is-dropped.md).",
    "union": "Add the keys that the base model lacks.",
    "trim": "Drop the keys that another model lacks.",
    "repair": "`position_ids` resets the text encoder's to 0..76; `names` writes text encoder keys"
    " of the NovelAI era by their names of today.",
    "arch": "`any` merges key by key, whatever the models are; a file (`.toml`) or a table"
    " describes [an architecture of your own](../guide/own-architecture.md).",
    "block_view": "Whose blocks the weights are for, where tools disagree: see"
    " [block views](architectures.md#block-views).",
    "allow_mixed_prediction": "Merge models that predict different things (epsilon and v).",
    "adjust": "Detail, contrast and colour, set on the finished model; see [below](#adjust).",
    "title": "The title in the result's metadata.",
    "date": "The date in it, a day. Left out: today;"
    " [recorded, so that a replay gives the same bytes](../decisions/05-the-date-is-a-day.md).",
}
ADJUST_FIELDS = {
    "detail": "three numbers, or one for all: detail at the input, at the output, and of the output"
    " convolution. 0 changes nothing; supermerger's `IN`, `OUT`, `OUT2`.",
    "contrast": "a number, 0 changes nothing; supermerger's `CONT`.",
    "brightness": "a number, 0 changes nothing; supermerger's `BRI`.",
    "colour": "three numbers: cyan-red, magenta-green, yellow-blue; 0 changes nothing.",
    "saturation": "a factor on the colours the VAE paints; 1 changes nothing.",
    "cfg": "a factor on the cross-attention; 1 changes nothing.",
}


def recipes() -> Iterator[str]:
    yield from page(
        "Recipes",
        "A recipe is a TOML file (or JSON of the same shape) with three tables. Names are yours;"
        " a field that plymix does not know is an error that names the nearest one. Write it by"
        " hand ([how](../guide/recipes.md)), build it in Python"
        " ([how](../guide/python.md)), or print the one a result carries: `plymix recipe show`.",
    )
    yield from (
        "## [models]",
        "",
        'One line per file: `name = "file"`, or a table of these fields.',
        "",
    )
    yield from fields(recipe.Model, MODEL_FIELDS)
    yield from (
        "Files are looked for as named, then in each folder of `--models`, then beside the recipe.",
        "",
        "## [steps]",
        "",
        "One table per step, `[steps.NAME]`. A step may use models and other steps, in any order,"
        " but not in a circle. Any nest of linear steps becomes one sum per tensor, rounded once;"
        " nothing in between is written.",
        "",
    )
    yield from fields(recipe.Step, STEP_FIELDS)
    yield from ("## [output]", "")
    yield from fields(
        recipe.Output,
        OUTPUT_FIELDS,
        {
            "dtype": tuple(recipe.DTYPES),
            "rounding": recipe.ROUNDINGS,
            "ema": recipe.EMA,
            "repair": recipe.REPAIRS,
        },
    )
    yield from (
        "The *base model* is the first model of the final step (and of its first step, and so"
        " on): it decides the key names, the number formats and all that is not merged.",
        "",
        "### adjust",
        "",
        "For SD1, SD2 and SDXL. A table of:",
        "",
    )
    yield from table(
        ("field", "what it takes"), [(f"`{k}`", text) for k, text in ADJUST_FIELDS.items()]
    )
    yield from ("## Weights", "")
    yield from (
        "`alpha`, `beta` and every other parameter that is a number may be set for each block."
        " In every step `alpha` is the share of the second model.",
        "",
    )
    yield from fence(inspect.cleandoc((weights.__doc__ or "").split("\n\n")[1]))
    yield from (
        "BASE is the weight of the text encoder, where the architecture's lists do not split it"
        " further ([which do](architectures.md)). A plain number is for BASE too; a list of block"
        " weights without BASE leaves the text encoder as the first model has it, unless `base`"
        " says otherwise. The VAE follows no weight: it is"
        " [one model's](../decisions/02-the-vae-is-the-first-models.md).",
        "",
    )
    for found in (weights.Blocks, weights.Curve):
        yield from (f"### {found.__name__}", "")
        yield from fence(inspect.getdoc(found) or "")
    yield from (
        "## Element rules",
        "",
        "In supermerger's syntax. They replace the block's number for the tensors they match (the"
        " method's first parameter that is a number, usually `alpha`). The last rule that matches"
        " wins. A rule that matches nothing is an error that names it, as is an element that no"
        " tensor of the model has in its name; a rule or number that later rules leave no tensor"
        " is noted. [`--set`](../guide/recipes.md#try-another-value) of a block is stronger than"
        " rules for whole blocks, weaker than those for elements.",
        "",
    )
    yield from fence(f"{inspect.getdoc(weights.Rule)}\n\n{inspect.getdoc(weights.parse_rules)}")


def fields(
    struct: Any, texts: dict[str, str], known: dict[str, tuple[str, ...]] | None = None
) -> Iterator[str]:
    if set(texts) != set(struct.__struct_fields__):
        raise SystemExit(
            f"{struct.__name__}: {set(texts) ^ set(struct.__struct_fields__)} is told in one of"
            f" plymix.recipe and {__file__} only"
        )
    rows = []
    for name, text in texts.items():
        values = (known or {}).get(name, ())
        said = f" One of {code(*values)}." if values else ""
        rows.append((f"`{name.rstrip('_')}`", text + said))
    yield from table(("field", "meaning"), rows)


# --- presets and architectures ------------------------------------------------------------------


def presets() -> Iterator[str]:
    every = weights.presets().values()
    yield from page(
        "Presets",
        f"The {len(every)} published lists of block weights that plymix knows, by name, in any"
        " case. In `plymix merge` and in recipes the numbers are the share of the second model;"
        " in `plymix mbw` they are the share of model 1, as its users know them. Where a preset"
        " has a formula it fits any number of blocks (x runs from 0 at the first block to 1 at the"
        " last); where it has none it is for its own architecture only.",
        "`plymix presets NAME` draws one.",
    )
    sources: dict[str, list[weights.Preset]] = {}
    for preset in every:
        sources.setdefault(preset.source, []).append(preset)
    for source, group in sources.items():
        names = group[0].names
        yield from (f"## {len(names)} numbers, of {source.partition(' (')[0]}", "")
        yield from (f"For {weights.spans(names)}. Source: {source}.", "")
        yield from table(
            ("preset", "also", "from first to last", "formula"),
            [
                (
                    f"`{p.name}`",
                    code(*p.aliases),
                    looking.sparkline(p.values),
                    (f"`{p.form}`" if p.form else "") + (f" ({p.remark})" if p.remark else ""),
                )
                for p in group
            ],
        )
        numbers = [f"{p.name}\n  {', '.join(f'{v:.10g}' for v in p.values)}" for p in group]
        yield from fence("\n".join(numbers))


def architectures() -> Iterator[str]:
    every = [archs.load(name) for name in archs.names()]
    yield from page(
        "Architectures",
        "A file's architecture is told from its keys and shapes, never from its name. Every key"
        " belongs to exactly one block. `plymix archs NAME` shows the same in the terminal."
        " Weights that are not in a block of the list are BASE (text encoders), VAE (the first"
        " model's unless you say otherwise) and buffers (never blended).",
        "A file of an architecture that is not here is refused by name; `--arch any` merges it"
        " key by key, `--arch FILE.toml` by the blocks that [you describe]"
        "(../guide/own-architecture.md).",
        "Blocks are those of the deepest model of an architecture; for one with fewer layers a list"
        " has as many numbers as that model has blocks.",
    )
    yield from table(
        ("name", "architecture", "blocks", "parameters", "diffusers' names of"),
        [
            (
                f"[`{a.name}`]({anchor(a.title)})",
                a.title,
                str(len(a.blocks)),
                ", ".join(
                    f"{title} {screen.count(architectures_of.parameters(n, a.blocks))}"
                    for title, n in a.sizes().items()
                ),
                ", ".join(architectures_of.diffusers(a)) or "none",
            )
            for a in every
        ],
    )
    yield from block_views(every)
    for arch in every:
        yield from (f"## {arch.title}", "")
        kinds = list(dict.fromkeys(v.title or v.name for v in arch.variants))
        if kinds:
            yield from (f"Also as {', '.join(kinds)} model.", "")
        lists = architectures_of.lists(arch)
        if finer := [*arch.parts, *(n for n in arch.outside if n != "BASE")]:
            yield from (f"Finer names: {code(*finer)}.", "")
        yield from table(
            ("numbers", "for"), [(str(n), weights.spans(b)) for n, b in sorted(lists.items())]
        )
        rows = [
            (c.title, code(*(c.prefixes or (architectures_of.denoiser_prefix(),))), keys(c))
            for c in arch.components
        ]
        yield from table(("component", "keys begin with", "blocks"), rows)


def block_views(every: list[archs.Architecture]) -> Iterator[str]:
    yield from (
        "## Block views",
        "",
        "Tools disagree about what belongs to which block. `--block-view` (in a recipe `block_view`"
        " in `[output]`) says whose blocks the weights of a merge are for: lists have their numbers"
        " in that tool's order, tables their names, and `plymix explain` shows them.",
        "",
        "A table, and a rule, may also use finer names than blocks: parts of them (`TIME`, `LABEL`,"
        " `OUT`), single text encoders (`CLIP_L`), the `VAE`. A finer name wins over its block.",
        "",
    )
    tools = archs.model.shared_facts().views
    yield from table(
        ("view", "of", "merges", "for"),
        [
            (
                f"`{name}`",
                tool.title,
                f"tensors with {' or '.join(code(w) for w in tool.words)} in their names; the"
                " others stay the first model's"
                if tool.words
                else "every tensor",
                "every architecture"
                if name == CLASSIC
                else ", ".join(a.short for a in every if name in a.views),
            )
            for name, tool in tools.items()
        ],
    )
    rows = []
    for arch in every:
        for name in arch.views:
            seen = view(arch, name)
            moved = [f"`{part}` is {to}'s" for part, to in seen.moves.items()]
            if part := "; ".join([weights.spans(seen.blocks), *moved]):
                rows.append((arch.short, f"`{name}`", str(len(seen.blocks)), part))
    yield from table(("architecture", "view", "numbers", "for"), rows)


def keys(component: archs.model.Component) -> str:
    """'`time_embed.` IN00, ...'"""
    if not component.blocks:
        return component.block.split()[0]
    told = [f"`{key}` {block.replace(' ', '/')}" for key, block in component.blocks.items()]
    return "; ".join(told)


# --- LoRA files ---------------------------------------------------------------------------------

LAYERS = {  # of SD1, and of Flux: by their own names, by diffusers'
    False: {True: "input_blocks.4.1.proj_in", False: "down_blocks.1.attentions.0.proj_in"},
    True: {True: "double_blocks.0.img_attn.proj", False: "transformer_blocks.0.attn.to_q"},
}


def lora_files() -> Iterator[str]:
    yield from page(
        "LoRA files",
        "What plymix reads and writes of LoRA and its kin, and how it is known to be right. How to"
        " use them: [Add LoRAs to a model](../guide/lora.md), [Merge, extract, resize and convert]"
        "(../guide/lora-files.md).",
    )
    yield from ("## Families", "")
    yield from table(
        ("family", "keys end with", "needs the weight"),
        [
            (
                f.name,
                code(*(f.suffixes if f.name != "IA3" else (".weight", ".on_input"))),
                "yes" if f.on_weight else "no",
            )
            for f in lora_families().values()
        ],
    )
    yield from (
        "Any of them with `.dora_scale` or `.lora_magnitude_vector` is a DoRA, which needs the"
        " weight. Those that do cannot be added up without it: they are baked, and renamed by"
        " `plymix lora convert`, but not merged or resized.",
        "",
        "## Spellings",
        "",
    )
    spellings = lora_matrix.SPELLINGS
    yield from table(
        ("spelling", "of", "a module's key", "`--to`"),
        [
            (
                name,
                s.tools,
                code(
                    next(iter(s.keys(LAYERS[s.of_transformers][s.own], lora_changes.lora((4, 4)))))
                ),
                code(*written(s)) or "read only",
            )
            for name, s in spellings.items()
        ],
    )
    yield from (
        "Also read: x-flux's `double_blocks.0.processor.qkv_lora1.down.weight`, which holds LoRA"
        " alone. Text encoders are "
        + ", ".join(
            f"`{start}`"
            for start in dict.fromkeys(n for names in lora_matrix.ENCODERS.values() for n in names)
        )
        + ". `--to` is the name in `plymix lora convert`, `merge`, `extract` and `resize`.",
        "",
        "## Which family in which spelling",
        "",
        "plymix looks modules up by name, whatever their family, so it reads every family in every"
        " spelling. ●: tools that write the spelling have the family. ○: none is known to;"
        " it is read, and tried, all the same.",
        "",
    )
    names = dict.fromkeys((*lora_changes.LINEAR, *lora_changes.CONV))
    yield from table(
        ("family", "of", *spellings, "forward pass of"),
        [
            (
                name,
                "linear, convolution" if layers == 3 else ("linear", "convolution")[layers - 1],
                *("●" if name in s.known else "○" for s in spellings.values()),
                ", ".join(ran_by(name)),
            )
            for name in names
            if (layers := (name in lora_changes.LINEAR) + 2 * (name in lora_changes.CONV))
        ],
    )
    libraries = [n for n in (*lora_matrix.LYCORIS, *lora_matrix.PEFT) if n not in names]
    yield from (
        "Norms and biases (`.w_norm`, `.b_norm`, `.diff`, `.diff_b`) are in each of the files that"
        " are tried. Against LyCORIS and PEFT there are also: "
        + ", ".join(dict.fromkeys(libraries))
        + ".",
        "",
        "How each cell is known:",
        "",
        "- **By the formula.** A small SD1 file for each spelling has every kind of module, each"
        " with another family. The baked weights agree to 1e-5 with float64 sums that share no code"
        " with plymix; every other tensor is copied.",
        "- **For every architecture.** The same with its own names and, where another program's"
        " converter is on record, with diffusers': "
        + ", ".join(f"`{m}`" for m in lora_matrix.MODELS)
        + ". All names of all modules of these in all spellings mean the tensor that those bakes"
        " changed. Text encoders alike.",
        "- **By who runs them.** For the families in the last column the library's own module is"
        " put on a layer, its numbers drawn and saved as it saves them; its forward pass agrees"
        " with that of the baked weight. What plymix writes is loaded by the libraries in the same"
        " way, and every family that `convert` renames is baked once more from the new file.",
        "",
        "## What is refused",
        "",
        "- PEFT's other methods (OFT, BOFT, (IA)³, VeRA, HRA, ...): what their numbers do stands in"
        " `adapter_config.json`, not in the file. Merge them in PEFT and extract a LoRA.",
        "- T-LoRA: its layers change with the time step, which a weight cannot.",
        "- diffusers' and PEFT's spellings are written for LoRA, and for DoRA by rows; other"
        " families are refused by name there, as x-flux's would be.",
        "- (IA)³ under names with dots, if the file holds the very modules that AuraFlow, Anima or"
        " Cosmos-Predict2 are known by: its keys are then those of a model. No tool writes such.",
        "- Fused q, k and v (Flux and others) of a family that depends on the weight, where one"
        " spelling has them apart and the other has not: `convert` refuses it; `bake` reads both.",
        "- Where tools disagree about the numbers, [decision 16](../decisions/16-loras-add-up.md)"
        " says whose plymix has and why.",
        "",
    )


def written(spelling: lora_matrix.Spelling) -> list[str]:
    """The dialects of plymix that write this spelling."""
    return [
        d.name
        for d in DIALECTS.values()
        if (d.own, d.plain) == (spelling.own, spelling.plain)
        and spelling.start in {d.denoiser.format(component=c) for c in ("unet", "transformer")}
        and d.ends["down"].removeprefix(".") in ("lora_down.weight", *spelling.ends.values())
    ]


def ran_by(family: str) -> list[str]:
    return [
        title
        for title, known in (
            ("LyCORIS", lora_matrix.LYCORIS),
            ("PEFT", (*lora_matrix.PEFT, *lora_matrix.PEFT_OTHERS)),
        )
        if family in known
    ]


# --- Python -------------------------------------------------------------------------------------

ALSO = {
    "plymix.loras": ("merge", "extract", "resize", "convert", "Made", "Block"),
    "plymix.recipe": ("load", "from_toml", "from_json", "to_toml", "to_json"),
    "plymix.replay": ("replay", "verify"),
    "plymix.difference": ("Difference", "Distance", "Compared"),
    "plymix.upkeep": ("Upkeep", "LeftOut", "Repair"),
    "plymix.weights": ("presets", "load_preset_file"),
    "plymix.inspection": ("Report",),
    "plymix.health": ("Health", "Finding"),
    "plymix.formats": ("Source", "TensorInfo"),
    "plymix.importers": ("Imported",),
    "plymix.registry": ("methods", "method", "Range"),
}
"""What the functions above give, and what the guide uses from elsewhere."""


def python() -> Iterator[str]:
    yield from page(
        "Python",
        "`import plymix` does nothing but give these names; each is loaded when it is first used."
        " Everything is typed. plymix raises `plymix.Refusal` for what cannot be asked and"
        " `plymix.Failure` for what went wrong; both are a `plymix.PlymixError`.",
        "Every [merge method](methods.md) is also a method of every `plymix.Expression`.",
    )
    for name in plymix.__all__:
        if not name.startswith("_"):
            yield from public(f"plymix.{name}", getattr(plymix, name))
    for module, names in ALSO.items():
        for name in names:
            yield from public(f"{module}.{name}", getattr(import_module(module), name))


def public(name: str, found: Any) -> Iterator[str]:
    """A function's signature and text; a class's, with its fields and members."""
    yield from (f"## {name}", "")
    if not isinstance(found, type):
        yield from fence(f"{name}{signature(found)}\n{indented(found)}")
        return
    fields = attributes(found)
    made = "__init__" in vars(found) and not fields and not issubclass(found, Exception)
    parts = [f"class {name}{signature(found, skip=1) if made else ''}\n{indented(found)}"]
    parts += ["\n".join(f"    {field}" for field in fields)] if fields else []
    for member, value in vars(found).items():
        function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        function = function.fget if isinstance(function, property) else function
        if member.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        given = "" if isinstance(value, property) else signature(function, skip=value is function)
        lines = f"{member}{given}\n{indented(function)}".split("\n")
        parts.append("\n".join(f"    {line}".rstrip() for line in lines))
    yield from fence("\n\n".join(parts))


def attributes(found: type) -> list[str]:
    """'path: Path' for each field of a struct or dataclass."""
    names = getattr(found, "__struct_fields__", None) or getattr(found, "__dataclass_fields__", ())
    hints = vars(found).get("__annotations__", {})
    return [f"{n.rstrip('_')}: {hints[n]}" for n in names if n in hints]


def indented(found: Any) -> str:
    lines = (inspect.getdoc(found) or "").splitlines()
    return "\n".join(f"    {line}".rstrip() for line in lines)


def signature(found: Any, *, skip: int = 0) -> str:
    """A signature with its annotations as they are written, without the first `skip` names."""
    function = vars(found)["__init__"] if isinstance(found, type) else found
    words: list[str] = []
    before = None
    for p in list(inspect.signature(function).parameters.values())[skip:]:
        if before is p.POSITIONAL_ONLY and p.kind is not before:
            words.append("/")
        if p.kind is p.KEYWORD_ONLY and before not in (p.KEYWORD_ONLY, p.VAR_POSITIONAL):
            words.append("*")
        before = p.kind
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        hint = "" if p.annotation is p.empty else f": {p.annotation}"
        default = "" if p.default is p.empty else f" = {p.default!r}"
        words.append(f"{star}{p.name}{hint}{default}")
    back = function.__annotations__.get("return")
    returns = f" -> {back}" if back and not isinstance(found, type) else ""
    line = f"({', '.join(words)}){returns}"
    if len(line) <= 80:
        return line
    return "(\n" + "".join(f"    {word},\n" for word in words) + f"){returns}"


# --- the picture --------------------------------------------------------------------------------

STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2328 }
.page { fill: #ffffff; stroke: #d1d9e0 } .dim { fill: #59636e }
.a { fill: #0969da } .b { fill: #d4a72c } .line { stroke: #d1d9e0 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .page { fill: #0d1117; stroke: #3d444d } .dim { fill: #9198a1 }
  .a { fill: #4493f8 } .b { fill: #bb8009 } .line { stroke: #3d444d }
}
"""
ROW, TOP, WIDTH = 17, 64, 760
BLOCK, SHARE_A, BAR, BAR_WIDTH, SHARE_B, MERGED, COPIED = 20, 168, 184, 300, 500, 650, 736
"""Where the columns stand, in pixels; numbers are aligned to the right."""


def picture() -> Iterator[str]:
    """The block table of the classic command, from the plan of a real merge, as SVG."""
    names = ("model1.ckpt", "model2.ckpt")
    with tempfile.TemporaryDirectory() as folder:
        files = [
            str(tiny_checkpoints.write(Path(folder) / n, "sd1", i)) for i, n in enumerate(names)
        ]
        plan, _, _ = merging.classic(files[0], files[1], 1.0, "GRAD_V")
        rows = showing.rows(api.explain(plan).blocks)
    height = TOP + ROW * len(rows) + 10
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
        f' viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="Each block of the result and its share of {names[0]} and {names[1]}">'
    )
    yield f"<style>{STYLE}</style>"
    yield f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>'
    asked = f"$ plymix mbw {' '.join(names)} --base_alpha 1.0 --weights GRAD_V --verbose"
    yield label(asked, BLOCK, 24, "dim")
    heads = ((BLOCK, "block"), (SHARE_A, names[0]), (SHARE_B, names[1]), (MERGED, "merged"))
    for x, text in (*heads, (COPIED, "copied")):
        yield label(text, x, TOP - 14, "dim", right=x in (SHARE_A, MERGED, COPIED))
    yield f'<path class="line" d="M{BLOCK} {TOP - 6.5}H{COPIED}"/>'
    for i, (block, shares, _, merged, copied) in enumerate(rows):
        first, second = (shares.get(name, 0.0) for name in names)
        y = TOP + ROW * i + 10
        yield label(block, BLOCK, y)
        yield label(screen.percent(first), SHARE_A, y, right=True)
        yield from bar(first, y - 9)
        yield label(screen.percent(second), SHARE_B, y)
        yield label(str(merged), MERGED, y, right=True)
        yield label(str(copied), COPIED, y, "dim", right=True)
    yield "</svg>"


def label(text: str, x: int, y: int, name: str = "", *, right: bool = False) -> str:
    kind = (f' class="{name}"' if name else "") + (' text-anchor="end"' if right else "")
    return f'<text x="{x}" y="{y}"{kind}>{escape(text)}</text>'


def bar(share: float, y: int) -> Iterator[str]:
    """The first model's share from the left, the second's to the right."""
    cut = round(BAR_WIDTH * share, 2)
    for name, start, width in (("a", 0.0, cut), ("b", cut, round(BAR_WIDTH - cut, 2))):
        if width:
            yield (
                f'<rect class="{name}" x="{BAR + start:g}" y="{y}" width="{width:g}"'
                f' height="{ROW - 5}"/>'
            )


def main() -> None:
    for name, text in made().items():
        path = ROOT / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"docs/{name}  {len(text.splitlines())} lines")
    if not TELLS_METAVARS:
        raise SystemExit("docs/reference/commands.md is not written: that needs cyclopts 5")


if __name__ == "__main__":
    main()
