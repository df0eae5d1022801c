"""The networks: SD1's, narrower, and the small image tower that judges."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from plymix.images.tokens import END, START, WINDOW
from settings import Settings

VOCABULARY = 49408
LATENT_SCALE = 0.18215


def unet(s: Settings, device: str) -> Any:
    """SD1's U-Net: 12 + 1 + 12 blocks, cross-attention on the three upper levels."""
    crossed = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    net = UNet2DConditionModel(
        sample_size=s.size // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=s.unet_widths,
        layers_per_block=2,
        down_block_types=crossed,
        up_block_types=[name.replace("Down", "Up") for name in crossed[::-1]],
        cross_attention_dim=s.text_width,
        attention_head_dim=s.unet_heads,  # diffusers means the number of heads by it
        norm_num_groups=s.unet_groups,
    )
    if device == "cpu":  # attention step by step, as in the text encoder below
        net.set_attn_processor(AttnProcessor())
    return net.to(device)


def vae(s: Settings, device: str) -> Any:
    """SD1's autoencoder: factor 8, four channels."""
    levels = len(s.vae_widths)
    net = AutoencoderKL(
        block_out_channels=s.vae_widths,
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=4,
        norm_num_groups=s.vae_groups,
        scaling_factor=LATENT_SCALE,
    )
    return net.to(device)


def text(s: Settings, device: str) -> Any:
    """SD1's text encoder: CLIP's whole vocabulary, 77 positions."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=s.text_width,
        intermediate_size=4 * s.text_width,
        num_hidden_layers=s.text_layers,
        num_attention_heads=s.text_heads,
        max_position_embeddings=WINDOW + 2,
        hidden_act="quick_gelu",
        projection_dim=s.text_width,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        attn_implementation="eager" if device == "cpu" else "sdpa",
    )
    return CLIPTextModel(config).to(device)


def read(encoder: Any, ids: Any) -> Any:
    """What the U-Net gets of tokens [n, 77]: [n, 77, width]."""
    return encoder(input_ids=ids).last_hidden_state


def half(pictures: Any) -> Any:
    """Pictures at half their size, as the tower sees them: it needs no fine detail."""
    return nn.functional.avg_pool2d(pictures, 2)


class Tower(nn.Module):  # type: ignore[misc, unused-ignore]
    """A picture [n, 3, h, w] in -1..1 (see `half`) -> a direction [n, features]."""

    def __init__(self, widths: tuple[int, ...], features: int) -> None:
        super().__init__()
        layers: list[Any] = []
        before = 3
        for width in widths:
            layers += [
                nn.Conv2d(before, width, 3, 2, 1),
                nn.GroupNorm(min(8, width), width),
                nn.GELU(),
                nn.Conv2d(width, width, 3, 1, 1),
                nn.GroupNorm(min(8, width), width),
                nn.GELU(),
            ]
            before = width
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(2 * before, features)

    def forward(self, pictures: Any) -> Any:
        x = self.layers(pictures)
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        return nn.functional.normalize(self.out(x).float(), dim=-1)


class Reader(nn.Module):  # type: ignore[misc, unused-ignore]
    """Text encoder's output [n, 77, width] -> a direction [n, features].

    The mean over the end and all padding after it: those are most of what the U-Net gets, so they
    shall all carry the meaning. `scale` is the logarithm of the inverse temperature.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, features, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, context: Any, ids: Any) -> Any:
        ends = (ids == END).to(context.dtype)[..., None]
        pooled = (context * ends).sum(1) / ends.sum(1)
        return nn.functional.normalize(self.out(pooled).float(), dim=-1)
