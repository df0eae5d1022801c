"""What the backends over HTTP share: a small JSON client, and merged files in a server's folder."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plymix import api
from plymix.errors import Failure, Refusal
from plymix.images.base import Options, Picture
from plymix.images.pixels import pillow
from plymix.plan import Plan
from plymix.recipe import to_json

MOST = 256 << 20
"""Bytes of an answer at most."""


class Server:
    """A program that answers over HTTP. Every way not to answer is a `Failure` that says which."""

    def __init__(self, name: str, options: Options, url: str, start: str) -> None:
        """`url` is where it is by default; `start` says how it is started, for messages."""
        self.name, self.start, self.timeout = name, start, options.timeout
        try:
            said = urllib.parse.urlsplit(options.url or url)
            right = said.scheme in ("http", "https") and said.hostname and said.port != 0
        except ValueError:  # "http://[::1", a port that is no number
            right = False
        if not right:
            raise Refusal(f"--url {options.url}: write it as {url}")
        self.headers = {"Content-Type": "application/json"}
        if said.username:
            pair = ":".join(urllib.parse.unquote(s or "") for s in (said.username, said.password))
            self.headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        host = said.netloc.rpartition("@")[2]
        self.url = f"{said.scheme}://{host}{said.path.rstrip('/')}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def json(self, path: str, body: Any = None, *, timeout: float = 0.0) -> Any:
        """The answer to a GET, or to a POST of `body`, as JSON."""
        data = self.bytes(path, body, timeout=timeout)
        try:
            return json.loads(data) if data.strip() else None
        except ValueError:
            raise Failure(f"{self.url}{path} did not answer in JSON; is it {self.name}?") from None

    def bytes(self, path: str, body: Any = None, *, timeout: float = 0.0) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        wait = timeout or self.timeout
        try:
            with self._opener.open(request, timeout=wait) as answer:
                found: bytes = answer.read(MOST + 1)
        except urllib.error.HTTPError as e:
            with e:
                told = _told(e.read(1 << 16))
            hint = self._hint(e.code) if body is None else ""
            raise Failure(
                f"{self.name} at {self.url} refused {path}: {e.code} {told}{hint}"
            ) from None
        except TimeoutError:
            raise self._late(path, wait) from None
        except urllib.error.URLError as e:
            if isinstance(e.reason, TimeoutError):
                raise self._late(path, wait) from None
            raise Failure(
                f"no {self.name} answers at {self.url} ({e.reason}); {self.start}, or say --url"
            ) from None
        except (OSError, http.client.HTTPException) as e:
            raise Failure(
                f"{self.name} at {self.url} broke off at {path} ({type(e).__name__}); is it still"
                " running? The same command goes on where it was"
            ) from None
        if len(found) > MOST:
            raise Failure(f"{self.url}{path} answered with more than {api.size(MOST)}")
        return found

    def _hint(self, code: int) -> str:
        if code == 401:
            return "; say --url http://NAME:PASSWORD@HOST"
        if code == 404:
            return f"; is it {self.name}? {self.start[0].upper()}{self.start[1:]}, or say --url"
        return ""

    def _late(self, path: str, wait: float) -> Failure:
        return Failure(
            f"{self.name} at {self.url} did not answer {path} within {wait:g} s; --timeout waits"
            " longer"
        )


def _told(data: bytes) -> str:
    """What an error's answer says, in one line."""
    try:
        found = json.loads(data)
    except ValueError:
        found = data.decode("utf-8", "replace")
    if isinstance(found, Mapping):
        names = ("detail", "errors", "message", "error")
        found = next((found[n] for n in names if found.get(n)), found)
    text = found if isinstance(found, str) else json.dumps(found)
    return " ".join(text.split())[:300]


class Checkpoints:
    """The merged files of a sheet in a server's folder, one at a time."""

    def __init__(self, options: Options, name: str) -> None:
        if not options.folder:
            raise Refusal(
                f"--backend {name} writes merged files where the server looks for checkpoints: say"
                " --model-folder DIR"
            )
        self.folder = Path(options.folder).expanduser()
        if not self.folder.is_dir():
            raise Refusal(f"--model-folder {self.folder} is not a folder")
        self._keep = options.keep
        self._made: Path | None = None

    def check(self, plan: Plan) -> None:
        """Refuse a model that cannot be written as the one file a server loads."""
        _, layout = plan.layout(self._path(plan), {})
        if layout.index:
            raise Refusal(f"a server loads one file: leave out output.shard of {plan.base.label}")
        api.ready(self._path(plan), force=True)

    def put(self, plan: Plan) -> str:
        """The name of the file that holds the plan's model. The last one stays until `drop`.

        A model that is no merge and lies there already is taken as it is.
        """
        only = plan.inputs[0].source.path if len(plan.inputs) == 1 else None
        if only is not None and not plan.recipe.steps and not plan.merged and only.is_file():
            there = only.resolve()
            if there.parent == self.folder.resolve():
                return there.name
        path = self._path(plan)
        if not path.exists():
            api.ready(path, force=False)
            api.run(plan, path)
            self._made = path
        return path.name

    def _path(self, plan: Plan) -> Path:
        return self.folder / f"plymix-{_digest(plan)}.safetensors"

    def made(self) -> Path | None:
        """The file that `put` wrote last, to be removed by `drop` when the server has another."""
        made, self._made = self._made, None
        return made

    def drop(self, path: Path | None) -> None:
        if path is None or self._keep:
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            raise Failure(f"cannot remove {path}: {e.strerror}; the server may hold it") from None


def _digest(plan: Plan) -> str:
    """Tells merges apart, so that no server takes one from its cache for another."""
    told = [to_json(plan.recipe)]
    for i in plan.inputs:
        for file in i.source.files:
            stat = file.stat()
            told.append(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(told).encode("utf-8", "replace")).hexdigest()[:12]


def picture(data: bytes, width: int, height: int, who: str) -> Picture:
    """The pixels of an image file. Raises Failure for another size than was asked for."""
    import numpy as np

    image = pillow()
    try:
        with image.open(io.BytesIO(data)) as opened:
            found = np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        raise Failure(f"{who} sent something that is no picture") from None
    if found.shape != (height, width, 3):
        raise Failure(
            f"{who} sent {found.shape[1]}x{found.shape[0]} pixels; {width}x{height} were asked for"
        )
    return found
