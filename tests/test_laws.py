"""The ten laws of plymix, each proved on finished files.

Direction on the command line is tested with the command line; here is what all of it stands on.
"""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import plymix
from plymix import kernels, plan
from plymix import recipe as recipes
from plymix.engine import files, work, worker
from plymix.errors import Cancelled, Failure, Refusal
from small import coded, data, deviation, draw, exact, load, merged, recipe, result_bytes, save
from tiny import golden, header, read_safetensors, state, write, write_safetensors

UNET = "model.diffusion_model."


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """Folder of two small SD1 checkpoints, a.safetensors and b.safetensors. Not to be written."""
    folder = tmp_path_factory.mktemp("sd")
    write(folder / "a.safetensors", "sd1", 1)
    write(folder / "b.safetensors", "sd1", 2)
    return folder


def merge(folder, out, alpha=0.3, **options):
    return plymix.merge(
        folder / "a.safetensors", folder / "b.safetensors", out, alpha=alpha, **options
    )


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != "cache")


# --- 1. Direction -------------------------------------------------------------------------------


class TestDirection:
    """alpha is the share of the second model."""

    @pytest.mark.parametrize(("alpha", "want"), [(0.25, 1.25), (0.75, 1.75), (0.0, 1.0)])
    def test_alpha_is_the_share_of_the_second(self, tmp_path, alpha, want):
        models = {"a": {"x": coded([1.0], "F32")}, "b": {"x": coded([2.0], "F32")}}
        assert merged(tmp_path, models, alpha)["x"][1] == [want]

    def test_in_every_block_and_in_the_formula(self, sd, tmp_path):
        result = merge(sd, tmp_path / "o.safetensors", {"base": 0.0, "blocks": {"M00": 0.25}})
        a, b, got = (
            load(p)[0]
            for p in (sd / "a.safetensors", sd / "b.safetensors", tmp_path / "o.safetensors")
        )
        for key, (_, _, _, block) in golden("sd1").items():
            alpha = 0.25 if block == "M00" else 0.0
            if got[key][0] == "F16":
                want = exact([1 - alpha, alpha], [a[key], b[key]])
                assert deviation(got[key], want, "F16")[1] <= 1, key
        assert "a.safetensors" in result.formula
        shown = plymix.explain(
            sd / "a.safetensors", sd / "b.safetensors", alpha={"blocks": {"M00": 0.25}}
        )
        middle = next(row for row in shown.blocks if row.block == "M00")
        assert middle.shares == {"a.safetensors": 0.75, "b.safetensors": 0.25}


# --- 2. End points ------------------------------------------------------------------------------

PATTERNS = {
    "F16": np.array([0x7E01, 0xFE55, 0x7D01, 0x8000, 0x0001, 0x83FF, 0x7C00, 0x3C00], "u2"),
    "BF16": np.array([0x7FC1, 0xFFA5, 0x7F81, 0x8000, 0x0001, 0x807F, 0x7F80, 0x3F80], "u2"),
    "F32": np.array([0x7FC00001, 0xFFA00005, 0x7F800001, 0x80000000, 1, 0x807FFFFF], "u4"),
    "F64": np.array([0x7FF8000000000001, 0xFFF4000000000005, 1 << 63, 1], "u8"),
    "F8_E4M3": np.arange(256, dtype="u1"),
    "F8_E5M2": np.arange(256, dtype="u1"),
}  # NaN payloads (quiet and signalling), -0.0, denormals, infinity


class TestEndPoints:
    """alpha 0 gives A's bytes, alpha 1 B's."""

    @pytest.mark.parametrize("dtype", PATTERNS)
    def test_every_bit_survives(self, tmp_path, dtype):
        bits = PATTERNS[dtype]
        views = {"F16": "f2", "F32": "f4", "F64": "f8"}
        a, b = bits.view(views.get(dtype, bits.dtype)), bits[::-1].copy()
        models = {"a": {"x": (dtype, a)}, "b": {"x": (dtype, b.view(a.dtype))}}
        for alpha, want in ((0.0, a), (1.0, b)):
            assert merged(tmp_path, models, alpha)["x"][1].tobytes() == want.tobytes()

    def test_whole_models(self, sd, tmp_path):
        for alpha, owner in ((0, "a"), (1, "b")):
            merge(sd, tmp_path / "o.safetensors", alpha, vae="blend", force=True)
            got, want = data(tmp_path / "o.safetensors"), data(sd / f"{owner}.safetensors")
            buffers = data(sd / "a.safetensors")
            for key, (_, _, _, block) in golden("sd1").items():
                assert got[key] == (buffers if block == "BUFFER" else want)[key], key

    def test_per_block(self, sd, tmp_path):
        alpha = {"base": 1.0, "default": 0.0, "blocks": {"IN03-IN05": 1.0, "OUT11": 0.5}}
        merge(sd, tmp_path / "o.safetensors", alpha)
        a, b, got = (
            data(p)
            for p in (sd / "a.safetensors", sd / "b.safetensors", tmp_path / "o.safetensors")
        )
        for key, (dtype, _, _, block) in golden("sd1").items():
            if block == "OUT11" or dtype == "I64":
                continue
            owner = b if block in ("BASE", "IN03", "IN04", "IN05") else a
            assert got[key] == owner[key], key


