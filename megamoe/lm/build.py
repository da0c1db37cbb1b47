"""From options and ranks to the model, its experts spread over them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from megamoe.layer import MegaMoE
from megamoe.lm.model import LanguageModel, ModelConfig
from megamoe.lm.options import Options
from megamoe.lm.world import World
from megamoe.problem import Recipe
from megamoe.router import RouterConfig


def recipe_of(options: Options, world: World) -> Recipe:
    """The recipe asked for; ``auto`` is fp32 on the CPU and bf16 on a GPU."""
    if options.recipe == "auto":
        return "fp32" if world.device.type == "cpu" else "bf16"
    return cast(Recipe, options.recipe)


def build_model(options: Options, world: World) -> LanguageModel:
    """The model on this rank's device, parameters in fp32, weights from ``options.seed`` for any number of ranks.

    Raises:
        ValueError: sizes that do not fit together or over the ranks, with got and expected.
    """
    if options.experts % world.size:
        raise ValueError(
            f"--experts must be divisible by the number of ranks ({world.size}), got {options.experts}: "
            f"try --experts {-(-options.experts // world.size) * world.size}"
        )
    router = RouterConfig(
        hidden=options.hidden,
        num_experts=options.experts,
        top_k=options.top_k,
        score="softmax" if options.balance == "aux" else "sigmoid",
        aux_coef=0.01 if options.balance == "aux" else 0.0,
        aux_free=options.balance == "bias",
    )

    def make_moe(_: int) -> nn.Module:
        return MegaMoE(
            options.hidden,
            options.intermediate,
            options.experts,
            options.top_k,
            router=router,
            group=world.group,
            engine=options.engine,
            recipe=recipe_of(options, world),
            max_tokens=-(-options.batch // world.size) * options.length,
        )

    torch.manual_seed(options.seed)
    config = ModelConfig(hidden=options.hidden, layers=options.layers, heads=options.heads)
    # On the CPU first: a GPU's generator draws other numbers.
    return LanguageModel(config, make_moe).to(world.device)


def moe_layers(model: nn.Module) -> list[MegaMoE]:
    """The MegaMoE layers, first to last."""
    return [m for m in model.modules() if isinstance(m, MegaMoE)]


@contextlib.contextmanager
def experts_zeroed(model: nn.Module) -> Iterator[None]:
    """Within, every expert answers 0; afterwards the weights are back, bit for bit."""
    weights = [m.experts.w2 for m in moe_layers(model)]
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w in weights:
            w.zero_()
        try:
            yield
        finally:
            for w, old in zip(weights, kept, strict=True):
                w.copy_(old)
