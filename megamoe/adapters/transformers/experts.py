"""Runs an experts module of transformers through ``mega_moe``: parameters to weights, ids and dtypes as they come."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import nn

from megamoe.adapters.transformers.forms import Form, form_of
from megamoe.adapters.transformers.relaid import Relaid
from megamoe.functional import mega_moe
from megamoe.problem import Problem, Recipe
from megamoe.weights import ExpertWeights

_FEWEST_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How experts are run.

    Args:
        engine: as in ``mega_moe``.
        recipe: precision; "auto" is fp32 where tokens and experts are fp32 and autocast is off, else bf16.
        max_tokens: bound on the tokens of one rank in one call where experts are spread over ranks; equal on all.
    """

    engine: str = "auto"
    recipe: Recipe | Literal["auto"] = "auto"
    max_tokens: int = 65536

    def __post_init__(self) -> None:
        if self.recipe not in ("auto", *get_args(Recipe)):
            raise ValueError(f"recipe must be auto or one of {', '.join(get_args(Recipe))}, got {self.recipe!r}")


class _State:
    """What is known of one module: its form, and its parameters in megamoe's layout."""

    def __init__(self, module: nn.Module) -> None:
        self.form = form_of(module)
        layout = self.form.layout
        self.w13 = None if layout.plain else Relaid(layout.to_w13)
        self.w2 = None if layout.plain else Relaid(layout.to_w2)
        self.b13 = None if layout.plain else Relaid(layout.to_b13)


# Beside the modules, not in them: a copied or pickled model starts anew.
_states: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()


def state_of(module: nn.Module) -> _State:
    """Found out on first use. Raises ValueError as ``form_of`` does."""
    state = _states.get(module)
    if state is None:
        state = _states[module] = _State(module)
    return state


def forget(model: nn.Module) -> None:
    """Drop what was made from parameters of ``model``: after writing to them through ``.data``, or to free memory."""
    for module in model.modules():
        _states.pop(module, None)


def run_experts(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    settings: Settings,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """transformers' experts call.

    Args:
        module: experts whose parameters are plain tensors, this rank's ``module.num_experts`` of them.
        hidden_states: [T, H].
        top_k_index: [T, K] ids over all ranks of ``group``; their number itself (transformers' sentinel for an expert
            that lives elsewhere) and -1 mean no expert.
        top_k_weights: [T, K], any floating dtype.
        settings: engine, recipe, bound.
        group: the ranks over which experts are spread, rank r holding the r-th part; None: all experts are here, and
            the call concerns no other rank.

    Returns:
        [T, H] in ``hidden_states``' dtype, complete.
    """
    ranks = 1 if group is None else group.size()
    weights = expert_weights(module)
    num_tokens = hidden_states.shape[0]
    # On its own a rank need not agree with anyone; powers of two keep Problems, and mega's workspaces, few.
    max_tokens = settings.max_tokens if ranks > 1 else max(_FEWEST_TOKENS, 1 << max(num_tokens - 1, 0).bit_length())
    full = hidden_states.dtype == torch.float32 and not torch.is_autocast_enabled(hidden_states.device.type)
    dtype = weights.w13.dtype if full else torch.bfloat16
    problem = problem_of(module, settings, ranks=ranks, top_k=top_k_index.shape[-1], dtype=dtype, max_tokens=max_tokens)
    y = mega_moe(
        hidden_states.to(torch.float32 if problem.recipe == "fp32" else torch.bfloat16),
        top_k_index.masked_fill(top_k_index == problem.num_experts, -1),
        top_k_weights.float(),
        weights,
        problem=problem,
        group="self" if group is None else group,
        engine=settings.engine,
    )
    return y.to(hidden_states.dtype)


@functools.lru_cache(maxsize=256)
def _problem(  # noqa: PLR0917
    form: Form, num_experts: int, top_k: int, ranks: int, max_tokens: int, recipe: Recipe
) -> Problem:
    """Kept from call to call: making one checks everything and writes it down as text."""
    return Problem(
        hidden=form.hidden,
        intermediate=form.intermediate,
        num_experts=num_experts,
        top_k=top_k,
        world_size=ranks,
        max_tokens=max_tokens,
        recipe=recipe,
        activation=form.activation,
        bias=form.up_bias is not None,
    )


def problem_of(
    module: nn.Module, settings: Settings, *, ranks: int, top_k: int, dtype: torch.dtype, max_tokens: int
) -> Problem:
    """The Problem of an experts module that holds one part of ``ranks``; ``dtype``: of tokens and weights."""
    recipe: Recipe = "fp32" if dtype == torch.float32 else "bf16"
    if settings.recipe != "auto":
        recipe = settings.recipe
    num_experts = int(module.num_experts) * ranks  # type: ignore[arg-type]
    return _problem(state_of(module).form, num_experts, top_k, ranks, max_tokens, recipe)


def expert_weights(module: nn.Module) -> ExpertWeights:
    """The module's parameters in megamoe's layout; differentiable where autograd is on."""
    state = state_of(module)
    form: Form = state.form

    def take(name: str | None, relaid: Relaid | None) -> torch.Tensor | None:
        tensor = None if name is None else getattr(module, name)
        return tensor if tensor is None or relaid is None else relaid.get(tensor)

    w13, w2 = take(form.up, state.w13), take(form.down, state.w2)
    assert w13 is not None and w2 is not None
    return ExpertWeights(w13, w2, take(form.up_bias, state.b13), take(form.down_bias, None))
