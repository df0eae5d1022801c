"""Architectures that a user describes: what is read, what is refused, what a merge makes of it."""

import json
import re
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
from plymix import archs, cli
from plymix import recipe as recipes
from plymix.archs import own
from plymix.archs.model import Architecture, Component, Rule, Variant
from plymix.errors import FormatError, Refusal
from plymix.replay import replay, verify
from small import coded, load, save
from tiny import golden, header, write

DATA = Path(archs.__file__).parent / "data"
GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "own-architecture.md"
LUMEN = re.search(r"<!-- file: lumen.toml -->\n```toml\n(.*?)```", GUIDE.read_text("utf-8"), re.S)[
    1
]
KEYS = ["stem.weight", "time.0.bias", *(f"layers.{i}.mix.weight" for i in range(4)), "head.weight"]
SHARES = {"IN": 0.0, "B00": 0.25, "B01": 0.5, "B02": 0.75, "B03": 1.0, "OUT": 0.125}
BLOCK = dict(zip(KEYS, ["IN", "IN", "B00", "B01", "B02", "B03", "OUT"], strict=True))


@pytest.fixture
def lumen(tmp_path):
    """A description and two models of it, all of A's numbers 1 and all of B's 2."""
    (tmp_path / "lumen.toml").write_text(LUMEN)
    for name, value in (("a", 1.0), ("b", 2.0)):
        tensors = {key: coded([[value] * 4] * 4, "F32") for key in KEYS}
        tensors |= {"positions": coded([value] * 4, "F32"), "vae.x": coded([value], "F32")}
        tensors |= {"text_encoders.q.weight": coded([value], "F32")}
        save(tmp_path / f"{name}.safetensors", tensors)
    return tmp_path


def merged(folder, out="o.safetensors", **options):
    a, b = folder / "a.safetensors", folder / "b.safetensors"
    plymix.merge(a, b, folder / out, arch=folder / "lumen.toml", force=True, **options)
    return {key: x.reshape(-1)[0] for key, (_, x) in load(folder / out)[0].items()}


def test_blocks_of_a_described_architecture(lumen):
    got = merged(lumen, alpha=[0.5, *SHARES.values()])
    assert {key: got[key] - 1 for key in KEYS} == {key: SHARES[BLOCK[key]] for key in KEYS}
    assert got["positions"] == 1  # a buffer
    assert got["text_encoders.q.weight"] == 1.5
    assert got["vae.x"] == 1
    assert merged(lumen, alpha=1.0, vae="b")["vae.x"] == 2
    by_name = merged(lumen, alpha={"blocks": {"B00-B03": 1.0}})
    assert [by_name[key] for key in KEYS] == [1, 1, 2, 2, 2, 2, 1]


def test_its_components_are_converted_taken_out_and_dropped(lumen):
    """fp16 for the transformer alone; a part has its names without their prefix."""
    one, arch = lumen / "a.safetensors", lumen / "lumen.toml"
    plymix.convert(one, lumen / "c.safetensors", dtype="transformer=fp16", arch=arch)
    plymix.extract(one, "text_encoder", lumen / "t.safetensors", arch=arch)
    plymix.prune(one, lumen / "p.safetensors", drop=["vae"], arch=arch)
    were, got = load(one)[0], load(lumen / "c.safetensors")[0]
    assert {key for key in were if got[key][0] == "F16"} == set(KEYS)
    assert all((got[key][1] == were[key][1]).all() for key in were)
    assert load(lumen / "t.safetensors")[0].keys() == {"q.weight"}
    assert load(lumen / "p.safetensors")[0].keys() == were.keys() - {"vae.x"}
    for name in "ctp":
        assert verify(lumen / f"{name}.safetensors").ok
        (said,) = plymix.inspect(lumen / f"{name}.safetensors").recipe
        assert "arch=lumen" in said.split()


