"""Fixtures that every folder of tests shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from megamoe.testing.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(4)``: a pool of 4 CPU ranks over gloo, started on first use and shared by the whole test session."""
    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()
