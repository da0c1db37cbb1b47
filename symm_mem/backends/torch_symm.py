"""``torch``: GPUs of one host through torch.distributed._symmetric_memory (cuMem allocations, exchanged by handle).

Only its memory is used: not its signal pads, its barriers, or multicast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megamoe import env
from megamoe.errors import MegaMoEError
from megamoe.symm_mem import agree
from megamoe.symm_mem.backends.base import Allocation, Place, aligned, no_such_gpu, several_hosts


class TorchBackend:
    name = "torch"

    def why_not(self, device: torch.device, group: dist.ProcessGroup | None) -> str | None:
        if device.type != "cuda":
            return f"serves GPUs, the device is {device}"
        if reason := no_such_gpu(device):
            return reason
        try:
            from torch.distributed import _symmetric_memory  # noqa: F401
        except ImportError as error:
            return f"torch {torch.__version__} lacks torch.distributed._symmetric_memory ({error})"
        return None

    def why_not_together(self, device: torch.device, places: Sequence[Place]) -> str | None:
        return several_hosts(places) or no_peer_access(device, places)

    def allocate(self, num_bytes: int, align: int, device: torch.device, group: dist.ProcessGroup | None) -> Allocation:
        import torch.distributed._symmetric_memory as symm

        assert group is not None, "a single rank needs no exchange: the local backend serves it"
        env.disable_multicast()
        gpus = agree.gather(group, gpu_uuid(device), "the rendezvous of symmetric memory")
        if len(set(gpus)) < len(gpus):
            env.allow_ranks_on_one_gpu()
        raw, problem = None, None
        try:
            raw = symm.empty(num_bytes + align, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            problem = f"{num_bytes} bytes of symmetric memory on {device}: {_first_line(error)}"
        agree.first_problem(group, problem, MegaMoEError)
        assert raw is not None
        handle, views = None, []
        try:
            handle = symm.rendezvous(raw, group)
            views = [raw if rank == handle.rank else _view(handle, rank, raw) for rank in range(handle.world_size)]
        except RuntimeError as error:
            problem = f"rendezvous of symmetric memory on {device}: {_first_line(error)}"
        agree.first_problem(group, problem, MegaMoEError)
        keep: list[Any] = [raw, handle]  # dropping either unmaps
        peers = [aligned(view, num_bytes, align) for view in views]
        return Allocation(group.rank(), peers, release=keep.clear)


def gpu_uuid(device: torch.device) -> str:
    """The GPU's UUID, "" for a device that is none."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def no_peer_access(device: torch.device, places: Sequence[Place]) -> str | None:
    """A sentence if ``device`` cannot load and store in the memory of a GPU of ``places`` that is visible here."""
    here = {gpu_uuid(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    for rank, place in enumerate(places):
        index = here.get(place.gpu)
        if index not in (None, device.index) and not torch.cuda.can_device_access_peer(device, index):
            return f"{device} has no peer access to {place.device} of rank {rank} (nvidia-smi topo -m shows the links)"
    return None


def _view(handle: Any, rank: int, raw: torch.Tensor) -> torch.Tensor:
    """Rank ``rank``'s counterpart of ``raw``, as a tensor on this rank's device.

    ``buffer_ptrs`` are the starts of allocations, within which the tensor stands at ``handle.offset``. Whether
    ``get_buffer`` adds that offset itself differs between versions, so the address decides.
    """
    pointer = handle.buffer_ptrs[rank] + handle.offset
    for offset in {0, handle.offset}:
        view: torch.Tensor = handle.get_buffer(rank, raw.shape, raw.dtype, offset)
        if view.data_ptr() == pointer:
            return view
    raise RuntimeError(f"get_buffer gives no view at {pointer:#x} for rank {rank} (offset {handle.offset})")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)
