"""Ranks that are late, missing or killed: every wait ends, says for whom, and the workspace can be used again."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamoe.errors import PeerTimeout
from megamoe.testing.ranks import RankDied, spawn_ranks
from tests.mega.problems import BASE, RECIPES, Layer, Virtual, create

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_missing_rank_is_named_and_reset_helps(recipe: str, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(replace(BASE, recipe=recipe), world_size)
    missing = world_size - 1
    with Virtual(layer) as ranks:
        given = layer.all_given(tokens=(50,))
        ranks.call(given)
        monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "1")
        for _ in range(2):
            begin = time.monotonic()
            ys = ranks.launch(given, ranks=list(range(missing)))
            torch.cuda.synchronize()
            assert time.monotonic() - begin < 10
            texts = []
            for runner, y in zip(ranks.runners[:missing], ys, strict=False):
                assert bool(y.isnan().all())
                with pytest.raises(PeerTimeout) as error:
                    runner.check()
                texts.append(str(error.value))
                with pytest.raises(PeerTimeout):  # until it is reset
                    runner.forward(given[0].x, given[0].topk_idx, given[0].topk_weights, layer.weights[0])
            # Whoever waited for it says so; those that left because another gave up name that one.
            assert any(f"rank {missing} to start its call" in text for text in texts), texts
            a = torch.randn(256, 256, device="cuda")
            assert float((a @ a).abs().sum()) > 0
            for runner in ranks.runners:
                runner.reset()
            monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "30")
            ranks.call(given)
            ranks.call(layer.all_given(seed=1))
            monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "1")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_late_rank_is_waited_for(recipe: str) -> None:
    layer = Layer(replace(BASE, recipe=recipe), 2)
    with Virtual(layer) as ranks:
        given = layer.all_given(tokens=(90, 150))
        ranks.call(given)
        y = torch.full_like(given[0].x, torch.nan)
        last = torch.full_like(given[1].x, torch.nan)
        for rank, out in ((0, y), (1, last)):
            g = given[rank]
            with torch.cuda.stream(ranks.streams[rank]):
                ranks.runners[rank].forward(g.x, g.topk_idx, g.topk_weights, layer.weights[rank], out=out)
            time.sleep(0.5)
        ranks.finish(given, [y, last])


# --- two GPUs ---


def _killed(rank: int, world_size: int, group: dist.ProcessGroup, recipe: str) -> dict[str, Any]:
    layer = Layer(replace(BASE, recipe=recipe, device=f"cuda:{rank}"), world_size)
    runner, given = create(layer, rank, group), layer.given(rank, tokens=(120,))
    for step in range(1000):
        if step == 20 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        y = runner.forward(given.x, given.topk_idx, given.topk_weights, layer.weights[rank])
        torch.cuda.synchronize()
        try:
            runner.check()
        except PeerTimeout as error:
            a = torch.randn(256, 256, device="cuda")
            return {
                "error": str(error),
                "step": step,
                "seconds": time.monotonic() - begin,
                "nan": bool(y.isnan().all()),
                "gemm": float((a @ a).abs().sum()),
            }
    return {}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_rank_is_named(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "10")
    result, died = spawn_ranks(2, _killed, recipe, backend="cpu:gloo,cuda:nccl")
    assert isinstance(died, RankDied)
    assert isinstance(result, dict), result
    assert "rank 0 waited longer than" in result["error"] and "for rank 1 to" in result["error"], result
    assert result["nan"] and result["gemm"] > 0 and result["step"] >= 19, result
    assert result["seconds"] < 14, result


def _late(rank: int, world_size: int, group: dist.ProcessGroup, recipe: str) -> list[str]:
    wrong = []
    layer = Layer(replace(BASE, recipe=recipe, device=f"cuda:{rank}"), world_size)
    runner = create(layer, rank, group)
    for turn in range(3):
        given = layer.given(rank, seed=turn)
        if turn % 2 == rank:
            time.sleep(2)
        y = runner.forward(given.x, given.topk_idx, given.topk_weights, layer.weights[rank])
        torch.cuda.synchronize()
        dist.barrier(group)
        try:
            runner.check()
            layer.check(runner, given, y, f"turn {turn}")
        except (AssertionError, PeerTimeout) as error:
            wrong.append(str(error))
        dist.barrier(group)
    runner.close()
    return wrong


@pytest.mark.multi_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_late_rank_is_waited_for_on_two(recipe: str) -> None:
    assert spawn_ranks(2, _late, recipe, backend="cpu:gloo,cuda:nccl") == [[], []]
