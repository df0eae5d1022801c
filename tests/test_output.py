"""What can be written: diffusers folders, shards, other layouts; and `convert` between them.

What a folder has to hold comes from the golden maps with numpy alone (see `maps`). The tensors
carry their identity: no two elements of a model are equal, so nothing can change places unseen.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import plymix
import tiny
from maps import ARCH, converted, golden_map
from plymix import archs, replay
from plymix.engine import sets
from plymix.engine.files import AtomicFile
from plymix.errors import Cancelled, Failure, Refusal
from plymix.formats import open_model
from plymix.recipe import from_dict
from small import data, load, save

MODELS = ["sd1", "sd2", "sdxl", "sd3.5-medium", "flux-dev"]
DEEP = re.compile(r"(double_blocks|single_blocks|encoder\.block)\.(?!0\.|1\.)")
ENCODERS = {
    "sd3.5-medium": {
        "clip_l": "text_encoder",
        "clip_g": "text_encoder_2",
        "t5xxl": "text_encoder_3",
    },
    "flux-dev": {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"},
}
LOST = {  # what the folders of diffusers have no tensor for, and nothing else
    "sd1": {"text_model.embeddings.position_ids", "schedule"},
    "sd2": {"resblocks.23", "text_projection", "logit_scale", "schedule"},
    "sdxl": {"text_model.embeddings.position_ids", "logit_scale"},
    "sd3.5-medium": set(),
    "flux-dev": set(),
}


def identities(model, first=1):
    """{key: (dtype, array)} with the golden names in float32; each element has bits of its own."""
    made = {k: v for k, v in tiny.header(model, dtype="F32").items() if not DEEP.search(k)}
    out, at = {}, first
    for key, (dtype, shape) in made.items():
        if dtype != "F32":
            out[key] = (dtype, tiny.state({key: (dtype, shape)})[key])
            continue
        n = int(np.prod(shape))
        out[key] = (dtype, np.arange(at, at + n, dtype=np.uint32).view(np.float32).reshape(shape))
        at += n
    return out


def expected(model, tensors):
    """{component/key: array} that a folder of these tensors has to hold."""
    arch, out = archs.load(ARCH[model]), {}
    tensors = {arch.place(key).key: x for key, (_, x) in tensors.items() if arch.place(key)}
    for component, rows in golden_map(model).items():
        for key, (names, transform) in rows.items():
            if key in tensors:
                made = converted(tensors[key], names, transform)
                out |= {f"{component}/{name}": x for name, x in made.items()}
    if model in ENCODERS:  # their maps are of the transformer alone
        for key, (names, transform) in golden_map("sd1")["vae"].items():
            own = arch.components[-1].prefixes[0] + key.removeprefix("first_stage_model.")
            if own in tensors:
                made = converted(tensors[own], names, transform)
                out |= {f"vae/{name}": x for name, x in made.items()}
        for key, (_, _, component, _) in tiny.golden(model).items():
            if component in ENCODERS[model] and key in tensors:
                inner = key.partition(".transformer.")[2]
                out[f"{ENCODERS[model][component]}/{inner}"] = tensors[key]
    return out


def tree(folder):
    """{path: bytes} of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def held(folder):
    """{component/key: (shape, bytes)} of a folder, read without plymix."""
    out = {}
    for file in folder.glob("*/*.safetensors"):
        for key, (_, x) in load(file)[0].items():
            out[f"{file.parent.name}/{key}"] = (x.shape, x.tobytes())
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return {m: save(home / f"{m}.safetensors", identities(m)) for m in MODELS}


@pytest.fixture(scope="module")
def folders(files):
    found = {m: file.with_suffix("") for m, file in files.items() if m != "sd3.5-medium"}
    found["sd3.5-medium"] = files["sd1"].parent / "sd3"
    for model, folder in found.items():
        plymix.convert(files[model], folder)
    return found


# --- layouts


