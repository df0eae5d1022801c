"""`plymix lora bake` and `plymix lora inspect`, as a user calls them."""

import json

import numpy as np
import pytest

from loras import loha, lora
from plymix import Refusal, cli
from plymix.adapters import asking
from plymix.adapters.asking import Asked
from small import load, real, save
from tiny import header, write

UNET = "model.diffusion_model."
Q = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
K = UNET + "output_blocks.11.1.transformer_blocks.0.attn1.to_k.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
NAMES = {
    Q: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    K: "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_k",
    TEXT: "lora_te_text_model_encoder_layers_3_mlp_fc1",
}
HEADER = header("sd1", dtype="F32")


def made(path, family=lora, seed=0, metadata=None):
    changes = {key: family(HEADER[key][1], seed + i) for i, key in enumerate(NAMES)}
    tensors = {
        f"{NAMES[key]}.{end}": ("F32", x)
        for key, change in changes.items()
        for end, x in change.tensors.items()
    }
    save(path, tensors, metadata)
    return changes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.safetensors", "sd1", 0, dtype="F32")
    return tmp_path


def run(capsys, *words):
    code = cli.run(["lora", *words])
    out, err = capsys.readouterr()
    return code, out, err


def check(folder, changes, strengths, out="out.safetensors"):
    before, after = (load(folder / name)[0] for name in ("base.safetensors", out))
    for key, strength in strengths.items():
        w = real(before[key]).astype(np.float64)
        want = w + strength * changes[key].delta(w)
        np.testing.assert_allclose(real(after[key]), want, rtol=1e-6, atol=3e-7)


def test_bake_files_with_strengths(folder, capsys):
    x = made(folder / "x y.safetensors", seed=1)
    y = made(folder / "a:b.safetensors", loha, seed=9)
    words = ("bake", "base.safetensors", "x y.safetensors:0.8:-0.5", "a:b.safetensors:-0.25")
    code, out, _ = run(capsys, *words, "-o", "out.safetensors")
    assert code == 0
    assert "base.safetensors - 0.25 × a:b.safetensors + 0.8 × x y.safetensors" in out
    both = {key: Sum(x[key], s, y[key]) for key, s in ((Q, 0.8), (K, 0.8), (TEXT, -0.5))}
    check(folder, both, dict.fromkeys(both, 1.0))
    again = ("bake", "base.safetensors", *reversed(words[2:]), "-o", "again.safetensors")
    assert run(capsys, *again)[0] == 0
    assert (folder / "again.safetensors").read_bytes() == (folder / "out.safetensors").read_bytes()


class Sum:
    """s X - 0.25 Y"""

    def __init__(self, x, s, y):
        self.delta = lambda w: s * x.delta(w) - 0.25 * y.delta(w)


def test_bake_tags_of_a_prompt(folder, capsys):
    (folder / "loras" / "deep").mkdir(parents=True)
    x = made(folder / "loras" / "deep" / "my style.safetensors", seed=1)
    tag = 'a cat, <lora:"my style":0.5:0.8:lbw=INALL>, masterpiece'
    words = ("bake", "base.safetensors", tag, "--lora-dir", "loras", "-o", "out.safetensors")
    assert run(capsys, *words)[0] == 0
    check(folder, x, {TEXT: 0.5, Q: 0.8, K: 0.0})  # the first number is the text encoder's


def test_block_weights_and_rules_of_the_command(folder, capsys):
    x = made(folder / "x.safetensors", seed=1)
    words = ("bake", "base.safetensors", "x.safetensors:2", "-o", "out.safetensors")
    more = ("--lbw", "BASE=0.5,IN01=0.25,OUT09-OUT11", "--rules", "OUT11:to_k:0.125")
    assert run(capsys, *words, *more)[0] == 0
    check(folder, x, {TEXT: 1.0, Q: 0.5, K: 0.25})


def test_dry_run_and_json_write_what_they_say(folder, capsys):
    made(folder / "x.safetensors")
    words = ("bake", "base.safetensors", "x.safetensors:0.5", "--json")
    code, out, _ = run(capsys, *words, "--dry-run")
    assert code == 0
    document = json.loads(out)
    assert document["merged"] == 3
    assert {b["block"]: b["shares"] for b in document["blocks"]}["IN01"] == {
        "base.safetensors": 1.0,
        "x.safetensors": 0.5,
    }
    assert not (folder / "out.safetensors").exists()
    code, out, _ = run(capsys, *words, "-o", "out.safetensors", "--dtype", "bf16")
    assert json.loads(out)["merged"] == 3
    assert load(folder / "out.safetensors")[0][Q][0] == "BF16"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("base.safetensors",), "no LoRA is named"),
        (("base.safetensors", "none.safetensors"), "none.safetensors does not exist"),
        (("base.safetensors", "base.safetensors"), "is not a LoRA: it is an SD1 checkpoint"),
        (("x.safetensors", "x.safetensors"), "x.safetensors is a LoRA for SD1"),
        (("base.safetensors", "<lora:nome:1>"), "no LoRA called nome"),
        (("base.safetensors", "<lora:xx:1>"), "no LoRA called xx in .: "),
        (("base.safetensors", "<lora:x:1:start=0.2>"), "while an image is drawn"),
        (("base.safetensors", "<lora:x:1:lbv=IND>"), "did you mean lbw"),
        (("base.safetensors", "x.safetensors", "--lbw", "1,0,1"), "12, 17, 20, 26"),
        (("base.safetensors", "x.safetensors", "--lbw", "INDD=x"), "is not BLOCK=NUMBER"),
        (("base.safetensors", "x.safetensors", "--lbw", "IN99"), "IN99"),
        (("base.safetensors", "x.safetensors", "--lbw", "1,0,nan"), "'nan' is no number"),
        (("base.safetensors", "<lora:x:1> <lora:x:0.5"), "'<lora:x:0.5' is no whole tag"),
        (("base.safetensors", "x.safetensors:much"), "'much' is no strength"),
    ],
)
def test_what_cannot_be_baked(words, said, folder, capsys):
    made(folder / "x.safetensors")
    code, _, err = run(capsys, "bake", *words, "-o", "out.safetensors")
    assert code == 2
    assert said in err
    assert not (folder / "out.safetensors").exists()
    assert len(err.strip().splitlines()) <= 2


