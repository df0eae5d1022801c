"""LoRA files that cannot be right are refused by name by every command; nothing is written."""

import numpy as np
import pytest

from plymix import cli
from small import draw, save
from tiny import header, write

HEADER = header("sd1", dtype="F32")
Q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
NAME = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
THEIRS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT, IN = HEADER[Q][1]


def pair(up, down, kind="F32", name=NAME):
    return {f"{name}.lora_up.weight": draw(kind, up), f"{name}.lora_down.weight": draw(kind, down)}


def of(**shapes):
    return {f"{NAME}.{end.replace('__', '.')}": draw("F32", s) for end, s in shapes.items()}


NOT_WHOLE = "make no"
DAMAGED = {
    "rank 0": (pair((OUT, 0), (0, IN)), NOT_WHOLE),
    "ranks apart": (pair((OUT, 2), (3, IN)), "up 8 x 2, down 3 x 8"),
    "lines": (pair((OUT,), (IN,)), NOT_WHOLE),
    "a core of another rank": (
        of(lora_up__weight=(OUT, 2), lora_down__weight=(2, IN), lora_mid__weight=(3, 2, 1, 1)),
        NOT_WHOLE,
    ),
    "LoHa": (
        of(hada_w1_a=(OUT, 2), hada_w1_b=(3, IN), hada_w2_a=(OUT, 2), hada_w2_b=(2, IN)),
        "make no LoHa",
    ),
    "LoHa of two sizes": (
        of(hada_w1_a=(OUT, 2), hada_w1_b=(2, IN), hada_w2_a=(OUT, 2), hada_w2_b=(2, IN + 1)),
        "make no LoHa",
    ),
    "LoKr": (of(lokr_w1=(2, 2), lokr_w2_a=(4, 2), lokr_w2_b=(3, 4)), "make no LoKr"),
    "LoKr of a line": (of(lokr_w1=(2,), lokr_w2=(4, 4)), "make no LoKr"),
    "GLoRA": (
        of(a1__weight=(IN, 2), a2__weight=(2, IN), b1__weight=(OUT, 2), b2__weight=(1, IN)),
        "make no GLoRA",
    ),
    "OFT": (of(oft_blocks=(2, 4, 3)), "make no OFT"),
    "whole numbers": (
        {k: ("I64", np.zeros(x.shape, np.int64)) for k, (_, x) in pair((OUT, 2), (2, IN)).items()},
        "is I64; the factors of a LoRA are floats",
    ),
    "alpha": ({**pair((OUT, 2), (2, IN)), f"{NAME}.alpha": ("F32", np.float32("nan"))}, "is nan"),
    "two names": (
        {**pair((OUT, 2), (2, IN)), **pair((OUT, 2), (2, IN), name=THEIRS)},
        f"{Q} twice, as {NAME} and as {THEIRS}",
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write(path, "sd1", 0, dtype="F32")
    return path


def asked(base, file, out):
    return {
        "bake": ["bake", base, file, "-o", out],
        "merge": ["merge", file, "-o", out],
        "resize": ["resize", file, "--rank", 1, "-o", out],
        "convert": ["convert", file, "--to", "diffusers", "-o", out],
    }


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files(what, base, tmp_path, capsys):
    tensors, text = DAMAGED[what]
    file = save(tmp_path / "l.safetensors", tensors)
    for words in asked(base, file, tmp_path / "o.safetensors").values():
        assert cli.run(["lora", *map(str, words)]) == 2
        error = capsys.readouterr().err.strip()
        assert "l.safetensors" in error
        assert text in error
        assert len(error.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["l.safetensors"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_numbers(value, base, tmp_path, capsys):
    """A LoRA is not made of them; a model is, as in any merge, and tells."""
    x = np.array(draw("F32", (OUT, 2))[1], copy=True)
    x[0, 0] = value
    tensors = {**pair((OUT, 2), (2, IN)), f"{NAME}.lora_up.weight": ("F32", x)}
    file = save(tmp_path / "l.safetensors", tensors)
    for name, words in asked(base, file, tmp_path / "o.safetensors").items():
        code = cli.run(["lora", *map(str, words)])
        error = capsys.readouterr().err
        assert (code, "infinities or NaN" in error) == (0 if name == "bake" else 2, True)
        (tmp_path / "o.safetensors").unlink(missing_ok=True)