@pytest.mark.parametrize("model", MODELS)
def test_a_folder_holds_what_diffusers_converters_make(folders, model):
    want = {k: (x.shape, x.tobytes()) for k, x in expected(model, identities(model)).items()}
    assert len(want) > 500
    assert held(folders[model]) == want
    index = json.loads((folders[model] / "model_index.json").read_text())
    for component in {name.partition("/")[0] for name in want}:
        library, kind = index[component]
        config = json.loads((folders[model] / component / "config.json").read_text())
        assert config.get("_class_name") == (kind if library == "diffusers" else None)
    assert (folders[model] / "scheduler" / "scheduler_config.json").is_file()


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_every_byte(tmp_path, files, folders, model):
    result = plymix.convert(folders[model], tmp_path / "back.safetensors")
    want, got = load(files[model])[0], load(tmp_path / "back.safetensors")[0]
    for key in got:
        assert (got[key][0], got[key][1].shape) == (want[key][0], want[key][1].shape), key
        assert got[key][1].tobytes() == want[key][1].tobytes(), key
    lost = want.keys() - got.keys()
    schedule = {k for k in lost if "." not in k}
    names = {"schedule": schedule}
    for part in LOST[model] - {"schedule"}:
        names[part] = {k for k in want if part in k}
    assert lost == set().union(*names.values())
    assert not lost or len(result.notes) > 0  # it says so


@pytest.mark.parametrize("model", ["sdxl", "sd3.5-medium"])
def test_folders_to_folders_keep_all(tmp_path, folders, model):
    """The folder's own configs, components and spelling, whatever they are."""
    folder = shutil.copytree(folders[model], tmp_path / "in")
    component = "unet" if model == "sdxl" else "transformer"
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": ["x", "Checker"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / component / "config.json").read_text()) | {"mine": 1}
    (folder / component / "config.json").write_text(json.dumps(config))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    save(folder / "safety_checker" / "model.safetensors", {"w": ("F32", np.ones(3, "f4"))})
    old = load(folder / "text_encoder" / "model.safetensors")[0]  # as transformers 5 writes it
    new = {key.removeprefix("text_model."): x for key, x in old.items()}
    save(folder / "text_encoder" / "model.safetensors", new | {"extra": ("F32", np.ones(2, "f4"))})
    result = plymix.convert(folder, tmp_path / "out")
    assert held(tmp_path / "out") == held(folder)
    was, now = tree(folder), tree(tmp_path / "out")
    assert was.keys() == now.keys()
    small = {path for path in was if not path.endswith(".safetensors")}
    assert all(now[path] == was[path] for path in small)
    assert not [note for note in result.notes if "tokenizer" in note]


def test_a_component_there_and_back(tmp_path):
    made = {k: x for k, x in identities("sd1").items() if k.startswith(tiny.UNET)}
    unet = save(tmp_path / "unet.safetensors", made)
    plymix.convert(unet, tmp_path / "d.safetensors", layout="diffusers")
    want = {k.partition("/")[2]: x.tobytes() for k, x in expected("sd1", made).items()}
    assert data(tmp_path / "d.safetensors") == want
    plymix.convert(tmp_path / "d.safetensors", tmp_path / "same.safetensors")
    assert data(tmp_path / "same.safetensors") == want
    plymix.convert(tmp_path / "d.safetensors", tmp_path / "back.safetensors", layout="ldm")
    assert data(tmp_path / "back.safetensors") == data(unet)
    plymix.convert(unet, tmp_path / "folder")
    assert sorted(tree(tmp_path / "folder")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    with open_model(tmp_path / "folder") as source:
        assert {k: bytes(source.read(i)) for k, i in source.tensors.items()} == want


@pytest.mark.parametrize("kind", ["ldm", "diffusers"])
def test_merges_give_the_same_in_every_layout(tmp_path, files, folders, kind):
    other = save(tmp_path / "b.safetensors", identities("sdxl", first=500))
    recipe = {
        "models": {"a": str(folders["sdxl"] if kind == "diffusers" else files["sdxl"])},
        "steps": {"mix": {"method": "slerp", "a": "a", "b": "b", "alpha": 0.3}},
    }
    recipe["models"]["b"] = str(other)
    plymix.merge(from_dict(recipe), out=tmp_path / "folder")
    plymix.merge(from_dict(recipe | {"output": {"layout": "ldm"}}), out=tmp_path / "m.safetensors")
    merged = load(tmp_path / "m.safetensors")[0]
    want = {k: (x.shape, x.tobytes()) for k, x in expected("sdxl", merged).items()}
    assert held(tmp_path / "folder") == want


def test_what_a_model_predicts_goes_along(tmp_path):
    made = identities("sdxl")
    for name in ("v_pred", "ztsnr"):
        made[name] = ("F32", np.zeros(0, "f4"))
    file = save(tmp_path / "v.safetensors", made)
    plymix.convert(file, tmp_path / "v")
    said = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text())
    assert (said["prediction_type"], said["rescale_betas_zero_snr"]) == ("v_prediction", True)
    plymix.convert(tmp_path / "v", tmp_path / "back.safetensors")
    assert data(tmp_path / "back.safetensors").keys() >= {"v_pred", "ztsnr"}
    made["edm_mean"] = ("F32", np.zeros(4, "f4"))
    save(tmp_path / "edm.safetensors", made)
    with pytest.raises(Refusal, match="scheduler of a model that predicts edm"):
        plymix.convert(tmp_path / "edm.safetensors", tmp_path / "edm")


