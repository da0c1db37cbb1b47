"""Which backend a group takes: one that ALL its ranks can, chosen together, with a reason for every one not taken."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megamoe import env
from megamoe.errors import EngineUnavailableError
from megamoe.symm_mem import agree
from megamoe.symm_mem.backends.base import Backend, Place
from megamoe.symm_mem.backends.local import LocalBackend
from megamoe.symm_mem.backends.nvshmem_heap import NvshmemBackend
from megamoe.symm_mem.backends.shm import ShmBackend
from megamoe.symm_mem.backends.torch_symm import TorchBackend, gpu_uuid

# In the order that ``auto`` tries them.
BACKENDS: dict[str, Backend] = {b.name: b for b in (LocalBackend(), TorchBackend(), NvshmemBackend(), ShmBackend())}


@dataclass(frozen=True)
class Choice:
    """The backend taken, and for each of ``BACKENDS`` why not (None: it could serve this group)."""

    backend: Backend
    asked: str
    why_not: dict[str, str | None]

    def explain(self) -> str:
        """One line: what was asked for, what was taken, and what stood against the others."""
        others = "; ".join(f"not {name}: {reason}" for name, reason in self.why_not.items() if reason)
        return f"asked for {self.asked}, took {self.backend.name}" + (f" ({others})" if others else "")


def why_not(device: torch.device, group: dist.ProcessGroup | None = None) -> dict[str, str | None]:
    """For each backend None, or a sentence why this process cannot use it on ``device``. Asks no other rank."""
    return {name: backend.why_not(device, group) for name, backend in BACKENDS.items()}


def choose(asked: str, device: torch.device, group: dist.ProcessGroup | None) -> Choice:
    """Collective over ``group``: the backend ``asked`` for or, for "auto", the first that all ranks can use.

    Raises, on every rank:
        ValueError: an unknown name.
        RankMismatchError: ranks asked for different backends or came with different kinds of device.
        EngineUnavailableError: some rank cannot use what was asked for; the message names rank and reason.
    """
    problem = None
    try:
        asked = env.get("MEGAMOE_SYMM_BACKEND") if asked == "auto" else asked
        if asked != "auto" and asked not in BACKENDS:
            problem = f"backend must be one of auto, {', '.join(BACKENDS)}, got {asked!r}"
    except ValueError as error:
        problem = str(error)
    agree.first_problem(group, problem)
    agree.all_equal(group, "backend and kind of device", (asked, device.type))

    alone = why_not(device, group)
    place = Place(platform.node(), str(device), gpu_uuid(device) if alone["local"] is None else "")
    places = agree.gather(group, place, "the choice of a backend")
    both = {n: alone[n] or b.why_not_together(device, places) for n, b in BACKENDS.items()}
    told = agree.gather(group, both, "the choice of a backend")

    reasons: dict[str, str | None] = {}
    for name in BACKENDS:
        against = [(rank, said[name]) for rank, said in enumerate(told) if said[name] is not None]
        everyone = len(against) == len(told) and len({reason for _, reason in against}) == 1
        where = "" if everyone or not against else f"rank {against[0][0]}: "
        reasons[name] = f"{where}{against[0][1]}" if against else None
    wanted = list(BACKENDS) if asked == "auto" else [asked]
    taken = next((name for name in wanted if reasons[name] is None), None)
    if taken is None:
        listed = "; ".join(f"{name}: {reasons[name]}" for name in wanted)
        raise EngineUnavailableError(f"no symmetric memory for {len(told)} ranks on {device.type}: {listed}")
    return Choice(BACKENDS[taken], asked, reasons)
