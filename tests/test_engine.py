"""The engine: work items, every way of moving bytes, and where it may not guess."""

import errno
import os
import threading
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
from plymix import engine, kernels, plan
from plymix.cli import screen
from plymix.engine import work, worker
from plymix.engine.files import AtomicFile, Buffers, Outbox, steps
from plymix.errors import Cancelled, Failure, Refusal
from plymix.expr import Leaf, Sum, Tensor
from plymix.formats import Handle, TensorInfo
from plymix.recipe import from_dict
from small import coded, data, deviation, draw, exact, load, recipe, result_bytes, save


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))


def leaf(offset, n, source=0, dtype="F16"):
    return Leaf(source, TensorInfo(f"t{offset}", dtype, (n,), offset))


def tensor(expr, offset, n, dtype="F16"):
    return Tensor(f"o{offset}", dtype, (n,), expr, offset)


# --- work items ---------------------------------------------------------------------------------


def test_neighbouring_copies_are_one_range():
    tensors = [tensor(leaf(100 + 20 * i, 10), 500 + 20 * i, 10) for i in range(5)]
    assert engine.items(tensors[::-1]) == [engine.CopyItem(0, 0, 100, 500, 100)]


def test_neighbouring_sums_of_equal_coefficients_are_one_span():
    def mix(i, c):
        return Sum(((c, leaf(20 * i, 10)), (1 - c, leaf(1000 + 20 * i, 10, 1))))

    tensors = [tensor(mix(i, 0.3 if i < 3 else 0.4), 20 * i, 10) for i in range(5)]
    first, second = engine.items(tensors)
    assert (first.numel, second.numel) == (30, 20)
    assert [o.offset for o in second.operands] == [60, 1060]


def test_what_is_not_adjacent_is_not_joined():
    gap_in = [tensor(leaf(0, 10), 0, 10), tensor(leaf(22, 10), 20, 10)]
    gap_out = [tensor(leaf(0, 10), 0, 10), tensor(leaf(20, 10), 22, 10)]
    other_source = [tensor(leaf(0, 10), 0, 10), tensor(leaf(20, 10, 1), 20, 10)]
    for tensors in (gap_in, gap_out, other_source):
        assert len(engine.items(tensors)) == 2


def test_a_real_pair_needs_few_items(tmp_path):
    from tiny import write

    files = [write(tmp_path / f"{n}.safetensors", "sd1", i) for i, n in enumerate("ab")]
    with plan.build(plymix.two_models(*files, alpha="GRAD_V")) as p:
        placed, _ = p.layout(tmp_path / "o.safetensors", {})
        assert len(engine.items(placed)) < 120 < len(p.tensors)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12), st.integers(1, 9))
@settings(deadline=None)
def test_items_cover_every_byte_once(rows, span):
    """Whatever is joined and cut, each output byte is made once, from the right input byte."""
    at, tensors = 0, []
    for n, copied in rows:
        expr = leaf(at, n) if copied else Sum(((0.5, leaf(at, n)), (0.5, leaf(at, n, 1))))
        tensors.append(tensor(expr, at, n))
        at += 2 * n
    before, work.SPAN = work.SPAN, 2 * span
    try:
        found = engine.items(tensors)
    finally:
        work.SPAN = before
    covered = []
    for item in found:
        start = item.at
        source = item.offset if isinstance(item, engine.CopyItem) else item.operands[0].offset
        assert source == start
        assert item.nbytes <= 2 * span
        covered.append((start, start + item.nbytes))
    covered.sort()
    assert [a for a, _ in covered] == [0, *(b for _, b in covered[:-1])][: len(covered)]
    assert (covered[-1][1] if covered else 0) == at


# --- kinds of work ------------------------------------------------------------------------------


