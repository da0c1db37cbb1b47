"""Shared experts as the first experts of every rank: form, memory, machine code, y on virtual ranks and two GPUs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megamoe.activation import Activation
from megamoe.errors import PeerTimeout
from megamoe.kernels.jit.sweep import sweep
from megamoe.mega.kernels import cases_for
from megamoe.mega.runner import MegaRunner, config_for, why_not, workspace_for
from megamoe.problem import Problem
from megamoe.shared import SharedExperts
from megamoe.testing import routing
from megamoe.testing.ranks import spawn_ranks
from megamoe.weights import ExpertWeights
from tests.engines.cases import Case
from tests.mega.problems import BASE, Layer, Virtual, create

PROBLEM = Problem(hidden=64, intermediate=24, num_experts=8, top_k=2, world_size=2, max_tokens=40)
# (recipe, experts that are shared, what else): each a kernel.
FORMS = [
    ("bf16", 1, {"bias": True}),
    ("fp8_block", 1, {}),
    ("fp8_block", 2, {"top_k": 8, "activation": "relu2", "weights_applied": "before_down"}),
    ("fp8_row", 2, {"top_k": 1, "bias": True}),
]


def mlp(case: Case, num_shared: int) -> SharedExperts:
    """The dense module that the shared experts are, on the case's device."""
    width, activation = num_shared * case.intermediate, case.problem(1).activation
    module = SharedExperts(case.hidden, width, activation, bias=case.bias)
    module.reset_parameters(seed=case.seed)
    for bias in (module.b13, module.b2):
        if bias is not None:
            torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(5))
    return module.to(case.device)


def layer_of(form: tuple[str, int, dict], world_size: int, **changes: object) -> Layer:
    recipe, num_shared, fields = form
    case = replace(BASE, recipe=recipe, **{**fields, **changes})
    return Layer(case, world_size, shared=mlp(case, num_shared).as_experts(case.intermediate))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamped", "relu2"])
def test_the_experts_add_up_to_the_dense_module(activation: str, bias: bool) -> None:
    module = mlp(replace(BASE, activation=activation, bias=bias, hidden=64, intermediate=24, device="cpu"), 3)
    experts = module.as_experts(24)
    experts.check(replace(PROBLEM, activation=Activation(activation), bias=bias), 3)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(5, 64)
    for e in range(3):
        b13, b2 = (None if b is None else b[e] for b in (experts.b13, experts.b2))
        h13 = torch.nn.functional.linear(x, experts.w13[e], b13)
        total += torch.nn.functional.linear(module.activation(h13), experts.w2[e], b2)
    torch.testing.assert_close(total, module(x))
    with pytest.raises(ValueError, match="must divide the width of the shared experts, 72, got 16"):
        module.as_experts(16)
    with pytest.raises(ValueError, match="all have biases or all have none"):
        ExpertWeights.cat(experts, replace(experts, b13=experts.w13.new_zeros(3, len(experts.w13[0])), b2=None))


def test_every_token_of_a_rank_visits_its_own() -> None:
    workspace = workspace_for(PROBLEM, 4, 2)
    idx = torch.tensor([[0, 3], [7, -1], [-1, -1]], dtype=torch.int32)
    assert workspace.physical(idx, 0).tolist() == [[2, 5, 0, 1], [11, -1, 0, 1], [-1, -1, 0, 1]]
    assert workspace.physical(idx, 1).tolist() == [[2, 5, 6, 7], [11, -1, 6, 7], [-1, -1, 6, 7]]
    plain = workspace_for(PROBLEM, 4)
    assert torch.equal(plain.physical(idx, 1), idx.long())
    # All tokens of all ranks to two experts, and this rank's to both shared ones.
    assert workspace.max_routes == plain.max_routes + 2 * PROBLEM.max_tokens
    assert workspace.arena.fields["results"].shape == (40, 4, 64) and workspace.max_copies == 2
    assert workspace_for(replace(PROBLEM, top_k=1), 4, 1).max_copies == 2
    assert workspace_for(replace(PROBLEM, world_size=1), 8, 1).max_copies == 1


