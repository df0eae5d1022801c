"""Addresses of files on the web: `https://...`, `http://...`, `hf://owner/repo/file[@revision]`.

In plymix a file on the web is named by an ordinary path whose first part is the scheme,
`Path("https:/host/folder/file")`: its name, its folder and its neighbours are what they are for any
path. What opens files looks at the first part (`is_url`).

What may be secret in an address (a password, a token in the query, a signature) is known to this
process only: `public` takes it out and remembers it, `full` puts it back. So nothing that keeps,
shows or writes an address has it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath

from plymix.errors import Refusal

_URL = re.compile(r"(https?|hf):[/\\]+(?=[^/\\])", re.IGNORECASE)
_PLAIN_QUERY = frozenset({"download", "type", "format", "size", "fp", "revision", "ref", "raw"})
"""Fields of a query that say which file is meant; all others may be secret."""

_private: dict[str, str] = {}


def given(value: object, name: str) -> str:
    """A path or an address that an argument called `name` has, as text. Raises Refusal for others.

    Python says "expected str, bytes or os.PathLike object", and not of which argument.
    """
    found = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(found, str):
        raise Refusal(f"{name} is {value!r}, not a file's name: give a str or a pathlib.Path")
    return found


def is_url(file: str | os.PathLike[str]) -> bool:
    """Whether `file`, as text or as a path, is an address on the web."""
    return bool(_URL.match(os.fspath(file)))


def text(file: str | os.PathLike[str]) -> str:
    """The address that a path stands for: 'https:/host/a' is 'https://host/a'."""
    said = os.fspath(file)
    match = _URL.match(said)
    if match is None:
        return said
    return f"{match[1].lower()}://{said[match.end() :]}".replace("\\", "/")


def public(file: str) -> str:
    """`file` without what may be secret, which is kept for `full`; what is no address as it is.

    'https://me:pw@host/a?type=Model&token=x' -> 'https://host/a?type=Model';
    'hf://owner/repo/dir/a@v1' -> 'hf://owner/repo@v1/dir/a'. Raises Refusal for an address that
    cannot be one.
    """
    if not is_url(file):
        return file
    from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

    said = text(file)
    try:
        parts = urlsplit(said)
        port = parts.port
    except ValueError as e:
        raise Refusal(f"{said[:80]!r} is not an address: {e}") from None
    if not parts.hostname or not said.isprintable() or " " in said:
        raise Refusal("an address has no spaces and names a host: https://host/folder/file")
    if parts.scheme == "hf":
        return _hub(said)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    host += f":{port}" if port else ""
    fields = parse_qsl(parts.query, keep_blank_values=True)
    query = urlencode([(k, v) for k, v in fields if k in _PLAIN_QUERY])
    shown = urlunsplit((parts.scheme, host, parts.path or "/", query, ""))
    whole = urlunsplit((parts.scheme, parts.netloc, parts.path or "/", parts.query, ""))
    if whole != shown:
        _private[shown] = whole
    return shown


def _hub(said: str) -> str:
    from urllib.parse import quote, unquote

    owner, _, rest = said[len("hf://") :].partition("?")[0].partition("/")
    repo, _, file = rest.partition("/")
    repo, _, revision = repo.partition("@")
    if not revision:
        file, _, revision = file.rpartition("@") if "@" in file else (file, "", "")
    if not (owner and repo and file) or file.endswith("/") or ".." in file.split("/"):
        raise Refusal(f"{said[:120]} names no file: write hf://owner/repo/folder/file[@revision]")
    at = f"@{quote(unquote(revision), safe='')}" if revision else ""
    return f"hf://{owner}/{repo}{at}/{file}"


def full(file: str | os.PathLike[str]) -> str:
    """The whole address of what `public` gave, secrets included, to be asked for on the web."""
    said = text(file)
    if not said.startswith("hf://"):
        return _private.get(said, said)
    from urllib.parse import quote

    owner, repo, name = said[len("hf://") :].split("/", 2)
    repo, _, revision = repo.partition("@")
    return f"{hub()}/{owner}/{repo}/resolve/{revision or 'main'}/{quote(name, safe='/%')}"


def hub() -> str:
    """Where `hf://` leads: the Hugging Face Hub, or what HF_ENDPOINT says."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def name(file: str | os.PathLike[str]) -> str:
    """The last part of a path or address, without folders and without a query."""
    if not is_url(file):
        return PurePath(file).name
    from urllib.parse import unquote, urlsplit

    return unquote(PurePath(urlsplit(public(os.fspath(file))).path).name)


def path(file: str | os.PathLike[str]) -> Path:
    """`file` as a path without secrets."""
    return Path(public(os.fspath(file))) if is_url(file) else Path(file)
