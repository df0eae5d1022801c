"""merge-block-weighted-gui: its `history.tsv`.

From published descriptions: the weights are the share of model B, and everything that is not the
U-Net is blended by `base_alpha`. From memory: the columns, which are therefore read by name; one
that is not known is told in the notes.
"""

from __future__ import annotations

from typing import Any

from plymix.errors import Refusal
from plymix.importers.base import Imported, Record, block_weights, merged


def read(record: Record) -> Imported:
    """The recipe of a line of the history. Raises Refusal."""
    record.fields = {str(k).strip().lower(): v for k, v in record.fields.items()}
    if missing := {"model_a", "model_b", "weight_values"} - record.fields.keys():
        raise Refusal(f"this is no history of MBW-GUI: it has no {', '.join(sorted(missing))}")
    models = [_model(record, x) for x in "ab"]
    base = record.number("base_alpha", default=0.0)
    alpha = block_weights(record.take("weight_values"), base, "MBW-GUI: weight_values")
    output: dict[str, Any] = {"title": str(record.take("model_o"))}
    if record.truth("save_as_half", "is_fp16"):
        output["dtype"] = "fp16"
    record.take("model_o_hash", "model_o_sha256", "weight_name", "datetime")
    record.blended_vae()
    return record.done(merged("weighted_sum", *models, alpha=alpha), output)


def _model(record: Record, which: str) -> Any:
    name = record.take(f"model_{which}")
    token = record.take(f"model_{which}_sha256")
    record.take(f"model_{which}_hash")
    return record.model(f"{name} [{token}]" if token else name, f"model {which.upper()}")