def test_a_folder_is_baked_into(folder, capsys):
    made(folder / "x.safetensors")
    assert run(capsys, "bake", "base.safetensors", "x.safetensors", "-o", "as-folder")[0] == 0
    found = load(folder / "as-folder/unet/diffusion_pytorch_model.safetensors")[0]
    wanted = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    run(capsys, "bake", "base.safetensors", "x.safetensors", "-o", "one.safetensors")
    assert found[wanted][1].tobytes() == load(folder / "one.safetensors")[0][Q][1].tobytes()


def test_strict_refuses_a_lora_that_does_not_match_whole(folder, capsys):
    made(folder / "x.safetensors")
    tensors = load(folder / "x.safetensors")[0]
    tensors["lora_unet_nowhere.lora_up.weight"] = ("F32", np.ones((8, 2)))
    tensors["lora_unet_nowhere.lora_down.weight"] = ("F32", np.ones((2, 8)))
    save(folder / "x.safetensors", tensors)
    words = ("bake", "base.safetensors", "x.safetensors", "-o", "out.safetensors")
    code, _, err = run(capsys, *words, "--strict")
    assert code == 2
    assert "nowhere" in err
    code, out, err = run(capsys, *words)
    assert code == 0
    assert "1 of 4 modules match nothing in base.safetensors: lora_unet_nowhere" in err
    assert "2 unmatched" in out


def test_inspect(folder, capsys):
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_base_model_version": "sd_v1",
        "ss_tag_frequency": json.dumps({"10_cat": {"cat": 12, "grass": 3}}),
    }
    made(folder / "x.safetensors", metadata=metadata)
    code, out, _ = run(capsys, "inspect", "x.safetensors", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["title"] == "LoRA for SD1 (kohya names)"
    assert found["algorithms"] == {"LoRA": 3}
    assert found["ranks"] == {"3": 3}
    assert found["alphas"] == {"1.5": 3}
    assert found["blocks"] == {"BASE": 1, "IN01": 1, "OUT11": 1}  # from diffusers' names alone
    assert found["metadata"]["tags"] == "2: cat (12), grass (3)"
    code, out, _ = run(capsys, "inspect", "x.safetensors", "--base", "base.safetensors")
    assert "3 of 3 modules are in it" in out
    assert "sd_v1" in out
    write(folder / "xl.safetensors", "sdxl")
    code, out, _ = run(capsys, "inspect", "x.safetensors", "--base", "xl.safetensors", "--json")
    assert json.loads(out)["unmatched"] == [NAMES[Q], NAMES[K]]


@pytest.mark.parametrize(
    ("word", "file", "numbers"),
    [
        (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", (1.0, None)),
        (r"C:\loras\x.safetensors:0.8", r"C:\loras\x.safetensors", (0.8, None)),
        ("x:1:2:3", "x:1", (2.0, 3.0)),
        ("x.safetensors:-.5:1e-1", "x.safetensors", (-0.5, 0.1)),
        ("my x (v1.0).safetensors:0", "my x (v1.0).safetensors", (0.0, None)),
        ("x.safetensors:0.8: 0.5", "x.safetensors", (0.8, 0.5)),
    ],
)
def test_words(word, file, numbers):
    assert asking.asked([word], []) == (Asked(file, *numbers),)


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:x>", Asked("x.safetensors")),
        ("<lora:x:0.8>", Asked("x.safetensors", 0.8)),
        ("<lora:x:0.5:0.8>", Asked("x.safetensors", 0.8, 0.5)),
        ("<lora:x:te=0.5:unet=0.8>", Asked("x.safetensors", 0.8, 0.5)),
        ("<lora:x:1:lbw=IND>", Asked("x.safetensors", 1.0, None, "IND")),
        ("<lora:x:1:OUTALL>", Asked("x.safetensors", 1.0, None, "OUTALL")),
        ("<lora:x:1:1:lbw=1,0,0.5>", Asked("x.safetensors", 1.0, None, [1.0, 0.0, 0.5])),
        ("<lora:x:1:lbw=IN05-OUT03>", Asked("x.safetensors", 1.0, None, {"IN05-OUT03": 1.0})),
        (
            "<lyco:x:1:lbwe=IN05-OUT05:attn:0,OUT06:ff:1>",
            Asked("x.safetensors", 1.0, None, None, ("IN05-OUT05:attn:0", "OUT06:ff:1")),
        ),
    ],
)
def test_tags(tag, expected, tmp_path):
    (tmp_path / "x.safetensors").touch()
    (found,) = asking.asked([f"some {tag} words"], [tmp_path])
    assert found.file == str(tmp_path / expected.file)
    assert found == Asked(found.file, *list(expected.__dict__.values())[1:])


def test_a_name_of_two_files_is_refused(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.safetensors").touch()
    with pytest.raises(Refusal, match=r"x may be .*one.*two"):
        asking.asked(["<lora:x:1>"], [tmp_path])
