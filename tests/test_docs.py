"""The documents: what they show is run, what they list is whole, where they point exists.

In the README and docs/, blocks of `sh` and `python` are run, page by page and in order, in a folder
that holds small models under the names the page uses. A comment on the line before a block says
otherwise:

    <!-- not run -->            the block is for the eye only
    <!-- drawn -->              its pictures are drawn by the backend "fake", where Pillow is there
    <!-- file: recipe.toml -->  the block is the content of that file
    <!-- install -->            the files so far are a package, which is installed here

A `text` block right after an `sh` block is what the commands print: each of its lines must be
there, in that order; `...` in a line stands for anything, `...` alone for any lines. A command
whose exit code is not 0 says so: `# exit code 2`.
"""

import contextlib
import glob
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import loras
import plymix
from plymix import cli, recipe, registry, weights
from tiny import UNET, header, state, write, write_safetensors

import write_docs  # isort: skip  (scripts/ is on the path since `tiny`)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
MADE = write_docs.made()
# The page of the commands needs cyclopts 5 to be made; with 4 it is not compared.
GENERATED = {ROOT / "docs" / name for name in (*MADE, "reference/commands.md")}
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [p for p in PAGES if p not in GENERATED]
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


# --- models under the names that the pages use --------------------------------------------------

MODELS = {
    "a": {"seed": 1},
    "b": {"seed": 2},
    "c": {"seed": 3},
    "A": {"seed": 1},
    "B": {"seed": 2},
    "model1": {"seed": 1},
    "model2": {"seed": 2},
    "base": {"seed": 3},
    "style": {"seed": 4},
    "anime": {"seed": 5},
    "photo": {"seed": 6},
    "custom": {"seed": 7},
    "inpainting": {"seed": 8, "arch": "sd1-inpainting"},
    "with-ema": {"seed": 9, "ema": True},
    "xl-a": {"seed": 10, "arch": "sdxl"},
    "xl-b": {"seed": 11, "arch": "sdxl"},
    "xl-v": {"seed": 12, "arch": "sdxl", "markers": ("v_pred", "ztsnr")},
    "sd-v1-4": {"seed": 13},
    "old-anime": {"seed": 15, "nai": True},
    "wd-v1-3": {"seed": 14},
    **{f"m{i:02}": {"seed": 20 + i} for i in range(1, 11)},
}
LUMEN = {"lumen-a": 1, "lumen-b": 2}
OWN = {  # the invented architecture of guide/own-architecture.md
    "stem.weight": ("F16", (8, 4)),
    **{f"time.{i}.weight": ("F16", (8, 8)) for i in (0, 2)},
    **{f"layers.{i}.{part}.weight": ("F16", (8, 8)) for i in range(4) for part in ("mix", "ff")},
    "positions": ("F32", (16, 8)),
    "head.weight": ("F16", (4, 8)),
}
LORAS = {"ink": 1, "eyes": 2}
CHANGED = (  # by them
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_output_blocks_3_1_transformer_blocks_0_attn2_to_v",
    "lora_unet_middle_block_1_proj_in",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
)
NAMED = re.compile(r"[\w-]+\.(?:safetensors|ckpt)")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Makes a small model under a name, once; gives its path, or None for a result's name."""
    folder = tmp_path_factory.mktemp("library")

    @cache
    def give(name):
        stem, _, ending = name.partition(".")
        path = folder / name
        if stem in ("vae-ft-mse", "broken"):
            made = header("sd1")
            if stem == "vae-ft-mse":
                start = "first_stage_model."
                made = {k.removeprefix(start): v for k, v in made.items() if k.startswith(start)}
            values = state(made, 99)
            if stem == "broken":
                values["model.diffusion_model.out.2.weight"].reshape(-1)[0] = float("nan")
            return write_safetensors(path, made, values)
        if stem in LORAS:
            return lora_file(path, LORAS[stem])
        if stem in LUMEN:
            return write_safetensors(path, OWN, state(OWN, LUMEN[stem]))
        if stem not in MODELS:
            return None
        if ending == "safetensors":
            return write(path, **MODELS[stem])
        one = recipe.from_dict({"models": {"m": str(give(f"{stem}.safetensors"))}, "steps": {}})
        return plymix.merge(one, path).path

    return give


