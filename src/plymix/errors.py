"""The errors plymix raises.

A message says what was asked, what was found, what was expected and what to do, in one or two
lines. `Refusal` means "this cannot be asked" (command line exit code 2) and is raised before the
first tensor is read; `Failure` means "it was asked rightly and went wrong" (exit code 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LONGEST = 2_000
"""Characters of a message at most: what a file calls its tensors may be of any length."""


class PlymixError(Exception):
    """Base of every error that plymix raises on purpose."""

    exit_code = 1

    def __init__(self, text: str = "") -> None:
        super().__init__(text if len(text) <= LONGEST else text[: LONGEST - 3] + "...")


class Refusal(PlymixError):
    """The request or its inputs cannot be right; nothing was read or written."""

    exit_code = 2


class FormatError(Refusal):
    """A file is not what its format allows: damaged, hostile, or of an unknown kind."""


class Failure(PlymixError):
    """The work was rightly asked for and went wrong: disk full, file gone, and so on."""


class Cancelled(Failure):
    """The user or a progress callback stopped the work."""

    exit_code = 130


def unknown(what: str, name: object, known: Iterable[str], *, help: str = "") -> Refusal:
    """A `Refusal` for a name that does not exist, with the nearest known names."""
    names = sorted(known)
    near = nearest(name, names) if isinstance(name, str) else []
    if near:
        hint = "did you mean " + " or ".join(near) + "?"
    elif len(names) <= 12:
        hint = "known: " + ", ".join(names)
    else:
        hint = f"{len(names)} are known"
    return Refusal(also(f"unknown {what} {name!r}: {hint}", help))


def also(text: str, more: str) -> str:
    """`text` and what else there is to say: 'known: a, b; see ...', 'did you mean a? See ...'."""
    if not more:
        return text
    if not text.endswith("?"):
        return f"{text}; {more}"
    command = more.startswith("plymix ")  # which is spelt as it is typed
    return f"{text} {more if command else more[:1].upper() + more[1:]}"


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """At most three of `known` that `name` may stand for, in any case, the likeliest first.

    Names that begin with it, else that have it as a word, else that are spelt much alike: 'GRAD' is
    GRAD_A or GRAD_V, 'dare' is ties_dare, 'IN9' is IN09. None rather than a far-fetched one.
    """
    from difflib import SequenceMatcher, get_close_matches

    asked = name.casefold()
    folded = {n.casefold(): n for n in known}
    begun = [n for n in folded if n.startswith(asked)]
    words = [n for n in folded if asked in re.split(r"[\W_]+", n)]
    found = sorted(begun or words, key=len) if len(asked) > 1 else []
    if not found:
        found = get_close_matches(asked, folded, n=3, cutoff=0.6)
        ratio = {n: SequenceMatcher(None, n, asked).ratio() for n in found}
        found = [n for n in found if ratio[n] > ratio[found[0]] - 0.1]
    return [folded[n] for n in found[:3]]


def amount(n: int, what: str = "tensor") -> str:
    """'1 tensor', '12 tensors'."""
    return f"{n} {what}" + ("s" if n != 1 else "")


def listed(names: Iterable[str], limit: int = 10) -> str:
    """The first `limit` names and how many more there are: 'a, b, ... and 3 more'."""
    all_names = list(names)
    shown = ", ".join(all_names[:limit])
    rest = len(all_names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