def test_configs_of_another_folder(tmp_path, files, folders):
    given = shutil.copytree(folders["sd1"], tmp_path / "given")
    (given / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "x": 1}')
    (given / "tokenizer").mkdir(exist_ok=True)
    (given / "tokenizer" / "merges.txt").write_text("a b")
    index = json.loads((given / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (given / "model_index.json").write_text(json.dumps(index))
    result = plymix.convert(files["sd1"], tmp_path / "out", configs=given)
    made = tree(tmp_path / "out")
    assert json.loads(made["unet/config.json"])["x"] == 1
    assert made["tokenizer/merges.txt"] == b"a b"
    assert not [note for note in result.notes if "tokenizer" in note]


def test_mixed_containers(tmp_path, files):
    want = data(files["sd1"])
    at = files["sd1"]
    for name in ("a.ckpt", "b.gguf", "c.safetensors"):
        plymix.convert(at, tmp_path / name)
        at = tmp_path / name
    assert data(at) == want


def test_what_is_no_model_is_converted_by_key(tmp_path):
    lora = {"lora_unet_x.lora_up.weight": ("F16", np.ones((2, 3), "f2"))}
    vae = {"odd.weight": ("BF16", np.arange(6, dtype="u2"))}
    for name, tensors in (("lora", lora), ("vae", vae)):
        save(tmp_path / f"{name}.safetensors", tensors)
        plymix.convert(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.ckpt")
        with open_model(tmp_path / f"{name}.ckpt") as source:
            assert source.tensors.keys() == tensors.keys()
        with pytest.raises(Refusal, match="no other layout"):
            plymix.convert(tmp_path / f"{name}.safetensors", tmp_path / "folder")


LONE = [("sd1", "vae"), ("sdxl", "vae"), ("sd1", "text_encoder"), ("sdxl", "text_encoder_2")]


@pytest.mark.parametrize(("model", "component"), LONE)
def test_a_lone_vae_or_text_encoder_there_and_back(tmp_path, model, component):
    made = identities(model)
    there = {
        k.partition("/")[2]: ("F32", x)
        for k, x in expected(model, made).items()
        if k.startswith(f"{component}/")
    }
    file = save(tmp_path / "d.safetensors", there)
    plymix.convert(file, tmp_path / "own.safetensors", layout="ldm")
    own = load(tmp_path / "own.safetensors")[0]
    rest = {k: x.tobytes() for k, (_, x) in made.items()}
    start = {
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    }[component]
    assert {k: x.tobytes() for k, (_, x) in own.items()} == {k: rest[start + k] for k in own}
    plymix.convert(tmp_path / "own.safetensors", tmp_path / "back.safetensors", layout="diffusers")
    assert data(tmp_path / "back.safetensors") == data(file)
    for prefix in (start, "vae.") if component == "vae" else (start,):  # as in a checkpoint
        save(tmp_path / "whole.safetensors", {prefix + k: tensor for k, tensor in own.items()})
        plymix.convert(
            tmp_path / "whole.safetensors",
            tmp_path / "back.safetensors",
            layout="diffusers",
            force=True,
        )
        assert data(tmp_path / "back.safetensors") == data(file)


# --- shards


def test_shards_are_named_and_indexed_as_hugging_face_does(tmp_path, files):
    result = plymix.convert(files["sdxl"], tmp_path / "m.safetensors", shard="4MB")
    assert result.path == tmp_path / "m.safetensors.index.json"
    names = [f"m-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "m.safetensors.index.json"]
    index = json.loads(result.path.read_text())
    there = {name: data(tmp_path / name) for name in names}
    homes = {key: name for name, tensors in there.items() for key in tensors}
    assert index["weight_map"] == homes
    total = sum(len(x) for tensors in there.values() for x in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert all(sum(map(len, tensors.values())) <= 4_000_000 for tensors in there.values())
    merged = {key: x for tensors in there.values() for key, x in tensors.items()}
    assert merged == data(files["sdxl"])
    plymix.convert(result.path, tmp_path / "whole.safetensors")
    assert data(tmp_path / "whole.safetensors") == data(files["sdxl"])


def test_shards_within_a_folder(tmp_path, files, folders):
    plymix.convert(files["sdxl"], tmp_path / "f", shard="3MB")
    unet = sorted(p.name for p in (tmp_path / "f" / "unet").iterdir())
    stem = "diffusion_pytorch_model"
    assert unet == [
        "config.json",
        *(f"{stem}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        f"{stem}.safetensors.index.json",
    ]
    assert held(tmp_path / "f") == held(folders["sdxl"])


def test_one_shard_is_one_file(tmp_path, files):
    plymix.convert(files["sd1"], tmp_path / "m.safetensors", shard="5GB")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_new_set_replaces_an_old_one(tmp_path, files):
    out = tmp_path / "m.safetensors"
    plymix.convert(files["sd1"], out)
    with pytest.raises(Refusal, match=r"m\.safetensors exists"):
        plymix.convert(files["sd1"], out, shard="1MB")
    plymix.convert(files["sd1"], out, shard="500kB", force=True)
    first = {p.name for p in tmp_path.iterdir()}
    assert out.name not in first
    with pytest.raises(Refusal, match=r"index\.json exists"):
        plymix.convert(files["sd1"], out, shard="1MB")
    plymix.convert(files["sd1"], out, shard="2MB", force=True)
    assert {p.name for p in tmp_path.iterdir()} == {
        "m-00001-of-00002.safetensors",
        "m-00002-of-00002.safetensors",
        "m.safetensors.index.json",
    }
    with open_model(tmp_path / "m.safetensors.index.json") as source:
        assert {k: bytes(source.read(i)) for k, i in source.tensors.items()} == data(files["sd1"])


# --- all or nothing

OUTPUTS = {"folder": {}, "shards.safetensors": {"shard": "1MB"}}
RUN = """
import sys, time, plymix
def slow(p):
    print("going", flush=True)
    time.sleep(60)
try:
    plymix.convert(sys.argv[1], sys.argv[2], shard=sys.argv[3], force=True, progress=slow)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(params=OUTPUTS)
def target(request, tmp_path, files):
    """(path, options, what is there before): the last either nothing or an older result."""
    return tmp_path / request.param, OUTPUTS[request.param]


def started(files, path, options):
    words = [str(files["sd1"]), str(path), str(options.get("shard", 0))]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "going\n"
    return process


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("older", [False, True])
def test_a_stop_or_kill_leaves_nothing_or_the_old_one(tmp_path, files, target, older):
    path, options = target
    if older:
        plymix.convert(files["sd1"], path, dtype="fp16", **options)
    before = tree(tmp_path)
    process = started(files, path, options)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert tree(tmp_path) == before
    process = started(files, path, options)
    process.kill()
    process.communicate()
    there = tree(tmp_path)
    assert {k: there[k] for k in before} == before
    assert all(k.startswith(".") for k in there.keys() - before.keys())  # the temporaries
    plymix.convert(files["sd1"], path, force=True, **options)  # which the next run sweeps
    assert not [name for name in tree(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "copy_file_range"])
@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk(tmp_path, files, target, monkeypatch, call, older):
    path, options = target
    if older:
        plymix.convert(files["sd1"], path, dtype="fp16", **options)
    before = tree(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(Failure, match="no room for"):
        plymix.convert(files["sd1"], path, force=True, **options)
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == [path.name] if older and "folder" in path.name else True


@pytest.mark.parametrize(
    ("name", "todo"),
    [("x.safetensors", "; split it"), ("x.ckpt", "; make it a .safetensors, split")],
)
def test_more_than_a_file_may_have(tmp_path, files, monkeypatch, name, todo):
    """FAT32 refuses the byte 4 GiB with EFBIG: more room would not help."""

    def too_large(*_):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "posix_fallocate", too_large)
    with pytest.raises(Failure, match="more than a file may have") as caught:
        plymix.convert(files["sd1"], tmp_path / name)
    assert f"{todo} (--shard 4GB), or choose another disk" in str(caught.value)
    assert "no room" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_between_the_shards_names(tmp_path, files, monkeypatch):
    """Then there is no set, rather than one of old and new shards."""
    out = tmp_path / "m.safetensors"
    plymix.convert(files["sd1"], out, shard="1MB", dtype="fp16")
    commit, seen = AtomicFile.commit, []

    def failing(self):
        seen.append(self.path)
        if len(seen) == 2:
            raise OSError(errno.EIO, "input/output error")
        commit(self)

    monkeypatch.setattr(AtomicFile, "commit", failing)
    with pytest.raises(Failure, match="input/output error"):
        plymix.convert(files["sd1"], out, shard="1MB", force=True)
    assert not (tmp_path / "m.safetensors.index.json").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_callback_that_says_stop(tmp_path, files, target):
    path, options = target
    with pytest.raises(Cancelled):
        plymix.convert(files["sd1"], path, progress=lambda p: False, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_result_in_the_place_of_a_model_is_called_so(tmp_path, files):
    """`--force` is not said as if it cost nothing."""
    a, b = (tmp_path / name for name in ("a.safetensors", "b.safetensors"))
    for file in (a, b):
        shutil.copy(files["sd1"], file)
    os.symlink(b, tmp_path / "also b.safetensors")
    before = a.read_bytes()
    for out in (a, b, tmp_path / "also b.safetensors"):
        with pytest.raises(Refusal, match="is an input itself; choose another name"):
            plymix.merge(a, b, out, alpha=0.3)
    assert a.read_bytes() == b.read_bytes() == before


def test_folders_that_are_replaced(tmp_path, files):
    out = tmp_path / "v1.5"
    plymix.convert(files["sd1"], out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(Refusal, match=r"v1\.5 exists; say --force"):
        plymix.convert(files["sd1"], out)
    plymix.convert(out, out, dtype="fp16", force=True)  # the input itself
    assert os.listdir(tmp_path) == ["v1.5"]
    assert not (out / "notes.txt").exists()
    assert (
        load(out / "vae" / "diffusion_pytorch_model.safetensors")[0]["quant_conv.bias"][0] == "F16"
    )
    own = tmp_path / "photos"
    own.mkdir()
    (own / "me.png").write_bytes(b"")
    with pytest.raises(Refusal, match="holds no model"):
        plymix.convert(files["sd1"], own, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_folder_is_used(tmp_path, files, force):
    out = tmp_path / "f"
    out.mkdir()
    plymix.convert(files["sd1"], out, force=force)
    assert (out / "unet" / "config.json").is_file()
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_folders_without_a_name_of_their_own(tmp_path, files, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match="has no name of its own"):
        plymix.convert(files["sd1"], name, force=True)


def test_a_folder_that_is_filled_meanwhile_stays(tmp_path, files):
    out = tmp_path / "f"
    out.mkdir()
    with pytest.raises(Failure, match="appeared while"):
        plymix.convert(files["sd1"], out, progress=lambda _: (out / "x").write_text("mine"))
    assert tree(tmp_path) == {"f/x": b"mine"}


def test_a_folder_that_appears_meanwhile_stays(tmp_path, files):
    out = tmp_path / "f"

    def appear(_):
        out.mkdir(exist_ok=True)
        (out / "x").write_text("mine")

    with pytest.raises(Failure, match="appeared while"):
        plymix.convert(files["sd1"], out, progress=appear)
    assert tree(tmp_path) == {"f/x": b"mine"}


@pytest.mark.parametrize("lacking", [False, True], ids=["renameat2", "two renames"])
def test_systems_that_cannot_exchange(tmp_path, files, monkeypatch, lacking):
    out = tmp_path / "f"
    plymix.convert(files["sd1"], out, dtype="fp16")
    if lacking:
        monkeypatch.setattr(sets.ctypes, "CDLL", lambda *_, **__: object())
    plymix.convert(files["sd1"], out, force=True)
    assert os.listdir(tmp_path) == ["f"]
    assert (
        load(out / "vae" / "diffusion_pytorch_model.safetensors")[0]["quant_conv.bias"][0] == "F32"
    )


# --- the recipe goes along


@pytest.mark.parametrize("options", [{}, {"shard": "1MB"}], ids=["plain", "shards"])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_replay_and_verify(tmp_path, files, name, options):
    result = plymix.convert(files["sd1"], tmp_path / name, dtype="unet=fp16", **options)
    home = files["sd1"].parent
    assert replay.verify(result.path, folders=[home]).ok
    again = replay.replay(
        result.path, tmp_path / f"again{(tmp_path / name).suffix}", folders=[home]
    )
    if name == "out":
        assert tree(again.path) == tree(result.path)
    else:
        with open_model(result.path) as a, open_model(again.path) as b:
            assert a.metadata == b.metadata
            assert all(a.read(a.tensors[k]) == b.read(b.tensors[k]) for k in a.tensors)
    shard = "-00001-of-00002" if options else ""
    home_of = {"out": tmp_path / name / "unet" / f"diffusion_pytorch_model{shard}.safetensors"}
    path = home_of.get(name, tmp_path / f"out{shard}.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    verdict = replay.verify(result.path, folders=[home])
    assert not verdict.ok
    assert verdict.text.startswith("1 of ")
    assert "differ from what its recipe makes" in verdict.text


def test_a_renamed_folder_is_found_by_its_content(tmp_path, files):
    plymix.convert(files["sd1"], tmp_path / "model")
    result = plymix.convert(tmp_path / "model", tmp_path / "out.safetensors").path
    (tmp_path / "deep").mkdir()
    (tmp_path / "model").rename(tmp_path / "deep" / "other")
    assert replay.verify(result, folders=[tmp_path]).ok


def test_a_conversion_keeps_what_is_known_of_the_model(tmp_path):
    about = {"modelspec.title": "Mine", "ss_steps": "9", "sshs_model_hash": "x", "other": "y"}
    file = save(tmp_path / "a.safetensors", identities("sd1"), about)
    plymix.convert(file, tmp_path / "b.safetensors", dtype="fp16")
    said = load(tmp_path / "b.safetensors")[1]
    assert (said["modelspec.title"], said["ss_steps"]) == ("Mine", "9")
    assert "sshs_model_hash" not in said  # a hash of other tensors
    assert json.loads(said["plymix.recipe"])["models"]["a"]["file"] == "a.safetensors"


def test_a_name_without_ending_is_a_folder_and_an_unknown_ending_none(tmp_path, files):
    with pytest.raises(Refusal, match=r"\.safetensor'; use"):
        plymix.convert(files["sd1"], tmp_path / "x.safetensor")
    assert list(tmp_path.iterdir()) == []


# --- what is refused

REFUSED = [
    ("x.safetensors", {"layout": "diffusers"}, "one file and cannot hold text_encoder, unet, vae"),
    ("x", {"layout": "ldm"}, "which has no ldm names"),
    ("x.safetensors", {"layout": "bfl"}, "unknown layout of SD1 'bfl': known: diffusers, ldm"),
    ("x.safetensors", {"layout": "difusers"}, "did you mean diffusers"),
    ("x.ckpt", {"shard": "1MB"}, r"shards are \.safetensors files; x\.ckpt is none"),
    ("x.safetensors", {"shard": "many"}, "no size of a shard; write it as 5GB"),
    ("x.safetensors", {"shard": 1}, "shards of 1 bytes are too many"),
    ("x.safetensors", {"shard": -5}, "less than nothing"),
    ("x", {"configs": "nowhere"}, "--configs nowhere is not a folder"),
]


@pytest.mark.parametrize(("name", "options", "said"), REFUSED)
def test_refusals(tmp_path, files, name, options, said):
    began = time.monotonic()
    with pytest.raises(Refusal, match=said):
        plymix.convert(files["sd1"], tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - began < 5


def test_a_refiner_is_a_folder_too(tmp_path):
    file = tiny.write(tmp_path / "r.safetensors", "sdxl-refiner")
    plymix.convert(file, tmp_path / "folder")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    there = {name for name, of in index.items() if isinstance(of, list) and of[0]}
    assert there == {"unet", "vae", "text_encoder_2", "tokenizer_2", "scheduler"}
    plymix.convert(tmp_path / "folder", tmp_path / "back.safetensors")
    was, back = data(file), data(tmp_path / "back.safetensors")
    assert {key for key in was if back.get(key) != was[key]} == {
        key for key in was if key.endswith("logit_scale")
    }


@pytest.mark.parametrize("out", ["folder", "file.safetensors"])
def test_an_architecture_without_names_in_diffusers(tmp_path, out):
    file = tiny.write(tmp_path / "a.safetensors", "anima")
    with pytest.raises(Refusal, match=r"no diffusers' names of Anima.*name such a file"):
        plymix.convert(file, tmp_path / out, layout="diffusers")


def test_a_dtype_of_components_that_nobody_knows(tmp_path):
    file = save(tmp_path / "a.safetensors", {"w": ("F16", np.ones((2, 2), "f2"))})
    with pytest.raises(
        Refusal, match=r"'transformer'.*components of a\.safetensors.*one dtype for"
    ):
        plymix.convert(file, tmp_path / "b.safetensors", dtype="transformer=fp16")


def test_a_shard_is_no_model(tmp_path, files):
    plymix.convert(files["sdxl"], tmp_path / "x.safetensors", shard="4MB")
    shards = sorted(tmp_path.glob("x-*.safetensors"))
    assert len(shards) > 1
    title = f"shard 1 of {len(shards)} of x.safetensors.index.json"
    assert plymix.inspect(shards[0]).title == title
    with pytest.raises(Refusal, match=f"is {title}; name that index, or the folder"):
        plymix.merge(shards[0], shards[0], tmp_path / "o.safetensors")
    plymix.convert(shards[0], tmp_path / "o.safetensors", dtype="fp16")  # by key
    assert load(tmp_path / "o.safetensors")[0].keys() == load(shards[0])[0].keys()
    one = shards[0].rename(tmp_path / "y-00001-of-00001.safetensors")
    assert "shard" not in plymix.inspect(one).title


def test_a_folder_of_parts_is_no_single_file(tmp_path, folders):
    parts = shutil.copytree(folders["sdxl"], tmp_path / "parts")
    shutil.rmtree(parts / "unet")
    with pytest.raises(Refusal, match=r"one file, and parts is a folder of components.*COMPONENT"):
        plymix.convert(parts, tmp_path / "o.safetensors")
    plymix.convert(parts / "vae", tmp_path / "vae.safetensors")
    plymix.convert(parts, tmp_path / "o", dtype="bf16")
    assert load(tmp_path / "vae.safetensors")[0].keys() == {
        k for f in (tmp_path / "o" / "vae").glob("*.safetensors") for k in load(f)[0]
    }


def test_configs_are_for_folders(tmp_path):
    tiny.write(tmp_path / "a.safetensors", "sd1")
    with pytest.raises(Refusal, match="--configs is for diffusers folders, and o"):
        plymix.convert(
            tmp_path / "a.safetensors", tmp_path / "o.safetensors", configs=str(tmp_path)
        )


def test_a_pipeline_is_no_component_of_another(tmp_path):
    tiny.write(tmp_path / "a.safetensors", "sd1")
    plymix.convert(tmp_path / "a.safetensors", tmp_path / "model")
    before = {p: p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()}
    with pytest.raises(Refusal, match="would be a component of the pipeline model"):
        plymix.convert(tmp_path / "a.safetensors", tmp_path / "model" / "unet", force=True)
    assert before == {p: p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()}
