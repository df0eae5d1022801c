"""Sheets of pictures: rows, axes, files, resuming, order. Drawn by the backend `fake`."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

import plymix
from loras import lora
from plymix import api, cli, engine, plan, recipe
from plymix.errors import Cancelled, Refusal
from plymix.images import Options, Settings, compare, grid, open_backend, rows
from small import save
from tiny import header, write

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return [str(write(folder / f"{n}.safetensors", "sd1", i)) for i, n in enumerate("ab")]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))


def run(*words, code=0):
    size = () if words[0] == "--redo" else ("--size", "64x64")
    assert cli.run(["compare", "--backend", "fake", *size, *words]) == code


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).copy()


def side(path="s.json"):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


ROWS = ("--each", "A", "--each", "B", "--each", "0.5", "--each", "GRAD_V base=1 vae=b")


# --- rows ---------------------------------------------------------------------------------------


def test_a_row_is_what_merge_says(pair):
    models = rows.Models(*pair)
    made = rows.made(("GRAD_V", "base=1", "vae=b", "dtype=fp16"), models)
    assert made == api.two_models(*pair, alpha="GRAD_V", base=1.0, vae="b", dtype="fp16")
    assert rows.made(("0.25",), models) == api.two_models(*pair, alpha="0.25")
    assert rows.made(("0.25", "alpha=0.75"), models) == api.two_models(*pair, alpha="0.75")
    assert rows.made(("A",), models).steps == {}
    assert [m.file for m in rows.made(("B",), models).models.values()] == [pair[1]]


def test_a_file_name_in_a_row(pair):
    """With spaces in quotes; a backslash is a letter of it."""
    assert rows.split(r"0.5 vae='my vae.pt'") == ("0.5", "vae=my vae.pt")
    assert rows.split(r"0.5 vae=C:\models\x.pt #1") == ("0.5", r"vae=C:\models\x.pt", "#1")


def test_blocks_win_over_the_weight(pair):
    made = rows.made(("0.5", "IN05=0", "OUT00-OUT03:attn2=0.75"), rows.Models(*pair))
    assert made.steps["merge"].rules == ("IN05::0", "OUT00-OUT03:attn2:0.75")
    with plan.build(made) as planned:
        blocks = {b.block: b.shares for b in api.explained(planned).blocks}
    assert blocks["IN05"] == {"a.safetensors": 1.0}
    assert blocks["IN04"] == {"a.safetensors": 0.5, "b.safetensors": 0.5}


def test_a_model_with_a_block_of_the_other(pair):
    made = rows.made(("B", "IN05=0"), rows.Models(*pair))
    with plan.build(made) as planned:
        blocks = {b.block: b.shares for b in api.explained(planned).blocks}
    assert blocks["IN05"] == {"a.safetensors": 1.0}
    for block in ("IN04", "BASE", "VAE"):
        assert blocks[block] == {"b.safetensors": 1.0}


def test_a_recipe_as_the_start(pair):
    start = recipe.from_dict(
        {
            "models": {"a": pair[0], "b": pair[1]},
            "steps": {"mix": {"method": "weighted_sum", "a": "a", "b": "b", "alpha": 0.5}},
        }
    )
    models = rows.Models(start=start)
    assert rows.made((), models) == start
    found = rows.made(("0.25", "IN01=1", "steps.mix.alpha=0.75", "vae=b"), models)
    assert found.steps["mix"].params == {"alpha": 0.75}
    assert (found.steps["mix"].rules, found.output.vae) == (("IN01::1",), "b")
    deep = "steps.mix.alpha.IN01=0.9"  # of the same block: the later word wins
    for words, rules in ((("IN01=1", deep), "IN01::0.9"), ((deep, "IN01=1"), "IN01::1")):
        assert rows.made(("0.25", *words), models).steps["mix"].rules[-1] == rules


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("0.5 bse=1", "unknown word in a row 'bse': did you mean base"),
        ("0.5 base=x", "base=x is not a number"),
        ("0.5 union=maybe", "union=maybe is not true or false"),
        ("0.5 'x", "row"),
        ("GRAD_Q", "GRAD_Q"),
    ],
)
def test_what_a_row_cannot_say(row, text, pair):
    with pytest.raises(Refusal, match=re.escape(text)):
        rows.made(rows.split(row), rows.Models(*pair))


# --- axes ---------------------------------------------------------------------------------------


def names(x="", y="", pages="", each=("A", "B"), seeds="1-2", prompts=("cat",)):
    known = grid.given(rows.Models("a", "b"), each, seeds, prompts)
    return [axis.name for axis in grid.placed(x, y, pages, known)]


def test_axes_go_where_there_is_room():
    assert names() == ["seed", "merge", ""]
    assert names(prompts=("cat", "dog")) == ["seed", "merge", "prompt"]
    assert names(x="IN05=0,1") == ["IN05", "merge", "seed"]
    assert names(x="merge", y="seed") == ["merge", "seed", ""]
    assert names(each=("0.5",), seeds="1", x="cfg=4,7") == ["cfg", "", ""]
    with pytest.raises(Refusal, match="prompt would be a fourth axis"):
        names(x="IN05=0,1", prompts=("cat", "dog"))
    with pytest.raises(Refusal, match="seed is given twice"):
        names(x="seed", y="seed=1-3")
    with pytest.raises(Refusal, match="unknown axis 'seeds': did you mean seed"):
        names(x="seeds")


def test_values_of_an_axis():
    assert grid.numbers("1-3,7,2") == (1, 2, 3, 7)
    assert [v.settings for v in grid.axis("cfg=4,7.5").values] == [
        (("cfg", 4.0),),
        (("cfg", 7.5),),
    ]
    assert grid.axis("size=64x128").values[0].settings == (("width", 64), ("height", 128))
    assert [v.words for v in grid.axis("alpha=0.5|0,1").values] == [("alpha=0.5",), ("alpha=0,1",)]
    for bad in ("IN05=", "IN05", "seed=3-1", "steps=2.5", "size=64"):
        with pytest.raises(Refusal):
            grid.axis(bad)


@pytest.mark.parametrize(
    "bad", [{"sampler": "eular"}, {"steps": 0}, {"seed": -1}, {"width": 65}, {"cfg": 101.0}]
)
def test_settings_that_cannot_be_drawn(bad):
    with pytest.raises(Refusal):
        Settings(**bad).checked()


# --- a sheet ------------------------------------------------------------------------------------


def test_a_sheet_and_what_lies_beside_it(pair, capsys):
    run(*pair, *ROWS, "--prompt", "a cat", "--negative", "bad: worse", "--seeds", "1-3",
        "--against", "1", "-o", "s.png")  # fmt: skip
    told = side()
    assert [len(told["axes"][n]["values"]) for n in ("rows", "columns", "pages")] == [4, 3, 1]
    assert told["axes"]["rows"]["values"][0] == "A: a.safetensors"
    assert len({c["pixels"] for c in told["cells"]}) == 12
    sheet = pixels("s.png")
    difference = pixels("s-difference.png")
    cells = {(c["row"], c["column"]): pixels(c["file"]) for c in told["cells"]}
    places = {at: found(sheet, cell) for at, cell in cells.items()}
    # every picture is there, pixel for pixel, in rows and columns
    assert len({y for y, _ in places.values()}) == 4
    for (row, column), (y, x) in places.items():
        assert (y, x) == (places[row, 1][0], places[1, column][1])
        move = difference.shape[0] - sheet.shape[0]
        apart = np.abs(cells[row, column].astype(int) - cells[1, column]) * 2
        shown = difference[y + move : y + move + 64, x : x + 64]
        assert np.array_equal(shown, np.minimum(apart, 255))


def found(sheet, cell):
    """Where `cell` lies in `sheet`: exactly one place."""
    height, width, _ = cell.shape
    first = np.argwhere((sheet == cell[0, 0]).all(-1))
    places = [
        (y, x) for y, x in first if np.array_equal(sheet[y : y + height, x : x + width], cell)
    ]
    assert len(places) == 1
    return places[0]


def test_a_picture_tells_how_it_was_made(pair):
    run(*pair, *ROWS, "--prompt", "a cat, 猫", "--negative", "bad", "--steps", "9", "-o", "s.png")
    with Image.open(side()["cells"][3]["file"]) as image:
        text, record = image.info["parameters"], json.loads(image.info["plymix"])
    prompt, negative, fields = text.split("\n")
    assert (prompt, negative) == ("a cat, 猫", "Negative prompt: bad")
    # the pattern that A1111 reads the last line with
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    read = dict(re.findall(pattern, fields))
    assert read["Sampler"] == "Euler a"
    assert (read["Steps"], read["CFG scale"], read["Seed"]) == ("9", "7", "1")
    assert (read["Size"], "GRAD_V" in json.loads(read["Model"])) == ("64x64", True)
    assert record["recipe"]["models"]["a"]["file"] == "a.safetensors"  # no folder
    assert len(record["recipe"]["models"]["b"]["sha256"]) == 64


def test_the_page_works_from_disk(pair, tmp_path):
    run(*pair, *ROWS, "--prompt", "<b>cat</b>", "--seeds", "1-2", "-o", "my sheet.png")
    text = (tmp_path / "my sheet.html").read_text("utf-8")
    assert "<b>cat" not in text

    class Page(HTMLParser):
        links = ()

        def handle_starttag(self, tag, attributes):
            found = [v for k, v in attributes if k in ("src", "href") and v]
            self.links = (*self.links, *found)

    from urllib.parse import unquote

    page = Page()
    page.feed(text)
    assert len(page.links) == 8
    assert all((tmp_path / unquote(link)).is_file() for link in page.links)
    assert "http" not in text


def test_any_two_axes_and_pages(pair):
    run(*pair, "--each", "0.5", "--x", "IN05=0,0.5,1", "--y", "steps=2,4", "--seeds", "1-2",
        "-o", "s.png")  # fmt: skip
    told = side()
    assert {n: told["axes"][n]["name"] for n in told["axes"]} == {
        "rows": "steps", "columns": "IN05", "pages": "seed",
    }  # fmt: skip
    assert pixels("s.png").shape == pixels("s-2.png").shape
    at = {(c["page"], c["row"], c["column"]): c for c in told["cells"]}
    assert at[2, 1, 3]["settings"]["seed"] == 2
    assert told["recipes"][at[2, 1, 3]["recipe"]]["steps"]["merge"]["rules"] == ["IN05::1"]


def test_the_strength_of_a_lora_is_an_axis(pair, tmp_path):
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    module = "lora_unet_" + key.removeprefix("model.diffusion_model.").removesuffix(".weight")
    change = lora(header("sd1")[key][1], 1)
    path = tmp_path / "style.safetensors"
    name = module.replace(".", "_")
    save(path, {f"{name}.{end}": ("F32", x) for end, x in change.tensors.items()})
    (tmp_path / "r.toml").write_text(
        f"""
        [models]
        a = {json.dumps(pair[0])}
        style = {json.dumps(str(path))}
        [steps.drawn]
        method = "lora"
        model = "a"
        loras = ["style"]
        strength = 1.0
        """
    )
    run("--from", "r.toml", "--x", "steps.drawn.strength=0,0.5,1", "-o", "s.png")
    run(*pair, "--each", "A", "-o", "a.png")
    found = [c["pixels"] for c in side()["cells"]]
    assert len(set(found)) == 3
    assert found[0] == side("a.json")["cells"][0]["pixels"]
    run("--redo", "s.json", "--cell", "1,2", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels(side()["cells"][1]["file"]))


def test_equal_cells_are_drawn_once(pair, capsys):
    run(*pair, "--each", "0.5", "--each", "0.5", "--each", "0.50", "-o", "s.png", "--json")
    assert json.loads(capsys.readouterr().out)["drawn"] == 1
    assert len({c["file"] for c in side()["cells"]}) == 1


# --- going on -----------------------------------------------------------------------------------


class Stopping:
    """The backend `fake`, which is stopped after some pictures."""

    def __init__(self, after):
        self.inner = open_backend("fake", Options())
        self.label, self.left = self.inner.label, after
        self.used = 0

    def use(self, plan):
        self.used += 1
        self.inner.use(plan)

    def draw(self, asked, tick):
        for picture in self.inner.draw(asked, tick):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield picture

    def close(self):
        pass


def drawn(pair, out, backend):
    models = rows.Models(*pair)
    known = grid.given(models, ("A", "0.5", "B"), "1-3", ("cat",))
    settings = Settings(width=64, height=64)
    made = grid.build(models, (), settings, *grid.placed("", "", "", known))
    place = compare.place(out, False)
    with compare.Kitchen() as kitchen:
        result = compare.draw(made, kitchen, backend, "fake", place)
        compare.finish(result, place, kitchen.where())
    return result


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("after", [0, 4, 8])
def test_a_stopped_sheet_goes_on(after, pair, tmp_path):
    with pytest.raises(Cancelled, match=f"stopped with {after} of 9 pictures drawn"):
        drawn(pair, tmp_path / "s.png", Stopping(after))
    assert len(list((tmp_path / "s").iterdir())) == after
    assert not (tmp_path / "s.png").exists()
    assert drawn(pair, tmp_path / "s.png", Stopping(99)).fresh == 9 - after
    once = drawn(pair, tmp_path / "t.png", Stopping(99))
    assert once.fresh == 9
    assert contents(tmp_path / "s") == contents(tmp_path / "t")
    assert (tmp_path / "s.png").read_bytes() == (tmp_path / "t.png").read_bytes()


def test_a_further_row_draws_that_row(pair, capsys):
    run(*pair, "--each", "A", "--each", "B", "--seeds", "1-2", "-o", "s.png", "--json")
    run(*pair, "--each", "A", "--each", "0.3", "--each", "B", "--seeds", "1-2", "-o", "s.png",
        "--force", "--json")  # fmt: skip
    second = capsys.readouterr().out.split("\n}\n")[1] + "\n}"
    assert json.loads(second)["drawn"] == 2
    for cell in side()["cells"]:
        assert f"r{cell['row']}-c{cell['column']}" in cell["file"]


def test_damaged_and_changed_pictures_are_drawn_again(pair, tmp_path, capsys):
    run(*pair, "--each", "A", "--seeds", "1-3", "-o", "s.png")
    one, two, _ = sorted((tmp_path / "s").iterdir())
    one.write_bytes(one.read_bytes()[:-100])
    with Image.open(two) as image:
        info = image.info["plymix"]
        image = image.convert("L").convert("RGB")
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("plymix", info)
    image.save(two, pnginfo=told)
    capsys.readouterr()
    run(*pair, "--each", "A", "--seeds", "1-3", "-o", "s.png", "--force", "--json")
    assert json.loads(capsys.readouterr().out)["drawn"] == 2


def test_another_model_of_the_same_name_and_size_is_another_sheet(tmp_path, capsys):
    one, other = (write(tmp_path / f"{i}.safetensors", "sd1", i) for i in range(2))
    model = tmp_path / "m.safetensors"
    model.write_bytes(one.read_bytes())
    run(str(model), str(model), "--each", "A", "-o", "s.png", "--json")
    model.write_bytes(other.read_bytes())
    capsys.readouterr()
    run(str(model), str(model), "--each", "A", "-o", "s.png", "--force", "--json")
    assert json.loads(capsys.readouterr().out)["drawn"] == 1


# --- once more ----------------------------------------------------------------------------------


def test_every_cell_can_be_made_again(pair, tmp_path, capsys):
    run(*pair, *ROWS, "--seeds", "1-2", "-o", "s.png")
    for cell in side()["cells"][::2]:
        place = f"{cell['row']},{cell['column']}"
        run("--redo", "s.json", "--cell", place, "-o", "again.png", "--force")
        assert np.array_equal(pixels("again.png"), pixels(cell["file"]))
    run("--redo", side()["cells"][0]["file"], "-o", "again.png", "--force", code=2)
    assert "a.safetensors" in capsys.readouterr().err
    folder = pair[0].rsplit("/", 1)[0]
    words = ("--redo", side()["cells"][5]["file"], "--models", folder, "-o", "again.png")
    run(*words, "--force")
    assert np.array_equal(pixels("again.png"), pixels(side()["cells"][5]["file"]))
    assert "the same pixels" in capsys.readouterr().out


def test_an_altered_model_is_refused(tmp_path, capsys):
    model = write(tmp_path / "m.safetensors", "sd1", 1)
    run(str(model), str(model), "--each", "A", "-o", "s.png")
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    run("--redo", "s.json", "-o", "again.png", code=2)
    assert "is not the m.safetensors that this was drawn with" in capsys.readouterr().err
    run("--redo", "s.json", "--cell", "9,9", code=2)
    run("--redo", "m.safetensors", code=2)


def test_save_is_what_merge_writes(pair, tmp_path):
    run(*pair, *ROWS, "-o", "s.png", "--save", "3", "--save", "4=deep.safetensors")
    plymix.merge(*pair, "3.safetensors", alpha=0.5)
    plymix.merge(*pair, "4.safetensors", alpha="GRAD_V", base=1.0, vae="b")
    read = [(tmp_path / f"{n}.safetensors").read_bytes() for n in ("3", "4", "s-row3", "deep")]
    assert read[:2] == read[2:]
    run(*pair, *ROWS, "-o", "t.png", "--save", "5", code=2)
    run(*pair, "--each", "0.5", "--x", "IN05=0,1", "--y", "seed", "--save", "1", "-o", "t.png",
        code=2)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-o", "s.jpg"], "does not end in .png"),
        (["-o", "no/s.png"], "does not exist"),
        (["--against", "9"], "rows 1 to 3"),
        (["--sampler", "eular"], "did you mean euler"),
        (["--from", "x.toml"], "leave out A and B"),
        (["--redo", "s.json"], "leave out A and B"),
        (["--cell", "1,2"], "--cell 1,2 is for --redo"),
        (["--seeds", "1-4", "--x", "seed=5,6"], "the axis seed is given twice"),
        (["--each", "0.3", "--x", "merge=A|B"], "the axis merge is given twice"),
        (["--each", "A", "--x", "alpha=0,1"], "A is a model as it is, without alpha=0"),
    ],
)
def test_what_is_refused_before_anything_is_drawn(words, text, pair, tmp_path, capsys):
    run(*pair, *words, code=2)
    assert text in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "sheet").exists()


@pytest.mark.parametrize(
    ("backend", "option", "text"),
    [
        ("a1111", "--device", "--device is for --backend diffusers, not a1111"),
        ("diffusers", "--url", "--url is for --backend a1111 or comfyui, not diffusers"),
    ],
)
def test_options_of_another_backend(backend, option, text, pair, capsys):
    assert cli.run(["compare", *pair, "--backend", backend, option, "http://x"]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("name", ["s.json", "s.html", "s"])
def test_what_lies_there_is_left_alone(name, pair, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    run(*pair, "-o", "s.png", code=2)
    assert f"{name} " in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
    assert [p.name for p in tmp_path.glob("s*")] == [name]


def test_a_folder_is_no_sheet(pair, tmp_path, capsys):
    (tmp_path / "s.png").mkdir()
    run(*pair, "-o", "s.png", "--force", code=2)
    assert "s.png is a folder" in capsys.readouterr().err


def test_an_axis_of_alphas_needs_no_rows(pair, capsys):
    run(*pair, "--x", "alpha=0,0.5,1", "-o", "s.png")
    assert "3 pictures, 3 drawn" in capsys.readouterr().out
    run(*pair, "--x", "merge=A|B", "-o", "t.png")
    assert "2 pictures, 2 drawn" in capsys.readouterr().out


def test_a_long_prompt_leaves_room_for_the_settings(pair):
    """Over one small picture, too: the head has a line of its own for them."""
    from plymix.images import sheet

    drawn = []

    def note(self, draw, at, text, ink=None):
        drawn.append(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheet.Pen, "write", note)
        run(*pair, "--each", "A", "--prompt", "a very long prompt " * 30, "-o", "s.png")
    told = " ".join(drawn)
    assert "euler_a, 20 steps, CFG 7, 64x64" in told
    assert "..." in told


def test_an_unknown_backend_is_refused():
    with pytest.raises(Refusal, match="unknown image backend 'fak': did you mean fake"):
        open_backend("fak", Options())


# --- order --------------------------------------------------------------------------------------


def test_merges_come_in_the_order_that_moves_least(pair):
    """0, 1 and a few blocks of 1 in 0: each is next to the ones it shares most with."""
    models = rows.Models(*pair)
    words = [("0",), ("1",), ("0", "IN01=1"), ("1", "IN01=0"), ("0", "IN01=1", "IN02=1"), ("0.5",)]
    recipes = [rows.made(w, models) for w in words]
    with compare.Kitchen() as kitchen:
        plans = [kitchen.plan(r) for r in recipes]
        order = compare.ordered(plans)
        moved = [moves(plans, way) for way in (order, range(len(plans)))]
    assert sorted(order) == [0, 1, 2, 3, 4, 5]
    assert moved[0] < moved[1]
    chain = [order.index(i) for i in (0, 2, 4)]
    assert max(chain) - min(chain) == 2


def moves(plans, way):
    """Bytes of tensors that change along the way, counted by the tensors' own values."""
    total = 0
    for a, b in zip(way, list(way)[1:], strict=False):
        names = set(plans[a].changes(plans[b]))
        total += sum(t.nbytes for t in plans[b].tensors if t.name in names)
    return total


def test_the_time_left_is_that_of_pictures(pair, monkeypatch):
    """A model that loads for an hour does not make days of ten pictures."""
    clock, told = [0.0], []
    for module in (compare, engine):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Slow(Stopping):
        def use(self, plan):
            clock[0] += 3600
            super().use(plan)

    known = grid.given(rows.Models(*pair), ("A",), "1-10", ())
    axes = grid.placed("", "", "", known)
    made = grid.build(rows.Models(*pair), known[0].values, Settings(width=64, height=64), *axes)
    with compare.Kitchen() as kitchen:
        place = compare.place("s.png", False)
        compare.draw(made, kitchen, Slow(99), "fake", place, progress=told.append)
    assert [p.seconds for p in told] == [0.0] * 10


def test_three_merges_of_ten_seeds_are_three_merges(pair):
    backend = Stopping(99)
    models = rows.Models(*pair)
    known = grid.given(models, ("0.2", "0.4", "0.6"), "1-10", ())
    made = grid.build(models, (), Settings(width=64, height=64), *grid.placed("", "", "", known))
    with compare.Kitchen() as kitchen:
        compare.draw(made, kitchen, backend, "fake", compare.place("s.png", False))
    assert backend.used == 3
