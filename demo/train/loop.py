"""The training loop that all stages share: time left, checkpoints, averages, resuming.

A step draws all that is random from a generator seeded by (seed, stage, step). So nothing has to be
remembered but weights, optimiser and the number of the step, and a stage that was interrupted, on
whatever machine, goes on as if it had not been.
"""

from __future__ import annotations

import io
import json
import math
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plymix.engine.files import write_whole as write
from settings import Stage


class Unfinished(Exception):
    """Stopped on request, with everything saved."""


@dataclass
class Run:
    """How a run works, none of which decides the weights.

    `until` is the time (of `time.monotonic`) at which to stop; `save` and `show` are seconds
    between checkpoints and between validation pictures.
    """

    work: Path
    device: str
    seed: int
    until: float = math.inf
    save: float = 240.0
    show: float = 300.0
    compiled: bool = False
    quiet: bool = False
    stop: bool = False
    told: float = field(default=0.0, init=False)

    def listen(self) -> None:
        """Ctrl-C and SIGTERM stop after the step under way."""

        def stop(*_: object) -> None:
            self.stop = True

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)

    def check(self) -> None:
        if self.stop or time.monotonic() >= self.until:
            raise Unfinished

    def report(self, what: str, share: float, left: float, more: str = "") -> None:
        """A line of progress: in place on a terminal, every 20 seconds elsewhere."""
        now, live = time.monotonic(), sys.stderr.isatty()
        if self.quiet or (share < 1 and now - self.told < (0.5 if live else 20)):
            return
        self.told = now
        line = f"{what:8} {share:5.1%}  {clock(left)} left  {more}"
        end = "" if live and share < 1 else "\n"
        print(f"\r\033[K{line}" if live else line, end=end, file=sys.stderr, flush=True)

    def autocast(self) -> Any:
        """bfloat16 on a GPU. On a CPU, layers this narrow take 1.2 times as long in it."""
        kind = self.device.partition(":")[0]
        return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu")

    def generator(self, *of: object) -> Any:
        """A stream of random numbers of its own for what `of` names."""
        word = "/".join(map(str, (self.seed, *of)))
        high, low = zlib.crc32(word.encode()), zlib.crc32(word[::-1].encode())
        return torch.Generator(self.device).manual_seed(high << 31 | low >> 1)


def clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def put(path: Path, value: Any) -> None:
    """`torch.save`, whole or not at all."""
    data = io.BytesIO()
    torch.save(value, data)
    write(path, data.getvalue())


def get(path: Path, device: str) -> Any:
    return torch.load(path, map_location=device, weights_only=True)


Modules = Mapping[str, Any]
Loss = Callable[[Any], Any]
Show = Callable[[Path], Mapping[str, float]]


def fit(
    run: Run,
    name: str,
    plan: Stage,
    modules: Modules,
    loss: Loss,
    show: Show,
    *,
    shares: Mapping[str, float] | None = None,
    ema: float = 0.999,
    warmup: int = 100,
) -> None:
    """Train `modules` in place until the stage is over; at the end they hold their averages.

    `loss(generator)` is a step's; `show(path)` writes validation pictures to path (with an ending)
    and gives numbers for the log. `shares` scale the learning rate of a module. What is done
    already is taken from `work/NAME.pt`; if `plan` asks for more than that, it goes on from there,
    from the averages and with a new optimiser. Raises Unfinished.
    """
    final, part = run.work / f"{name}.pt", run.work / f"{name}.part.pt"
    saved = get(final, run.device) if final.exists() else None
    if saved:
        for key, module in modules.items():
            module.load_state_dict(saved["modules"][key])
            module.eval().requires_grad_(False)
        if plan.done(saved["steps"], saved["seconds"]) == 1:
            return
    stage = _Training(run, name, plan, modules, shares or {}, ema, warmup)
    if part.exists():
        stage.restore(get(part, run.device))
    elif saved:
        stage.step, stage.seconds, stage.log = saved["steps"], saved["seconds"], saved["log"]
    with _training(modules.values()):
        stage.go(loss, show, part)
    stage.swap()
    with torch.inference_mode():
        numbers = show(_place(run, f"{name}-end"))
    log = [*stage.log, {"step": stage.step, "seconds": round(stage.seconds, 1), **numbers}]
    put(final, {"modules": {k: m.state_dict() for k, m in modules.items()}, "log": log,
                "steps": stage.step, "seconds": stage.seconds})  # fmt: skip
    _write_log(run, name, log)
    part.unlink(missing_ok=True)


