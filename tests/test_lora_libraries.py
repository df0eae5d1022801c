"""LoRA files that plymix writes, in the hands of the libraries that run them: PEFT and LyCORIS.

They load the file as they load any, on a layer with a checkpoint's weight; its forward pass must be
that of the weight plus the change that numpy makes of the original's factors. Both are in the extra
`dev`; without them there is nothing to compare with.
"""

import json

import numpy as np
import pytest

import loras as made
from plymix import loras
from small import load, save
from tiny import header, state

torch = pytest.importorskip("torch")
HEADER = header("sd1", dtype="F32")
UNET = "model.diffusion_model."
LINEAR = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CONV = UNET + "input_blocks.1.0.in_layers.2.weight"
KOHYA = {key: "lora_unet_" + key[len(UNET) : -len(".weight")].replace(".", "_") for key in
         (LINEAR, CONV)}  # fmt: skip
DIFFUSERS = {
    LINEAR: "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    CONV: "down_blocks.0.resnets.0.conv1",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    return save(path, {key: (HEADER[key][0], x) for key, x in state(HEADER).items()})


def layer_of(weight):
    out, in_, *kernel = weight.shape
    if kernel:
        layer = torch.nn.Conv2d(in_, out, tuple(kernel), padding=kernel[0] // 2, bias=False)
    else:
        layer = torch.nn.Linear(in_, out, bias=False)
    layer.weight.data.copy_(torch.tensor(np.asarray(weight, np.float32)))
    return layer.requires_grad_(False)


def weight(key):
    return state(HEADER)[key].astype(np.float64)


def sample(key):
    torch.manual_seed(3)
    _, in_, *kernel = HEADER[key][1]
    return torch.randn(2, in_, 5, 5) if kernel else torch.randn(3, in_)


def lora_file(path, key, change):
    kinds = {"f": "F32", "i": "I64"}
    tensors = {f"{KOHYA[key]}.{end}": np.asarray(x) for end, x in change.tensors.items()}
    return save(path, {k: (kinds[x.dtype.kind], x) for k, x in tensors.items()})


def tensors_of(path):
    return {k: torch.tensor(x.copy()) for k, (_, x) in load(path)[0].items()}


def compare(key, loaded, change):
    x, w = sample(key), weight(key)
    want = layer_of(w + change(w))(x).numpy()
    got = loaded(x).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert not np.allclose(layer_of(w)(x).numpy(), want, atol=1e-3)


def in_peft(path, key, rank, **options):
    """The layer with the file loaded into it by PEFT's own loader."""
    peft = pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.it = layer_of(weight(key))

        def forward(self, x):
            return self.it(x)

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["it"], **options)
    model = peft.get_peft_model(Model(), config)
    tensors = {k.replace(DIFFUSERS[key], "it"): x for k, x in tensors_of(path).items()}
    found = peft.set_peft_model_state_dict(model, tensors)
    assert not found.unexpected_keys
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", KOHYA)
def test_peft_runs_what_is_converted(key, base, tmp_path):
    change = made.lora(HEADER[key][1], 1, rank=3, alpha=1.5)
    file = lora_file(tmp_path / "l.safetensors", key, change)
    loras.convert(file, tmp_path / "p.safetensors", to="peft", base=base)
    compare(key, in_peft(tmp_path / "p.safetensors", key, 3), change.delta)


@pytest.mark.filterwarnings("ignore")
def test_peft_runs_a_dora(base, tmp_path):
    change = made.LINEAR["DoRA"](HEADER[LINEAR][1], 1)
    file = lora_file(tmp_path / "l.safetensors", LINEAR, change)
    loras.convert(file, tmp_path / "p.safetensors", to="peft", base=base)
    model = in_peft(tmp_path / "p.safetensors", LINEAR, 3, use_dora=True)
    compare(LINEAR, model, change.delta)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", KOHYA)
@pytest.mark.parametrize("rank", [None, 4])
def test_peft_runs_what_is_merged(key, rank, base, tmp_path):
    one = made.lora(HEADER[key][1], 1, rank=2, alpha=3)
    two = made.loha(HEADER[key][1], 2, rank=1)
    a = lora_file(tmp_path / "a.safetensors", key, one)
    b = lora_file(tmp_path / "b.safetensors", key, two)
    out = tmp_path / "p.safetensors"
    loras.merge([f"{a}:0.5", f"{b}:-2"], out, to="peft", rank=rank, base=base)
    compare(key, in_peft(out, key, 3), lambda w: 0.5 * one.delta(w) - 2 * two.delta(w))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["LoRA", "LoHa", "LoKr", "DoRA LoHa"])
@pytest.mark.parametrize("key", KOHYA)
def test_lycoris_runs_what_is_converted(family, key, base, tmp_path):
    one = {"rank": 1} if family == "LoKr" else {}  # more than LyCORIS has for layers so narrow
    change = made.CONV[family](HEADER[key][1], 1, **one)
    file = lora_file(tmp_path / "l.safetensors", key, change)
    loras.convert(file, tmp_path / "y.safetensors", to="lycoris", base=base)
    name = "lycoris_" + DIFFUSERS[key].replace(".", "_")
    compare(key, in_lycoris(tmp_path / "y.safetensors", name, key), change.delta)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("key", KOHYA)
def test_lycoris_runs_what_is_extracted(key, rank, tmp_path):
    change = made.lokr(HEADER[key][1], 1, rank=1)
    before = state(HEADER)
    after = {**before, key: (before[key] + change.delta(None)).astype(np.float32)}
    for name, tensors in (("a", before), ("b", after)):
        save(tmp_path / f"{name}.safetensors", {k: (HEADER[k][0], x) for k, x in tensors.items()})
    out = tmp_path / "y.safetensors"
    loras.extract(tmp_path / "b.safetensors", tmp_path / "a.safetensors", out, family="lokr",
                  factor=2, rank=rank)  # fmt: skip
    assert json.loads(load(out)[1]["ss_network_args"])["algo"] == "lokr"
    compare(key, in_lycoris(out, KOHYA[key], key), change.delta)


def in_lycoris(path, name, key):
    """The layer with the file's module on it, made by LyCORIS' own loader."""
    modules = pytest.importorskip("lycoris.modules")
    layer = layer_of(weight(key))
    kind, params = modules.get_module(tensors_of(path), name)
    module = modules.make_module(kind, params, name, layer)
    assert module is not None
    module.eval().apply_to()
    return layer
