"""Where results may go: names that are too long are refused before a tensor is read."""

import os
import sys

import pytest

import plymix
import tiny
from plymix import cli, outputs, replay
from plymix.cli.merging import default_name
from plymix.errors import Refusal
from plymix.formats import safetensors, torch_zip
from plymix.formats.base import Handle

LONG = "x" * 300
MOST = 255

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="names are counted otherwise there")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("a", 1), ("b", 2)):
        tiny.write(folder / f"{name}.safetensors", seed=seed)
    tiny.write(folder / "nai.safetensors", nai=True)
    models = "\n".join(f'{n} = "{folder / n}.safetensors"' for n in "ab")
    step = '[steps.x]\nmethod = "weighted_sum"\na = "a"\nb = "b"\nalpha = 0.5'
    (folder / "recipe.toml").write_text(f"[models]\n{models}\n{step}\n")
    plymix.merge(folder / "a.safetensors", folder / "b.safetensors", folder / "ab.safetensors")
    return folder


@pytest.fixture
def headers_only(monkeypatch):
    """Reading anything beyond a megabyte's header fails; these files' tensors lie behind theirs."""
    real = Handle.read_at

    def read_at(self, offset, out):
        assert offset < 9 or len(memoryview(out)) > 50_000, "a tensor was read"
        real(self, offset, out)

    monkeypatch.setattr(Handle, "read_at", read_at)


COMMANDS = [
    "merge a.safetensors b.safetensors -o {}.safetensors",
    "merge a.safetensors b.safetensors -o {}.ckpt",
    "merge a.safetensors b.safetensors -o {}.gguf",
    "merge a.safetensors b.safetensors -o {}",
    "merge a.safetensors b.safetensors -o {}/short.safetensors",
    "merge a.safetensors b.safetensors -o {}.safetensors --dry-run",
    "explain a.safetensors b.safetensors -o {}.safetensors",
    "mbw a.safetensors b.safetensors -o {}.safetensors",
    "run recipe.toml -o {}.safetensors",
    "replay ab.safetensors -o {}.safetensors",
    "convert a.safetensors {}.ckpt",
    "convert a.safetensors {}",
    "prune a.safetensors -o {}.safetensors",
    "repair a.safetensors -o {}.safetensors",
    "extract a.safetensors --component vae -o {}.safetensors",
    "diff a.safetensors b.safetensors --plot {}.svg",
    "lora bake a.safetensors no-lora.safetensors -o {}.safetensors",
    "lora extract a.safetensors b.safetensors --rank 1 -o {}.safetensors",
    "recipe import ab.safetensors -o {}.toml",
    "compare a.safetensors b.safetensors -o {}.png",
    "blocks a.safetensors b.safetensors -o {}.png",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_too_long_a_name_is_refused(command, home, tmp_path, monkeypatch, capsys, headers_only):
    if command.startswith(("compare", "blocks")):
        pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    there = os.listdir(home)
    words = [str(home / word) if word in there else word for word in command.split()]
    assert cli.run([word.replace("{}", LONG) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert "bytes, and it may have" in said
    assert "choose a shorter one" in said
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_is_written(home, tmp_path):
    out = tmp_path / ("y" * (MOST - len(".safetensors")) + ".safetensors")
    plymix.merge(home / "a.safetensors", home / "b.safetensors", out)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    assert out.read_bytes() == (home / "ab.safetensors").read_bytes()
    with pytest.raises(Refusal, match=r"has 256 bytes, and it may have 255 here"):
        plymix.merge(home / "a.safetensors", home / "b.safetensors", out.with_name("y" + out.name))


def test_bytes_are_counted_not_letters(tmp_path):
    outputs.writable(tmp_path / ("é" * 127))
    with pytest.raises(Refusal, match="has 256 bytes"):
        outputs.writable(tmp_path / ("é" * 128))


def test_a_path_may_be_too_long_as_a_whole(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=r"the path of out\.ckpt has 6,0\d\d bytes"):
        plymix.merge(home / "a.safetensors", home / "b.safetensors", "abc/" * 1500 + "out.ckpt")


def test_shards_have_longer_names(home, tmp_path, headers_only):
    """X-00001-of-00003.safetensors has 15 letters more than X.safetensors, its index 11."""
    models = home / "a.safetensors", home / "b.safetensors"
    out = tmp_path / ("y" * 229 + ".safetensors")
    with pytest.raises(Refusal, match="has 241 bytes, and it may have 240 here"):
        plymix.merge(*models, out, shard="300KB")
    assert list(tmp_path.iterdir()) == []


def test_pictures_leave_room_for_what_comes_beside_them(tmp_path):
    pixels = pytest.importorskip("plymix.images.pixels")
    pytest.importorskip("PIL")
    pixels.writable(tmp_path / ("z" * 200 + ".png"), force=False)
    with pytest.raises(Refusal, match="may have 223 here"):
        pixels.writable(tmp_path / ("z" * 230 + ".png"), force=False)


def test_default_names_are_cut(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_name("a.ckpt", "b.ckpt") == "a-b-mbw.safetensors"
    name = default_name("é" * 120 + ".ckpt", f"{LONG[:250]}.ckpt")
    assert name == "é" * 50 + "-" + "x" * 100 + "-mbw.safetensors"
    long = tmp_path / ("w" * 243 + ".safetensors")
    long.write_bytes((home / "ab.safetensors").read_bytes())
    made = replay.replay(long, folders=[home])
    assert made.path.name == "w" * (MOST - 19) + "-replay.safetensors"
    assert made.path.read_bytes() == long.read_bytes()


def test_a_link_is_kept_and_what_it_leads_to_replaced(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "link.safetensors").symlink_to("there/out.safetensors")
    words = ["mbw", str(home / "a.safetensors"), str(home / "b.safetensors")]
    assert cli.run([*words, "-o", "link.safetensors"]) == 0
    assert (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "there/out.safetensors").stat().st_size > 1_000_000


@pytest.mark.parametrize(
    "words",
    [
        ["merge", f"{LONG}.ckpt", "b.ckpt", "-o", "out.ckpt"],
        ["inspect", LONG],
        ["run", f"{LONG}.toml", "-o", "out.ckpt"],
        ["run", "recipe.toml", "-o", "out.ckpt", "--models", LONG],
        ["recipe", "import", f"{LONG}.txt"],
        ["lora", "bake", "a.ckpt", f"a castle <lora:nowhere:0.5> {LONG}", "-o", "out.ckpt"],
        ["convert", "a.safetensors", "folder", "--configs", LONG],
        ["doctor", LONG],
    ],
    ids=lambda words: " ".join(words)[:20],
)
def test_inputs_with_long_names_are_not_there(words, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [str(home / w) if w in os.listdir(home) else w for w in words]
    assert cli.run(words) == 2
    *notes, said = capsys.readouterr().err.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    assert said.startswith("plymix: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        "convert a.safetensors OUT.ckpt",
        "prune a.safetensors -o OUT.safetensors",
        "extract a.safetensors --component vae -o OUT.safetensors",
        "repair nai.safetensors -o OUT.ckpt",
    ],
)
def test_one_model_is_opened_once(command, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsed = []
    for module in (safetensors, torch_zip):
        real = module._open
        monkeypatch.setattr(module, "_open", lambda h, f=real: parsed.append(h.path) or f(h))
    words = [str(home / w) if w in os.listdir(home) else w for w in command.split()]
    assert cli.run([w.replace("OUT", str(tmp_path / "out")) for w in words]) == 0
    assert len(parsed) == 1
