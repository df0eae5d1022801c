"""What a torch pickle says about its tensors, read without running anything in it.

Python's own unpickler is not used, not even with its `find_class` closed: it still sizes its memo
by a number in the file, hashes tuples of any depth in C and calls what lies on its stack. This is
a small machine for the same opcodes (described in Python's `pickletools`) that knows numbers,
text, lists, tuples, mappings and torch's tensor descriptions. Every other name a pickle asks for
becomes an `Inert` object that takes any arguments and does nothing, or, where no model can need
it (`os.system`), a FormatError. No module named in a file is ever imported.

Tensor descriptions follow torch's `torch/_utils.py` (`_rebuild_*`) and `torch/serialization.py`
(`persistent_id`), read in 1.13 to 2.13.
"""

from __future__ import annotations

import math
import pickle as op
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from struct import Struct
from struct import error as StructError
from typing import Any, BinaryIO, NoReturn

from plymix.errors import FormatError, listed
from plymix.formats.base import BITS, TensorInfo

MAX_BYTES = 64 << 20  # of one pickle; those of real checkpoints have less than 5 MB
MAX_STEPS = 2_000_000  # opcodes, and entries copied by them; SDXL with optimizer has 300,000
MAX_RANK = 64  # torch's limit
MAX_NAME = 256
MAX_EXPANDED = 1 << 20  # elements of a tensor that repeats its storage (torch's `expand`)

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
"""torch's storage classes and the dtype of their elements."""

UNTYPED = {"UntypedStorage", "_UntypedStorage"}  # the second is torch 1.11 and 1.12

OPAQUE = {
    "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4, "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1, "ComplexDoubleStorage": 16,
}  # fmt: skip
"""Storage classes that plymix cannot merge or copy, and their bytes per element."""

DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16",
    "half": "F16", "bfloat16": "BF16", "int64": "I64", "long": "I64", "int32": "I32", "int": "I32",
    "int16": "I16", "short": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "cfloat": "C64", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""torch's dtypes by attribute name."""

FORBIDDEN = frozenset({
    "os", "posix", "nt", "subprocess", "sys", "commands", "importlib", "imp", "runpy", "zipimport",
    "pkgutil", "pip", "shutil", "socket", "ctypes", "_ctypes", "pty", "webbrowser", "code",
    "codeop", "pdb", "bdb", "pydoc", "timeit", "pickle", "_pickle",
    "marshal", "builtins.eval", "builtins.exec", "builtins.execfile", "builtins.compile",
    "builtins.open", "builtins.__import__", "builtins.input", "builtins.breakpoint", "torch.hub",
    "torch.load", "torch.jit", "torch.serialization.load", "torch.storage._load_from_bytes",
    "torch.utils.cpp_extension",
})  # fmt: skip
"""Names that run code, load code or touch the system: nothing a model could need."""


@dataclass(frozen=True, slots=True, eq=False)
class Inert:
    """Whatever a pickle asks for that is not read. `tensor`: it stands for a tensor."""

    name: str
    tensor: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of bytes in the file. `start` is the first byte of a view, else 0."""

    key: str
    kind: str  # torch's class name
    nbytes: int
    start: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor as a pickle describes it, within its storage; checked. Numbers are in elements.

    `dtype` is the safetensors name; `strides` is None when it is contiguous.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Unpickled:
    """A pickle's object, the storages it mentions by key, and the bytes it took."""

    value: Any
    storages: Mapping[str, Storage]
    nbytes: int


def load(stream: BinaryIO, file: str, nbytes: int = MAX_BYTES) -> Unpickled:
    """Read one pickle (protocols 2 to 5) from `stream`, which has `nbytes` left.

    Raises FormatError, naming `file`, for a pickle that is damaged, oversized or hostile.
    """
    machine = _Machine(stream, file, min(nbytes, MAX_BYTES))
    value = machine.run()
    return Unpickled(value, machine.storages, machine.taken)


