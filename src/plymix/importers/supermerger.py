"""supermerger: `sd_merge_recipe` in its results, and its `mergehistory.csv`.

Modes, calculation modes and element rules are from published descriptions; the names of fields and
columns from memory, so they are read by name, and one that is not known is told in the notes.
`base_alpha` is the weight of everything where blocks are not weighted, else that of BASE. alpha is
the share of B, as plymix's is.
"""

from __future__ import annotations

from typing import Any

from plymix.errors import Refusal, unknown
from plymix.importers.base import (
    Imported,
    Record,
    block_weights,
    merged,
    number,
    numbers,
    shown,
)

MODES = {
    "weight sum": ("weighted_sum", 2, ("alpha",)),
    "add difference": ("add_difference", 3, ("alpha",)),
    "triple sum": ("triple_sum", 3, ("alpha", "beta")),
    "sum twice": ("sum_twice", 3, ("alpha", "beta")),
}

# (mode, calculation mode) -> method, number of models, parameters
CALCMODES = {
    ("weight sum", "cosinea"): ("cosine_a", 2, ("alpha",)),
    ("weight sum", "cosineb"): ("cosine_b", 2, ("alpha",)),
    ("weight sum", "tensor"): ("tensor", 2, ("alpha", "beta")),
    ("weight sum", "tensor2"): ("tensor2", 2, ("alpha", "beta")),
    ("weight sum", "self"): ("self", 1, ("alpha",)),
    ("weight sum", "plus random"): ("plus_random", 1, ("alpha",)),
    ("add difference", "traindifference"): ("train_difference", 3, ("alpha",)),
    ("add difference", "smoothadd"): ("smooth_add", 3, ("alpha",)),
    ("add difference", "smoothadd mt"): ("smooth_add", 3, ("alpha",)),
    ("add difference", "extract"): ("extract", 3, ("alpha", "beta")),
}

COLUMNS = {
    "weights alpha": "weights_alpha",
    "weights beta": "weights_beta",
    "model a": "model_a",
    "model b": "model_b",
    "model c": "model_c",
    "alpha": "base_alpha",
    "beta": "base_beta",
    "mode": "mode",
    "use mbw": "mbw",
    "custom name": "custom_name",
    "custum name": "custom_name",
    "name": "name",
    "id": "id",
    "time": "time",
    "save setting": "save_sets",
    "use id": "id_sets",
    "elemental merge": "elemental_merge",
    "calcmode": "calcmode",
    "adjust": "adjust",
}
"""Columns of `mergehistory.csv` -> fields of `sd_merge_recipe`."""


def read(record: Record) -> Imported:
    """The recipe of supermerger's `sd_merge_recipe`. Raises Refusal."""
    # "..._orig" are the weights before presets and random symbols were filled in.
    record.take("type", "weights_alpha_orig", "weights_beta_orig", "id", "time", "name")
    mode = str(record.take("mode")).partition(":")[0].strip().lower()
    if mode not in MODES:
        raise unknown("supermerger mode", mode, MODES)
    calc = str(record.take("calcmode") or "normal").strip().lower()
    if calc != "normal" and (mode, calc) not in CALCMODES:
        raise Refusal(
            f"supermerger: {mode} with the calculation mode {calc!r} cannot be imported;"
            f" known: normal, {', '.join(sorted(c for m, c in CALCMODES if m == mode))}"
        )
    method, count, params = MODES[mode] if calc == "normal" else CALCMODES[mode, calc]
    models = [record.model(record.take(f"model_{x}"), f"model {x.upper()}") for x in "abc"[:count]]
    for x in "abc"[count:]:
        record.take(f"model_{x}")
    blocks = record.truth("mbw")
    settings = {param: _weight(record, param, blocks) for param in params}
    for param in ("alpha", "beta"):
        record.take(f"weights_{param}", f"base_{param}")
    rules = record.take("elemental_merge")
    # It leaves tensors without "weight" or "bias" in their names to model A.
    output: dict[str, Any] = {
        "title": str(record.take("custom_name")),
        "block_view": "supermerger",
    }
    output |= _adjust(record)
    if method == "extract":
        settings["gamma"] = record.number("gamma", "opt_value", default=0.3)
    saved = str(record.take("save_sets"))
    if "fp16" in saved:
        output["dtype"] = "fp16"
    record.take("id_sets")
    if method not in ("cosine_a", "cosine_b"):
        record.blended_vae()
    return record.done(merged(method, *models, rules=rules, **settings), output)


def _weight(record: Record, param: str, blocks: bool) -> Any:
    listed = record.take(f"weights_{param}")
    said = record.take(f"base_{param}")
    where = f"supermerger: base_{param}"
    if not blocks:
        return number(said, where)
    base = None if said == "" else number(said, where)
    return block_weights(listed, base, f"supermerger: weights_{param}")


def _adjust(record: Record) -> dict[str, Any]:
    """The `adjust` of an output from eight numbers: IN, OUT, OUT2, CONT, BRI, COL1, COL2, COL3."""
    said = record.take("adjust", "fine")
    if said == "":
        return {}
    found = numbers(said, "supermerger: adjust")
    if len(found) != 8:
        record.note(
            f"adjust = {shown(said)} is not taken over: {len(found)} numbers, and only the eight"
            " of newer versions have a place in the recipe"
        )
        return {}
    fields = {
        "detail": found[:3],
        "contrast": found[3],
        "brightness": found[4],
        "colour": found[5:],
    }
    return {"adjust": {k: v for k, v in fields.items() if v and v != [0, 0, 0]}}


def from_row(row: dict[str, str]) -> dict[str, Any]:
    """A line of `mergehistory.csv` as fields. Raises Refusal where it is not one."""
    found: dict[str, Any] = {}
    for column, value in row.items():
        found[COLUMNS.get(str(column).strip().lower(), str(column))] = value
    if missing := {"model_a", "model_b", "mode"} - found.keys():
        raise Refusal(f"this is no history of supermerger: it has no {', '.join(sorted(missing))}")
    return found
