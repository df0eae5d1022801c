"""The commands in process: what they make, what they show, what they refuse."""

from __future__ import annotations

import io
import json
import os
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix as plymix_module
import tiny
from plymix import errors
from plymix import recipe as recipes
from plymix.cli import COMMANDS, app, overview, run
from plymix.cli.merging import default_name, rest
from plymix.cli.recipes import Kind
from plymix.importers import READERS

GRAD_V = [abs(1 - 2 * i / 24) for i in range(25)]
CLASSIC = (
    "1,0.9166666667,0.8333333333,0.75,0.6666666667,0.5833333333,0.5,0.4166666667,0.3333333333,"
    "0.25,0.1666666667,0.0833333333,0,0.0833333333,0.1666666667,0.25,0.3333333333,0.4166666667,"
    "0.5,0.5833333333,0.6666666667,0.75,0.8333333333,0.9166666667,1.0"
)
BLOCKS = [*(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))]


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def last(self) -> str:
        return self.out.splitlines()[-1]

    @property
    def notes(self) -> list[str]:
        return [x for x in self.err.splitlines() if x.startswith("note: ")]


@contextmanager
def streams(encoding: str) -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    kept = sys.stdout, sys.stderr
    raw = io.BytesIO(), io.BytesIO()
    sys.stdout, sys.stderr = (io.TextIOWrapper(r, encoding=encoding) for r in raw)
    try:
        yield raw
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.detach()  # flushes; `raw` stays open
        sys.stdout, sys.stderr = kept


