"""Byte ranges of a file on a web server: redirects, retries, and that it stays the same file.

Python's own HTTP client is enough: one GET with a Range per request, connections kept open. What a
client library would add (cookies, HTTP/2, forms) is not needed, and so no dependency is.

Sources: RFC 9110 (ranges, 206, If-Range and entity tags, Retry-After); the Hub's headers
X-Linked-ETag (the SHA-256 of a large file) and X-Linked-Size as huggingface_hub reads them.
"""

from __future__ import annotations

import base64
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import NamedTuple, cast
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from plymix import urls
from plymix.errors import Cancelled, Failure, PlymixError, Refusal

PIECE = 1 << 16
"""Bytes taken from a connection at a time."""

WHOLE = 16 << 20
"""A file up to this size is taken whole from a server that does not serve ranges."""

TIMEOUT = 30.0
"""Seconds without a single byte after which a connection counts as broken."""

CONNECT = 10.0
"""Seconds to reach a server."""

TRIES = 6
"""Requests in a row that may fail before giving up."""

FIRST_TRIES = 3
"""The same where no server has answered at all yet."""

PAUSE = 0.5
"""Seconds before the second try, doubled for each further one."""

LONGEST_PAUSE = 60.0
REDIRECTS = 10

_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")

Put = Callable[[int, memoryview], None]
"""Called with the offset of each piece of a file, and its bytes."""


