"""How long the leading singular vectors of a large change take, and how near they come.

    python benchmarks/lowrank.py                       3072 x 12288 at rank 16, as one layer of Flux
    python benchmarks/lowrank.py --shape 640 2560

Beside it: numpy's whole decomposition of the same matrix. It must be slower by ten times at least,
and its error by no more than 1 % less.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np

from plymix.adapters import lowrank


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=(3072, 12288))
    parser.add_argument("--rank", type=int, default=16)
    asked = parser.parse_args()
    (out, in_), rank = asked.shape, asked.rank
    rng = np.random.default_rng(0)
    # As of a tuned model: some directions that stand out, and all others like noise.
    strong = np.arange(1, 65, dtype=np.float32) ** -0.5
    change = (rng.standard_normal((out, 64), np.float32) * strong) @ rng.standard_normal(
        (64, in_), np.float32
    ) + 0.1 * rng.standard_normal((out, in_), np.float32)

    began = time.perf_counter()
    found = lowrank.leading(change, rank, rng)
    ours = time.perf_counter() - began
    began = time.perf_counter()
    s = np.linalg.svd(change, full_matrices=False)[1].astype(np.float64)
    whole = time.perf_counter() - began

    least = math.sqrt((s[rank:] ** 2).sum())
    up, down = found.balanced(rank)
    error = float(np.linalg.norm(change - up @ down))
    print(f"{out} x {in_}, rank {rank}: plymix {ours:.2f} s, whole {whole:.2f} s")
    print(f"{whole / ours:.0f} times faster; error {error / least - 1:+.3%} of the least one")
    return 0 if whole >= 10 * ours and error <= 1.01 * least else 1


if __name__ == "__main__":
    raise SystemExit(main())
