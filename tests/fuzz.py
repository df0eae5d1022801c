"""Every parser against damaged and hostile input: `make fuzz`, or `python tests/fuzz.py -h`.

A case is a valid file with a few things changed: bytes, lengths, numbers, pieces of other files.
Whatever it is then, reading it gives a result or a PlymixError, within seconds of the processor's
time and without memory beyond the size class of the file. `test_fuzz.py` runs a short version.
"""

import argparse
import contextlib
import json
import shutil
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import plymix
from plymix import archs, plan, urls, weights
from plymix import recipe as recipes
from plymix.archs import own
from plymix.errors import LONGEST, PlymixError
from plymix.formats import open_model, unpickle
from plymix.importers import import_recipe
from small import draw, recipe, save
from test_importers import a1111, comfy

SECONDS = 5.0
"""Processor time of one case at most, tracing included."""

MEMORY = 24 << 20
"""Bytes that any case may take; beyond that, `PER_BYTE` for each byte of its files."""

PER_BYTE = 100

READ = 1 << 16
"""Tensors up to this size are read."""

NUMBERS = [
    0,
    1,
    7,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 63,
    (1 << 64) - 1,
]
WORDS = [
    b"null", b"true", b"-1", b"1e999", b"NaN", b"0.5", b'""', b"[]", b"{}", b"[[[[", b'{"a":' * 9,
    b"\\u0000", b"\xff\xfe", b"\x00", b"\n", b",", b":", b'"', b"=", b"-", b"../x", b"a" * 300,
    b"18446744073709551616", b"9" * 60, b"[" * 2000, b"\xe2\x80\xae",
    b"[" * 150 + b"]" * 150, b"[" * 400 + b"]" * 400,
]  # fmt: skip

NAMES = (
    "safetensors", "torch", "gguf", "shards", "diffusers", "pickle", "recipe-toml", "recipe-json",
    "import", "presets", "weights", "rules", "architecture", "address",
)  # fmt: skip
"""The parsers, as `targets` has them."""

Files = dict[str, bytes]


class Target(NamedTuple):
    """A parser: valid files for it, and what is done with a folder of such files."""

    seeds: list[Files]
    run: Callable[[Path], object]


class Hang(BaseException):
    """A case that took too long."""


# --- cases --------------------------------------------------------------------------------------


@st.composite
def changed(pick, data, others):
    """`data` with a few things changed; `others` are where pieces may come from."""
    for _ in range(pick(st.integers(1, 4))):
        at = pick(st.integers(0, len(data)))
        end = min(len(data), at + pick(st.sampled_from([0, 1, 2, 4, 8, 60, 1000])))
        what = pick(st.sampled_from(["bytes", "number", "word", "cut", "end", "twice", "other"]))
        piece = b""
        if what == "bytes":
            piece = pick(st.binary(min_size=1, max_size=8))
        elif what == "number":
            number, size = pick(st.sampled_from(NUMBERS)), pick(st.sampled_from([1, 2, 4, 8]))
            piece = (number % (1 << 8 * size)).to_bytes(size, "little")
            end = at + size
        elif what == "word":
            piece = pick(st.sampled_from(WORDS))
        elif what == "end":
            end = len(data)
        elif what == "twice":
            piece = data[at:end] * pick(st.integers(2, 3))
        elif what == "other":
            other = pick(st.sampled_from(others))
            start = pick(st.integers(0, len(other)))
            piece = other[start : start + pick(st.sampled_from([4, 40, 400]))]
        data = data[:at] + piece + data[end:]
    return data


@st.composite
def cases(pick, seeds):
    """One of the seeds with one of its files changed."""
    files = dict(pick(st.sampled_from(seeds)))
    name = pick(st.sampled_from(sorted(files)))
    others = [content for each in seeds for content in each.values()]
    return files | {name: pick(changed(files[name], others))}