class Broken(Exception):
    """A request that failed in a way that may pass; `after` is how long the server asks to wait."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class Identity(NamedTuple):
    """What tells one version of a file from another."""

    size: int
    etag: str
    linked: str  # the Hub's tag, where the bytes themselves come from another host


class WebFile:
    """One file on a web server. Its address is `urls.text(path)`; messages say no more than that.

    `identity` is what the first answer said; a later one that differs is a Failure.
    """

    def __init__(self, address: str) -> None:
        self.shown = urls.text(address)
        self._url = urls.full(address)
        self._where = self._url  # after redirections
        self._idle: list[tuple[tuple[str, str], HTTPConnection]] = []
        self._busy: dict[HTTPConnection, socket.socket | None] = {}
        self._lock = threading.Lock()
        self.stops = 0
        self._wake = threading.Event()
        self.identity: Identity | None = None
        self.ranges = True

    @property
    def sha256(self) -> str:
        """What the Hub says is the file's SHA-256; "" from other servers."""
        linked = self.identity.linked if self.identity else ""
        return linked if _SHA256.fullmatch(linked) else ""

    # ---- asking

    def stream(self, start: int, stop: int, put: Put, began: int = 0) -> None:
        """Fetch bytes [start, stop), handing each piece to `put`; goes on where a connection broke.

        The first call may ask for more than the file has. `began` is what `stops` was when the read
        began that this is a part of. Raises Refusal when the file cannot be
        had at all, Failure when it changed or the server failed too often, Cancelled by `stop`.
        """
        at, tries, mark = start, 0, start
        while at < stop:
            try:
                with self._answer(at, stop, began) as (response, first, last):
                    stop = min(stop, last)
                    buffer = memoryview(bytearray(PIECE))
                    at = self._skip(response, first, at, buffer)
                    while at < stop:
                        n = response.readinto(buffer[: min(PIECE, stop - at)])
                        if not n:
                            raise Broken("the connection ended early")
                        put(at, buffer[:n])
                        at += n
            except (OSError, HTTPException, Broken) as e:
                tries, mark = (1 if at - mark >= PIECE else tries + 1), at
                if self.stops == began:
                    self._pause(tries, e)
            self.goes_on(began)

    def goes_on(self, began: int) -> None:
        """Raise Cancelled where `stop` was called since there had been `began` stops."""
        if self.stops != began:
            raise Cancelled("stopped; nothing was written")

    def _skip(self, response: HTTPResponse, first: int, at: int, buffer: memoryview) -> int:
        """Read on to byte `at` of an answer that begins at `first`."""
        while first < at:
            n = response.readinto(buffer[: min(PIECE, at - first)])
            if not n:
                raise Broken("the connection ended early")
            first += n
        return at

    def _pause(self, tries: int, e: Exception) -> None:
        """Wait before the next try. Raises Refusal or Failure where there should be none."""
        why = str(e) if isinstance(e, (OSError, Broken)) else type(e).__name__
        final = isinstance(e, (socket.gaierror, ssl.SSLCertVerificationError))
        absent = isinstance(e, OSError) and self.identity is None  # nobody there at all
        if final or tries >= (FIRST_TRIES if absent else TRIES):
            raise self._error(f"cannot be fetched: {why} ({tries} tries); try again later")
        after = e.after if isinstance(e, Broken) else 0.0
        self._wake.wait(min(max(PAUSE * 2 ** (tries - 1), after), LONGEST_PAUSE))

    def _error(self, what: str) -> PlymixError:
        """A Refusal before anything was read, else a Failure."""
        return (Failure if self.identity else Refusal)(f"{self.shown} {what}")

    @contextmanager
    def _answer(self, start: int, stop: int, began: int) -> Iterator[tuple[HTTPResponse, int, int]]:
        """(the answer, the byte its body begins with, the byte the file or the range ends before).

        Raises Broken or what a connection raises for what may pass, PlymixError for what will not.
        """
        url, linked = self._where, None
        for _ in range(REDIRECTS + 1):
            parts = urlsplit(url)
            connection, response = self._ask(parts, start, stop, began)
            reusable = False
            try:
                if url == self._url:
                    linked = _tag(response.getheader("X-Linked-ETag"))
                target = self._redirected(response, url)
                if target is None:
                    first, last = self._understood(response, url, linked, start, stop)
                    self._where = url
                    yield response, first, last
                reusable = response.isclosed()
            finally:
                self._done(parts, connection, reusable)
            if target is None:
                return
            url = target
        raise self._error(f"leads to more than {REDIRECTS} redirections; check the address")

    def _ask(
        self, parts: SplitResult, start: int, stop: int, began: int
    ) -> tuple[HTTPConnection, HTTPResponse]:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if parts.scheme == "http" and _proxy(parts):
            target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
        target = quote(target, safe="%/:=&?~+!$,;'@()*[]")
        headers = self._headers(parts, start, stop)
        while True:
            connection, fresh = self._connection(parts)
            try:
                if connection.sock is None:
                    connection.connect()
                    cast("socket.socket", connection.sock).settimeout(TIMEOUT)
                with self._lock:
                    self._busy[connection] = connection.sock
                    self.goes_on(began)
                connection.request("GET", target, headers=headers)
                return connection, connection.getresponse()
            except (OSError, HTTPException):
                self._done(parts, connection, False)
                self.goes_on(began)
                if fresh:  # one that was kept open may have been closed meanwhile
                    raise
            except BaseException:
                self._done(parts, connection, False)
                raise

    def _headers(self, parts: SplitResult, start: int, stop: int) -> dict[str, str]:
        from plymix import __version__

        headers = {
            "User-Agent": f"plymix/{__version__}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Range": f"bytes={start}-{stop - 1}",
        }
        own = urlsplit(self._url)
        if (parts.scheme, parts.netloc) != (own.scheme, own.netloc):
            return headers  # what is for one host is not for those it leads to
        safe = parts.scheme == "https" or bool(_LOOPBACK.fullmatch(parts.hostname or ""))
        token = os.environ.get("HF_TOKEN", "").strip()
        if parts.username is not None:
            said = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(said.encode()).decode()}"
        elif token and safe and f"{parts.scheme}://{parts.netloc}" == urls.hub():
            headers["Authorization"] = f"Bearer {token}"
        return headers

    # ---- understanding

    def _redirected(self, response: HTTPResponse, url: str) -> str | None:
        """Where the answer says the file is; None where it is here."""
        if response.status not in (301, 302, 303, 307, 308):
            return None
        response.read(PIECE)
        target = urljoin(url, response.getheader("Location") or "")
        parts = urlsplit(target)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise self._error("leads to an address that is none; check it")
        if parts.scheme == "http" and urlsplit(url).scheme == "https":
            raise self._error("leads to an address that is not encrypted; download the file")
        return target

    def _understood(
        self, response: HTTPResponse, url: str, linked: str | None, start: int, stop: int
    ) -> tuple[int, int]:
        status, said = response.status, f"the server says {response.status} {response.reason}"
        if linked is None:  # asked for where the redirections led before
            linked = self.identity.linked if self.identity else ""
        if status in (408, 425, 429) or status >= 500:
            raise Broken(said, _retry_after(response))
        if status in (401, 403, 404, 410) and url != self._url:
            self._where = self._url  # that address was good for a while only
            raise Broken(said)
        if status == 206:
            return self._part(response, linked, start, stop)
        if status == 200:
            return self._all(response, linked)
        if status == 416:
            found = _RANGE.fullmatch(response.getheader("Content-Range", ""))
            size = int(found[3]) if found else -1
            if self.identity is None and size == 0:
                self._same(Identity(0, _etag(response), linked))
                return 0, 0
            raise self._error("changed while it was read: it is shorter now; start again")
        raise self._error(f"cannot be had: {said}; {self._advice(status)}")

    def _advice(self, status: int) -> str:
        hub = self.shown.startswith("hf://")
        if status in (401, 403) and hub:
            return "set HF_TOKEN to a token that may read it, and accept the model's terms there"
        if status in (401, 403):
            return "it needs a login; download it and name the file"
        if status in (404, 410):
            return "check owner, repository, file and revision" if hub else "check the address"
        return "download it and name the file"

    def _part(self, response: HTTPResponse, linked: str, start: int, stop: int) -> tuple[int, int]:
        said = _RANGE.fullmatch(response.getheader("Content-Range", ""))
        if not said or said[1] is None or response.getheader("Content-Encoding"):
            raise self._error("comes as no plain byte range; download it and name the file")
        first, last, size = int(said[1]), int(said[2]) + 1, int(said[3])
        if first != start or not first < last <= min(stop, size):
            raise self._error(
                f"comes as bytes {first:,} to {last:,} of {size:,} when {start:,} to {stop:,} were"
                " asked for; download it and name the file"
            )
        if response.length is not None and response.length != last - first:
            raise Broken(f"{response.length:,} bytes for a range of {last - first:,}")
        self._same(Identity(size, _etag(response), linked))
        return first, min(stop, size)

    def _all(self, response: HTTPResponse, linked: str) -> tuple[int, int]:
        """The answer of a server that serves no ranges."""
        size = response.length
        if size is None or response.getheader("Content-Encoding"):
            raise self._error("comes without its size; download it and name the file")
        if size > WHOLE:
            raise self._error(
                "is on a server that does not serve parts of a file; download it and name the file"
            )
        self.ranges = False
        self._same(Identity(size, _etag(response), linked))
        return 0, size

    def _same(self, found: Identity) -> None:
        with self._lock:
            known = self.identity = self.identity or found
        if found.size != known.size:
            how = f"it had {known.size:,} bytes and has {found.size:,}"
        elif found != known:
            how = "its ETag is another"
        else:
            return
        raise self._error(f"changed while it was read: {how}; start again")

    # ---- connections

    def _connection(self, parts: SplitResult) -> tuple[HTTPConnection, bool]:
        """A connection to a host, and whether it is a new one."""
        key = (parts.scheme, parts.netloc)
        with self._lock:
            found = next((at for at, (known, _) in enumerate(self._idle) if known == key), None)
            connection = _connect(parts) if found is None else self._idle.pop(found)[1]
        return connection, found is None

    def _done(self, parts: SplitResult, connection: HTTPConnection, reusable: bool) -> None:
        with self._lock:
            self._busy.pop(connection, None)
            if reusable:
                self._idle.append(((parts.scheme, parts.netloc), connection))
                return
        connection.close()

    def stop(self) -> None:
        """Have every `stream` that runs now end with Cancelled, at once."""
        with self._lock:
            self.stops += 1
            busy = [sock for sock in self._busy.values() if sock is not None]
        self._wake.set()
        for sock in busy:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._wake.clear()

    def close(self) -> None:
        self.stop()
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()


