"""Shards with an index: reading, writing, and an index that lies."""

import contextlib
import json
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
from plymix import engine
from plymix.errors import FormatError, Refusal
from plymix.formats import open_model, sharded
from plymix.formats.base import Entry
from plymix.replay import replay
from small import draw, load, recipe, save

INDEX = "model.safetensors.index.json"
TENSORS = {f"t{i}": draw("F16", (3, 4 + i), seed=i) for i in range(6)}
HOMES = {key: f"model-0000{1 + i // 2}-of-00003.safetensors" for i, key in enumerate(TENSORS)}
SIZE = sum(x.nbytes for _, x in TENSORS.values())


def model(folder, homes=HOMES, total=SIZE, tensors=TENSORS, metadata=None, index=INDEX):
    """Shards as `homes` say, and their index."""
    folder.mkdir(exist_ok=True)
    for shard in set(homes.values()):
        inside = {k: tensors[k] for k, s in homes.items() if s == shard}
        save(folder / shard, inside, metadata)
    said = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / index).write_text(json.dumps(said))
    return folder / index


def rewritten(index, change):
    said = json.loads(index.read_text())
    change(said)
    index.write_text(json.dumps(said))
    return index


def contents(path):
    with open_model(path) as source:
        return {k: bytes(source.read(t)) for k, t in source.tensors.items()}


WANT = {key: x.tobytes() for key, (_, x) in TENSORS.items()}


def test_an_index_opens_its_shards(tmp_path):
    index = model(tmp_path / "m", metadata={"format": "pt", "note": "x"})
    with open_model(index) as source:
        assert source.format == "sharded"
        assert source.metadata == {"format": "pt", "note": "x"}
        assert source.notes == ()
        assert {t.name: t.file for t in source.tensors.values()} == {
            f"t{i}": i // 2 for i in range(6)
        }
        assert [f.name for f in source.files] == sorted(set(HOMES.values()))
        assert source.nbytes == sum(f.stat().st_size for f in source.files)
    assert contents(index) == WANT
    assert contents(tmp_path / "m") == WANT  # the folder: it holds one index


def test_shards_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    values = {k: torch.from_numpy(x.copy()) for k, (_, x) in TENSORS.items()}
    homes = {}
    for i, part in enumerate((("t0", "t1", "t2"), ("t3", "t4", "t5")), 1):
        shard = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({k: values[k] for k in part}, tmp_path / shard)
        homes |= dict.fromkeys(part, shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    assert contents(index) == WANT


def test_two_indices_in_a_folder_are_ambiguous(tmp_path):
    model(tmp_path / "m")
    model(tmp_path / "m", index="other.safetensors.index.json")
    with pytest.raises(Refusal, match="2 indices"):
        open_model(tmp_path / "m")
    assert contents(tmp_path / "m" / INDEX) == WANT


def test_what_an_index_says_wrongly_but_harmlessly_is_noted(tmp_path):
    index = model(tmp_path / "m", total=SIZE + 1)
    with open_model(index) as source:
        (note,) = source.notes
        assert f"{SIZE + 1:,}" in note
        assert f"{SIZE:,}" in note
    rewritten(index, lambda said: (said["weight_map"].pop("t3"), said.pop("metadata")))
    with open_model(index) as source:
        assert source.tensors.keys() == TENSORS.keys()
        (note,) = source.notes
        assert "t3" in note


def refused(index):
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            open_model(index).close()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert index.name in said
    assert "\n" not in said
    assert len(said) < 500
    return said


def homes(**changes):
    return lambda said: said["weight_map"].update(changes)


OUTSIDE = (
    "../secret.safetensors", "/etc/passwd", "..", ".", "", "sub/m.safetensors", "..\\m.safetensors",
    "C:m.safetensors", "m\0.safetensors", "m\n.safetensors", "x" * 300, 7, None, ["m"],
)  # fmt: skip
LIES = {
    "missing shard": (homes(t9="model-00009-of-00009.safetensors"), "not beside it"),
    "key not in its shard": (homes(t0=HOMES["t5"]), f"it is in {HOMES['t0']}"),
    "key in no shard": (homes(t9=HOMES["t5"]), "no shard has it"),
    "no map": (lambda said: said.pop("weight_map"), "without a weight_map"),
    "empty map": (lambda said: said["weight_map"].clear(), "without a weight_map"),
    "map is a list": (lambda said: said.update(weight_map=["t0"]), "without a weight_map"),
    **{
        f"outside: {shard!r:.30}": (homes(t0=shard), "not the name of a file beside it")
        for shard in OUTSIDE
    },
}


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_of_an_index_is_named(tmp_path, lie):
    change, word = LIES[lie]
    save(tmp_path / "secret.safetensors", {"t0": TENSORS["t0"]})
    assert word in refused(rewritten(model(tmp_path / "m"), change))


def test_a_key_in_two_shards(tmp_path):
    index = model(tmp_path / "m")
    save(tmp_path / "m" / HOMES["t5"], {k: TENSORS[k] for k in ("t4", "t5", "t0")})
    assert "two shards" in refused(index)


def test_too_many_shards(tmp_path):
    index = model(tmp_path / "m")
    rewritten(index, homes(**{f"k{i}": f"s{i}.safetensors" for i in range(1001)}))
    assert "limit 1,000" in refused(index)


def test_an_index_of_itself_and_of_other_kinds(tmp_path):
    """No index within an index, and no folder: a loop would have no end."""
    index = model(tmp_path / "m")
    (tmp_path / "m" / "folder").mkdir()
    for shard, word in ((INDEX, "is neither"), ("folder", "not beside it")):
        rewritten(index, homes(t0=shard))
        assert word in refused(index)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"weight_map": {"a": "x", "a": "y"}}',
        b'{"weight_map": ',
        b'{"weight_map": {"a": "\xff"}}',
        b'{"a":' * 50_000,
        b"{}",
        b'{"metadata": 3, "weight_map": {"a": 3}}',
    ],
)
def test_damaged_json(tmp_path, raw):
    index = tmp_path / INDEX
    index.write_bytes(raw)
    refused(index)