def test_copies_move_without_computing(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.Sum, "__call__", lambda *_: pytest.fail("computed"))
    files = {
        n: save(tmp_path / f"{n}.safetensors", {"x": draw("F16", (99,), i)})
        for i, n in enumerate("ab")
    }
    plymix.merge(recipe(files, 1.0), out=tmp_path / "o.safetensors")
    assert data(tmp_path / "o.safetensors") == data(files["b"])


def test_casts(tmp_path):
    """One input, another dtype: rounded once; a NaN stays one."""
    values = coded([1.0, 1 / 3, 70000.0, np.nan, -0.0, 1e-8], "F32")
    file = save(tmp_path / "a.safetensors", {"x": values})
    for dtype, kind in (("fp16", np.float16), ("fp32", np.float32)):
        found = from_dict(
            {"models": {"a": str(file)}, "output": {"from": "a", "arch": "any", "dtype": dtype}}
        )
        with np.errstate(over="ignore"):
            want = values[1].astype(kind)
        assert result_bytes(found)["x"] == want.tobytes()


@pytest.mark.parametrize("method", ["slerp", "nearswap", "geometric_sum"])
@pytest.mark.parametrize("threads", [1, 3])
def test_methods_that_are_not_linear_are_the_function(tmp_path, monkeypatch, method, threads):
    """In chunks or whole: what the registered function gives on the whole tensors."""
    from plymix.registry import methods

    if method not in methods():
        pytest.skip(f"no {method}")
    monkeypatch.setattr(worker, "CHUNK", 100)
    monkeypatch.setattr(work, "SPAN", 4000)
    found = methods()[method]
    a, b = (draw("F32", (37, 41), i) for i in (1, 2))
    files = {n: str(save(tmp_path / f"{n}.safetensors", {"x": t})) for n, t in (("a", a), ("b", b))}
    names = dict(zip(found.inputs, "ab", strict=False))
    step = {"method": method, **names}
    got = result_bytes(
        from_dict({"models": files, "steps": {"s": step}, "output": {"arch": "any"}}),
        threads=threads,
    )
    want = found.function(a[1], b[1])
    value = np.frombuffer(got["x"], "f4").reshape(37, 41)
    np.testing.assert_allclose(value, want, rtol=3e-6, atol=1e-7)


@pytest.fixture
def strided(tmp_path):
    """A torch file with transposed, expanded and sliced tensors of several dtypes."""
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "plain": base.half(),
        "t16": base.half().t(),
        "t32": base.t(),
        "t64": (base.double() / 3).t(),
        "ints": torch.arange(77).expand(2, 77),
        "slice": base[:, 1:3].bfloat16()[::2],
        "nan": torch.tensor([[1, 0x7E01], [0xFE55, 2]], dtype=torch.int32)
        .to(torch.int16)
        .view(torch.float16)
        .t(),
    }
    torch.save(tensors, tmp_path / "s.ckpt")
    torch.save({k: v + 1 for k, v in tensors.items()}, tmp_path / "t.ckpt")
    return tmp_path, {k: v.contiguous() for k, v in tensors.items()}


def raw(torch_tensor):
    kinds = {8: "int64", 4: "int32", 2: "int16"}
    import torch

    return torch_tensor.view(getattr(torch, kinds[torch_tensor.element_size()])).numpy().tobytes()


def test_strided_tensors_are_copied_exactly(strided):
    folder, want = strided
    files = {"a": folder / "s.ckpt", "b": folder / "t.ckpt"}
    got = result_bytes(recipe(files, 0.0))
    for key, value in want.items():
        assert got[key] == raw(value), key


def test_strided_tensors_are_merged(strided):
    folder, want = strided
    got = result_bytes(recipe({"a": folder / "s.ckpt", "b": folder / "t.ckpt"}, 0.25))
    for key, dtype in (("t16", "F16"), ("t32", "F32")):
        value = np.frombuffer(got[key], kernels.NUMPY[dtype]).reshape(want[key].shape)
        assert deviation((dtype, value), want[key].double().numpy() + 0.25, dtype)[1] <= 1
    assert got["ints"] == raw(want["ints"])