def plymix(*words: object, encoding: str = "utf-8") -> Ran:
    with streams(encoding) as (out, err):
        code = run([str(w) for w in words])
    return Ran(code, out.getvalue().decode(encoding), err.getvalue().decode(encoding))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for i, name in enumerate("abc"):
        tiny.write(folder / f"{name}.safetensors", "sd1", seed=i, dtype="F32")
    for i, name in enumerate("ab"):
        tiny.write(folder / f"xl-{name}.safetensors", "sdxl", seed=i)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with `a.safetensors` and so on linked into it."""
    for file in models.iterdir():
        os.link(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def values(path: Path) -> dict[str, Any]:
    header, state, _ = tiny.read_safetensors(path)
    return {k: tiny.decode(v, header[k][0]) for k, v in state.items()}


def mixed(a: Path, b: Path, arch: str, share_of_a: dict[str, float]) -> dict[str, Any]:
    """w A + (1 - w) B in float64, w by the golden header's block; buffers and the rest A's."""
    x, y = values(a), values(b)
    found = {}
    for key, (_, _, _, block) in tiny.golden(arch).items():
        w = share_of_a.get(block)
        if w is None or x[key].dtype.kind != "f":
            found[key] = x[key]
        else:
            found[key] = w * x[key].astype(np.float64) + (1 - w) * y[key].astype(np.float64)
    return found


def same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=tolerance, atol=1e-9, err_msg=key)


# --- mbw ----------------------------------------------------------------------------------------


def test_mbw_is_the_classic_command(here: Path) -> None:
    ran = plymix(
        "mbw", "a.safetensors", "b.safetensors", "--base_alpha", "1.0", "--weights", CLASSIC,
        "--output", "out.safetensors",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    weights = [float(w) for w in CLASSIC.split(",")]
    shares = dict(zip(BLOCKS, weights, strict=True)) | {"BASE": 1.0, "VAE": 1.0}
    expected = mixed(here / "a.safetensors", here / "b.safetensors", "sd1", shares)
    same(values(here / "out.safetensors"), expected, 2e-7)
    assert ran.last.startswith(
        "out.safetensors = w × a.safetensors + (1 - w) × b.safetensors, w = 25 weights"
        " (0 % to 100 %) in the U-Net; text encoder and VAE 100 % a.safetensors ["
    )


def test_a_preset_is_the_share_of_model_1(here: Path) -> None:
    words = ("mbw", "a.safetensors", "b.safetensors", "--weights", "grad_v", "--base-alpha=0.25")
    ran = plymix(*words, "-o", "out.safetensors", "--json")
    assert ran.code == 0
    assert ran.json["share_of_model_1"]["BASE"] == 0.25
    found = [ran.json["share_of_model_1"][b] for b in BLOCKS]
    np.testing.assert_allclose(found, GRAD_V, atol=1e-6)
    shares = dict(zip(BLOCKS, found, strict=True)) | {"BASE": 0.25, "VAE": 0.25}
    expected = mixed(here / "a.safetensors", here / "b.safetensors", "sd1", shares)
    same(values(here / "out.safetensors"), expected, 2e-7)


@pytest.mark.parametrize(("words", "share"), [((), 0.5), (("--base_alpha", "0.2"), 0.2)])
def test_without_weights_mbw_is_a_plain_merge(here: Path, words: tuple[str], share: float) -> None:
    ran = plymix("mbw", "a.safetensors", "b.safetensors", *words)
    shares = dict.fromkeys((*BLOCKS, "BASE", "VAE"), share)
    expected = mixed(here / "a.safetensors", here / "b.safetensors", "sd1", shares)
    same(values(here / "a-b-mbw.safetensors"), expected, 2e-7)
    percent = f"{100 * share:g} % a.safetensors + {100 - 100 * share:g} % b.safetensors"
    assert ran.last.startswith(f"a-b-mbw.safetensors = {percent} [")


def test_mbw_with_vae_and_text_encoder_from_files_mixes_the_unet(here: Path) -> None:
    """Scripts say --base_alpha whether or not anything is left of what it is for."""
    words = ("mbw", "a.safetensors", "b.safetensors", "--weights", CLASSIC, "--base_alpha", "0.3")
    ran = plymix(*words, "--vae", "a.safetensors", "--text_encoder", "a.safetensors")
    assert (ran.code, ran.err) == (0, "")
    shares = dict(zip(BLOCKS, map(float, CLASSIC.split(",")), strict=True))
    expected = mixed(here / "a.safetensors", here / "b.safetensors", "sd1", shares)
    same(values(here / "a-b-mbw.safetensors"), expected, 2e-7)


def test_weights_outside_0_to_1_extrapolate(here: Path) -> None:
    weights = ["-0.2", *["1.5"] * 24]
    ran = plymix("mbw", "a.safetensors", "b.safetensors", "--weights", ",".join(weights))
    assert ran.code == 0, ran.err
    shares = dict(zip(BLOCKS, map(float, weights), strict=True)) | {"BASE": 0.5, "VAE": 0.5}
    expected = mixed(here / "a.safetensors", here / "b.safetensors", "sd1", shares)
    same(values(here / "a-b-mbw.safetensors"), expected, 1e-6)


def test_sdxl_takes_19_weights(here: Path) -> None:
    words = ("mbw", "xl-a.safetensors", "xl-b.safetensors", "--weights")
    ran = plymix(*words, ",".join(["0.25"] * 9 + ["1"] + ["0"] * 9), "--json")
    assert ran.code == 0, ran.err
    assert ran.json["share_of_model_1"] == {
        "BASE": 0.5,
        **{f"IN{i:02}": 0.25 for i in range(9)},
        "M00": 1.0,
        **{f"OUT{i:02}": 0.0 for i in range(9)},
    }
    refused = plymix(*words, CLASSIC, "-o", "other.safetensors")
    assert refused.code == 2
    assert "25 numbers given; SDXL wants 19: IN00-IN08, M00, OUT00-OUT08" in refused.err


def test_a_preset_with_a_base_value_says_so(here: Path) -> None:
    words = ("mbw", "xl-a.safetensors", "xl-b.safetensors", "--weights", "SDXL_GRAD_V", "--force")
    ran = plymix(*words, "--json")
    assert ran.json["share_of_model_1"]["BASE"] == 0.0
    assert "note: text encoder and VAE take the BASE value, 0" in ran.notes
    assert plymix(*words, "--json", "--base_alpha", "1").json["share_of_model_1"]["BASE"] == 1.0


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_verbose_shows_every_block(
    here: Path, monkeypatch: pytest.MonkeyPatch, columns: int, encoding: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ran = plymix(
        "mbw", "a.safetensors", "b.safetensors", "--base_alpha", "0.7", "--weights", CLASSIC,
        "--verbose", encoding=encoding,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("block"))
    assert lines[head].split()[1:3] == ["a.safetensors", "b.safetensors"]
    table = [line.split() for line in lines[head + 1 : -1]]
    weights = dict(zip(BLOCKS, map(float, CLASSIC.split(",")), strict=True))
    weights |= {"BASE": 0.7, "VAE": 0.7, "BUFFER": 1.0}
    assert [row[0] for row in table] == list(weights)
    full, empty = ("█", "░") if encoding == "utf-8" else ("#", ".")
    for (name, first, _, drawn, second, *_), line in zip(table, lines[head + 1 :], strict=False):
        w = weights[name]
        assert float(first) == pytest.approx(100 * w, abs=0.0051)
        assert float(second) == pytest.approx(100 - 100 * w, abs=0.0051)
        assert abs(drawn.count(full) - w * len(drawn)) <= 1
        assert (empty in drawn) == (w < 1)
        assert len(line) <= columns


def test_default_names_are_tame() -> None:
    assert default_name("x/one [v1] two.ckpt", "b.safetensors") == ("one_v1_two-b-mbw.safetensors")
    assert len(default_name("あ" * 300 + ".ckpt", "b" * 300).encode()) < 256


@given(st.integers(-(10**6), 10**6))
def test_the_rest_keeps_its_decimals(n: int) -> None:
    assert rest(n / 1000) == (1000 - n) / 1000


# --- merge and explain --------------------------------------------------------------------------


def test_merge_takes_the_share_of_the_second_model(here: Path) -> None:
    ran = plymix(
        "merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors",
        "--alpha", "-0.2", "--base", "0.3",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    shares = dict.fromkeys(BLOCKS, 1.2) | {"BASE": 0.7}  # no VAE: A's
    expected = mixed(here / "a.safetensors", here / "b.safetensors", "sd1", shares)
    same(values(here / "out.safetensors"), expected, 1e-6)
    assert ran.last.startswith("out.safetensors = ")
    assert ran.last.endswith("unmatched]")


@pytest.mark.parametrize("spelling", ["=", " "])
def test_a_list_may_begin_with_a_minus(here: Path, spelling: str) -> None:
    spec = ",".join(["-0.5", *["0.25"] * 24])
    alpha = [f"--alpha={spec}"] if spelling == "=" else ["--alpha", spec]
    ran = plymix("explain", "a.safetensors", "b.safetensors", *alpha, "--json")
    assert ran.code == 0, ran.err
    shares = {b["block"]: b["shares"] for b in ran.json["blocks"]}
    assert shares["IN00"] == {"a.safetensors": 1.5, "b.safetensors": -0.5}
    assert shares["M00"] == {"a.safetensors": 0.75, "b.safetensors": 0.25}
    assert shares["VAE"] == {"a.safetensors": 1.0}


def test_add_difference_shows_three_files(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("a.safetensors", "b.safetensors", "--method", "add_difference", "--alpha", "0.5")
    refused = plymix("merge", *words, "-o", "out.safetensors")
    assert (refused.code, "--c" in refused.err) == (2, True)
    monkeypatch.setenv("COLUMNS", "100")
    ran = plymix("explain", *words, "--c", "c.safetensors")
    row = next(line for line in ran.out.splitlines() if line.startswith("IN05"))
    made_of = "100 % a.safetensors + 50 % b.safetensors - 50 % c.safetensors"
    assert row.split()[3:] == made_of.split()


def test_any_method_of_a_b_and_c_with_alpha_is_merged(here: Path) -> None:
    words = ("merge", "a.safetensors", "b.safetensors", "--method", "triple_sum")
    ran = plymix(*words, "--c", "c.safetensors", "-o", "o.safetensors", "--alpha", "0.5")
    assert ran.code == 0, ran.err
    key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    a, b, c = (values(here / f"{n}.safetensors")[key].astype(np.float64) for n in "abc")
    expected = 0.25 * a + 0.5 * b + 0.25 * c  # beta is 0.25
    np.testing.assert_allclose(values(here / "o.safetensors")[key], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["a.safetensors", "link.safetensors"])
def test_a_result_that_replaces_an_input_says_so(here: Path, name: str) -> None:
    if name.startswith("link"):
        (here / name).symlink_to("a.safetensors")
    ran = plymix("merge", name, "b.safetensors", "-o", "a.safetensors", "--force")
    assert ran.code == 0, ran.err
    assert [n for n in ran.notes if "replaced" in n] == [
        f"note: the result replaced {name}, which it is made of: plymix replay needs a copy of that"
        " file as it was"
    ]
    other = plymix("merge", "c.safetensors", "b.safetensors", "-o", "a.safetensors", "--force")
    assert (other.code, other.notes) == (0, [])


def test_the_formula_of_a_replay_is_that_of_the_run(here: Path) -> None:
    table = '{ default = 0.1, blocks = { OUT05 = 0.5, "IN00-IN05" = 0.2 }, base = 0.3 }'
    recipe = RECIPE.replace('{ base = 0.0, blocks = "GRAD_V" }', table)
    ties = 'method = "ties"\nbase = "mix"\nmodels = ["three"]\nscale = 0.9\ndensity = 0.4\n'
    at = recipe.index('method = "add_difference"')
    (here / "r.toml").write_text(recipe[:at] + ties + recipe[recipe.index("\n[output]") :])
    ran, again = plymix("run", "r.toml", "--json"), plymix("replay", "final.safetensors", "--json")
    assert (ran.code, again.code) == (0, 0), ran.err + again.err
    assert ran.json["formula"] == again.json["formula"]
    assert plymix("explain", "r.toml", "--json").json["formula"] == ran.json["formula"]


def test_explain_counts_every_tensor(here: Path) -> None:
    ran = plymix("explain", "a.safetensors", "b.safetensors", "--alpha", "0.5", "--json")
    golden = tiny.golden("sd1")
    floats = [k for k, (d, *_) in golden.items() if d != "I64"]
    mixed_keys = [k for k in floats if golden[k][3] in (*BLOCKS, "BASE")]
    assert ran.json["merged"] == len(mixed_keys)
    assert ran.json["merged"] + ran.json["copied"] == len(golden)
    assert sum(b["tensors"] for b in ran.json["blocks"]) == len(golden)
    assert sorted(p.name for p in here.iterdir()) == sorted(
        [*(f"{n}.safetensors" for n in ("a", "b", "c", "xl-a", "xl-b"))]
    )


def test_explain_tells_the_shares_of_a_block_whose_tensors_differ(here: Path) -> None:
    step = 'method = "weighted_sum"\na = "a"\nb = "b"\nalpha = 0.7\nrules = ["IN05:attn2:0.3"]\n'
    models = "".join(f'{m} = "{m}.safetensors"\n' for m in "abc")
    last = '[steps.y]\nmethod = "add_difference"\na = "x"\nb = "c"\nc = "a"\nalpha = 0.6\n'
    (here / "r.toml").write_text(f"[models]\n{models}[steps.x]\n{step}{last}")
    notes = plymix("explain", "r.toml", "--json").json["notes"]
    assert [note for note in notes if note.startswith("IN05")] == [
        "IN05: its tensors differ: -30 to 10 % a.safetensors, 30 to 70 % b.safetensors,"
        " 60 % c.safetensors"
    ]


def test_folders_of_models_that_are_not_there_are_refused(here: Path) -> None:
    plymix("merge", "a.safetensors", "b.safetensors", "-o", "ab.safetensors")
    for words in (
        ("verify", "ab.safetensors"),
        ("replay", "ab.safetensors", "-o", "x.safetensors"),
    ):
        ran = plymix(*words, "--models", "nowhere")
        assert (ran.code, "--models nowhere is not a folder" in ran.err) == (2, True)


IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@pytest.mark.parametrize("dtype", ["I64", "F32"])
@pytest.mark.parametrize(
    "words",
    [
        ("merge", "bad.safetensors", "b.safetensors", "-o", "o.ckpt"),
        ("mbw", "bad.safetensors", "b.safetensors", "-o", "o.ckpt"),
        ("explain", "bad.safetensors", "b.safetensors"),
        ("explain", "bad.safetensors", "b.safetensors", "-o", "o.ckpt"),
        ("merge", "a.safetensors", "c.safetensors", "-oo.ckpt", "--text-encoder=bad.safetensors"),
        ("run", "r.toml"),
        ("convert", "bad.safetensors", "o.ckpt"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_damaged_position_ids_are_reported(here: Path, words: tuple[str, ...], dtype: str) -> None:
    """They are copied as they are; `repair` is only on request, and then nothing is said."""
    header = tiny.header("sd1", dtype="F32")
    state = {key: value.copy() for key, value in tiny.state(header).items()}
    state[IDS] = state[IDS].astype(tiny.NUMPY[dtype])
    state[IDS][0, 41] = 40
    header[IDS] = (dtype, (1, 77))
    tiny.write_safetensors(here / "bad.safetensors", header, state)
    (here / "r.toml").write_text(RECIPE.replace('"a.safetensors"', '"bad.safetensors"'))
    ran = plymix(*words, "--json")
    assert ran.code == 0
    said = f"bad.safetensors: {IDS} ({dtype}) is not 0..76: wrong at 41; the text encoder"
    assert [n for n in ran.notes if n.startswith(f"note: {said}")] == ran.notes[-1:] != []
    assert [n for n in ran.json["notes"] if n.startswith(said)] == ran.json["notes"][-1:]
    if words[0] == "run":
        again = plymix(*words, "--set", 'output.repair=["position_ids"]', "--force")
        assert "position_ids" not in again.err
        assert "position_ids" not in plymix("explain", "a.safetensors", "b.safetensors").err


def test_a_share_beyond_both_models_is_told_in_the_commands_own_numbers(here: Path) -> None:
    assert plymix(*MERGE, "--alpha", "1.5").notes == [
        "note: --alpha goes to 1.5: beyond both models"
    ]
    told = plymix(*MBW, "--base_alpha", "1.5", "--force").notes
    assert told == ["note: --base_alpha goes to 1.5: beyond both models"]


def test_a_recipe_for_a_folder_is_explained_as_one(here: Path) -> None:
    """What a run would write: diffusers' names, and what such a folder cannot hold."""
    (here / "r.toml").write_text(RECIPE.replace("final.safetensors", "final"))
    told = plymix("explain", "r.toml", "--json").json
    made = plymix("run", "r.toml", "--force", "--json").json
    assert (told["merged"], told["copied"]) == (made["merged"], made["copied"])
    assert any("alphas_cumprod" in note for note in told["notes"])


