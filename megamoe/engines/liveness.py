"""Who is gone? After a failed collective each rank leaves a word in the group's store and looks who else did.

A rank that left none is late or dead. Ranks of one host look at the process as well, so a killed neighbour is named at
once; on other hosts, after the deadline. If the store does not answer, its host is the likely victim: rank 0's process,
or the launcher.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megamoe import env
from megamoe.errors import PeerTimeout

_peers: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, tuple[int, int]]] = weakref.WeakKeyDictionary()


def host_id() -> int:
    """A number for this host (63 bits), from its boot id where there is one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = boot.read_text() if boot.exists() else ""
    return int.from_bytes(hashlib.blake2b((socket.gethostname() + text).encode(), digest_size=8).digest()) >> 1


def remember(group: dist.ProcessGroup, processes: list[tuple[int, int]]) -> None:
    """Keep (host_id, process id) of every rank, as told in the last handshake."""
    _peers[group] = dict(enumerate(processes))


def abort(group: dist.ProcessGroup) -> None:
    """End NCCL's kernels of a broken group, which would otherwise hold the GPU until NCCL's own timeout."""
    with contextlib.suppress(Exception):  # the group is lost either way, and PeerTimeout is the message that matters
        dist.distributed_c10d._abort_process_group(group)


def report(group: dist.ProcessGroup, phase: str, failure: str, deadline: float, limit_s: float) -> str:
    """Leave our word, see who leaves none until ``deadline`` (monotonic), and say it in a sentence."""
    rank, size = group.rank(), group.size()
    reason = failure.splitlines()[0] if failure else "unknown"
    try:
        missing = _missing(group, deadline)
    except RuntimeError as error:
        dead = [r for r in range(size) if r != rank and _process_gone(group, r)]
        who = (
            f"rank {_join(dead)} is gone (its process has ended)"
            if dead
            else "a rank is gone, and the group's store does not answer: most likely the process that hosts it, rank 0 "
            f"or the launcher ({type(error).__name__})"
        )
        return f"{who}: noticed by rank {rank} in phase {phase!r} of a group of {size}. Transport: {reason}"
    if not missing:
        return (
            f"the transport of the group failed in phase {phase!r} on rank {rank} though all {size} ranks answer: "
            f"{reason}. A rank may have been late by more than MEGAMOE_TIMEOUT_S ({limit_s:g} s) or out of step."
        )
    dead = [r for r in missing if _process_gone(group, r)]
    how = "its process has ended" if dead else f"no sign of it within MEGAMOE_TIMEOUT_S ({limit_s:g} s)"
    return (
        f"rank {_join(dead or missing)} did not arrive in phase {phase!r} ({how}); noticed by rank {rank} of a group "
        f"of {size}. Transport: {reason}"
    )


@contextlib.contextmanager
def naming(group: dist.ProcessGroup | None, phase: str) -> Iterator[None]:
    """Around a collective of torch.distributed: its failure becomes ``PeerTimeout``, with rank and ``phase``.

    Over NCCL only what fails on the host is seen here; a queued collective ends by NCCL's own limit.
    """
    limit_s = float(env.get("MEGAMOE_TIMEOUT_S"))
    deadline = time.monotonic() + limit_s
    try:
        yield
    except RuntimeError as error:
        if group is None or isinstance(error, PeerTimeout):
            raise
        raise PeerTimeout(report(group, phase, str(error), deadline, limit_s)) from error


def _missing(group: dist.ProcessGroup, deadline: float) -> list[int]:
    """Ranks that left no word; waits for those whose process may still live. RuntimeError: the store is gone."""
    store = dist.distributed_c10d._world.pg_map[group][1]
    rank = group.rank()
    store.set(f"megamoe/gone/{rank}", "1")
    missing = [r for r in range(group.size()) if r != rank]
    while True:
        missing = [r for r in missing if not store.check([f"megamoe/gone/{r}"])]
        if all(_process_gone(group, r) for r in missing) or time.monotonic() > deadline:
            return missing
        time.sleep(0.05)


def _process_gone(group: dist.ProcessGroup, rank: int) -> bool:
    """Whether the process of ``rank`` is known to have ended; False if it runs elsewhere or nobody knows."""
    host, pid = _peers.get(group, {}).get(rank, (0, 0))
    if host != host_id() or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a killed process that nobody has waited for yet still takes signals
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return Path("/proc/self").exists()  # gone between the two looks; without /proc nobody knows


def _join(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
