"""Made again from what they say of themselves: LoRA files made of other files.

What is expected are the file's own bytes, and sums of numpy's where numbers are changed on purpose.
"""

import json
import re
import shutil

import numpy as np
import pytest

import loras as made
import plymix
from plymix import cli, loras, replay
from plymix.recipe import LORA_KEY
from small import draw, load, save
from test_lora_files import CONV, HEADER, KEYS, TEXT, Q, changes, lora_file, name
from tiny import write


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two models and two LoRAs, one of them of several families."""
    folder = tmp_path_factory.mktemp("inputs")
    for i, model in enumerate("ab"):
        write(folder / f"{model}.safetensors", "sd1", i, dtype="F32")
    lora_file(folder / "one.safetensors", changes(1), {"ss_tag_frequency": '{"x": {"y": 2}}'})
    several = {**changes(5, (CONV, TEXT)), Q: made.loha(HEADER[Q][1], 3)}
    lora_file(folder / "two.safetensors", several, {"modelspec.title": "Two"}, dtype="F16")
    return folder


def words(text, folder):
    return [str(folder / w) if w.split(":")[0].endswith("safetensors") else w for w in text.split()]


MADE = [
    "merge one.safetensors:0.5 two.safetensors:-1:0.25",
    "merge one.safetensors two.safetensors:2 --rank 2 --lbw OUTALL --to diffusers",
    "merge one.safetensors one.safetensors:0.5 --energy 0.9 --base a.safetensors --dtype bf16",
    "resize two.safetensors --rank 2 --conv-rank 1",
    "resize one.safetensors --size 12kB --seed 7",
    "convert one.safetensors --to comfyui",
    "convert two.safetensors --to lycoris --dtype fp16",
    "extract b.safetensors a.safetensors --rank 2 --conv-rank 1 --diffs",
    "extract b.safetensors a.safetensors --energy 0.5 --no-text-encoders --no-conv",
    "extract b.safetensors a.safetensors --family lokr --factor 2 --rank 1 --to lycoris",
]


@pytest.mark.parametrize("command", MADE)
def test_made_again_to_the_byte(command, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    out = tmp_path / "out.safetensors"
    assert cli.run(["lora", *words(command, inputs), "-o", str(out), "--threads", "1"]) == 0
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert load(out)[1]["modelspec.date"] == "1970-01-02"
    assert str(inputs) not in json.dumps(load(out)[1])
    renamed = tmp_path / "else" / "where"
    shutil.copytree(inputs, renamed)
    for file in renamed.iterdir():
        file.rename(file.with_name(f"my {file.name}"))
    again = tmp_path / "again.safetensors"
    found = replay.replay(out, again, folders=[tmp_path / "else"], threads=2)
    assert again.read_bytes() == out.read_bytes()
    assert isinstance(found, loras.Made)
    capsys.readouterr()
    assert cli.run(["verify", str(out), "--models", str(inputs)]) == 0
    assert "out.safetensors is exactly what its record makes" in capsys.readouterr().out


def test_names_of_no_known_model(tmp_path):
    strange = {
        "blob.x.lora_A.weight": draw("F32", (2, 6)),
        "blob.x.lora_B.weight": draw("F32", (8, 2)),
    }
    file = save(tmp_path / "l.safetensors", strange)
    loras.merge([f"{file}:0.5", f"{file}:1"], tmp_path / "o.safetensors")
    replay.replay(tmp_path / "o.safetensors", tmp_path / "p.safetensors")
    assert (tmp_path / "o.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()


@pytest.fixture
def merged(inputs, tmp_path):
    for one in ("one", "two"):
        shutil.copy(inputs / f"{one}.safetensors", tmp_path)
    out = tmp_path / "out.safetensors"
    loras.merge([str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors:0.5")], out)
    return out


def test_an_altered_or_missing_input_is_refused_by_name(merged, tmp_path):
    two = tmp_path / "two.safetensors"
    data = bytearray(two.read_bytes())
    data[-1] ^= 1
    two.write_bytes(data)
    for work in (replay.replay, replay.verify):
        with pytest.raises(plymix.Refusal, match=r"two.safetensors is not the .*other content"):
            work(merged)
    two.unlink()
    with pytest.raises(plymix.Refusal, match=r"two.safetensors \(.*\) is missing; .*--models"):
        replay.verify(merged)
    assert not list(tmp_path.glob("*replay*"))


def rewritten(path, change, metadata=None):
    tensors, said = load(path)
    save(path, change(dict(tensors)), metadata or said)


def test_what_differs_is_named(merged, capsys):
    original = merged.read_bytes()
    up = f"{name(Q)}.lora_up.weight"

    def more(tensors):
        kind, x = tensors[up]
        return {**tensors, up: (kind, x * np.float32(1.01))}

    def less(tensors):
        return {key: x for key, x in tensors.items() if key != up}

    def besides(tensors):
        return {**tensors, "foreign": draw("F32", (2, 2))}

    for change, text in (
        (more, f"1 of .* tensors of out.safetensors differ .*: {up}"),
        (less, f"lacks {up}"),
        (besides, "holds foreign"),
        (lambda t: t, "says something else of itself .*: note"),
    ):
        metadata = None if change in (more, less, besides) else {**load(merged)[1], "note": "x"}
        rewritten(merged, change, metadata)
        verdict = replay.verify(merged)
        assert not verdict.ok
        assert re.search(text, verdict.text), verdict.text
        merged.write_bytes(original)
    assert cli.run(["verify", str(merged), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_other_last_digits_are_told_and_let_through(inputs, tmp_path):
    """Factors turned by a rotation: other bytes, the same product but for rounding."""
    out = tmp_path / "out.safetensors"
    loras.merge([str(inputs / f"{n}.safetensors") for n in ("one", "two")], out, rank=3)

    def turned(tensors):
        for key in KEYS:
            up, down = (f"{name(key)}.lora_{end}.weight" for end in ("up", "down"))
            u, d = (tensors[k][1].astype(np.float64) for k in (up, down))
            q = np.linalg.qr(np.random.default_rng(1).standard_normal((u.shape[1],) * 2))[0]
            tensors[up] = ("F32", np.einsum("or...,rs->os...", u, q).astype(np.float32))
            tensors[down] = ("F32", np.einsum("sr,r...->s...", q.T, d).astype(np.float32))
        return tensors

    rewritten(out, turned)
    verdict = replay.verify(out, folders=[inputs])
    assert verdict.ok
    assert "within rounding" in verdict.text

    def scaled(tensors):
        kind, x = tensors[f"{name(Q)}.lora_up.weight"]
        return {**tensors, f"{name(Q)}.lora_up.weight": (kind, x * np.float32(1.002))}

    rewritten(out, scaled)
    assert not replay.verify(out, folders=[inputs]).ok


def test_the_record_is_shown(inputs, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    files = [f"{inputs / 'one.safetensors'}:0.5", str(inputs / "two.safetensors")]
    loras.merge(files, out, rank=2, lbw={"IN01": 0.5})
    assert cli.run(["recipe", "show", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["made"], said["rank"], said["title"]) == ("merge", 2, "out")
    assert said["inputs"][0]["strength"] == 0.5
    assert cli.run(["recipe", "show", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[:2] == ["[lora]", 'made = "merge"']
    tomllib = pytest.importorskip("tomllib")
    found = tomllib.loads(text)
    assert found["inputs"] == said["inputs"]
    assert {**found["lora"], "inputs": found["inputs"]} == said


GOOD = {"made": "merge", "inputs": [{"file": "one.safetensors", "size": 1, "sha256": "0" * 64}]}


@pytest.mark.parametrize(
    "said",
    [
        "{",
        "[" * 100_000,
        "null",
        json.dumps({**GOOD, "made": "eaten"}),
        json.dumps({**GOOD, "further": 1}),
        json.dumps({**GOOD, "inputs": []}),
        json.dumps({**GOOD, "made": "extract"}),
        json.dumps({**GOOD, "inputs": [{"file": "one.safetensors", "size": 1}]}),
        json.dumps({**GOOD, "rank": -1}),
        json.dumps({**GOOD, "energy": 2}),
        json.dumps({**GOOD, "dtype": "fp4"}),
        json.dumps({**GOOD, "dialect": "kohia"}),
        json.dumps({**GOOD, "inputs": [{"file": "x", "strength": "1"}]}),
    ],
)
def test_records_that_cannot_be_are_refused(said, tmp_path):
    file = save(tmp_path / "l.safetensors", {"x": draw("F32", (2, 2))}, {LORA_KEY: said})
    with pytest.raises(plymix.Refusal, match=r"cannot be|unknown dialect"):
        replay.replay(file)


def test_the_models_of_an_extraction_may_be_folders(inputs, tmp_path):
    plymix.convert(inputs / "b.safetensors", tmp_path / "model")
    out = tmp_path / "out.safetensors"
    loras.extract(tmp_path / "model", inputs / "a.safetensors", out, rank=2, conv=False)
    assert replay.verify(out, folders=[inputs]).text.startswith("out.safetensors is exactly")
