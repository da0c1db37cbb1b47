"""Who is gone? After a failed collective each rank leaves a word in WORLD's store and looks who else did.

A rank that left none is late or dead. Ranks of one host look at the process as well, so a killed neighbour is named at
once; on other hosts, after the deadline. If the store does not answer, its host is the likely victim: rank 0's process,
or the launcher.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import re
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from megamoe import env
from megamoe.errors import PeerTimeout


class Process(NamedTuple):
    """A rank's process, as told in the last handshake."""

    host: int
    pid: int
    life: int  # under this number it will leave its word; a new one after each, as stores outlive groups


_lives: dict[int, int] = {}  # by process id, as a forked process inherits this module
_peers: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, Process]] = weakref.WeakKeyDictionary()  # by WORLD


@functools.cache
def host_id() -> int:
    """A number for this host (63 bits), from its boot id where there is one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = boot.read_text() if boot.exists() else ""
    return int.from_bytes(hashlib.blake2b((socket.gethostname() + text).encode(), digest_size=8).digest()) >> 1


def own_process() -> Process:
    """This process, for the handshake."""
    pid = os.getpid()
    life = _lives.setdefault(pid, random.SystemRandom().getrandbits(62))
    return Process(host_id(), pid, life)


def remember(group: dist.ProcessGroup, processes: list[Process]) -> None:
    """Keep the process of every rank of ``group``; other groups with these ranks gain by it too."""
    known = _peers.setdefault(_world(), {})
    known.update(zip(dist.get_process_group_ranks(group), processes, strict=True))


def abort(group: dist.ProcessGroup) -> None:
    """End NCCL's kernels of a broken group, which would otherwise hold the GPU until NCCL's own timeout."""
    with contextlib.suppress(Exception):  # the group is lost either way, and PeerTimeout is the message that matters
        # The backend alone: aborting the group would make torch.distributed forget it, and WORLD with it.
        group._get_backend(torch.device("cuda")).abort()


@contextlib.contextmanager
def naming(group: dist.ProcessGroup | None, phase: str) -> Iterator[None]:
    """Around a collective of torch.distributed: its failure becomes ``PeerTimeout``, with rank and ``phase``.

    Over NCCL only what fails on the host is seen here; a queued collective ends by NCCL's own limit.
    """
    deadline = time.monotonic() + float(env.get("MEGAMOE_TIMEOUT_S"))
    try:
        yield
    except RuntimeError as error:
        if group is None or isinstance(error, PeerTimeout):
            raise
        raise PeerTimeout(report(group, phase, str(error), deadline)) from error


def report(group: dist.ProcessGroup, phase: str, failure: str, deadline: float) -> str:
    """Leave our word, look who leaves none until ``deadline`` (monotonic), and say it in a sentence.

    Ranks are named as ``group`` counts them.
    """
    rank, size, limit_s = group.rank(), group.size(), float(env.get("MEGAMOE_TIMEOUT_S"))
    # gloo opens with its source file and closes with advice
    reason = re.sub(r"^\[[^]]*\] *", "", failure.partition("\n")[0]).partition(". This is typically")[0]
    seen = f"noticed by rank {rank} of a group of {size}. Transport: {reason}"
    try:
        missing, dead = _missing(group, deadline)
    except RuntimeError as error:
        dead = [r for r in range(size) if r != rank and _has_ended(_process_of(group, r))]
        if dead:
            return f"rank {_join(dead)} did not arrive in phase {phase!r} (its process has ended); {seen}"
        return (
            f"a rank did not arrive in phase {phase!r}, and the store of torch.distributed does not answer "
            f"({type(error).__name__}): most likely the process that hosts it is gone, rank 0 or the launcher; {seen}"
        )
    if not missing:
        return (
            f"the transport failed in phase {phase!r} though all {size} ranks answer: a rank was late by more than "
            f"MEGAMOE_TIMEOUT_S ({limit_s:g} s) or out of step; {seen}"
        )
    how = "its process has ended" if dead else f"no sign of it within MEGAMOE_TIMEOUT_S ({limit_s:g} s)"
    return f"rank {_join(dead or missing)} did not arrive in phase {phase!r} ({how}); {seen}"


def _missing(group: dist.ProcessGroup, deadline: float) -> tuple[list[int], list[int]]:
    """Ranks of ``group`` that left no word, and those of them whose process is known to have ended.

    Returns as soon as one such process is found. RuntimeError: the store is gone.
    """
    store = _get_process_group_store(_world())
    own = own_process()
    for key in (f"megamoe/here/{own.life}", f"megamoe/here/rank{dist.get_rank()}"):
        store.set(key, "1")
    _lives[own.pid] += 1
    missing = [r for r in range(group.size()) if r != group.rank()]
    while True:
        missing = [r for r in missing if not store.check([_word(group, r)])]
        dead = [r for r in missing if _has_ended(_process_of(group, r))]
        if dead or not missing or time.monotonic() > deadline:
            return missing, dead
        time.sleep(0.05)


def _word(group: dist.ProcessGroup, rank: int) -> str:
    process = _process_of(group, rank)
    return f"megamoe/here/{process.life}" if process else f"megamoe/here/rank{dist.get_global_rank(group, rank)}"


def _process_of(group: dist.ProcessGroup, rank: int) -> Process | None:
    return _peers.get(_world(), {}).get(dist.get_global_rank(group, rank))


def _has_ended(process: Process | None) -> bool:
    """Whether it is known to have ended; False if it runs elsewhere or nobody knows."""
    if process is None or process.host != host_id():
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    stat = Path(f"/proc/{process.pid}/stat")  # a killed process that nobody has waited for yet still takes signals
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return Path("/proc/self").exists()  # gone between the two looks; without /proc nobody knows


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _join(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
