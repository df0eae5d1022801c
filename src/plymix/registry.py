"""What a merge method declares about itself: its function's signature is the schema.

    @method("elementwise")
    def nearswap(a, b, *, t: Annotated[float, Range(low=0)] = 1e-4):
        '''Swap in B where it is close to A

        w = clamp(t / |A - B|, 0, 1);  R = w B + (1 - w) A
        Source: mergekit `nearswap`.
        '''

* Positional arguments are the tensors of one key, one per model, in the recipe's order; their
  names (`a`, `b`, `c`, `base`) are the fields a recipe uses. `*models` takes any number.
* Keyword-only arguments are numbers, switches or choices that a recipe may set, with type, default
  and range. `tuple[float, ...]` is one number per model, in their order (of `*models` where the
  method has them, without `base`); the default `()` lets the method choose, usually all equal.
  Three names are given by the engine instead: `key` (str, the tensor's canonical key), `rng`
  (callable: model index -> numpy Generator on the CPU, seeded by recipe seed, key and model) and
  `state` (what the method's `prepare` returned).
* The docstring's first line is the label shown everywhere; formula and source follow.
* Arrays are float32 (numpy, or torch on a GPU) and must not be changed in place; the result has the
  shape of the first argument.

The decorator returns the function unchanged, so a test calls it as it reads.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from plymix.errors import Refusal, unknown

Kind = Literal["linear", "elementwise", "tensor", "cross", "group"]
"""How a method may be run.

