"""The language model: bytes in, logits of the next byte out; pre-norm, causal attention with rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the part that every rank holds whole; the feed-forward layers are made by the caller.

    Raises:
        ValueError: heads that do not divide the width into even parts.
    """

    hidden: int = 128
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if min(self.hidden, self.layers, self.heads) < 1:
            raise ValueError(f"hidden, layers and heads must be at least 1, got {self}")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden ({self.hidden}) must be divisible by twice the heads (2 x {self.heads}): rotary "
                f"positions turn pairs of columns"
            )


class Attention(nn.Module):
    """Causal self-attention with rotary positions (arXiv:2104.09864) and normalised queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.head_dim = config.hidden // config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim)
        self.k_norm = nn.RMSNorm(self.head_dim)
        nn.init.normal_(self.qkv.weight, std=config.hidden**-0.5)
        # Smaller where it adds to the residual stream, as two parts of each block do.
        nn.init.normal_(self.out.weight, std=(config.hidden * 2 * config.layers) ** -0.5)

    def forward(self, x_BSH: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]."""
        B, S, H = x_BSH.shape
        q, k, v = self.qkv(x_BSH).view(B, S, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        out: torch.Tensor = self.out(y.transpose(1, 2).reshape(B, S, H))
        return out


def rotary_table(length: int, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [length, dim / 2] fp32, of position times 10000^(-2i/dim)."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn column pairs (i, i + dim/2) of x [..., S, dim] by the angle of their position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: ModelConfig, moe: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden)
        self.moe = moe

    def forward(self, x_BSH: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]."""
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), rotary)
        y: torch.Tensor = x_BSH + self.moe(self.moe_norm(x_BSH))
        return y


class LanguageModel(nn.Module):
    """Bytes [B, S] int64 -> logits [B, S, 256] fp32. B = 0 is allowed: a rank may have nothing to say.

    Args:
        config: sizes.
        make_moe: called with the layer's index, gives its feed-forward module, [B, S, H] -> [B, S, H].
    """

    def __init__(self, config: ModelConfig, make_moe: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(VOCABULARY, config.hidden)
        self.blocks = nn.ModuleList(Block(config, make_moe(i)) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, VOCABULARY, bias=False)
        nn.init.zeros_(self.head.weight)  # the first loss is 8 bits, whatever the seed

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, S, 256]."""
        x_BSH = self.embed(tokens_BS)
        rotary = rotary_table(tokens_BS.shape[1], self.config.hidden // self.config.heads, tokens_BS.device)
        for block in self.blocks:
            x_BSH = block(x_BSH, rotary)
        logits: torch.Tensor = self.head(self.norm(x_BSH))
        return logits.float()
