"""`plymix diff` against numpy's long double, and the sentences it says."""

import json
import threading
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
import tiny
from plymix import chart, cli, difference, kernels
from plymix.errors import Cancelled, Refusal
from small import real, save
from test_dialect_merges import folder, single, weights

UNET = "model.diffusion_model."


def reference(a, b):
    """(relative, cosine) of two lists of (dtype, array), in long double."""
    x, y = (np.concatenate([real(t).ravel() for t in side]) for side in (a, b))
    lengths = np.sqrt((x * x).sum()), np.sqrt((y * y).sum())
    return float(np.sqrt(((y - x) ** 2).sum()) / lengths[0]), float(
        (x * y).sum() / (lengths[0] * lengths[1])
    )


def close(found, wanted):
    assert found.relative == pytest.approx(wanted[0], rel=1e-6, abs=1e-12)
    assert found.cosine == pytest.approx(wanted[1], rel=0, abs=1e-9)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pair(home):
    """Two SD1 models and what is in them; half of b's U-Net is a's."""
    a, b = weights("sd1", 1), weights("sd1", 2)
    for key in list(b)[::2]:
        if key.startswith(UNET):
            b[key] = a[key]
    return save(home / "a.safetensors", a), save(home / "b.safetensors", b), a, b


# --- numbers ------------------------------------------------------------------------------------


def test_every_block_and_component(pair):
    path_a, path_b, a, b = pair
    found = plymix.diff(path_a, path_b)
    groups = {"block": {}, "component": {}}
    for key, (_, _, component, block) in tiny.golden("sd1").items():
        groups["block"].setdefault(block, []).append(key)
        component = {"schedule": "extra", "clip_l": "text_encoder"}.get(component, component)
        groups["component"].setdefault(component, []).append(key)
    for kind, rows in (("block", found.blocks), ("component", found.components)):
        assert {d.name for d in rows} == set(groups[kind])
        for d in rows:
            keys = groups[kind][d.name]
            floats = [k for k in keys if a[k][0] != "I64"]
            close(d, reference([a[k] for k in floats], [b[k] for k in floats]))
            assert d.tensors == len(keys)
            assert d.changed == sum(a[k][1].tobytes() != b[k][1].tobytes() for k in keys)
    assert sum(d.tensors for d in found.blocks) == len(a) == found.total.tensors
    assert not found.same


@pytest.mark.parametrize(
    "kinds",
    [
        ("F32", "F16"),
        ("BF16", "F16"),
        ("F8_E4M3", "F32"),
        ("F64", "F32"),
        ("F8_E5M2", "BF16"),
        ("F64", "F64"),
    ],
)
@pytest.mark.parametrize("kernel", ["", "numpy"])
def test_number_formats_of_every_kind(tmp_path, monkeypatch, kinds, kernel):
    monkeypatch.setenv("PLYMIX_KERNEL", kernel)
    kernels.best_backend.cache_clear()
    rng = np.random.default_rng(4)
    n = difference.CHUNK + 77
    rows = []
    for dtype in kinds:
        values = rng.standard_normal(n)
        x = values if dtype == "F64" else tiny.encode(values.astype(np.float32), dtype)
        rows.append((dtype, x))
    paths = [save(tmp_path / f"{i}.safetensors", {"x": row}) for i, row in enumerate(rows)]
    close(plymix.diff(*paths).total, reference(rows[:1], rows[1:]))
    kernels.best_backend.cache_clear()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_numbers(tmp_path_factory, data):
    """Sums are those of long double, and swapping the two keeps the cosine."""
    home = tmp_path_factory.mktemp("any")
    size = data.draw(st.integers(1, 40))
    numbers = st.lists(st.floats(-1e4, 1e4, width=32), min_size=size, max_size=size)
    rows = [("F32", np.array(data.draw(numbers), np.float32)) for _ in "ab"]
    paths = [save(home / f"{n}.safetensors", {"x": r}) for n, r in zip("ab", rows, strict=True)]
    there, back = plymix.diff(*paths), plymix.diff(*paths[::-1])
    x, y = (real(r) for r in rows)
    if (x * x).sum() > 1e-30 and (y * y).sum() > 1e-30:
        close(there.total, reference(rows[:1], rows[1:]))
        assert there.total.cosine == pytest.approx(back.total.cosine, abs=1e-12)
    assert (there.tensors[0].state == "changed") is bool((x != y).any())
    assert plymix.diff(paths[0], paths[0]).same