# --- 3. Precision -------------------------------------------------------------------------------


class TestPrecision:
    """float64 reference rounded once: 99.9 % equal, one unit in the last place at most."""

    @pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
    @pytest.mark.parametrize("alpha", [5 / 12, 0.3, 0.5833333333])
    def test_finished_files(self, tmp_path, dtype, alpha):
        rows = {f"{scale}": scale for scale in (1e-3, 0.02, 1.0, 30.0)}
        a, b = (
            {k: draw(dtype, (64, 257), seed, scale) for k, scale in rows.items()} for seed in (1, 2)
        )
        got = merged(tmp_path, {"a": a, "b": b}, alpha)
        for key in rows:
            want = exact([1 - alpha, alpha], [a[key], b[key]])
            noise = np.max(np.abs(want)) * 2.0 ** (-24 if dtype == "F32" else -50)
            differ, ulp = deviation(got[key], want, dtype, noise)
            assert differ <= (1e-3 if dtype != "F32" else 1)
            assert ulp <= 1

    @pytest.mark.parametrize("out", ["fp16", "bf16", "fp32"])
    def test_inputs_of_different_dtypes(self, tmp_path, out):
        kinds = ["F16", "F32", "BF16", "F8_E4M3", "F64"]
        files = []
        for i, dtype in enumerate(kinds):
            x = draw("F32" if dtype == "F64" else dtype, (5000,), i)
            if dtype == "F64":
                x = ("F64", x[1].astype("f8") * 1.0000001)
            files.append({"x": x})
        weights = [0.1, 0.3, 5 / 12, 0.2, -0.1]
        models = {
            f"m{i}": str(save(tmp_path / f"m{i}.safetensors", f)) for i, f in enumerate(files)
        }
        found = recipes.from_dict(
            {
                "models": models,
                "steps": {
                    "mix": {
                        "method": "n_average",
                        "models": list(models),
                        "weights": weights,
                        "normalize": False,
                    }
                },
                "output": {"arch": "any", "dtype": out},
            }
        )
        plymix.merge(found, out=tmp_path / "o.safetensors")
        dtype, got = load(tmp_path / "o.safetensors")[0]["x"]
        assert dtype == recipes.DTYPES[out]
        want = exact(weights, [f["x"] for f in files])
        differ, ulp = deviation((dtype, got), want, dtype)
        assert ulp <= 1
        assert differ <= (1e-3 if out != "fp32" else 1)

    @given(st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=10))
    @example([0.3, -0.2, 0.9, 1.2, 0.5, 0.25, 0.7, 0.1, 0.05, 1.5, 0.6])
    @settings(max_examples=15, deadline=None)
    def test_a_chain_is_rounded_once(self, tmp_path_factory, alphas):
        """((A + B) + C) + ... in one recipe equals the sum worked out by hand."""
        folder = tmp_path_factory.mktemp("chain")
        tensors = [draw("F16", (2000,), i) for i in range(len(alphas) + 1)]
        models = {
            f"m{i}": str(save(folder / f"m{i}.safetensors", {"x": t}))
            for i, t in enumerate(tensors)
        }
        steps, last, weights = {}, "m0", [1.0]
        for i, alpha in enumerate(alphas):
            steps[f"s{i}"] = {"method": "weighted_sum", "a": last, "b": f"m{i + 1}", "alpha": alpha}
            weights = [w * (1 - alpha) for w in weights] + [alpha]
            last = f"s{i}"
        found = recipes.from_dict({"models": models, "steps": steps, "output": {"arch": "any"}})
        got = np.frombuffer(result_bytes(found)["x"], "f2")
        differ, ulp = deviation(("F16", got), exact(weights, tensors), "F16")
        assert ulp <= 1
        assert differ <= 2e-3

    def test_a_nest_with_a_method_that_is_not_linear(self, tmp_path):
        tensors = {n: draw("F32", (37, 41), i) for i, n in enumerate("abcd")}
        models = {n: str(save(tmp_path / f"{n}.safetensors", {"x": t})) for n, t in tensors.items()}
        steps = {
            "mix": {"method": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3},
            "near": {"method": "nearswap", "a": "mix", "b": "c", "t": 0.4},
            "end": {"method": "add_difference", "a": "near", "b": "d", "c": "a", "alpha": 0.5},
        }
        found = recipes.from_dict({"models": models, "steps": steps, "output": {"arch": "any"}})
        got = np.frombuffer(result_bytes(found)["x"], "f4").reshape(37, 41)
        a, b, c, d = (t[1].astype(np.float64) for t in tensors.values())
        mix = 0.7 * a + 0.3 * b
        w = np.clip(0.4 / np.abs(mix - c), 0, 1)
        want = w * c + (1 - w) * mix + 0.5 * (d - a)
        assert 0.1 < np.mean(w < 1) < 0.9
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


# --- 4. Purity ----------------------------------------------------------------------------------


def hidden(monkeypatch, *names):
    for name in names:
        monkeypatch.delattr(os, name, raising=False)


