"""The pickle machine against Python's own pickler, hand-made attacks and damaged streams."""

import io
import pickle
import sys
import time
import types
from collections import OrderedDict, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plymix.errors import FormatError
from plymix.formats.unpickle import MAX_BYTES, Inert, Storage, Tensor, find_state_dict, load

PROTO = b"\x80\x02"


def read(data):
    return load(io.BytesIO(data), "m.ckpt", len(data)).value


def refusal(data):
    """Why `data` is refused, "" when it is not; any other error fails the test."""
    try:
        find_state_dict(read(data), "m.ckpt")
    except FormatError as e:
        return str(e)
    return ""


def text(s):
    return b"X" + len(s.encode()).to_bytes(4, "little") + s.encode()


def number(n):
    return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)


def a_tuple(*items):
    return b"(" + b"".join(items) + b"t"


def storage(kind="FloatStorage", key="0", numel=12, *, module="torch", view=None):
    pid = [text("storage"), f"c{module}\n{kind}\n".encode(), text(key), text("cpu"), number(numel)]
    return a_tuple(*pid, *([] if view is None else [view])) + b"Q"


def tensor(shape, strides, offset=0, of=None, rebuild="_rebuild_tensor_v2", extra=()):
    numbers = [a_tuple(*map(number, shape)), a_tuple(*map(number, strides))]
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = [of or storage(), number(offset), *numbers, b"\x89", hooks, *extra]
    return f"ctorch._utils\n{rebuild}\n".encode() + a_tuple(*arguments) + b"R"


def one(code):
    """A state dict with one tensor "w", read."""
    return find_state_dict(read(PROTO + b"}" + text("w") + code + b"s."), "m.ckpt")


# ---- plain values: Python's pickler is the reference

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 200), 1 << 200),
    st.floats(allow_nan=False),
    st.text(),
)
keys = st.one_of(st.text(), st.integers(-(1 << 63), (1 << 63) - 1), st.none(), st.booleans())
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner, inner, inner), st.dictionaries(keys, inner)
    ),
    max_leaves=30,
)


@given(values, st.integers(2, 5))
@settings(deadline=None, max_examples=200)
def test_plain_values_read_as_python_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    read_back = load(io.BytesIO(data + b"more"), "m.ckpt")
    assert read_back.value == value
    assert read_back.nbytes == len(data)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes(protocol):
    value = [b"", b"x" * 300, b"y" * 70000]
    assert read(pickle.dumps(value, protocol)) == value


def test_bytearray_and_long_text_of_protocol_5():
    value = [bytearray(b"abc"), "é" * 70000, 1 << 3000]
    assert read(pickle.dumps(value, 5)) == [b"abc", value[1], value[2]]


def test_shared_and_cyclic_objects():
    inner = [1]
    value = {"a": inner, "b": inner}
    value["self"] = value
    got = read(pickle.dumps(value, 2))
    assert got["a"] is got["b"]
    assert got["self"] is got


def test_mappings_of_the_standard_library():
    assert read(pickle.dumps(OrderedDict(b=1, a=2), 2)) == {"b": 1, "a": 2}
    assert read(pickle.dumps(defaultdict(list, {"a": [1]}), 2)) == {"a": [1]}


def test_python_2_pickles_ordered_dict_text_and_long_integers():
    # OrderedDict([["a", 5000000000]]), as cPickle wrote it
    data = PROTO + b"ccollections\nOrderedDict\n](](U\x01aI5000000000\nee\x85R."
    assert read(data) == {"a": 5_000_000_000}


def test_sets_and_objects_are_inert():
    value = {"s": {1, 2}, "f": frozenset("a"), "c": 1j, "r": range(3), "path": slice(1, 2)}
    got = {k: type(v) for k, v in read(pickle.dumps(value, 4)).items()}
    assert got == dict.fromkeys("sfc", Inert) | {"r": Inert, "path": Inert}


# ---- what surrounds the weights is inert, what attacks is refused


@pytest.fixture
def foreign(monkeypatch):
    """A class of a module that exists while it is pickled and raises when it is imported."""

    class ModelCheckpoint:
        def __setstate__(self, state):
            raise AssertionError("state was set")

        def __reduce_ex__(self, _protocol):
            state, items, pairs = {"a": 1}, iter([1, 2]), iter([(1, 2)])
            return ModelCheckpoint, (1, "x"), state, items, pairs

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    ModelCheckpoint.__module__ = module.__name__
    ModelCheckpoint.__qualname__ = "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        return {p: pickle.dumps([ModelCheckpoint(), 7], p) for p in (2, 3, 4, 5)}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_foreign_objects_are_inert_and_not_imported(foreign, protocol):
    first, rest = read(foreign[protocol])
    assert type(first) is Inert
    assert first.name == "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    assert rest == 7
    assert "pytorch_lightning" not in sys.modules


