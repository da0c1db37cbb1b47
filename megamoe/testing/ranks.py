"""Ranks for tests: processes on this host with torch.distributed initialised, kept alive between runs.

    def total(rank, world_size, group, start):        # a function of a module, called in every rank
        x = torch.tensor([start + rank])
        dist.all_reduce(x, group=group)
        return x.item()

    with RankPool(4) as pool:
        assert pool.run(total, 10) == [46, 46, 46, 46]

The processes come from multiprocessing's fork server with torch imported beforehand: plain ``fork`` hangs after any
torch operation and ``spawn`` imports torch once a rank. ``megamoe.testing.rank_process`` is the other end of the pipe.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from megamoe import env
from megamoe.testing.rank_process import Failure, rank_main, stack_file

_PRELOAD = ["numpy", "pytest", "torch", "torch.distributed", "megamoe", "megamoe.testing.rank_process"]
_START_TIMEOUT_S = 120.0  # importing torch on a busy machine
_GRACE_S = 10.0  # how long ``run`` waits for the other ranks once one has failed


class RankDied(RuntimeError):  # noqa: N818 - an outcome, not a mistake
    """The process of a rank ended without an answer; the message names rank and exit status (-9: SIGKILL)."""


class RankTimeout(RuntimeError):  # noqa: N818 - an outcome, not a mistake
    """A rank did not answer within the time limit; the message carries the Python stack it was killed in."""


class RankPool:
    """``world_size`` processes, rank r in WORLD of exactly that size; started on the first run, restarted when broken.

    Args:
        world_size: number of ranks.
        backend: torch.distributed backend; with one that names nccl, rank r uses CUDA device r % device count.
        timeout_s: default limit of one run.
    """

    def __init__(self, world_size: int, *, backend: str = "gloo", timeout_s: float = 120.0) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        self.world_size = world_size
        self.backend = backend
        self.timeout_s = timeout_s
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: Path | None = None
        self._store: TCPStore | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """``[fn(rank, world_size, group, *args) for rank in ranks]``, ``group`` being WORLD.

        ``fn`` belongs to a module and it, ``args`` and the results can be pickled. The ranks see the caller's
        ``MEGAMOE_*`` variables.

        Raises:
            the exception of the rank that failed first, with every failed rank's traceback as a note; RankDied or
            RankTimeout if a rank gave no answer. The processes are then replaced, as their group may be out of step:
            to test that the next call works, catch inside ``fn`` or use ``try_run``.
        """
        outcomes = self._run(fn, args, timeout_s or self.timeout_s, grace_s=_GRACE_S)
        failures = [o for o in outcomes if isinstance(o, Failure)]
        if failures:
            self.close()
            first = min(failures, key=lambda f: f.time)
            for failure in failures:
                first.error.add_note(f"[rank {failure.rank} of {self.world_size}] {failure.text}")
            raise first.error
        return outcomes

    def try_run(self, fn: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """As ``run``, but a rank's exception (RankDied and RankTimeout included) stands in the list as its result."""
        outcomes = self._run(fn, args, timeout_s or self.timeout_s, grace_s=None)
        return [o.error if isinstance(o, Failure) else o for o in outcomes]

    def close(self) -> None:
        """End the processes; the next run starts new ones."""
        for pipe in self._pipes:
            pipe.close()  # an idle rank leaves at end of file
        for process in self._processes:
            process.join(0.2)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        self._store = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([m for m in _PRELOAD if m != "pytest" or "pytest" in sys.modules])
        # The system picks a free port, so parallel test runs never meet; served from here, it outlives killed ranks.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = Path(tempfile.mkdtemp(prefix="megamoe-ranks-"))
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=rank_main,
                args=(rank, self.world_size, self.backend, self._store.port, str(self._folder), theirs),
                name=f"rank{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        failures = [o for o in self._gather(_START_TIMEOUT_S, grace_s=0.0) if isinstance(o, Failure)]
        if failures:
            self.close()
            raise failures[0].error

    def _run(self, fn: Callable[..., Any], args: Sequence[Any], timeout_s: float, grace_s: float | None) -> list[Any]:
        if not self._processes:
            self._start()
        # sys.path and the variables travel along: both may have changed since the ranks started.
        message = pickle.dumps((sys.path, env.snapshot(), pickle.dumps((fn, args))))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        outcomes = self._gather(timeout_s, grace_s)
        if any(isinstance(o, Failure) and isinstance(o.error, RankDied | RankTimeout) for o in outcomes):
            self.close()
        return outcomes

    def _gather(self, timeout_s: float, grace_s: float | None) -> list[Any]:
        """One outcome a rank; ``grace_s`` shortens the wait once a rank has failed."""
        outcomes: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(outcomes) < self.world_size:
            pending = {self._pipes[r]: r for r in range(self.world_size) if r not in outcomes}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                outcomes |= {r: self._stuck(r, timeout_s) for r in pending.values()}
                break
            for pipe in ready:
                rank = pending[pipe]  # type: ignore[index]  # wait() returns what it was given
                try:
                    outcomes[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    outcomes[rank] = self._died(rank)
                if isinstance(outcomes[rank], Failure) and grace_s is not None:
                    deadline = min(deadline, time.monotonic() + grace_s)
        return [outcomes[r] for r in range(self.world_size)]

    def _died(self, rank: int) -> Failure:
        self._processes[rank].join()
        error = RankDied(f"rank {rank} of {self.world_size} ended with status {self._processes[rank].exitcode}")
        return Failure(rank, error, str(error), time.monotonic())

    def _stuck(self, rank: int, timeout_s: float) -> Failure:
        assert self._folder is not None
        process = self._processes[rank]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR1)  # faulthandler writes the stack
        process.join(0.3)
        stack = stack_file(str(self._folder), rank)
        text = stack.read_text() if stack.exists() else ""
        process.kill()
        error = RankTimeout(
            f"rank {rank} of {self.world_size} did not answer (limit {timeout_s:g} s); it stood at\n{text}"
        )
        return Failure(rank, error, str(error), time.monotonic())


def spawn_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, backend: str = "gloo", timeout_s: float = 120.0
) -> list[Any]:
    """``try_run`` in processes of this call's own, for tests that kill a rank; a killed one's result is RankDied."""
    with RankPool(world_size, backend=backend, timeout_s=timeout_s) as pool:
        return pool.try_run(fn, *args)