class TestPurity:
    """The same contents and recipe give the same bytes, whatever else is the case."""

    ALPHA = "GRAD_V"

    @pytest.fixture(scope="class")
    @staticmethod
    def expected(sd, tmp_path_factory):
        out = tmp_path_factory.mktemp("expected") / "o.safetensors"
        merge(sd, out, TestPurity.ALPHA, threads=1)
        return out.read_bytes()

    def same(self, sd, tmp_path, expected, **options):
        merge(sd, tmp_path / "o.safetensors", self.ALPHA, force=True, **options)
        assert (tmp_path / "o.safetensors").read_bytes() == expected

    @pytest.mark.parametrize("threads", [2, 7])
    def test_threads(self, sd, tmp_path, expected, threads):
        self.same(sd, tmp_path, expected, threads=threads)

    @pytest.mark.parametrize(
        ("span", "chunk", "block"), [(4096, 512, 64), (1 << 20, 1000, 999), (65536, 1 << 17, 4096)]
    )
    def test_sizes_of_pieces(self, sd, tmp_path, monkeypatch, expected, span, chunk, block):
        monkeypatch.setattr(work, "SPAN", span)
        monkeypatch.setattr(worker, "CHUNK", chunk)
        monkeypatch.setattr(kernels, "BLOCK", block)
        self.same(sd, tmp_path, expected, threads=2)

    @pytest.mark.parametrize("kernel", ["numpy", "numkong"])
    def test_kernels(self, sd, tmp_path, monkeypatch, expected, kernel):
        pytest.importorskip("numkong")
        monkeypatch.setenv("PLYMIX_KERNEL", kernel)
        kernels.best_backend.cache_clear()
        try:
            self.same(sd, tmp_path, expected)
        finally:
            monkeypatch.undo()
            kernels.best_backend.cache_clear()

    @pytest.mark.parametrize(
        "missing",
        [
            ("preadv",),
            ("pwrite",),
            ("copy_file_range",),
            ("posix_fallocate",),
            ("preadv", "pread", "pwrite", "pwritev", "copy_file_range", "posix_fallocate"),
        ],
        ids="+".join,
    )
    def test_systems_that_lack_calls(self, sd, tmp_path, monkeypatch, expected, missing):
        hidden(monkeypatch, *missing)
        self.same(sd, tmp_path, expected, threads=3)

    @pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writes on this system")
    @pytest.mark.parametrize("wish", ["taken", "refused", "short", "not offered"])
    def test_direct_writes(self, sd, tmp_path, monkeypatch, expected, wish):
        """Past the system's cache or by way of it; a disk that wants other pieces; short writes."""
        monkeypatch.setattr(files, "DIRECT", 0)
        monkeypatch.setattr(files, "DIRECT_LEAST", files.PAGE)
        monkeypatch.setattr(worker, "ROOM", 1 << 14)
        monkeypatch.setattr(kernels, "BLOCK", 1024)
        open_file, pwrite, direct, written = os.open, os.pwrite, set(), []

        def opening(path, flags, *rest):
            if not flags & os.O_DIRECT:
                return open_file(path, flags, *rest)
            if wish == "not offered":
                raise OSError(errno.EINVAL, "Invalid argument")
            fd = open_file(path, flags & ~os.O_DIRECT, *rest)  # so that every file system has it
            direct.add(fd)
            return fd

        def writing(fd, data, offset):
            if fd in direct:
                address = np.frombuffer(data, np.uint8).ctypes.data
                if wish == "refused" or {offset % 4096, len(data) % 4096, address % 4096} != {0}:
                    raise OSError(errno.EINVAL, "Invalid argument")
                data = data[: 1000 if wish == "short" else None]
                written.append(len(data))
            return pwrite(fd, data, offset)

        monkeypatch.setattr(os, "open", opening)
        monkeypatch.setattr(os, "pwrite", writing)
        self.same(sd, tmp_path, expected, threads=2)
        if wish == "taken":
            assert sum(written) > len(expected) // 2
        assert bool(direct) == (wish != "not offered")

    @pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL])
    def test_file_systems_that_refuse_to_copy(self, sd, tmp_path, monkeypatch, expected, code):
        def refuse(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
        self.same(sd, tmp_path, expected)

    def test_short_reads_and_writes(self, sd, tmp_path, monkeypatch, expected):
        preadv, pwrite = os.preadv, os.pwrite
        monkeypatch.setattr(os, "preadv", lambda fd, b, at: preadv(fd, [b[0][:9999]], at))
        monkeypatch.setattr(os, "pwrite", lambda fd, b, at: pwrite(fd, b[:7777], at))
        self.same(sd, tmp_path, expected)

    def test_earlier_work_in_the_process(self, sd, tmp_path, expected):
        for alpha in (0.1, "FLAT_75", 0.9):
            merge(sd, tmp_path / "other.safetensors", alpha, force=True)
        self.same(sd, tmp_path, expected)

    @pytest.fixture(scope="class")
    @staticmethod
    def nested(sd):
        """A recipe of methods of every kind: by elements, whole, by chance, over all keys."""
        steps = {
            "mix": {"method": "weighted_sum", "a": "a", "b": "b", "alpha": "GRAD_V"},
            "wide": {"method": "geometric_sum", "a": "mix", "b": "b", "alpha": 0.2},
            "cosine": {"method": "cosine_a", "a": "wide", "b": "a", "alpha": 0.1},
            "thin": {"method": "dare_linear", "base": "a", "models": ["cosine", "b"], "seed": 7},
            "end": {"method": "ties", "base": "a", "models": ["thin", "b"], "density": 0.4},
        }
        models = {n: str(sd / f"{n}.safetensors") for n in "ab"}
        return recipes.from_dict({"models": models, "steps": steps})

    def test_nested_recipes(self, sd, tmp_path, monkeypatch, nested):
        def made(**options):
            plymix.merge(nested, out=tmp_path / "o.safetensors", force=True, **options)
            return (tmp_path / "o.safetensors").read_bytes()

        expected = made(threads=1)
        assert made(threads=2) == expected
        merge(sd, tmp_path / "other.safetensors", 0.7)  # unrelated work
        for module, name, size in ((work, "SPAN", 4096), (work, "CHUNK", 999)):
            monkeypatch.setattr(module, name, size)
        monkeypatch.setattr(worker, "CHUNK", 999)
        assert made(threads=7) == expected

    def test_both_formats_hold_the_same_tensors(self, sd, tmp_path, expected):
        merge(sd, tmp_path / "o.ckpt", self.ALPHA)
        (tmp_path / "o.safetensors").write_bytes(expected)
        with plymix.open(tmp_path / "o.ckpt") as source:
            found = {k: bytes(source.read(t)) for k, t in source.tensors.items()}
        assert found == data(tmp_path / "o.safetensors")

    def test_files_of_one_name_in_two_folders(self, tmp_path):
        for name, value in (("one", 1.0), ("two", 2.0)):
            (tmp_path / name).mkdir()
            save(tmp_path / name / "m.safetensors", {"x": coded([value], "F32")})
        files = {"a": tmp_path / "one/m.safetensors", "b": tmp_path / "two/m.safetensors"}
        plymix.merge(recipe(files, 0.25), out=tmp_path / "o.safetensors")
        tensors, metadata = load(tmp_path / "o.safetensors")
        assert tensors["x"][1] == [1.25]
        stored = json.loads(metadata["plymix.recipe"])["models"]
        for name, path in files.items():
            assert stored[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_a_changed_file_is_read_and_hashed_anew(self, tmp_path):
        a = save(tmp_path / "a.safetensors", {"x": coded([1.0], "F32")})
        b = save(tmp_path / "b.safetensors", {"x": coded([2.0], "F32")})
        found, out = recipe({"a": a, "b": b}), tmp_path / "o.safetensors"
        plymix.merge(found, out=out)
        stat = b.stat()
        save(b, {"x": coded([4.0], "F32")})  # same size
        os.utime(b, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        plymix.merge(found, out=out, force=True)
        tensors, metadata = load(out)
        assert tensors["x"][1] == [2.5]
        stored = json.loads(metadata["plymix.recipe"])["models"]["b"]["sha256"]
        assert stored == hashlib.sha256(b.read_bytes()).hexdigest()


# --- 5. Buffers ---------------------------------------------------------------------------------

IDS = {
    "sd1": "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "sdxl": "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
}


class TestBuffers:
    """Not float, no elements, or on the buffer list: A's, never blended, never cast."""

    @pytest.mark.parametrize("arch", IDS)
    @pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"ema": "use"}, {"union": True}])
    def test_position_ids(self, tmp_path, arch, options):
        made = header(arch) | {IDS[arch]: ("I64", (1, 77))}
        write_safetensors(tmp_path / "a.safetensors", made, state(made, 1))
        damaged = made | {IDS[arch]: ("F16", (1, 77))}
        values = state(damaged, 2)
        values[IDS[arch]] = (np.arange(77, dtype="f4") * 0.99).astype("f2").reshape(1, 77)
        write_safetensors(tmp_path / "b.safetensors", damaged, values)
        merge(tmp_path, tmp_path / "o.safetensors", 1.0, **options)
        dtype, ids = load(tmp_path / "o.safetensors")[0][IDS[arch]]
        assert dtype == "I64"
        assert ids.ravel().tolist() == list(range(77))

    def test_everything_that_is_no_weight(self, tmp_path):
        first = UNET + "input_blocks.0.0."
        extra = {
            first + "num_batches_tracked": ("F32", np.array(3.0, "f4")),
            first + "steps": ("I32", np.arange(5, dtype="i4")),
            first + "mask": ("BOOL", np.array([True, False])),
            first + "empty": ("F16", np.zeros((0, 4), "f2")),
            "v_pred": ("F32", np.zeros((0,), "f4")),
            "betas": ("F32", np.linspace(0, 1, 1000, dtype="f4")),
            "alphas_cumprod": ("F32", np.linspace(1, 0, 1000, dtype="f4")),
        }
        made = header("sd1")
        for name, seed, sign in (("a", 1, 1), ("b", 2, -1)):
            more = {
                k: (d, ~x if d == "BOOL" and sign < 0 else x if d == "BOOL" else (x * sign))
                for k, (d, x) in extra.items()
            }
            more = {k: (d, np.asarray(x, extra[k][1].dtype)) for k, (d, x) in more.items()}
            values = {k: (made[k][0], v) for k, v in state(made, seed).items()}
            save(tmp_path / f"{name}.safetensors", values | more)
        merge(tmp_path, tmp_path / "o.safetensors", 1.0, dtype="bf16")
        got = load(tmp_path / "o.safetensors")[0]
        for key, (dtype, x) in extra.items():
            assert got[key][0] == dtype, key
            assert got[key][1].tobytes() == x.tobytes(), key
        weights = {k for k, row in golden("sd1").items() if row[3] != "BUFFER"}
        assert {got[k][0] for k in weights} == {"BF16"}

    def test_by_key_too(self, tmp_path):
        models = {
            name: {
                "n": ("I64", np.array([i])),
                "e": ("F16", np.zeros(0, "f2")),
                "x": draw("F16", 4),
            }
            for i, name in enumerate("ab")
        }
        got = merged(tmp_path, models, 1.0)
        assert got["n"][1].tolist() == [0]
        assert got["e"][1].shape == (0,)


