"""Do pictures obey their prompts, and what do merges change? For the pair that `make.py` made.

    python demo/train/judge.py pair -o pair/judged          # judged.json and judged.png

Every concept is asked for, from A and from B, and the picture is given to two judges that know all
concepts' true pictures in both styles: the image tower that was trained beside the text encoder
(cosine of directions), and the plain distance of thumbnails. top1 is the share of the pictures
that are most like what was asked for, top5 that it is among the five most like.

Pictures are drawn by `plymix compare`'s own backend, from the finished files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import captions
import ldm
import nets
import scenes
from denoiser import GUIDANCE, STEPS
from loop import clock
from plymix import plan
from plymix.engine.files import write_whole as write_bytes
from plymix.errors import PlymixError, Refusal
from plymix.images import Options, open_backend, rows, sheet
from plymix.images import Settings as Asked
from plymix.images.distance import pixel, structure
from plymix.images.pixels import save
from world import World

FILE = "judge.safetensors"
MERGES = ("A", "B", "0.5", "GRAD_A", "GRAD_V")
SEEN = 6
"""Placements of a true picture that the judges' memory of it is the mean of."""
THUMB = 16


class Judge(NamedTuple):
    """seen: directions [2, concepts, features]; thumbs: [2, concepts, 3 * 16 * 16], in -1..1."""

    concepts: list[captions.Concept]
    tower: Any
    seen: Any
    thumbs: Any
    size: int

    def scores(self, pictures: Any) -> Mapping[str, Any]:
        """How like each concept each picture [n, 3, h, w] is, by each judge: [n, concepts]."""
        seen = self.tower(nets.half(pictures))
        alike = torch.einsum("nf,scf->nsc", seen, self.seen).amax(1)
        small = thumbnails(pictures)
        far = torch.stack([torch.cdist(small, known) for known in self.thumbs]).amin(0)
        return {"tower": alike, "pixels": -far}


def thumbnails(pictures: Any) -> Any:
    return F.interpolate(pictures, (THUMB, THUMB), mode="area").flatten(1)


@torch.no_grad()
def write(path: Path, w: World, tower: Any) -> None:
    """Keep the tower and what it saw of every concept."""
    every: Any = torch.arange(len(w.concepts), device=w.run.device)
    seen, thumbs = [], []
    for style in range(2):
        made = []
        for k in range(SEEN):
            generator = w.run.generator("judge", k)
            parts = [w.pictures(i, style, generator) for i in every.split(128)]
            pairs = [(tower(nets.half(p)), thumbnails(p)) for p in parts]
            made.append([torch.cat(column) for column in zip(*pairs, strict=True)])
        directions, small = (torch.stack(column).mean(0) for column in zip(*made, strict=True))
        seen.append(F.normalize(directions, dim=-1))
        thumbs.append(small)
    tensors = {
        "seen": torch.stack(seen).half(),
        "thumbs": torch.stack(thumbs).mul(127).round().to(torch.int8),
        **{f"tower.{key}": value.half() for key, value in tower.state_dict().items()},
    }
    s = w.settings
    told = {"concepts": w.concepts, "widths": s.tower_widths, "features": s.tower_features,
            "size": s.size}  # fmt: skip
    kept = {key: value.cpu().contiguous() for key, value in tensors.items()}
    save_file(kept, path, {"judge": json.dumps(told)})


