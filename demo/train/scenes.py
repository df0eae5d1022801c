"""Icons -> pictures in the two styles, on the device, for a whole batch at once.

A  white ground, Noto's shading, a soft shadow below
B  pale blue ground, a thick dark outline, Fluent's flat shapes in fewer, warmer colours

So a merge shows at a glance which of its traits come from where: ground, outline, shadow, palette
and the drawing itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

WHITE = (1.0, 1.0, 1.0)
PALE = (0.78, 0.89, 0.97)
INK = (0.11, 0.10, 0.24)
WARM = (1.06, 0.86, 0.72)
"""What B's colours are drawn towards: their brightness in this tint."""

FADE = 0.35
"""How far B's colours are drawn towards it."""


def placed(icons: Any, generator: Any, size: int) -> Any:
    """Icons uint8 [n, 4, s, s] at random places, sizes and tilts: float [n, 4, size, size]."""
    n = len(icons)
    draw = torch.rand((4, n), generator=generator, device=icons.device)
    scale = 0.66 + 0.18 * draw[0]
    angle = (draw[1] - 0.5) * 0.24
    x, y = (draw[2:] - 0.5) * 0.20
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([cos, sin, -x / scale, -sin, cos, -y / scale], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, 4, size, size], align_corners=False)
    return F.grid_sample(icons.float() / 255, grid, padding_mode="zeros", align_corners=False)


def in_style(style: int, rgba: Any) -> Any:
    """Placed icons [n, 4, size, size] as pictures [n, 3, size, size] of style 0 (A) or 1 (B).

    Values are in -1..1, as the autoencoder takes them.
    """
    return (_flat(rgba) if style else _shaded(rgba)).clamp(0, 1) * 2 - 1


def _shaded(rgba: Any) -> Any:
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    reach = max(1, rgba.shape[-1] // 24)
    shadow = torch.roll(alpha, (reach, reach // 2), (2, 3))
    for _ in range(3):
        shadow = F.avg_pool2d(shadow, 2 * reach + 1, 1, reach)
    ground = _full(WHITE, alpha) * (1 - 0.3 * shadow)
    return colour + ground * (1 - alpha)


def _flat(rgba: Any) -> Any:
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    light = (colour * _full((0.30, 0.59, 0.11), alpha)).sum(1, keepdim=True)
    colour = (1 - FADE) * colour + FADE * light * _full(WARM, alpha)
    width = max(1, rgba.shape[-1] // 40)
    around = F.max_pool2d(alpha, 2 * width + 1, 1, width)
    around = torch.maximum(F.avg_pool2d(around, 3, 1, 1), alpha)
    ground = _full(PALE, alpha) * (1 - around) + _full(INK, alpha) * (around - alpha)
    return torch.minimum(colour, alpha) + ground


def _full(colour: tuple[float, float, float], like: Any) -> Any:
    return torch.tensor(colour, device=like.device, dtype=like.dtype).view(1, 3, 1, 1)
