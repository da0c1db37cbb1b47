"""What the engine ``mega`` keeps from call to call: workspaces by group and problem, quantised weights by parameter.

All layers of one problem on one group share a workspace; launches on it are put in order by an event. A workspace whose
wait has expired is dropped on the rank that says so; the handshake tells all ranks that one of them has none, and then
all make a new one together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from megamoe.engines.base import Call
from megamoe.errors import EngineUnavailableError, MegaMoEError
from megamoe.prepared import PreparedWeights
from megamoe.symm_mem import agree
from megamoe.weights import ExpertWeights

if TYPE_CHECKING:
    from megamoe.mega.runner import MegaRunner

Key = tuple[str, int, torch.device]  # problem, slots of a rank, device


@dataclass
class Held:
    """A workspace and the end of the last call on it."""

    runner: MegaRunner
    last: torch.cuda.Event


@dataclass
class _OfGroup:
    workspaces: dict[Key, Held] = field(default_factory=dict)
    unreachable: str | None = None  # why its ranks have no memory in common


_alone = _OfGroup()
_groups: WeakKeyDictionary[dist.ProcessGroup, _OfGroup] = WeakKeyDictionary()
_quantised: Any = WeakTensorKeyDictionary()  # w13 -> (stamp, the other tensors, prepared)


def of_group(group: dist.ProcessGroup | None) -> _OfGroup:
    """What is kept for ``group``."""
    return _alone if group is None else _groups.setdefault(group, _OfGroup())


def key_of(call: Call) -> Key:
    """What calls that may share a workspace have in common."""
    return call.problem.to_json(), call.placement.slots_per_rank, call.x.device


def ready(call: Call) -> bool:
    """Whether this rank has a sound workspace for ``call``. Waits for the last call on it.

    Raises:
        PeerTimeout: that call did not end well; the workspace is gone.
    """
    kept = of_group(call.group)
    held = kept.workspaces.get(key_of(call))
    if held is None:
        return False
    held.last.synchronize()
    try:
        held.runner.check()
    except MegaMoEError:
        drop(call)
        raise
    return True


def drop(call: Call) -> None:
    """Give up this rank's workspace for ``call``, if it has one."""
    held = of_group(call.group).workspaces.pop(key_of(call), None)
    if held is not None:
        held.runner.close()


def create(call: Call) -> Held:
    """Collective: a new workspace, kernels compiled.

    Raises, on every rank:
        EngineUnavailableError: the ranks have no memory in common, the kernel does not compile or does not fit.
        MegaMoEError: the memory can't be had.
    """
    from megamoe.kernels.jit.cache import default_cache
    from megamoe.mega.runner import MegaRunner, config_for

    kept, slots = of_group(call.group), call.placement.slots_per_rank
    problem = None
    try:
        default_cache().get(config_for(call.problem, slots, index_64=True).source())
    except MegaMoEError as error:
        problem = str(error)
    agree.first_problem(call.group, problem, EngineUnavailableError)
    try:
        runner = MegaRunner.create(call.problem, device=call.x.device, group=call.group, slots=slots)
    except EngineUnavailableError as error:
        kept.unreachable = str(error)
        raise
    except ValueError as error:  # of sizes, so the same on every rank
        raise EngineUnavailableError(str(error)) from None
    held = Held(runner, torch.cuda.Event())  # type: ignore[no-untyped-call]
    kept.workspaces[key_of(call)] = held
    return held


def prepared(weights: ExpertWeights, call: Call) -> PreparedWeights:
    """``weights`` as the kernel reads them.

    bf16: the tensors themselves, or a cast made for this call. Quantised: made once, and again when torch's version
    counter of a tensor, or its address, says that it has changed. Who writes parameters without moving the counter, as
    FSDP2 does when it gathers them, calls ``forget_weights`` afterwards.
    """
    if call.problem.recipe == "bf16":
        return as_read(weights)
    tensors = [t for t in (weights.w13, weights.w2, weights.b13, weights.b2) if t is not None]
    if any(t.is_inference() for t in tensors):  # these have no counter
        return PreparedWeights.from_float(weights, call.problem)
    stamp = (call.problem.to_json(), *((t.data_ptr(), t._version, t.dtype) for t in tensors))
    found = _quantised.get(weights.w13)
    if found is None or found[0] != stamp:
        # The others are held so that their addresses stay theirs.
        found = _quantised[weights.w13] = (stamp, tensors[1:], PreparedWeights.from_float(weights, call.problem))
    made: PreparedWeights = found[2]
    return made


def as_read(weights: ExpertWeights) -> PreparedWeights:
    """``weights`` for the recipe bf16: the tensors themselves where they are contiguous and bf16, else casts."""
    w13, w2 = (w.detach().bfloat16().contiguous() for w in (weights.w13, weights.w2))
    biases = [None if b is None else b.detach().float().contiguous() for b in (weights.b13, weights.b2)]
    return PreparedWeights(recipe="bf16", w13=w13, w2=w2, b13=biases[0], b2=biases[1])


def forget_weights() -> None:
    """Quantise every weight anew at its next call."""
    _quantised.clear()
