"""Fixtures that every folder of tests shares, and the marks ``gpu`` and ``multi_gpu``.

A marked test is skipped, with the reason, on a machine that lacks what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from megamoe.testing.ranks import RankPool

pytest_plugins = ["tests.recording"]


def why_no_gpu() -> str | None:
    """None if this machine can run tests marked ``gpu``, else the reason."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, none is visible"
    major, minor = torch.cuda.get_device_capability(0)
    if major != 9:
        return f"needs compute capability 9.0, device 0 has {major}.{minor}"
    return None


def why_no_multi_gpu() -> str | None:
    """None if this machine can run tests marked ``multi_gpu``, else the reason."""
    if reason := why_no_gpu():
        return reason
    if torch.cuda.device_count() < 2:
        return f"needs two CUDA devices, {torch.cuda.device_count()} is visible"
    if not torch.cuda.can_device_access_peer(0, 1):
        return "needs peer access between CUDA devices 0 and 1, there is none"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "compile every kernel that the heuristics can return, not a fixed sample (minutes)"
    group = parser.getgroup("megamoe")
    group.addoption("--every-kernel", action="store_true", help=what)
    group.addoption("--problems", type=int, default=100, help="random problems for the mega-kernel (default 100)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {"gpu": why_no_gpu(), "multi_gpu": why_no_multi_gpu()}
    for item in items:
        for mark, reason in reasons.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


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
