"""Agreements among ranks: every rank learns of every rank's trouble, and no wait lasts for ever."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist

from megamoe.errors import PeerTimeout, RankMismatchError
from megamoe.symm_mem import agree
from megamoe.testing.ranks import RankDied, spawn_ranks


def _gather(rank, world_size, group):
    return [agree.gather(group, {"rank": rank, "turn": turn}, "test") for turn in range(3)]


def _mismatch(rank, world_size, group, values):
    try:
        agree.all_equal(group, "max_tokens", values[rank])
    except RankMismatchError as error:
        agree.all_equal(group, "max_tokens", 5)  # the next correct call works
        return str(error)
    return None


def _problem(rank, world_size, group, messages):
    try:
        agree.first_problem(group, messages[rank], TypeError)
    except TypeError as error:
        agree.first_problem(group, None)
        return str(error)
    return None


def _absent(rank, world_size, group):
    if rank == 2:
        time.sleep(2)
        agree.barrier(group, "first")  # late: finds the others' words, goes on
    else:
        with pytest.raises(
            PeerTimeout, match=rf"rank {rank} of 3 waited 1 s \(MEGAMOE_TIMEOUT_S\) for rank 2 at first"
        ):
            agree.barrier(group, "first")
        time.sleep(1)
    return agree.gather(group, rank, "second")


def _killed(rank, world_size, group):
    agree.barrier(group, "start")
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    agree.barrier(group, "after the crash")


def _subgroups(rank, world_size, group):
    mine = [dist.new_group([3, 1]), dist.new_group([0, 2])][(rank + 1) % 2]
    results = [agree.gather(mine, rank, "pair"), agree.gather(group, rank, "all"), agree.gather(mine, -rank, "pair")]
    outsider = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="this process is a member of"):
            agree.barrier(outsider, "nowhere")
    return results


def _two_lives(rank, world_size, group):
    for life in range(3):
        # Each life starts to count anew, over keys that the one before has left behind.
        for turn in range(3 - life):
            assert agree.gather(group, (life, turn, rank), "test") == [(life, turn, r) for r in range(world_size)]
        agree._channels.clear()  # what remains of a group after destroy_process_group: its store


@pytest.mark.parametrize("world_size", [1, 3])
def test_gather(ranks, world_size):
    expected = [[{"rank": r, "turn": turn} for r in range(world_size)] for turn in range(3)]
    assert ranks(world_size).run(_gather) == [expected] * world_size


def test_a_single_rank_needs_no_group():
    assert agree.gather(None, "x", "test") == ["x"]
    agree.all_equal(None, "anything", 1)
    with pytest.raises(ValueError, match=r"^bad$"):
        agree.first_problem(None, "bad")


def test_all_equal_names_ranks_and_values(ranks):
    told = ranks(3).run(_mismatch, (5, 7, 5))
    assert told == ["max_tokens must be equal on all 3 ranks, got ranks 0, 2: 5; rank 1: 7"] * 3
    assert ranks(3).run(_mismatch, (5, 5, 5)) == [None] * 3


def test_all_equal_shows_only_lines_that_differ(ranks):
    told = ranks(2).run(_mismatch, ("a\nb  1\nc", "a\nb  2\nc"))
    assert told == ["max_tokens must be equal on all 2 ranks, got rank 0: b 1; rank 1: b 2"] * 2
    told = ranks(2).run(_mismatch, ("a\nb", "b\na"))
    assert told == [r"max_tokens must be equal on all 2 ranks, got rank 0: 'a\nb'; rank 1: 'b\na'"] * 2


def test_first_problem_reaches_every_rank(ranks):
    assert ranks(3).run(_problem, (None, "x is None", None)) == ["rank 1 of 3: x is None"] * 3
    assert ranks(3).run(_problem, (None, "a", "b")) == ["rank 1 of 3: a (rank 2 failed too)"] * 3
    assert ranks(3).run(_problem, ("same", "same", "same")) == ["same"] * 3
    assert ranks(3).run(_problem, (None, None, None)) == [None] * 3


def test_an_absent_rank_is_named_and_may_come_late(ranks, monkeypatch):
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "1")
    assert ranks(3).run(_absent) == [[0, 1, 2]] * 3


def test_a_killed_rank_is_named(monkeypatch):
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "1")
    dead, *others = spawn_ranks(3, _killed)
    assert isinstance(dead, RankDied)
    assert all(isinstance(e, PeerTimeout) and "for rank 0 at after the crash" in str(e) for e in others)


def test_subgroups(ranks):
    results = ranks(4).run(_subgroups)
    assert [r[1] for r in results] == [[0, 1, 2, 3]] * 4
    assert results[0][0] == results[2][0] == [0, 2] and results[0][2] == [0, -2]
    # new_group sorts its ranks
    assert results[1][0] == results[3][0] == [1, 3] and results[1][2] == [-1, -3]


def test_a_group_name_may_live_again():
    assert spawn_ranks(3, _two_lives) == [None] * 3
