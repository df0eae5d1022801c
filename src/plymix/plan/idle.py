"""What a recipe says for nothing: words that no tensor of the result follows.

A word that does nothing is refused: who wrote it expects something of it. In a recipe that was
carried out before it is told instead, so that results which carry such words can be made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from plymix import weights
from plymix.archs import Place
from plymix.errors import listed
from plymix.plan.settings import AdapterSettings, Settings
from plymix.recipe import DROPS, PARTS

if TYPE_CHECKING:
    from plymix.plan.making import Making


def idle_words(made: Making, places: Iterable[Place]) -> Iterator[str]:
    """What is said for nothing, and what to do; `places` are those of the result's tensors."""
    output = made.recipe.output
    if output.seed and output.rounding != "stochastic":
        yield f'output.seed = {output.seed} is for rounding = "stochastic"; say both or neither'
    for name, settings in made.settings.items():
        if settings.step.seed and not settings.method.random:
            yield (
                f"steps.{name}.seed = {settings.step.seed} does nothing:"
                f" {settings.method.name} draws no numbers; leave it out"
            )
        yield from _idle_elements(made, name, settings)
        if not isinstance(settings, AdapterSettings):
            yield from _idle_weights(made, name, settings)
    if output.prefix and not output.component:
        yield (
            "output.prefix is for a component alone, and this result is a whole model: say"
            ' component = "unet" or another, or leave it out'
        )
    yield from _idle_parts(made)
    keys = {place.key for place in places if not place.buffer}
    for field in made.adjusted.idle(keys):
        yield (
            f"output.adjust.{field} does nothing: no tensor that it changes is in the result"
            f"{_left_out(made)}; leave it out"
        )


def _idle_elements(made: Making, name: str, settings: Settings) -> Iterator[str]:
    """Words for elements in rules that no tensor of any model has in its name."""
    keys = {key for i in made.inputs for key in i.places} if settings.rules else ()
    for rule, word in weights.idle_words(settings.rules, keys):
        near = " or ".join(weights.words_like(word, keys))
        hint = f"did you mean {near}?" if near else "check its element names"
        yield f"steps.{name}.rules: {rule}: no tensor of {made.short} has {word!r}: {hint}"


def _idle_weights(made: Making, name: str, settings: Settings) -> Iterator[str]:
    """Weights of blocks, and `base`, where all that they are for is taken whole from a model."""
    output, labels = made.recipe.output, {i.name: i.label for i in made.inputs}
    taken = {
        field: f"output.{field} = {labels[getattr(output, field)]}"
        for field in ("unet", "text_encoder", "text_encoder_2")
        if getattr(output, field)
    }
    if not taken:
        return
    there = made.merged_places().values()
    encoders = [said for field, said in taken.items() if field != "unet"]
    for param, value, found in _weights(settings):
        weight = weights.from_toml(value, field=param)
        table = weight if isinstance(weight, weights.Blocks) else weights.Blocks()
        blocks = table.blocks if isinstance(weight, weights.Blocks) else weight
        by_block = not isinstance(blocks, float) and blocks != weights.Named()
        named = (*found.blocks, *found.parts)
        if "unet" in taken and by_block and not any(p.block in named for p in there):
            yield (
                f"steps.{name}.{param} is for the blocks of the denoiser, which {taken['unet']}"
                f" takes whole; keep one of them ({param}.base = 0.3 alone is the text encoder's"
                " share)"
            )
        based = any(p.block not in named and p.part not in found.parts for p in there)
        if encoders and table.base is not None and not based:
            yield (
                f"steps.{name}.{param}.base = {table.base:g} is the share of the text encoder,"
                f" which {' and '.join(encoders)} takes whole; keep one of them"
            )


def _weights(settings: Settings) -> Iterator[tuple[str, Any, weights.Resolved]]:
    """The weights that a step's fields say: field, value, and what it is for each block."""
    for field, value in settings.step.params.items():
        if field in settings.resolved:
            yield field, value, settings.resolved[field]
        if field in settings.lists:
            for one, found in zip(value, settings.lists[field], strict=True):
                yield field, one, found


def _idle_parts(made: Making) -> Iterator[str]:
    """Components that are said to be taken, or blended, and are not in the result."""
    output = made.recipe.output
    if made.arch is None:
        return
    encoders = [c.name for c in made.arch.components if c.name.startswith("text_encoder")]
    of = {"text_encoder": encoders, "unet": [made.arch.denoiser.name]}
    dropped = {made.arch.component(name).name for name in output.drop if name not in DROPS}
    for field in PARTS:
        if getattr(output, field) and all(
            name in dropped or (made.alone and name != made.alone)
            for name in of.get(field, [field])
        ):
            yield (
                f"output.{field} does nothing: the result has no {PARTS[field]}{_left_out(made)};"
                " leave it out"
            )


def _left_out(made: Making) -> str:
    """The rules of the output that leave components out, for people."""
    output = made.recipe.output
    dropped = [name for name in output.drop if name not in DROPS]
    said = [f"component = {output.component}"] if output.component else []
    said += [f"drop = {listed(dropped)}"] if dropped else []
    return f" ({', '.join(said)})" if said else ""