@contextlib.contextmanager
def bounded(nbytes):
    """Fails for a block that takes too long or too much memory for `nbytes` of input."""

    def expired(*_):
        raise Hang(f"more than {SECONDS} s of processor time")

    timed = hasattr(signal, "ITIMER_PROF")
    kept = signal.signal(signal.SIGPROF, expired) if timed else None
    tracemalloc.start()
    try:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, kept)
        tracemalloc.stop()
    most = MEMORY + PER_BYTE * nbytes
    assert peak <= most, f"{peak:,} bytes of memory for {nbytes:,} of input (limit {most:,})"


def attempt(target, files, folder):
    """Run one case: a result or a PlymixError of one line, in time, in little memory."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with bounded(sum(map(len, files.values()))):
        try:
            target.run(folder)
        except PlymixError as e:
            told = str(e)
        else:
            told = ""
    assert len(told) <= LONGEST


# --- what is done with a file -------------------------------------------------------------------


def examine(path):
    """Report on a model, plan a merge with it, and read its small tensors."""
    plymix.inspect(path).to_dict()
    with open_model(path) as source:
        for info in list(source.tensors.values())[:50]:
            if info.nbytes <= READ:
                assert len(source.read(info)) == info.nbytes
    with plan.build(recipe({"a": path, "b": path})) as planned:
        planned.layout(Path("o.safetensors"), {})
        planned.memory(2)


def models(name):
    return lambda folder: examine(folder / name)


def text_of(folder):
    return (folder / "x").read_bytes().decode("utf-8", "replace")


def weigh(folder):
    """A weight as people write it, as block weight lists and LBW lines."""
    said = weights.parse(text_of(folder), field="alpha")
    weights.resolve(said, archs.load("sd1").blocks, arch_title="SD1", field="alpha")
    weights.to_json(said)


def rules(folder):
    found = weights.parse_rules(text_of(folder).split("\n"))
    weights.apply_rules(found, "IN05", "model.attn2.to_q.weight", 0.5, ("IN05", "OUT03"))


def from_text(read, write):
    def run(folder):
        found = read(text_of(folder))
        assert read(write(found)) == found

    return run


def pickles(folder):
    path = folder / "x"
    with open(path, "rb") as file:
        found = unpickle.load(file, "x", path.stat().st_size)
    with contextlib.suppress(PlymixError):
        unpickle.find_state_dict(found.value, "x")


def addresses(folder):
    shown = urls.public(text_of(folder))
    assert urls.public(shown) == shown
    urls.name(shown)
    if urls.is_url(shown):
        urls.full(shown)


# --- valid files --------------------------------------------------------------------------------


def targets(folder):
    """Every parser by name. Seeds are made in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "a.weight": draw("F16", (4, 6)),
        "a.bias": draw("F32", (4,)),
        "ids": ("I64", np.arange(5).reshape(1, 5)),
        "v_pred": ("F32", np.zeros(0, np.float32)),
    }
    said = {"format": "pt", "modelspec.title": "x", **a1111()}
    tensors = save(folder / "m.safetensors", plain, said)
    merged = {}
    for ending in ("safetensors", "ckpt", "gguf"):
        out = folder / f"o.{ending}"
        plymix.merge(recipe({"a": tensors, "b": tensors}), out=out, force=True)
        merged[ending] = out.read_bytes()
    text = recipes.to_toml(
        recipe({"a": "a.ckpt", "b": "b.ckpt"}, {"base": 0.3, "blocks": "GRAD_V"})
    )
    shards, pipeline = sharded(tensors.read_bytes()), diffusers(folder)
    graph = json.dumps({"prompt": json.dumps(comfy())}).encode()
    return {
        "safetensors": Target(
            [{"m": tensors.read_bytes()}, {"m": merged["safetensors"]}, {"m": packed(folder)}],
            models("m"),
        ),
        "torch": Target([{"m": merged["ckpt"]}, *({"m": f} for f in torch_files())], models("m")),
        "gguf": Target([{"m": merged["gguf"]}, {"m": gguf_file()}], models("m")),
        "shards": Target([shards], models("m.safetensors.index.json")),
        "diffusers": Target([pipeline], models("")),
        "pickle": Target([{"x": f} for f in pickled()], pickles),
        "recipe-toml": Target(
            [{"x": text.encode()}], from_text(recipes.from_toml, recipes.to_toml)
        ),
        "recipe-json": Target(
            [{"x": recipes.to_json(recipes.from_toml(text)).encode()}],
            from_text(recipes.from_json, recipes.to_json),
        ),
        "import": Target(
            [{"x": json.dumps(a1111()).encode()}, {"x": graph}, *({"x": t} for t in histories())],
            lambda folder: import_recipe(folder / "x"),
        ),
        "presets": Target(
            [
                {"x": b"MINE\t" + b"0.5," * 24 + b"1\n"},
                {"x": b"preset_name\tpreset_weights\nR\t" + b"R," * 25 + b"R\n"},
            ],
            lambda folder: weights.load_preset_file(folder / "x"),
        ),
        "weights": Target([{"x": t} for t in WEIGHTS], weigh),
        "rules": Target([{"x": b"IN05-OUT03:attn2:0.3\nNOT IN05:attn1 attn2:0.5"}], rules),
        "architecture": Target(
            [{"x": p.read_bytes()} for p in sorted(ARCHS.glob("sd*.toml"))],
            lambda folder: own.architecture(own.read(folder / "x")),
        ),
        "address": Target([{"x": t} for t in ADDRESSES], addresses),
    }


