"""A rank that dies in the middle of a loop of calls, on as many GPUs as there are: part of ``bench scale``.

The ranks are processes of their own, since torchrun ends all of its ranks when one dies. The last one is killed. Every
other must raise PeerTimeout within the limit, with y all NaN and its CUDA context alive, and they go on in a new group.
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megamoe import env
from megamoe.bench.gemm import full_fp32
from megamoe.bench.moe_check import check
from megamoe.bench.moe_sessions import Mega
from megamoe.errors import PeerTimeout
from megamoe.problem import Problem, Recipe
from megamoe.symm_mem import agree
from megamoe.testing.ranks import RankDied, spawn_ranks

TIMEOUT_S = 6.0
_LIMIT_S = 100.0  # of it all: processes, kernels, waits
_KILLED_AT, _MOST_CALLS, _TOKENS = 20, 1000, 64
_LEEWAY = 2.0  # times the limit: waits for rows and results are more patient, see comm/waits.cuh


@dataclass(frozen=True)
class Lost:
    """``wrong``: sentences, empty if all went as it must. ``seconds``: the longest that a rank waited."""

    wrong: tuple[str, ...]
    seconds: float | None


def run(world_size: int, recipe: Recipe) -> Lost:
    """Start ``world_size`` processes, a GPU each, and judge what they tell. Not collective: one process calls it."""
    answers = spawn_ranks(world_size, _rank, recipe, backend="cpu:gloo,cuda:nccl", timeout_s=_LIMIT_S)
    return judge(answers)


def judge(answers: list[Any]) -> Lost:
    """What is wrong with the ranks' answers, the last of which has been killed."""
    *survivors, victim = answers
    wrong = [] if isinstance(victim, RankDied) else [f"the last rank was to be killed, it answered {victim}"]
    seconds, named = [], False
    for rank, answer in enumerate(survivors):
        if not isinstance(answer, dict):
            wrong.append(f"rank {rank}: {answer}")
            continue
        if "error" not in answer:
            wrong.append(f"rank {rank} made {_MOST_CALLS} calls without a PeerTimeout")
            continue
        seconds.append(answer["seconds"])
        named |= re.search(rf"for (rows of )?rank {len(survivors)} ", answer["error"]) is not None
        if answer["seconds"] > _LEEWAY * TIMEOUT_S:
            wrong.append(f"rank {rank} waited {answer['seconds']:.1f} s, the limit is {TIMEOUT_S:g}")
        wrong += [f"rank {rank}: {name}" for name in ("y was not all NaN", "no GEMM ran") if answer[name]]
        if answer["new group"]:
            wrong.append(f"rank {rank} in the new group: {answer['new group']}")
    if seconds and not named:
        wrong.append(f"no rank named rank {len(survivors)} as the one that is missing")
    return Lost(tuple(wrong), max(seconds, default=None))


def _rank(rank: int, world_size: int, group: dist.ProcessGroup, recipe: Recipe) -> dict[str, Any]:
    device, usual = torch.device("cuda", rank), env.snapshot()
    session = Mega(problem(world_size, recipe), device=device, group=group, virtual=False, sms=None)
    call = session.call(_TOKENS)
    call()  # loads the kernel, which may take one rank longer than another
    torch.cuda.synchronize()
    env.restore({**usual, "MEGAMOE_TIMEOUT_S": str(TIMEOUT_S)})
    for step in range(_MOST_CALLS):
        if step == _KILLED_AT and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        y = call()[0]
        torch.cuda.synchronize()
        try:
            session.check()
        except PeerTimeout as error:
            seconds = time.monotonic() - begin
            env.restore(usual)
            a = torch.ones(256, 256, device=device)
            return {
                "error": str(error),
                "seconds": seconds,
                "y was not all NaN": not bool(y.isnan().all()),
                "no GEMM ran": float((a @ a).sum()) != 256.0**3,
                "new group": _go_on(device, list(range(world_size - 1)), recipe),
            }
    return {}


def _go_on(device: torch.device, left: list[int], recipe: Recipe) -> str:
    """What is wrong with a layer over those that are left, in a new group and workspace; "" if nothing."""
    group = dist.new_group(left, backend="gloo", use_local_synchronization=True) if len(left) > 1 else None
    try:
        session = Mega(problem(len(left), recipe), device=device, group=group, virtual=False, sms=None)
        ys = session.call(_TOKENS)()
        torch.cuda.synchronize()
        session.check()
        agree.barrier(group, "a call of the ranks that are left")  # their activations lie still now
        with full_fp32():
            check(session, _TOKENS, ys)
        agree.barrier(group, "the check of the ranks that are left")
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {error}"[:400]
    return ""


def problem(world_size: int, recipe: Recipe) -> Problem:
    """The layer that a rank is lost from; the one of the ranks that are left is that of one rank less."""
    return Problem(
        hidden=2048,
        intermediate=768,
        num_experts=8 * world_size,
        top_k=8,
        world_size=world_size,
        max_tokens=_TOKENS,
        recipe=recipe,
    )