class _Machine:
    """The pickle machine: a stack, the stacks below its open marks, and a memo."""

    def __init__(self, stream: BinaryIO, file: str, limit: int) -> None:
        self.stream = stream
        self.file = file
        self.limit = limit
        self.taken = 0
        self.steps = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        try:
            while True:
                code = self.take(1)
                if code == op.STOP:
                    return self.stack.pop()
                self.spend(1)
                if code not in OPCODES:
                    self.refuse(f"uses opcode 0x{code[0]:02x}, which torch never writes")
                OPCODES[code](self)
        # a stack too short, a memo entry missing, a value of the wrong kind or out of range
        except (LookupError, TypeError, ValueError, AttributeError, StructError):
            self.refuse(f"is damaged near byte {self.taken:,}")

    def refuse(self, why: str) -> NoReturn:
        raise FormatError(f"{self.file}: its pickle {why}; fetch the file again") from None

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            self.refuse(f"takes more than {MAX_STEPS:,} steps, which no model needs")

    def take(self, n: int) -> bytes:
        self.taken += n
        data = self.stream.read(n) if self.taken <= self.limit else b""
        if len(data) < n:
            if self.taken > self.limit == MAX_BYTES:
                self.refuse(f"is longer than {MAX_BYTES >> 20} MiB, which no model needs")
            self.refuse("ends too soon: the file is truncated")
        return data

    def line(self) -> str:
        text = self.stream.readline(MAX_NAME + 1)
        self.taken += len(text)
        if not text.endswith(b"\n"):
            raise ValueError("a line without end")
        return text[:-1].decode("utf-8")

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def get_global(self, module: str, attribute: str) -> None:
        """Push the inert stand-in for `module.attribute`, or refuse it."""
        name = f"{'builtins' if module == '__builtin__' else module}.{attribute}"
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError("not a name")
        parts = name.split(".")
        if any(".".join(parts[:n]) in FORBIDDEN for n in range(1, len(parts) + 1)):
            raise FormatError(
                f"{self.file}: its pickle asks for {name}, which no model needs: this is an attack"
                " or a damaged file. Nothing in it was run; do not use it"
            )
        self.stack.append(Inert(name, _names_tensor(parts)))

    def call(self) -> None:
        """(..., callable, arguments) -> (..., what it gives)"""
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Inert or type(arguments) is not tuple:
            raise TypeError("a call of something that cannot be called")
        self.spend(len(arguments))  # one tuple may be the arguments of many calls
        known = CALLS.get(function.name)
        self.stack.append(known(self, *arguments) if known else function)

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Inert:
            raise TypeError("append to something else than a list")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_key(key)] = value
        elif type(target) is not Inert:
            raise TypeError("items for something else than a mapping")

    def persistent(self) -> None:
        """Push the storage that a persistent id describes."""
        pid = self.stack.pop()
        if type(pid) is not tuple:
            raise TypeError("not a persistent id")
        if pid[0] == "module":  # class and source of a pickled nn.Module, before torch 1.6
            self.stack.append(pid[1])
            return
        tag, kind, key, _location, numel = pid[:5]
        view = pid[5] if len(pid) > 5 else None
        if tag != "storage" or type(key) is not str or type(kind) is not Inert:
            raise ValueError("not a storage")
        library, _, class_name = kind.name.rpartition(".")
        size = element_size(class_name) if library.split(".")[0] == "torch" else 0
        if not size:
            self.refuse(f"has a storage of the unknown kind {kind.name}")
        storage = Storage(key, class_name, _natural(numel) * size)
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            self.refuse(f"gives storage {key[:80]!r} two sizes")
        if view is not None:  # in the old format: (key, first element, elements)
            _, first, length = view
            if _natural(first) + _natural(length) > numel:
                self.refuse(f"has a view beyond the end of storage {key[:80]!r}")
            storage = Storage(key, class_name, length * size, first * size)
        self.stack.append(storage)


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("not a size")
    return value


