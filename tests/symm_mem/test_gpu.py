"""Symmetric buffers on GPUs: written on one rank, read on the peer, by torch ops and by raw address."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megamoe.errors import BufferClosedError, EngineUnavailableError, RankMismatchError
from megamoe.symm_mem import agree
from megamoe.symm_mem.arena import Arena, Field
from megamoe.symm_mem.backends import nvshmem_heap
from megamoe.symm_mem.buffer import SymmBuffer
from megamoe.symm_mem.select import why_not
from megamoe.testing.ranks import spawn_ranks

ARENA = Arena(
    Field("x", (1024, 512), torch.bfloat16),
    Field("flags", (64,), torch.int64, align=1024),
    Field("tail", (3,), torch.uint8, align=1),
)


def _stamp(name, writer, owner, device):
    field = ARENA.fields[name]
    place = torch.arange(torch.Size(field.shape).numel(), device=device)
    return ((place + 17 * writer + 5 * owner) % 100).to(field.dtype).view(field.shape)


def _copy_from_address(target, address):
    """Copy target.nbytes from a raw device address, as a kernel would load it."""
    from cuda.bindings import driver

    torch.cuda.synchronize(target.device)
    (status,) = driver.cuMemcpyDtoD(target.data_ptr(), address, target.nbytes)
    assert status == driver.CUresult.CUDA_SUCCESS, status
    torch.cuda.synchronize(target.device)


def _check_pairs(buffer, group):
    """Each rank in turn writes to all; then every rank reads all parts, by views and by pointers."""
    everyone = range(buffer.world_size)
    for writer in everyone:
        if writer == buffer.rank:
            for owner in everyone:
                for name in ARENA.fields:
                    buffer.peer(owner)[name].copy_(_stamp(name, writer, owner, buffer.device))
        torch.cuda.synchronize(buffer.device)
        agree.barrier(group, "test: written")
        for owner in everyone:
            for name in ARENA.fields:
                expected = _stamp(name, writer, owner, buffer.device)
                assert torch.equal(buffer.peer(owner)[name], expected), (writer, owner, name)
                raw = torch.empty_like(expected)
                _copy_from_address(raw, buffer.field_pointers(name)[owner])
                assert torch.equal(raw, expected), (writer, owner, name, "by address")
        torch.cuda.synchronize(buffer.device)
        agree.barrier(group, "test: read")


def _between_processes(rank, world_size, group, backend, device_of):
    device = torch.device("cuda", device_of[rank])
    torch.cuda.set_device(device)
    with pytest.raises(RankMismatchError, match="x torch"):
        SymmBuffer.create(Arena(Field("x", (8 + rank,), torch.bfloat16)), device=device, group=group, backend=backend)
    buffers = [SymmBuffer.create(ARENA, device=device, group=group, backend=backend) for _ in range(2)]
    for buffer in buffers:
        assert (buffer.backend, buffer.rank, buffer.world_size) == (backend, rank, world_size)
        assert not buffer.whole.any(), "fresh memory must be zero"
        assert all(p.device == device for p in (buffer["x"], buffer.peer(1 - rank)["x"], buffer.pointers_device))
        assert buffer.pointers_device.tolist() == buffer.pointers and len(set(buffer.pointers)) == world_size
        assert all(pointer % 1024 == 0 for pointer in buffer.pointers)
    agree.barrier(group, "test: fresh")
    for buffer in buffers:
        _check_pairs(buffer, group)
    assert torch.equal(buffers[0]["x"], buffers[1]["x"]) and buffers[0]["x"].data_ptr() != buffers[1]["x"].data_ptr()
    views = buffers[0].peer(1 - rank)
    for buffer in buffers:
        buffer.close()
    with pytest.raises(BufferClosedError):
        views["x"]
    with SymmBuffer.create(ARENA, device=device, group=group, backend=backend) as again:
        assert not again.whole.any()
        reason = again.reason
    if backend == "nvshmem":
        nvshmem_heap.finalize()
    return reason


def _values(outcomes):
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


@pytest.mark.multi_gpu
@pytest.mark.parametrize("transport", ["gloo", "nccl"])
def test_torch_backend_between_gpus(transport):
    _values(spawn_ranks(2, _between_processes, "torch", [0, 1], backend=transport))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("transport", ["gloo", "nccl"])
def test_nvshmem_backend_between_gpus(transport):
    if reason := why_not(torch.device("cuda", 0))["nvshmem"]:
        pytest.skip(reason)
    _values(spawn_ranks(2, _between_processes, "nvshmem", [0, 1], backend=transport))


def _auto(rank, world_size, group, device_of):
    device = torch.device("cuda", device_of[rank])
    with SymmBuffer.create(ARENA, device=device, group=group) as buffer:
        _check_pairs(buffer, group)
        with pytest.raises(EngineUnavailableError, match=r"shm: .*serves CPU ranks"):
            SymmBuffer.create(ARENA, device=device, group=group, backend="shm")
        return buffer.backend


@pytest.mark.multi_gpu
def test_auto_takes_torch_between_gpus():
    assert _values(spawn_ranks(2, _auto, [0, 1])) == ["torch", "torch"]


def _subgroups(rank, world_size, group):
    device = torch.device("cuda", rank)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank // 2]
    with (
        SymmBuffer.create(ARENA, device=device, group=mine, backend="torch") as pair,
        SymmBuffer.create(ARENA, device=device, group=group, backend="torch") as all_four,
    ):
        assert (pair.world_size, all_four.world_size) == (2, 4)
        _check_pairs(pair, mine)
        _check_pairs(all_four, group)


@pytest.mark.multi_gpu
def test_two_groups_in_one_process():
    if torch.cuda.device_count() < 4:
        pytest.skip(f"needs four CUDA devices, {torch.cuda.device_count()} are visible")
    _values(spawn_ranks(4, _subgroups))


@pytest.mark.gpu
def test_torch_backend_between_processes_on_one_gpu():
    reasons = _values(spawn_ranks(2, _between_processes, "torch", [0, 0]))
    assert "not nvshmem: " in reasons[0]


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_virtual_ranks_on_one_gpu(world_size):
    buffers = SymmBuffer.virtual(ARENA, world_size, device="cuda:0")
    for writer in buffers:
        for name in ARENA.fields:
            for owner in range(world_size):
                writer.peer(owner)[name].copy_(_stamp(name, writer.rank, owner, "cuda:0"))
        for reader in buffers:
            assert reader.pointers == writer.pointers
            for name in ARENA.fields:
                expected = _stamp(name, writer.rank, reader.rank, "cuda:0")
                assert torch.equal(reader[name], expected)
                raw = torch.empty_like(expected)
                _copy_from_address(raw, writer.field_pointers(name)[reader.rank])
                assert torch.equal(raw, expected)


@pytest.mark.gpu
def test_one_rank_without_a_group():
    with SymmBuffer.create(ARENA, device="cuda") as buffer:
        assert (buffer.backend, buffer.world_size, buffer.device.index) == ("local", 1, torch.cuda.current_device())
        assert buffer.pointers_device.tolist() == [buffer.whole.data_ptr()]
