"""The backend `comfyui`: a running ComfyUI.

The merged file is written into its folder of checkpoints and removed when the next one is used. A
picture is a graph of seven nodes in API format; its image is a preview, so nothing stays in
ComfyUI's output folder.

API: https://docs.comfy.org/development/comfyui-server/comms_routes
"""

from __future__ import annotations

import contextlib
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import PureWindowsPath
from typing import Any

from plymix.errors import Failure
from plymix.images.base import SAMPLERS, Options, Picture, Settings, Tick
from plymix.images.server import Checkpoints, Server, picture
from plymix.plan import Plan

URL = "http://127.0.0.1:8188"
LOADER = "CheckpointLoaderSimple"
PAUSE = 0.25
"""Seconds between two questions whether a picture is ready."""


def open(options: Options) -> ComfyUI:
    """The backend. Raises Refusal without a folder, Failure where no server answers."""
    return ComfyUI(options)


class ComfyUI:
    """A server and the file it draws with."""

    def __init__(self, options: Options) -> None:
        self.files = Checkpoints(options, "comfyui")
        self.server = Server("ComfyUI", options, URL, "start it")
        told = self.server.json("/system_stats", timeout=30)
        version = (told or {}).get("system", {}).get("comfyui_version", "")
        self.label = f"comfyui {version} {self.server.url}".replace("  ", " ")
        self._name = ""
        self._old: Any = None

    def check(self, plan: Plan, asked: Sequence[Settings]) -> None:
        """Refuse a model that is no checkpoint file."""
        self.files.check(plan)

    def use(self, plan: Plan) -> None:
        name = self.files.put(plan)
        made = self.files.made()
        try:
            self._name = self._listed(name)
        except BaseException:
            self.files.drop(made)
            raise
        self.files.drop(self._old)
        self._old = made

    def _listed(self, name: str) -> str:
        """How the server calls a file of its folder: with folders below that one before it."""
        found = self.server.json(f"/object_info/{LOADER}")
        try:
            known = found[LOADER]["input"]["required"]["ckpt_name"]
            names = known[1]["options"] if known[0] == "COMBO" else known[0]
        except (KeyError, IndexError, TypeError):
            raise Failure(f"{self.server.url} does not say which checkpoints it has") from None
        for one in names:
            if PureWindowsPath(one).name == name:
                return str(one)
        raise Failure(
            f"ComfyUI at {self.server.url} does not list {name}: --model-folder must be its own"
            f" folder of checkpoints (it lists {len(names)} other files)"
        )

    def draw(self, asked: Sequence[Settings], tick: Tick) -> Iterator[Picture]:
        for settings in asked:
            settings.checked()
            queued = self.server.json("/prompt", {"prompt": graph(settings, self._name)})
            if not isinstance(queued, dict) or "prompt_id" not in queued:
                raise Failure(f"ComfyUI at {self.server.url} did not take the graph: {queued}")
            number = str(queued["prompt_id"])
            try:
                found = self._finished(number)
            except BaseException:
                with contextlib.suppress(Failure):  # this graph alone, not another user's
                    self.server.json("/queue", {"delete": [number]}, timeout=5)
                    self.server.json("/interrupt", {"prompt_id": number}, timeout=5)
                raise
            where = urllib.parse.urlencode({k: found[k] for k in ("filename", "subfolder", "type")})
            data = self.server.bytes(f"/view?{where}")
            yield picture(data, settings.width, settings.height, "ComfyUI")
            tick(1)

    def _finished(self, number: str) -> dict[str, Any]:
        """The image that a queued graph made, when it has."""
        until = time.monotonic() + self.server.timeout
        while time.monotonic() < until:
            history = self.server.json(f"/history/{number}")
            entry = history.get(number) if isinstance(history, dict) else None
            if entry:
                status = entry.get("status") or {}
                if status.get("status_str") == "error":
                    raise Failure(f"ComfyUI at {self.server.url} failed: {_reason(status)}")
                for output in (entry.get("outputs") or {}).values():
                    for image in output.get("images") or []:
                        return {"subfolder": "", "type": "temp", **image}
                if status.get("completed"):
                    raise Failure(f"ComfyUI at {self.server.url} sent no picture")
            time.sleep(PAUSE)
        raise Failure(
            f"ComfyUI at {self.server.url} drew no picture within {self.server.timeout:g} s;"
            " --timeout waits longer"
        )

    def close(self) -> None:
        self.files.drop(self._old)
        self._old = None


def _reason(status: dict[str, Any]) -> str:
    for kind, said in status.get("messages") or []:
        if kind == "execution_error":
            return " ".join(str(said.get("exception_message", said)).split())[:300]
    return "it does not say why"


def graph(s: Settings, checkpoint: str) -> dict[str, Any]:
    """A picture's graph in API format."""
    sampler = SAMPLERS[s.sampler]

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    size = {"width": s.width, "height": s.height, "batch_size": 1}
    return {
        "model": node(LOADER, ckpt_name=checkpoint),
        "prompt": node("CLIPTextEncode", text=s.prompt, clip=["model", 1]),
        "negative": node("CLIPTextEncode", text=s.negative, clip=["model", 1]),
        "empty": node("EmptyLatentImage", **size),
        "sampler": node(
            "KSampler",
            model=["model", 0],
            positive=["prompt", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=s.seed,
            steps=s.steps,
            cfg=s.cfg,
            sampler_name=sampler.comfyui,
            scheduler=sampler.scheduler,
            denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
        "picture": node("PreviewImage", images=["decoded", 0]),
    }