def test_close_models_do_not_cancel(tmp_path):
    """|a - b| is summed itself, not got from |a|, |b| and a.b, which would lose all digits."""
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    y = x.copy()
    y[7] = np.nextafter(y[7], 2, dtype=np.float32)
    paths = [
        save(tmp_path / f"{n}.safetensors", {"x": ("F32", v)}) for n, v in (("a", x), ("b", y))
    ]
    close(plymix.diff(*paths).total, reference([("F32", x)], [("F32", y)]))


def test_zeros_nan_and_whole_numbers(tmp_path):
    a = {"zero": ("F32", np.zeros(3, "f4")), "nan": ("F32", np.full(2, np.nan, "f4")),
         "ids": ("I64", np.arange(4)), "none": ("F32", np.zeros(0, "f4"))}  # fmt: skip
    b = {"zero": ("F32", np.ones(3, "f4")), "nan": ("F32", np.ones(2, "f4")),
         "ids": ("I64", np.arange(4)[::-1]), "none": ("F32", np.zeros(0, "f4"))}  # fmt: skip
    paths = [save(tmp_path / f"{n}.safetensors", x) for n, x in (("a", a), ("b", b))]
    found = {t.key: t for t in plymix.diff(*paths).tensors}
    assert {k: t.state for k, t in found.items()} == {
        "zero": "changed", "nan": "changed", "ids": "changed", "none": "same",
    }  # fmt: skip
    assert all(t.relative is None and t.cosine is None for t in found.values())
    json.dumps(plymix.diff(*paths).to_dict(), allow_nan=False)
    assert plymix.diff(paths[0], paths[0]).same


def test_the_same_for_any_number_of_threads(pair):
    assert plymix.diff(*pair[:2], threads=1) == plymix.diff(*pair[:2], threads=5)


# --- what it means ------------------------------------------------------------------------------


def verdicts(a, b):
    return plymix.diff(a, b).verdicts


def test_the_same_model(pair, tmp_path):
    plymix.prune(pair[0], tmp_path / "c.ckpt")
    assert verdicts(pair[0], tmp_path / "c.ckpt") == (
        "c.ckpt holds the same weights as a.safetensors",
    )
    assert plymix.diff(pair[0], tmp_path / "c.ckpt").same


def test_one_is_the_other_plus_a_vae(pair, tmp_path):
    plymix.prune(pair[0], tmp_path / "c.safetensors", drop=["vae"])
    want = "a.safetensors is c.safetensors plus VAE"
    assert verdicts(tmp_path / "c.safetensors", pair[0]) == (want,)
    assert verdicts(pair[0], tmp_path / "c.safetensors") == (want,)
    found = plymix.diff(tmp_path / "c.safetensors", pair[0])
    assert (len(found.only_a), len(found.only_b)) == (0, 248)
    assert not found.same


