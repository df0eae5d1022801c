"""The backend `diffusers`: pictures in this process, with torch, diffusers and transformers.

Nothing is ever fetched. The networks are built from the checkpoint's own shapes, without weights,
and the plan's tensors are computed into them; the next merge touches only what it changes. The
tokens of a prompt come from `tokens`, the steps from `samplers`.

Prompts have no weights in brackets here: "(word:1.3)" is read as text. Longer prompts than 75
tokens are read in windows, side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from plymix import gpu
from plymix.errors import Failure, Refusal
from plymix.expr import Tensor
from plymix.images import samplers
from plymix.images.base import Options, Picture, Settings, Tick, need
from plymix.images.live import COMPONENTS, Live, hints, parts
from plymix.images.resident import Line, Resident, lined_up
from plymix.images.tokens import END, START, WINDOW, windows
from plymix.plan import Plan

Shapes = Mapping[str, tuple[int, ...]]

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip

LATENT_SCALE = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
"""What the VAE's latents are multiplied by before the U-Net sees them."""

V_SPREAD = 0.09
"""SD2 files do not say what they predict. Those that predict v have a wider spread in the bias of
their last cross-attention's first norm (ComfyUI, `supported_models.SD20.model_type`)."""
LEVELS = "encoder.down_blocks.{}.resnets.0.conv1.weight"
"""What each level of a VAE has; each but the first halves the picture."""

V_TELLS = "unet/up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"


def open(options: Options) -> Diffusers:
    """The backend. Raises Refusal for missing libraries, an unknown precision or device."""
    return Diffusers(options)


