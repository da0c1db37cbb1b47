"""The torch.library ops: what torch asks of them, and what may be built around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from megamoe import ExpertWeights, mega_moe
from megamoe.dispatch.placement import Placement
from megamoe.testing.ranks import RankPool
from tests.engines.cases import WEIGHT_NAMES, Case

Ranks = Callable[[int], RankPool]
CASE = Case(experts=6, top_k=2, bias=True, tokens=(8, 5))


class Block(torch.nn.Module):
    """A router and its experts around the op, with a residual; x [B, S, H]."""

    def __init__(self, case: Case, rank: int, world_size: int, **choices: object) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.randn(case.experts, case.hidden, generator=torch.manual_seed(0)))
        weights = case.weights(rank, world_size)
        for name in WEIGHT_NAMES:
            self.register_parameter(name, torch.nn.Parameter(getattr(weights, name)))
        self.problem = case.problem(world_size)
        self.choices = choices

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        topk_weights, idx = (x.float() @ self.gate.T).softmax(-1).topk(self.problem.top_k)
        weights = ExpertWeights(self.w13, self.w2, self.b13, self.b2)
        return x + mega_moe(x, idx, topk_weights, weights, problem=self.problem, **self.choices)  # type: ignore[arg-type]


def _outcome(block: Block, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients of a function of it that is not linear."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    y = call(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)]


def _assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["staged", "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(engine: str, bias: bool) -> None:
    case = replace(CASE, bias=bias)
    x, idx, topk_weights, grad_y = case.inputs(0, 1)
    weights = case.weights(0, 1)
    tensors = [x, topk_weights, *(t for t in (weights.w13, weights.w2, weights.b13, weights.b2) if t is not None)]
    for t in tensors:
        t.requires_grad_()
    text = (case.problem(1).to_json(), "", engine, "")
    arguments = (x, idx, topk_weights, weights.w13, weights.w2, weights.b13, weights.b2, *text)
    torch.library.opcheck(torch.ops.megamoe.forward.default, (*arguments, True))
    torch.library.opcheck(torch.ops.megamoe.forward.default, (*(_detach(a) for a in arguments), False))

    y, *saved = torch.ops.megamoe.forward(*arguments, True)
    detached = [_detach(a) for a in arguments[:7]]
    for need_weights in (True, False):
        torch.library.opcheck(
            torch.ops.megamoe.backward.default, (grad_y, *detached, *saved, text[0], "", "", need_weights)
        )
    assert y.requires_grad and not any(t.requires_grad for t in saved)


def _detach(value: object) -> object:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _compiled(rank: int, world_size: int, group: dist.ProcessGroup | None, backend: str, batches: list[int]) -> None:
    """Eager equals compiled, without graph breaks: one rank by default, more with a group and a placement given."""
    case = replace(CASE, slots=((5, 0, 3), (1, 4, 2)) if world_size == 2 else None)
    choices = {"group": group, "placement": case.placement()} if group else {}
    block = Block(case, rank, world_size, **choices)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for batch in batches:
        x = torch.randn(batch, 3 + rank, case.hidden)
        _assert_same(_outcome(block, compiled, x), _outcome(block, block, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))


def test_compiles_without_graph_breaks(ranks: Ranks) -> None:
    _compiled(0, 1, None, "aot_eager", [2, 3])
    ranks(2).run(_compiled, "aot_eager", [2])


def test_compiles_with_inductor() -> None:
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as error:
        pytest.skip(f"inductor can't compile here: {type(error).__name__}")
    _compiled(0, 1, None, "inductor", [2])


def _checkpointed(rank: int, world_size: int, group: dist.ProcessGroup) -> None:
    block = Block(CASE, rank, world_size)
    x = torch.randn(2, 4 + rank, CASE.hidden)
    again = _outcome(block, lambda x: checkpoint(block, x, use_reentrant=False), x)
    for a, e in zip(again, _outcome(block, block, x), strict=True):
        assert torch.equal(a, e)


def test_activation_checkpointing(ranks: Ranks) -> None:
    ranks(2).run(_checkpointed)


@pytest.mark.parametrize("engine", ["staged", "reference"])
@pytest.mark.parametrize("recipe", ["bf16", "fp32"])
def test_autocast_casts_x_and_nothing_inside(recipe: str, engine: str) -> None:
    """x takes the recipe's dtype, whatever autocast's is; the router's weights and the sums inside stay fp32."""
    case = replace(CASE, recipe=recipe)
    x, idx, topk_weights, grad_y = case.inputs(0, 1)
    weights, problem = case.weights(0, 1), case.problem(1)
    weights.w13.requires_grad_()
    outcomes = []
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            given = x.float() if autocast else x
            y = mega_moe(given, idx, topk_weights, weights, problem=problem, engine=engine)
            outcomes.append((y, *torch.autograd.grad(y, weights.w13, grad_y)))
    for plain, cast in zip(*outcomes, strict=True):
        assert plain.dtype == cast.dtype
        assert torch.equal(plain, cast)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    case = replace(CASE, bias=False)
    x, idx, topk_weights, _ = case.inputs(0, 1)
    weights = case.weights(0, 1)
    x.requires_grad_()
    mega_moe(x, idx, topk_weights, weights, problem=case.problem(1)).sum().backward()
    assert x.grad is not None and weights.w13.grad is None
    whole = x.grad.clone()

    x = x.detach()
    weights.w2.requires_grad_()
    mega_moe(x, idx, topk_weights, weights, problem=case.problem(1)).sum().backward()
    assert weights.w2.grad is not None and weights.w2.grad.any()
    assert whole.any()

    with torch.no_grad():
        assert not mega_moe(x, idx, topk_weights, weights, problem=case.problem(1)).requires_grad


def test_nothing_is_saved_where_nothing_is_differentiated() -> None:
    x, idx, topk_weights, _ = CASE.inputs(0, 1)
    w = CASE.weights(0, 1)
    outputs = torch.ops.megamoe.forward(
        x, idx, topk_weights, w.w13, w.w2, w.b13, w.b2, CASE.problem(1).to_json(), "", "staged", "", False
    )
    assert [t.numel() for t in outputs[1:3]] == [0, 0]
    outputs[0].add_(x)  # y shares no memory with x


def test_placement_travels_as_text() -> None:
    placement = Placement(torch.tensor([[2, 0], [1, 3]]))
    assert Placement.from_json(placement.to_json()) == placement