def test_refusals_are_sentences() -> None:
    assert why_not(replace(PROBLEM, num_experts=64, top_k=15), 32, 1) is None
    for top_k, shared in ((15, 2), (2, -1)):
        reason = why_not(replace(PROBLEM, num_experts=64, top_k=top_k), 32, shared)
        assert reason == f"a token may visit 16 experts, shared ones included, not {top_k} + {shared}"
    assert "1024 experts, not 1025" in str(why_not(PROBLEM, 1024, 1))
    assert "max_tokens * top_k" in str(why_not(replace(PROBLEM, max_tokens=1 << 30), 4, 2))
    with pytest.raises(ValueError, match="shared ones included"):
        MegaRunner.virtual(PROBLEM, device="cuda", num_shared=15)
    plain, shared = (config_for(PROBLEM, 4, index_64=True, num_shared=n) for n in (0, 1))
    assert plain.name != shared.name and plain.source() != shared.source()


@pytest.mark.parametrize("form", [FORMS[2], FORMS[3]], ids=str)
def test_machine_code_is_fit(form: tuple[str, int, dict]) -> None:
    recipe, num_shared, fields = form
    case = next(iter(cases_for(replace(BASE, recipe=recipe, **fields).problem(2), num_shared)))
    (verdict,) = sweep([case])
    assert verdict.faults == ()


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_routings(form: tuple[str, int, dict], world_size: int) -> None:
    layer = layer_of(form, world_size)
    with Virtual(layer) as ranks:
        for turn, kind in enumerate(routing.KINDS):
            tokens = BASE.tokens[turn:] + BASE.tokens[:turn]
            ranks.call(layer.all_given(seed=turn, kind=kind, tokens=tokens), kind)
        nowhere = [replace(g, topk_idx=torch.full_like(g.topk_idx, -1)) for g in layer.all_given()]
        ys = ranks.call(nowhere, "shared experts alone")
        assert all(bool(y.any(dim=1).all()) for y in ys)
        ranks.call(layer.all_given(tokens=(0,)), "no tokens")
        ranks.call(layer.all_given(tokens=(1, 0)), "one token")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_random_sizes(form: tuple[str, int, dict]) -> None:
    for seed in range(12):
        r = random.Random(seed)
        layer = layer_of(
            form, r.choice([1, 2, 4]), seed=seed, kind=r.choice(list(routing.KINDS)),
            hidden=8 * r.randint(4, 80), intermediate=8 * r.randint(4, 60),
            tokens=tuple(r.choice([0, 1, r.randint(2, 300)]) for _ in range(4)),
        )  # fmt: skip
        with Virtual(layer) as ranks:
            first = ranks.call(layer.all_given(), f"seed {seed}")
            for y, again in zip(first, ranks.call(layer.all_given(), "again"), strict=True):
                assert torch.equal(y, again)


def _on_two(rank: int, world_size: int, group: dist.ProcessGroup) -> list[str]:
    """What is wrong, on one rank. No rank raises, so none leaves the others."""
    wrong = []
    for form in FORMS:
        layer = layer_of(form, world_size, device=f"cuda:{rank}")
        runner = create(layer, rank, group)
        for turn, kind in enumerate(routing.KINDS):
            given = layer.given(rank, seed=turn, kind=kind)
            y = torch.full_like(given.x, torch.nan)
            runner.forward(given.x, given.topk_idx, given.topk_weights, layer.weights[rank], out=y)
            torch.cuda.synchronize()
            dist.barrier(group)
            try:
                runner.check()
                layer.check(runner, given, y, f"{form}, {kind},")
            except (AssertionError, PeerTimeout) as error:
                wrong.append(str(error))
            dist.barrier(group)
        runner.close()
        dist.barrier(group)
    return wrong


@pytest.mark.multi_gpu
def test_on_two_gpus() -> None:
    wrong = [text for texts in spawn_ranks(2, _on_two, backend="cpu:gloo,cuda:nccl", timeout_s=280) for text in texts]
    assert not wrong, "\n".join(wrong)
