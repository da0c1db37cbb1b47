"""Loss in bits per byte, and text from the model. All ranks take part: their experts are needed."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F

from megamoe.lm.model import LanguageModel
from megamoe.lm.world import World

BITS = 1 / math.log(2)


def autocast(world: World, *, enabled: bool) -> contextlib.AbstractContextManager[object]:
    """bf16 for the dense part where the recipe asks for less than fp32."""
    return torch.autocast(world.device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def summed_loss(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over the next bytes of tokens [B, S + 1]; B may be 0."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def held_out_bits(
    model: LanguageModel, world: World, tokens: torch.Tensor, *, sequences: int, low_precision: bool
) -> float:
    """Mean loss of tokens [N, S + 1], the same on all ranks, in bits per byte; ``sequences`` of them at a time."""
    model.eval()
    total = torch.zeros(1, dtype=torch.float64)
    for chunk in torch.split(tokens, sequences):
        with autocast(world, enabled=low_precision):
            total += summed_loss(model, world.share(chunk).to(world.device)).double().cpu()
    model.train()
    world.sum(total := total.to(world.device), "held-out loss")
    return total.item() * BITS / tokens[:, 1:].numel()


@torch.no_grad()
def generate(
    model: LanguageModel, world: World, prompt: bytes, *, count: int, length: int, seed: int, low_precision: bool
) -> bytes:
    """``prompt`` and ``count`` more bytes, drawn at temperature 0.7 on rank 0; b"" on the other ranks.

    The others call the model with no sequence at all and lend their experts.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(count):
        rows = [text[-length:]] if world.rank == 0 else []
        tokens = torch.tensor(rows, dtype=torch.int64, device=world.device).view(len(rows), -1 if rows else 1)
        with autocast(world, enabled=low_precision):
            logits = model(tokens)
        if rows:
            p = (logits[0, -1].float().cpu() / 0.7).softmax(-1)
            text.append(int(torch.multinomial(p, 1, generator=generator)))
    model.train()
    return bytes(text) if world.rank == 0 else b""
