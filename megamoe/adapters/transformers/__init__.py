"""Hugging Face transformers 5.17 and 5.23: an experts backend, and experts spread over ranks. See docs/huggingface.md.

from megamoe.adapters import transformers as megamoe_hf

megamoe_hf.register()
model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="megamoe")
"""

from __future__ import annotations

import functools
from typing import Literal

from torch import nn

from megamoe.adapters.transformers.experts import Settings, forget, run_experts
from megamoe.adapters.transformers.forms import form_of, is_experts
from megamoe.adapters.transformers.layout import Layout
from megamoe.adapters.transformers.parallel import lend_experts, parallel_arguments, register_parallel, shard_experts
from megamoe.problem import Recipe

__all__ = ["Layout", "Settings", "explain", "forget", "lend_experts", "parallel_arguments", "register", "shard_experts"]


def register(*, engine: str = "auto", recipe: Recipe | Literal["auto"] = "auto", max_tokens: int = 65536) -> Settings:
    """Make "megamoe" known to transformers, as an experts implementation and as an expert-parallel one.

    Args:
        engine, recipe, max_tokens: see ``Settings``; a second call replaces those of the first for models that are
            made after it (for the experts implementation: for all).

    Returns:
        The settings.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    settings = Settings(engine=engine, recipe=recipe, max_tokens=max_tokens)
    ALL_EXPERTS_FUNCTIONS.register("megamoe", functools.partial(run_experts, settings=settings, group=None))
    register_parallel(settings)
    return settings


def explain(model: nn.Module) -> dict[str, str | None]:
    """Name of every experts module of ``model`` -> why megamoe can't run it, or None if it can."""
    answers: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if is_experts(module):
            try:
                form_of(module)
                answers[name] = None
            except ValueError as error:
                answers[name] = str(error)
    return answers