def lora_file(path, seed):
    """A LoRA that changes the modules CHANGED of a small SD1 model."""
    model, tensors = header("sd1"), {}
    for i, module in enumerate(CHANGED):
        part = "cond_stage_model.transformer." if module.startswith("lora_te") else UNET
        name = module.removeprefix("lora_te_").removeprefix("lora_unet_")
        keys = (k for k in model if k.startswith(part) and k.endswith(".weight"))
        key = next(k for k in keys if k[len(part) : -7].replace(".", "_") == name)
        for end, x in loras.lora(model[key][1], 10 * seed + i).tensors.items():
            tensors[f"{module}.{end}"] = x
    kinds = {key: ("F32", x.shape) for key, x in tensors.items()}
    return write_safetensors(path, kinds, tensors)


# --- running a page -----------------------------------------------------------------------------


class Block(NamedTuple):
    mark: str  # "", "not run", "drawn", "install" or "file: NAME"
    language: str
    text: str
    line: int
    after: str  # the language of the block right before, or ""


def blocks(page):
    text = page.read_text(encoding="utf-8")
    end, last = 0, ""
    for found in BLOCK.finditer(text):
        mark, language, body = found[1] or "", found[2], found[3]
        joined = not text[end : found.start()].strip()
        line = text.count("\n", 0, found.start(3))
        yield Block(mark, language, body, line, last if joined else "")
        end, last = found.end(), "" if mark else language


RUN = [p for p in WRITTEN if any(b.language in ("sh", "python", "toml") for b in blocks(p))]


class Shell:
    """Runs a page's commands: in this process, or in new ones once a package is installed."""

    def __init__(self, folder):
        self.folder = folder
        self.packages = None
        self.names = {"__name__": "__main__"}

    def sh(self, text, *more):
        printed = ""
        for line in text.replace("\\\n", " ").splitlines():
            words, expected = shlex.split(line, comments=True), 0
            if said := re.search(r"# exit code (\d+)", line):
                expected = int(said[1])
            if not words:
                continue
            assert words[0] in ("plymix", "merge_block_weighted"), f"mark it as not run: {line}"
            into = words[-1] if words[-2:-1] == [">"] else ""
            words = words[:-2] if into else words
            words = [found for word in words for found in glob.glob(word) or [word]]
            if more and "--redo" not in words:
                words += more if "--size" in words else (*more, "--size", "64x64")
            code, out, err = self.call(words)
            assert code == expected, f"{line}\nexit code {code}\n{out}{err}"
            if into:
                (self.folder / into).write_text(out, encoding="utf-8")
                out = ""
            printed += err + out
        return printed

    def call(self, words):
        if words[0] == "merge_block_weighted":
            words = ["plymix", "mbw", *words[1:]]
        if self.packages:
            paths = [str(self.packages), str(Path(plymix.__file__).parent.parent)]
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
            command = [sys.executable, "-m", "plymix", *words[1:]]
            done = subprocess.run(command, env=env, capture_output=True, check=False)
            return done.returncode, done.stdout.decode(), done.stderr.decode()
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.run(words[1:])
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())
        return (code, *texts)

    def install(self):
        """What pip does with the page's pyproject.toml: put modules and entry points in place."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text("utf-8"))["project"]
        self.packages = self.folder / "site-packages"
        info = self.packages / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        for module in self.folder.glob("*.py"):
            shutil.copy(module, self.packages)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        (info / "entry_points.txt").write_text(
            "".join(
                f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items())
                for group, points in project["entry-points"].items()
            )
        )

    def run(self, page):
        printed = ""
        for block in blocks(page):
            where = f"{name_of(page)}, line {block.line}"
            try:
                if block.mark.startswith("file: "):
                    path = self.folder / block.mark.removeprefix("file: ")
                    path.write_text(block.text, encoding="utf-8")
                elif block.mark == "install":
                    self.install()
                elif block.mark == "drawn":
                    if importlib.util.find_spec("PIL"):
                        self.sh(block.text, "--backend", "fake")
                elif block.mark:
                    assert block.mark == "not run", f"unknown mark {block.mark!r}"
                elif block.language == "sh":
                    printed = self.sh(block.text)
                elif block.language == "python":
                    exec(compile(block.text, where, "exec"), self.names)
                elif block.language == "text" and block.after == "sh":
                    shown(block.text, printed)
                else:
                    assert block.language == "text", f"say what this {block.language} block is"
            except Exception as e:
                e.args = (f"{where}: {e}",)
                raise


def shown(expected, printed):
    """Every expected line is among the printed ones, in order."""
    left = [" ".join(line.split()) for line in printed.splitlines()]
    for line in expected.splitlines():
        parts = " ".join(line.split()).split("...")
        like = re.compile(".*".join(map(re.escape, parts)))
        at = next((i for i, found in enumerate(left) if like.fullmatch(found)), None)
        assert at is not None, f"not printed: {line}\n--- what was:\n{printed}"
        del left[: at + 1]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_what_a_page_shows_works(page, library, tmp_path, monkeypatch):
    for name in sorted(set(NAMED.findall(page.read_text(encoding="utf-8")))):
        if made := library(name):
            shutil.copy(made, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COLUMNS", raising=False)
    Shell(tmp_path).run(page)


def test_a_wrong_page_is_found(library, tmp_path, monkeypatch):
    """The tests above can fail: an unknown command, an output that is not so, an exception."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "wrong.md"
    for text in (
        "```sh\nplymix blend\n```\n",
        "```sh\nplymix presets\n```\n\n```text\nGRAD_W\n```\n",
        "```python\nraise ValueError\n```\n",
        "```sh\nrm -r everything\n```\n",
        "```toml\n[models]\n```\n",
    ):
        monkeypatch.setattr(Path, "read_text", lambda self, *_, text=text, **__: text)
        with pytest.raises((AssertionError, ValueError)):
            Shell(tmp_path).run(page)