def test_it_is_checked_compared_and_repaired(lumen):
    """What a model's own description says of it, in the commands that only look, too."""
    one, two, arch = lumen / "a.safetensors", lumen / "b.safetensors", lumen / "lumen.toml"
    assert "lumen" not in plymix.check(one).title.lower()
    assert plymix.check(one, arch=arch).title == plymix.inspect(one, arch=arch).title
    plymix.merge(one, two, lumen / "o.safetensors", alpha={"blocks": {"B01": 1.0}}, arch=arch)
    found = plymix.diff(one, lumen / "o.safetensors", arch=arch)
    assert {b.name for b in found.blocks if b.changed} == {"B01"}
    assert [b.name for b in plymix.diff(one, lumen / "o.safetensors").blocks] == ["OTHER"]
    rows = load(one)[0] | {"text_encoders.clip.position_ids": coded([0, 1, 3], "F32")}
    plymix.repair(save(lumen / "c.safetensors", rows), lumen / "d.safetensors", arch=arch)
    ids = load(lumen / "d.safetensors")[0]["text_encoders.clip.position_ids"]
    assert (ids[0], ids[1].tolist()) == ("I64", [0, 1, 2])
    assert "arch=lumen" in plymix.inspect(lumen / "d.safetensors").recipe[0].split()
    for command in (plymix.check, plymix.inspect):
        with pytest.raises(Refusal, match=r"nowhere\.toml"):
            command(one, arch="nowhere.toml")


def test_the_recipe_carries_the_description(lumen):
    merged(lumen, alpha=[*SHARES.values()])
    (lumen / "lumen.toml").unlink()
    found = replay(lumen / "o.safetensors", lumen / "again.safetensors", folders=[lumen])
    assert found.path.read_bytes() == (lumen / "o.safetensors").read_bytes()


def test_a_recipe_names_the_file_and_run_may_too(lumen, monkeypatch, capsys):
    monkeypatch.chdir(lumen)
    step = {"method": "weighted_sum", "a": "a", "b": "b", "alpha": {"blocks": {"B01": 1.0}}}
    models = {"a": "a.safetensors", "b": "b.safetensors"}
    plain = recipes.from_dict({"models": models, "steps": {"mix": step}, "output": {}})
    named = recipes.with_output(plain, arch="lumen.toml")
    (lumen / "r.toml").write_text(recipes.to_toml(named))
    (lumen / "plain.toml").write_text(recipes.to_toml(plain))
    runs = [
        ["run", "r.toml"],
        ["run", "plain.toml", "--arch", "lumen.toml"],
        ["run", "plain.toml", "--set", "output.arch=lumen.toml"],
    ]
    for i, words in enumerate(runs):
        assert cli.run([*words, "-o", f"{i}.safetensors"]) == 0
        got, metadata = load(lumen / f"{i}.safetensors")
        assert got["layers.1.mix.weight"][1].min() == 2
        assert got["layers.0.mix.weight"][1].max() == 1
        said = json.loads(metadata["plymix.recipe"])["output"]["arch"]
        assert said == own.read(lumen / "lumen.toml")
    assert cli.run(["explain", "plain.toml", "--arch", "lumen.toml", "--json"]) == 0
    assert cli.run(["explain", "plain.toml"]) == 2
    words = ["mbw", "a.safetensors", "b.safetensors", "--arch", "lumen.toml", "-o", "m.safetensors"]
    assert cli.run([*words, "--weights", "1,0.75,0.5,0.25,0,0.875", "--base_alpha", "1"]) == 0
    assert cli.run([*words, "--force", "--weights", "1,0.75,0.5"]) == 2
    words[4] = "any"
    assert cli.run([*words, "--force", "--weights", "1,0.75,0.5"]) == 2
    err = capsys.readouterr().err
    assert "3 numbers given; Lumen wants 6: IN, B00-B03, OUT" in err
    assert "--arch any knows no blocks for --weights" in err
    got = {key: x.reshape(-1)[0] for key, (_, x) in load(lumen / "m.safetensors")[0].items()}
    assert {key: got[key] - 1 for key in KEYS} == {key: SHARES[BLOCK[key]] for key in KEYS}