def test_dry_run_writes_nothing_and_equals_explain(here: Path) -> None:
    words = ("a.safetensors", "b.safetensors", "--alpha", "GRAD_V")
    dry = plymix("merge", *words, "-o", "out.safetensors", "--dry-run")
    assert dry.out == plymix("explain", *words).out
    assert "nothing was written" in dry.last
    assert not (here / "out.safetensors").exists()


def test_keys_without_a_partner_are_named(here: Path) -> None:
    header, state, _ = tiny.read_safetensors(here / "b.safetensors")
    gone = "model.diffusion_model.middle_block.0.in_layers.0.weight"
    extra = "model.diffusion_model.middle_block.0.in_layers.9.weight"
    header[extra], state[extra] = header.pop(gone), state.pop(gone)
    tiny.write_safetensors(here / "odd.safetensors", header, state)
    words = ("a.safetensors", "odd.safetensors", "-o", "out.safetensors")
    ran = plymix("merge", *words)
    assert ran.code == 0
    assert any(gone in text for text in ran.notes)
    assert any(extra in text and "odd.safetensors" in text for text in ran.notes)
    strict = plymix("merge", *words, "--strict", "--force")
    assert (strict.code, "--strict" in strict.err) == (2, True)


def test_ema_is_left_out_and_said_so(here: Path) -> None:
    tiny.write(here / "ema.safetensors", "sd1", dtype="F16", ema=True)
    ran = plymix("merge", "ema.safetensors", "b.safetensors", "-o", "out.safetensors")
    assert ran.code == 0
    assert any("tensors left out (ema = drop)" in text for text in ran.notes)


