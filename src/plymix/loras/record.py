"""How a LoRA file was made: what it says of that in its metadata, and what is made again from it.

A result is made of a record and the files it names, and of nothing else: `plymix.replay` makes the
same bytes of the same record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from plymix import api, hashes, urls
from plymix.adapters.spelling import dialect_called
from plymix.errors import Refusal
from plymix.formats import Source
from plymix.loras.work import DTYPES, Policy
from plymix.metadata import signed_sum, today
from plymix.recipe import LORA_KEY, Model, toml


class Input(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A LoRA of a merge, a file to resize or convert, or the tuned model of an extraction.

    `te_strength` None: as `strength`; `blocks` None: 1 in all of them.
    """

    file: str
    size: int = 0
    sha256: str = ""
    strength: float = 1.0
    te_strength: float | None = None
    blocks: Any = None

    @property
    def model(self) -> Model:
        return Model(self.file, self.size, self.sha256)


class Record(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a LoRA file is made of and how.

    base      the model to extract from, or whose names count
    dialect   of the result; "" for names of no model that plymix knows
    rank, conv_rank, energy, size, factor   as in `plymix.loras.work.Policy`
    text_encoders, conv, diffs   what of a model is extracted
    title     the result's name, which its metadata tells even where it is made again as another
    """

    made: Literal["merge", "extract", "resize", "convert"]
    inputs: tuple[Input, ...]
    base: Model | None = None
    dialect: str = ""
    dtype: str = "keep"
    rank: int = 0
    conv_rank: int = 0
    energy: float = 0.0
    size: int = 0
    factor: int = 0
    text_encoders: bool = True
    conv: bool = True
    diffs: bool = False
    seed: int = 0
    title: str = ""
    date: str = ""

    @property
    def policy(self) -> Policy:
        return Policy(self.rank, self.conv_rank, self.energy, self.size, self.factor)

    @property
    def models(self) -> dict[str, Model]:
        """The files it is made of, by names for them: "1", "2" ... and "base"."""
        found = {str(i): one.model for i, one in enumerate(self.inputs, 1)}
        return found | ({"base": self.base} if self.base else {})


def settled(
    record: Record, sources: Sequence[Source], base: Source | None, *, dialect: str, title: str
) -> Record:
    """The record as it is stored: without folders, with sizes and hashes where it has none yet."""
    inputs = zip(record.inputs, sources, strict=True)
    return replace(
        record,
        inputs=tuple(replace(one, **_content(one.model, source)) for one, source in inputs),
        base=base and record.base and replace(record.base, **_content(record.base, base)),
        dialect=dialect,
        title=title,
        date=record.date or today(),
    )


def _content(model: Model, source: Source) -> dict[str, Any]:
    if model.sha256:
        return {}
    file = urls.text(source.path) if urls.is_url(source.path) else source.path.name
    return {
        "file": file,
        "size": source.nbytes,
        "sha256": hashes.model_sha256(source.files),
    }


def to_dict(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(record)
    return found


def to_json(record: Record) -> str:
    return json.dumps(to_dict(record), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def to_toml(record: Record) -> str:
    """The record for people: a table of what was done, and one for each file."""
    fields = to_dict(record)
    inputs, base = fields.pop("inputs"), fields.pop("base", None)
    tables = [("[lora]", fields), *(("[[inputs]]", one) for one in inputs)]
    return toml(tables + ([("[base]", base)] if base else []))


def from_metadata(metadata: Mapping[str, str], where: str) -> Record:
    """The record that a LoRA file carries under `LORA_KEY`. Raises Refusal for what is none."""
    try:
        found = msgspec.convert(json.loads(metadata[LORA_KEY]), Record)
    except (ValueError, RecursionError, msgspec.ValidationError) as e:
        raise Refusal(f"{where}: what it says of how it was made cannot be read: {e}") from None
    for problem in _problems(found):
        raise Refusal(f"{where}: what it says of how it was made cannot be: {problem}")
    if found.dialect:
        dialect_called(found.dialect)
    return found


def _problems(record: Record) -> Iterator[str]:
    one = record.made != "merge"
    if not record.inputs or (one and len(record.inputs) > 1):
        yield f"{len(record.inputs)} inputs of {record.made}"
    if record.made == "extract" and record.base is None:
        yield "a difference from no base"
    if not all(re.fullmatch("[0-9a-fA-F]{64}", model.sha256) for model in record.models.values()):
        yield "inputs without a SHA-256"
    if record.dtype not in ("keep", *DTYPES):
        yield f"dtype = {record.dtype!r}"
    if min(record.rank, record.conv_rank, record.size) < 0 or not 0 <= record.energy <= 1:
        yield "a rank, a size or a share of less than nothing"


# --- for people


def formula(record: Record) -> str:
    """What was made of what, in one line: '0.7 × style.safetensors - 0.3 × eyes.safetensors'."""
    names = [urls.name(one.file) for one in record.inputs]
    match record.made:
        case "convert":
            return f"{names[0]} as {record.dialect}"
        case "resize":
            return f"{names[0]}, {_told(record.policy)}"
        case "extract":
            base = urls.name(record.base.file) if record.base else ""
            return f"{names[0]} - {base}, {_told(record.policy)}"
    terms = [(one.strength, name) for one, name in zip(record.inputs, names, strict=True)]
    text = signed_sum((c, n if abs(c) == 1 else f"{abs(c):.4g} × {n}") for c, n in terms)
    if any(one.te_strength not in (None, one.strength) for one in record.inputs):
        each = (o.strength if o.te_strength is None else o.te_strength for o in record.inputs)
        text += f", text encoder {', '.join(f'{x:.4g}' for x in each)}"
    if any(one.blocks is not None for one in record.inputs):
        text += ", by blocks"
    return ", ".join(filter(None, (text, _told(record.policy))))


def _told(policy: Policy) -> str:
    if policy.energy:
        return f"{100 * policy.energy:g} % of the energy"
    if policy.size:
        return f"in {api.size(policy.size)}"
    conv = f", {policy.conv_rank} of convolutions" if policy.conv_rank else ""
    kind = "LoKr" if policy.factor else ""
    return " of ".join(filter(None, (kind, f"rank {policy.rank}{conv}" if policy.rank else "")))