class Diffusers:
    """One pipeline's networks, kept equal to the last plan's model."""

    def __init__(self, options: Options) -> None:
        torch = need("torch", "--backend diffusers")
        for module in ("diffusers", "transformers"):
            need(module, "--backend diffusers")
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        gpu.require(self.device)
        on_cpu = self.device == "cpu"
        if on_cpu:  # `plymix` keeps other libraries to one thread; here they do the work
            torch.set_num_threads(threads())
        precision = options.precision or ("fp32" if on_cpu else "fp16")
        if precision not in PRECISIONS:
            raise Refusal(f"unknown precision {precision!r}; use {', '.join(PRECISIONS)}")
        self.dtype = getattr(torch, PRECISIONS[precision])
        self.batch = options.batch or (1 if on_cpu else 4)
        where = "cpu" if on_cpu else torch.cuda.get_device_name(self.device)
        self.label = f"diffusers {_version('diffusers')}, torch {torch.__version__}, {where}"
        self.label += f", {precision}" if self.batch == 1 else f", {precision}, batch {self.batch}"
        self.resident = not on_cpu
        self._modules: dict[str, Any] = {}
        self._params: dict[str, Any] = {}
        self._lines: list[Line] = []
        self._built: Any = None
        self._live: Live | Resident = Live(self._put)

    # --- the model ----------------------------------------------------------------------------

    def check(self, plan: Plan, asked: Sequence[Settings]) -> None:
        """Refuse models and sizes that cannot be drawn, by the shapes of the tensors."""
        found = parts(plan)
        if plan.base.prediction == "edm":
            raise Refusal(f"{plan.base.label} predicts edm; use --backend comfyui for it")
        shapes = {t.name.partition("/")[2]: t.shape for t in found["vae"]}
        down = 2 ** (_count(shapes, LEVELS) - 1)
        for s in asked:
            if s.width % down or s.height % down:
                raise Refusal(
                    f"size {s.width}x{s.height}: pictures of {plan.base.label} are multiples of"
                    f" {down} pixels, both ways"
                )

    def use(self, plan: Plan) -> None:
        found = parts(plan)
        assert plan.arch is not None
        tensors = [t for part in found.values() for t in part]
        structure = (plan.arch.name, {t.name: t.shape for t in tensors}, hints(plan))
        if structure != self._built:
            self._build(plan.arch.name, found, hints(plan))
            self._live, self._built = self._keeper(), structure
        self._live.become(plan, tensors)
        self.levels = samplers.schedule(_zero_snr(plan))
        self._v = self._predicts_v(plan)

    def _build(
        self, arch: str, found: Mapping[str, Sequence[Tensor]], known: Mapping[str, Any]
    ) -> None:
        import torch

        self.close()
        pooled = [t.shape[0] for t in found.get("text_encoder_2", ()) if "projection" in t.name]
        for name, tensors in found.items():
            shapes = {t.name.partition("/")[2]: t.shape for t in tensors}
            said = {**known.get(name, {}), "pooled_width": sum(pooled)}
            module = self._module(name, arch, shapes, said)
            # transformers 4 and 5 differ in a prefix
            own = {_bare(key): key for key, _ in module.named_parameters()}
            _complete(
                name, shapes, {k: tuple(module.get_parameter(v).shape) for k, v in own.items()}
            )
            names = {own[_bare(key)]: f"{name}/{key}" for key in shapes}
            # The VAE of SDXL leaves the range of fp16; in fp32 it costs little.
            dtype = torch.float32 if name == "vae" else self.dtype
            line = lined_up(module, names, dtype, self.device)
            self._lines.append(line)
            self._params.update({n: module.get_parameter(key) for key, n in names.items()})
            self._modules[name] = module.eval()
        self.arch = arch

    def _module(self, name: str, arch: str, shapes: Shapes, known: Mapping[str, Any]) -> Any:
        """A network whose parameters are nowhere yet."""
        import torch

        kind, config = CONFIGS[name](arch, shapes, known)
        with torch.device("meta"):
            module = kind(config)
        for key, buffer in list(module.named_buffers()):
            if not key.endswith("position_ids"):
                raise AssertionError(f"{key}: a buffer that no file has")
            owner, _, leaf = key.rpartition(".")
            numbers = torch.arange(buffer.numel(), device=self.device).reshape(buffer.shape)
            module.get_submodule(owner).register_buffer(leaf, numbers, persistent=False)
        return module

    def _keeper(self) -> Live | Resident:
        """On a GPU the models that are merged stay in its memory, where there is room."""
        if not self.resident:
            return Live(self._put)
        return Resident(self._put, self._lines, self.device)

    def _put(self, tensor: Tensor, data: memoryview) -> None:
        import torch

        param = self._params[tensor.name]
        value = torch.frombuffer(data, dtype=getattr(torch, DTYPES[tensor.dtype]))
        param.copy_(value.reshape(tensor.shape).reshape(param.shape))

    def _predicts_v(self, plan: Plan) -> bool:
        kind = plan.base.prediction
        if kind or self.arch != "sd2":
            return kind == "v"
        return float(self._params[V_TELLS].float().std(unbiased=False)) > V_SPREAD

    def close(self) -> None:
        self._modules, self._params, self._lines, self._built = {}, {}, [], None
        self._live = Live(self._put)
        if self.device != "cpu":
            import torch

            torch.cuda.empty_cache()

    # --- pictures -----------------------------------------------------------------------------

    def draw(self, asked: Sequence[Settings], tick: Tick) -> Iterator[Picture]:
        def alike(s: Settings) -> tuple[Any, ...]:
            return (s.steps, s.cfg, s.sampler, s.width, s.height, self._windows(s))

        for _, group in groupby(asked, alike):
            same = list(group)
            for at in range(0, len(same), self.batch):
                yield from self._batch(same[at : at + self.batch], tick)

    def _windows(self, s: Settings) -> int:
        return max(len(windows(s.prompt)), len(windows(s.negative)))

    def _batch(self, asked: Sequence[Settings], tick: Tick) -> Iterator[Picture]:
        import torch

        one = asked[0].checked()
        down = 2 ** (len(self._modules["vae"].config.block_out_channels) - 1)
        shape = (self._modules["unet"].config.in_channels, one.height // down, one.width // down)
        generators = [torch.Generator("cpu").manual_seed(s.seed) for s in asked]

        def noise() -> Any:
            # Each picture's own stream: it depends neither on the batch nor on the device.
            drawn = [torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]
            return torch.stack(drawn).to(self.device)

        with torch.inference_mode():
            guess = self._guess(asked)
            calls = samplers.WAYS[one.sampler].calls * one.steps - samplers.WAYS[one.sampler].calls
            part = len(asked) / (calls + 1)

            def denoise(x: Any, sigma: float) -> Any:
                out = guess(x, sigma)
                tick(part)
                return out

            latent = samplers.sample(one.sampler, denoise, noise, one.steps, self.levels)
            for each in latent:
                yield self._decoded(each)

    def _guess(self, asked: Sequence[Settings]) -> Callable[[Any, float], Any]:
        """The model's guess of the noiseless latent, guided by the prompts."""
        import torch

        unet, cfg, count = self._modules["unet"], asked[0].cfg, self._windows(asked[0])
        texts = [s.prompt for s in asked]
        if guided := cfg != 1:
            texts += [s.negative for s in asked]
        read = {text: self._read(text, count) for text in dict.fromkeys(texts)}
        context = torch.cat([read[text][0] for text in texts])
        extra: dict[str, Any] = {}
        if self.arch == "sdxl":
            sizes = [[s.height, s.width, 0, 0, s.height, s.width] for s in asked]
            extra["added_cond_kwargs"] = {
                "text_embeds": torch.cat([read[text][1] for text in texts]),
                "time_ids": torch.tensor(sizes * (1 + guided), dtype=self.dtype).to(self.device),
            }

        def guess(x: Any, sigma: float) -> Any:
            whole = (1 + sigma**2) ** 0.5
            scaled = (x / whole).to(self.dtype)
            if guided:
                scaled = torch.cat([scaled, scaled])
            step = torch.tensor(self.levels.step(sigma), dtype=torch.float32, device=self.device)
            out = unet(scaled, step, encoder_hidden_states=context, **extra, return_dict=False)
            out = out[0].float()
            if guided:
                out, against = out.chunk(2)
                out = against + cfg * (out - against)
            if self._v:
                return x / whole**2 - out * (sigma / whole)
            return x - out * sigma

        return guess

    def _read(self, text: str, count: int) -> tuple[Any, Any]:
        """A text as the encoders read it: [1, 77 * windows, width]; pooled [1, width] or None."""
        import torch

        found, pooled = [], None
        encoders = [name for name in COMPONENTS[self.arch] if name.startswith("text_encoder")]
        for window in windows(text, count):
            rows = []
            for name in encoders:
                # SDXL's second encoder and SD2's were trained with "!", 0, after the end.
                pad = 0 if self.arch == "sd2" or name == "text_encoder_2" else END
                ids = [START, *window, END, *[pad] * (WINDOW - len(window))]
                module = self._modules[name]
                out = module(torch.tensor([ids], device=self.device), output_hidden_states=True)
                # SDXL was trained with the layer before the last, SD1 and SD2 (whose file lacks
                # the last one here) with the last and the norm that follows.
                last = out.hidden_states[-2] if self.arch == "sdxl" else out.last_hidden_state
                rows.append(last)
                if name == "text_encoder_2" and pooled is None:
                    pooled = out.text_embeds
            found.append(torch.cat(rows, dim=-1))
        return torch.cat(found, dim=1), pooled

    def _decoded(self, latent: Any) -> Picture:
        import torch

        vae = self._modules["vae"]
        x = vae.decode(latent[None].float() / vae.config.scaling_factor, return_dict=False)[0][0]
        if not bool(torch.isfinite(x).all()):
            raise Failure(
                "the picture has no finite numbers: the model is damaged (plymix check), or leaves"
                " the range of fp16 (--precision bf16 or fp32)"
            )
        levels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(1, 2, 0).cpu().numpy()


# --- networks from shapes -----------------------------------------------------------------------


def _unet(arch: str, shapes: Shapes, known: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    levels = _count(shapes, "down_blocks.{}.resnets.0.conv1.weight")
    widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    crossed = [f"down_blocks.{i}.attentions.0.norm.weight" in shapes for i in range(levels)]
    depths = [
        _count(shapes, f"down_blocks.{i}.attentions.0.transformer_blocks.{{}}.norm1.weight") or 1
        for i in range(levels)
    ]
    first = crossed.index(True)
    block = f"down_blocks.{first}.attentions.0"
    linear = len(shapes[f"{block}.proj_in.weight"]) == 2
    heads: Any = 8 if arch == "sd1" else [max(1, w // 64) for w in widths]
    config: dict[str, Any] = {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, "down_blocks.0.resnets.{}.conv1.weight"),
        "down_block_types": [("CrossAttn" if c else "") + "DownBlock2D" for c in crossed],
        "up_block_types": [("CrossAttn" if c else "") + "UpBlock2D" for c in crossed[::-1]],
        "transformer_layers_per_block": depths,
        "cross_attention_dim": shapes[f"{block}.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": linear,
        "attention_head_dim": heads,  # diffusers means the number of heads by it
        "norm_num_groups": _groups(widths),
        "sample_size": 64,
    }
    if "add_embedding.linear_1.weight" in shapes:
        joined = shapes["add_embedding.linear_1.weight"][1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (joined - known["pooled_width"]) // 6,
            "projection_class_embeddings_input_dim": joined,
        }
    chosen = _said(known, ("norm_num_groups", "attention_head_dim"))
    return UNet2DConditionModel.from_config, config | chosen


def _vae(arch: str, shapes: Shapes, known: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    from diffusers import AutoencoderKL

    levels = _count(shapes, LEVELS)
    widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    config = {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": _groups(widths),
        "scaling_factor": LATENT_SCALE[arch],
    }
    chosen = _said(known, ("norm_num_groups", "scaling_factor"))
    return AutoencoderKL.from_config, config | chosen


def _text(arch: str, shapes: Shapes, known: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    bare = {_bare(key): shape for key, shape in shapes.items()}
    tokens, width = bare["embeddings.token_embedding.weight"]
    projection = bare.get("text_projection.weight")
    openai = projection is None and arch != "sd2"
    config = {
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": bare["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(bare, "encoder.layers.{}.mlp.fc1.weight"),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": bare["embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu" if openai else "gelu",
        "projection_dim": projection[0] if projection else width,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    config |= _said(known, ("num_attention_heads", "hidden_act", "layer_norm_eps"))
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return lambda said: kind(CLIPTextConfig(**said)), config


CONFIGS: Mapping[str, Callable[[str, Shapes, Mapping[str, Any]], tuple[Any, dict[str, Any]]]] = {
    "unet": _unet,
    "vae": _vae,
    "text_encoder": _text,
    "text_encoder_2": _text,
}


def _said(known: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: known[name] for name in names if known.get(name) is not None}


def _count(shapes: Shapes, name: str) -> int:
    """How many of the numbers 0, 1, ... give a key when put into `name`."""
    n = 0
    while name.format(n) in shapes:
        n += 1
    return n


def _groups(widths: Sequence[int]) -> int:
    """32, as in all published models, or the largest power of two that divides all widths."""
    return next(n for n in (32, 16, 8, 4, 2, 1) if all(w % n == 0 for w in widths))


def _bare(key: str) -> str:
    return key.removeprefix("text_model.")


def _complete(name: str, shapes: Shapes, wanted: Shapes) -> None:
    """Refuse a component whose tensors are not exactly those that its network has."""
    made = {_bare(key): shape for key, shape in shapes.items()}
    for key in {**wanted, **made}:
        there, right = made.get(key), wanted.get(key)
        if there is None or right is None or _ones(there) != _ones(right):
            told = [str(list(shape)) if shape else "missing" for shape in (there, right)]
            raise Refusal(
                f"the {name.replace('_', ' ')} cannot be built: {key} is {told[0]}; in a network of"
                f" this kind it is {told[1]}"
            )


def _ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def threads() -> int:
    """Threads that torch may use on the CPU: as many as there are processors for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _zero_snr(plan: Plan) -> bool:
    source = plan.base.source
    return "ztsnr" in source.tensors or source.metadata.get("ss_zero_terminal_snr") == "True"


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