def element_size(storage_class: str) -> int:
    """Bytes per element, 0 for an unknown class."""
    if storage_class in STORAGES:
        return BITS[STORAGES[storage_class]] // 8
    return 1 if storage_class in UNTYPED else OPAQUE.get(storage_class, 0)


def _key(key: Any) -> Any:
    """`key` where it is safe to hash; a stand-in where not.

    Deep tuples overflow the C stack and integers beyond 64 bits can be made to collide.
    """
    if type(key) in (str, bytes, bool, float) or key is None:
        return key
    if type(key) is int and -(1 << 63) <= key < 1 << 64:
        return key
    return Inert("key")


# ---- what torch's names give when they are called


def _names_tensor(parts: list[str]) -> bool:
    """Whether a global stands for a tensor (of any kind) when it is called."""
    last = parts[-1]
    return parts[0] == "torch" and (
        "_rebuild" in last or last in ("Parameter", "Buffer", "Variable") or last.endswith("Tensor")
    )


def _mapping(machine: _Machine, pairs: Any = (), *_: Any) -> dict[Any, Any]:
    """OrderedDict as Python 3 pickles it (no arguments) and Python 2 (a list of pairs)."""
    if type(pairs) is not list:
        return {}
    machine.spend(len(pairs))
    return {_key(key): value for key, value in pairs}


def _default_mapping(_machine: _Machine, *_: Any) -> dict[Any, Any]:
    return {}


def _size(_machine: _Machine, shape: Any = ()) -> Any:
    return shape


def _first(_machine: _Machine, data: Any, *_: Any) -> Any:
    return data


def _tensor_v2(machine: _Machine, storage: Any, *rest: Any) -> Tensor | Inert:
    """`_rebuild_tensor(storage, offset, shape, strides)`; v2 adds grad, hooks and metadata."""
    dtype = "U8" if storage.kind in UNTYPED else STORAGES.get(storage.kind)
    if dtype is None:
        return Inert(f"torch.{storage.kind}", tensor=True)
    offset, shape, strides = rest[:3]
    return _tensor(machine, storage, dtype, offset, shape, strides, lazy=any(rest[5:]))


def _tensor_v3(machine: _Machine, storage: Any, *rest: Any) -> Tensor | Inert:
    """As v2 with a dtype before the metadata, for dtypes without a storage class of their own."""
    dtype = rest[5].name
    known = DTYPES.get(dtype.removeprefix("torch."))
    if known is None:
        return Inert(dtype, tensor=True)
    offset, shape, strides = rest[:3]
    return _tensor(machine, storage, known, offset, shape, strides, lazy=any(rest[6:]))


def _tensor(
    machine: _Machine, storage: Any, dtype: str, offset: Any, shape: Any, strides: Any, lazy: bool
) -> Tensor | Inert:
    if lazy:  # metadata {"conj": True} or {"neg": True}: the bytes are not the values
        return Inert("a lazily conjugated or negated tensor", tensor=True)
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise TypeError("not a tensor's description")
    if len(shape) != len(strides) or len(shape) > MAX_RANK:
        raise ValueError("shape and strides differ in length")
    held = storage.nbytes * 8 // BITS[dtype]
    numel = math.prod(map(_natural, shape))
    reach = sum((d - 1) * _natural(s) for d, s in zip(shape, strides, strict=True))
    if numel == 0:
        return Tensor(storage, dtype, 0, shape)
    if _natural(offset) + reach >= held:
        machine.refuse(f"has a tensor beyond the end of storage {storage.key[:80]!r}")
    if numel > max(held, MAX_EXPANDED):
        machine.refuse(f"blows a storage of {held:,} elements up to a tensor of {numel:,}")
    return Tensor(storage, dtype, offset, shape, _unless_contiguous(shape, strides))


def _unless_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    row = 1
    for d, s in zip(reversed(shape), reversed(strides), strict=True):
        if d != 1 and s != row:
            return strides
        row *= d
    return None


TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}


def _from_type(machine: _Machine, function: Any, type_: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with Python attributes, or of a subclass; only the former's bytes are plain."""
    plain = type_.name in ("torch.Tensor", "torch.nn.parameter.Parameter")
    if not plain or function.name not in TENSORS:
        return Inert(type_.name, tensor=True)
    machine.spend(len(arguments))
    return TENSORS[function.name](machine, *arguments)


CALLS: dict[str, Callable[..., Any]] = {
    **TENSORS,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.tensor._rebuild_from_type_v2": _from_type,  # its place before torch 1.9
    "torch.Size": _size,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _default_mapping,
    "builtins.dict": _mapping,
}
"""The only names that do something when they are called, and what."""


# ---- opcodes


Step = Callable[[_Machine], None]


def _push(value: Any) -> Step:
    return lambda m: m.stack.append(value)


def _push_new(make: Callable[[], Any]) -> Step:
    return lambda m: m.stack.append(make())


def _number(layout: str) -> Step:
    packed = Struct(layout)
    return lambda m: m.stack.append(packed.unpack(m.take(packed.size))[0])


def _sized(layout: str, decode: Callable[[bytes], Any]) -> Step:
    """A length, then as many bytes."""
    packed = Struct(layout)
    return lambda m: m.stack.append(decode(m.take(packed.unpack(m.take(packed.size))[0])))


def _put(layout: str) -> Step:
    packed = Struct(layout)

    def put(m: _Machine) -> None:
        m.memo[packed.unpack(m.take(packed.size))[0]] = m.stack[-1]

    return put


def _get(layout: str) -> Step:
    packed = Struct(layout)
    return lambda m: m.stack.append(m.memo[packed.unpack(m.take(packed.size))[0]])


def _tuple(n: int) -> Step:
    def build(m: _Machine) -> None:
        if len(m.stack) < n:
            raise ValueError("stack too short")
        m.stack[-n:] = [tuple(m.stack[-n:])]

    return build


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _python2_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _mark(m: _Machine) -> None:
    m.below.append(m.stack)
    m.stack = []


def _pop(m: _Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _decimal(m: _Machine) -> None:
    """Python 2 wrote integers beyond 32 bits as text."""
    text = m.line()
    m.stack.append({"00": False, "01": True}[text] if text in ("00", "01") else int(text))


def _set_item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items([key, value])


def _set_items(m: _Machine) -> None:
    m.set_items(m.pop_mark())


def _new_dict(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append({})
    m.set_items(items)


def _append(m: _Machine) -> None:
    m.append([m.stack.pop()])


def _add_items(m: _Machine) -> None:
    items = m.pop_mark()
    if type(m.stack[-1]) is not Inert:
        raise TypeError(f"{len(items)} items for something else than a set")


def _frozen_set(m: _Machine) -> None:
    m.pop_mark()
    m.stack.append(Inert("builtins.frozenset"))


def _global(m: _Machine) -> None:
    m.get_global(m.line(), m.line())


def _stack_global(m: _Machine) -> None:
    attribute, module = m.stack.pop(), m.stack.pop()
    if type(attribute) is not str or type(module) is not str:
        raise TypeError("a name that is not text")
    m.get_global(module, attribute)


def _instance(m: _Machine) -> None:
    """INST: the class is named in the opcode, its arguments follow the mark."""
    arguments = tuple(m.pop_mark())
    _global(m)
    m.stack.append(arguments)
    m.call()


def _object(m: _Machine) -> None:
    """OBJ: class and arguments follow the mark."""
    function, *arguments = m.pop_mark()
    m.stack += [function, tuple(arguments)]
    m.call()


def _new_object_ex(m: _Machine) -> None:
    m.stack.pop()  # keyword arguments: no class read here has any
    m.call()


def _build(m: _Machine) -> None:
    """Attributes (an OrderedDict's `_metadata`, an object's state) are not read."""
    m.stack.pop()
    if not m.stack:
        raise IndexError("state for nothing")


OPCODES: dict[bytes, Step] = {
    op.PROTO: lambda m: _check_protocol(m, m.take(1)[0]),
    op.FRAME: lambda m: _ignore(m.take(8)),
    op.MARK: _mark,
    op.POP: _pop,
    op.POP_MARK: lambda m: _ignore(m.pop_mark()),
    op.DUP: lambda m: m.stack.append(m.stack[-1]),
    op.NONE: _push(None),
    op.NEWTRUE: _push(True),
    op.NEWFALSE: _push(False),
    op.EMPTY_TUPLE: _push(()),
    op.EMPTY_LIST: _push_new(list),
    op.EMPTY_DICT: _push_new(dict),
    op.EMPTY_SET: _push(Inert("builtins.set")),
    op.BININT: _number("<i"),
    op.BININT1: _number("<B"),
    op.BININT2: _number("<H"),
    op.BINFLOAT: _number(">d"),
    op.INT: _decimal,
    op.LONG1: _sized("<B", _integer),
    op.LONG4: _sized("<I", _integer),
    op.SHORT_BINUNICODE: _sized("<B", _utf8),
    op.BINUNICODE: _sized("<I", _utf8),
    op.BINUNICODE8: _sized("<Q", _utf8),
    op.SHORT_BINSTRING: _sized("<B", _python2_text),
    op.BINSTRING: _sized("<I", _python2_text),
    op.SHORT_BINBYTES: _sized("<B", bytes),
    op.BINBYTES: _sized("<I", bytes),
    op.BINBYTES8: _sized("<Q", bytes),
    op.BYTEARRAY8: _sized("<Q", bytes),
    op.TUPLE1: _tuple(1),
    op.TUPLE2: _tuple(2),
    op.TUPLE3: _tuple(3),
    op.TUPLE: lambda m: _push(tuple(m.pop_mark()))(m),
    op.LIST: lambda m: _push(m.pop_mark())(m),
    op.DICT: _new_dict,
    op.FROZENSET: _frozen_set,
    op.APPEND: _append,
    op.APPENDS: lambda m: m.append(m.pop_mark()),
    op.SETITEM: _set_item,
    op.SETITEMS: _set_items,
    op.ADDITEMS: _add_items,
    op.BINPUT: _put("<B"),
    op.LONG_BINPUT: _put("<I"),
    op.MEMOIZE: _memoize,
    op.BINGET: _get("<B"),
    op.LONG_BINGET: _get("<I"),
    op.GLOBAL: _global,
    op.STACK_GLOBAL: _stack_global,
    op.REDUCE: _Machine.call,
    op.NEWOBJ: _Machine.call,
    op.NEWOBJ_EX: _new_object_ex,
    op.INST: _instance,
    op.OBJ: _object,
    op.BUILD: _build,
    op.BINPERSID: _Machine.persistent,
}
"""Protocol 2 to 5 without what a torch file never has: extension codes and outside buffers."""


def _ignore(_: object) -> None:
    """Drop what an opcode carries (a frame's length, items below a mark)."""


def _check_protocol(m: _Machine, protocol: int) -> None:
    if not 2 <= protocol <= 5:
        m.refuse(f"has protocol {protocol}; 2 to 5 are read")


# ---- from a pickle's object to a state dict

ROOTS = (
    "state_dict", "model_state_dict", "model", "module",
    "params_ema", "params", "ema", "ema_state_dict",
)  # fmt: skip
"""Names under which trainers put a model's tensors; the first that holds any is taken."""


@dataclass(frozen=True)
class StateDict:
    """A model's tensors by name; `root`: what they were nested under ("state_dict", "a.b", "")."""

    tensors: Mapping[str, Tensor]
    root: str
    metadata: Mapping[str, str]
    notes: tuple[str, ...]


def find_state_dict(value: Any, file: str) -> StateDict:
    """The model in what a checkpoint's pickle holds. Raises FormatError when there is none.

    A mapping of text to text called "metadata" beside the tensors' mapping is the model's
    metadata. Whatever else lies around is named in `notes`.
    """
    found = _descend(value, (), set())
    if found is None:
        raise FormatError(
            f"{file} holds no state dict (a mapping of names to tensors) but {_described(value)};"
            " save the model's state_dict()"
        )
    mapping, path = found
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    for key, entry in mapping.items():
        if type(entry) is Inert and entry.tensor:
            raise FormatError(
                f"{file}: {_shown(key)} is {entry.name}, a kind of tensor that plymix cannot read;"
                " save it as a plain dense tensor"
            )
        if type(entry) is not Tensor:
            others.append(f"{_shown(key)} ({_kind(entry)})")
        elif type(key) is not str or not _encodable(key):
            raise FormatError(f"{file}: the tensor {_shown(key)} has a name that is not text")
        else:
            tensors[key] = entry
    notes = [f"not tensors in the state dict, ignored: {listed(others)}"] if others else []
    metadata: dict[str, str] = {}
    beside: list[str] = []
    level = value
    for depth, root in enumerate(path):
        for key, entry in level.items():
            if depth == 0 and key == "metadata" and _is_metadata(entry):
                metadata = entry
            elif key != root:
                beside.append(_shown(key, quoted=False))
        level = level[root]
    if beside:
        notes.append(f"beside the weights, ignored: {listed(beside)}")
    return StateDict(tensors, ".".join(path), metadata, tuple(notes))


def _descend(
    value: Any, path: tuple[str, ...], seen: set[int]
) -> tuple[dict[Any, Any], tuple[str, ...]] | None:
    """The mapping that holds the tensors, and the names that lead to it."""
    if type(value) is not dict or id(value) in seen:
        return None
    seen.add(id(value))  # each mapping is looked through once, however often it is referred to
    has_tensors = any(_is_tensor(v) for v in value.values())
    for root in ROOTS[: 1 if has_tensors else None]:
        found = _descend(value.get(root), (*path, root), seen) if len(path) < 4 else None
        if found:
            return found
    return (value, path) if has_tensors else None


def _is_tensor(value: Any) -> bool:
    return type(value) is Tensor or (type(value) is Inert and value.tensor)


def _is_metadata(value: Any) -> bool:
    return type(value) is dict and all(
        type(k) is str and type(v) is str and _encodable(k + v) for k, v in value.items()
    )


def _encodable(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _shown(key: Any, *, quoted: bool = True) -> str:
    if type(key) is not str:
        return f"a key of type {_kind(key)}"
    return key if not quoted and key.isprintable() and len(key) <= 80 else repr(key[:80])


def _described(value: Any) -> str:
    """A few words on what something is, for messages."""
    if type(value) is dict:
        keys = [_shown(k) for k in islice(value, 6)]
        return f"a mapping of {len(value)} ({', '.join([*keys[:5], '...'][: len(keys)])})"
    if type(value) in (list, tuple):
        kinds = sorted(set(map(_kind, value)))
        return f"a {type(value).__name__} of {len(value)} ({listed(kinds, 3)})"
    return _kind(value)


def _kind(value: Any) -> str:
    if type(value) is Inert:
        return value.name
    return "nothing" if value is None else type(value).__name__.lower()


def damaged(file: str, what: str) -> FormatError:
    return FormatError(f"{file} is not a sound torch checkpoint: {what}; fetch it again")


def tensor_infos(found: StateDict, start: Callable[[Storage], int]) -> dict[str, TensorInfo]:
    """The tensors by name, where `start` gives the byte of the file at which a storage begins."""
    return {
        name: TensorInfo(
            name,
            t.dtype,
            t.shape,
            start(t.storage) + t.storage.start + t.offset * BITS[t.dtype] // 8,
            strides=t.strides,
        )
        for name, t in found.tensors.items()
    }
