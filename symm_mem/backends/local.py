"""``local``: virtual ranks inside one process, on one GPU or the CPU. One ordinary allocation a rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megamoe.errors import MegaMoEError
from megamoe.symm_mem.backends.base import Allocation, Place, aligned, no_such_gpu


class LocalBackend:
    name = "local"

    def why_not(self, device: torch.device, group: dist.ProcessGroup | None) -> str | None:
        return no_such_gpu(device)

    def why_not_together(self, device: torch.device, places: Sequence[Place]) -> str | None:
        if len(places) > 1:
            return f"serves ranks inside one process, this group has {len(places)} processes"
        return None

    def allocate(self, num_bytes: int, align: int, device: torch.device, group: dist.ProcessGroup | None) -> Allocation:
        return self.allocate_virtual(num_bytes, align, device, 1)[0]

    def allocate_virtual(self, num_bytes: int, align: int, device: torch.device, world_size: int) -> list[Allocation]:
        """The allocations of ``world_size`` virtual ranks, by rank."""
        try:
            raw = [torch.empty(num_bytes + align, dtype=torch.uint8, device=device) for _ in range(world_size)]
        except RuntimeError as error:  # the CPU's "can't allocate" is no OutOfMemoryError
            raise MegaMoEError(f"{world_size} x {num_bytes} bytes on {device}: {error}") from error
        whole = [aligned(tensor, num_bytes, align) for tensor in raw]
        return [Allocation(rank, list(whole), release=_nothing) for rank in range(world_size)]


def _nothing() -> None:
    """Tensors free themselves."""
