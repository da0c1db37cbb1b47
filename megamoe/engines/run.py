"""One call on one rank: check it, shake hands with the others, run it on an engine. What the torch.library ops do.

Groups and choices arrive as text, because that is what an op can carry through torch.compile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

from megamoe import env
from megamoe.checks import check_routing
from megamoe.dispatch import placement as placements
from megamoe.dispatch.placement import Placement
from megamoe.dispatch.planner import plan_on_device
from megamoe.engines import mega_workspaces
from megamoe.engines.base import Call, DefersWeightGrads, Grads
from megamoe.engines.choose import ENGINES, best, offered
from megamoe.engines.handshake import WORKSPACE, Wish, shake
from megamoe.engines.saved import ENGINE_NAMES, Saved, compute_dtype
from megamoe.engines.wire import Wire
from megamoe.errors import EngineUnavailableError, MegaMoEError
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights


@dataclasses.dataclass(frozen=True)
class Terms:
    """A call's choices as text. ``group`` "" = a single rank; ``placement`` "" = contiguous."""

    problem: str
    group: str
    engine: str
    placement: str


def forward(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: ExpertWeights,
    *,
    terms: Terms,
    save: bool,
) -> tuple[torch.Tensor, Saved]:
    """(y, what backward needs; empty parts unless ``save``).

    Raises on every rank of the group: ValueError for bad arguments (RankMismatchError where another rank's are bad, or
    the ranks disagree), EngineUnavailableError, PeerTimeout (the call before included, where it ran on mega).
    """
    group = resolve_group(terms.group)
    wire = Wire(group, x.device)
    call = wish = plan = error = None
    try:
        call = _call(x, topk_idx, topk_weights, weights, terms=terms, group=group)
        engine = env.get("MEGAMOE_ENGINE") if terms.engine == "auto" else terms.engine
        wish = _wish(call, engine, save)
        plan = plan_on_device(call.topk_idx, call.placement, call.rank)
    except (ValueError, MegaMoEError) as caught:
        error = caught
    traffic, engines = shake(wire, wish, plan, error)
    assert call is not None and plan is not None
    chosen = best(engines)
    try:
        y, saved = chosen.forward(call, plan, traffic, save)
    except EngineUnavailableError:
        # Found out together, on every rank: mega's first call allocates memory that all of them address.
        if engine != "auto":
            raise
        chosen = best(engines & ~(1 << ENGINE_NAMES.index(chosen.name)))
        y, saved = chosen.forward(call, plan, traffic, save)
    return y, saved or Saved.make(chosen.name, call.problem, x.device)


def backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: ExpertWeights,
    *,
    saved: Saved,
    terms: Terms,
    need_weights: bool,
) -> Grads:
    """Gradients on the engine that ran ``forward``; its arguments were checked there."""
    call = _call_again(x, topk_idx, topk_weights, weights, terms)
    return ENGINES[saved.engine].backward(call, saved, grad_y, need_weights)


def backward_later(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: ExpertWeights,
    *,
    saved: Saved,
    terms: Terms,
) -> tuple[Grads, Callable[[], ExpertWeights]]:
    """``backward`` without weight gradients, and a function that returns those, to be called once; no collective.

    An engine that can't separate the two has computed them already.
    """
    call = _call_again(x, topk_idx, topk_weights, weights, terms)
    engine = ENGINES[saved.engine]
    if isinstance(engine, DefersWeightGrads):
        return engine.backward_later(call, saved, grad_y)
    grads = engine.backward(call, saved, grad_y, True)
    w13, w2 = grads.w13, grads.w2
    assert w13 is not None and w2 is not None
    done = ExpertWeights(w13, w2, grads.b13, grads.b2)
    return Grads(grads.x, grads.topk_weights, None, None, None, None), lambda: done


def refuse(group: str, device: torch.device, error: ValueError) -> NoReturn:
    """Raise ``error``, and the fitting RankMismatchError on the other ranks of the group."""
    shake(Wire(resolve_group(group), device), None, None, error)
    raise AssertionError("a handshake with an error raises it")


def resolve_group(name: str) -> dist.ProcessGroup | None:
    """The group of that name; None for ""."""
    return dist.distributed_c10d._resolve_process_group(name) if name else None  # type: ignore[attr-defined, arg-type]


def _call(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: ExpertWeights,
    *,
    terms: Terms,
    group: dist.ProcessGroup | None,
) -> Call:
    problem = _problem(terms.problem)
    size = 1 if group is None else group.size()
    if problem.world_size != size:
        raise ValueError(f"problem.world_size is {problem.world_size}, but the group has {size} ranks")
    placement = _placement(terms.placement, problem)
    if placement.world_size != size or placement.num_experts != problem.num_experts:
        raise ValueError(
            f"placement is for {placement.num_experts} experts on {placement.world_size} ranks, "
            f"expected {problem.num_experts} on {size}"
        )
    T, H = x.shape[0] if x.dim() else 0, problem.hidden
    dtype = compute_dtype(problem)
    if x.dim() != 2 or x.shape[1] != H:
        raise ValueError(f"x must have shape [tokens, {H}] or [batch, sequence, {H}], got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"x must be {dtype} for the recipe {problem.recipe}, got {x.dtype}")
    check_routing(T, topk_idx, topk_weights, problem)
    weights.check(problem, placement.slots_per_rank)
    if weights.w13.dtype not in {torch.float32, dtype}:
        raise ValueError(f"expert weights must be fp32 or {dtype}, got {weights.w13.dtype}")
    for name, tensor in (("topk_idx", topk_idx), ("topk_weights", topk_weights), ("w13", weights.w13)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    if not Wire(group, x.device).carries():
        raise ValueError(f"x must be on a CUDA device, as the group has no backend for CPU tensors, got {x.device}")
    return Call(
        problem=problem,
        placement=placement,
        group=group,
        x=x,
        topk_idx=topk_idx.long(),
        topk_weights=topk_weights,
        weights=weights,
    )


def _call_again(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, weights: ExpertWeights, terms: Terms
) -> Call:
    """The ``Call`` of a forward that was checked."""
    problem = _problem(terms.problem)
    return Call(
        problem=problem,
        placement=_placement(terms.placement, problem),
        group=resolve_group(terms.group),
        x=x,
        topk_idx=topk_idx.long(),
        topk_weights=topk_weights,
        weights=weights,
    )


def _wish(call: Call, engine: str, save: bool) -> Wish:
    terms = {
        "problem": call.problem.to_json(),
        "placement": call.placement.to_json(),
        "engine": engine,
        "device": call.x.device.type,
        "weights": str(call.weights.w13.dtype),
    }
    engines = offered(engine, call.problem, call.x.device, call.group, save=save)
    if best(engines).name == "mega" and mega_workspaces.ready(call):
        engines |= WORKSPACE
    return Wish(terms=terms, engines=engines)


@functools.lru_cache(maxsize=256)
def _problem(text: str) -> Problem:
    return Problem.from_json(text)


@functools.lru_cache(maxsize=256)
def _placement(text: str, problem: Problem) -> Placement:
    """Kept, with its tables on the devices, from call to call."""
    return Placement.from_json(text) if text else placements.contiguous(problem.num_experts, problem.world_size)
