"""What one tensor of the result is made of: small frozen values that compare by content.

Together they are a graph: what several steps use is one object, which is computed once.

    Leaf   a tensor of an input file
    Sum    sum of coefficient x expression; every nest of linear methods folds into one
    Call   a method that is not linear, applied to expressions
    Patch  the first input channels of a wide tensor replaced by an expression
    Narrow the first input channels of an expression
    Spelt  an expression as another dialect stores it: rows, transposed, reshaped
    Delta  what a module of a LoRA, or the like, adds to a tensor
    Const  bytes known at planning time

`Tensor` joins such a value with its place in the output.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Union

from plymix.formats.base import BITS, TensorInfo
from plymix.registry import Method, get_method

ROWS = 96
"""Rows of a product of matrices that are worth computing at a time. To make the right factor ready
for it costs the same for any number: of a convolution's rows, ten at a time take twice as long."""

MOST = 1 << 20
"""Elements that so many rows may have: each worker holds as many."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """Tensor `info` of input number `source`."""

    source: int
    info: TensorInfo

    def __hash__(self) -> int:  # plans hash leaves by the ten thousand
        return hash((self.source, self.info.name))


@dataclass(frozen=True, slots=True)
class Sum:
    """sum(coefficient * expression), of one term or more."""

    terms: tuple[tuple[float, Expr], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """`method(*args, **params)` at the tensor with the canonical name `key`.

    `models` are the positions of `args` among the step's inputs (they differ where a model lacks
    the tensor); random draws are seeded by (`seed`, `key`, position). `step` names the recipe's
    step, whose `prepare` state the engine keeps.
    """

    step: str
    method: str
    args: tuple[Expr, ...]
    params: tuple[tuple[str, Any], ...]
    key: str
    seed: int
    models: tuple[int, ...]
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        said = (self.step, self.method, self.args, self.params, self.key, self.seed, self.models)
        object.__setattr__(self, "_hash", hash(said))  # once: calls nest, and share their inputs

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Call):
            return self is other
        return self._hash == other._hash and same(self, other)


@dataclass(frozen=True, slots=True)
class Patch:
    """`wide` with its first `channels` entries of axis 1 taken from `inner`."""

    wide: Expr
    inner: Expr
    channels: int


@dataclass(frozen=True, slots=True)
class Narrow:
    """`wide` with only its first `channels` entries of axis 1."""

    wide: Expr
    channels: int


SeenPart = tuple["tuple[int, int] | None", bool, "tuple[int, ...] | None"]
"""Of a tensor: rows or None for all, whether its axes are swapped, its shape or None for as it is.
"""


@dataclass(frozen=True, slots=True)
class Spelt:
    """Pieces of `whole`, one after the other along axis 0."""

    whole: Expr
    pieces: tuple[SeenPart, ...]


@dataclass(frozen=True, slots=True)
class Const:
    """A tensor known at planning time."""

    data: bytes
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What a module of an adapter adds to a tensor of `shape`, at strength 1.

    `family` says how (`plymix.adapters.families`), from `factors` and `settings` by its names for
    them, times `scale`. The module's own weight has the shape `seen` and is `pieces` of the tensor,
    one after the other along axis 0 (none: the whole). `of` is the tensor it is added to, for what
    depends on it. `span` are the elements meant, in a line (None: all).
    """

    family: str
    factors: tuple[tuple[str, Leaf], ...]
    settings: tuple[tuple[str, Any], ...]
    scale: float
    shape: tuple[int, ...]
    seen: tuple[int, ...]
    pieces: tuple[SeenPart, ...] = ()
    of: Expr | None = None
    span: tuple[int, int] | None = None

    @property
    def source(self) -> int:
        return self.factors[0][1].source

    def grain(self, about: int) -> int:
        """Elements of as many whole rows as `about` elements are: ROWS where those would be fewer,
        if they are not too long for that, and one at least."""
        row = max(1, math.prod(self.shape[1:]))
        return max(1, about // row, min(ROWS, MOST // row)) * row


Expr = Union[Leaf, Sum, Call, Patch, Narrow, Spelt, Const, Delta]


def children(expr: Expr) -> tuple[Expr, ...]:
    """The expressions that the value of `expr` is computed from. Factors of a Delta are its own."""
    match expr:
        case Sum():
            return tuple(term for _, term in expr.terms)
        case Call():
            return expr.args
        case Patch():
            return expr.wide, expr.inner
        case Narrow():
            return (expr.wide,)
        case Spelt():
            return (expr.whole,)
        case Delta(of=of) if of is not None:
            return (of,)
    return ()


def nodes(expr: Expr) -> Iterator[Expr]:
    """`expr` and all that it is made of, each object once and after its children.

    Steps that are used twice, level upon level, have as many paths to them as two to the power of
    the levels; and nests are deeper than Python's stack.
    """
    seen: set[int] = set()
    stack = [expr]
    while stack:
        node, todo = stack[-1], []
        if id(node) not in seen:
            for child in children(node):
                if id(child) in seen:
                    continue
                if isinstance(child, Leaf):  # most are: the short way
                    seen.add(id(child))
                    yield child
                else:
                    todo.append(child)
        if todo:
            stack += reversed(todo)
            continue
        stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node


def leaves(expr: Expr) -> Iterator[Leaf]:
    """Every Leaf in `expr`, factors of Deltas among them."""
    for node in nodes(expr):
        if isinstance(node, Leaf):
            yield node
        elif isinstance(node, Delta):
            yield from (leaf for _, leaf in node.factors)


def calls(expr: Expr) -> Iterator[Call]:
    """Every Call in `expr`, inner ones first."""
    return (node for node in nodes(expr) if isinstance(node, Call))


def deltas(expr: Expr) -> Iterator[Delta]:
    """Every Delta in `expr`."""
    return (node for node in nodes(expr) if isinstance(node, Delta))


def computed(expr: Expr) -> tuple[list[Expr], Counter[int]]:
    """The nodes of `expr` that are computed from others, in order; by their ids, how often each
    node's value is used."""
    inner = [node for node in nodes(expr) if children(node)]
    return inner, Counter(id(child) for node in inner for child in children(node))


def waiting(expr: Expr) -> Iterator[tuple[Expr, int]]:
    """The nodes that are computed, in order, and how many results wait for others meanwhile."""
    inner, uses = computed(expr)
    kept: set[int] = set()
    for node in inner:
        own = {id(child) for child in children(node)}
        yield node, len(kept - own)
        uses.subtract(map(id, children(node)))
        kept = {known for known in kept if uses[known]} | {id(node)}


def leaf_terms(expr: Expr) -> tuple[tuple[float, Leaf], ...]:
    """The terms of a sum of tensors, or () when `expr` is not one."""
    if isinstance(expr, Leaf):
        return ((1.0, expr),)
    if not isinstance(expr, Sum):
        return ()
    found = [(c, x) for c, x in expr.terms if isinstance(x, Leaf)]
    return tuple(found) if len(found) == len(expr.terms) else ()


def shares(expr: Expr) -> tuple[tuple[float, int], ...]:
    """(coefficient, input) of each term of a sum of tensors and Deltas, or () for another."""
    terms = expr.terms if isinstance(expr, Sum) else ((1.0, expr),)
    found = tuple((c, x.source) for c, x in terms if isinstance(x, (Leaf, Delta)))
    return found if len(found) == len(terms) else ()


def plain_terms(expr: Expr) -> tuple[tuple[float, Leaf], ...]:
    """The terms of a sum of tensors that all lie in order, or () when `expr` is not one."""
    terms = leaf_terms(expr)
    return () if any(leaf.info.scattered for _, leaf in terms) else terms


def elementwise(expr: Expr) -> bool:
    """Whether every element of `expr` depends on the same element of its inputs only."""
    return _streams(expr) and not any(True for _ in deltas(expr))


def chunkable(expr: Expr) -> bool:
    """Whether any run of its elements can be computed alone, all inputs lying in order."""
    return _streams(expr) and not any(leaf.info.scattered for leaf in streamed(expr))


def _streams(expr: Expr) -> bool:
    return all(map(_is_streamed, nodes(expr)))


def _is_streamed(node: Expr) -> bool:
    """Whether a node's value is element by element its children's."""
    if isinstance(node, Call):
        return get_method(node.method).kind in ("linear", "elementwise")
    return isinstance(node, (Leaf, Sum)) or (isinstance(node, Delta) and node.of is None)


def streamed(expr: Expr) -> Iterator[Leaf]:
    """The leaves of a chunkable expression that are read along with it: no factors of a Delta."""
    return (node for node in nodes(expr) if isinstance(node, Leaf))


def cut(expr: Expr, start: int, stop: int) -> Expr:
    """Elements [start, stop) of a chunkable expression, which lie in one piece in every input."""
    return mapped(expr, lambda info: info.cut(start, stop), (start, stop))


def mapped(
    expr: Expr,
    change: Callable[[TensorInfo], TensorInfo],
    span: tuple[int, int] | None = None,
) -> Expr:
    """An elementwise expression with every input changed in the same way.

    `span` are the elements meant in every Delta, if there is one.
    """

    def at(node: Expr) -> Expr:
        match node:
            case Leaf(source, info):
                return Leaf(source, change(info))
            case Delta() if span is not None:
                return replace(node, span=span)
            case Sum() | Call():
                return node
        raise AssertionError(f"{type(node).__name__} is not elementwise")

    return _rewritten(expr, at)


def with_leaves(expr: Expr, change: Callable[[Leaf], Leaf]) -> Expr:
    """`expr` with every Leaf replaced by what `change` makes of it."""

    def at(node: Expr) -> Expr:
        match node:
            case Leaf():
                return change(node)
            case Delta():
                return replace(node, factors=tuple((n, change(x)) for n, x in node.factors))
        return node

    return _rewritten(expr, at)


def _rewritten(expr: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """`expr` with every node, made of its new children, replaced by what `change` makes of it."""
    new: dict[int, Expr] = {}
    for node in nodes(expr):
        new[id(node)] = change(_made_of(node, [new[id(child)] for child in children(node)]))
    return new[id(expr)]


def _made_of(expr: Expr, new: Sequence[Expr]) -> Expr:
    """`expr` with other children."""
    match expr:
        case Sum():
            return Sum(tuple((c, x) for (c, _), x in zip(expr.terms, new, strict=True)))
        case Call():
            return replace(expr, args=tuple(new))
        case Patch():
            return Patch(new[0], new[1], expr.channels)
        case Narrow():
            return Narrow(new[0], expr.channels)
        case Spelt():
            return Spelt(new[0], expr.pieces)
        case Delta() if expr.of is not None:
            return replace(expr, of=new[0])
    return expr


def same(a: Expr, b: Expr) -> bool:
    """Whether two expressions say the same.

    Every distinct content gets a number, told by the node's own fields and its children's numbers.
    """
    numbers: dict[Any, int] = {}

    def number(expr: Expr) -> int:
        found: dict[int, int] = {}
        for node in nodes(expr):
            below = tuple(found[id(child)] for child in children(node))
            found[id(node)] = numbers.setdefault((_own(node), below), len(numbers))
        return found[id(expr)]

    return number(a) == number(b)


def _own(node: Expr) -> Any:
    """What a node says, but for its children."""
    match node:
        case Call():
            said = (node.step, node.method, node.params, node.key, node.seed, node.models)
            return Call, said
        case Sum():
            return Sum, tuple(c for c, _ in node.terms)
        case Patch() | Narrow():
            return type(node), node.channels
        case Spelt():
            return Spelt, node.pieces
        case Delta():
            return replace(node, of=None)
    return node


def narrow(expr: Expr, channels: int) -> Expr:
    """The first `channels` entries of axis 1 of `expr`, read as such where that is possible."""
    match expr:
        case Leaf(source, info) if info.strides is None and not info.parts:
            strides = tuple(math.prod(info.shape[i + 1 :]) for i in range(len(info.shape)))
            shape = (info.shape[0], channels, *info.shape[2:])
            return Leaf(source, replace(info, shape=shape, strides=strides))
        case Sum():
            return Sum(tuple((c, narrow(term, channels)) for c, term in expr.terms))
        case Patch() if expr.channels == channels:
            return expr.inner
    return Narrow(expr, channels)


def patched(wide: Expr, inner: Expr, channels: int) -> Patch:
    """`wide` with its first `channels` entries of axis 1 taken from `inner`."""
    while isinstance(wide, Patch) and wide.channels == channels:
        wide = wide.wide  # what was put there before is covered
    return Patch(wide, inner, channels)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the output: its name there, where its bytes go, what they are made of.

    With `encoding` the file packs it where it suits. With `noise`, a (seed, key), it is rounded up
    or down by chance. `first` is the index of its first element in the whole, if it is a part.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    expr: Expr
    offset: int = 0
    encoding: str = ""
    noise: tuple[int, str] | None = None
    first: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * BITS[self.dtype] // 8


def numbered(tensors: Sequence[Tensor], numbers: Mapping[int, int]) -> tuple[Tensor, ...]:
    """`tensors` with the number of every source replaced."""
    if all(a == b for a, b in numbers.items()):
        return tuple(tensors)

    def change(leaf: Leaf) -> Leaf:
        return Leaf(numbers[leaf.source], leaf.info)

    return tuple(replace(t, expr=with_leaves(t.expr, change)) for t in tensors)


def changed(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[str, ...]:
    """Names of the tensors in `after` whose values may differ from those in `before`, in order.

    Both number their sources alike. What a method's `prepare` learns from all tensors of a step
    counts for each: where one of them differs, they all do.
    """
    old, new = {t.name: t for t in before}, {t.name: t for t in after}
    names = {n for n, t in new.items() if n not in old or not _alike(old[n], t)}
    differing = [t for n, t in (*old.items(), *new.items()) if n in names or n not in new]
    steps = frozenset[str]().union(*(_prepared(t.expr) for t in differing))
    if steps:
        names |= {n for n, t in new.items() if not steps.isdisjoint(_prepared(t.expr))}
    return tuple(n for n in new if n in names)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one name have the same bytes, wherever they stand."""
    ours, theirs = ((t.expr, t.dtype, t.shape, t.encoding, t.noise) for t in (a, b))
    return ours == theirs


def _prepared(expr: Expr) -> frozenset[str]:
    """The steps in `expr` whose method has a first pass over all tensors."""
    return frozenset(c.step for c in calls(expr) if get_method(c.method).prepare is not None)


class Linear:
    """A linear expression that adds and scales like a tensor does.

    The planner hands these to the very functions that the engine hands arrays, so a linear method
    is written once. Terms are expressions, or what stands for them; coefficients are Python floats.
    """

    def __init__(self, terms: Mapping[Any, float]) -> None:
        self.terms = dict(terms)

    @classmethod
    def of(cls, expr: Expr) -> Linear:
        if isinstance(expr, Sum):
            return cls({term: c for c, term in expr.terms})
        return cls({expr: 1.0})

    def expr(self) -> Expr:
        """The folded expression: zero terms dropped, a lone term of weight 1 unwrapped.

        Where nothing is left, one term of weight 0 stays, for the shape.
        """
        terms: tuple[tuple[float, Expr], ...]
        terms = tuple((c, e) for e, c in self.terms.items() if c != 0.0)
        terms = terms or ((0.0, next(iter(self.terms))),)
        if len(terms) == 1 and terms[0][0] == 1.0:
            return terms[0][1]
        return Sum(terms)

    def __add__(self, other: Linear | float) -> Linear:
        if not isinstance(other, Linear):
            if other == 0:  # lets `sum(models)` start at 0
                return self
            return NotImplemented
        total = dict(self.terms)
        for e, c in other.terms.items():
            total[e] = total.get(e, 0.0) + c
        return Linear(total)

    __radd__ = __add__

    def __sub__(self, other: Linear) -> Linear:
        return self + other * -1.0

    def __neg__(self) -> Linear:
        return self * -1.0

    def __mul__(self, factor: float) -> Linear:
        return Linear({e: c * float(factor) for e, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Linear:
        return Linear({e: c / float(divisor) for e, c in self.terms.items()})


def folded(
    method: Method,
    args: Sequence[Expr],
    params: tuple[tuple[str, Any], ...],
    models: tuple[int, ...],
) -> Expr:
    """A linear `method` on `args` as one sum. The rest is as in a `Call`."""
    factors = _factors(method.function, _left_out(method, models), len(args), params)
    total: dict[Expr, float] = {}
    for arg, factor in zip(args, factors, strict=True):
        for c, term in arg.terms if isinstance(arg, Sum) else ((1.0, arg),):
            total[term] = total.get(term, 0.0) + c * factor
    return Linear(total).expr()


@lru_cache(maxsize=1024)
def _factors(
    function: Callable[..., Linear], left_out: int, count: int, params: tuple[tuple[str, Any], ...]
) -> tuple[float, ...]:
    """What a linear method multiplies each of its `count` inputs by, learned from itself."""
    symbols = [Linear({i: 1.0}) for i in range(count)]
    result = function(*[None] * left_out, *symbols, **dict(params))
    return tuple(result.terms.get(i, 0.0) for i in range(count))


def positional(method: Method, args: Sequence[Any], models: tuple[int, ...]) -> list[Any]:
    """`args` as `method` takes them: None stands for an optional model left out before `*models`.

    `models` are the positions of `args` among the step's inputs.
    """
    return [None] * _left_out(method, models) + list(args)


def _left_out(method: Method, models: tuple[int, ...]) -> int:
    return models[0] if method.variadic and method.inputs else 0
