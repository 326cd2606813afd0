"""The embedded model's vision tower: a convolutional stem and a small ViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_dcam.mini.configuration import MiniConfig


class ConvBlock(nn.Module):
    """Residual 3×3 convolutions at the grid's resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(self.norm(x))))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eager: bool) -> Tensor:
    """Attention of (B, heads, L, d) tensors, fused or written out.

    Written out, it is up to three times faster in bfloat16 on CPUs: training uses it.
    """
    if not eager:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e4) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(scores.softmax(-1), v)


class VisionBlock(nn.Module):
    """Pre-norm ViT block without position bias."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, config.vision_intermediate_size)
        self.fc2 = nn.Linear(config.vision_intermediate_size, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        eager = self.config._attn_implementation == "eager"
        mixed = attend(q, k, v, None, eager).transpose(1, 2).reshape(b, n, d)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class MiniVisionTower(nn.Module):
    """Pixels (B, 3, S, S), normalised, to patch features (B, N, D), row-major."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        c1, c2, c3 = config.stem_channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, c1, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(c1, c2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(c2, c3, 3, stride=2, padding=1),
            ConvBlock(c3),
            ConvBlock(c3),
            nn.GroupNorm(8, c3),
            nn.Conv2d(c3, config.hidden_size, 1),
        )
        self.position_embedding = nn.Parameter(
            torch.zeros(1, config.hidden_size, config.grid, config.grid)
        )
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, pixel_values: Tensor, pool: int = 1) -> Tensor:
        """``pool`` > 1 averages pool×pool patches: the coarse stage of training."""
        x = self.stem(pixel_values) + self.position_embedding
        if pool > 1:
            x = F.avg_pool2d(x, pool)
        x = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