# --- generated pages ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_generated_pages_are_up_to_date(name):
    path = ROOT / "docs" / name
    assert path.exists(), f"docs/{name} is missing: run make docs"
    assert path.read_text(encoding="utf-8") == MADE[name], (
        f"docs/{name} is not what the program says now: run make docs"
    )


def test_nothing_else_lies_among_them():
    drawn = {"sheet.png", "prompts.png", "blocks.png"}  # of the pair that `make demo` merges
    known = {p.name for p in GENERATED} | drawn
    for folder in ("reference", "images"):
        assert {p.name for p in (ROOT / "docs" / folder).iterdir()} <= known


# --- nothing is left out ------------------------------------------------------------------------


def text_of(*pages):
    return "\n".join(p.read_text(encoding="utf-8") for p in pages)


def test_every_command_is_in_the_guide():
    text = text_of(*WRITTEN)
    missing = [name for name in cli.COMMANDS if f"plymix {name}" not in text]
    assert not missing, f"no page says how to use {missing}"


def test_every_method_is_listed():
    text = text_of(ROOT / "docs/reference/methods.md")
    own = [m.name for m in registry.methods().values() if m.function.__module__[:7] == "plymix."]
    missing = [name for name in own if f"\n### {name}\n" not in text]
    assert not missing


def test_every_preset_is_listed():
    text = text_of(ROOT / "docs/reference/presets.md")
    assert not [name for name in weights.presets() if f"`{name}`" not in text]


def test_every_field_of_a_recipe_is_told():
    text = text_of(ROOT / "docs/reference/recipe.md")
    structs = (recipe.Model, recipe.Step, recipe.Output)
    names = [f.rstrip("_") for s in structs for f in s.__struct_fields__]
    assert not [name for name in names if f"| `{name}` |" not in text]


def test_every_public_name_is_told():
    text = text_of(ROOT / "docs/reference/python.md")
    names = [n for n in plymix.__all__ if not n.startswith("_")]
    assert not [name for name in names if f"\n## plymix.{name}\n" not in text]


def test_every_guide_and_decision_is_linked():
    text = text_of(ROOT / "README.md", ROOT / "docs/README.md")
    for folder in ("guide", "decisions", "reference"):
        for page in (ROOT / "docs" / folder).glob("*.md"):
            assert f"{folder}/{page.name}" in text, f"nothing links to {name_of(page)}"


# --- links and paths ----------------------------------------------------------------------------

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def headings(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = [line.lstrip("#").strip() for line in text.splitlines() if re.match("#+ ", line)]
    return {write_docs.anchor(h) for h in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for found in LINK.finditer(text):
        link = found[1] or found[2]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leads out of the project"
        if place and target.suffix == ".md":
            assert f"#{place}" in headings(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_path_of_one_machine(page):
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(?<![\w.])(?:/(?:home|root|work|tmp|Users|opt)/\S+|[A-Z]:\\\S+)", text)
    assert not found