def test_getattr_of_an_enum_is_inert():
    # a Lightning enum: getattr(Strategy, "best")
    code = b"c__builtin__\ngetattr\n(clightning\nStrategy\n" + text("best") + b"tR."
    assert read(PROTO + code).name == "builtins.getattr"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("__builtin__", "eval"),
        ("builtins", "eval.__call__"),
        ("builtins", "__import__"),
        ("importlib", "import_module"),
        ("os.path", "join"),
        ("torch.hub", "load"),
        ("torch", "hub.load"),
        ("torch.storage", "_load_from_bytes"),
        ("pickle", "loads"),
    ],
)
def test_attacks_are_refused_by_name(module, name, tmp_path):
    marker = tmp_path / "marker"
    call = b"(" + text(f"touch {marker}") + b"tR"
    pair = f"{module}\n{name}\n".encode()
    for code in (
        b"c" + pair + call,
        text(module) + text(name) + b"\x93" + call,
        b"(" + text(f"touch {marker}") + b"i" + pair,
        b"(c" + pair + text(f"touch {marker}") + b"o",
    ):
        beside = b"}(" + text("state_dict") + b"}" + text("junk") + code + b"u."
        with pytest.raises(FormatError) as e:
            read(PROTO + beside)
        assert f"{module.replace('__builtin__', 'builtins')}.{name}" in str(e.value)
        assert "\n" not in str(e.value)
        assert e.value.exit_code == 2
    assert not marker.exists()


# ---- damage and bombs


def sample():
    junk = text("junk") + b"](cfoo\nBar\n)R}" + text("k") + b"K\x01sbN\x88G" + b"?" * 8 + b"e"
    w = tensor((3, 4), (4, 1), extra=[]) + b"r\x00\x01\x00\x00j\x00\x01\x00\x000"
    return PROTO + b"}(" + junk + text("state_dict") + b"}" + text("w") + w + b"su."


def test_every_truncation_is_refused():
    data = sample()
    assert list(find_state_dict(read(data), "m.ckpt").tensors) == ["w"]
    for n in range(len(data)):
        with pytest.raises(FormatError, match=r"^m\.ckpt: its pickle "):
            read(data[:n])


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=500)
def test_flipped_bytes_give_a_value_or_a_format_error(changes):
    data = bytearray(sample())
    for at, byte in changes:
        data[at % len(data)] = byte
    assert "\n" not in refusal(bytes(data))


@given(st.binary(max_size=60))
@settings(deadline=None, max_examples=500)
def test_noise_gives_a_value_or_a_format_error(noise):
    assert "\n" not in refusal(PROTO + noise + b".")


many = 300_000
BOMBS = {
    "memo index": b"Nr\xff\xff\xff\xff.",
    "text length": b"\x8d" + (1 << 62).to_bytes(8, "little") + b"x.",
    "bytes length": b"\x96" + ((1 << 64) - 1).to_bytes(8, "little") + b"x.",
    "frame length": b"\x95" + b"\xff" * 8 + b"N.",
    "deep lists": b"]" * many + b"a" * (many - 1) + b".",
    "deep tuple as a key": b"})" + b"\x85" * many + b"Ns.",
    "marks": b"(" * many + b".",
    "arguments shared by many calls": b"(" + b"N" * many + b"tq\x000"
    + b"ccollections\ndefaultdict\nq\x010"
    + b"h\x01h\x00R0" * many + b".",
    "pairs shared by many mappings": b"](" + b"NN\x86" * many + b"e\x85q\x000"
    + b"ccollections\nOrderedDict\nq\x010" + b"h\x01h\x00R0" * many + b".",
    "integers that collide": b"}("
    + b"".join(b"\x8a\x0c" + (i * ((1 << 61) - 1)).to_bytes(12, "little") + b"N"
               for i in range(many))
    + b"u.",
    "steps": b"N0" * 1_500_000 + b"N.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_cost_neither_time_nor_memory(bomb):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    assert len(refusal(PROTO + BOMBS[bomb])) < 300
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_a_pickle_beyond_the_limit_is_refused():
    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, out):
            out[:] = b"B\xff\xff\x0f\x00"[:1] * len(out)
            return len(out)

    with pytest.raises(FormatError, match="longer than 64 MiB"):
        load(io.BufferedReader(Endless()), "m.ckpt", 1 << 40)
    with pytest.raises(FormatError, match="longer than 64 MiB"):
        read(PROTO + b"B" + MAX_BYTES.to_bytes(4, "little") + bytes(MAX_BYTES) + b".")


