"""The pool of ranks that other tests stand on."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from megamoe import env
from megamoe.testing.ranks import RankDied, RankPool, RankTimeout, spawn_ranks


def _total(rank, world_size, group, start):
    x = torch.tensor([start + rank])
    dist.all_reduce(x, group=group)
    return rank, world_size, torch.get_num_threads(), x


def _fail_on(rank, world_size, group, bad):
    if rank in bad:
        raise ValueError(f"rank {rank} got something bad")
    return rank


def _one_stuck(rank, world_size, group):
    if rank == 1:
        time.sleep(1000)


def _one_killed(rank, world_size, group):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier(group)


def _timeout_variable(rank, world_size, group):
    return env.get("MEGAMOE_TIMEOUT_S")


def _unpicklable(rank, world_size, group):
    return lambda: rank


def _subgroup(rank, world_size, group):
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    x = torch.tensor([rank])
    dist.all_reduce(x, group=pairs[rank % 2])
    return x.item()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_results_come_back_by_rank(ranks, world_size):
    results = ranks(world_size).run(_total, 10)
    expected = 10 * world_size + sum(range(world_size))
    assert [(r, w, n) for r, w, n, _ in results] == [(r, world_size, 1) for r in range(world_size)]
    assert all(torch.equal(x, torch.tensor([expected])) for *_, x in results)


def test_processes_are_kept(ranks):
    assert ranks(2).run(_pid) == ranks(2).run(_pid)


def _pid(rank, world_size, group):
    return os.getpid()


def test_an_error_names_the_rank_and_keeps_its_type():
    with RankPool(3) as pool:
        with pytest.raises(ValueError, match="rank 1 got something bad") as info:
            pool.run(_fail_on, (1,))
        (note,) = info.value.__notes__
        assert note.startswith("[rank 1 of 3] Traceback") and "_fail_on" in note
        assert pool.run(_fail_on, ()) == [0, 1, 2]


def test_errors_as_results(ranks):
    outcomes = ranks(3).try_run(_fail_on, (0, 2))
    assert [type(o) for o in outcomes] == [ValueError, int, ValueError]


def test_a_stuck_rank_is_named_with_its_stack():
    with RankPool(2) as pool:
        pool.run(_pid)
        with pytest.raises(RankTimeout, match=r"(?s)rank 1 of 2 did not answer.*_one_stuck"):
            pool.run(_one_stuck, timeout_s=1)
        assert len(pool.run(_pid)) == 2


def test_a_killed_rank_is_named_and_the_others_answer():
    first, second = spawn_ranks(2, _one_killed)
    assert isinstance(second, RankDied) and "rank 1 of 2 ended with status -9" in str(second)
    assert isinstance(first, RuntimeError) and not isinstance(first, RankDied | RankTimeout)


def test_ranks_see_the_callers_variables(ranks, monkeypatch):
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "7")
    assert ranks(2).run(_timeout_variable) == [7.0, 7.0]
    monkeypatch.delenv("MEGAMOE_TIMEOUT_S")
    assert ranks(2).run(_timeout_variable) == [30.0, 30.0]


def test_an_answer_that_cannot_travel_is_an_error(ranks):
    outcomes = ranks(2).try_run(_unpicklable)
    assert all(isinstance(o, RuntimeError) and "cannot be pickled" in str(o) for o in outcomes)


def test_subgroups(ranks):
    assert ranks(4).run(_subgroup) == [2, 4, 2, 4]


def test_world_size_is_checked():
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        RankPool(0)