@pytest.mark.parametrize(("ema", "done"), [("keep", "left out"), ("use", "replaced by their EMA")])
def test_what_becomes_of_the_second_models_ema_is_said(here: Path, ema: str, done: str) -> None:
    tiny.write(here / "ema.safetensors", "sd1", dtype="F16", ema=True)
    words = ("merge", "b.safetensors", "ema.safetensors", "-o", "out.safetensors", "--ema", ema)
    ran = plymix(*words)
    assert ran.code == 0, ran.err
    told = [n for n in ran.notes if n.startswith("note: ema.safetensors: ")]
    assert len(told) == 1
    assert f" tensors {done}" in told[0]


# --- recipes ------------------------------------------------------------------------------------

RECIPE = """
# two models and a third one's difference
[models]
one = "a.safetensors"
two = "b.safetensors"
three = "c.safetensors"

[steps.mix]
method = "weighted_sum"
a = "one"
b = "two"
alpha = { base = 0.0, blocks = "GRAD_V" }

[steps.final]
method = "add_difference"
a = "mix"
b = "three"
c = "two"
alpha = 0.5

[output]
file = "final.safetensors"
"""


def test_run_looks_beside_the_recipe_and_in_models(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    ran = plymix("run", here / "recipe.toml")
    assert ran.code == 0, ran.err
    w = dict(zip(BLOCKS, GRAD_V, strict=True)) | {"BASE": 0.0}
    x, y, z = (values(here / f"{n}.safetensors") for n in "abc")
    found = values(Path("final.safetensors"))
    for key, (_, _, _, block) in tiny.golden("sd1").items():
        if block in w:
            a, b, c = (v[key].astype(np.float64) for v in (x, y, z))
            if x[key].dtype.kind == "f":
                expected = (1 - w[block]) * a + w[block] * b + 0.5 * (c - b)
                np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=1e-6)
    (here / "recipe.toml").rename("recipe.toml")
    again = plymix("run", "recipe.toml", "--models", here, "-o", "again.safetensors")
    assert again.code == 0, again.err
    assert Path("again.safetensors").read_bytes() == Path("final.safetensors").read_bytes()


def test_set_changes_one_value(here: Path) -> None:
    (here / "recipe.toml").write_text(RECIPE)
    words = ("explain", "recipe.toml", "--json")
    ran = plymix(*words, "--set", "steps.mix.alpha.base=0.25", "--set", "steps.final.alpha=0")
    assert ran.code == 0, ran.err
    base = next(b for b in ran.json["blocks"] if b["block"] == "BASE")
    assert base["shares"] == {"a.safetensors": 0.75, "b.safetensors": 0.25}
    assert "PATH=VALUE" in plymix(*words, "--set", "steps.mix").json["error"]
    assert "alpha" in plymix(*words, "--set", "steps.mix.alpa=1").json["error"]


def test_show_prints_a_recipe_that_runs(here: Path) -> None:
    words = ("mbw", "a.safetensors", "b.safetensors", "--weights", CLASSIC)
    assert plymix(*words, "-o", "one.safetensors").code == 0
    shown = plymix("recipe", "show", "one.safetensors")
    (here / "again.toml").write_text(shown.out)
    assert plymix("run", "again.toml", "-o", "two.safetensors").code == 0
    assert (here / "one.safetensors").read_bytes() == (here / "two.safetensors").read_bytes()
    as_json = plymix("recipe", "show", "one.safetensors", "--json")
    assert recipes.from_dict(as_json.json) == recipes.load(here / "again.toml")
    none = plymix("recipe", "show", "a.safetensors")
    assert (none.code, "carries no plymix recipe" in none.err) == (2, True)


names = st.from_regex(r"[a-z][a-z0-9_. +-]{0,6}", fullmatch=True).filter(lambda n: n != "blend")
files = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
numbers = st.floats(-1e9, 1e9) | st.integers(-5, 5)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(names, files, min_size=2, max_size=4),
    numbers | st.dictionaries(st.sampled_from(["base", "default"]), numbers, min_size=1),
    files,
)
def test_toml_reads_back_as_the_same_recipe(models: dict[str, str], alpha: Any, title: str) -> None:
    first, second, *_ = models
    step = {"method": "weighted_sum", "a": first, "b": second, "alpha": alpha}
    found = recipes.from_dict(
        {"models": models, "steps": {"a mix": step}, "output": {"title": title}}
    )
    assert recipes.from_toml(recipes.to_toml(found)) == found


