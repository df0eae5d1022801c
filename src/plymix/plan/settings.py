"""A step's parameters, resolved for every block before any tensor is planned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from plymix import weights
from plymix.archs import Architecture, Place
from plymix.archs.views import View
from plymix.errors import Refusal
from plymix.expr import (
    Call,
    Expr,
    folded,
    positional,
)
from plymix.plan.values import ANY
from plymix.recipe import Step
from plymix.registry import Method, Param, get_method


class Settings:
    """A step's parameters, resolved for every block."""

    def __init__(
        self,
        name: str,
        step: Step,
        view: View,
        title: str,
        base_default: Callable[[Param, str], float],
    ) -> None:
        self.name = name
        self.step = step
        self.view = view
        self.method: Method = get_method(step.method)
        self.where = f"steps.{name}"
        self.rules = weights.parse_rules(step.rules, field=f"{self.where}.rules")
        self.rule_blocks = tuple(dict.fromkeys((*view.blocks, "BASE", "VAE", *view.names)))
        self.resolved: dict[str, weights.Resolved] = {}
        self.lists: dict[str, list[weights.Resolved]] = {}
        self.notes: list[str] = []
        self.fixed: dict[str, Any] = {}
        self._tried: set[Any] = set()
        self._known: dict[Any, tuple[tuple[str, Any], ...]] = {}
        self.ruled = next((p.name for p in self.method.params if p.type is float), "")
        if self.rules and not self.ruled and not self.method.adapters:
            raise Refusal(f"{self.where}: {step.method} has no weight that rules could set")

        def resolve(value: Any, param: Param, field: str) -> weights.Resolved:
            one = replace(param, type=float)
            weight = weights.from_toml(value, field=field, blocks=view.blocks)
            whole = weight.blocks if isinstance(weight, weights.Blocks) else weight
            if view.blocks == (ANY,) and isinstance(whole, (str, weights.Curve)):
                raise Refusal(f"{field} = {value!r}: arch any knows no blocks; give one number")
            found = weights.resolve(
                weight,
                view.blocks,
                arch_title=title,
                field=field,
                lists=view.lists,
                names=view.names,
            )
            if view.blocks == (ANY,) and not isinstance(weight, float) and found.base is not None:
                raise Refusal(
                    f"{field}: base = {found.base:g} is the text encoder's share, and arch any"
                    " knows none; give one number"
                )
            base = base_default(param, field) if found.base is None else found.base
            found = weights.Resolved(base, found.blocks, found.notes, found.parts)
            self.notes += found.notes
            values = {base, *found.blocks.values(), *found.parts.values()}
            values.update(self._rule_values(param))
            for at in values:
                one.check(at, self.where)
            far = sorted(v for v in values if not 0 <= v <= 1)
            if param.name == "alpha" and step.method == "weighted_sum" and far:
                self.notes.append(
                    f"{field} goes to {far[-1 if far[-1] > 1 else 0]:g}: beyond both models"
                )
            return found

        for p in self.method.params:
            value = step.params.get(p.name, p.default)
            field = f"{self.where}.{p.name}"
            if p.type is float:
                self.resolved[p.name] = resolve(value, p, field)
            elif p.type is tuple and self.method.adapters:
                continue  # see AdapterSettings
            elif p.type is tuple:
                self.lists[p.name] = [
                    resolve(v, p, f"{field}: value {i}")
                    for i, v in enumerate(self._list(p, value, field), 1)
                ]
            else:
                self.fixed[p.name] = p.check(value, self.where)

    def _rule_values(self, param: Param) -> Iterable[float]:
        return [r.ratio for r in self.rules] if param.name == self.ruled else []

    def _list(self, param: Param, value: Any, field: str) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise Refusal(f"{field} = {value!r} is not a list with one value per model")
        wanted = len(self.step.inputs) - (len(self.method.inputs) if self.method.variadic else 0)
        if value and len(value) != wanted:
            raise Refusal(f"{field} has {len(value)} values for {wanted} models")
        return list(value)

    def at(self, resolved: weights.Resolved, place: Place) -> float:
        _, value = self._source(resolved, place)
        return value

    def _source(self, resolved: weights.Resolved, place: Place) -> tuple[str, float]:
        """The name that `place` has its number from, and the number."""
        for table, name in (
            (resolved.parts, place.part),
            (resolved.blocks, place.block),
            (resolved.parts, place.block),
        ):
            if name in table:
                return name, table[name]
        assert resolved.base is not None
        return "BASE", resolved.base

    def unheard(self, places: Sequence[Place], ruled: Mapping[int, float]) -> list[str]:
        """Fields of the ruled weight by which no tensor goes: rules say another number of each.

        `ruled` are the numbers by rule, by the number of the tensor's place. "" is all of it.
        """
        resolved = self.resolved[self.ruled]
        heard, unheard = set[str](), set[str]()
        for i, place in enumerate(places):
            name, value = self._source(resolved, place)
            (heard if ruled.get(i, value) == value else unheard).add(name)
        if not heard:
            return [""]
        weight = weights.from_toml(self.step.params.get(self.ruled, 0.0), field=self.where)
        said = weights.entries(weight, self.view.blocks, self.view.names)
        return [text for text, names in said.items() if unheard & {*names} and not heard & {*names}]

    def params(self, place: Place, key: str, models: tuple[int, ...]) -> dict[str, Any]:
        """The method's keyword arguments at one key."""
        found = dict(self.fixed)
        for name, resolved in self.resolved.items():
            value = self.at(resolved, place)
            if name == self.ruled and self.rules:
                value = weights.apply_rules(
                    self.rules, place.block, key, value, self.rule_blocks, place.part
                )
            found[name] = value
        first = len(self.method.inputs) if self.method.variadic else 0
        for name, entries in self.lists.items():
            values = [self.at(r, place) for r in entries]
            found[name] = tuple(values[m - first] for m in models if m >= first) if values else ()
        return found

    def _try(self, params: dict[str, Any], models: tuple[int, ...]) -> None:
        """Let the method refuse its settings now, on one element, not in the middle of the work."""
        tried = (models, tuple(sorted(params.items())))
        if tried in self._tried or self.method.kind in ("cross", "group"):
            return
        self._tried.add(tried)
        import numpy as np

        given: dict[str, Any] = {"key": "", "rng": np.random.default_rng}
        given = {name: value for name, value in given.items() if name in self.method.given}
        try:
            with np.errstate(all="ignore"):
                ones = [np.ones(1, np.float32)] * len(models)
                self.method.function(*positional(self.method, ones, models), **params, **given)
        except Refusal as e:
            raise Refusal(f"{self.where} ({self.method.name}): {e}") from None

    def apply(self, key: str, place: Place, args: Sequence[Expr], models: tuple[int, ...]) -> Expr:
        params = self._params_at(place, key, models)
        if self.method.kind == "linear":
            if "key" in self.method.given:
                params = (*params, ("key", key))
            try:
                return folded(self.method, args, params, models)
            except Refusal as e:
                raise Refusal(f"{self.where} ({self.method.name}): {e}") from None
        self._try(dict(params), models)
        return Call(
            step=self.name,
            method=self.method.name,
            args=tuple(args),
            params=params,
            key=key,
            seed=self.step.seed,
            models=models,
        )

    def _params_at(
        self, place: Place, key: str, models: tuple[int, ...]
    ) -> tuple[tuple[str, Any], ...]:
        """`params` in order of their names; the same for a whole block where there are no rules."""
        if self.rules:
            return tuple(sorted(self.params(place, key, models).items()))
        at = (place.block, place.part, models)
        if at not in self._known:
            self._known[at] = tuple(sorted(self.params(place, key, models).items()))
        return self._known[at]


class AdapterSettings(Settings):
    """Those of a step that adds LoRAs: a strength for each of them at every key."""

    def __init__(self, name: str, step: Step, view: View, arch: Architecture) -> None:
        from plymix.adapters import strengths

        super().__init__(name, step, view, arch.short, lambda param, step: 0.0)
        self.arch = arch
        loras = len(step.inputs) - len(self.method.inputs)
        self.strengths = strengths.read(step.params, loras, arch, self.where)

    def params(self, place: Place, key: str, models: tuple[int, ...]) -> dict[str, Any]:
        found = []
        own = self.arch.place(key) or place  # factors are for the architecture's own blocks
        for strength in self.strengths:
            factor = strength.factor(own)
            if self.rules:
                factor = weights.apply_rules(
                    self.rules, place.block, key, factor, self.rule_blocks, place.part
                )
            found.append(strength.of(place) * factor)
        return {**self.fixed, "strength": tuple(found)}
