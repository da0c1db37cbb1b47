"""What runs inside a rank of ``RankPool``: join the group, then answer one call after another over a pipe."""

from __future__ import annotations

import datetime
import faulthandler
import os
import pickle
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from megamoe import env

_GROUP_TIMEOUT = datetime.timedelta(seconds=60)


@dataclass(frozen=True)
class Failure:
    """What a rank answers when its call raised: ``text`` is the traceback, ``time`` the host's monotonic clock."""

    rank: int
    error: BaseException
    text: str
    time: float


def stack_file(folder: str, rank: int) -> Path:
    """Where rank ``rank`` writes its Python stack on SIGUSR1."""
    return Path(folder) / f"rank{rank}.stack"


def rank_main(  # noqa: PLR0917
    rank: int, world_size: int, backend: str, port: int, folder: str, pipe: Connection
) -> None:
    """Serve calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes the pipe
    with open(stack_file(folder, rank), "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        answer = _attempt(rank, _join, rank, world_size, backend, port)
        _send(pipe, rank, answer)
        while not isinstance(answer, Failure):
            try:
                message = pipe.recv_bytes()
            except (EOFError, OSError):
                break
            _send(pipe, rank, _attempt(rank, _call, rank, world_size, message))
    os._exit(0)  # neither gloo's threads nor peers that are gone can hold the process back


def _join(rank: int, world_size: int, backend: str, port: int) -> None:
    torch.set_num_threads(1)
    # The loopback device needs no resolvable host name; macOS calls it lo0.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    env.disable_multicast()
    device = None
    if "nccl" in backend:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=TCPStore("127.0.0.1", port, is_master=False),
        rank=rank,
        world_size=world_size,
        timeout=_GROUP_TIMEOUT,
        device_id=device,
    )


def _call(rank: int, world_size: int, message: bytes) -> Any:
    path, variables, payload = pickle.loads(message)
    sys.path[:] = path
    env.restore(variables)
    fn, args = pickle.loads(payload)
    return fn(rank, world_size, dist.group.WORLD, *args)


def _attempt(rank: int, fn: Any, *args: Any) -> Any:
    try:
        return fn(*args)
    except BaseException as error:  # SystemExit and pytest's skip and fail must reach the parent too
        return Failure(rank, error, "".join(traceback.format_exception(error)), time.monotonic())


def _send(pipe: Connection, rank: int, answer: Any) -> None:
    try:
        data = pickle.dumps(answer)
        pickle.loads(data)  # some exceptions can be written but not read again
    except Exception as error:
        text = answer.text if isinstance(answer, Failure) else f"its answer, a {type(answer).__name__}: {error!r}"
        replacement = RuntimeError(f"rank {rank} answered with something that cannot be pickled: {text}")
        data = pickle.dumps(Failure(rank, replacement, text, time.monotonic()))
    pipe.send_bytes(data)
