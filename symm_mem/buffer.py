"""``SymmBuffer``: one rank's bytes, laid out by an ``Arena``, that every rank of a group can address.

    with SymmBuffer.create(arena, device="cpu", group=group) as buffer:
        buffer.peer(1)["x"][0] = 7          # a store into rank 1's memory
        kernel(buffer.pointers_device)      # int64 [R], every rank's base address as this rank sees it

Nothing here orders a store before a peer's load: that is the caller's protocol (flags in the buffer, or a barrier).
"""

from __future__ import annotations

from types import TracebackType

import torch
import torch.distributed as dist

from megamoe.errors import BufferClosedError
from megamoe.symm_mem import agree
from megamoe.symm_mem.arena import Arena
from megamoe.symm_mem.backends.base import Allocation
from megamoe.symm_mem.backends.local import LocalBackend
from megamoe.symm_mem.select import choose


class RankViews:
    """The fields of one rank's part, as this process addresses them; made by ``SymmBuffer.peer``."""

    def __init__(self, buffer: SymmBuffer, rank: int) -> None:
        self._buffer, self.rank = buffer, rank
        self._views: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Field ``name``; raises BufferClosedError after close(), KeyError with the known names otherwise."""
        whole = self.whole
        if name not in self._views:
            self._buffer.check_field(name)
            self._views[name] = self._buffer.arena.view(whole, name)
        return self._views[name]

    @property
    def whole(self) -> torch.Tensor:
        """All bytes of this rank, uint8 [arena.num_bytes]."""
        return self._buffer.allocation.peers[self.rank]


class SymmBuffer:
    """Made by ``create`` (one rank of a group) or ``virtual`` (ranks inside one process).

    Attributes:
        arena, rank, world_size, device.
        backend: name of the backend that serves it.
        reason: why that one, in a sentence.
    """

    def __init__(self, arena: Arena, allocation: Allocation, device: torch.device, backend: str, reason: str) -> None:
        self.arena = arena
        self.rank = allocation.rank
        self.world_size = len(allocation.peers)
        self.device = device
        self.backend = backend
        self.reason = reason
        self._allocation: Allocation | None = allocation
        self._peers = [RankViews(self, rank) for rank in range(self.world_size)]
        self._pointers_device: torch.Tensor | None = None
        for peer in allocation.peers:
            assert peer.dtype == torch.uint8 and peer.shape == (arena.num_bytes,), (peer.dtype, peer.shape)
            assert peer.data_ptr() % arena.align == 0, (peer.data_ptr(), arena.align)

    @classmethod
    def create(
        cls,
        arena: Arena,
        *,
        device: torch.device | str,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> SymmBuffer:
        """Collective over ``group`` (None: a single rank): allocate, zero, and return once every rank's part is ready.

        Raises, on every rank:
            RankMismatchError: arenas, backends or kinds of device differ; fields that differ are shown.
            ValueError, EngineUnavailableError: as ``select.choose``.
            MegaMoEError: the memory cannot be had.
        """
        device = _indexed(device)
        agree.all_equal(group, "the fields of a symmetric buffer", arena.text)
        choice = choose(backend, device, group)
        allocation = choice.backend.allocate(arena.num_bytes, arena.align, device, group)
        allocation.peers[allocation.rank].zero_()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        agree.barrier(group, "a zeroed symmetric buffer")  # or a peer's first store could be wiped out
        return cls(arena, allocation, device, choice.backend.name, choice.explain())

    @classmethod
    def virtual(cls, arena: Arena, world_size: int, *, device: torch.device | str) -> list[SymmBuffer]:
        """The zeroed buffers of ``world_size`` virtual ranks of this process, by rank."""
        device = _indexed(device)
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        allocations = LocalBackend().allocate_virtual(arena.num_bytes, arena.align, device, world_size)
        for own in allocations[0].peers:
            own.zero_()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        reason = f"{world_size} virtual ranks in one process"
        return [cls(arena, allocation, device, "local", reason) for allocation in allocations]

    @property
    def allocation(self) -> Allocation:
        """The open allocation. Raises BufferClosedError after close()."""
        if self._allocation is None:
            raise BufferClosedError(f"this symmetric buffer (fields {', '.join(self.arena.fields)}) is closed")
        return self._allocation

    @property
    def closed(self) -> bool:
        return self._allocation is None

    @property
    def whole(self) -> torch.Tensor:
        """All bytes of this rank, uint8 [arena.num_bytes]."""
        return self.allocation.peers[self.rank]

    def __getitem__(self, name: str) -> torch.Tensor:
        """This rank's field ``name``, a tensor of the field's shape and dtype."""
        return self.peer(self.rank)[name]

    def peer(self, rank: int) -> RankViews:
        """The fields of rank ``rank`` of the group: ``buffer.peer(1)["x"]``."""
        _ = self.allocation
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be from 0 to {self.world_size - 1}, got {rank}")
        return self._peers[rank]

    @property
    def pointers(self) -> list[int]:
        """Base address of every rank's part, as this rank's device addresses it."""
        return [peer.data_ptr() for peer in self.allocation.peers]

    @property
    def pointers_device(self) -> torch.Tensor:
        """``pointers`` as int64 [R] on this rank's device, for kernels; the same tensor each time."""
        pointers = self.pointers
        if self._pointers_device is None:
            self._pointers_device = torch.tensor(pointers, dtype=torch.int64, device=self.device)
        return self._pointers_device

    def field_pointers(self, name: str) -> list[int]:
        """Address of field ``name`` in every rank's part."""
        self.check_field(name)
        return [base + self.arena.offsets[name] for base in self.pointers]

    def check_field(self, name: str) -> None:
        """Raise KeyError with the known names unless ``name`` is a field."""
        if name not in self.arena.fields:
            raise KeyError(f"no field {name!r} in this symmetric buffer, it has {', '.join(self.arena.fields)}")

    def close(self) -> None:
        """Give the memory back; later use raises BufferClosedError. Tensors taken from the buffer become invalid.

        Waits for this device's work. With backend ``nvshmem`` collective, else of this rank alone: peers may go on
        reading and writing this rank's part until they close theirs. Closing twice does nothing.
        """
        if self._allocation is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        allocation, self._allocation = self._allocation, None
        self._peers.clear()
        allocation.peers.clear()
        allocation.release()

    def __enter__(self) -> SymmBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._allocation is not None and self._allocation.collective_release:
            # The other ranks may not come: leave the memory to the end of the process rather than hide the error.
            self._allocation = None
            return
        self.close()


def _indexed(device: torch.device | str) -> torch.device:
    """``device`` with its index: "cuda" is the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
