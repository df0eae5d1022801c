"""Make the tiny pair of models: icons -> pictures -> trained networks -> two checkpoints.

python demo/train/make.py --out pair --device cuda --preset full
python demo/train/make.py --out pair --resume            # goes on where it was
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

import plymix
from plymix.engine.files import write_whole as write
from plymix.errors import Failure, PlymixError, Refusal
from settings import HOURS, SHARES, Settings, Stage, further, needed, preset

STOPPED = 75
"""Exit status of a run that was stopped, and goes on with --resume (EX_TEMPFAIL)."""


def make(settings: Settings, run: Any, out: Path, given: Path | None = None) -> dict[str, Path]:
    """Everything, from what is done already in `run.work`. Raises Unfinished, Refusal, Failure."""
    import autoencoder
    import card
    import denoiser
    import icons
    import judge
    import ldm
    import reader
    from loop import get
    from world import STYLES, world

    begun = time.monotonic()
    w = world(settings, run, icons.load(run.work, settings, given, run.report))
    vae = autoencoder.train(w)
    latents = autoencoder.latents(w, vae)
    encoder, tower = reader.train(w)
    first = denoiser.train(w, 0, latents, encoder, vae)
    second = denoiser.train(w, 1, latents, encoder, vae, first)
    _note(run, time.monotonic() - begun)

    ldm.forget(encoder, w.concepts)
    paths = {style: out / ldm.FILES[style] for style in STYLES}
    for style, unet in zip(STYLES, (first, second), strict=True):
        parts = {"unet": unet, "vae": vae, "text_encoder": encoder}
        ldm.write(paths[style], parts, ldm.metadata(settings, style))
    plymix.extract(paths["B"], "unet", out / ldm.UNET_B, force=True)
    judge.write(out / judge.FILE, w, tower)
    stages = {name: get(run.work / f"{name}.pt", "cpu") for name in SHARES}
    card.write(out, settings, w.concepts, stages, _machines(run))
    return paths


def _machine(device: str) -> str:
    import torch

    name = torch.cuda.get_device_name(device) if device != "cpu" else platform.processor() or "CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _machines(run: Any) -> list[str]:
    file = run.work / "machines.json"
    return list(msgspec.json.decode(file.read_bytes())) if file.exists() else []


def _note(run: Any, seconds: float) -> None:
    """Remember a machine that took part."""
    known = _machines(run)
    if seconds > 1 or not known:
        found = list(dict.fromkeys([*known, _machine(run.device)]))
        write(run.work / "machines.json", msgspec.json.encode(found))


def settings_of(args: argparse.Namespace, work: Path) -> Settings:
    """What was asked, or, to resume, what was asked then. Raises Refusal."""
    file = work / "settings.json"
    if args.resume:
        if not file.exists():
            raise Refusal(f"nothing to resume: {file} does not exist")
        given = (args.hours, args.preset, args.steps, args.concepts, args.most, args.seed)
        if any(value is not None for value in given):
            raise Refusal("--resume goes on with the settings there are; give none beside it")
        then = msgspec.json.decode(file.read_bytes(), type=Settings)
        return further(then, args.further) if args.further else then
    if args.further:
        raise Refusal("--further goes beside --resume: first a run, then more of it")
    if file.exists():
        raise Refusal(f"{work} holds a run already: say --resume, or choose another --out")
    kind = args.device.partition(":")[0]
    if kind not in HOURS:
        raise Refusal(f"unknown device {args.device!r}; use cpu or cuda")
    hours = args.hours or HOURS[kind][args.preset or "full"]
    found = preset(kind, hours, args.seed or 0)
    asked = {"concepts": args.concepts, "most": args.most}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if value}
    for word in args.steps or ():
        name, equals, steps = word.partition("=")
        if name not in SHARES or not equals or not steps.isdigit() or steps == "0":
            raise Refusal(f"--steps {word}: write STAGE=NUMBER; stages: {', '.join(SHARES)}")
        stage: Stage = getattr(found, name)
        changes[name] = msgspec.structs.replace(stage, steps=int(steps))
    return msgspec.structs.replace(found, **changes)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Train the tiny pair of models. See README.md.")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if missing")
    p.add_argument("--device", default="", help="cpu or cuda; a GPU where there is one")
    p.add_argument("--hours", type=float, help="how long to train, about")
    p.add_argument("--preset", choices=["quick", "full"], help="usual hours (full)")
    p.add_argument("--steps", action="append", metavar="STAGE=N",
                   help="steps instead of time, to repeat a run: vae, text, a, b")  # fmt: skip
    p.add_argument("--concepts", choices=["core", "all"], help="core on a CPU, all on a GPU")
    p.add_argument("--most", type=int, metavar="N", help="only the first N concepts")
    p.add_argument("--seed", type=int)
    p.add_argument("--icons", type=Path, metavar="DIR",
                   help="has npm's archives of the icons, or icons.npz; else npm runs")  # fmt: skip
    p.add_argument("--resume", action="store_true", help="go on where the run in --out was")
    p.add_argument("--further", type=float, metavar="HOURS",
                   help="with --resume: train A so much longer, then B anew from it")  # fmt: skip
    p.add_argument("--stop-after", type=float, metavar="MINUTES", help="save and stop then")
    p.add_argument("--prepare", action="store_true", help="only draw the icons: work/icons.npz")
    p.add_argument("--threads", type=int, metavar="N", help="of the CPU; more than idle cores harm")
    p.add_argument("--compile", action="store_true", help="torch.compile for the U-Nets")
    return p.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    args = parsed(words)
    started = time.monotonic()
    try:
        for module in ("torch", "diffusers", "transformers", "safetensors", "PIL"):
            needed(module)
        import torch

        from loop import Run, Unfinished

        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if args.device != "cpu" and not torch.cuda.is_available():
            raise Refusal(f"--device {args.device}: torch finds no GPU")
        if args.threads:
            torch.set_num_threads(args.threads)
        work = args.out / "work"
        settings = settings_of(args, work)
        work.mkdir(parents=True, exist_ok=True)
        write(work / "settings.json", msgspec.json.encode(settings))
        if args.further:
            for name in ("b.pt", "b.part.pt"):
                (work / name).unlink(missing_ok=True)
        run = Run(work, args.device, settings.seed, compiled=args.compile)
        if args.stop_after is not None:
            run.until = started + 60 * args.stop_after
        run.listen()
        if args.prepare:
            import icons

            icons.load(work, settings, args.icons, run.report)
            print(work / icons.DRAWN)
            return 0
        try:
            for path in make(settings, run, args.out, args.icons).values():
                print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
        except Unfinished:
            _note(run, time.monotonic() - started)
            print(f"stopped, and saved: go on with --out {args.out} --resume", file=sys.stderr)
            return STOPPED
    except PlymixError as e:
        print(f"make.py: {e}", file=sys.stderr)
        return 2 if isinstance(e, Refusal) else 1
    except FloatingPointError as e:
        print(f"make.py: {Failure(str(e))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
