"""What a model predicts, as its file says: marker tensors first, then SAI ModelSpec metadata.

Marker names as ComfyUI writes and reads them (`comfy/model_base.py`, `comfy/supported_models.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from plymix.archs.model import Architecture


@dataclass(frozen=True, slots=True)
class Prediction:
    """`kind` is "v", "epsilon", "edm" or "" (not declared).

    `told` is "marker tensor", "modelspec", "convention" or "unknown".
    """

    kind: str
    told: str


def prediction(
    keys: Collection[str], metadata: Mapping[str, str], arch: Architecture | None
) -> Prediction:
    """What a model with these keys and this metadata predicts, and what says so."""
    if any(key.startswith(("edm_mean", "edm_std")) for key in keys):
        return Prediction("edm", "marker tensor")
    if "v_pred" in keys or any(key.startswith("edm_vpred.") for key in keys):
        return Prediction("v", "marker tensor")
    said = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key", "")
    for start, kind in (("v", "v"), ("eps", "epsilon")):
        if said.startswith(start):
            return Prediction(kind, "modelspec")
    if arch is not None and arch.name == "sdxl":
        # SDXL files without a marker are epsilon models (ComfyUI writes and reads it so).
        return Prediction("epsilon", "convention")
    return Prediction("", "unknown")


def zero_terminal_snr(keys: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether a file says that its noise schedule ends in pure noise (sd-scripts' word for it)."""
    return "ztsnr" in keys or metadata.get("ss_zero_terminal_snr") == "True"