def test_the_same_text_encoder(pair, tmp_path):
    plymix.merge(*pair[:2], tmp_path / "c.safetensors", alpha=0.5, text_encoder="a", vae="b")
    assert verdicts(pair[0], tmp_path / "c.safetensors") == ("same CLIP-L text encoder",)
    said = verdicts(pair[1], tmp_path / "c.safetensors")
    assert said[0] == "same VAE"
    assert "betas" in said[1]  # those of the first model


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rounded_once(tmp_path, dtype):
    wide = tiny.write(tmp_path / "w.safetensors", "sd1", 3, dtype="F32")
    plymix.prune(wide, tmp_path / "n.safetensors", dtype=dtype)
    want = f"n.safetensors is w.safetensors, rounded once to {dtype}"
    assert verdicts(wide, tmp_path / "n.safetensors") == (want,)
    assert verdicts(tmp_path / "n.safetensors", wide) == (want,)
    plymix.prune(tmp_path / "n.safetensors", tmp_path / "again.safetensors", dtype="fp32")
    assert "same weights, other number formats" in verdicts(
        tmp_path / "n.safetensors", tmp_path / "again.safetensors"
    )
    rows = {k: (v[0], v[1].copy()) for k, v in _rows(tmp_path / "n.safetensors").items()}
    key = UNET + "out.2.bias"
    rows[key][1].view(np.uint16)[0] ^= 1  # one bit of one number
    off = save(tmp_path / "off.safetensors", rows)
    found = plymix.diff(wide, off)
    assert "rounded once" not in found.verdicts[0]
    assert [t.key for t in found.tensors if t.state == "changed"] == [key]


def _rows(path):
    header, state, _ = tiny.read_safetensors(path)
    return {k: (header[k][0], state[k]) for k in header}


def test_other_names(tmp_path):
    one = single(tmp_path / "sd1.safetensors", "sd1", 5)
    other = folder(tmp_path / "folder", "sd1", 5)
    found = plymix.diff(one, other)
    assert "same weights, other names" in found.verdicts
    assert all(t.state == "same" for t in found.tensors)
    assert found.same
    assert not found.only_a
    assert found.verdicts[-1].startswith(
        "not counted, as files in diffusers' names never have them: 13 tensors of sd1.safetensors:"
    )
    old = tiny.write(tmp_path / "nai.safetensors", "sd1", 6, nai=True)
    plymix.repair(old, tmp_path / "new.safetensors")
    assert plymix.diff(old, tmp_path / "new.safetensors").same


@pytest.mark.parametrize("model", ["sd2", "sdxl"])
def test_what_no_folder_has_is_no_difference(tmp_path, model):
    one, other = single(tmp_path / "a.safetensors", model, 5), folder(tmp_path / "f", model, 5)
    plymix.convert(other, tmp_path / "b.safetensors")
    for theirs in (other, tmp_path / "b.safetensors"):
        for found in (plymix.diff(one, theirs), plymix.diff(theirs, one)):
            assert "holds the same weights as" in found.verdicts[0]
            assert "of a.safetensors" in found.verdicts[-1]
            lost = set(found.only_a + found.only_b)  # a file may have a schedule, a folder not
            assert found.same == (not lost)
            assert not lost or theirs != other
    # what is missing and not for that reason is a difference
    rows = _rows(tmp_path / "b.safetensors")
    del rows[key := next(k for k in rows if "text_model.encoder" in k or "resblocks.0" in k)]
    found = plymix.diff(one, save(tmp_path / "c.safetensors", rows))
    assert key in found.only_a
    assert not any("the same weights" in text for text in found.verdicts)


def test_a_component_and_the_model_it_is_of(pair, tmp_path):
    plymix.extract(pair[0], "text_encoder", tmp_path / "t.safetensors")
    assert verdicts(tmp_path / "t.safetensors", pair[0]) == (
        "a.safetensors is t.safetensors plus U-Net and VAE",
    )


@pytest.mark.parametrize("component", ["vae", "text_encoder", "text_encoder_2"])
def test_a_component_in_every_spelling(tmp_path, component):
    """Alone, in its folder, and in the model; OpenCLIP's fused q, k, v are three in diffusers."""
    model = single(tmp_path / "xl.safetensors", "sdxl", 5)
    home = folder(tmp_path / "folder", "sdxl", 5)
    plymix.extract(home, component, tmp_path / "alone.safetensors")
    found = plymix.diff(tmp_path / "alone.safetensors", home / component)
    assert found.verdicts == (f"{component} holds the same weights as alone.safetensors",)
    found = plymix.diff(tmp_path / "alone.safetensors", model)
    assert not found.only_a
    assert [c.name for c in found.components] == [component]
    assert {t.state for t in found.tensors} == {"same"}
    rows = _rows(tmp_path / "alone.safetensors")
    key = next(
        k for k in rows if k.endswith(("in_proj_weight", "q_proj.weight", "attn_1.q.weight"))
    )
    changed = rows[key][1].copy()
    changed[:] = 0
    off = save(tmp_path / "off.safetensors", rows | {key: (rows[key][0], changed)})
    said = {t.state for t in plymix.diff(off, home / component).tensors}
    assert said == {"same", "changed"}