def test_replay_and_verify(here: Path) -> None:
    words = ("merge", "a.safetensors", "b.safetensors", "--alpha", "GRAD_V", "--base", "0.3")
    made = plymix(*words, "-o", "one.safetensors")
    assert made.code == 0, made.err
    ran = plymix("replay", "one.safetensors", "-o", "two.safetensors", "--models", here)
    assert ran.code == 0, ran.err
    assert (here / "one.safetensors").read_bytes() == (here / "two.safetensors").read_bytes()
    assert plymix("verify", "two.safetensors", "--models", here).code == 0
    raw = bytearray((here / "two.safetensors").read_bytes())
    raw[-1] ^= 1
    (here / "two.safetensors").write_bytes(raw)
    wrong = plymix("verify", "two.safetensors", "--models", here, "--json")
    assert (wrong.code, wrong.json["ok"]) == (1, False)
    (here / "b.safetensors").unlink()
    gone = plymix("replay", "one.safetensors", "-o", "three.safetensors")
    assert (gone.code, "b.safetensors" in gone.err) == (2, True)


def test_a_replay_keeps_its_kind_and_its_inputs(here: Path) -> None:
    assert plymix(*MERGE).code == 0
    for name, said in (
        ("a.safetensors", "a.safetensors is an input itself"),
        ("out.safetensors", "out.safetensors is an input itself"),
        ("folder", "out.safetensors is a file, and folder would be a folder"),
    ):
        ran = plymix("replay", "out.safetensors", "-o", name)
        assert ran.code == 2
        assert said in ran.err
    assert not (here / "folder").exists()


def test_a_model_that_no_record_names_is_told(here: Path) -> None:
    said = {
        "type": "sd-webui-supermerger", "mode": "Weight sum", "base_alpha": 0.4,
        "model_a": "a", "model_b": "b",
    }  # fmt: skip
    header = tiny.header("sd1")
    metadata = {"sd_merge_recipe": json.dumps(said)}
    tiny.write_safetensors(here / "old.safetensors", header, tiny.state(header), metadata)
    words = ("recipe", "import", "old.safetensors", "--model", "a=a.safetensors", "--model")
    assert plymix(*words, "b=b.safetensors").code == 0
    ran = plymix(*words, "c=c.safetensors", "-o", "old.toml")
    assert ran.code == 2
    assert "--model c=c.safetensors: no model of the record is called so" in ran.err
    assert not (here / "old.toml").exists()
    assert (
        "plymix recipe import reads what another tool left"
        in plymix("replay", "old.safetensors").err
    )


def test_a_shown_recipe_finds_its_models_as_a_replay_does(here: Path) -> None:
    words = ("merge", "a.safetensors", "b.safetensors", "--alpha", "GRAD_V")
    assert plymix(*words, "-o", "one.safetensors").code == 0
    (here / "shown.toml").write_text(plymix("recipe", "show", "one.safetensors").out)
    (here / "kept" / "deep").mkdir(parents=True)
    (here / "b.safetensors").rename(here / "kept" / "deep" / "renamed.safetensors")
    there = ("--models", here / "kept")
    run = ("run", "shown.toml", "-o", "two.safetensors")
    assert plymix("replay", "one.safetensors", "-o", "again.safetensors", *there).code == 0
    assert plymix("explain", "shown.toml", *there).code == 0
    ran = plymix(*run, *there)
    assert ran.code == 0, ran.err
    assert (here / "one.safetensors").read_bytes() == (here / "two.safetensors").read_bytes()
    shown = plymix_module.recipe.load(here / "shown.toml")
    made = plymix_module.merge(shown, "three.safetensors", models=[here / "kept"])
    assert made.path.read_bytes() == (here / "one.safetensors").read_bytes()

    def refused(text: str) -> None:
        for command in (run, ("explain", "shown.toml"), ("replay", "one.safetensors")):
            ran = plymix(*command, "--json")
            assert (ran.code, text in ran.json["error"]) == (2, True), ran.out

    (here / "two.safetensors").unlink()
    refused("b.safetensors (")
    refused("is missing; say where the models are with --models FOLDER")
    raw = bytearray((here / "a.safetensors").read_bytes())
    raw[-1] ^= 1
    (here / "b.safetensors").write_bytes(raw)
    refused("b.safetensors is not the b.safetensors that the recipe names (other content: ")
    (here / "kept" / "deep" / "renamed.safetensors").unlink()
    (here / "b.safetensors").rename(here / "kept" / "deep" / "b.safetensors")
    ran = plymix(*run, *there)
    assert (ran.code, "b.safetensors is not the b.safetensors that the recipe" in ran.err) == (
        2,
        True,
    )
    assert not (here / "two.safetensors").exists()


# --- looking ------------------------------------------------------------------------------------


def test_inspect(here: Path) -> None:
    one = plymix("inspect", "a.safetensors", "--json").json
    assert (one["architecture"], one["total"]["tensors"]) == ("sd1", len(tiny.golden("sd1")))
    both = plymix("inspect", "a.safetensors", "xl-a.safetensors", "--json").json
    assert [r["architecture"] for r in both] == ["sd1", "sdxl"]
    shown = plymix("inspect", "xl-a.safetensors", "--hashes")
    assert shown.code == 0, shown.err
    assert "SDXL checkpoint" in shown.out
    assert "OpenCLIP-G text encoder" in shown.out
    assert "sha256" in shown.out


def test_check(here: Path) -> None:
    well = plymix("check", "a.safetensors")
    assert well.code == 0, well.out + well.err
    header, state, _ = tiny.read_safetensors(here / "a.safetensors")
    key = "model.diffusion_model.middle_block.0.in_layers.0.weight"
    state[key] = state[key].copy()
    state[key][0] = np.nan
    tiny.write_safetensors(here / "nan.safetensors", header, state)
    ill = plymix("check", "nan.safetensors")
    assert ill.code == 1
    assert key in ill.out
    assert plymix("check", "nan.safetensors", "--json").json["ok"] is False
    (here / "half.safetensors").write_bytes((here / "a.safetensors").read_bytes()[:-1000])
    assert plymix("check", "half.safetensors").code == 1
    assert plymix("check", "gone.safetensors").code == 2


def test_presets() -> None:
    every = plymix("presets", "--json").json
    listed = plymix("presets").out
    assert all(f"\n{p['name']} " in listed for p in every)
    drawn = plymix("presets", "grad_v").out.splitlines()
    rows = [line.split() for line in drawn[-25:]]
    assert [row[0] for row in rows] == BLOCKS
    np.testing.assert_allclose([float(row[1]) for row in rows], GRAD_V, atol=1e-6)
    cells = [len(row[2]) if len(row) > 2 else 0 for row in rows]
    assert all(abs(n - v * max(cells)) <= 1 for n, v in zip(cells, GRAD_V, strict=True))
    wrong = plymix("presets", "GRADV")
    assert (wrong.code, "GRAD_V" in wrong.err) == (2, True)


