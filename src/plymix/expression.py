"""A merge written in Python: an expression that builds a recipe, and nothing else until asked.

    a, b, c = map(plymix.model, ("a.safetensors", "b.safetensors", "c.safetensors"))
    mix = (a + b) / 2 + 0.7 * (b - c)
    styled = mix.weighted_sum(a, alpha="GRAD_V", rules=["IN05-OUT03:attn2:0.3"])
    plymix.merge(styled, "out.safetensors", dtype="fp16")

Every merge method is a method of every expression: the first model it takes is the expression
itself. Expressions are values: they compare and hash by content, print as a formula, and survive
JSON. Sums, differences and products with numbers become the linear methods that keep their meaning
where a model lacks a tensor: weighted models are one `linear` step (without the missing model the
others share its weight), and a difference added to a model is an `add_difference` (without the
missing model the difference is 0).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from itertools import count
from numbers import Real
from typing import Any

from plymix import recipe as recipes
from plymix import urls
from plymix.errors import Refusal, unknown
from plymix.recipe import Model, Recipe
from plymix.registry import Method, Param, get_method, methods
from plymix.weights import Blocks, Curve, finite
from plymix.weights import to_json as weight_to_json

NEARLY = 1e-12
"""Relative difference below which a sum of coefficients is what it was meant to be."""


class Expression:
    """A model file, or a merge of expressions. Frozen; see the module's text for an example."""

    @cached_property
    def key(self) -> str:
        """A digest of all that the expression says: equal expressions have equal keys."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Expression) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def recipe(self, **output: Any) -> Recipe:
        """The recipe that makes this expression. Raises Refusal.

        Keywords are the fields of a recipe's [output]: dtype, vae, file, ... A model may be given
        for vae and text_encoder.
        """
        parts = {k: v for k, v in output.items() if isinstance(v, Expression)}
        for part, x in parts.items():
            if not isinstance(x, File):
                raise Refusal(f"output.{part} is {x!r}; it takes a model file, not a merge")
        order = _order((self, *parts.values()))
        names: dict[Expression, str] = {}
        for x in order:
            if isinstance(x, File):
                names[x] = recipes.model_name(x.file, names.values())
        numbers = (f"step{i}" for i in count(1))
        for x in order:
            if isinstance(x, Merge):
                names[x] = next(n for n in numbers if n not in names.values())
        return recipes.from_dict(
            {
                "models": {
                    names[x]: recipes.model_fields(x.as_model) for x in order if isinstance(x, File)
                },
                "steps": {
                    names[x]: x.fields([names[i] if i else "" for i in x.inputs])
                    for x in order
                    if isinstance(x, Merge)
                },
                "output": {
                    "from": names[self],
                    **output,
                    **{part: names[x] for part, x in parts.items()},
                },
            }
        )

    def to_json(self) -> str:
        """The recipe of this expression as canonical JSON."""
        return recipes.to_json(self.recipe())

    @staticmethod
    def from_json(text: str) -> Expression:
        """The expression that `to_json` told of, or that a recipe in JSON makes."""
        return Expression.from_recipe(recipes.from_json(text))

    @staticmethod
    def from_recipe(recipe: Recipe) -> Expression:
        """What the steps of a recipe make. Its output options are not part of an expression."""
        made: dict[str, Expression] = {
            name: File(m.file, m.size, m.sha256) for name, m in recipe.models.items()
        }
        for name in recipe.order():
            step = recipe.steps[name]
            inputs = tuple(made[used] if used else None for used in step.inputs)
            made[name] = _merge(step.method, inputs, step.params, step.rules, step.seed)
        return made[recipe.final]

    def lora(
        self,
        file: str | os.PathLike[str] | Expression,
        strength: float = 1.0,
        te_strength: float | None = None,
        *,
        blocks: Any = None,
        rules: str | Sequence[str] = (),
        dora: str = "trained",
    ) -> Expression:
        """This model with a LoRA added; chain it for several, in any order.

        `te_strength` is the text encoders' (default: `strength`). `blocks` are factors of both in
        each block: a preset of LoRA block weights ("IND"), a list, or numbers by block name.
        """
        lora = file if isinstance(file, Expression) else File(urls.given(file, "file"))
        said: dict[str, Any] = {"strength": [strength]}
        said |= {} if te_strength is None else {"te_strength": [te_strength]}
        said |= {} if blocks is None else {"blocks": blocks}
        said |= {} if dora == "trained" else {"dora": dora}
        return merge_method("lora", self, lora, rules=rules, **said)

    def __getattr__(self, name: str) -> Callable[..., Expression]:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in methods():
            raise AttributeError(str(unknown("merge method", name, methods())))
        call = partial(merge_method, name, self)
        call.__doc__ = get_method(name).doc
        call.__signature__ = _signature(get_method(name))  # type: ignore[attr-defined]
        return call

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *methods()]

    def __repr__(self) -> str:
        from plymix.metadata import formula

        return formula(self.recipe())

    def __add__(self, other: object) -> Expression:
        if not isinstance(other, Expression):
            return self if other == 0 else NotImplemented  # 0: sum(models) starts with it
        if _is_delta(self):
            if _is_delta(other):
                return merge_method("sum", self, other)
            return _onto(other, self)
        if _is_delta(other):
            return _onto(self, other)
        terms = dict(_terms(self))
        for x, c in _terms(other).items():
            terms[x] = terms.get(x, 0.0) + c
        return _linear(terms)

    __radd__ = __add__

    def __sub__(self, other: object) -> Expression:
        return self + -1 * other if isinstance(other, Expression) else NotImplemented

    def __mul__(self, factor: object) -> Expression:
        if not _is_number(factor):
            return NotImplemented
        number = finite(factor, "the factor of a model")
        return _each(self, lambda c: c * number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Expression:
        if not _is_number(divisor):
            return NotImplemented
        number = finite(divisor, "the divisor of a model")
        if number == 0:
            raise Refusal(f"{self!r} cannot be divided by 0")
        return _each(self, lambda c: c / number)

    def __neg__(self) -> Expression:
        return self * -1


@dataclass(frozen=True, repr=False, eq=False)
class File(Expression):
    """A model file. `size` and `sha256` are known where a result's recipe told them."""

    file: str
    size: int = 0
    sha256: str = ""

    @cached_property
    def key(self) -> str:
        return _digest("file", self.file, self.size, self.sha256)

    @property
    def as_model(self) -> Model:
        return Model(self.file, self.size, self.sha256)