def test_mixed_shapes_by_key_are_refused(tmp_path):
    files = {
        n: save(tmp_path / f"{n}.safetensors", {"x": draw("F16", s)})
        for n, s in (("a", (2, 3)), ("b", (3, 2)))
    }
    with pytest.raises(plymix.Refusal, match="shape"):
        result_bytes(recipe(files))


# --- handles and targets ------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [(), ("preadv",)], ids=["preadv", "readinto"])
def test_a_handle_reads_at_positions_from_many_threads(tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name)
    content = os.urandom(300_000)
    (tmp_path / "f").write_bytes(content)
    handle = Handle(tmp_path / "f")
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(200):
            at = int(rng.integers(0, 299_000))
            out = bytearray(int(rng.integers(0, 1000)))
            handle.read_at(at, out)
            if out != content[at : at + len(out)]:
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    handle.close()
    assert not wrong


@pytest.mark.parametrize("missing", [(), ("pwrite",)], ids=["pwrite", "seek"])
def test_a_target_writes_and_reads_back(tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name)
    with AtomicFile(tmp_path / "f", 100) as target:
        target.write_at(50, b"b" * 50)
        target.write_at(0, memoryview(b"a" * 50))
        out = bytearray(10)
        target.read_at(45, out)
        assert out == b"aaaaabbbbb"
        with pytest.raises(Failure):
            target.read_at(95, bytearray(10))
    assert list(tmp_path.iterdir()) == []  # not committed


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writes on this system")
def test_large_files_go_to_the_disk_directly(tmp_path):
    """And what is read back soon does not."""
    at = 12_345
    with AtomicFile(tmp_path / "f", 64 << 20) as target:
        if not target.waits:
            pytest.skip("this file system has no direct writes")
        row = np.frombuffer(Buffers()(0, 1 << 20, at), np.uint8)
        row[:] = np.arange(1 << 20) % 251
        target.write_at(at, row)
        assert target.cached < 2 * 4096  # only the ends
        out = bytearray(1 << 20)
        target.read_at(at, out)
        assert out == row.tobytes()
    with AtomicFile(tmp_path / "f", 64 << 20, read_back=True) as target:
        assert not target.waits
    with AtomicFile(tmp_path / "f", 1 << 20) as target:
        assert not target.waits


@given(st.integers(0, 20_000), st.integers(0, 60_000), st.integers(1, 20_000))
def test_steps_end_where_pages_do(at, nbytes, most):
    found = list(steps(at, nbytes, most))
    ends = [start + n for start, n in found]
    assert [start for start, _ in found] == [0, *ends][: len(found)]
    assert ends[-1:] == [nbytes][: len(found)]
    assert all((at + end) % 4096 == 0 for end in ends[:-1])
    assert all(0 < n <= max(most, 8192) for _, n in found)


def test_an_atomic_file_that_is_committed(tmp_path):
    file = AtomicFile(tmp_path / "f", 3)
    with file as target:
        target.write_at(0, b"abc")
        file.commit()
    assert (tmp_path / "f").read_bytes() == b"abc"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_progress_goes_up_to_the_end(tmp_path):
    files = {
        n: save(tmp_path / f"{n}.safetensors", {"x": draw("F16", (300, 1000), i)})
        for i, n in enumerate("ab")
    }
    seen = []
    plymix.merge(recipe(files, 0.3), out=tmp_path / "o.safetensors", progress=seen.append)
    merging = [p for p in seen if p.phase == "merging"]
    done = [p.done for p in merging]
    assert done == sorted(done)
    assert done[-1] == merging[-1].total == 600_000


