"""Sums by torch give the bytes of the CPU kernels; here torch computes on the CPU too.

Whether a GPU agrees is asked where there is one: PLYMIX_TEST_DEVICE=cuda runs the same tests on it.
"""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from plymix import cli, gpu, kernels
from plymix.errors import Refusal
from tiny import encode

torch = pytest.importorskip("torch")

DEVICE = os.environ.get("PLYMIX_TEST_DEVICE", "cpu")
FLOATS = tuple(kernels.NUMPY)
COEFFICIENTS = ((1.0,), (0.7,), (0.7, 0.3), (0.5, 0.5), (1.0, -1.0), (0.25, -1.5, 0.3, 1.1))


@pytest.fixture(autouse=True)
def numpy_kernels(monkeypatch):
    """numpy's kernels are the reference; they are what computes NaN blocks again, too."""
    monkeypatch.setattr(kernels, "best_backend", kernels.Backend)


def on_cpu(terms, buffers, out):
    """The sum in blocks, as the engine asks for it."""
    n = len(buffers[0]) // np.dtype(kernels.NUMPY[terms[0][1]]).itemsize
    result = np.empty(n, kernels.NUMPY[out])
    views = [b.view(kernels.NUMPY[d]) for b, (_, d) in zip(buffers, terms, strict=True)]
    total = kernels.Sum(terms, out, kernels.Backend())
    with np.errstate(all="ignore"):
        for at in range(0, n, kernels.BLOCK):
            part = slice(at, min(n, at + kernels.BLOCK))
            total(part.stop - at, [v[part] for v in views], result[part])
    return result.view(np.uint8)


def on_device(terms, buffers, out):
    inputs = [(c, dtype, buffer) for (c, dtype), buffer in zip(terms, buffers, strict=True)]
    with np.errstate(all="ignore"):
        return gpu.linear_sum(inputs, out, DEVICE)


def ordinary(dtype, n, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * np.exp2(rng.integers(-12, 3, n))
    return stored(x, dtype)


def stored(x, dtype):
    """Values as bytes of `dtype`."""
    return (x if dtype == "F64" else encode(x, dtype)).view(np.uint8)


def any_bits(dtype, n, seed):
    """Every kind of number: subnormal, huge, infinite, NaN with any payload."""
    size = np.dtype(kernels.NUMPY[dtype]).itemsize
    return np.random.default_rng(seed).integers(0, 256, n * size).astype(np.uint8)


@pytest.mark.parametrize("values", [ordinary, any_bits])
@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
def test_same_bytes(coefficients, out, values):
    """Every output dtype, every mixture of two input dtypes, one to four terms."""
    for pair in itertools.product(FLOATS, repeat=2):
        dtypes = list(itertools.islice(itertools.cycle(pair), len(coefficients)))
        terms = list(zip(coefficients, dtypes, strict=True))
        buffers = [values(d, 1537, seed) for seed, d in enumerate(dtypes)]
        want, got = on_cpu(terms, buffers, out), on_device(terms, buffers, out)
        assert np.array_equal(want, got), terms


def test_more_than_one_block_and_nan_in_one():
    n = kernels.BLOCK * 2 + 77
    terms = [(0.7, "BF16"), (0.3, "BF16")]
    buffers = [ordinary("BF16", n, seed) for seed in (1, 2)]
    buffers[1].view(np.uint16)[kernels.BLOCK + 5] = 0xFFA5  # a NaN with sign and payload
    got = on_device(terms, buffers, "BF16")
    assert np.array_equal(on_cpu(terms, buffers, "BF16"), got)
    values = (got.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert np.flatnonzero(np.isnan(values)).tolist() == [kernels.BLOCK + 5]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_terms_that_cancel(dtype):
    """0.7*a + 0.3*b with b next to -7/3*a: what is left is what float32 cannot hold."""
    a = stored(np.arange(1, 20_001, dtype=np.float32) % 41 * 3, dtype)
    b = stored(kernels.float32(a, dtype) * np.float32(-7 / 3), dtype)
    terms = [(0.7, dtype), (0.3, dtype)]
    got = on_device(terms, [a, b], dtype)
    assert np.array_equal(on_cpu(terms, [a, b], dtype), got)
    assert np.abs(kernels.float32(got, dtype)).max() < 0.5


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_against_float64_rounded_once(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = np.float16 if dtype == "F16" else ml_dtypes.bfloat16
    a, b = (ordinary(dtype, 50_000, seed) for seed in (4, 5))
    c = (0.6180339887498949, 0.3819660112501051)
    exact = c[0] * a.view(kind).astype(np.float64) + c[1] * b.view(kind).astype(np.float64)
    got = on_device([(c[0], dtype), (c[1], dtype)], [a, b], dtype).view(np.uint16)
    differ = got != exact.astype(kind).view(np.uint16)
    assert differ.mean() < 1e-3


def test_e4m3_saturates_and_keeps_nan():
    x = np.array([1e6, -1e6, 464.0, 448.0, np.nan], np.float32)
    got = on_device([(1.0, "F32")], [x.view(np.uint8)], "F8_E4M3")
    assert got.tolist() == [0x7E, 0xFE, 0x7E, 0x7E, 0x7F]


@settings(deadline=None, max_examples=60)
@given(
    terms=st.lists(
        st.tuples(st.floats(-4, 4, width=32).filter(bool), st.sampled_from(FLOATS)), min_size=1,
        max_size=4,
    ),
    out=st.sampled_from(FLOATS),
    n=st.integers(0, 40),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_same_bytes_for_any_sum(terms, out, n, seed):
    buffers = [any_bits(dtype, n, seed + i) for i, (_, dtype) in enumerate(terms)]
    assert np.array_equal(on_cpu(terms, buffers, out), on_device(terms, buffers, out))


def test_read_only_buffers():
    data = ordinary("F16", 10, 6).tobytes()
    assert on_device([(1.0, "F16")], [data], "F16").tobytes() == data


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_to_device_gives_float32(dtype):
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    tensor = gpu.to_device(array, DEVICE)
    assert tensor.dtype == torch.float32
    assert tensor.cpu().tolist() == array.tolist()


# --- what can be used ---------------------------------------------------------------------------


def test_cpu_needs_nothing():
    gpu.require("cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps", "CUDA", ""])
def test_unknown_device(device):
    with pytest.raises(Refusal, match="use cpu, cuda"):
        gpu.require(device)


def test_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refusal, match=r"no CUDA device.*plymix\[torch\].*CUDA build"):
        gpu.require("cuda")


def test_no_such_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu.require("cuda")
    gpu.require("cuda:1")
    with pytest.raises(Refusal, match="cuda:0 to cuda:1"):
        gpu.require("cuda:2")


def test_no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # `import torch` raises ImportError
    with pytest.raises(Refusal, match=r'needs torch.*pip install "plymix\[torch\]"'):
        gpu.require("cuda")


def test_importing_the_module_does_not_import_torch():
    code = "import sys, plymix.gpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "a.safetensors", "b.safetensors", "-o", "out.ckpt"),
        ("merge", "a.safetensors", "b.safetensors", "--dry-run"),
        ("explain", "a.safetensors", "b.safetensors"),
        ("run", "r.toml", "--dry-run"),
    ],
)
def test_what_is_shown_without_cuda_is_refused_too(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("ab"):
        tiny.write(tmp_path / f"{name}.safetensors", "sd1", seed=i)
    (tmp_path / "r.toml").write_text(
        'models = {a = "a.safetensors", b = "b.safetensors"}\n'
        '[steps.mix]\nmethod = "weighted_sum"\na = "a"\nb = "b"\n'
    )
    assert cli.run([*words, "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
