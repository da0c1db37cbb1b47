"""``nvshmem``: GPUs through NVSHMEM's symmetric heap (nvshmem4py). Peers are reached by plain loads and stores.

NVSHMEM is initialised once a process, over the ranks of the first group that asks; PE numbers are that group's ranks.
Allocating and freeing wait for all of them.
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
from megamoe.symm_mem.backends.torch_symm import no_peer_access

_initialised: tuple[list[int], torch.device] | None = None  # global ranks of the group, and the device


class NvshmemBackend:
    name = "nvshmem"

    def why_not(self, device: torch.device, group: dist.ProcessGroup | None) -> str | None:
        if device.type != "cuda":
            return f"serves GPUs, the device is {device}"
        if reason := no_such_gpu(device):
            return reason
        try:
            _import_core().get_version()  # loads the host library
        except Exception as error:  # a missing wheel, library, or driver each raise their own kind
            return f"nvshmem4py cannot be used ({error}); pip install 'megamoe[nvshmem]'"
        if _initialised is not None and group is not None:
            ranks = dist.get_process_group_ranks(group)
            if _initialised != (ranks, device):
                return (
                    f"NVSHMEM is initialised once a process, here for ranks {_initialised[0]} on {_initialised[1]}, "
                    f"not for ranks {ranks} on {device}"
                )
        return None

    def why_not_together(self, device: torch.device, places: Sequence[Place]) -> str | None:
        gpus = [p.gpu for p in places]
        if len(set(gpus)) < len(gpus):
            return "two ranks share a GPU"
        return several_hosts(places) or no_peer_access(device, places)

    def allocate(self, num_bytes: int, align: int, device: torch.device, group: dist.ProcessGroup | None) -> Allocation:
        assert group is not None, "a single rank needs no exchange: the local backend serves it"
        env.disable_multicast()
        core = _import_core()
        with torch.cuda.device(device):
            _initialise(core, device, group)
            raw, views, problem = None, [], None
            try:
                raw = core.tensor((num_bytes + align,), dtype=torch.uint8, except_on_del=False)
                # Asking for one's own PE would count a second reference, and the free would never come.
                views = [raw if r == group.rank() else core.get_peer_tensor(raw, r) for r in range(group.size())]
            except Exception as error:
                problem = f"{num_bytes} bytes of NVSHMEM heap on {device}: {error}"
            agree.first_problem(group, problem, MegaMoEError)
        keep: list[Any] = [raw]

        def release() -> None:
            agree.barrier(group, "the close of an NVSHMEM buffer")  # bounded; the free below would wait for ever
            with torch.cuda.device(device):
                core.free_tensor(keep.pop())

        peers = [aligned(view, num_bytes, align) for view in views]
        return Allocation(group.rank(), peers, release, collective_release=True)


def finalize() -> None:
    """Shut NVSHMEM down, once all buffers are closed; collective over the ranks it was initialised for."""
    global _initialised  # noqa: PLW0603 - mirrors the library's own state, one a process
    if _initialised is not None:
        _import_core().finalize()
        _initialised = None


def _import_core() -> Any:
    env.disable_multicast()
    import nvshmem.core

    return nvshmem.core


def _initialise(core: Any, device: torch.device, group: dist.ProcessGroup) -> None:
    global _initialised  # noqa: PLW0603
    if _initialised is not None:
        return
    import numpy as np
    from cuda.core import Device

    torch.cuda.synchronize(device)  # makes torch's context, which NVSHMEM then shares
    uid = core.get_unique_id(empty=group.rank() != 0)
    told = agree.gather(group, uid._data.tobytes(), "the unique id of NVSHMEM")[0]
    uid = type(uid).from_data(np.frombuffer(bytearray(told), dtype=uid._data.dtype))
    accelerator = Device(device.index)
    accelerator.set_current()
    core.init(device=accelerator, uid=uid, rank=group.rank(), nranks=group.size(), initializer_method="uid")
    _initialised = (dist.get_process_group_ranks(group), device)