linear       only `+`, `-` and products with numbers: folded with its neighbours at planning time
elementwise  output element i depends on the input elements i alone: run in chunks of any size
tensor       needs the whole tensor of one key (norms, quantiles, sorting, FFT, SVD, random masks)
cross        as tensor, after a first pass over all keys (`prepare`)
group        keys are solved together (`prepare`), then applied key by key
"""

GIVEN = ("key", "rng", "state")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both inclusive; `None` is unbounded."""

    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        low = "-inf" if self.low is None else f"{self.low:g}"
        high = "inf" if self.high is None else f"{self.high:g}"
        return f"{low}..{high}"

    def holds(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


Share = Annotated[float, Range(0, 1)]
"""A number of 0..1."""


@dataclass(frozen=True)
class Param:
    """One setting of a method, read off its signature."""

    name: str
    type: type  # float, int, bool, str, or tuple (one float per model)
    default: Any  # inspect.Parameter.empty when required
    range: Range = field(default_factory=Range)
    choices: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def check(self, value: object, where: str) -> Any:
        """`value` in this parameter's type. Raises Refusal naming `where`."""
        asked = f"{where}: {self.name} = {value!r}"
        if self.choices:
            if value not in self.choices:
                raise unknown(f"value for {where}: {self.name}", str(value), self.choices)
            return value
        if self.type is bool:
            if not isinstance(value, bool):
                raise Refusal(f"{asked} is not true or false")
            return value
        if self.type is tuple:
            if not isinstance(value, (list, tuple)):
                raise Refusal(f"{asked} is not a list of numbers, one per model")
            one = replace(self, type=float)
            return tuple(one.check(v, where) for v in value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Refusal(f"{asked} is not a number")
        if value != value or value in (float("inf"), float("-inf")):
            raise Refusal(f"{asked} is not a finite number")
        if self.type is int and value != int(value):
            raise Refusal(f"{asked} is not a whole number")
        if not self.range.holds(value):
            raise Refusal(f"{asked} is outside its range {self.range}")
        return self.type(value)


@dataclass(frozen=True)
class Method:
    """A registered merge method: the function and what its signature says."""

    name: str
    kind: Kind
    function: Callable[..., Any]
    inputs: tuple[str, ...]  # names of the fixed positional arguments
    optional: int  # how many of `inputs`, counted from the end, may be left out
    variadic: str | None  # name of `*models`, or None
    min_variadic: int
    params: tuple[Param, ...]
    given: frozenset[str]
    prepare: Callable[..., Any] | None
    delta: bool  # True: the result is a difference, not a model
    adapters: bool  # True: the variadic inputs are LoRAs, given as what they add to the first
    room: int  # tensors in float32 that a call on up to three models takes, they among them
    label: str
    doc: str

    def param(self, name: str) -> Param:
        for p in self.params:
            if p.name == name:
                return p
        raise unknown(f"parameter of {self.name}", name, [p.name for p in self.params])

    @property
    def several(self) -> str:
        """The field of a recipe that lists the variadic inputs; "" where there are none."""
        if self.variadic is None:
            return ""
        return self.variadic if self.adapters else "models"

    @property
    def takes(self) -> str:
        """The models as a recipe names them, for people: 'base, models = [...]'."""
        return ", ".join((*self.inputs, *([f"{self.several} = [...]"] if self.several else [])))

    @property
    def random(self) -> bool:
        return "rng" in self.given

    def gives_difference(self, given: Sequence[bool | None]) -> bool:
        """Whether the result is a difference between models, to be added to one by a later step.

        `given` says of each input whether it is a difference; None is one left out. Of differences
        alone every method makes another. A model less a difference is a model. What a linear method
        makes of a difference and of models that cancel out, as in D + alpha (B - C), is one.
        """
        models = given[: len(self.inputs)] if self.adapters else given
        said = [one for one in models if one is not None]
        if said and all(said):
            return True
        if self.kind == "linear" and any(said):
            return bool(said[0]) and (self.delta or self._cancels(models))
        return self.delta

    def _cancels(self, given: Sequence[bool | None]) -> bool:
        """Whether the models (1 each) that a linear method is given cancel out at its defaults.

        A wrong number of inputs is the recipe's to refuse.
        """
        least, most = len(self.inputs) - self.optional, len(self.inputs)
        settings = {p.name: p.default for p in self.params}
        settings |= {name: "" for name in self.given if name == "key"}
        wrong = len(given) < least or (len(given) > most and not self.variadic)
        if wrong or any(p.required for p in self.params):
            return False
        values = [None if one is None else 0.0 if one else 1.0 for one in given]
        return bool(self.function(*values, **settings) == 0)


_METHODS: dict[str, Method] = {}
_FAMILIES = (
    "linear",
    "elementwise",
    "angular",
    "cosine",
    "exchange",
    "spectral",
    "task",
    "matrix",
    "permutation",
    "tuning",
)


def method(
    kind: Kind,
    *,
    name: str | None = None,
    prepare: Callable[..., Any] | None = None,
    min_models: int = 1,
    delta: bool = False,
    adapters: bool = False,
    room: int = 4,
) -> Callable[[F], F]:
    """Register a merge method. `prepare` is documented in `plymix.methods`.

    `min_models` is the least number of `*models`. `delta` marks a method whose result is a
    difference between models, to be added to one by a later step. `adapters` marks one whose
    variadic inputs are LoRA files: it is given what they add to its first input. `room` is the
    memory that a call on up to three models takes at most, in tensors of float32, the models among
    them: more than 4 where a decomposition, a Fourier transform, a sort by 64-bit keys or the steps
    of a filter must be whole beside them.
    """

    def register(function: F) -> F:
        built = _read(
            function, kind, name or function.__name__, prepare, min_models, delta, adapters, room
        )
        if built.name in _METHODS and _METHODS[built.name].function is not function:
            raise ValueError(f"two merge methods are called {built.name!r}")
        _METHODS[built.name] = built
        return function

    return register


def _read(
    function: Callable[..., Any],
    kind: Kind,
    name: str,
    prepare: Callable[..., Any] | None,
    min_models: int,
    delta: bool,
    adapters: bool,
    room: int,
) -> Method:
    hints = typing.get_type_hints(function, include_extras=True)
    inputs: list[str] = []
    optional = 0
    variadic = None
    params: list[Param] = []
    given: set[str] = set()
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            variadic = p.name
        elif p.kind is p.KEYWORD_ONLY:
            if p.name in GIVEN:
                given.add(p.name)
            else:
                params.append(_param(p.name, hints.get(p.name, float), p.default))
        elif p.kind is p.VAR_KEYWORD:
            raise ValueError(f"{name}: a merge method takes no **{p.name}")
        else:
            inputs.append(p.name)
            optional += p.default is None
    doc = inspect.getdoc(function) or ""
    if not doc:
        raise ValueError(f"{name}: a merge method needs a docstring; its first line is the label")
    if kind in ("cross", "group") and prepare is None:
        raise ValueError(f"{name}: a {kind} method needs prepare=")
    return Method(
        name=name,
        kind=kind,
        function=function,
        inputs=tuple(inputs),
        optional=optional,
        variadic=variadic,
        min_variadic=min_models,
        params=tuple(params),
        given=frozenset(given),
        prepare=prepare,
        delta=delta,
        adapters=adapters,
        room=room,
        label=doc.splitlines()[0].strip(),
        doc=doc,
    )


def _param(name: str, hint: Any, default: Any) -> Param:
    bounds = Range()
    if get_origin(hint) is Annotated:
        hint, *extra = get_args(hint)
        bounds = next((e for e in extra if isinstance(e, Range)), bounds)
    if get_origin(hint) is Literal:
        return Param(name, str, default, choices=tuple(get_args(hint)))
    if hint == tuple[float, ...]:
        return Param(name, tuple, default, bounds)
    if hint not in (float, int, bool):
        raise ValueError(
            f"parameter {name}: {hint!r} is not float, int, bool, tuple[float, ...] "
            "or Literal[str, ...]"
        )
    return Param(name, hint, default, bounds)


def methods() -> Mapping[str, Method]:
    """Every merge method by name: plymix's own, then those of installed packages.

    Another package adds one with an entry point in the group `plymix.methods` that names a module
    whose import registers it.
    """
    _load()
    return dict(sorted(_METHODS.items()))


@cache
def _load() -> None:
    from importlib.metadata import entry_points

    for family in _FAMILIES:
        import_module(f"plymix.methods.{family}")
    for point in entry_points(group="plymix.methods"):
        point.load()


def get_method(name: str) -> Method:
    """The method called `name`. Raises Refusal with the nearest names."""
    for family in _FAMILIES:  # the first need least: most merges no other, and no numpy
        if name in _METHODS:
            break
        import_module(f"plymix.methods.{family}")
    if name not in _METHODS:
        _load()
    if name not in _METHODS:
        raise unknown("merge method", name, _METHODS, help="plymix methods lists them")
    return _METHODS[name]