def load(path: Path, device: str) -> Judge:
    """Raises Refusal where there is none."""
    if not path.is_file():
        raise Refusal(f"{path} does not exist; make.py writes it beside the checkpoints")
    with safe_open(path, "pt", device) as file:
        told = json.loads(file.metadata()["judge"])
        found = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    tower = nets.Tower(tuple(told["widths"]), told["features"]).to(device).eval()
    start = "tower."
    own = {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
    tower.load_state_dict(own)
    concepts = [captions.Concept(name, tuple(words)) for name, words in told["concepts"]]
    return Judge(concepts, tower, found["seen"], found["thumbs"] / 127, told["size"])


def ranks(scores: Any, right: Any) -> Any:
    """How many concepts are more like the picture than the right one: [n]."""
    return (scores > scores.gather(1, right[:, None])).sum(1)


def ground(pictures: Any) -> float:
    """The colour of the borders, from A's white (0) to B's pale blue (1)."""
    edge = torch.cat([pictures[..., 0, :], pictures[..., -1, :],
                      pictures[..., :, 0], pictures[..., :, -1]], dim=-1)  # fmt: skip
    colour = edge.mean((0, 2)).cpu() / 2 + 0.5
    white, pale = torch.tensor(scenes.WHITE), torch.tensor(scenes.PALE)
    way = pale - white
    return float((colour - white) @ way / (way @ way))


class Studio:
    """Draws with rows of the pair, and says how long that still takes."""

    def __init__(self, folder: Path, base: Asked, options: Options, total: int) -> None:
        a, b = (str(folder / name) for name in ldm.FILES.values())
        self.models = rows.Models(a, b)
        self.base, self.backend = base, open_backend("diffusers", options)
        self.begun, self.done, self.total = time.monotonic(), 0.0, total
        self.told = 0.0

    def draw(self, row: str, prompts: Sequence[str], seeds: Sequence[int]) -> list[Any]:
        """uint8 [h, w, 3] for each prompt and, within it, each seed."""
        from msgspec.structs import replace

        asked = [replace(self.base, prompt=p, seed=n) for p in prompts for n in seeds]
        with plan.build(rows.made(rows.split(row), self.models)) as planned:
            self.backend.use(planned)
            return list(self.backend.draw(asked, self._tick))

    def _tick(self, part: float) -> None:
        self.done += part
        now = time.monotonic()
        if now - self.told > 10:
            self.told = now
            left = (now - self.begun) / self.done * (self.total - self.done)
            print(f"{self.done:.0f}/{self.total} pictures, {clock(left)} left", file=sys.stderr)


def tensor(pictures: Sequence[Any], device: str) -> Any:
    """uint8 [h, w, 3] each -> [n, 3, h, w] in -1..1."""
    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def obeyed(judge: Judge, pictures: Any, right: Any) -> tuple[dict[str, dict[str, float]], Any]:
    """Shares by judge, and what the tower took each picture for: [n]."""
    scores = judge.scores(pictures)
    found = {}
    for name, score in scores.items():
        rank = ranks(score, right)
        found[name] = {f"top{n}": float((rank < n).float().mean()) for n in (1, 5)}
    return found, scores["tower"].argmax(1)


@torch.inference_mode()
def run(
    folder: Path, out: Path, base: Asked, seeds: Sequence[int], most: int, options: Options
) -> dict[str, Any]:
    """Judge the pair in `folder`; writes `out`.json and `out`.png. Gives what the JSON holds."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    judge = load(folder / FILE, device)
    base = Asked(base.prompt, base.negative, base.seed, base.steps, base.cfg, base.sampler,
                 judge.size, judge.size)  # fmt: skip
    every = judge.concepts[: most or None]
    few = [judge.concepts.index(c) for c in captions.shown(judge.concepts)]
    total = len(seeds) * (2 * len(every) + len(MERGES) * len(few))
    studio = Studio(folder, base, options, total)
    told: dict[str, Any] = {
        "settings": {"steps": base.steps, "cfg": base.cfg, "sampler": base.sampler,
                     "negative": base.negative, "seeds": list(seeds)},
        "concepts": len(every), "backend": studio.backend.label, "models": {}, "merges": {},
    }  # fmt: skip
    for row in ("A", "B"):
        drawn = studio.draw(row, [c.prompt for c in every], seeds)
        right = torch.arange(len(every), device=device).repeat_interleave(len(seeds))
        shares, taken = obeyed(judge, tensor(drawn, device), right)
        wrong = {
            judge.concepts[r].name: judge.concepts[t].name
            for r, t in zip(right.tolist(), taken.tolist(), strict=True) if r != t
        }  # fmt: skip
        told["models"][row] = {**shares, "taken for another": wrong}
    cells = {row: studio.draw(row, [judge.concepts[i].prompt for i in few], seeds)
             for row in MERGES}  # fmt: skip
    for row, drawn in cells.items():
        told["merges"][row] = _compared(judge, cells, drawn, few, len(seeds), device)
    studio.backend.close()
    first = [row[:: len(seeds)] for row in cells.values()]
    image = sheet.pictures(first, list(cells), [judge.concepts[i].words[0] for i in few])
    save(image, out.with_suffix(".png"), {})
    write_bytes(out.with_suffix(".json"), (json.dumps(told, indent=1) + "\n").encode())
    return told


def _compared(
    judge: Judge,
    cells: Mapping[str, Sequence[Any]],
    drawn: Sequence[Any],
    few: Sequence[int],
    seeds: int,
    device: str,
) -> dict[str, Any]:
    """How a merge's pictures stand to those of A and B with the same prompts and seeds."""
    right = torch.tensor(few, device=device).repeat_interleave(seeds)
    pictures = tensor(drawn, device)
    found: dict[str, Any] = {"ground": ground(pictures)}
    measures: dict[str, Callable[[Any, Any], float]] = {"pixel": pixel, "structure": structure}
    for name, measure in measures.items():
        for row in ("A", "B"):
            pairs = zip(drawn, cells[row], strict=True)
            found[f"{name} to {row}"] = float(np.mean([measure(x, y) for x, y in pairs]))
    return {**found, **obeyed(judge, pictures, right)[0]}


def main(words: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Judge the pair of models that make.py made.")
    p.add_argument("folder", type=Path, metavar="DIR", help="where make.py wrote the pair")
    p.add_argument("-o", "--out", type=Path, help="name of the .json and .png (DIR/judged)")
    p.add_argument("--device", default="")
    p.add_argument("--batch", type=int, default=0, help="pictures at once (CPU 8, GPU 128)")
    p.add_argument("--concepts", type=int, default=0, metavar="N", help="only the first N")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 1 to N")
    p.add_argument("--cfg", type=float, default=GUIDANCE)
    p.add_argument("--steps", type=int, default=STEPS)
    p.add_argument("--sampler", default="euler_a")
    p.add_argument("--negative", default="")
    args = p.parse_args(words)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(device=device, batch=args.batch or (8 if device == "cpu" else 128))
    base = Asked("", args.negative, 1, args.steps, args.cfg, args.sampler)
    out = args.out or args.folder / "judged"
    try:
        told = run(args.folder, out, base, range(1, args.seeds + 1), args.concepts, options)
    except PlymixError as e:
        print(f"judge.py: {e}", file=sys.stderr)
        return 2 if isinstance(e, Refusal) else 1
    for row, shares in told["models"].items():
        both = (f"{name} top1 {s['top1']:.1%} top5 {s['top5']:.1%}" for name, s in shares.items()
                if "top1" in s)  # fmt: skip
        print(f"{row}: {', '.join(both)}")
    for row, found in told["merges"].items():
        print(f"{row:8} ground {found['ground']:.2f}  pixel to A {found['pixel to A']:.3f}"
              f" to B {found['pixel to B']:.3f}  top1 {found['tower']['top1']:.1%}")  # fmt: skip
    print(f"{out.with_suffix('.json')}\n{out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
