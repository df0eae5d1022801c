"""sd-webui-model-mixer: the "ModelMixer ..." settings that it writes beside an image's prompt.

From published descriptions: modes (Sum, Add-Diff), calculation modes, block lists and element
rules. From memory: the names of the settings, one letter per model: `ModelMixer model b`,
`mode b`, `alpha b`, `mbw b`, `mbw weights b`, `elemental b`, `calcmode b`. The models are merged
onto model a one after the other; Add-Diff adds the difference to `ModelMixer base model`. What it
writes into a merged file is not known well enough, and not read.
"""

from __future__ import annotations

import json
import re
from string import ascii_lowercase
from typing import Any

from plymix.errors import Refusal, unknown
from plymix.importers.base import Imported, Record, block_weights, merged

PREFIX = "ModelMixer "


def settings(text: str) -> dict[str, Any]:
    """The model mixer's settings in an image's parameters: 'ModelMixer alpha b: 0.5, ...'"""
    found: dict[str, Any] = {}
    for name, value in re.findall(
        rf'{PREFIX}([^:,"]+?):\s*("(?:[^"\\]|\\.)*"|\[[^\]]*\]|[^,\n]*)', text
    ):
        found[name] = json.loads(value) if value.startswith('"') else value.strip()
    return found


def read(record: Record) -> Imported:
    """The recipe of a model mixer's settings. Raises Refusal."""
    record.fields = {
        str(k).removeprefix(PREFIX).strip().lower(): v for k, v in record.fields.items()
    }
    made = record.model(record.take("model a"), "model a")
    base = record.take("base model")
    for x in ascii_lowercase[1:]:
        name = record.take(f"model {x}")
        if name:
            made = _onto(record, made, record.model(name, f"model {x}"), x, base)
    record.take("use", "calcmode a")
    return record.done(made, {})


def _onto(record: Record, made: Any, model: Any, x: str, base: Any) -> Any:
    calc = str(record.take(f"calcmode {x}") or "normal").lower()
    if calc != "normal":
        raise Refusal(f"model-mixer: the calculation mode {calc!r} of model {x} is not imported")
    alpha: Any = record.number(f"alpha {x}", default=0.0)
    listed = record.take(f"mbw weights {x}")
    if record.truth(f"mbw {x}"):
        alpha = block_weights(listed, None, f"model-mixer: mbw weights {x}")
        record.note(
            f"by blocks it leaves time_embed and out of model {x} unmerged; here they follow"
        )
    rules = record.take(f"elemental {x}")
    mode = str(record.take(f"mode {x}") or "Sum").lower()
    if mode == "sum":
        return merged("weighted_sum", made, model, alpha=alpha, rules=rules)
    if mode == "add-diff":
        other = record.model(base, "the base model")
        return merged("add_difference", made, model, other, alpha=alpha, rules=rules)
    raise unknown("model-mixer mode", mode, ("sum", "add-diff"))
