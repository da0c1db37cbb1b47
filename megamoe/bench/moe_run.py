"""The ranks of a benchmark of whole layers: who takes part, what they say to one another, kernels made ahead."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megamoe import env
from megamoe.bench.moe_sessions import EngineCalls, Mega, Session
from megamoe.kernels.jit.sweep import Case as Source
from megamoe.kernels.jit.sweep import sweep
from megamoe.mega.partial_sums import chosen as partial_sums_chosen
from megamoe.mega.runner import config_for, why_not
from megamoe.problem import Problem

_START = datetime.timedelta(minutes=10)  # kernels are compiled while other ranks wait


@dataclass(frozen=True)
class Run:
    """The ranks and what they measure."""

    device: torch.device
    group: dist.ProcessGroup | None
    world_size: int
    virtual: bool
    engine: str
    sms: int | None
    partial_sums: bool | None = None  # of the mega-kernel, as ``MegaRunner`` takes it

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def label(self) -> str:
        return f"{self.engine}-virtual" if self.virtual else self.engine

    def label_of(self, problem: Problem) -> str:
        """What rows of ``problem`` call the engine: "mega-partial" where the kernel is the one with partial sums."""
        partial = self.engine == "mega" and partial_sums_chosen(problem, self.partial_sums)
        return self.label.replace("mega", "mega-partial") if partial else self.label

    @property
    def device_name(self) -> str:
        """As the driver has it ("NVIDIA H200"), or "CPU"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def all(self, value: Any) -> list[Any]:
        """``value`` of every process; waits for all of them."""
        if self.group is None:
            return [value]
        values = [None] * self.group.size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def line_up(self) -> Callable[[], object] | None:
        """What makes the ranks' GPUs wait for one another; None for a rank alone."""
        if self.group is None:
            return None
        one = torch.zeros(1, device=self.device)
        return lambda: dist.all_reduce(one, group=self.group)

    def session(self, problem: Problem) -> Session:
        """Raises ValueError where the engine can't do ``problem``."""
        if self.engine == "mega":
            return self.mega(problem)
        return EngineCalls(problem, engine=self.engine, device=self.device, group=self.group)

    def mega(self, problem: Problem) -> Mega:
        """A session of the mega-kernel; raises ValueError where it can't do ``problem``."""
        return Mega(
            problem,
            device=self.device,
            group=self.group,
            virtual=self.virtual,
            sms=self.sms,
            partial_sums=self.partial_sums,
        )


def join(*, engine: str, virtual: int | None = None, sms: int | None = None) -> Run:
    """This process's part: of a group under torchrun, else alone, or with ``virtual`` as that many ranks on one GPU.

    On CPUs, over gloo, where no CUDA device is visible and ``engine`` needs none.

    Raises:
        ValueError: what was asked for can't be had here, with the reason.
    """
    if virtual and engine != "mega":
        raise ValueError(f"--virtual needs the engine mega, got {engine}")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and engine == "mega":
        raise ValueError("the engine mega needs a CUDA device, none is visible")
    launched = dist.is_torchelastic_launched()
    if virtual and launched:
        raise ValueError("--virtual runs all ranks in one process: start it without torchrun")
    if not launched:
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        size = virtual or 1
        return Run(device=device, group=None, world_size=size, virtual=bool(virtual), engine=engine, sms=sms)
    device = torch.device("cpu")
    if on_gpu:
        local = dist.get_node_local_rank()
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"each rank needs a GPU of its own, got local rank {local} and {torch.cuda.device_count()} GPUs: "
                "start fewer ranks, or use --virtual"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        env.disable_multicast()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_START)
    group = dist.group.WORLD
    assert group is not None
    return Run(device=device, group=group, world_size=group.size(), virtual=False, engine=engine, sms=sms)


def compile_ahead(run: Run, chosen: Iterable[Problem], *, traced: bool = False) -> None:
    """Every mega-kernel that will be launched into the cache on disk, each process its share, in parallel; with
    ``traced`` those that write a trace, too."""
    sources = []
    for problem in chosen if run.engine == "mega" else ():
        slots = -(-problem.num_experts // problem.world_size)
        if why_not(problem, slots) is None:
            config = config_for(problem, slots, index_64=True, partial_sums=run.partial_sums)
            configs = [config, dataclasses.replace(config, trace=True)] if traced else [config]
            sources += [Source(config.source()) for config in configs]
    processes = 1 if run.group is None else run.group.size()
    share = list(dict.fromkeys(sources))[run.rank :: processes]
    if share:
        sweep(share, workers=len(share), disassemble=False)  # one that fails says so when it is launched
    if sources:
        run.all(None)


def first_line(error: Exception) -> str:
    """Kind and first line of an error, for lists of what went wrong."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def positive(text: str) -> int:
    """A positive integer of the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)