def test_methods_come_from_the_registry() -> None:
    from plymix.registry import methods

    found = plymix("methods", "--json").json
    assert [m["name"] for m in found] == list(methods())
    listed = plymix("methods").out
    assert all(m.label.split()[0] in listed for m in methods().values())
    one = plymix("methods", "add_difference").out
    assert "R = A + alpha (B - C)" in one
    assert "parameter alpha: number, -inf..inf, default 1.0" in one
    wrong = plymix("methods", "add_diference")
    assert (wrong.code, "add_difference" in wrong.err) == (2, True)


def test_every_method_has_an_example_that_is_a_recipe() -> None:
    from plymix.cli.looking import example
    from plymix.registry import methods

    for method in methods().values():
        text = "\n".join(example(method))
        models = [
            *method.inputs,
            *(f"{kind}{i}" for i in range(1, 9) for kind in ("model", "lora")),
        ]
        table = "\n".join(f'{name} = "{name}.safetensors"' for name in models)
        recipe = recipes.from_toml(f"[models]\n{table}\n{text}\n")
        assert recipe.steps["mix"].method == method.name


def test_archs() -> None:
    found = {a["name"]: a for a in plymix("archs", "--json").json}
    assert found["sd1"]["blocks"] == BLOCKS
    assert sorted(found["sd1"]["lists"]) == ["25", "26"]
    assert "19 blocks: IN00-IN08, M00, OUT00-OUT08" in plymix("archs", "sdxl").out
    assert plymix("archs", "sdx").code == 2


def test_a_preset_of_your_own_that_hides_ours_is_named(here: Path) -> None:
    Path("p.tsv").write_text(f"GRAD_V\t{','.join(['0.5'] * 25)}\nMINE\t{','.join(['1'] * 25)}\n")
    ours = "note: p.tsv: its GRAD_V is used, not plymix's, which has other numbers"
    for words in (MBW, MERGE[:3], ("explain", *MERGE[1:3])):
        weights = "--weights" if words is MBW else "--alpha"
        given = (*words, "-o", f"{words[0]}.ckpt", weights, "grad_v", "--presets", "p.tsv")
        assert plymix(*given).notes[0] == ours
        assert plymix(*given[:-2], "--force").notes == []


def test_kinds_of_records_are_those_that_can_be_read() -> None:
    assert get_args(Kind) == tuple(READERS)


# --- errors -------------------------------------------------------------------------------------

