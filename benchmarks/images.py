"""Measure pictures: loading, merges in place, seconds per picture, peak memory.

    python benchmarks/images.py                        SD1 at full size, random weights, on the CPU
    python benchmarks/images.py --arch sdxl --device cuda --steps 20 --size 1024x1024
    python benchmarks/images.py --small                narrow models: does it all work?

Makes two checkpoints in a temporary folder (SD1: 2 x 2.1 GB, SDXL: 2 x 6.9 GB) and prints one JSON
document. `merge` is the median time of in-place merges of the whole model after the first, which
reads the second model; the memory's own time is that of copying three times its bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from tiny_checkpoints import header, state, write_safetensors

from plymix import api, plan, recipe
from plymix.images import Options, Settings, open_backend
from plymix.images.grid import size

ALPHAS = (0.5, 0.3, 0.7, 0.4, 0.6)


def checkpoint(path: Path, arch: str, seed: int, small: bool) -> Path:
    made = header(arch, full_width=not small)
    words = {k: ("F16", (49408, *s[1:])) for k, (_, s) in made.items() if "token_embedding" in k}
    made |= words
    return write_safetensors(path, made, state(made, seed))


def timed(work: Any) -> float:
    """Seconds of `work`, until the device has finished it."""
    began = time.perf_counter()
    work()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.synchronize()
    return time.perf_counter() - began


def memory_seconds(device: str, nbytes: int) -> float:
    """How long the device's memory takes to read two such amounts and write one."""
    import torch

    a, b = (torch.ones(nbytes // 2, dtype=torch.float16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return min(timed(lambda: torch.add(a, b, out=out)) for _ in range(5))


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    # in a process of its own, whose memory is not counted
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        made = [
            pool.submit(checkpoint, folder / f"{n}.safetensors", args.arch, i, args.small)
            for i, n in enumerate("ab")
        ]
        files = [str(file.result()) for file in made]
    width, height = size(args.size)
    settings = Settings("a castle", "blurry", 1, args.steps, width=width, height=height)
    backend = open_backend("diffusers", Options(device=args.device))
    single = recipe.from_dict({"models": {"a": files[0]}})

    def draw(steps: int) -> None:
        import msgspec

        list(backend.draw([msgspec.structs.replace(settings, steps=steps)], lambda part: None))

    alone = plan.build(single)
    plans = [plan.build(api.two_models(*files, alpha=a, vae="blend")) for a in ALPHAS]
    load = timed(lambda: backend.use(alone))
    first = timed(lambda: draw(1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    merges = [timed(lambda p=p: backend.use(p)) for p in plans]
    return {
        "machine": backend.label,
        "processor": platform.processor() or platform.machine(),
        "arch": args.arch,
        "load_s": load,
        "first_step_s": first,
        "peak_memory_gb_after_one_step": peak,
        "first_merge_s": merges[0],
        "merge_s": statistics.median(merges[1:]),
        "memory_s": memory_seconds(backend.device, backend._live.moved),
        "picture_s": timed(lambda: draw(args.steps)),
        "steps": args.steps,
        "size": args.size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", default="sd1", choices=["sd1", "sd2", "sdxl"])
    parser.add_argument("--device", default="")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(args, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