def test_models_of_another_kind_are_refused_by_name(lumen):
    other = write(lumen / "sd.safetensors", "sd1")
    for a, b in ((other, "a.safetensors"), ("a.safetensors", other)):
        with pytest.raises(Refusal, match=r"sd\.safetensors is not Lumen as lumen .* SD1 check"):
            plymix.explain(lumen / a, lumen / b, arch=lumen / "lumen.toml")
    with pytest.raises(Refusal, match=r"a\.safetensors is "):
        plymix.explain(lumen / "a.safetensors", lumen / "b.safetensors")
    assert archs.detect({"stem.weight": (1,), "layers.0.mix.weight": (1, 1)}).arch is None


def test_inspect_and_archs(lumen, monkeypatch, capsys):
    monkeypatch.chdir(lumen)
    assert cli.run(["inspect", "a.safetensors", "--arch", "lumen.toml", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["architecture"], report["title"]) == ("lumen", "Lumen checkpoint")
    assert {b["name"] for b in report["blocks"]} == {*SHARES, "BASE", "VAE", "BUFFER"}
    assert cli.run(["archs", "lumen.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == [*SHARES]


@pytest.mark.parametrize("model", ["sdxl", "flux-dev", "z-image", "anima"])
def test_plymix_own_descriptions_work_as_files(model, tmp_path):
    """The format is one: a file of `data/` under another name tells keys and models as before."""
    name = {"flux-dev": "flux1"}.get(model, model)
    (tmp_path / "mine.toml").write_text((DATA / f"{name}.toml").read_text("utf-8"))
    mine, theirs = archs.described(tmp_path / "mine.toml"), archs.load(name)
    assert [mine.place(key) for key in golden(model)] == [
        theirs.place(key) for key in golden(model)
    ]
    shapes = {key: shape for key, (_, shape) in header(model).items()}
    found = archs.detect(shapes, mine)
    assert (found.arch, found.title) == (mine, archs.detect(shapes).title)


@pytest.mark.parametrize("name", archs.names())
def test_plymix_own_descriptions_have_no_problems(name):
    assert list(own.problems(archs.load(name))) == []


def test_the_order_of_rows_means_nothing():
    """A recipe's canonical JSON sorts them."""
    for name in archs.names():
        table = msgspec.toml.decode((DATA / f"{name}.toml").read_bytes())
        table["name"] = f"my-{name}"
        mixed = json.loads(json.dumps(table, sort_keys=True))
        keys = [key for path in (name, {"flux1": "flux-dev"}.get(name, name))
                if (GUIDE.parents[2] / f"tests/golden/headers/{path}.json.gz").exists()
                for key in golden(path)]  # fmt: skip
        one, other = own.architecture(table), own.architecture(mixed)
        assert [one.place(key) for key in keys] == [other.place(key) for key in keys]


BROKEN = [
    ('title = "Lumen, four layers"', "", "title is missing"),
    ('short = "Lumen"', "short = 3", "short: `?str`? is expected, not `?int`?"),
    ('short = "Lumen"', 'short = "L"\ntitel = "x"', "there is no field titel"),
    ("B00..B03", "B03..B00", "blocks: the range 'B03..B00' does not rise"),
    ("B00..B03", "B0..C3", "blocks: 'B0..C3' is neither a name"),
    ('"OUT"]', '"OUT", "X0000..X9999"]', "blocks: there are more than 2000 names of blocks"),
    ('"OUT"]', '"OUT", "OUT"]', "blocks: OUT stands there twice"),
    ('"OUT"]', '"OUT", "VAE"]', "blocks: VAE is plymix's own name"),
    ('"OUT"]', '"OUT", "MID"]', "blocks: no key of components.0..blocks goes to MID"),
    ("blocks = [", "blocks = 1 #", "blocks: a list of names is expected"),
    ('"head." = "OUT"', '"head." = "END"', "components.0..blocks: 'head.' goes to END"),
    ('"B{i:02}"', '"B{i:99999999}"', "components.0..blocks: 'B{i:99999999}' is not BLOCK"),
    ('"B{i:02}"', '"B{i.real}"', "components.0..blocks: 'B{i.real}' is not BLOCK"),
    ('"layers.{i}."', '"layers."', "components.0..blocks: 'layers.' has no {i}"),
    ('prefixes = ["vae."]', "", "components.2..prefixes: what do the keys of vae begin with"),
    ('prefixes = ["vae."]', 'prefixes = ["vae"]', "components.2..prefixes: a prefix ends with"),
    ('block = "VAE"', "", "components.2..block: in which block"),
    ('name = "vae"', 'name = "text_encoder"', "components.2..name: 'text_encoder' is taken"),
    ('"stem.weight" = true', '"stem.weight" = 3', "detect.0..keys.*bool . array is expected"),
    ('"stem.weight" = true', '"stem.weight" = ["x"]', "detect.0..keys.stem.weight: 'x' is not"),
    ('"stem.weight" = true', '"*a*b*c*d" = true', "detect.0..keys: .* has more than three"),
    ("[[detect]]", "[[detects]]", "detect is missing|there is no field detects"),
    ("buffers", 'input_conv = "x.weight"\nbuffers', "input_conv: 'x.weight' lies in no block"),
    ("buffers", "lists = {3 = ['IN']}\nbuffers", "lists.3: it names 1 blocks"),
    ("buffers", "lists = {1 = ['MID']}\nbuffers", "lists.1: MID is no block"),
    ("buffers", 'name = "sdxl"\nbuffers', "name: plymix has an architecture 'sdxl' of its own"),
    ("buffers", 'name = "a/b"\nbuffers', "name: 'a/b' is not usable"),
    ("blocks = [", "blocks = [[", "lumen.toml is not TOML"),
]


@pytest.mark.parametrize(("old", "new", "said"), BROKEN)
def test_mistakes_are_told_in_one_line_with_file_and_field(old, new, said, tmp_path):
    assert old in LUMEN
    (tmp_path / "lumen.toml").write_text(LUMEN.replace(old, new, 1))
    with pytest.raises(Refusal, match=said) as refusal:
        archs.described(tmp_path / "lumen.toml")
    text = str(refusal.value)
    assert text.startswith("lumen.toml")
    assert "\n" not in text
    assert len(text) < 250


def test_files_that_are_none(tmp_path):
    with pytest.raises(Refusal, match=r"cannot read the architecture .*nope\.toml: No such file"):
        archs.described(tmp_path / "nope.toml")
    with pytest.raises(Refusal, match=r"unknown output\.arch 'sdxl'"):
        plymix.explain("a", "b", arch="sdxl")
    (tmp_path / "big.toml").write_bytes(b"#" * (own.LARGEST + 1))
    with pytest.raises(FormatError, match="cannot be the architecture"):
        archs.described(tmp_path / "big.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match=r"bytes\.toml is not TOML"):
        archs.described(tmp_path / "bytes.toml")


def test_a_strangers_description_costs_little():
    """As large as it may be, with keys made to fit: an answer in a moment."""
    table = msgspec.toml.decode(LUMEN)
    table["blocks"] = ["IN", "B0000..B1990", "OUT"]
    rows = {f"x{i}.": f"B{i:04}" for i in range(1991)}
    table["components"][0]["blocks"] = {"stem.": "IN", "head.": "OUT", **rows}
    table["detect"] = [{"keys": {"*a*a*a": True}}, {"keys": {"a*a*a*b": True}}]
    del table["buffers"]
    keys = {"a" * 500 + str(i): (1,) for i in range(2000)}
    began = time.monotonic()
    arch = own.architecture({"name": "lumen", **table})
    assert archs.detect(keys, arch).arch is None
    assert time.monotonic() - began < 10


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("aB0.{}i*: ", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "blocks", "keys", "x.{i}.", "0"]), inner)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_no_table_crashes(data):
    """Whatever a stranger's recipe says: an architecture, or a refusal of one line."""
    table = msgspec.toml.decode(LUMEN)
    fields = sorted({*Architecture.__struct_fields__, "x"})
    for field in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3)):
        table[field] = data.draw(VALUES)
    said = ""
    try:
        archs.detect({"stem.weight": (1,)}, own.architecture({"name": "lumen", **table}))
    except Refusal as e:
        said = str(e)
    assert "\n" not in said


def test_the_guide_tells_every_field():
    text = GUIDE.read_text("utf-8")
    for struct in (Architecture, Component, Rule, Variant):
        for field in struct.__struct_fields__:
            if (struct, field) != (Rule, "dialect"):
                assert f"`{field}`" in text, field