def _tag(said: str | None) -> str:
    return (said or "").removeprefix("W/").strip('"')


def _etag(response: HTTPResponse) -> str:
    return _tag(response.getheader("ETag")) or response.getheader("Last-Modified", "")


def _retry_after(response: HTTPResponse) -> float:
    """Seconds a server asks to wait; a date counts as a short while."""
    said = response.getheader("Retry-After", "")
    return float(said) if said.isdecimal() and len(said) < 6 else 0.0


def _proxy(parts: SplitResult) -> str:
    """The proxy that the environment names for an address, or ""."""
    host = parts.hostname or ""
    if _LOOPBACK.fullmatch(host) or proxy_bypass(host):
        return ""
    return getproxies().get(parts.scheme, "")


def _connect(parts: SplitResult) -> HTTPConnection:
    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    proxy = urlsplit(_proxy(parts))
    if not proxy.hostname:
        if secure:
            return HTTPSConnection(host, port, timeout=CONNECT, context=_trust())
        return HTTPConnection(host, port, timeout=CONNECT)
    at = proxy.port or (443 if proxy.scheme == "https" else 80)
    if not secure:
        return HTTPConnection(proxy.hostname, at, timeout=CONNECT)
    connection = HTTPSConnection(proxy.hostname, at, timeout=CONNECT, context=_trust())
    headers = {}
    if proxy.username is not None:
        said = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(said.encode()).decode()}"
    connection.set_tunnel(host, port, headers)
    return connection


@cache
def _trust() -> ssl.SSLContext:
    return ssl.create_default_context()