@dataclass(frozen=True, repr=False, eq=False)
class Merge(Expression):
    """A merge method applied to expressions; None is an optional one left out before others.

    `params` is canonical JSON, so that it is a value.
    """

    method: str
    inputs: tuple[Expression | None, ...]
    params: str = "{}"
    rules: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        # At once, where the inputs have theirs: they may nest deeper than Python's stack.
        self.key, self.is_delta  # noqa: B018

    @cached_property
    def key(self) -> str:
        inputs = [x and x.key for x in self.inputs]
        return _digest("merge", self.method, inputs, self.params, self.rules, self.seed)

    @cached_property
    def is_delta(self) -> bool:
        """Whether this is a difference between models, not a model."""
        given = [None if i is None else _is_delta(i) for i in self.inputs]
        return get_method(self.method).gives_difference(given)

    @property
    def used(self) -> tuple[Expression, ...]:
        return tuple(i for i in self.inputs if i is not None)

    @cached_property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.params)
        return found

    def fields(self, names: Sequence[str]) -> dict[str, Any]:
        """This step as a recipe writes it, with the names of its inputs."""
        method = get_method(self.method)
        fixed = len(method.inputs)
        if len(names) > fixed and not method.variadic:
            raise Refusal(f"{self.method} takes {', '.join(method.inputs)}; {len(names)} given")
        found: dict[str, Any] = {
            "method": self.method,
            **{k: name for k, name in zip(method.inputs, names, strict=False) if name},
            **json.loads(self.params),
        }
        if method.variadic:
            found[method.several] = list(names[fixed:])
        if self.rules:
            found["rules"] = list(self.rules)
        if self.seed:
            found["seed"] = self.seed
        return found


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _order(wanted: Iterable[Expression]) -> list[Expression]:
    """Every expression that those `wanted` are made of, each once and after its inputs."""
    done: dict[Expression, None] = {}
    stack = list(wanted)[::-1]
    while stack:
        x = stack[-1]
        todo = [used for used in x.used if used not in done] if isinstance(x, Merge) else []
        if todo:
            stack += reversed(todo)
        else:
            done[stack.pop()] = None
    return list(done)


def model(file: str | os.PathLike[str]) -> Expression:
    """A model file as an expression. The file is not looked at yet."""
    return File(urls.given(file, "file"))


def merge_method(
    name: str,
    /,
    *inputs: Expression | None,
    rules: str | Sequence[str] = (),
    seed: int = 0,
    **params: Any,
) -> Expression:
    """The merge method called `name` applied to expressions; `a.NAME(b, ...)` in other words.

    Parameters are those of the method, as a recipe writes them. Its later models may be given by
    name as well (c=..., models=[...]); None leaves out an optional one before others. Raises
    Refusal with the nearest names.
    """
    method = get_method(name)
    given: list[Expression | None] = list(inputs)
    for field in method.inputs[len(inputs) :]:
        if field in params:
            given.append(params.pop(field))
    if method.several and method.several in params:
        several = params.pop(method.several)
        given += several if isinstance(several, (list, tuple)) else [several]
    for i, x in enumerate(given, 1):
        if x is not None and not isinstance(x, Expression):
            raise Refusal(f"{name}: model {i} is {x!r}, not an expression; write plymix.model(...)")
    said: Any = rules if isinstance(rules, (list, tuple)) else [rules]
    made = _merge(name, tuple(given), params, tuple(said), seed)
    # Fields and numbers of models are the recipe's to check, so it is asked at once.
    names = ["" if x is None else f"m{i}" for i, x in enumerate(given)]
    step = made.fields(names)
    recipes.from_dict(
        {"models": {n: n for n in ("m", *filter(None, names))}, "steps": {name: step}}
    )
    return made


