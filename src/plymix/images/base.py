"""What every image backend takes and gives.

A backend is opened with `Options`, told which model to use by a `Plan`, and asked for pictures by
`Settings`. A package of your own adds one with an entry point in the group `plymix.images` that
names a function `open(options) -> Backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import msgspec

from plymix.errors import Refusal, unknown
from plymix.plan import Plan

Picture = Any
"""A picture: an array of uint8, [height, width, 3], sRGB."""


class Sampler(NamedTuple):
    """What a sampler is called elsewhere: A1111's name, ComfyUI's sampler and scheduler."""

    a1111: str
    comfyui: str
    scheduler: str


SAMPLERS: Mapping[str, Sampler] = {
    "euler": Sampler("Euler", "euler", "normal"),
    "euler_a": Sampler("Euler a", "euler_ancestral", "normal"),
    "ddim": Sampler("DDIM", "ddim", "ddim_uniform"),
    "dpmpp_2m": Sampler("DPM++ 2M", "dpmpp_2m", "normal"),
    "dpmpp_2m_karras": Sampler("DPM++ 2M Karras", "dpmpp_2m", "karras"),
    "dpmpp_sde": Sampler("DPM++ SDE", "dpmpp_sde", "normal"),
    "unipc": Sampler("UniPC", "uni_pc", "normal"),
    "lcm": Sampler("LCM", "lcm", "sgm_uniform"),
}
"""The samplers by the names that plymix uses. `samplers` has their formulas."""


class Settings(msgspec.Struct, frozen=True):
    """All that decides a picture but for the model. `width` and `height` are in pixels."""

    prompt: str = ""
    negative: str = ""
    seed: int = 1
    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler_a"
    width: int = 512
    height: int = 512

    def checked(self) -> Settings:
        """These settings. Raises Refusal for what cannot be drawn."""
        if self.sampler not in SAMPLERS:
            raise unknown("sampler", self.sampler, SAMPLERS)
        most = 50 if self.sampler == "lcm" else 1000  # LCM is distilled from 50 steps
        for name, low, high in (
            ("seed", 0, 2**32 - 1),
            ("steps", 1, most),
            ("cfg", 0, 100),
            ("width", 64, 4096),
            ("height", 64, 4096),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise Refusal(f"{name} {value:g} is not in {low}..{high}")
        if self.width % 8 or self.height % 8:
            raise Refusal(f"size {self.width}x{self.height}: both must be multiples of 8")
        return self


@dataclass(frozen=True)
class Options:
    """How a backend works; none of it says what a picture shows.

    device     "" (a GPU where there is one), "cpu", "cuda", "cuda:1"
    precision  of the U-Net in process: "" (fp16 on a GPU, else fp32), "fp32", "fp16", "bf16"
    batch      pictures made at once in process; 0 is 1 on the CPU, 4 on a GPU
    url        of a running server
    folder     where that server's checkpoints lie, as this machine sees it
    keep       leave the merged files there
    timeout    seconds to wait for a server's answer
    """

    device: str = ""
    precision: str = ""
    batch: int = 0
    url: str = ""
    folder: str = ""
    keep: bool = False
    timeout: float = 600.0


Tick = Callable[[float], object]
"""Called with the number of pictures (a fraction) done since the last call."""


class Backend(Protocol):
    """Something that makes pictures.

    `label` says what the pictures depend on besides model and settings: program, versions, device,
    precision. A picture drawn under another label is drawn again, not taken from an older run.
    """

    label: str

    def use(self, plan: Plan) -> None:
        """Draw with the model that `plan` makes from now on. Raises Refusal or Failure.

        Calls come in an order in which few tensors change from one to the next; a backend keeps
        what did not change. The plan's files stay open until `close`.
        """

    def draw(self, asked: Sequence[Settings], tick: Tick) -> Iterator[Picture]:
        """A picture for each of `asked`, in that order. Raises Failure."""

    def close(self) -> None:
        """Give everything back: memory, connections, files that only this sheet needed."""


def check(backend: Backend, plan: Plan, asked: Sequence[Settings]) -> None:
    """Let a backend refuse what it cannot draw, before anything is merged. Raises Refusal.

    It may have a method `check(plan, asked)` for that, which reads no tensor.
    """
    if (own := getattr(backend, "check", None)) is not None:
        own(plan, asked)


BACKENDS: Mapping[str, str] = {
    "diffusers": "in this process, with torch: SD1, SD2, SDXL",
    "a1111": "a running Stable Diffusion web UI or Forge, over HTTP",
    "comfyui": "a running ComfyUI, over HTTP",
    "fake": "a pattern that depends on weights and settings, for tests",
}
"""plymix's own backends: each the file of its name in this folder."""


def open_backend(name: str, options: Options) -> Backend:
    """The backend called `name`. Raises Refusal for an unknown one or what it lacks."""
    if name in BACKENDS:
        found: Backend = import_module(f"plymix.images.{name}").open(options)
        return found
    from importlib.metadata import entry_points

    others = {point.name: point for point in entry_points(group="plymix.images")}
    if name not in others:
        raise unknown("image backend", name, [*BACKENDS, *others])
    made: Backend = others[name].load()(options)
    return made


def need(module: str, what: str) -> Any:
    """An imported library of the extra `images`. Raises Refusal saying what to install."""
    try:
        return import_module(module)
    except ImportError as e:
        raise Refusal(f'{what} needs {module} ({e}): pip install "plymix[images]"') from None