ARCHS = Path(plymix.__file__).parent / "archs" / "data"
WEIGHTS = [
    b"0.5",
    b"GRAD_V",
    b"0.5," * 25 + b"1",
    b'{ base = 0.3, blocks = { IN00 = 0.1, "IN05-OUT03" = 0.5 } }',
    b'{ base = 0, blocks = { curve = "cubic", points = [[0, 1], [1, 0]] } }',
]
ADDRESSES = [
    b"https://me:pw@host:8443/a/b.safetensors?type=Model&token=x#y",
    b"hf://owner/repo@v1/dir/file.safetensors", b"http:\\\\host\\a", b"https://[::1]:80/a%20b",
]  # fmt: skip


def packed(folder):
    """A file with scaled fp8 and a 4-bit weight."""
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [4, 6]}).encode()
    tensors = {
        "x.weight": ("F8_E4M3", np.ones((4, 6), np.uint8)),
        "x.weight_scale": ("F32", np.ones((4, 1), np.float32)),
        "x.comfy_quant": ("U8", np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)),
        "y.weight": ("U8", np.ones((12, 1), np.uint8)),
        "y.weight.absmax": ("F32", np.ones(1, np.float32)),
        "y.weight.quant_map": ("F32", np.ones(16, np.float32)),
        "y.weight.quant_state.bitsandbytes__nf4": ("U8", np.frombuffer(state, np.uint8)),
        "scaled_fp8": ("F32", np.zeros(1, np.float32)),
    }
    return save(folder / "packed.safetensors", tensors).read_bytes()


def gguf_file():
    """A file with a plain and a packed tensor and every kind of metadata value."""

    def text(s):
        return struct.pack("<Q", len(s)) + s

    values = text(b"general.architecture") + struct.pack("<I", 8) + text(b"sd1")
    values += text(b"n") + struct.pack("<II", 4, 7)
    values += text(b"list") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b")
    values += text(b"comfy.gguf.orig_shape.q") + struct.pack("<IIQ2i", 9, 5, 2, 8, 8)
    infos = text(b"w") + struct.pack("<I2QIQ", 2, 4, 2, 0, 0)
    infos += text(b"q") + struct.pack("<I2QIQ", 2, 32, 2, 8, 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 4) + values + infos
    return head + bytes(-len(head) % 32) + bytes(32) + bytes(68)


def torch_files():
    """A zip and a legacy file by torch, where it is installed."""
    with contextlib.suppress(ImportError):
        import io

        import torch

        state = {"a": torch.ones(3, 4).t(), "b": torch.arange(5), "n": {"c": torch.ones(2)}}
        for new in (True, False):
            out = io.BytesIO()
            torch.save({"state_dict": state, "epoch": 3}, out, _use_new_zipfile_serialization=new)
            yield out.getvalue()


