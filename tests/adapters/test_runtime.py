"""Bakes against the forward pass of the libraries that train and run LoRAs: PEFT and LyCORIS.

Their modules are made on layers with a checkpoint's weights, their parameters drawn, their state
saved as they save it; the layer with plymix's baked weight must give what theirs gives. Both are in
the extra `dev`; without them there is nothing to compare with.
"""

import json
import logging

import numpy as np
import pytest

import plymix
from lora_matrix import LYCORIS, PEFT
from plymix import plan
from plymix.recipe import from_dict
from small import load, save
from tiny import header, state

torch = pytest.importorskip("torch")
HEADER = header("sd1", dtype="F32")
UNET = "model.diffusion_model."
LINEAR = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SQUARE = UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
CONV = UNET + "input_blocks.1.0.in_layers.2.weight"
POINT = UNET + "input_blocks.4.0.skip_connection.weight"
KOHYA = {key: "lora_unet_" + key[len(UNET) : -len(".weight")].replace(".", "_") for key in
         (LINEAR, SQUARE, CONV, POINT)}  # fmt: skip
DIFFUSERS = {
    LINEAR: "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    SQUARE: "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    CONV: "down_blocks.0.resnets.0.conv1",
    POINT: "down_blocks.1.resnets.0.conv_shortcut",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = state(HEADER)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    return save(path, {key: (dtype, made[key]) for key, (dtype, _) in HEADER.items()})


def layer(key, base):
    """A layer with the base model's weight."""
    return layer_of(load(base)[0][key][1]).requires_grad_(False)


def sample(key):
    _, in_, *kernel = HEADER[key][1]
    return torch.randn(2, in_, 5, 5) if kernel else torch.randn(3, in_)


def bake(base, path, out, strength):
    step = {"method": "lora", "model": "a", "loras": "l", "strength": strength}
    models = {"a": str(base), "l": str(path)}
    plymix.merge(from_dict({"models": models, "steps": {"s": step}, "output": {}}), out=out)
    return load(out)[0]


def write(path, tensors, metadata=None):
    kinds = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32"}
    return save(
        path, {k: (kinds[t.dtype], t.detach().numpy()) for k, t in tensors.items()}, metadata
    )


def layer_of(weight):
    out, in_, *kernel = weight.shape
    if kernel:
        made = torch.nn.Conv2d(in_, out, tuple(kernel), padding=kernel[0] // 2, bias=False)
    else:
        made = torch.nn.Linear(in_, out, bias=False)
    made.weight.data.copy_(torch.tensor(weight))
    return made


def compare(key, wanted, baked, x):
    got = layer_of(baked[key][1])(x).detach().numpy()
    np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-5, atol=1e-5)


# --- LyCORIS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "key"),
    [(n, k) for n, (_, _, on) in LYCORIS.items() for k in ((CONV,) if on == "kernels" else KOHYA)],
)
def test_lycoris(name, key, base, tmp_path):
    lycoris = pytest.importorskip("lycoris.modules")
    import importlib
    import pkgutil

    logging.disable(logging.INFO)
    kind, options, _ = LYCORIS[name]
    homes = (importlib.import_module(m.name) for m in
             pkgutil.iter_modules(lycoris.__path__, "lycoris.modules."))  # fmt: skip
    module = next(getattr(home, kind) for home in homes if hasattr(home, kind))
    torch.manual_seed(1)
    org, x = layer(key, base), sample(key)
    options = {"lora_dim": 4, "alpha": 2.0, **options}
    made = module(KOHYA[key], org, multiplier=1.0, **options)
    if name == "full":  # its weight is the layer's own from here on
        made.apply_to()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    made.eval()
    saved = made.custom_state_dict() if hasattr(made, "custom_state_dict") else None
    saved = saved or made.state_dict()
    tensors = {
        f"{KOHYA[key]}.{n}": t.contiguous() for n, t in saved.items() if "org_module" not in n
    }
    if name == "DyLoRA":  # its forward pass draws a rank; all of it is what is saved
        whole = made.get_merged_weight(rank=options["lora_dim"] - 1)[0]
        made = layer_of(whole.detach().numpy())
    elif name != "full":
        made.apply_to()
    baked = bake(base, write(tmp_path / "l.safetensors", tensors), tmp_path / "o.safetensors", 1.0)
    assert not np.allclose(layer(key, base)(x).numpy(), made(x).detach().numpy(), atol=1e-4)
    compare(key, made(x), baked, x)


# --- PEFT


def holding(one):
    """A model of one layer."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.it = one

        def forward(self, x):
            return self.it(x)

    return Model()


def trained(model):
    """`model`, with other numbers in all that PEFT trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEFT)
@pytest.mark.parametrize("key", KOHYA)
@pytest.mark.parametrize("saved_by", ["diffusers", "PEFT"])
def test_peft(name, key, saved_by, base, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["it"], **PEFT[name])
    model = trained(peft.get_peft_model(holding(layer(key, base)), config))
    module = DIFFUSERS[key]
    if saved_by == "PEFT":  # the state itself, whose scale only the configuration knows
        raw = {k: t for k, t in model.state_dict().items() if "lora_" in k}
        tensors = {k.replace("model.it", f"model.{module}"): t for k, t in raw.items()}
        start = ""
    else:
        raw = peft.get_peft_model_state_dict(model)
        tensors = {k.replace("base_model.model.it", f"unet.{module}"): t for k, t in raw.items()}
        start = "unet."
    told = {f"{start}{k}": v for k, v in
            (("r", 4), ("lora_alpha", 6), ("use_rslora", config.use_rslora))}  # fmt: skip
    tensors = {k: t.contiguous() for k, t in tensors.items()}
    metadata = {"lora_adapter_metadata": json.dumps(told)}
    file = write(tmp_path / "l.safetensors", tensors, metadata)
    x = sample(key)
    baked = bake(base, file, tmp_path / "o.safetensors", 1.0)
    assert not np.allclose(layer(key, base)(x).numpy(), model(x).detach().numpy(), atol=1e-4)
    compare(key, model(x), baked, x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", KOHYA)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_pefts_loha_and_lokr(kind, whole, key, base, tmp_path):
    """Their alpha stands in adapter_config.json alone; what it is, is told."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    more = {"decompose_factor": 2, "decompose_both": not whole} if kind == "LoKrConfig" else {}
    config = getattr(peft, kind)(
        r=4 if whole else 1, alpha=6, target_modules=["it"], use_effective_conv2d=not whole, **more
    )
    model = trained(peft.get_peft_model(holding(layer(key, base)), config))
    raw = peft.get_peft_model_state_dict(model)
    tensors = {
        k.replace("base_model.model.it", f"base_model.model.{DIFFUSERS[key]}"): t.contiguous()
        for k, t in raw.items()
    }
    file = write(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": config.r, "alpha": 6}))
    factor = 6 / config.r
    step = {"method": "lora", "model": "a", "loras": "l", "strength": factor}
    models = {"a": str(base), "l": str(file)}
    found = from_dict({"models": models, "steps": {"s": step}, "output": {}})
    with plan.build(found) as planned:
        assert any(f"multiply its strength by {factor:g}" in note for note in planned.notes)
    baked, x = bake(base, file, tmp_path / "o.safetensors", factor), sample(key)
    assert not np.allclose(layer(key, base)(x).numpy(), model(x).detach().numpy(), atol=1e-4)
    compare(key, model(x), baked, x)
