"""What a backend of symmetric memory promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """Where one rank runs; what ranks tell each other before they choose a backend."""

    host: str
    device: str  # "cpu" or "cuda:3"
    gpu: str = ""  # the GPU's UUID, the same from whichever process it is seen


@dataclass
class Allocation:
    """One rank's handle on memory that all ranks of a group can address.

    ``peers`` holds, for each rank of the group, that rank's bytes as this process addresses them: uint8 [num_bytes] on
    this rank's device, its own included. They must not be used after ``release``.
    """

    rank: int
    peers: list[torch.Tensor]
    release: Callable[[], None]
    collective_release: bool = False  # whether ``release`` waits for all ranks


class Backend(Protocol):
    """One way to get such memory."""

    name: str

    def why_not(self, device: torch.device, group: dist.ProcessGroup | None) -> str | None:
        """None if this process could take part, else a sentence. Asks no other rank."""
        ...

    def why_not_together(self, device: torch.device, places: Sequence[Place]) -> str | None:
        """None if the ranks at ``places`` could share memory as far as this process can tell, else a sentence."""
        ...

    def allocate(self, num_bytes: int, align: int, device: torch.device, group: dist.ProcessGroup | None) -> Allocation:
        """Collective over ``group``, with the same sizes on all ranks.

        Every rank's bytes start at a multiple of ``align`` and hold anything.
        Raises MegaMoEError on every rank if any of them fails.
        """
        ...


def aligned(raw: torch.Tensor, num_bytes: int, align: int) -> torch.Tensor:
    """The ``num_bytes`` of ``raw`` (uint8, at least num_bytes + align) from the first multiple of ``align`` on.

    Owner and peers find the same bytes: mappings start on pages, so the low bits of an address are the same everywhere.
    """
    start = -raw.data_ptr() % align
    return raw[start : start + num_bytes]


def several_hosts(places: Sequence[Place]) -> str | None:
    """A sentence if the ranks run on more than one host."""
    hosts = sorted({p.host for p in places})
    return f"the ranks run on {len(hosts)} hosts ({', '.join(hosts[:4])})" if len(hosts) > 1 else None


def no_such_gpu(device: torch.device) -> str | None:
    """A sentence if ``device`` is a CUDA device that this process does not have."""
    if device.type != "cuda":
        return None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) < count:
        return None
    return f"torch sees {count} CUDA devices, the device is {device}" if count else "torch sees no CUDA device"
