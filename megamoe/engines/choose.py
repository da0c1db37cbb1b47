"""Which engines exist, which can run here, and which one a call gets."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megamoe.engines.base import Engine
from megamoe.engines.reference import Reference
from megamoe.engines.saved import ENGINE_NAMES
from megamoe.engines.staged import Staged
from megamoe.errors import EngineUnavailableError
from megamoe.problem import Problem

ENGINES: dict[str, Engine] = {"reference": Reference(), "staged": Staged()}
PREFERENCE = ("mega", "staged", "reference")


def explain_engines(
    problem: Problem, device: torch.device, group: dist.ProcessGroup | None
) -> list[tuple[str, str | None]]:
    """(name, why it can't run ``problem`` on this rank, or None if it can), best first. Asks no other rank."""
    return [(name, _why_not(name, problem, device, group)) for name in PREFERENCE]


def offered(engine: str, problem: Problem, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """Engines this rank can run, as bits by place in ENGINE_NAMES; only ``engine`` itself unless it is "auto".

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
        return 1 << ENGINE_NAMES.index(engine)
    return sum(1 << ENGINE_NAMES.index(name) for name, why in reasons.items() if why is None)


def best(engines: int) -> Engine:
    """The most preferred of the engines whose bits are set (what all ranks of a group offer)."""
    for name in PREFERENCE:
        if engines >> ENGINE_NAMES.index(name) & 1:
            return ENGINES[name]
    raise EngineUnavailableError("the ranks of the group have no engine in common")


def _why_not(name: str, problem: Problem, device: torch.device, group: dist.ProcessGroup | None) -> str | None:
    if name not in ENGINES:
        return "the fused kernel is not part of this version yet; staged and reference are"
    return ENGINES[name].why_not(problem, device, group)