def _merge(
    name: str,
    inputs: tuple[Expression | None, ...],
    params: Mapping[str, Any],
    rules: tuple[str, ...],
    seed: int,
) -> Merge:
    known = {p.name: p for p in get_method(name).params}
    plain = {k: _plain(v, f"{name}: {k}", known.get(k)) for k, v in params.items()}
    return Merge(name, inputs, json.dumps(plain, sort_keys=True), rules, seed)


def _plain(value: Any, where: str, param: Param | None) -> Any:
    """`value` in JSON's types; a number for a parameter of type float is a float."""
    if isinstance(value, (Curve, Blocks)):
        value = weight_to_json(value)
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, Real):
        number = finite(value, where)
        if isinstance(value, int) and (param is None or param.type is int):
            return value
        return number
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}: {k}", param) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, where, param) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where, param)
    raise Refusal(f"{where} is {value!r}, not a number, a text, a list or a table")


def _signature(method: Method) -> inspect.Signature:
    """What `expression.NAME` takes."""
    kinds = inspect.Parameter
    found = [kinds(n, kinds.POSITIONAL_OR_KEYWORD) for n in method.inputs[1:]]
    if method.variadic:
        found.append(kinds(method.variadic, kinds.VAR_POSITIONAL))
    for p in method.params:
        found.append(kinds(p.name, kinds.KEYWORD_ONLY, default=p.default))
    for extra, default in (("rules", ()), ("seed", 0)):
        if extra not in [p.name for p in method.params]:
            found.append(kinds(extra, kinds.KEYWORD_ONLY, default=default))
    return inspect.Signature(found)


# --- arithmetic ---------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_delta(x: Expression) -> bool:
    return isinstance(x, Merge) and x.is_delta


def _terms(x: Expression) -> dict[Expression, float]:
    """`x` as a sum of coefficient x expression: that of a `linear` step written by `_linear`."""
    if isinstance(x, Merge) and x.method == "linear" and not x.rules:
        weights = x.settings.get("weights", ())
        if len(weights) == len(x.used) and all(map(_is_number, weights)):
            as_written = not x.settings.get("normalize", True)
            if as_written or abs(math.fsum(weights) - 1) <= NEARLY:
                terms: dict[Expression, float] = {}
                for i, c in zip(x.used, weights, strict=True):
                    terms[i] = terms.get(i, 0.0) + c
                return terms
    return {x: 1.0}


def _linear(terms: Mapping[Expression, float]) -> Expression:
    """The sum of coefficient x expression, of models."""
    total = math.fsum(terms.values())
    plus = {x: c for x, c in terms.items() if c > 0}
    minus = {x: -c for x, c in terms.items() if c < 0}
    scale = math.fsum(plus.values())
    if plus and abs(total) <= NEARLY * scale:
        sides = [_linear({x: c / scale for x, c in side.items()}) for side in (plus, minus)]
        return _difference(sides[0], sides[1], scale)
    if list(terms.values()) == [1.0]:
        return next(iter(terms))
    params: dict[str, Any] = {"weights": list(terms.values())}
    if abs(total - 1) > NEARLY:
        params["normalize"] = False
    return merge_method("linear", *terms, **params)


def _difference(a: Expression, b: Expression, scale: float) -> Expression:
    params: dict[str, Any] = {} if scale == 1 else {"scale": scale}
    return merge_method("subtract", a, b, **params)


def _each(x: Expression, change: Callable[[float], float]) -> Expression:
    """`x` with its coefficients changed: all multiplied by a number."""
    if not _is_delta(x):
        return _linear({term: change(c) for term, c in _terms(x).items()})
    assert isinstance(x, Merge)
    scale = x.settings.get("scale", 1.0)
    if not x.rules and _is_number(scale):
        if x.method == "subtract":
            return _difference(x.used[0], x.used[1], change(scale))
        if x.method == "sum":
            parts = (part if n == 1 else part * n for part, n in _added(x).items())
            return reduce(partial(merge_method, "sum"), (_each(part, change) for part in parts))
        if x.method == "scale":
            return merge_method("scale", *x.used, scale=change(scale))
    return merge_method("scale", x, scale=change(1.0))


def _onto(x: Expression, delta: Expression) -> Expression:
    """A model plus a difference."""
    for part, n in _added(delta).items():
        assert isinstance(part, Merge)
        of_models = part.method == "subtract" and not any(map(_is_delta, part.used))
        if of_models and not part.rules:
            alpha = n * part.settings.get("scale", 1.0)
            x = merge_method("add_difference", x, *part.inputs, alpha=alpha)
        else:
            x = merge_method("sum", x, part if n == 1 else part * n)
    return x


def _added(delta: Expression) -> dict[Expression, int]:
    """The differences that a nest of sums adds up, in their order, and how often each."""
    times = Counter([delta])
    found = {}
    for x in reversed(_order([delta])):  # before what it is made of
        if isinstance(x, Merge) and x.method == "sum":
            for used in x.used:
                times[used] += times[x]
        elif times[x]:
            found[x] = times[x]
    return dict(reversed(found.items()))
