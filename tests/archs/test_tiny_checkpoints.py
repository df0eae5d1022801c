"""The small checkpoints are what the tests take them for: checked with other people's code."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import tiny

DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("model", ["sd1", "sd1-inpainting", "sd1-pix2pix", "sd2", "sdxl"])
def test_files_have_true_names_and_are_small(tmp_path, model):
    path = tiny.write(tmp_path / "a.safetensors", model, markers=("v_pred",))
    true = tiny.golden(model.split("-")[0])
    assert path.stat().st_size < (8e6 if model == "sdxl" else 4e6)
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {*true, "v_pred"}
        for key, (_, shape, _, _) in true.items():
            assert len(file.get_slice(key).get_shape()) == len(shape)
        ids = [k for k in true if k.endswith("position_ids")]
        for key in ids:
            assert file.get_tensor(key).dtype == np.int64
            assert file.get_tensor(key).tolist() == [list(range(77))]
    assert bool(ids) == (model != "sd2")


def test_files_are_repeatable_and_seeds_differ(tmp_path):
    one, two, other = (tiny.write(tmp_path / n, seed=s) for n, s in [("a", 1), ("b", 1), ("c", 2)])
    assert one.read_bytes() == two.read_bytes()
    a, c = (tiny.read_safetensors(p)[1] for p in (one, other))
    same = {k for k in a if np.array_equal(a[k], c[k])}
    assert all(k.endswith("position_ids") for k in same)


def test_values_depend_on_seed_and_key_alone():
    plain, more = tiny.header("sd1"), tiny.header("sd1", ema=True)
    few = {k: more[k] for k in list(more)[::100]}
    all_values = tiny.state(more, 3)
    for key, values in tiny.state(few, 3).items():
        np.testing.assert_array_equal(values, all_values[key])
    assert len(more) == len(plain) + 686 + 2


def test_old_novelai_names_lack_text_model():
    keys, nai = tiny.header("sd1"), tiny.header("sd1", nai=True)
    assert len(nai) == len(keys)
    assert sum(".text_model." in k for k in keys) == 197
    assert not any(".text_model." in k for k in nai)
    assert "cond_stage_model.transformer.embeddings.position_ids" in nai


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_rounds_as_ml_dtypes_does(dtype):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(4000) * 10.0 ** rng.uniform(-4, 2, 4000)).astype(np.float32)
    values = np.concatenate([values, [0.0, -0.0]]).astype(np.float32)
    codes = tiny.encode(values, dtype)
    theirs = values.astype(DTYPES[dtype])
    finite = np.abs(values) < 448  # ours stays at the largest value where theirs gives NaN
    np.testing.assert_array_equal(codes[finite], theirs.view(codes.dtype)[finite])
    np.testing.assert_array_equal(tiny.decode(codes, dtype)[finite], theirs.astype("f4")[finite])


SCRIPT = tiny.GOLDEN.parents[2] / "scripts" / "tiny_checkpoints.py"


def test_command_line_names_the_architectures(tmp_path):
    out = tmp_path / "out"
    ran = subprocess.run(
        [sys.executable, SCRIPT, out, "--arch", "nope"], capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "nope; there are anima, " in ran.stderr
    assert not out.exists()


def test_command_line_writes_a_pair(tmp_path):
    subprocess.run([sys.executable, SCRIPT, tmp_path, "--arch", "sdxl", "--pair"], check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "sdxl-a.safetensors",
        "sdxl-b.safetensors",
    ]
