"""The ranks of a run: who they are, which device each one uses, and collectives that name a rank that is gone."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from megamoe import env
from megamoe.bench.results import machine_name
from megamoe.engines.liveness import naming

Result = TypeVar("Result")

_START_TIMEOUT = datetime.timedelta(seconds=300)  # ranks may still import torch on a busy machine


@dataclass(frozen=True)
class World:
    """One rank's view. ``group`` is None without torch.distributed; ``note`` says what the devices were chosen for."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    device: torch.device
    note: str

    @property
    def machine(self) -> str:
        """What results are filed under: "2x NVIDIA H200", or "CPU"."""
        return "CPU" if self.device.type == "cpu" else machine_name()

    def sum(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        """``tensor`` summed over the ranks, in place. Raises PeerTimeout if one is gone."""
        with naming(self.group, phase):
            if self.group is not None:
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather_text(self, text: str, phase: str) -> list[str]:
        """One text of each rank, on every rank."""
        texts = [text] * self.size
        with naming(self.group, phase):
            if self.group is not None:
                dist.all_gather_object(texts, text, group=self.group)
        return texts

    def together(self, work: Callable[[], Result], phase: str) -> Result:
        """``work()`` on every rank; what is refused (ValueError) on one of them is refused on all."""
        result, refusal = None, ""
        try:
            result = work()
        except ValueError as error:
            refusal = str(error)
        refusals = [f"{text} (rank {r})" for r, text in enumerate(self.gather_text(refusal, phase)) if text]
        if refusals:
            raise ValueError(refusals[0] if len(refusals) < self.size else refusal)
        return cast(Result, result)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of the rows; the parts differ by at most one row."""
        return tensor.tensor_split(self.size)[self.rank]


def join(*, launched: bool, device: str) -> World:
    """Meet the other ranks and agree on a device.

    Args:
        launched: whether RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, as torchrun does.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ValueError: ``cuda`` was asked for and some rank has no GPU of its own; on every rank.
    """
    gpus = _gpus()
    if not launched:
        use_cuda, note = choose_device(device, gpus=gpus, local_ranks=1)
        return World(0, 1, None, torch.device("cuda", 0) if use_cuda else torch.device("cpu"), note)
    store, rank, size = next(iter(rendezvous("env://", timeout=_START_TIMEOUT)))
    # Whoever is here waits for the slowest start; only then does the time limit of collectives begin to matter.
    store.set(f"started/{rank}", "1")
    store.wait([f"started/{r}" for r in range(size)], _START_TIMEOUT)
    env.disable_multicast()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=env.get("MEGAMOE_TIMEOUT_S")),
    )
    return from_group(device=device)


def from_group(*, device: str) -> World:
    """The world of a torch.distributed that is initialised already; collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hosts: list[tuple[str, int]] = [("", 0)] * size
    dist.all_gather_object(hosts, (socket.gethostname(), _gpus()))
    names = [host for host, _ in hosts]
    # The host that is worst off decides for all: one group, one kind of device.
    local_ranks, gpus = max(((names.count(host), n) for host, n in hosts), key=lambda pair: pair[0] - pair[1])
    use_cuda, note = choose_device(device, gpus=gpus, local_ranks=local_ranks)
    here = torch.device("cpu")
    if use_cuda:
        here = torch.device("cuda", names[:rank].count(names[rank]))
        torch.cuda.set_device(here)
    return World(rank, size, dist.group.WORLD, here, note)


def choose_device(wanted: str, *, gpus: int, local_ranks: int) -> tuple[bool, str]:
    """(whether to use CUDA, a sentence that says so and why), for one host.

    Raises:
        ValueError: CUDA was asked for and there are fewer GPUs than ranks.
    """
    ranks = f"{local_ranks} rank{'s' if local_ranks > 1 else ''}"
    have = f"{gpus or 'no'} GPU{'s' if gpus != 1 else ''}"
    if wanted == "cuda" and gpus < local_ranks:
        raise ValueError(
            f"--device cuda needs a GPU for each rank, got {ranks} and {have} on this host: "
            f"start fewer ranks (--nproc-per-node={max(gpus, 1)}) or use --device cpu"
        )
    if wanted == "cpu":
        return False, f"{ranks} on the CPU, as asked for."
    if gpus >= local_ranks:
        return True, f"{ranks} on {have}" + (", over NCCL." if local_ranks > 1 else ".")
    if gpus:
        return False, (
            f"{ranks} but {have} on this host, and NCCL needs a GPU for each rank: training on the CPU over gloo "
            f"instead. Start with --nproc-per-node={gpus} to use the GPU{'s' if gpus > 1 else ''}."
        )
    return False, f"no GPU on this host: {ranks} on the CPU" + (", over gloo." if local_ranks > 1 else ".")


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