# --- 6. Atomic output ---------------------------------------------------------------------------

CHILD = """
import os, sys, time
import plymix
folder, out, mode = sys.argv[1:4]
calls = 0
def progress(p):
    global calls
    calls += 1
    if mode == "wait":
        print("going", flush=True)
        time.sleep(60)
    return True
try:
    plymix.merge(folder + "/a.safetensors", folder + "/b.safetensors", out, alpha=0.3,
                 force=True, progress=progress)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


def child(sd, out, mode="wait", code=CHILD):
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(sd), str(out), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if mode == "wait":
        assert process.stdout.readline() == "going\n", process.stderr.read()
    return process


class TestAtomicOutput:
    """The old file or the new one, never half, and nothing left behind."""

    OLD = b"the old file"

    @pytest.fixture
    def out(self, tmp_path):
        path = tmp_path / "out" / "o.safetensors"
        path.parent.mkdir()
        path.write_bytes(self.OLD)
        return path

    def intact(self, out):
        assert out.read_bytes() == self.OLD
        assert leftovers(out.parent) == [out.name]

    def test_kill_9_and_the_next_run(self, sd, out):
        process = child(sd, out)
        assert len(leftovers(out.parent)) == 2  # the temporary is there
        process.kill()
        process.communicate()
        assert out.read_bytes() == self.OLD
        merge(sd, out, force=True)
        assert leftovers(out.parent) == [out.name]  # and swept
        plymix.open(out).close()

    def test_another_process_keeps_its_temporary(self, sd, out):
        process = child(sd, out)
        try:
            merge(sd, out, force=True)
            assert len(leftovers(out.parent)) == 2
        finally:
            process.kill()
            process.communicate()

    def test_ctrl_c(self, sd, out):
        process = child(sd, out)
        process.send_signal(signal.SIGINT)
        said, error = process.communicate(timeout=20)
        assert process.returncode == 130, error
        assert "interrupted" in said
        self.intact(out)

    def test_a_callback_that_says_stop(self, sd, out):
        with pytest.raises(Cancelled):
            merge(sd, out, force=True, progress=lambda p: False)
        self.intact(out)

    def test_a_callback_that_fails(self, sd, out):
        def fail(_):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            merge(sd, out, force=True, progress=fail)
        self.intact(out)

    def test_a_method_that_fails(self, sd, out, monkeypatch):
        def fail(*_):
            raise MemoryError("none left")

        monkeypatch.setattr(kernels.Sum, "__call__", fail)
        with pytest.raises((MemoryError, Failure)):
            merge(sd, out, force=True)
        self.intact(out)

    @pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "copy_file_range", "fsync"])
    def test_a_full_disk(self, sd, out, monkeypatch, call):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, call, full)
        with pytest.raises(Failure, match=r"no room for o\.safetensors: it needs 1,6") as caught:
            merge(sd, out, force=True)
        assert caught.value.exit_code == 1
        self.intact(out)

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
    def test_a_truly_full_disk(self, sd, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("cannot mount here")
        try:
            with pytest.raises(Failure, match="no room"):
                merge(sd, disk / "o.safetensors")
            assert leftovers(disk) == []
        finally:
            subprocess.run(["umount", disk], check=True)

    def test_a_limit_on_file_size(self, sd, out):
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
        process = child(sd, out, "go", limit + CHILD)
        _, error = process.communicate(timeout=20)
        assert process.returncode == 1
        assert re.search(
            r"o\.safetensors has 1,6\d\d,\d{3} bytes, more than a file may have", error
        )
        assert "--shard 4GB" in error
        assert "no room" not in error
        self.intact(out)

    def test_output_is_an_input(self, sd, tmp_path):
        merge(sd, tmp_path / "want.safetensors")
        for name in "ab":
            shutil.copy(sd / f"{name}.safetensors", tmp_path)
        for name in "ab":
            target = tmp_path / f"{name}.safetensors"
            before = target.read_bytes()
            with pytest.raises(Refusal, match="is an input itself"):
                merge(tmp_path, target)
            merge(tmp_path, target, force=True)
            assert data(target) == data(tmp_path / "want.safetensors")
            target.write_bytes(before)
        assert leftovers(tmp_path) == ["a.safetensors", "b.safetensors", "want.safetensors"]

    def test_an_existing_file_needs_force(self, sd, out):
        with pytest.raises(Refusal, match="--force"):
            merge(sd, out)
        self.intact(out)

    def test_no_such_folder(self, sd, tmp_path):
        with pytest.raises(Refusal, match="does not exist"):
            merge(sd, tmp_path / "absent" / "o.safetensors")
        assert leftovers(tmp_path) == []

    def test_the_output_is_a_folder(self, sd, tmp_path):
        (tmp_path / "o.safetensors").mkdir()
        with pytest.raises(Refusal, match="folder"):
            merge(sd, tmp_path / "o.safetensors", force=True)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
    def test_what_is_no_file_is_not_replaced(self, sd, tmp_path):
        os.mkfifo(tmp_path / "pipe.safetensors")
        for out in (tmp_path / "pipe.safetensors", type(tmp_path)(os.devnull)):
            with pytest.raises(Refusal, match="is a device or a pipe"):
                merge(sd, out, force=True)
            assert not out.is_file()

    def test_a_read_only_folder(self, sd, tmp_path, monkeypatch):
        folder = tmp_path / "sealed"
        folder.mkdir(mode=0o500)
        if os.geteuid() == 0:  # root may write anywhere: ask as the system would answer others
            monkeypatch.setattr(os, "access", lambda *_: False)
        with pytest.raises(Refusal, match="read-only"):
            merge(sd, folder / "o.safetensors")
        assert leftovers(folder) == []

    def test_a_folder_that_refuses_only_when_asked(self, sd, out, monkeypatch):
        def refuse(*args, **_):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(Failure, match="Read-only"):
            merge(sd, out, force=True)
        monkeypatch.undo()
        self.intact(out)

    def test_strange_and_long_names(self, sd, tmp_path):
        folder = tmp_path / "モデル é 😀" / "a b"
        folder.mkdir(parents=True)
        for name in ("%s .[x].safetensors" % ("n" * 40), "ü" * 118 + ".safetensors"):
            merge(sd, folder / name)
            plymix.open(folder / name).close()
        assert len(leftovers(folder)) == 2

    def test_a_damaged_input_leaves_nothing(self, sd, out):
        cut = out.parent.parent / "cut.safetensors"
        cut.write_bytes((sd / "b.safetensors").read_bytes()[:-100])
        with pytest.raises(Refusal, match="truncated"):
            plymix.merge(sd / "a.safetensors", cut, out, force=True)
        self.intact(out)

    def test_an_input_that_shrinks_meanwhile(self, sd, out, tmp_path):
        for name in "ab":
            shutil.copy(sd / f"{name}.safetensors", tmp_path)
        with plan.build(
            plymix.two_models(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        ) as p:
            os.truncate(tmp_path / "b.safetensors", 200_000)
            from plymix import api

            with pytest.raises((Refusal, Failure), match="truncated"):
                api.run(p, out)
        self.intact(out)


# --- 7. No code from input ----------------------------------------------------------------------


class TestNoCode:
    """A checkpoint that would run a command is merged, or refused, without running it."""

    def checkpoint(self, path, payload, torch):
        tensors = {k: torch.zeros(s) for k, (d, s) in header("sd1").items() if d != "I64"}
        torch.save({"state_dict": tensors, "callbacks": payload}, path)

    def test_a_hostile_checkpoint(self, sd, tmp_path):
        torch = pytest.importorskip("torch")
        flag = tmp_path / "flag"

        class Bomb:
            def __reduce__(self):
                return os.system, (f"touch {flag}",)

        self.checkpoint(tmp_path / "bad.ckpt", Bomb(), torch)
        with contextlib.suppress(Refusal):
            plymix.merge(
                sd / "a.safetensors", tmp_path / "bad.ckpt", tmp_path / "o.safetensors", alpha=0.5
            )
            assert data(tmp_path / "o.safetensors").keys() == header("sd1").keys()
        assert not flag.exists()

    @pytest.mark.parametrize("module", ["posix.system", "builtins.eval", "subprocess.call"])
    def test_a_bare_pickle(self, tmp_path, module):
        name, _, attribute = module.rpartition(".")
        flag = tmp_path / "flag"
        code = f"c{name}\n{attribute}\n(Vtouch {flag}\ntR."
        with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as z:
            z.writestr("archive/data.pkl", b"\x80\x02" + code.encode())
            z.writestr("archive/version", "3\n")
        (tmp_path / "bare.ckpt").write_bytes(b"\x80\x02" + code.encode())
        for file in ("bad.ckpt", "bare.ckpt"):
            with pytest.raises(Refusal):
                plymix.merge(tmp_path / file, tmp_path / file, tmp_path / "o.safetensors")
        assert not flag.exists()
        assert leftovers(tmp_path) == ["bad.ckpt", "bare.ckpt"]

    def test_the_bomb_is_one(self, tmp_path):
        """The pickle above does run where nobody takes care."""
        with pytest.raises(SystemExit):
            pickle.loads(b"cbuiltins\nexec\n(Vraise SystemExit\ntR.")


# --- 8. Bounded memory --------------------------------------------------------------------------

MEASURE = """
import resource, sys
import plymix
from plymix.recipe import from_dict
files, out = sys.argv[1:-1], sys.argv[-1]
models = {f"m{i}": f for i, f in enumerate(files)}
found = from_dict({
    "models": models,
    "steps": {"mix": {"method": "n_average", "models": list(models),
                      "weights": [0.1 + 0.1 * i for i in range(len(files))]}},
    "output": {"arch": "any"},
})
plymix.merge(found, out=out)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def big(path, dtype, megabytes, tensors=6):
    """A file of zeros that takes no room on the disk."""
    size = {"F16": 2, "F32": 4}[dtype]
    each = megabytes * 1_000_000 // tensors // size
    table = {
        f"t{i}": {
            "dtype": dtype,
            "shape": [each],
            "data_offsets": [i * each * size, (i + 1) * each * size],
        }
        for i in range(tensors)
    }
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + tensors * each * size)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
class TestBoundedMemory:
    """64 MiB for linear merges of any size.

    The peak is VmHWM: ru_maxrss would count the process that started this one too.
    """

    def peak(self, files, folder, code=MEASURE):
        """In KiB."""
        run = subprocess.run(
            [sys.executable, "-c", code, *map(str, files), str(folder / "o.safetensors")],
            capture_output=True,
            text=True,
        )
        (folder / "o.safetensors").unlink(missing_ok=True)
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    @pytest.mark.parametrize(
        ("count", "dtype", "megabytes"), [(2, "F16", 600), (6, "F32", 150), (12, "F16", 80)]
    )
    def test_peak(self, tmp_path, count, dtype, megabytes):
        files = [big(tmp_path / f"m{i}.safetensors", dtype, megabytes) for i in range(count)]
        assert self.peak(files, tmp_path) <= 64 * 1024

    @pytest.mark.parametrize("method", ["geometric_sum", "dare_linear", "ties"])
    def test_methods_that_are_not_linear(self, tmp_path, method):
        """By elements as sums; whole tensors: four times the largest in float32, in one thread."""
        files = [big(tmp_path / f"m{i}.safetensors", "F16", 60, 2) for i in range(3)]
        start = MEASURE.index('"mix": {')
        whole = method != "geometric_sum"
        step = {"base": "m0", "models": ["m1", "m2"]} if whole else {"a": "m0", "b": "m1"}
        code = f"""{MEASURE[:start]}"mix": {json.dumps({"method": method, **step})}}},
    {MEASURE[MEASURE.index('"output"') :]}""".replace("out=out)", "out=out, threads=1)")
        tensor = 4 * 60_000_000 // 2 // 2  # bytes in float32
        assert self.peak(files, tmp_path, code) * 1024 <= (64 << 20) + whole * 4 * tensor

    def test_shards_cost_no_memory(self, tmp_path):
        files = [big(tmp_path / f"m{i}.safetensors", "F16", 240) for i in range(2)]
        peaks = []
        for shard in ("0", '"100MB"'):
            code = MEASURE.replace('"arch": "any"', f'"arch": "any", "shard": {shard}')
            run = subprocess.run(
                [sys.executable, "-c", code, *map(str, files), str(tmp_path / "o.safetensors")],
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, run.stderr
            peaks.append(int(run.stdout))
            made = sorted(tmp_path.glob("o*.safetensors"))
            assert len(made) == (1 if shard == "0" else 3)
            for path in made:
                path.unlink()
        assert peaks[1] <= peaks[0] + 2 * 1024

    def test_no_growth(self, tmp_path):
        code = MEASURE.replace(
            "plymix.merge(found, out=out)\n",
            textwrap.dedent("""
            def used():
                return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
            for i in range(55):
                plymix.merge(found, out=out, force=True)
                if i == 4:
                    before = used()
            assert used() < 1.05 * before, (before, used())
            """),
        )
        files = [save(tmp_path / f"{n}.safetensors", {"x": draw("F16", (300, 500))}) for n in "ab"]
        run = subprocess.run(
            [sys.executable, "-c", code, *map(str, files), str(tmp_path / "o.safetensors")],
            capture_output=True,
            env=os.environ | {"MALLOC_ARENA_MAX": "1"},
            text=True,
        )
        assert run.returncode == 0, run.stderr

    def test_no_file_stays_open(self, sd, tmp_path):
        def count():
            return len(os.listdir("/proc/self/fd"))

        merge(sd, tmp_path / "o.safetensors", force=True)
        before = count()
        for _ in range(3):
            merge(sd, tmp_path / "o.safetensors", force=True)
            with pytest.raises(Cancelled):
                merge(sd, tmp_path / "o.safetensors", force=True, progress=lambda p: False)
            with pytest.raises(Refusal):
                plymix.merge(sd / "a.safetensors", sd / "b.safetensors", alpha=[1, 2])
        assert count() == before


# --- 9. Unknown means error ---------------------------------------------------------------------


class TestUnknown:
    """A name that does not exist is refused, with the nearest that does."""

    @pytest.mark.parametrize(
        ("options", "near"),
        [
            ({"alpha": "GRAD_VV"}, "GRAD_V"),
            ({"method": "weighted_sun"}, "weighted_sum"),
            ({"dtype": "fp61"}, "fp16"),
            ({"ema": "kep"}, "keep"),
            ({"aplha": 0.5}, "alpha"),
            ({"alpha": {"blocks": {"IN44": 1}}}, "IN"),
            ({"alpha": {"blok": {"IN01": 1}}}, "blocks"),
            ({"arch": "sd9"}, "any"),
            ({"vae": "nowhere.safetensors"}, "nowhere"),
        ],
        ids=str,
    )
    def test_names(self, sd, tmp_path, options, near):
        with pytest.raises(Refusal) as caught:
            plymix.merge(
                sd / "a.safetensors", sd / "b.safetensors", tmp_path / "o.safetensors", **options
            )
        assert near in str(caught.value)
        assert "\n" not in str(caught.value)
        assert leftovers(tmp_path) == []

    @pytest.fixture
    def renamed(self, sd, tmp_path):
        """B with one tensor under another name."""
        made, values, _ = read_safetensors(sd / "b.safetensors")
        old = UNET + "output_blocks.7.0.in_layers.0.weight"
        new = old.replace("weight", "wight")
        made = {new if k == old else k: v for k, v in made.items()}
        values = {new if k == old else k: v for k, v in values.items()}
        shutil.copy(sd / "a.safetensors", tmp_path)
        write_safetensors(tmp_path / "b.safetensors", made, values)
        return old, new

    def test_keys_without_a_partner_are_named(self, renamed, tmp_path):
        old, new = renamed
        result = merge(tmp_path, tmp_path / "o.safetensors")
        assert result.unmatched == 2
        assert any(old in note for note in result.notes)
        shown = plymix.explain(tmp_path / "a.safetensors", tmp_path / "b.safetensors", alpha=0.3)
        assert shown.unmatched == {"a": (old,), "b": (new,)}
        assert data(tmp_path / "o.safetensors")[old] == data(tmp_path / "a.safetensors")[old]

    def test_strict_refuses_them(self, renamed, tmp_path):
        old, new = renamed
        with pytest.raises(Refusal) as caught:
            merge(tmp_path, tmp_path / "o.safetensors", strict=True)
        assert old in str(caught.value)
        assert new in str(caught.value)
        assert not (tmp_path / "o.safetensors").exists()

    def test_strict_is_content_with_a_true_pair(self, sd, tmp_path):
        merge(sd, tmp_path / "o.safetensors", strict=True)

    def test_nothing_matched_is_fatal(self, tmp_path):
        models = {"a": {"x": draw("F16", 4)}, "b": {"y": draw("F16", 4)}}
        with pytest.raises(Refusal, match="shares no tensor"):
            merged(tmp_path, models)
        assert not (tmp_path / "out.safetensors").exists()

    @pytest.mark.parametrize("alpha", [float("nan"), float("inf"), [0.5] * 24, ["a"] * 25, "1,x"])
    def test_weights_that_are_none(self, sd, tmp_path, alpha):
        with pytest.raises(Refusal):
            merge(sd, tmp_path / "o.safetensors", alpha)
        assert leftovers(tmp_path) == []


# --- 10. The result carries its recipe ----------------------------------------------------------


class TestRecipeInTheResult:
    @pytest.fixture
    def secret(self, sd, tmp_path):
        folder = tmp_path / "SecretUser" / "private"
        folder.mkdir(parents=True)
        for name in "ab":
            shutil.copy(sd / f"{name}.safetensors", folder)
        return folder

    @pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
    def test_it_is_whole_true_and_private(self, secret, ending):
        out = secret / f"o{ending}"
        merge(secret, out, "GRAD_V", dtype="fp16")
        if ending == ".ckpt":
            assert b"SecretUser" not in out.read_bytes()
            assert str(secret.parent.parent).encode() not in out.read_bytes()
            return
        raw = out.read_bytes()
        head = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
        assert b"SecretUser" not in head
        assert b"private" not in head
        assert str(secret.parent.parent).encode() not in head
        assert b"not known yet" not in head  # no place-holder is left
        metadata = load(out)[1]
        text = metadata["plymix.recipe"]
        stored = recipes.from_json(text)
        assert recipes.to_json(stored) == text
        assert stored.steps["merge"].params == {"alpha": "GRAD_V"}
        assert stored.output.dtype == "fp16"
        for name in "ab":
            path = secret / f"{name}.safetensors"
            model = stored.models[name]
            assert model.file == path.name
            assert model.size == path.stat().st_size
            assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_it_says_all_that_is_needed(self, secret):
        """The stored recipe, beside the same files, gives the same tensors."""
        merge(secret, secret / "o.safetensors", "GRAD_V", base=0.3, vae="b", dtype="bf16")
        stored = recipes.from_json(load(secret / "o.safetensors")[1]["plymix.recipe"])
        plymix.merge(stored, out=secret / "again.safetensors", models=[secret])
        assert data(secret / "again.safetensors") == data(secret / "o.safetensors")

    def test_the_same_merge_gives_the_same_file(self, secret, monkeypatch):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
        for name in ("one", "two"):
            merge(secret, secret / f"{name}.safetensors")
        assert (secret / "one.safetensors").read_bytes() == (
            secret / "two.safetensors"
        ).read_bytes()
        assert load(secret / "one.safetensors")[1]["modelspec.date"] == "1970-01-01"

    def test_every_value_is_text_and_the_header_stays_small(self, secret):
        """Ten generations of merges of merges."""
        last = secret / "a.safetensors"
        for i in range(10):
            out = secret / f"g{i}.safetensors"
            plymix.merge(last, secret / "b.safetensors", out, alpha=0.1)
            last = out
        metadata = load(last)[1]
        assert all(isinstance(v, str) for v in metadata.values())
        assert sum(map(len, metadata.values())) < 1 << 20
        ancestors = json.loads(metadata["sd_merge_models"])
        assert len(ancestors) == 11