MBW = ("mbw", "a.safetensors", "b.safetensors")
MERGE = ("merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors")
REFUSED: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((*MBW, "--weights", ",".join(["1"] * 24)), ("24 numbers", "25", "IN00-IN11")),
    ((*MBW, "--weights", "nan" + ",1" * 24), ("--weights", "value 1 (IN00)", "nan")),
    ((*MBW, "--weights", "1" * 1 + ",inf" + ",1" * 23), ("value 2 (IN01)", "inf")),
    ((*MBW, "--weights", "x" + ",1" * 24), ("value 1 (IN00)", "'x'", "not a number")),
    ((*MBW, "--weights", "1,," + ",".join(["1"] * 23)), ("value 2", "not a number")),
    ((*MBW, "--weights", "0.5"), ("one number", "25", "--base_alpha 0.5")),
    ((*MBW, "--weights", ""), ("--weights is empty",)),
    ((*MBW, "--weights", "GRADV"), ("unknown preset", "GRAD_V")),
    ((*MBW, "--base_alpha", "nan"), ("--base_alpha is nan",)),
    ((*MBW, "--base_alpha", "x"), ("--base_alpha", '"x"')),
    ((*MBW, "--base_alfa", "1"), ("--base_alfa", "did you mean --base_alpha?")),
    ((*MBW, "--weights", "1" + ",1" * 25, "--base_alpha", "0.5"), ("BASE is set to",)),
    ((*MBW, "--output", "out.bin"), (".bin", ".safetensors or .ckpt")),
    ((*MBW, "--output", "none/out.ckpt"), ("none does not exist",)),
    ((*MBW, "--output", "a.safetensors"), ("is an input itself", "--force")),
    (("run", "r.toml", "-o", "b.safetensors"), ("b.safetensors is an input itself",)),
    (("run", "r.toml", "-o", "b.safetensors", "--dry-run"), ("b.safetensors is an input itself",)),
    (("explain", *MERGE[1:4], "c.safetensors", "--vae", "c.safetensors"), ("input itself",)),
    ((*MERGE[:4], "c.safetensors", "--vae", "c.safetensors"), ("c.safetensors is an input",)),
    (("convert", "a.safetensors", "a.safetensors"), ("a.safetensors is an input itself",)),
    (("mbw", "a.safetensors"), ("MODEL_2", "--help")),
    (("mbw", "a.safetensors", "gone.safetensors"), ("gone.safetensors does not exist",)),
    (("mbw", "a.safetensors", "empty.ckpt"), ("empty.ckpt is empty",)),
    (("mbw", "a.safetensors", "."), ("is a folder",)),
    (("mbw", "a.safetensors", "garbage.ckpt"), ("garbage.ckpt is neither",)),
    (("mbw", "a.safetensors", "huge.safetensors"), ("huge.safetensors",)),
    (("mbw", "a.safetensors", "short.safetensors"), ("short.safetensors",)),
    (("mbw", "xl-a.safetensors", "b.safetensors", "--weights", "GRAD_V"), ("SDXL", "SD1")),
    (("merge", "a.safetensors", "b.safetensors"), ("-o out.safetensors",)),
    ((*MERGE, "--alpha", "grad"), ("unknown preset", "'grad'", "GRAD_V")),
    ((*MERGE, "--alpha", "1,2,3"), ("plymix: --alpha: 3 numbers", "25", "26 with BASE first")),
    ((*MERGE, "--alpha", "x"), ("preset for --alpha 'x'", "a number, a list of numbers or a pre")),
    ((*MERGE, "--alpha", "GRADV"), ("did you mean GRAD_V? A weight is a number",)),
    ((*MERGE, "--alpha", "0.5x"), ("plymix: --alpha is '0.5x'",)),
    (
        (*MERGE, "--alpha", "{IN99=1}"),
        ("block of SD1 in --alpha 'IN99': did you mean IN09? There",),
    ),
    ((*MERGE, "--alpha", "GRAD_V", "--base", "nan"), ("--base is nan",)),
    (
        (*MERGE, "--alpha", "GRAD_V", "--unet", "a"),
        ("--alpha is for the blocks", "--unet a", "keep one", "(--base 0.3 alone"),
    ),
    (
        (*MERGE, "--alpha", "1" + ",1" * 24, "--unet", "b"),
        ("--alpha is for the blocks", "--unet b"),
    ),
    (
        (
            "merge",
            "xl-a.safetensors",
            "xl-b.safetensors",
            "-o",
            "x.ckpt",
            "--alpha",
            "0.1" + ",1" * 24,
        ),
        ("SDXL wants 19", """say --alpha '{blocks = [...], convert = "sd1"}'"""),
    ),
    (
        ("mbw", "xl-a.safetensors", "xl-b.safetensors", "--weights", "0.1" + ",1" * 24),
        ("SDXL wants 19", """say --weights '{blocks = [...], convert = "sd1"}'"""),
    ),
    ((*MERGE, "--configs", "x"), ("--configs is for diffusers folders",)),
    ((*MERGE, "--configs", "x", "--dry-run"), ("--configs is for diffusers folders",)),
    (("explain", *MERGE[1:3], "--configs", "x"), ("--configs", "name one (-o FOLDER)")),
    (("explain", *MERGE[1:3], "-o", "f", "--configs", "x"), ("--configs x is not a folder",)),
    ((*MERGE, "--dtype", "q8_0", "--dry-run"), ("name a .gguf",)),
    (("explain", "r.toml", "--set", "output.file=x.txt"), ("'.txt'", ".safetensors or .ckpt")),
    (("run", "r.toml", "--dry-run", "--set", "output.file=x.txt"), ("'.txt'",)),
    ((*MERGE, "--vae", "q"), ("plymix: --vae: q does not exist",)),
    ((*MERGE, "--text-encoder-2", "q"), ("SD1 has no second text", "use --text-encoder")),
    ((*MERGE, "--text-encoder", "q"), ("plymix: --text-encoder: q does not exist",)),
    ((*MBW, "--vae", "q"), ("plymix: --vae: q does not exist",)),
    (("explain", "r.toml", "b.safetensors"), ("r.toml is a recipe", "leave out b.safetensors")),
    (("run", "r.toml", "--set", "output.vae=mix"), ("'mix' is a step", "one, two, three")),
    (("run", "r.toml", "--set", "output.vae=q"), ("plymix: output.vae: q does not exist",)),
    (("convert", "a.safetensors", "x.ckpt", "--dtype", "fp8"), ("unknown --dtype 'fp8'",)),
    (("prune", "a.safetensors", "-o", "x.ckpt", "--dtype", "fp8"), ("unknown --dtype 'fp8'",)),
    (("prune", "a.safetensors", "-o", "a.safetensors"), ("a.safetensors is an input itself",)),
    ((*MERGE, "--alpha", "nan"), ("nan", "finite")),
    ((*MERGE, "--base", "0.2", "--alpha", "0.1" + ",1" * 25), ("BASE",)),
    ((*MERGE, "--method", "weigted_sum"), ("weighted_sum",)),
    ((*MERGE, "--method", "ties"), ("takes base, models = [...]", "recipe", "plymix methods ties")),
    ((*MERGE, "--method", "nearswap"), ("has no alpha", "recipe", "plymix methods nearswap")),
    ((*MERGE, "--method", "triple_sum"), ("takes a, b, c", "--c")),
    ((*MERGE, "--c", "c.safetensors"), ("weighted_sum takes two", "--c", "add_difference")),
    ((*MERGE, "--dtype", "fp8"), ("unknown --dtype 'fp8'", "fp8_e4m3fn")),
    ((*MERGE, "--threads", "-1"), ("--threads -1",)),
    ((*MERGE, "--threads", "1.9"), ("--threads", "'1.9' is not a whole number")),
    ((*MERGE, "--seed", "1.5"), ("--seed", "'1.5' is not a whole number")),
    (("lora", "resize", "x", "--rank", "3.5"), ("--rank", "'3.5' is not a whole number")),
    (("replay", "r.toml"), ("r.toml is a recipe", "plymix run")),
    (("verify", "r.toml"), ("r.toml is a recipe", "plymix run")),
    (("recipe", "show", "r.toml"), ("r.toml is a recipe", "plymix run")),
    (("recipe", "import", "r.toml"), ("r.toml is a recipe already", "plymix run")),
    (("recipe", "import", "a.safetensors", "-o", "x.safetensors"), (".toml or .json", "x.toml")),
    (("recipe", "import", "a.safetensors", "--entry", "3"), ("entry 3", "a.safetensors is none")),
    (("run", "r.toml", "--set", "steps.mix.alpha="), ("steps.mix.alpha is empty",)),
    ((*MERGE, "--vae", "gone.safetensors"), ("gone.safetensors does not exist",)),
    ((*MERGE, "--treads", "3"), ("did you mean --threads?",)),
    ((*MERGE, "c.safetensors"), ("c.safetensors", "--help")),
    ((*MERGE[:3], "--o", "x"), ("unknown option --o: did you mean -o?",)),
    ((*MERGE[:3], "-output", "x.ckpt"), ("unknown option -output: did you mean --output?",)),
    (("recipe", "import", "r.toml", "--kind", "x"), ("a1111", "mbw-gui", "supermerger")),
    (("explain", "a.safetensors"), ("two models, or one recipe",)),
    (("explain", "r.toml", "--alpha", "0.3"), ("--alpha", "recipe")),
    (("run", "r.toml", "--set", "steps.mix.alpha=nan"), ("steps.mix.alpha is nan, not a finite",)),
    (("run", "gone.toml"), ("gone.toml does not exist",)),
    (("run", "a.safetensors"), ("a.safetensors is a model", "plymix replay", "recipe show")),
    ((*MERGE, "--arch", "any", "--alpha", "GRAD_V"), ("knows no blocks", "one number")),
    ((*MERGE, "--arch", "any", "--base", "0.2"), ("base = 0.2", "arch any", "one number")),
    ((*MERGE, "--arch", "any", "--alpha", "0.1,0.3"), ("base = 0.1", "arch any", "one number")),
    ((*MERGE, "--text-encoder", "b", "--base", "0.3"), ("--base 0.3", "--text-encoder b", "keep")),
    ((*MERGE, "--seed", "3"), ("--seed 3", "--rounding stochastic")),
    (("convert", "a.safetensors", "out.ckpt", "--seed", "3"), ("--seed 3", "stochastic")),
    (("run", "r.toml", "--models", "nowhere"), ("--models nowhere is not a folder",)),
    (("inspect",), ("name a model file",)),
    (("inspect", "gone.safetensors"), ("does not exist",)),
    (("doctor", "gone"), ("gone is not a folder",)),
    (("mrge", "a", "b"), ("unknown command 'mrge'", "merge")),
    (("recipe", "shw"), ("show",)),
    (("--force", "mbw"), ("--force comes before a command",)),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda w: " ".join(w)[:60])
