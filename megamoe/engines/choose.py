"""Which engines exist, which can run here, and which one a call gets."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megamoe.engines.base import Engine
from megamoe.engines.mega import Mega, why_no_backward
from megamoe.engines.reference import Reference
from megamoe.engines.saved import ENGINE_NAMES
from megamoe.engines.staged import Staged
from megamoe.errors import EngineUnavailableError
from megamoe.problem import Problem, Recipe

ENGINES: dict[str, Engine] = {"reference": Reference(), "staged": Staged(), "mega": Mega()}
PREFERENCE = ("mega", "staged", "reference")


def explain_engines(
    problem: Problem, device: torch.device, group: dist.ProcessGroup | None
) -> list[tuple[str, str | None]]:
    """(name, why it can't run ``problem`` on this rank, or None if it can), best first. Asks no other rank."""
    return [(name, ENGINES[name].why_not(problem, device, group)) for name in PREFERENCE]


def offered(
    engine: str, problem: Problem, device: torch.device, group: dist.ProcessGroup | None, *, save: bool = False
) -> int:
    """Engines this rank can run, as bits by place in ENGINE_NAMES; only ``engine`` itself unless it is "auto".

    ``save``: backward will follow. Then "auto" leaves mega out, whose backward is staged's and runs half of the forward
    again.

    Raises:
        ValueError: no engine has that name.
        EngineUnavailableError: the one asked for can't run here; says why.
    """
    if engine not in (*ENGINE_NAMES, "auto"):
        raise ValueError(f"engine must be one of auto, {', '.join(ENGINE_NAMES)}, got {engine!r}")
    reasons = dict(explain_engines(problem, device, group))
    if engine != "auto":
        if reasons[engine] is not None:
            raise EngineUnavailableError(f'engine="{engine}" can\'t run here: {reasons[engine]}')
        if engine == "mega" and save and (reason := why_no_backward(problem)) is not None:
            raise EngineUnavailableError(f'engine="mega" can\'t run here: {reason}')
        return 1 << ENGINE_NAMES.index(engine)
    names = [name for name in PREFERENCE if reasons[name] is None and not (save and name == "mega")]
    return sum(1 << ENGINE_NAMES.index(name) for name in names)


def best(engines: int) -> Engine:
    """The most preferred of the engines whose bits are set (what all ranks of a group offer)."""
    for name in PREFERENCE:
        if engines >> ENGINE_NAMES.index(name) & 1:
            return ENGINES[name]
    raise EngineUnavailableError("the ranks of the group have no engine in common")


def taken(
    engine: str, recipe: Recipe, device: torch.device, group: dist.ProcessGroup | None, *, save: bool = False
) -> str:
    """Name of the engine that calls get, as far as sizes do not decide. Raises as ``offered`` and ``best`` do."""
    ranks = 1 if group is None else group.size()
    problem = Problem(hidden=8, intermediate=8, num_experts=ranks, top_k=1, world_size=ranks, recipe=recipe)
    return best(offered(engine, problem, device, group, save=save)).name