class _Training:
    """A stage under way."""

    def __init__(
        self,
        run: Run,
        name: str,
        plan: Stage,
        modules: Modules,
        shares: Mapping[str, float],
        ema: float,
        warmup: int,
    ) -> None:
        self.run, self.name, self.plan, self.modules = run, name, plan, modules
        self.ema, self.warmup = ema, warmup
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        groups: list[dict[str, Any]] = [
            {"params": list(m.parameters()), "share": shares.get(key, 1.0)}
            for key, m in modules.items()
        ]
        self.params = [p for group in groups for p in group["params"]]
        self.average = [p.detach().clone() for p in self.params]
        fused = run.device != "cpu"
        self.optimiser = torch.optim.AdamW(
            groups, plan.lr, (0.9, 0.99), weight_decay=0.01, fused=fused
        )

    def progress(self) -> float:
        return self.plan.done(self.step, self.seconds)

    def go(self, loss: Loss, show: Show, part: Path) -> None:
        run, begun, before = self.run, time.monotonic(), self.seconds
        saved = shown = told = begun
        recent = torch.zeros((), device=run.device)
        count = 0
        while self.progress() < 1:
            recent += self._one(loss(run.generator(self.name, self.step)))
            count += 1
            now = time.monotonic()
            self.seconds = before + now - begun
            if now - told > 5 or self.progress() == 1:
                value = float(recent) / count
                if not math.isfinite(value):
                    raise FloatingPointError(f"{self.name}: loss {value} at step {self.step}")
                self.log.append(
                    {"step": self.step, "seconds": round(self.seconds, 1), "loss": value}
                )
                recent.zero_()
                count, told = 0, now
                self._tell(value)
            if self.progress() < 1 and now - shown > run.show:
                self._show(show)
                shown = time.monotonic()
            try:
                run.check()
            except Unfinished:
                put(part, self.state())
                raise
            if now - saved > run.save:
                put(part, self.state())
                _write_log(run, self.name, self.log)
                saved = time.monotonic()

    def _one(self, loss: Any) -> Any:
        done = self.progress()
        rate = 0.02 + 0.49 * (1 + math.cos(math.pi * done))
        rate *= min(1.0, (self.step + 1) / self.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.lr * rate * group["share"]
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimiser.step()
        keep = min(self.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - keep)
        self.step += 1
        return loss.detach()

    def _tell(self, loss: float) -> None:
        done = self.progress()
        left = self.seconds / max(done, 1e-9) * (1 - done)
        self.run.report(self.name, done, left, f"step {self.step}  loss {loss:.4f}")

    def _show(self, show: Show) -> None:
        self.swap()
        with torch.inference_mode():
            numbers = show(_place(self.run, f"{self.name}-{self.step:06}"))
        self.swap()
        if numbers:
            self.log.append({"step": self.step, "seconds": round(self.seconds, 1), **numbers})

    def swap(self) -> None:
        """Exchange the weights and their averages."""
        for param, mean in zip(self.params, self.average, strict=True):
            held = param.data.clone()
            param.data.copy_(mean)
            mean.copy_(held)

    def state(self) -> dict[str, Any]:
        return {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "average": self.average, "optimiser": self.optimiser.state_dict(),
            "step": self.step, "seconds": self.seconds, "log": self.log,
        }  # fmt: skip

    def restore(self, saved: Mapping[str, Any]) -> None:
        for key, module in self.modules.items():
            module.load_state_dict(saved["modules"][key])
        for mean, value in zip(self.average, saved["average"], strict=True):
            mean.copy_(value)
        groups = [{**g, "fused": h["fused"], "foreach": h["foreach"]}
                  for g, h in zip(saved["optimiser"]["param_groups"],
                                  self.optimiser.param_groups, strict=True)]  # fmt: skip
        self.optimiser.load_state_dict({**saved["optimiser"], "param_groups": groups})
        self.step, self.seconds, self.log = saved["step"], saved["seconds"], saved["log"]


class _training:
    """Modules in training mode, for as long as they are trained."""

    def __init__(self, modules: Iterable[Any]) -> None:
        self.modules = list(modules)

    def __enter__(self) -> None:
        for module in self.modules:
            module.train().requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            module.eval().requires_grad_(False)


def _place(run: Run, stem: str) -> Path:
    folder = run.work / "shown"
    folder.mkdir(exist_ok=True)
    return folder / f"{stem}.png"


def _write_log(run: Run, name: str, log: Sequence[Mapping[str, float]]) -> None:
    folder = run.work / "log"
    folder.mkdir(exist_ok=True)
    write(folder / f"{name}.json", (json.dumps(log, indent=0) + "\n").encode())
