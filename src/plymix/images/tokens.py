"""Prompts -> the tokens of CLIP, which all of Stable Diffusion's text encoders read.

Byte pair encoding with OpenAI CLIP's merges (`data/clip_merges.txt.gz`, MIT): a word's bytes, each
shown as a printable character and the last marked `</w>`, are joined pair by pair, earliest merge
first. The ids are those of transformers' `CLIPTokenizer` and of open_clip.
"""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import chain, pairwise
from json.encoder import encode_basestring
from pathlib import Path

START, END = 49406, 49407
MARKS = ("<|startoftext|>", "<|endoftext|>")
"""Start and end, as the tokenizer's files name them."""

WINDOW = 75
"""Tokens that a text encoder reads at once, besides start and end."""

_MERGES = Path(__file__).parent / "data" / "clip_merges.txt.gz"
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\s\w]|_)+")


@cache
def _letters() -> dict[int, str]:
    """Each byte's printable character: its own where it has one, else one from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in own)
    return {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(others)}


def _pairs() -> list[str]:
    """All merges, the earliest first: two parts with a space between."""
    return gzip.decompress(_MERGES.read_bytes()).decode("utf-8").split("\n")


def _spelt(pairs: list[str]) -> Iterator[str]:
    """The tokens in the order of their ids, but for start and end."""
    letters = _letters().values()
    yield from letters
    yield from (letter + "</w>" for letter in letters)
    yield from (pair.replace(" ", "") for pair in pairs)


@cache
def _vocabulary() -> tuple[dict[str, int], dict[tuple[str, ...], int]]:
    """(token -> id, pair -> rank)."""
    pairs = _pairs()
    ids = {token: i for i, token in enumerate(_spelt(pairs))}
    return ids, {tuple(pair.split()): i for i, pair in enumerate(pairs)}


@cache
def _tables() -> dict[str, bytes]:
    """The two large files of a tokenizer, made piece by piece: a merge's memory is small."""
    pairs = _pairs()
    vocabulary, merges = bytearray(b"{"), bytearray(b"#version: 0.2\n")
    for i, token in enumerate(chain(_spelt(pairs), MARKS)):
        vocabulary += f"{', ' if i else ''}{encode_basestring(token)}: {i}".encode()
    for pair in pairs:
        merges += f"{pair}\n".encode()
    return {"vocab.json": bytes(vocabulary + b"}"), "merges.txt": bytes(merges)}


def files(pad: str = MARKS[1]) -> dict[str, bytes]:
    """The files of transformers' `CLIPTokenizer`, by name. OpenCLIP's encoders pad with "!"."""
    start, end = MARKS
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": WINDOW + 2}
    return {
        **_tables(),
        "special_tokens_map.json": json.dumps(special, indent=2).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def tokens(text: str) -> list[int]:
    """The ids of a text's tokens, without start and end."""
    ids, _ = _vocabulary()
    return [ids[part] for word in _words(text) for part in _joined(word)]


def _words(text: str) -> Iterator[str]:
    text = unicodedata.normalize("NFC", text).lower()
    # Every digit, of any script, is a word.
    text = "".join(f" {c} " if unicodedata.category(c)[0] == "N" else c for c in text)
    for word in _WORD.findall(text):
        yield "".join(_letters()[b] for b in word.encode("utf-8", "replace"))


@cache
def _joined(word: str) -> tuple[str, ...]:
    _, ranks = _vocabulary()
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        parts = list(_merged(parts, best))
    return tuple(parts)


def _merged(parts: list[str], pair: tuple[str, str]) -> Iterator[str]:
    """`parts` with every occurrence of `pair`, from the left, as one."""
    at = 0
    while at < len(parts):
        both = tuple(parts[at : at + 2]) == pair
        yield "".join(parts[at : at + 1 + both])
        at += 1 + both


def windows(text: str, count: int = 1) -> list[list[int]]:
    """A text's tokens in windows of 75, at least `count` of them (the further ones empty)."""
    found = tokens(text)
    cut = [found[i : i + WINDOW] for i in range(0, len(found), WINDOW)]
    return cut + [[]] * (max(count, 1) - len(cut))