def test_an_index_of_many_bytes_is_not_read(tmp_path):
    index = tmp_path / INDEX
    index.write_bytes(b'{"weight_map": ')
    with open(index, "r+b") as f:
        f.truncate(8 << 30)
    assert "limit" in refused(index)


def test_a_damaged_shard_is_named(tmp_path):
    index = model(tmp_path / "m")
    shard = tmp_path / "m" / HOMES["t0"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match=f"{shard.name} is truncated"):
        open_model(index)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_index_is_refused_or_means_what_it_says(tmp_path_factory, data):
    index = model(tmp_path_factory.mktemp("fuzz") / "m")
    raw = bytearray(index.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123,:[]{}" e-./')))
    index.write_bytes(raw)
    with contextlib.suppress(Refusal), open_model(index) as source:
        for key, info in source.tensors.items():
            assert source.read(info) == WANT[key]


# ---- writing


def written(folder, shards, tensors):
    """The files of a layout, as an engine would fill them."""
    for file, layout in shards.files:
        target = engine.MemoryTarget(layout.size)
        for at, piece in layout.pieces:
            target.write_at(at, piece)
        for key, at in layout.offsets.items():
            if tensors[key]:
                target.write_at(at, tensors[key])
        (folder / file).write_bytes(target.data)
    for file, raw in shards.others.items():
        (folder / file).write_bytes(raw)


def entries(sizes):
    return [Entry(f"t{i}", "U8", (n,)) for i, n in enumerate(sizes)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_shards_are_filled_in_order_and_read_again(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    tensors = {e.name: rng.bytes(e.nbytes) for e in entries(sizes)}
    shards = sharded.layout_shards(entries(sizes), {"a": "b"}, limit, "m")
    written(folder, shards, tensors)
    order = [key for _, layout in shards.files for key in layout.offsets]
    assert order == list(tensors)
    held = [[len(tensors[k]) for k in layout.offsets] for _, layout in shards.files]
    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in map(nonzero, held))
    for one, after in pairwise(held):
        assert sum(one) + after[0] > limit  # nothing that would have fitted went on
    n = len(shards.files)
    if n == 1:
        assert [f for f, _ in shards.files] == ["m.safetensors"]
        assert not shards.others
        index = folder / "m.safetensors"
    else:
        names = [f"m-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        assert [f for f, _ in shards.files] == names
        index = folder / "m.safetensors.index.json"
    for file, _ in shards.files:
        assert load(folder / file)[1] == {"a": "b"}
    assert contents(index) == tensors
    with open_model(index) as source:
        assert source.notes == ()


def nonzero(sizes):
    return [n for n in sizes if n] or [0]


def test_the_index_is_as_others_write_it():
    shards = sharded.layout_shards(entries([6, 4, 8]), {}, 10, "diffusion_pytorch_model", "fp16")
    assert [f for f, _ in shards.files] == [
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    ]
    ((file, raw),) = shards.others.items()
    assert file == "diffusion_pytorch_model.safetensors.index.fp16.json"
    assert json.loads(raw) == {
        "metadata": {"total_size": 18},
        "weight_map": {
            "t0": "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "t1": "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "t2": "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        },
    }


@pytest.mark.parametrize("limit", [0, -1])
def test_no_room_in_a_shard(limit):
    with pytest.raises(Refusal, match="holds nothing"):
        sharded.layout_shards(entries([1]), {}, limit)


def test_more_shards_than_are_read_are_not_written():
    with pytest.raises(Refusal, match="too many"):
        sharded.layout_shards(entries([2] * 1001), {}, 2)


# ---- merging


def test_a_merge_from_shards_is_the_merge_from_one_file(tmp_path):
    other = {k: draw("F16", x.shape, seed=50 + i) for i, (k, (_, x)) in enumerate(TENSORS.items())}
    save(tmp_path / "whole.safetensors", TENSORS)
    save(tmp_path / "b.safetensors", other)
    index = model(tmp_path / "m")
    found = []
    for a in (tmp_path / "whole.safetensors", index, tmp_path / "m"):
        out = tmp_path / "out.safetensors"
        plymix.merge(recipe({"a": a, "b": tmp_path / "b.safetensors"}, 0.3), out=out, force=True)
        found.append({k: x.tobytes() for k, (_, x) in load(out)[0].items()})
    assert found[0] == found[1] == found[2]


def test_a_merge_from_shards_can_be_made_again_and_notices_another_shard(tmp_path):
    save(tmp_path / "b.safetensors", {k: draw("F16", x.shape) for k, (_, x) in TENSORS.items()})
    index = model(tmp_path / "m")
    files = {"a": tmp_path / "m", "b": tmp_path / "b.safetensors"}
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    plymix.merge(recipe(files, 0.3), out=out)
    replay(out, again)
    assert again.read_bytes() == out.read_bytes()
    changed = tmp_path / "m" / HOMES["t5"]
    raw = bytearray(changed.read_bytes())
    raw[-1] ^= 1
    changed.write_bytes(raw)
    assert index.exists()
    with pytest.raises(Refusal, match="not the m that the recipe names"):
        replay(out, tmp_path / "third.safetensors")