@pytest.mark.parametrize(
    "code", [b"\x82\x01.", b"\x97.", b"P1\n.", b"S'x'\n.", b"\x80\x06N.", b"\x80\x00N."]
)
def test_opcodes_and_protocols_that_torch_never_writes(code):
    with pytest.raises(FormatError):
        read(PROTO + code)


# ---- tensors


def test_a_tensor_and_its_storage():
    t = one(tensor((3, 4), (4, 1))).tensors["w"]
    assert (t.dtype, t.offset, t.shape, t.strides) == ("F32", 0, (3, 4), None)
    assert (t.storage.key, t.storage.nbytes, t.storage.start) == ("0", 48, 0)


@pytest.mark.parametrize(
    ("shape", "strides", "kept"),
    [
        ((3, 4), (4, 1), None),
        ((4, 3), (1, 4), (1, 4)),
        ((1, 12), (99, 1), None),  # the stride of a dimension of 1 does not matter
        ((12, 1), (1, 5), None),
        ((3,), (2,), (2,)),
        ((), (), None),
        ((0, 9), (9, 1), None),
        ((5, 2), (0, 1), (0, 1)),
    ],
)
def test_strides_are_kept_where_they_matter(shape, strides, kept):
    t = one(tensor(shape, strides)).tensors["w"]
    assert (t.shape, t.strides) == (shape, kept)


def test_a_storage_that_lay_on_a_gpu():
    t = one(tensor((2,), (1,), of=storage("HalfStorage", module="torch.cuda"))).tensors["w"]
    assert t.dtype == "F16"


def test_an_old_view_of_a_storage():
    view = a_tuple(text("v"), number(2), number(6))
    t = one(tensor((6,), (1,), of=storage("HalfStorage", view=view))).tensors["w"]
    assert (t.dtype, t.storage.nbytes, t.storage.start) == ("F16", 12, 4)
    with pytest.raises(FormatError, match="view beyond"):
        one(tensor((1,), (1,), of=storage(view=a_tuple(text("v"), number(2), number(11)))))


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((13,), (1,), 0),
        ((12,), (1,), 1),
        ((3, 4), (5, 1), 0),
        ((1 << 40, 1 << 40), (0, 0), 0),
        ((1 << 62,), (0,), 0),
        ((-1,), (1,), 0),
        ((2,), (-1,), 3),
        ((2,), (1,), -1),
        ((2, 2), (1,), 0),
        ((1,) * 65, (1,) * 65, 0),
    ],
)
def test_tensors_outside_their_storage_are_refused(shape, strides, offset):
    with pytest.raises(FormatError):
        one(tensor(shape, strides, offset))


@pytest.mark.parametrize(
    "code",
    [
        tensor((1,), (1,), of=b"N"),
        tensor((1,), (1,), of=storage("FooStorage")),
        tensor((1,), (1,), of=storage(module="numpy")),
        tensor((1,), (1,), of=storage(key="0", numel=-1)),
        tensor((1,), (1,), of=storage(numel=1 << 62) + b"0" + storage(numel=2)),
        b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        b"ctorch._utils\n_rebuild_tensor_v3\n(NNNNNNNtR",
        b"NNR",
        text("storage") + b"Q",
    ],
)
def test_malformed_tensors_are_refused(code):
    with pytest.raises(FormatError):
        one(code)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (tensor((1,), (1,), of=storage("QInt8Storage")), "QInt8Storage"),
        (tensor((1,), (1,), of=storage("ComplexDoubleStorage")), "ComplexDoubleStorage"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n)R", "_rebuild_sparse_tensor"),
        (b"ctorch._utils\n_rebuild_qtensor\n)R", "_rebuild_qtensor"),
        (b"ctorch._utils\n_rebuild_wrapper_subclass\n)R", "_rebuild_wrapper_subclass"),
        (tensor((1,), (1,), extra=[b"}" + text("neg") + b"\x88s"]), "negated"),
        (
            tensor(
                (1,), (1,), of=storage("UntypedStorage", module="torch.storage"),
                rebuild="_rebuild_tensor_v3", extra=[b"ctorch\nbits8\n"],
            ),
            "torch.bits8",
        ),
    ],
)  # fmt: skip
def test_tensors_of_other_kinds_are_refused_by_name_in_the_state_dict_only(code, name):
    with pytest.raises(FormatError, match=name):
        one(code)
    beside = PROTO + b"}(" + text("optimizer") + b"}" + text("x") + code + b"s"
    weights = text("w") + tensor((2,), (1,), of=storage(key="1"))
    data = beside + text("state_dict") + b"}" + weights + b"su."
    assert list(find_state_dict(read(data), "m.ckpt").tensors) == ["w"]


