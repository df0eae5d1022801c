"""`plymix archs`: what it says of each architecture, against the golden headers."""

import json
import math

import pytest

from plymix import archs, cli, weights
from tiny import golden

import block_sizes  # isort: skip  (scripts/ is on the path since `tiny`)


def call(capsys, *words):
    assert cli.run(["archs", *words]) == 0
    return capsys.readouterr().out


def counted(model):
    """Block -> parameters, from the golden header; the sine tables are buffers."""
    found = {}
    for key, (_, shape, _, block) in golden(model).items():
        if block != "BUFFER" and not key.endswith("pos_embed"):
            found[block] = found.get(block, 0) + math.prod(shape)
    return found


def test_sizes_are_those_of_the_golden_headers():
    assert block_sizes.TARGET.read_text("utf-8") == block_sizes.made()
    models = {path.name.removesuffix(".json.gz") for path in block_sizes.TARGET.parents[3].glob(
        "tests/golden/headers/*.json.gz")}  # fmt: skip
    assert block_sizes.MODELS.keys() == models
    for model, (arch, title) in block_sizes.MODELS.items():
        assert archs.load(arch).sizes()[title] == counted(model)


def test_published_sizes():
    """Parameters of the denoiser as the models' authors tell them, in billions."""
    told = {"sd1": 0.86, "sd2": 0.866, "sdxl": 2.567, "flux1": 11.9, "ssd-1b": 1.3, "vega": 0.74}
    told |= {"qwen-image": 20.4, "hunyuan-video": 12.8, "ltx-video": 13.0, "chroma": 8.9}
    for name, billions in told.items():
        arch = archs.load(name)
        first = next(iter(arch.sizes().values()))
        total = sum(n for block, n in first.items() if block in arch.blocks)
        assert total / 1e9 == pytest.approx(billions, rel=0.03), name


@pytest.mark.parametrize("name", archs.names())
def test_every_architecture_is_told(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    arch = archs.load(name)
    out = call(capsys, name)
    lines = [line.split() for line in out.splitlines()]
    first = next(iter(arch.sizes().values()))
    rows = {words[0]: words for words in lines if words and words[0] in first}
    assert rows.keys() == first.keys()
    total = sum(n for block, n in first.items() if block in arch.blocks)
    for block in arch.blocks:
        if block in first:
            share = float(rows[block][3])
            assert share == pytest.approx(100 * first[block] / total, abs=0.006)
    bars = {block: row[-1].count("█") for block, row in rows.items()}
    largest = max((b for b in arch.blocks if b in first), key=first.get)
    assert bars[largest] == 40 == max(bars.values())
    for component in arch.components:
        assert component.title in out
    found = json.loads(call(capsys, name, "--json"))
    assert found["blocks"] == list(arch.blocks)
    assert found["parameters"] == arch.sizes()
    assert all(len(row) == int(n) for n, row in found["lists"].items())
    for preset in found["presets"]["published"] + found["presets"]["by_formula"]:
        got = weights.resolve(preset, arch.blocks, arch_title=arch.short)
        assert len(got.blocks) == len(arch.blocks)
    fitting = found["presets"]["published"] + found["presets"]["by_formula"]
    assert {"GRAD_V"} <= set(fitting) <= set(weights.presets())


def test_overview(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # a line each, in the narrowest of usual windows
    out = call(capsys)
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(archs.names())
    assert "1.419 - 17.34 B" in out
    every = json.loads(call(capsys, "--json"))
    assert [a["name"] for a in every] == list(archs.names())


def test_views_in_the_document(capsys):
    found = json.loads(call(capsys, "sd1", "--json"))
    assert len(found["views"]["comfyui"]) == 30
    assert len(found["views"]["supermerger"]) == 25
    assert cli.run(["archs", "sdx"]) == 2
