"""Figures of a training run, and its rows of benchmark "megatron"."""

from __future__ import annotations

from dataclasses import dataclass, field

from megamoe.adapters.megatron.options import Options
from megamoe.bench import results
from megamoe.engines.choose import taken
from megamoe.lm.world import World
from megamoe.problem import Recipe


@dataclass
class Figures:
    """One entry a step: loss (mean over the batch, nats per byte) and norm of the whole gradient before clipping."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0


def rows(runs: dict[str, Figures], options: Options, world: World, command: str) -> list[results.Row]:
    """One row for each run, by whose layer it trained ("stock", "megamoe").

    ``tokens`` are those of one optimiser step over all ranks, ``us`` the mean time of a timed step, ``diff`` of ours
    the largest relative difference of a loss to the stock layer's, which stands among the ``peers``.
    """
    origin = results.provenance(command, commit=options.commit or None, peers=["megatron-core"])
    peer = f"megatron-core-{origin['versions']['peers']['megatron-core']}"
    tokens = options.batch * options.length
    us = {moe: 1e6 * tokens / figures.tokens_per_second for moe, figures in runs.items()}
    recipe = precision_of(options, world)
    engine = taken(options.engine, recipe, world.device, world.group, save=True)
    out = []
    for moe, figures in runs.items():
        row = origin | {
            "model": f"gpt-{options.layers}x{options.hidden}-{options.experts}x{options.intermediate}",
            "engine": "stock" if moe == "stock" else engine,
            "recipe": recipe,
            "world_size": world.size,
            "tokens": tokens,
            "us": us[moe],
            "tokens_per_second": figures.tokens_per_second,
            "losses": figures.losses,
            "grad_norms": figures.grad_norms,
        }
        if moe != "stock" and "stock" in runs:
            pairs = zip(runs["stock"].losses, figures.losses, strict=True)
            row |= {"diff": max(abs(a - b) / a for a, b in pairs), "peers": {peer: us["stock"]}}
        out.append(row)
    return out


def precision_of(options: Options, world: World) -> Recipe:
    """ "fp32" or "bf16"."""
    if options.precision == "auto":
        return "bf16" if world.device.type == "cuda" else "fp32"
    return "fp32" if options.precision == "fp32" else "bf16"
