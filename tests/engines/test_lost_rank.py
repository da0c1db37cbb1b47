"""A rank that dies or stands still: the others get PeerTimeout with its name, in time. These tests start own ranks."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megamoe import mega_moe
from megamoe.errors import PeerTimeout
from megamoe.testing.ranks import RankDied, spawn_ranks
from tests.engines.cases import Case, compare, run

CASE = Case(experts=6, tokens=(9, 4, 6), bias=True)
LIMIT_S = 20.0


def _steps(group: dist.ProcessGroup | None, victim: int) -> dict[str, Any]:
    """Training steps for ever; in the fifth the victim is killed between forward and backward."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for step in range(1000):
        begin = time.monotonic()
        try:
            if step == 5 and rank == victim:
                x, idx, topk_weights, _ = CASE.inputs(rank, size)
                mega_moe(x, idx, topk_weights, CASE.weights(rank, size), problem=CASE.problem(size), group=group)
                os.kill(os.getpid(), signal.SIGKILL)
            run(CASE, rank, size, group, "auto")
        except PeerTimeout as error:
            seconds = time.monotonic() - begin
            try:
                run(CASE, rank, size, group, "auto")
            except PeerTimeout as again:
                return {"step": step, "error": str(error), "again": str(again), "seconds": seconds}
    return {}


def _killed(rank: int, world_size: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """The ranks that are left go on in a new group."""
    result = _steps(group, 1)
    left = dist.new_group([0, 2], use_local_synchronization=True)
    return result | {"wrong": compare(dist.get_rank(left), 2, left, [replace(CASE, experts=4)])}


def test_a_killed_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", str(LIMIT_S))
    first, died, third = spawn_ranks(3, _killed)
    assert isinstance(died, RankDied) and "status -9" in str(died)
    for result in (first, third):
        assert result["step"] == 5
        assert result["error"].startswith("rank 1 did not arrive in phase 'backward: ")
        assert "(its process has ended)" in result["error"]
        assert result["seconds"] < LIMIT_S / 2  # noticed by its connection, not by the limit
        assert "make a new one" in result["again"]
        assert result["wrong"] == []


def _killed_with_its_store(rank: int, world_size: int, group: dist.ProcessGroup, port: int) -> dict[str, Any]:
    """As under init_method="tcp://...": rank 0 hosts the store."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    return _steps(None, 0)


def test_rank_0_is_named_though_the_store_dies_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", str(LIMIT_S))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = spawn_ranks(3, _killed_with_its_store, port)
    for result in results[1:]:
        assert result["error"].startswith("rank 0 did not arrive in phase 'backward: "), result
        assert "(its process has ended)" in result["error"]


def _stopped(rank: int, world_size: int, group: dist.ProcessGroup, folder: str) -> dict[str, Any]:
    """Rank 2 stands still until the others have given up, then calls too."""
    notes = [Path(folder) / f"rank{r}-gave-up" for r in (0, 1)]
    for step in range(1000):
        begin = time.monotonic()
        try:
            if step == 2 and rank == 2:
                while not all(n.exists() for n in notes):
                    time.sleep(0.05)
            run(CASE, rank, world_size, group, "staged")
        except PeerTimeout as error:
            if rank < 2:
                notes[rank].touch()
            return {"step": step, "error": str(error), "seconds": time.monotonic() - begin}
    return {}


def test_a_rank_that_stands_still_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_s = 4.0
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", str(limit_s))
    first, second, late = spawn_ranks(3, _stopped, str(tmp_path))
    for result in (first, second):
        assert result["step"] == 2
        assert result["error"].startswith("rank 2 did not arrive in phase 'handshake' (no sign"), result
        assert result["seconds"] < limit_s + 2
    assert late["step"] == 2  # it can't go on as if nothing had happened
    assert "a rank was late" in late["error"]
