"""The last stage of a plan: every key of every input in exactly one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plymix import archs, weights
from plymix.archs import Place
from plymix.errors import Refusal, amount, listed
from plymix.expr import (
    Tensor,
    leaves,
)
from plymix.plan.idle import idle_words
from plymix.plan.making import Making
from plymix.plan.values import READ, Input, Plan


class Planner(Making):
    """One planning run."""

    def plan(self) -> Plan:
        recipe = self.recipe
        self.open()
        tensors, places, fates = self.make()
        self._idle_words(places)
        self._idle_rules()
        dropped, unmatched = self._account(tensors)
        self._nothing_matched(tensors)
        if self.strict and any(unmatched.values()):
            worst = {k: v for k, v in unmatched.items() if v}
            labels = {i.name: i.label for i in self.inputs}
            text = "; ".join(f"{listed(v)} only in {labels[k]}" for k, v in worst.items())
            found = amount(sum(map(len, worst.values())), "key")
            raise Refusal(f"--strict: {found} without a partner: {text}")
        return Plan(
            recipe=recipe,
            inputs=tuple(self.inputs),
            base=self.base,
            denoiser=self.swaps.get(self.arch.denoiser.name, self.base) if self.arch else self.base,
            arch=self.arch,
            tensors=tensors,
            places=places,
            fates=fates,
            dropped=dropped,
            unmatched=unmatched,
            notes=tuple(dict.fromkeys(self.notes)),
            view=self.view,
            alone=self.alone,
            weights={name: s.resolved for name, s in self.settings.items()},
            components=self.components,
            folder=self.folder,
        )

    def _idle_rules(self) -> None:
        """Refuse rules that match nothing; note what later rules leave no tensor."""
        merged = self.merged_places()
        places = [*merged.values()]
        rows = [(p.block, key, p.part) for key, p in merged.items()]
        for name, settings in self.settings.items():
            where, rules = f"steps.{name}.rules", settings.rules
            hits = weights.hits(rules, rows, settings.rule_blocks)
            if idle := [str(rule) for rule, at in zip(rules, hits, strict=True) if not at]:
                vae = any("VAE" in rule for rule in idle) and "vae" in self.swaps
                advice = (
                    f'the VAE is {self.swaps["vae"].label}\'s and follows no weight; vae = "blend"'
                    " would merge it"
                    if vae
                    else "check its block and element names"
                )
                raise Refusal(
                    f"{where}: {listed(idle)} matches no tensor of {self.short}: {advice}"
                )
            ruled = {i: rule.ratio for rule, at in zip(rules, hits, strict=True) for i in at}
            for n, rule in enumerate(rules):
                if not hits[n].difference(*hits[n + 1 :]):
                    why = "later rules are for all of its tensors"
                    self.notes.append(f"{where}: {rule} does nothing: {why}")
            for field in settings.unheard(places, ruled) if settings.ruled and rules else ():
                said = f"steps.{name}.{settings.ruled}" + (f": {field}" if field else "")
                self.notes.append(f"{said} does nothing: rules are for all of its tensors")

    def _idle_words(self, places: Mapping[str, Place]) -> None:
        """Refuse what is said for nothing; tell it where the recipe was carried out before."""
        for text in idle_words(self, places.values()):
            if not self.recipe.recorded:
                raise Refusal(text)
            self.notes.append(text)

    def _account(
        self, tensors: Sequence[Tensor]
    ) -> tuple[dict[str, dict[str, tuple[str, ...]]], dict[str, tuple[str, ...]]]:
        """Every key that is not in the output by the rule that left it out, and the unmatched."""
        used: set[tuple[int, str]] = set()
        for tensor in tensors:
            used.update((leaf.source, leaf.info.name) for leaf in leaves(tensor.expr))
        for what, keys in self.lacking.items():
            self.notes.append(f"{amount(len(keys))} {what}: {listed(keys)}")
        dropped: dict[str, dict[str, tuple[str, ...]]] = {}
        unmatched: dict[str, tuple[str, ...]] = {}
        for i in self.inputs:
            if i.name in self.applied:
                dropped[i.name], unmatched[i.name] = self._adapter_account(i, used)
                continue
            unmatched[i.name] = alone = self._unmatched(i)
            ruled = [(info.name, self._drop_rule(i, key)) for key, info in i.tensors.items()]
            ruled += ((key, f"unknown to {self.short}") for key in i.paired.unpaired)
            if i.name not in self.by_name:
                whole = [*(key for key, _ in ruled), *i.strangers]
                ruled = [(key, "not part of the component") for key in whole]
            apart = {*alone, *(key for source, key in used if source == i.index)}
            rules: dict[str, list[str]] = {}
            for key, rule in ruled:
                if key not in apart:
                    rules.setdefault(rule, []).append(key)
            for left_out in (i.paired.left_out, i.source.left_out):
                for why, left in left_out.items():
                    if lost := [key for key in left if (i.index, key) not in used]:
                        rules[why] = lost
            dropped[i.name] = {rule: tuple(keys) for rule, keys in rules.items()}
        return dropped, unmatched

    def _adapter_account(
        self, i: Input, used: set[tuple[int, str]]
    ) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
        """The keys of a LoRA that change nothing: by rule, and those without a partner."""
        applied = self.applied[i.name]
        rules = {why: list(keys) for why, keys in applied.dropped.items()}
        for modules in applied.at.values():
            for module, _ in modules:
                read = any((i.index, info.name) in used for info in module.factors.values())
                factors = {info.name for info in module.factors.values()}
                idle = [key for key in module.keys if not read or key not in factors]
                why = READ if read else "weight 0"
                rules.setdefault(why, []).extend(idle)
        return {why: tuple(keys) for why, keys in rules.items() if keys}, applied.unmatched

    def _unmatched(self, i: Input) -> tuple[str, ...]:
        """The keys of a merged model that another one lacks, whatever became of them.

        So the count is the same in any order of the models, and with or without `union`.
        """
        others = [m for m in self.by_name.values() if m is not i]
        if i.name not in self.by_name or not others:
            return ()
        strangers = set(i.strangers)
        return (
            *(
                i.tensors[key].name
                for key, place in i.places.items()
                if (key in strangers or not place.buffer)
                and place.component not in (*self.swaps, "ema")
                and not self._left_out(key, place)
                and not all(key in m.tensors for m in others)
            ),
            *(k for k in i.paired.unpaired if not all(k in m.paired.unpaired for m in others)),
        )

    def _drop_rule(self, i: Input, key: str) -> str:
        """Why a key of `i` that the other models have is not in the output."""
        output, place = self.recipe.output, i.places[key]
        if key in self.unwritten:
            return self.unwritten[key]
        if place.component == "ema" and output.ema != "keep":
            return f"ema = {output.ema}"
        if rule := self._left_out(key, place):
            return rule
        if place.component == "ema":
            return f"ema = {output.ema}"
        swap = self.swaps.get(place.component)
        if swap is not None and swap is not i:
            return f"{place.component} is {swap.label}'s"
        if key in i.strangers:
            return f"unknown to {self.short}"
        if place.buffer:
            return f"buffers are {self.base.label}'s"
        if self._kept(key):
            return f"{self.view.title} leaves them"
        if output.ema == "use" and archs.ema_key(key) in i.tensors:
            return "ema = use"
        return "weight 0"

    def _nothing_matched(self, tensors: Sequence[Tensor]) -> None:
        for i in self.by_name.values():
            shared = sum(1 for k in i.tensors if k in self.base.tensors and not i.places[k].buffer)
            if not shared:
                raise Refusal(
                    f"{i.label} shares no tensor with {self.base.label}: nothing would be merged"
                )
        if not tensors:
            raise Refusal("the result would hold no tensor at all")