def test_errors_are_one_or_two_lines_and_exit_2(
    here: Path, words: tuple[str, ...], said: tuple[str, ...]
) -> None:
    (here / "empty.ckpt").write_bytes(b"")
    (here / "garbage.ckpt").write_bytes(b"\x00garbage" * 9)
    (here / "huge.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    (here / "short.safetensors").write_bytes((here / "a.safetensors").read_bytes()[:-7])
    (here / "r.toml").write_text(RECIPE)
    before = sorted(p.name for p in here.iterdir())
    ran = plymix(*words)
    assert ran.code == 2, ran.err
    assert ran.err.startswith("plymix: ")
    assert 1 <= len(ran.err.splitlines()) <= 2
    assert "Traceback" not in ran.err
    for text in said:
        assert text in ran.err
    assert ran.out == ""
    assert sorted(p.name for p in here.iterdir() if p.name != "cache") == before


@pytest.mark.parametrize("words", [(*MBW, "--weights", "nan"), (*MERGE, "--dtpe", "x"), MBW])
def test_with_json_stdout_is_one_document(here: Path, words: tuple[str, ...]) -> None:
    ran = plymix(*words, "--json")
    if ran.code:
        assert ran.json == {"error": ran.err.removeprefix("plymix: ").strip(), "exit_code": 2}
    else:
        assert ran.json["merged"] == 1130
        assert set(ran.json) >= {"path", "formula", "nbytes", "seconds", "copied", "notes"}


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from plymix import api

    def run(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(api, "run", run)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "plymix: stopped; nothing was written\n"),
        (errors.Cancelled("stopped; nothing was written"), 130, "stopped"),
        (errors.Failure("disk full\nmore\nand more"), 1, "plymix: disk full\nmore\n"),
        (PermissionError(13, "Permission denied", "x.ckpt"), 1, "Permission denied: x.ckpt\n"),
        (MemoryError(), 1, "out of memory"),
        (ZeroDivisionError("by nought"), 1, "internal error (ZeroDivisionError: by nought)"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_what_goes_wrong_ends_quietly(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    raising(monkeypatch, error)
    ran = plymix(*MERGE)
    assert ran.code == code
    assert said in ran.err
    assert "Traceback" not in ran.err
    if not said:
        assert ran.err == ""


@pytest.mark.parametrize(
    "words",
    [
        ("run", "huge"),
        ("explain", "huge.json"),
        (*MERGE, "--arch", "huge"),
        (*MERGE, "--presets", "huge"),
        ("recipe", "import", "huge.json"),
    ],
)
def test_a_text_of_gigabytes_is_not_read(here: Path, words: tuple[str, ...]) -> None:
    for name in ("huge.toml", "huge.json"):
        with (here / name).open("wb") as file:
            file.truncate(6 << 30)  # takes no room
    tracemalloc.start()
    ran = plymix(*(w + ".toml" if w == "huge" else w for w in words))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert "it cannot be the " in ran.err
    assert peak < 64 << 20


def test_debug_adds_the_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ZeroDivisionError("by nought"))
    monkeypatch.setenv("PLYMIX_DEBUG", "1")
    assert "Traceback (most recent call last)" in plymix(*MERGE).err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "cp932"])
@pytest.mark.parametrize(
    "name",
    [
        "[a] [red]b[bold] c",
        "日本語モデル",
        "x\udcffy",
        "esc\x1b[31mred",
        "é ü",
    ],
)
def test_any_file_name_on_any_terminal(here: Path, name: str, encoding: str) -> None:
    os.link("a.safetensors", f"{name}.safetensors")
    for words in (
        ("mbw", f"{name}.safetensors", "b.safetensors", "--verbose", "-o", "out.safetensors"),
        ("explain", f"{name}.safetensors", "b.safetensors"),
        ("explain", f"{name}.safetensors", "b.safetensors", "--json"),
        ("mbw", f"{name}.safetensors", "gone.safetensors"),
        ("mbw", "b.safetensors", f"{name}.gone"),
    ):
        ran = plymix(*words, encoding=encoding)
        assert "internal error" not in ran.err, ran.err
        assert "\x1b" not in ran.out + ran.err
        if name.startswith("[") and not ran.code:
            assert name in ran.out
        if "--json" in words:
            assert ran.json["blocks"][0]["tensors"]
    for ending in ("safetensors", "ckpt"):
        out = here / f"{name}-out.{ending}"
        ran = plymix("merge", "a.safetensors", "b.safetensors", "-o", out, encoding=encoding)
        assert ran.code == 0, ran.err


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_table_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = plymix(*name.split(), "--help")
    assert (ran.code, ran.err) == (0, "")
    summary = COMMANDS[name][1]
    assert summary in ran.out
    assert summary in (app(name).default_command.__doc__ or "")
    assert "Example" in ran.out
    assert f"{name:<{max(map(len, COMMANDS))}}  {summary}" in overview()
    assert max(map(len, ran.out.splitlines())) <= 80


def test_direction_is_stated_in_help() -> None:
    assert "alpha is the share of the second" in plymix("merge", "--help").out
    assert "numbers are the share of model 1" in plymix("mbw", "--help").out


def test_version_and_overview() -> None:
    from plymix import __version__

    assert plymix("--version").out == f"plymix {__version__}\n"
    assert plymix().out == plymix("--help").out == overview() + "\n"
    assert plymix("recipe").out == plymix("recipe", "--help").out == overview() + "\n"
