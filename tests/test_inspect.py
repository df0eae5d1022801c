"""Reports on files whose contents are known: counts from papers, hashes by hand."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import tiny
from plymix.errors import FormatError, Refusal
from plymix.inspection import formulas, inspect
from plymix.recipe import METADATA_KEY, from_toml, to_json

UNET = "model.diffusion_model."


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))


def sparse(path, header, metadata=None):
    """A safetensors file of true size, all holes: nothing but the header is on the disk."""
    table = {"__metadata__": metadata} if metadata else {}
    at = 0
    for key, (dtype, shape) in header.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(tiny.NUMPY[dtype]).itemsize
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


# --- models -------------------------------------------------------------------------------------

# Parameters of the published models, as their papers and model cards count them.
SD1 = {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}
SDXL = {
    "unet": 2_567_463_684,
    "text_encoder": 123_060_480,
    "text_encoder_2": 694_659_841,  # 694,659,840 and the logit scale
    "vae": 83_653_863,
}


@pytest.mark.parametrize(("arch", "counts"), [("sd1", SD1), ("sdxl", SDXL)])
def test_parameters_of_real_models(tmp_path, arch, counts):
    path = sparse(tmp_path / "real.safetensors", tiny.header(arch, full_width=True))
    report = inspect(path)
    found = {c.name: c.parameters for c in report.components if c.parameters}
    assert found == counts
    assert report.total.parameters == sum(counts.values())
    assert report.size == path.stat().st_size


def test_components_and_blocks_add_up(tmp_path):
    path = tiny.write(tmp_path / "x.safetensors", "sdxl", ema=True)
    report = inspect(path)
    assert (report.title, report.architecture, report.kind) == (
        "SDXL checkpoint",
        "sdxl",
        "checkpoint",
    )
    for groups in (report.components, report.blocks):
        assert sum(g.tensors for g in groups) == report.total.tensors
        assert sum(g.nbytes for g in groups) == report.total.nbytes
    names = [b.name for b in report.blocks]
    assert names[:19] == [f"IN{i:02}" for i in range(9)] + ["M00"] + [
        f"OUT{i:02}" for i in range(9)
    ]
    assert set(names[19:]) == {"BASE", "VAE", "EMA", "BUFFER"}
    golden = [row for row in tiny.golden("sdxl").values() if row[3] == "IN04"]
    assert next(b.tensors for b in report.blocks if b.name == "IN04") == len(golden)


def test_ema_and_dtypes(tmp_path):
    header = tiny.header("sd1", dtype="F32", ema=True)
    path = tiny.write_safetensors(tmp_path / "x.safetensors", header, tiny.state(header))
    report = inspect(path)
    copies = [key for key in header if key.startswith("model_ema.diffusion")]
    weights = report.ema.tensors - sum(
        k in header for k in ("model_ema.decay", "model_ema.num_updates")
    )
    assert weights == len(copies) == 686
    unet = next(c for c in report.components if c.name == "unet")
    assert report.ema.parameters == unet.parameters
    counted = {d: sum(e[0] == d for e in header.values()) for d in ("F32", "I64", "I32")}
    assert report.total.dtypes == counted


@pytest.mark.parametrize(
    ("arch", "options", "metadata", "want"),
    [
        ("sd1", {}, {}, ("", "unknown")),
        ("sdxl", {}, {}, ("epsilon", "convention")),
        ("sdxl", {"markers": ("v_pred", "ztsnr")}, {}, ("v", "marker tensor")),
        ("sdxl", {}, {"modelspec.prediction_type": "v"}, ("v", "modelspec")),
        ("sd2", {}, {"modelspec.predict_key": "epsilon"}, ("epsilon", "modelspec")),
        ("sdxl", {"markers": ("ztsnr",)}, {}, ("epsilon", "convention")),
    ],
)
def test_prediction_and_who_says_so(tmp_path, arch, options, metadata, want):
    header = tiny.header(arch, **options)
    path = tiny.write_safetensors(tmp_path / "x.safetensors", header, tiny.state(header), metadata)
    report = inspect(path)
    assert report.to_dict()["prediction"] == dict(zip(("kind", "told"), want, strict=True))
    assert set(report.markers) == set(options.get("markers", ()))


def test_unknown_keys_of_a_known_model(tmp_path):
    header = tiny.header("sd1") | {f"stranger.{i}": ("F16", (2,)) for i in range(12)}
    path = tiny.write_safetensors(tmp_path / "x.safetensors", header, tiny.state(header))
    report = inspect(path)
    assert report.unknown.count == 12
    assert report.unknown.keys == tuple(f"stranger.{i}" for i in range(10))
    assert [c.tensors for c in report.components if c.title == "unknown keys"] == [12]


# --- other kinds of file ------------------------------------------------------------------------


def small(path, names, dtype="F16"):
    header = {name: (dtype, shape) for name, shape in names.items()}
    return tiny.write_safetensors(path, header, tiny.state(header))


def test_a_lora(tmp_path):
    unit = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    names = {
        f"{unit}.lora_down.weight": (4, 768),
        f"{unit}.lora_up.weight": (320, 4),
        f"{unit}.alpha": (),
    }
    report = inspect(small(tmp_path / "lora.safetensors", names))
    assert (report.kind, report.architecture) == ("lora", "sd1")
    assert report.total.parameters == 4 * 768 + 320 * 4 + 1
    assert [c.name for c in report.components] == ["lora"]
    assert report.blocks == ()
    assert (report.unknown.count, report.prediction.kind) == (0, "")


def test_a_vae(tmp_path):
    header = tiny.header("sd1")
    vae = {
        k.removeprefix("first_stage_model."): e[1] for k, e in header.items() if "first_stage" in k
    }
    report = inspect(small(tmp_path / "vae.safetensors", vae))
    assert report.kind == "vae"
    assert "VAE" in report.title


def test_an_unknown_file(tmp_path):
    report = inspect(small(tmp_path / "x.safetensors", {"one": (2,), "two": ()}))
    assert (report.kind, report.architecture, report.unknown.keys) == (
        "unknown",
        "",
        ("one", "two"),
    )


def test_an_empty_model(tmp_path):
    assert inspect(small(tmp_path / "x.safetensors", {})).total.tensors == 0


def test_a_checkpoint_with_views(tmp_path):
    torch = pytest.importorskip("torch")
    one = torch.ones(4, 3)
    state = {"a": one, "b": one, "turned": torch.ones(5, 2).T, "none": torch.ones(0)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.ckpt")
    report = inspect(tmp_path / "x.ckpt", hashes=True)
    assert (report.root, report.strided, report.tied) == ("state_dict", 1, 2)
    assert report.format != "safetensors"
    assert report.hashes.autov3 is None
    assert report.hashes.sshs_model_hash is None


def test_no_model(tmp_path):
    with pytest.raises(Refusal, match="does not exist"):
        inspect(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"<html>")
    with pytest.raises(FormatError, match="web page"):
        inspect(tmp_path / "x.safetensors")


# --- metadata -----------------------------------------------------------------------------------


def with_metadata(path, metadata):
    return tiny.write_safetensors(path, {"w": ("F16", (2,))}, {"w": np.zeros(2)}, metadata)


def test_metadata_is_whole_in_json_and_one_line_for_people(tmp_path):
    text = "line\n\x1b[31m" + "x" * 500
    report = inspect(with_metadata(tmp_path / "x.safetensors", {"note": text, "k\n": "short"}))
    assert json.loads(json.dumps(report.to_dict()))["metadata"] == {"note": text, "k\n": "short"}
    brief = report.brief_metadata
    assert len(brief["note"]) == 100
    assert brief["note"].endswith("...")
    assert brief["k "] == "short"
    assert all(c.isprintable() for line in (*brief, *brief.values()) for c in line)


RECIPE = """
[models]
anime = "models/anime-v3.safetensors"
photo = "photo.ckpt"
[steps.mix]
method = "weighted_sum"
a = "anime"
b = "photo"
alpha = 0.25
[output]
dtype = "fp16"
"""


def test_its_own_recipe_as_formulas(tmp_path):
    recipe = from_toml(RECIPE)
    path = with_metadata(tmp_path / "x.safetensors", {METADATA_KEY: to_json(recipe)})
    lines = inspect(path).recipe
    assert lines == formulas(recipe)
    assert lines[0] == "mix = weighted_sum(anime-v3.safetensors, photo.ckpt, alpha=0.25)"
    assert lines[-1].startswith("output = mix")
    assert "dtype=fp16" in lines[-1]


def test_a_broken_recipe_is_a_note(tmp_path):
    report = inspect(with_metadata(tmp_path / "x.safetensors", {METADATA_KEY: "{"}))
    assert report.recipe == ()
    assert "recipe cannot be read" in report.notes[0]


def test_a_webui_recipe_in_words(tmp_path):
    first, second = "a" * 64, "b" * 64
    said = {
        "type": "webui", "primary_model_hash": first, "secondary_model_hash": second,
        "tertiary_model_hash": None, "interp_method": "Weighted sum", "multiplier": 0.3,
    }  # fmt: skip
    models = {first: {"name": "A.ckpt", "legacy_hash": "x"}, second: {"name": "B.ckpt"}}
    metadata = {"sd_merge_recipe": json.dumps(said), "sd_merge_models": json.dumps(models)}
    lines = inspect(with_metadata(tmp_path / "x.safetensors", metadata)).webui_recipe
    assert lines[0] == "Weighted sum of A.ckpt, B.ckpt, multiplier 0.3"
    assert lines[1:] == ("made from A.ckpt (aaaaaaaaaa)", "made from B.ckpt (bbbbbbbbbb)")


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "[" * 100_000, '{"a": 1}'])
def test_a_hostile_webui_recipe_does_no_harm(tmp_path, text):
    metadata = {"sd_merge_recipe": text, "sd_merge_models": text}
    inspect(with_metadata(tmp_path / "x.safetensors", metadata))


# --- hashes -------------------------------------------------------------------------------------


def sd_scripts_hashes(rows, metadata):
    """(sshs_model_hash, sshs_legacy_hash) as sd-scripts get them: of what the library saves."""
    own = {k: v for k, v in metadata.items() if k.startswith("ss_")}
    data = safetensors.numpy.save(rows, own or None)
    start = 8 + int.from_bytes(data[:8], "little")
    old = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    return hashlib.sha256(data[start:]).hexdigest(), old


@pytest.mark.parametrize("size", [10, 1 << 18, 1 << 19])
def test_hashes_that_sd_scripts_write(tmp_path, size):
    """The file's own metadata and order of tensors do not count for the old one."""
    rng = np.random.default_rng(size)
    rows = {
        "z.half": rng.standard_normal(size).astype(np.float16),
        "b.single": rng.standard_normal(size // 2).astype(np.float32),
        "a.half": rng.standard_normal((5, 7)).astype(np.float16),
        "n.whole": np.arange(11),
    }
    said = {"ss_epoch": "3", "ss_note": 'a "quote", ü and \n', "modelspec.title": "long " * 50}
    model_hash, legacy = sd_scripts_hashes(rows, said)
    dtypes = {"float16": "F16", "float32": "F32", "int64": "I64"}
    header = {key: (dtypes[x.dtype.name], x.shape) for key, x in rows.items()}
    path = tiny.write_safetensors(tmp_path / "m.safetensors", header, rows, said)
    assert inspect(path, hashes=True).hashes.sshs_legacy_hash == legacy
    safetensors.numpy.save_file(rows, tmp_path / "l.safetensors", said)
    found = inspect(tmp_path / "l.safetensors", hashes=True).hashes
    assert (found.sshs_model_hash, found.sshs_legacy_hash) == (model_hash, legacy)
    assert found.autov3 == model_hash[:12]


@pytest.mark.parametrize(
    ("tensors", "said"), [(("ztsnr",), {}), ((), {"ss_zero_terminal_snr": "True"})]
)
def test_zero_terminal_snr(tmp_path, tensors, said):
    header = tiny.header("sdxl", markers=tensors)
    path = tiny.write_safetensors(tmp_path / "m.safetensors", header, tiny.state(header), said)
    assert inspect(path).zero_terminal_snr
    assert not inspect(tiny.write(tmp_path / "n.safetensors", "sdxl")).zero_terminal_snr


def test_file_hashes_by_hand(tmp_path):
    """Against hashlib on the whole file in memory; AutoV1's window is cut short."""
    values = {"w": np.arange(600_000, dtype=np.float16)}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(values, path, {"title": "one"})
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    found = inspect(path, hashes=True).hashes
    assert found.sha256 == hashlib.sha256(raw).hexdigest()
    assert found.autov2 == found.sha256[:10]
    assert found.autov1 == hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    assert found.sshs_model_hash == hashlib.sha256(data).hexdigest()
    assert found.autov3 == found.sshs_model_hash[:12]
    assert inspect(path).hashes is None


def test_tensors_hash_as_documented(tmp_path):
    header = {"b": ("F16", (2, 3)), "a\t√": ("I64", ())}
    state = tiny.state(header)
    path = tiny.write_safetensors(tmp_path / "x.safetensors", header, state)
    digests = {key: hashlib.sha256(state[key].tobytes()).hexdigest() for key in state}
    lines = [
        f'["a\\t\\u221a","I64",[],"{digests["a	√"]}"]\n',
        f'["b","F16",[2,3],"{digests["b"]}"]\n',
    ]
    want = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert inspect(path, hashes=True).hashes.tensors == want


def test_tensors_hash_does_not_depend_on_layout(tmp_path):
    """Order, metadata, prefix, NovelAI's spelling and the torch format change other hashes only."""
    torch = pytest.importorskip("torch")
    header = tiny.header("sd1")
    state = tiny.state(header)

    def hashes(name, header, state, metadata=None):
        path = tiny.write_safetensors(tmp_path / f"{name}.safetensors", header, state, metadata)
        return inspect(path, hashes=True).hashes

    plain = hashes("plain", header, state)
    turned = hashes("turned", dict(reversed(header.items())), state, {"title": "x"})
    assert turned.tensors == plain.tensors
    assert len({plain.sha256, turned.sha256}) == 2
    assert len({plain.sshs_model_hash, turned.sshs_model_hash}) == 2
    nai = {k.replace(".transformer.text_model.", ".transformer."): v for k, v in header.items()}
    renamed = {new: state[old] for new, old in zip(nai, header, strict=True)}
    assert hashes("nai", nai, renamed).tensors == plain.tensors
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    key = UNET + "input_blocks.1.0.in_layers.2.weight"
    tensors[key] = tensors[key].transpose(0, 3).contiguous().transpose(0, 3)  # strided, same values
    torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")
    report = inspect(tmp_path / "x.ckpt", hashes=True)
    assert report.strided == 1
    assert report.hashes.tensors == plain.tensors


def test_tensors_hash_sees_every_change(tmp_path):
    header = {"a": ("F16", (2, 3)), "b": ("F16", (6,))}
    state = {"a": np.arange(6), "b": np.arange(6)}

    def found(header, state):
        path = tiny.write_safetensors(tmp_path / "x.safetensors", header, state)
        return inspect(path, hashes=True).hashes.tensors

    value = state | {"a": np.arange(1, 7)}
    all_of_them = [
        found(header, state),
        found(header, value),
        found(header | {"a": ("F16", (3, 2))}, state),
        found(header | {"a": ("BF16", (2, 3))}, state),
        found({"c": header["a"], "b": header["b"]}, {"c": state["a"], "b": state["b"]}),
    ]
    assert len(set(all_of_them)) == len(all_of_them)


# --- speed and imports --------------------------------------------------------------------------


def test_only_the_header_is_read(tmp_path, monkeypatch):
    """A 7 GB file, all holes: no read reaches its data, and neither numpy nor torch is loaded."""
    path = sparse(tmp_path / "sdxl.safetensors", tiny.header("sdxl", full_width=True))
    assert path.stat().st_size > 6.9e9
    code = (
        "import sys; from plymix.formats.base import Handle; read = Handle.read_at; far = []\n"
        "def spy(self, at, out): far.append(at + len(out)); read(self, at, out)\n"
        "Handle.read_at = spy\n"
        "from plymix.inspection import inspect; report = inspect(sys.argv[1])\n"
        "assert report.total.parameters > 3e9, report\n"
        "assert max(far) < 1_000_000, max(far)\n"
        "assert not {'numpy', 'torch', 'numkong'} & set(sys.modules), 'heavy imports'\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
