"""Real ranks, a GPU each: y of every routing and form, and thousands of bits that repeat."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megamoe.errors import PeerTimeout
from megamoe.testing import routing
from megamoe.testing.ranks import spawn_ranks
from tests.mega.problems import BASE, CHOICES, RECIPES, Layer, case_of, create

pytestmark = [pytest.mark.multi_gpu, pytest.mark.usefixtures("kernels")]


def _forms(rank: int, world_size: int, group: dist.ProcessGroup, recipe: str) -> list[str]:
    """What is wrong, on one rank. No rank raises, so none leaves the others."""
    wrong = []
    for form in [form for r, form in CHOICES if r == recipe]:
        case, index = case_of(form, recipe)
        layer = Layer(replace(case, device=f"cuda:{rank}"), world_size, index=index)
        runner = create(layer, rank, group)
        for turn, kind in enumerate(routing.KINDS):
            tokens = BASE.tokens[turn:] + BASE.tokens[:turn]
            given = layer.given(rank, seed=turn, kind=kind, tokens=tokens)
            ys = [torch.full_like(given.x, torch.nan) for _ in range(3)]
            for y in ys:
                runner.forward(given.x, given.topk_idx, given.topk_weights, layer.weights[rank], out=y)
            torch.cuda.synchronize()
            dist.barrier(group)
            try:
                runner.check()
                layer.check(runner, given, ys[-1], f"{form}, {kind},")
                assert all(torch.equal(y, ys[0]) for y in ys), f"{form}, {kind}: other bits"
            except (AssertionError, PeerTimeout) as error:
                wrong.append(str(error))
            dist.barrier(group)
        runner.close()
        dist.barrier(group)
    return wrong


@pytest.mark.parametrize("recipe", RECIPES)
def test_forms_and_routings(recipe: str) -> None:
    wrong = [
        text for texts in spawn_ranks(2, _forms, recipe, backend="cpu:gloo,cuda:nccl", timeout_s=280) for text in texts
    ]
    assert not wrong, "\n".join(wrong)


def _partial(rank: int, world_size: int, group: dist.ProcessGroup, recipe: str) -> list[str]:
    wrong = []
    case = replace(BASE, recipe=recipe, hidden=520, tokens=(900, 300), device=f"cuda:{rank}")
    layer = Layer(case, world_size)
    runners = [create(layer, rank, group, partial_sums=on) for on in (False, True)]
    for turn, kind in enumerate(routing.KINDS):
        for tokens in ((900, 300), (33, 900), (0, 150), (384, 7)):
            given = layer.given(rank, seed=turn, kind=kind, tokens=tokens)
            ys: list[torch.Tensor] = []
            for runner, times in zip(runners, (1, 20), strict=True):
                for _ in range(times):
                    y = torch.full_like(given.x, torch.nan)
                    runner.forward(given.x, given.topk_idx, given.topk_weights, layer.weights[rank], out=y)
                    ys.append(y)
                torch.cuda.synchronize()
                dist.barrier(group)
            try:
                for runner in runners:
                    runner.check()
                assert all(torch.equal(y, ys[0]) for y in ys), f"rank {rank}, {kind}, {tokens}: other bits"
            except (AssertionError, PeerTimeout) as error:
                wrong.append(str(error))
            dist.barrier(group)
    for runner in runners:
        runner.close()
    return wrong


@pytest.mark.parametrize("recipe", RECIPES)
def test_partial_sums_are_the_same_bits(recipe: str) -> None:
    assert spawn_ranks(2, _partial, recipe, backend="cpu:gloo,cuda:nccl") == [[], []]


def _graphs(rank: int, world_size: int, group: dist.ProcessGroup, recipe: str) -> list[str]:
    wrong = []
    layer = Layer(replace(BASE, recipe=recipe, device=f"cuda:{rank}"), world_size)
    runner, held = create(layer, rank, group), layer.given(rank, tokens=(150,))
    count = torch.tensor([150], dtype=torch.int32, device="cuda")
    out = torch.zeros_like(held.x)
    options = {"out": out, "num_tokens": count}
    runner.forward(held.x, held.topk_idx, held.topk_weights, layer.weights[rank], **options)
    torch.cuda.synchronize()
    dist.barrier(group)
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog may touch the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        runner.forward(held.x, held.topk_idx, held.topk_weights, layer.weights[rank], **options)
    for turn, kind in enumerate(routing.KINDS):
        given = layer.given(rank, seed=turn, kind=kind)
        n = len(given.x)
        held.x[:n], held.topk_idx[:n], held.topk_weights[:n] = given.x, given.topk_idx, given.topk_weights
        count.fill_(n)
        out.fill_(7.0)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        dist.barrier(group)
        try:
            runner.check()
            layer.check(runner, given, out[:n], f"replay {kind},")
            assert bool((out[n:] == 7).all()), "rows beyond T were written"
        except (AssertionError, PeerTimeout) as error:
            wrong.append(str(error))
        dist.barrier(group)
    runner.close()
    return wrong


@pytest.mark.parametrize("recipe", RECIPES)
def test_graphs(recipe: str) -> None:
    assert spawn_ranks(2, _graphs, recipe, backend="cpu:gloo,cuda:nccl") == [[], []]