def test_position_ids_are_no_weights(pair, tmp_path):
    rows = dict(pair[2])
    key = next(k for k in rows if k.endswith("position_ids"))
    rows[key] = ("I64", rows[key][1][:, ::-1].copy())
    said = verdicts(pair[0], save(tmp_path / "c.safetensors", rows))
    assert said[0] == "c.safetensors holds the same weights as a.safetensors"
    assert key in said[1]


def test_tensors_of_two_shapes(pair, tmp_path):
    wide = tiny.write(tmp_path / "w.safetensors", "sd1-inpainting", 1)
    found = plymix.diff(pair[0], wide)
    assert found.reshaped == (UNET + "input_blocks.0.0.weight",)
    assert "same U-Net" not in found.verdicts


def test_what_cannot_be_compared(pair, tmp_path):
    xl = tiny.write(tmp_path / "xl.safetensors", "sdxl")
    with pytest.raises(Refusal, match=r"a\.safetensors is an SD1 .* xl\.safetensors is an SDXL"):
        plymix.diff(pair[0], xl)
    stranger = save(tmp_path / "s.safetensors", {"foo": ("F32", np.ones(2, "f4"))})
    with pytest.raises(Refusal, match="share no tensor"):
        plymix.diff(pair[0], stranger)


def test_it_can_be_stopped(pair):
    before = threading.active_count()
    with pytest.raises(Cancelled):
        plymix.diff(*pair[:2], progress=lambda _: False)
    assert threading.active_count() == before


# --- drawn --------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    def one(*words):
        code = cli.run([str(word) for word in words])
        return code, *capsys.readouterr()

    return one


def test_the_command(pair, tmp_path, run):
    plot = tmp_path / "d.svg"
    code, out, _ = run("diff", *pair[:2], "--plot", plot)
    assert code == 0
    found = plymix.diff(*pair[:2])
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for d in found.blocks:
        assert f"{d.relative:.4g}" in lines[d.name] or not d.relative
        assert f"{d.cosine:.6f}" in lines[d.name]
    root = ET.fromstring(plot.read_bytes())
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {d.name for d in found.blocks} <= set(texts)
    widths = [float(e.get("width")) for e in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    far = sorted((d.relative for d in found.blocks if d.relative), reverse=True)
    for width, relative in zip(sorted(widths, reverse=True), far, strict=True):
        assert width == pytest.approx(chart.LENGTH * relative / far[0], rel=1e-4)
    assert run("diff", *pair[:2], "--plot", plot)[0] == 2  # it is there
    code, _, err = run("diff", *pair[:2], "--plot", "d.gif")
    assert (code, "d.gif" in err) == (2, True)
    code, out, _ = run("diff", *pair[:2], "--json")
    assert json.loads(out) == json.loads(json.dumps(found.to_dict()))


def test_a_png(pair, tmp_path, run, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    plot = tmp_path / "d.png"
    assert run("diff", *pair[:2], "--plot", plot)[0] == 0
    with image.open(plot) as made:
        blue = sum(made.convert("RGB").getpixel((chart.NAME, y)) == (9, 105, 218)
                   for y in range(made.height))  # fmt: skip
    bars = sum(bool(d.relative) for d in plymix.diff(*pair[:2]).blocks)
    assert blue == 14 * bars
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    code, _, err = run("diff", *pair[:2], "--plot", tmp_path / "e.png")
    assert (code, "pip install pillow" in err) == (2, True)


def test_names_that_svg_cannot_hold():
    bad = chart.Chart("<a> & \x00\ud800", [], [chart.Bar('"', 2.0, "&")])
    assert ET.fromstring(chart.svg(bad))[1].text == "<a> & ??"
