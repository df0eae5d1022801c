"""Small random models that can draw: true names and structure, small widths, the whole vocabulary.

Values are scaled to keep the size of what passes through, so that pictures are not flat.
"""

import math
import zlib

import numpy as np

from tiny import encode, header, write_safetensors

WORDS = 49408


def model(path, arch="sd1", seed=0, dtype="F16", like=None, share=0.0, metadata=None):
    """Write a checkpoint. `like` and `share`: that much of another seed's values is mixed in."""
    made = {}
    for key, (kind, shape) in header(arch, dtype=dtype).items():
        full = (WORDS, *shape[1:]) if key.endswith("token_embedding.weight") else shape
        made[key] = (kind, full)
    state = {key: values(key, *entry, seed, like, share) for key, entry in made.items()}
    return write_safetensors(path, made, state, metadata)


def values(key, dtype, shape, seed, like=None, share=0.0):
    if dtype[0] in "IUB":
        return np.arange(math.prod(shape)).reshape(shape)
    if key.startswith(("alphas", "betas", "sqrt", "log_one", "posterior")):
        return np.zeros(shape, np.float32)
    drawn = normal(key, shape, seed)
    if like is not None:
        drawn = (1 - share) * drawn + share * normal(key, shape, like)
    if ("norm" in key and key.endswith("weight")) or key.endswith(("ln_1.weight", "ln_2.weight")):
        drawn = 1 + 0.1 * drawn
    elif "embedding" in key and "token" in key:
        pass
    elif len(shape) > 1:
        drawn = drawn / math.sqrt(math.prod(shape[1:]))
    else:
        drawn = 0.1 * drawn
    return encode(drawn, dtype) if dtype != "F32" else drawn


def normal(key, shape, seed):
    rng = np.random.Generator(np.random.Philox(key=(seed << 32) | zlib.crc32(key.encode())))
    return rng.standard_normal(shape, dtype=np.float32)