def test_stop_leaves_no_thread(tmp_path):
    files = {
        n: save(tmp_path / f"{n}.safetensors", {"x": draw("F16", (300, 1000), i)})
        for i, n in enumerate("ab")
    }
    before = threading.active_count()
    for answer in (lambda p: False, lambda p: 1 / 0):
        with pytest.raises((Cancelled, ZeroDivisionError)):
            plymix.merge(
                recipe(files, 0.3), out=tmp_path / "o.safetensors", progress=answer, threads=3
            )
    assert threading.active_count() == before


def test_a_callback_that_said_stop_is_not_asked_again(tmp_path):
    files = {
        n: save(tmp_path / f"{n}.safetensors", {f"{i}": draw("F16", (999, 999)) for i in range(9)})
        for n in "ab"
    }
    seen = []

    def stop(now):
        seen.append(now)
        return False

    with pytest.raises(Cancelled):
        plymix.merge(recipe(files, 0.3), out=tmp_path / "o.safetensors", progress=stop)
    assert len(seen) == 1


def test_the_input_is_not_changed(tmp_path):
    files = {
        n: save(tmp_path / f"{n}.safetensors", {"x": draw("F16", (100,), i)})
        for i, n in enumerate("ab")
    }
    before = {n: f.read_bytes() for n, f in files.items()}
    plymix.merge(recipe(files, 0.3, dtype="bf16"), out=tmp_path / "o.safetensors")
    assert {n: f.read_bytes() for n, f in files.items()} == before
    assert load(tmp_path / "o.safetensors")[0]["x"][0] == "BF16"
    want = exact([0.7, 0.3], [load(f)[0]["x"] for f in files.values()])
    assert deviation(load(tmp_path / "o.safetensors")[0]["x"], want, "BF16")[1] <= 1


def test_fewer_threads_than_none_are_refused(tmp_path):
    file = save(tmp_path / "a.safetensors", {"w": draw("F32", (4,))})
    found = recipe({"a": file, "b": file})
    with pytest.raises(Refusal, match="threads = -2"):
        plymix.merge(found, out=tmp_path / "o.safetensors", threads=-2)


def test_a_first_pass_tells_how_far_it_is(tmp_path, monkeypatch):
    """cosine_a looks at every tensor before it merges one: in a large model for seconds."""
    tensors = {f"t{i}": draw("F16", (64,), i) for i in range(50)}
    files = {n: save(tmp_path / f"{n}.safetensors", tensors) for n in "ab"}
    found = recipe(files, method="cosine_a")
    clock = count()
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    seen = []
    result_bytes(found, progress=seen.append)
    passes = [(now.done, now.total) for now in seen if now.phase.startswith("first pass")]
    assert passes == [(i, 50) for i in range(50)]
    assert screen.describe(seen[7]) == "first pass over the tensors: 7 of 50"
    seen.clear()
    with pytest.raises(Cancelled):
        result_bytes(found, progress=lambda now: seen.append(now) or len(seen) < 5)
    assert len(seen) == 5


class Slow:
    """A target whose writes wait for the disk; from the second on it is full."""

    waits = True

    def __init__(self, most):
        self.most, self.written = most, {}

    def write_at(self, offset, data):
        if len(self.written) == self.most:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written[offset] = bytes(data)


def test_what_is_handed_over_is_written_in_the_end():
    out = Outbox(target := Slow(100))
    for i in range(9):
        room = out.room(1000, 1000 * i)
        room[:] = bytes([i]) * 1000
        out.put(1000 * i, room)
    out.close()
    assert target.written == {1000 * i: bytes([i]) * 1000 for i in range(9)}
    assert out._thread is None


def test_a_write_that_fails_later_is_told():
    out = Outbox(Slow(1))
    for i in range(2):
        out.put(i, out.room(10, i))
    with pytest.raises(OSError, match="No space left"):
        out.close()
    out = Outbox(Slow(0))
    out.put(0, out.room(10, 0))
    out.put(1, out.room(10, 1))  # there are two rows: the third is the first, which has failed
    with pytest.raises(OSError, match="No space left"):
        out.room(10, 2)
