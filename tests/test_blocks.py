"""`plymix blocks` and the distances it measures by."""

import json
import math

import numpy as np
import pytest

from plymix import cli
from plymix.images import blocks, distance
from tiny import header, state, write, write_safetensors

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))


def picture(seed, size=(48, 40)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


# --- distances ----------------------------------------------------------------------------------


def naive_structure(a, b, scales):
    """1 - MS-SSIM pixel by pixel, in loops, from the formulas of Wang et al. 2003."""
    x, y = (p.astype(float) @ [0.299, 0.587, 0.114] / 255 for p in (a, b))
    window = np.array(
        [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    )
    window /= window.sum()
    powers = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    powers /= powers.sum()
    result = 1.0
    for scale in range(scales):
        lights, contrasts = [], []
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                lights.append((2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4))
                contrasts.append((2 * cov + 9e-4) / (vp + vq + 9e-4))
        values = np.array(contrasts)
        if scale == scales - 1:
            values = values * lights
        result *= max(values.mean(), 0) ** powers[scale]
        x, y = (
            np.array([[z[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()
                       for j in range(z.shape[1] // 2)] for i in range(z.shape[0] // 2)])
            for z in (x, y)
        )  # fmt: skip
    return 1 - result


@pytest.mark.parametrize(("size", "scales"), [((20, 15), 1), ((46, 23), 2)])
def test_structure_is_ms_ssim(size, scales):
    smooth = np.cumsum(np.cumsum(picture(0, size).astype(float), 0), 1)
    a = (smooth / smooth.max() * 255).astype(np.uint8)
    b = np.clip(a.astype(int) + picture(1, size) // 8, 0, 255).astype(np.uint8)
    assert distance.structure(a, b) == pytest.approx(naive_structure(a, b, scales), abs=1e-9)


def test_structure_of_even_pictures_is_their_brightness():
    dark, light = (np.full((16, 16, 3), v, np.uint8) for v in (51, 204))
    want = 1 - (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert distance.structure(dark, light) == pytest.approx(want, abs=1e-12)


def test_pixel_is_of_full_scale():
    black, white = (np.full((16, 16, 3), v, np.uint8) for v in (0, 255))
    assert distance.pixel(black, white) == 1.0
    half = black.copy()
    half[:8] = 255
    assert distance.pixel(black, half) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("measure", [distance.structure, distance.pixel])
def test_distances_begin_at_0_and_grow(measure):
    a, b = picture(0, (96, 96)), picture(1, (96, 96))
    assert measure(a, a) == pytest.approx(0, abs=1e-12)
    assert measure(a, b) == pytest.approx(measure(b, a), abs=1e-12)
    mixed = [np.round(a + (b.astype(float) - a) * s).astype(np.uint8) for s in (0.1, 0.3, 0.6, 1)]
    found = [measure(a, m) for m in mixed]
    assert found == sorted(found)
    assert found[0] > 0


def test_colours_of_heat():
    assert blocks.colour(0) == (255, 255, 255)
    assert blocks.colour(1) == blocks.colour(2) == (70, 20, 0)
    brightness = [sum(blocks.colour(s / 20)) for s in range(21)]
    assert brightness == sorted(brightness, reverse=True)


# --- the map ------------------------------------------------------------------------------------


def b_like_a(path, keys):
    """A model that differs from seed 0's in these tensors alone."""
    made = header("sd1")
    values = state(made, 0)
    other = state(made, 1)
    return write_safetensors(
        path, made, {k: other[k] if k.startswith(keys) else v for k, v in values.items()}
    )


UNET = "model.diffusion_model."


def test_only_blocks_that_differ_move_the_picture(tmp_path, capsys):
    a = write(tmp_path / "a.safetensors", "sd1", 0)
    keys = (f"{UNET}input_blocks.5.", f"{UNET}output_blocks.11.", "first_stage_model.")
    b = b_like_a(tmp_path / "b.safetensors", keys)
    words = ["blocks", str(a), str(b), "--backend", "fake", "--size", "64x64", "--seeds", "1-2"]
    assert cli.run([*words, "--prompt", "cat", "--prompt", "dog", "-o", "map.png"]) == 0
    told = json.loads((tmp_path / "map.json").read_text("utf-8"))
    moved = {m["block"]: m["pixel"] for m in told["blocks"]}
    assert len(moved) == 27
    assert {name for name, far in moved.items() if far} == {"IN05", "OUT11", "VAE"}
    assert told["whole"]["pixel"] > max(moved.values())
    assert len(told["pictures"]) == len(told["blocks"][0]["each"]) == 4
    assert told["pictures"][0] == "cat seed 1"
    for m in told["blocks"]:
        each = [e["structure"] for e in m["each"]]
        assert m["structure"] == pytest.approx(sum(each) / 4)
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line[:2] in ("IN", "OU", "VA")}
    bars = {name: line.count("█") for name, line in lines.items()}
    far = {m["block"]: m["structure"] for m in told["blocks"]}
    assert max(bars, key=bars.get) == max(far, key=far.get)
    assert bars["IN04"] == 0
    for name in ("map.png", "map-pictures.png", "map-pictures-2.png", "map-pictures.html"):
        assert (tmp_path / name).is_file()


def test_a_map_as_json_and_gone_on_with(tmp_path, capsys):
    a, b = (str(write(tmp_path / f"{n}.safetensors", "sd1", i)) for i, n in enumerate("ab"))
    words = ["blocks", a, b, "--backend", "fake", "--size", "64x64", "--json"]
    assert cli.run([*words, "--seeds", "1"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert cli.run([*words, "--seeds", "1"]) == 2  # it is there
    capsys.readouterr()
    assert cli.run([*words, "--seeds", "1", "--force"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert first["blocks"][0]["block"] == "IN00"


def test_a_long_prompt_leaves_room_for_the_seed(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "plymix.images.sheet.Pen.write", lambda self, draw, at, text, ink=None: drawn.append(text)
    )
    moved = [blocks.Moved("IN00", 0.0, 0.0, ({"structure": 0.0, "pixel": 0.0},))]
    blocks.heat(moved, ["a castle by the sea, " * 9 + "\nseed 12"], "title")
    assert "seed 12" in drawn


def test_the_map_is_drawn_to_its_numbers():
    """The farthest block's cell is darkest; one that moves nothing is white."""
    moved = [
        blocks.Moved(n, s, s, ({"structure": s, "pixel": s},))
        for n, s in (("IN00", 0.0), ("IN01", 0.4), ("IN02", 0.2), ("B", 0.9))
    ]
    image = np.asarray(blocks.heat(moved, ["seed 1"], "title"))
    colours = {tuple(int(v) for v in p) for p in image.reshape(-1, 3)}
    assert {blocks.colour(share) for share in (0, 0.5, 1)} <= colours
    dark = (image == blocks.colour(1)).all(-1)
    lines = np.flatnonzero(dark.any(1))
    assert lines[-1] - lines[0] > 2 * 22  # IN01 and B, with IN02 between them
