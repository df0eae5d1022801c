"""What a diffusers folder holds besides its tensors: configurations, tokenizers, the scheduler.

They are those of a folder given for the purpose, else of the base model's folder; what these lack
is made from the shapes of the tensors (see `plymix.archs.configs`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from plymix.archs import configs as making
from plymix.archs import zero_terminal_snr
from plymix.errors import Refusal, listed
from plymix.formats import open_model
from plymix.formats.base import Content
from plymix.formats.diffusers import CONFIG, MODEL_INDEX
from plymix.images import tokens
from plymix.metadata import CONFIG_KEY
from plymix.plan import Plan

SCHEDULER = "scheduler/scheduler_config.json"


def configs(plan: Plan, given: str | Path = "") -> dict[str, Content]:
    """The small files of the folder that `plan` makes, by their path in it.

    `given` is a diffusers folder whose files are taken before all others. Raises Refusal where a
    configuration is neither given nor can be made.
    """
    found: dict[str, Content] = dict(plan.base.source.configs)
    if given:
        found |= _of_folder(Path(given), plan)
    if not plan.folder:
        (component,) = plan.components
        inner = found.get(CONFIG) or found.get(f"{component}/{CONFIG}")
        return {CONFIG: inner or making.text(_made(plan, component))}
    for component in plan.components:
        file = f"{component}/{CONFIG}"
        if file not in found:
            found[file] = found.get(CONFIG) or making.text(_made(plan, component))
    found.pop(CONFIG, None)
    gone = set(plan.base.components).difference(plan.components)
    found = {path: c for path, c in found.items() if path.partition("/")[0] not in gone}
    if MODEL_INDEX not in found:
        found |= _pipeline(plan, found)
    else:
        found[MODEL_INDEX] = _corrected(plan, found[MODEL_INDEX], gone)
    return found


def remarks(plan: Plan, files: Mapping[str, Content]) -> Iterator[str]:
    """What a user should know of a folder with these small files."""
    if not plan.folder or MODEL_INDEX in plan.base.source.configs:
        return
    inside = {path.partition("/")[0] for path in files}
    encoders = {name for name in inside if name.startswith("text_encoder")}
    if lost := sorted({e.replace("text_encoder", "tokenizer") for e in encoders} - inside):
        yield (
            f"the folder has no {listed(lost)}, for a checkpoint has none: give a diffusers folder"
            f" that has one by --configs, or {lost[0]}= when you load it"
        )
    if (
        isinstance(files.get(SCHEDULER), bytes)
        and plan.arch
        and plan.arch.name == "sd2"
        and not plan.denoiser.prediction
    ):
        yield (
            f"{plan.base.label} does not say what it predicts; {SCHEDULER} says epsilon. For a"
            " v-prediction model write v_prediction there"
        )


def _of_folder(path: Path, plan: Plan) -> dict[str, Content]:
    if not os.path.isdir(path):
        raise Refusal(f"--configs {path} is not a folder; name a diffusers folder")
    with open_model(path) as source:
        return dict(source.configs)


def _made(plan: Plan, component: str) -> dict[str, Any]:
    start = f"{component}/" if plan.folder else ""
    shapes = {t.name[len(start) :]: t.shape for t in plan.tensors if t.name.startswith(start)}
    if plan.arch is None:
        raise Refusal(f"{component}/{CONFIG} is missing; give a folder that has it by --configs")
    made = making.component(plan.arch, component, shapes, plan.denoiser.prediction)
    said: dict[str, Any] = json.loads(plan.base.source.metadata.get(CONFIG_KEY, "{}"))
    made.update(said.get(component, {}))
    return made


def _pipeline(plan: Plan, found: Mapping[str, Content]) -> dict[str, Content]:
    """model_index.json and the scheduler of a model that had neither."""
    assert plan.arch is not None
    detection, source = plan.denoiser.detection, plan.denoiser.source
    added: dict[str, Content] = {}
    for name, (kind, openclip) in making.tokenizers(plan.arch, list(plan.components)).items():
        if kind == "CLIPTokenizer" and not any(path.startswith(f"{name}/") for path in found):
            files = tokens.files("!") if openclip else tokens.files()
            added |= {f"{name}/{file}": content for file, content in files.items()}
    inside = dict.fromkeys((*plan.components, *(p.partition("/")[0] for p in (*found, *added))))
    index = making.pipeline(plan.arch, detection.variant, list(inside))
    zero = zero_terminal_snr(source.tensors, source.metadata)
    scheduler = making.scheduler(plan.arch, detection.variant, plan.denoiser.prediction, zero)
    return {MODEL_INDEX: making.text(index), SCHEDULER: making.text(scheduler), **added}


def _corrected(plan: Plan, index: Content, gone: Collection[str]) -> Content:
    """`index` with the components that it lacks, and null for those that are `gone`."""
    text = index if isinstance(index, bytes) else index.read_bytes()
    said: dict[str, Any] = json.loads(text)
    missing = [c for c in plan.components if not (said.get(c) or [None])[0]]
    absent = {c: [None, None] for c in said if c in gone}
    if plan.arch is None or not (missing or absent):
        return index
    made = making.pipeline(plan.arch, plan.denoiser.detection.variant, missing)
    return making.text(said | absent | {c: made[c] for c in missing})