def pickled():
    import collections
    import pickle

    plain = {"a": [1, 2.5, None, True, "x"], "b": (1, {2: b"y"}), "c": {3}}
    for protocol in (2, 3, 4):
        yield pickle.dumps(plain, protocol)
        yield pickle.dumps(collections.OrderedDict(plain), protocol)
    yield (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQK\x00K\x03K\x04\x86K"
        b"\x04K\x01\x86\x89ccollections\nOrderedDict\n)RtRs."
    )


def sharded(content):
    names = ("a.weight", "a.bias", "ids", "v_pred")
    said = {"metadata": {"total_size": 104}, "weight_map": dict.fromkeys(names, "s.safetensors")}
    return {"m.safetensors.index.json": json.dumps(said).encode(), "s.safetensors": content}


def diffusers(folder):
    weights_of = {
        name: save(folder / "part.safetensors", {"conv_in.weight": draw("F16", shape)}).read_bytes()
        for name, shape in (("unet", (4, 4, 3, 3)), ("vae", (4, 3, 3, 3)))
    }
    index = {"_class_name": "P", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}
    index["scheduler"] = ["diffusers", "S"]
    files = {"model_index.json": json.dumps(index).encode()}
    for name, content in weights_of.items():
        files[f"{name}/config.json"] = b'{"_class_name": "U"}'
        files[f"{name}/diffusion_pytorch_model.safetensors"] = content
    files["scheduler/scheduler_config.json"] = b'{"prediction_type": "v_prediction"}'
    return files


def histories():
    """What supermerger, MBW GUI and model-mixer keep of a merge."""
    ratios = ",".join(["0.5"] * 25)
    yield history({"Name": "x", "Weights alpha": ratios, "Weights beta": "", "Model A": "a.ckpt",
                   "Model B": "b.ckpt", "Model C": "", "alpha": "0.4", "beta": "0",
                   "Mode": "Weight sum:A*(1-alpha)+B*alpha", "use MBW": "True"}, ",")  # fmt: skip
    yield history({"model_A": "a.ckpt [a1a1a1a1]", "model_B": "b.ckpt", "model_O": "o.safetensors",
                   "base_alpha": "0.5", "weight_name": "X", "weight_values": ratios},
                  "\t")  # fmt: skip
    yield b"a cat\nSteps: 20, ModelMixer model a: a.ckpt, ModelMixer base model: sd.ckpt," + (
        b" ModelMixer model b: b.ckpt, ModelMixer mode b: Sum, ModelMixer alpha b: 0.3"
    )


def history(row, delimiter):
    """A table of one row, with its titles."""
    quoted = (f'"{value}"' for value in row.values())
    return f"{delimiter.join(row)}\n{delimiter.join(quoted)}\n".encode()


# --- running ------------------------------------------------------------------------------------


def fuzz(target, folder, examples, number=None):
    """So many cases of a target; with `number`, others than without."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(target.seeds))
    def run(files):
        attempt(target, files, folder)

    (seed(number)(run) if number is not None else run)()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120, help="how long (default: 120)")
    parser.add_argument("--target", help="only this parser")
    parser.add_argument("--seed", type=int, default=0, help="where to begin")
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        known = targets(Path(folder) / "seeds")
        if asked.target and asked.target not in known:
            parser.error(f"targets are {', '.join(known)}")
        number, done = asked.seed, 0
        while time.monotonic() - began < asked.seconds:
            for name in [asked.target] if asked.target else known:
                if time.monotonic() - began >= asked.seconds:
                    break
                print(f"\r{name:<14} seed {number}, {done:,} cases", end="", file=sys.stderr)
                fuzz(known[name], Path(folder) / "case", 50, number)
                done += 50
            number += 1
    print(f"\n{done:,} cases in {time.monotonic() - began:.0f} s: nothing found")


if __name__ == "__main__":
    main()
