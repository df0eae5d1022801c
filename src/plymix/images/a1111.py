"""The backend `a1111`: a running Stable Diffusion web UI, or Forge, started with `--api`.

The merged file is written into its folder of checkpoints, refreshed, chosen for each picture, and
removed when the next one is chosen; at the end the server has the checkpoint it had before.

API: https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import PurePath, PureWindowsPath
from typing import Any

from plymix.errors import Failure, Refusal, listed
from plymix.images.base import SAMPLERS, Options, Picture, Settings, Tick
from plymix.images.server import Checkpoints, Server, picture
from plymix.plan import Plan

URL = "http://127.0.0.1:7860"


def open(options: Options) -> A1111:
    """The backend. Raises Refusal without a folder, Failure where no server answers."""
    return A1111(options)


class A1111:
    """A server, the file it draws with, and what it had before."""

    def __init__(self, options: Options) -> None:
        self.files = Checkpoints(options, "a1111")
        self.server = Server("the web UI", options, URL, "start it with --api")
        found = self.server.json("/sdapi/v1/samplers", timeout=30)
        self._samplers = {s.get("name") for s in found or [] if isinstance(s, dict)}
        before = self.server.json("/sdapi/v1/options", timeout=30) or {}
        self._before = before.get("sd_model_checkpoint")
        self._title = ""
        self._old: Any = None  # the file that is in use
        self.label = f"a1111 {self.server.url}"

    def check(self, plan: Plan, asked: Sequence[Settings]) -> None:
        """Refuse a model that is no checkpoint file, and samplers that the server lacks."""
        self.files.check(plan)
        for settings in asked:
            self._request(settings)

    def use(self, plan: Plan) -> None:
        name = self.files.put(plan)
        made = self.files.made()
        try:
            self.server.json("/sdapi/v1/refresh-checkpoints", {})
            self._title = self._listed(name)
            self.server.json("/sdapi/v1/options", {"sd_model_checkpoint": self._title})
        except BaseException:
            self.files.drop(made)
            raise
        self.files.drop(self._old)
        self._old = made

    def _listed(self, name: str) -> str:
        """The title by which the server knows a file of its folder."""
        known = self.server.json("/sdapi/v1/sd-models")
        for model in known if isinstance(known, list) else []:
            if PureWindowsPath(model.get("filename") or "").name == name:
                return str(model.get("title") or model.get("model_name"))
        seen = {str(PurePath(m.get("filename") or "").parent) for m in known or []}
        raise Failure(
            f"the web UI at {self.server.url} does not list {name}: --model-folder must be its own"
            f" folder of checkpoints (it has files in {', '.join(sorted(seen)) or 'none'})"
        )

    def draw(self, asked: Sequence[Settings], tick: Tick) -> Iterator[Picture]:
        for settings in asked:
            try:
                found = self.server.json("/sdapi/v1/txt2img", self._request(settings))
            except KeyboardInterrupt:
                with contextlib.suppress(Failure):
                    self.server.json("/sdapi/v1/interrupt", {}, timeout=5)
                raise
            images = found.get("images") if isinstance(found, dict) else None
            if not images:
                raise Failure(f"the web UI at {self.server.url} sent no picture")
            try:
                data = base64.b64decode(images[0].rpartition(",")[2], validate=True)
            except (binascii.Error, AttributeError):
                data = b""
            yield picture(data, settings.width, settings.height, "the web UI")
            tick(1)

    def _request(self, s: Settings) -> dict[str, Any]:
        name = SAMPLERS[s.sampler].a1111
        request: dict[str, Any] = {
            "prompt": s.prompt,
            "negative_prompt": s.negative,
            "seed": s.seed,
            "steps": s.steps,
            "cfg_scale": s.cfg,
            "width": s.width,
            "height": s.height,
            "sampler_name": name,
            "batch_size": 1,  # a picture does not depend on those beside it
            "n_iter": 1,
            "send_images": True,
            "save_images": False,
            # the merge's own VAE, whatever the user has chosen
            "override_settings": {"sd_model_checkpoint": self._title, "sd_vae": "None"},
            "override_settings_restore_afterwards": False,
        }
        if name.endswith(" Karras") and name not in self._samplers:  # since version 1.9
            request |= {"sampler_name": name.removesuffix(" Karras"), "scheduler": "Karras"}
        if request["sampler_name"] not in self._samplers:
            known = listed(sorted(filter(None, self._samplers)))
            raise Refusal(
                f"the web UI at {self.server.url} has no sampler {name!r}; it has {known}"
            )
        return request

    def close(self) -> None:
        try:
            if self._title and self._before:
                with contextlib.suppress(Failure):  # a server that is gone needs nothing
                    body = {"sd_model_checkpoint": self._before}
                    self.server.json("/sdapi/v1/options", body, timeout=60)
        finally:
            self.files.drop(self._old)
            if self._old is not None:
                with contextlib.suppress(Failure):
                    self.server.json("/sdapi/v1/refresh-checkpoints", {}, timeout=30)
            self._old = None
