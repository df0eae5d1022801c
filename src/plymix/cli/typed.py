"""Errors and notes in the words that were typed.

A merge of two models, a conversion and the like are recipes, whose fields their errors name. Who
typed options never saw one: 'steps.merge.alpha' is --alpha then, 'output.dtype' is --dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from plymix.errors import PlymixError

WORDS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r" \(output\.\w+ = [^)]*\)", ""),  # the recipe's way beside the option's
    (r"--alpha\.base\b(?: =)?", "--base"),
    (r"\bsteps\.merge \((\w+)\)", r"--method \1"),
    (r"\bsteps\.merge: (\w+) =", r"--\1 ="),
    (r"\boutput\.(\w+)(?: =)?", lambda m: "--" + m[1].replace("_", "-")),
    (r"\buse text_encoder\b(?! =)", "use --text-encoder"),
    (r'\b(vae|rounding) = "(\w+)"', r"--\1 \2"),
)


def words(text: str, weights: str = "--alpha") -> str:
    """`text` in the words of a command line whose option for block weights is `weights`."""
    text = re.sub(r"\bsteps\.merge\.alpha\b|(?<![\w.-])alpha(?=: | is |\.base| ')", weights, text)
    text = re.sub(r"\bwrite (\{.*?\})", rf"say {weights} '\1'", text)
    for pattern, said in WORDS:
        text = re.sub(pattern, said, text)
    return text


@contextmanager
def typed(weights: str = "--alpha") -> Iterator[None]:
    """Errors that are raised within it are raised in `words`."""
    try:
        yield
    except PlymixError as e:
        raise type(e)(words(str(e), weights)) from e
