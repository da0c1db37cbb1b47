"""Symmetric buffers between CPU ranks: shm between processes, local between the virtual ranks of one."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.errors import BufferClosedError, EngineUnavailableError, RankMismatchError
from megamoe.symm_mem import agree
from megamoe.symm_mem.arena import Arena, Field
from megamoe.symm_mem.buffer import SymmBuffer

ARENA = Arena(
    Field("x", (5, 8), torch.bfloat16),
    Field("scales", (5,), torch.float32),
    Field("bytes", (3,), torch.uint8, align=1),
    Field("flags", (8,), torch.int64, align=1024),
    Field("nothing", (0, 4), torch.float32),
)


def _stamp(name, writer, owner):
    """Field ``name`` of ``owner`` as ``writer`` fills it: every element tells the three and its place."""
    field = ARENA.fields[name]
    values = (
        torch.arange(torch.Size(field.shape).numel()) + 7 * writer + 3 * owner + 11 * list(ARENA.fields).index(name)
    )
    return (values % 100).to(field.dtype).view(field.shape)


def _check_all_pairs(buffers_of_rank, barrier, mine, world_size):
    """Every rank in turn writes into every rank's part; the owner finds it in its own, every peer in the owner's."""
    for writer in range(world_size):
        if writer in mine:
            for owner in range(world_size):
                for name in ARENA.fields:
                    buffers_of_rank[writer].peer(owner)[name].copy_(_stamp(name, writer, owner))
        barrier()
        for rank in mine:
            buffer = buffers_of_rank[rank]
            for name in ARENA.fields:
                assert torch.equal(buffer[name], _stamp(name, writer, rank)), (writer, rank, name)
                for owner in range(world_size):
                    assert torch.equal(buffer.peer(owner)[name], _stamp(name, writer, owner)), (writer, owner, name)
        barrier()


def _write_and_read(rank, world_size, group):
    with SymmBuffer.create(ARENA, device="cpu", group=group) as buffer:
        assert (buffer.rank, buffer.world_size) == (rank, world_size)
        assert buffer.backend == ("local" if world_size == 1 else "shm"), buffer.reason
        assert not buffer.whole.any(), "fresh memory must be zero"
        agree.barrier(group, "test")
        _check_all_pairs({rank: buffer}, lambda: agree.barrier(group, "test"), [rank], world_size)
        return buffer.reason


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_shm_every_rank_writes_to_every_rank(ranks, world_size):
    reasons = ranks(world_size).run(_write_and_read)
    assert len(set(reasons)) == 1
    assert "not torch: serves GPUs, the device is cpu" in reasons[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_virtual_every_rank_writes_to_every_rank(world_size):
    buffers = SymmBuffer.virtual(ARENA, world_size, device="cpu")
    assert [b.rank for b in buffers] == list(range(world_size))
    assert all(b.world_size == world_size and b.backend == "local" and not b.whole.any() for b in buffers)
    _check_all_pairs(buffers, lambda: None, list(range(world_size)), world_size)


def test_virtual_ranks_close_one_by_one():
    first, second = SymmBuffer.virtual(ARENA, 2, device="cpu")
    first["scales"].fill_(4)
    first.close()
    assert second.peer(0)["scales"].unique().tolist() == [4.0]


def _pointers(rank, world_size, group):
    buffer = SymmBuffer.create(ARENA, device="cpu", group=group)
    buffer["flags"].copy_(torch.arange(8) + 100 * rank)
    agree.barrier(group, "test")
    for owner in range(world_size):
        address = buffer.field_pointers("flags")[owner]
        assert address == buffer.pointers[owner] + ARENA.offsets["flags"] and address % 1024 == 0
        # A raw load at the address, as a kernel would do it.
        assert list((ctypes.c_int64 * 8).from_address(address)) == [100 * owner + i for i in range(8)]
    assert buffer.pointers_device.dtype == torch.int64 and buffer.pointers_device.tolist() == buffer.pointers
    assert buffer.pointers_device is buffer.pointers_device
    assert len(set(buffer.pointers)) == world_size
    agree.barrier(group, "test")


def test_pointers(ranks):
    ranks(3).run(_pointers)
    (single,) = SymmBuffer.virtual(ARENA, 1, device="cpu")
    assert single.pointers == [single.whole.data_ptr()]


def _mismatch(rank, world_size, group):
    told = []
    for arena in (
        Arena(Field("x", (4 + rank // 2, 8), torch.bfloat16), Field("y", (2,))),
        Arena(Field("x", (4, 8), torch.bfloat16 if rank else torch.float16), Field("y", (2,))),
        Arena(*[Field(n, (2,)) for n in (("x", "y") if rank < 2 else ("y", "x"))]),
    ):
        with pytest.raises(RankMismatchError) as info:
            SymmBuffer.create(arena, device="cpu", group=group)
        told.append(str(info.value))
        SymmBuffer.create(ARENA, device="cpu", group=group).close()  # the next correct call works
    with pytest.raises(RankMismatchError, match=r"backend.*rank 0: \('shm', 'cpu'\)"):
        SymmBuffer.create(ARENA, device="cpu", group=group, backend="auto" if rank else "shm")
    SymmBuffer.create(ARENA, device="cpu", group=group).close()
    return told


def test_mismatched_arenas_are_an_error_on_every_rank(ranks):
    told = ranks(3).run(_mismatch)
    assert told[0] == told[1] == told[2]
    rows, dtype, order = told[0]
    assert "ranks 0, 1: 0 +64 x torch.bfloat16 [4, 8] align 128; rank 2: 0 +80 x torch.bfloat16 [5, 8]" in rows
    assert "+2 y" not in dtype and "rank 0: 0 +64 x torch.float16 [4, 8]" in dtype
    assert "ranks 0, 1" in order and "rank 2" in order


def _refusals(rank, world_size, group):
    with pytest.raises(ValueError, match="backend must be one of auto, local, torch, nvshmem, shm, got 'ipc'"):
        SymmBuffer.create(ARENA, device="cpu", group=group, backend="ipc")
    with pytest.raises(ValueError, match=r"rank 1 of 2: backend must be one of .* got 'ipc'"):
        SymmBuffer.create(ARENA, device="cpu", group=group, backend="ipc" if rank else "auto")
    with pytest.raises(EngineUnavailableError, match="local: serves ranks inside one process, this group has 2"):
        SymmBuffer.create(ARENA, device="cpu", group=group, backend="local")
    for name in ("torch", "nvshmem"):
        with pytest.raises(EngineUnavailableError, match=f"for 2 ranks on cpu: {name}: serves GPUs"):
            SymmBuffer.create(ARENA, device="cpu", group=group, backend=name)
    with SymmBuffer.create(ARENA, device="cpu", group=group, backend="shm") as buffer:
        with pytest.raises(KeyError, match="no field 'y' in this symmetric buffer, it has x, scales"):
            buffer["y"]
        with pytest.raises(ValueError, match="rank must be from 0 to 1, got 2"):
            buffer.peer(2)


def test_refusals_reach_every_rank(ranks):
    ranks(2).run(_refusals)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        SymmBuffer.virtual(ARENA, 0, device="cpu")


def _backend_variable(rank, world_size, group):
    with pytest.raises(EngineUnavailableError, match="nvshmem: serves GPUs"):
        SymmBuffer.create(ARENA, device="cpu", group=group)
    with SymmBuffer.create(ARENA, device="cpu", group=group, backend="shm") as buffer:
        return buffer.backend


def test_a_gpu_that_is_not_there_is_told():
    if torch.cuda.is_available():
        device, sentence = f"cuda:{torch.cuda.device_count()}", "CUDA devices, the device is cuda:"
    else:
        device, sentence = "cuda", "torch sees no CUDA device"
    with pytest.raises(EngineUnavailableError, match=f"local: .*{sentence}"):
        SymmBuffer.create(ARENA, device=device)


def test_the_variable_decides_where_the_caller_says_auto(ranks, monkeypatch):
    monkeypatch.setenv("MEGAMOE_SYMM_BACKEND", "nvshmem")
    assert ranks(2).run(_backend_variable) == ["shm", "shm"]


def _use_after_close(buffer):
    views, field = buffer.peer(0), buffer["x"]
    buffer.close()
    buffer.close()
    assert buffer.closed
    for use in (
        lambda: buffer["x"],
        lambda: buffer.whole,
        lambda: buffer.peer(0),
        lambda: views["x"],
        lambda: views.whole,
        lambda: buffer.pointers,
        lambda: buffer.pointers_device,
        lambda: buffer.field_pointers("x"),
    ):
        with pytest.raises(BufferClosedError, match="fields x, scales, bytes, flags, nothing\\) is closed"):
            use()
    field.fill_(1)  # on the CPU a tensor taken before keeps its memory: stale, never a crash


def _closed(rank, world_size, group):
    _use_after_close(SymmBuffer.create(ARENA, device="cpu", group=group))
    with pytest.raises(ZeroDivisionError), SymmBuffer.create(ARENA, device="cpu", group=group) as buffer:
        _ = 1 / 0
    assert buffer.closed


def test_use_after_close(ranks):
    _use_after_close(SymmBuffer.virtual(ARENA, 2, device="cpu")[1])
    ranks(2).run(_closed)


def _peer_closes_first(rank, world_size, group):
    buffer = SymmBuffer.create(ARENA, device="cpu", group=group)
    buffer["x"].fill_(rank + 1)
    agree.barrier(group, "test")
    if rank == 0:
        buffer.close()
    agree.barrier(group, "test")
    return None if buffer.closed else buffer.peer(0)["x"].sum().item()


def test_a_closed_ranks_memory_lives_until_its_peers_close(ranks):
    assert ranks(2).run(_peer_closes_first) == [None, 40.0]


def _two_buffers_two_groups(rank, world_size, group):
    pairs = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    mine = pairs[rank in (1, 2)]
    with (
        SymmBuffer.create(ARENA, device="cpu", group=group) as first,
        SymmBuffer.create(ARENA, device="cpu", group=mine) as paired,
        SymmBuffer.create(ARENA, device="cpu", group=group) as second,
    ):
        assert (paired.rank, paired.world_size) == (rank // 2, 2)
        for number, buffer in enumerate((first, paired, second)):
            right = (buffer.rank + 1) % buffer.world_size
            buffer.peer(right)["scales"].fill_(10 * rank + number)
        agree.barrier(group, "test")
        left = {0: 3, 3: 0, 1: 2, 2: 1}[rank]
        assert first["scales"].unique().tolist() == [10 * ((rank - 1) % 4)]
        assert paired["scales"].unique().tolist() == [10 * left + 1]
        assert second["scales"].unique().tolist() == [10 * ((rank - 1) % 4) + 2]
        agree.barrier(group, "test")
    for pair in pairs:
        if pair is mine:
            dist.destroy_process_group(pair)


def test_two_buffers_and_a_group_that_is_not_world(ranks):
    ranks(4).run(_two_buffers_two_groups)


_random_arenas = st.lists(
    st.tuples(
        st.integers(0, 40), st.sampled_from([torch.uint8, torch.int16, torch.float64]), st.sampled_from([8, 256])
    ),
    min_size=1,
    max_size=5,
)


def _random_arena(rank, world_size, group, fields, seed):
    arena = Arena(*[Field(f"f{i}", (n,), dtype, align) for i, (n, dtype, align) in enumerate(fields)])
    with SymmBuffer.create(arena, device="cpu", group=group) as buffer:
        agree.barrier(group, "test")  # nobody stores before all have looked at the zeros below
        assert not buffer.whole.any()
        agree.barrier(group, "test")
        content = [torch.randint(256, (arena.num_bytes,), generator=torch.Generator().manual_seed(seed + r),
                                 dtype=torch.uint8) for r in range(world_size)]  # fmt: skip
        right = (rank + 1) % world_size
        for name in arena.fields:
            buffer.peer(right)[name].copy_(arena.view(content[right], name))
        agree.barrier(group, "test")
        for name in arena.fields:
            assert torch.equal(buffer[name].view(torch.uint8), arena.view(content[rank], name).view(torch.uint8))
        agree.barrier(group, "test")


@settings(max_examples=15, deadline=None)
@given(_random_arenas, st.integers(0, 2**30))
def test_random_arenas(ranks, fields, seed):
    ranks(3).run(_random_arena, fields, seed)