def test_parameters_and_tensors_with_attributes():
    data = tensor((2,), (1,))
    hooks = b"ccollections\nOrderedDict\n)R"
    plain = b"ctorch._utils\n_rebuild_parameter\n" + a_tuple(data, b"\x88", hooks) + b"R"
    state = a_tuple(data, b"\x88", hooks, b"}")
    stateful = b"ctorch._utils\n_rebuild_parameter_with_state\n" + state + b"R"
    function, arguments = data[:-1].split(b"\n(", 1)
    typed = (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(" + function + b"\nc%s\n(" + arguments + b"}tR"
    )
    assert one(plain).tensors["w"].shape == (2,)
    assert one(stateful).tensors["w"].shape == (2,)
    assert one(typed % b"torch\nTensor").tensors["w"].shape == (2,)
    with pytest.raises(FormatError, match="Params4bit"):
        one(typed % b"bitsandbytes.nn.modules\nParams4bit")


# ---- the state dict among the rest

W = Tensor(Storage("0", "FloatStorage", 8), "F32", 0, (2,))


@pytest.mark.parametrize(
    ("value", "root"),
    [
        ({"w": W}, ""),
        ({"state_dict": {"w": W}, "epoch": 1}, "state_dict"),
        ({"model": {"w": W}}, "model"),
        ({"module": {"w": W}, "ema": {"v": W}}, "module"),
        ({"params": {"v": W}, "params_ema": {"w": W}}, "params_ema"),
        ({"state_dict": {"model": {"w": W}, "step": 1}}, "state_dict.model"),
        ({"state_dict": {"w": W}, "model": {"v": W}, "t": W}, "state_dict"),
        ({"w": W, "ema": {"v": W}}, ""),
        ({"state_dict": {}, "model": {"w": W}}, "model"),
    ],
)
def test_where_the_state_dict_is_found(value, root):
    found = find_state_dict(value, "m.ckpt")
    assert (list(found.tensors), found.root) == (["w"], root)


def test_metadata_and_notes():
    value = {
        "epoch": 3,
        "global_step": 7,
        "callbacks": Inert("a.B"),
        "metadata": {"a": "b"},
        "state_dict": {"w": W, "step": 1, "name": "x", "nested": {"v": W}},
    }
    found = find_state_dict(value, "m.ckpt")
    assert found.metadata == {"a": "b"}
    assert found.notes == (
        "not tensors in the state dict, ignored: 'step' (int), 'name' (str), 'nested' (dict)",
        "beside the weights, ignored: epoch, global_step, callbacks",
    )
    value["metadata"] = {"a": 1}
    assert find_state_dict(value, "m.ckpt").metadata == {}
    assert "metadata" in find_state_dict(value, "m.ckpt").notes[1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1, 2, 3], r"a list of 3 \(int\)"),
        (W, "tensor"),
        (None, "nothing"),
        ({}, "a mapping of 0"),
        ({"net": {"w": W}, "epoch": 1}, r"a mapping of 2 \('net', 'epoch'\)"),
        (dict.fromkeys("abcdefg", 1), r"'e', \.\.\."),
        (Inert("ldm.models.LatentDiffusion"), "ldm.models.LatentDiffusion"),
        ({1: W}, "key of type int"),
        ({"\ud800": W}, "name that is not text"),
    ],
)
def test_no_state_dict_is_an_error_that_says_what_there_is(value, said):
    with pytest.raises(FormatError, match=said):
        find_state_dict(value, "m.ckpt")


def test_a_mapping_that_holds_itself_under_every_name_ends():
    value = dict.fromkeys(range(100_000))
    value.update(dict.fromkeys(["state_dict", "model", "module", "params", "ema"], value))
    with pytest.raises(FormatError, match="no state dict"):
        find_state_dict(value, "m.ckpt")
