"""The mega-kernel's twin against the reference, and its reading of a workspace that was filled by plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamoe.activation import Activation
from megamoe.engines import reference
from megamoe.engines.recipes import round_weight
from megamoe.kernels.quant import reference as casts
from megamoe.mega.runner import config_for
from megamoe.mega.workspace import Workspace
from megamoe.problem import Problem
from megamoe.symm_mem.buffer import SymmBuffer
from megamoe.testing import routing
from megamoe.testing.mega_activations import Activations, Pool, check_activations, check_fast, kernel_activations
from megamoe.testing.mega_twin import SUMS, Expert, layer, sums_error

PROBLEM = Problem(hidden=136, intermediate=152, num_experts=8, top_k=3, world_size=2, max_tokens=40, recipe="fp8_block")
FORMS = {
    "plain": {},
    "bias": {"bias": True, "activation": Activation("swiglu_clamped")},
    "before": {"bias": True, "weights_applied": "before_down"},
    "bf16": {"recipe": "bf16"},
    "row": {"recipe": "fp8_row"},
}
CASTS = {
    "fp8_block": (casts.cast_1x128, casts.dequantise_1x128),
    "fp8_row": (lambda v: casts.cast_row(v.bfloat16().float()), casts.dequantise_row),
}


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
def test_layer_is_the_reference(form: str) -> None:
    problem = replace(PROBLEM, **FORMS[form])
    E, H, inter, T = problem.num_experts, problem.hidden, problem.intermediate, 20
    x, w13, w2 = randn(T, H, seed=0), randn(E, 2 * inter, H, seed=1) * 0.1, randn(E, H, inter, seed=2) * 0.1
    b13, b2 = (randn(E, 2 * inter, seed=3), randn(E, H, seed=4)) if problem.bias else (None, None)
    idx, weights = routing.masked(T, E, problem.top_k, torch.Generator().manual_seed(5))
    want = reference.moe(x, weights, w13, w2, b13=b13, b2=b2, slots=idx, problem=problem, num_ranks=2)

    def expert(e: int) -> Expert:
        matrices = round_weight(w13[e], problem, stacked=True), round_weight(w2[e], problem, stacked=False)
        return Expert(*matrices, None if b13 is None else b13[e], None if b2 is None else b2[e])

    twin = layer(x, idx, weights, expert, problem=problem, slots_per_rank=4)
    torch.testing.assert_close(twin.y, want, rtol=1e-5, atol=1e-5)
    # Activations as the reference rounds them give the reference's y; others do not.
    if problem.recipe == "bf16":
        a = twin.exact.bfloat16().float()
    else:
        cast, dequantise = CASTS[problem.recipe]
        a = dequantise(*cast(twin.exact))
    again = layer(x, idx, weights, expert, problem=problem, slots_per_rank=4, mid=a)
    assert again.y_from_mid is not None
    torch.testing.assert_close(again.y_from_mid, again.y, rtol=0, atol=0)
    other = layer(x, idx, weights, expert, problem=problem, slots_per_rank=4, mid=a * 1.01)
    assert not torch.allclose(other.y_from_mid, other.y, rtol=1e-5, atol=1e-5)


def place(problem: Problem, workspace: Workspace, routes: list[torch.Tensor]) -> tuple[list[SymmBuffer], torch.Tensor]:
    """Workspaces as the kernel leaves them, and the activations of [R, T, K] in them; by loops over experts."""
    R, S, K, inter = problem.world_size, workspace.slots, problem.top_k, problem.intermediate
    buffers = SymmBuffer.virtual(workspace.arena, R, device="cpu")
    values = randn(R, problem.max_tokens, K, inter, seed=9)
    draw = torch.Generator().manual_seed(10)
    for owner in range(R):
        fields = buffers[owner].peer(owner)
        words = fields["routes"].view(torch.int32).view(R, -1, 4)
        mid = fields["mid"].view(torch.uint8)
        filled = [0] * R
        row = 0
        for s in range(S):
            for source in range(R):
                fields["offsets"][source, s] = filled[source]
                t, k = (routes[source] == owner * S + s).nonzero(as_tuple=True)
                for i in torch.randperm(len(t), generator=draw).tolist():  # atomics: any order
                    words[source, filled[source], 1] = int(t[i]) * K + int(k[i])
                    q, scale = CASTS[problem.recipe][0](values[source, t[i], k[i]][None])
                    mid[row, :inter] = q.view(torch.uint8)[0]
                    fields["mid_scales"][: scale[0].numel(), row] = scale[0]
                    filled[source] += 1
                    row += 1
            row = -(-row // 128) * 128
        for source in range(R):
            fields["offsets"][source, S] = filled[source]
    return buffers, values


@pytest.mark.parametrize("recipe", CASTS)
@pytest.mark.parametrize("kind", ["balanced", "all_to_one", "masked"])
def test_finds_the_activations_of_every_route(kind: str, recipe: str) -> None:
    problem = replace(PROBLEM, max_tokens=150, recipe=recipe)  # more than one block for an expert
    config = config_for(problem, 4, index_64=True)
    workspace = Workspace(problem=problem, config=config, slots=4)
    draw = torch.Generator().manual_seed(3)
    routes = [routing.KINDS[kind](150, 8, 3, draw)[0] for _ in range(2)]
    buffers, values = place(problem, workspace, routes)
    tokens = torch.tensor([0, 7, 149])
    for source in range(2):
        slots = routes[source][tokens]
        views = [buffers[source].peer(r) for r in range(2)]
        got = kernel_activations(views, workspace, source, tokens, slots)
        cast, dequantise = CASTS[recipe]
        want = dequantise(*cast(values[source, tokens])).masked_fill((slots < 0)[..., None], 0)
        assert torch.equal(got.values, want)
        assert check_activations(got, values[source, tokens], slots, torch.zeros_like(got.codes)) == 0
    pools = [Pool.of(buffers[0].peer(r), workspace) for r in range(2)]
    assert sum(len(p.row) for p in pools) == sum(int((r >= 0).sum()) for r in routes)
    assert all(len(p.row.unique()) == len(p.row) for p in pools)


def test_check_of_activations_sees_faults() -> None:
    exact, slots = randn(6, 2, 256, seed=11), torch.zeros(6, 2, dtype=torch.int64)
    q, scale = casts.cast_1x128(exact)
    codes, slack = q.float(), torch.full_like(exact, 2.0**-12)
    assert check_activations(Activations(codes, scale), exact, slots, slack) == 0
    by_row, of_row = CASTS["fp8_row"][0](exact)
    assert check_activations(Activations(by_row.float(), of_row[..., None], by_row=True), exact, slots, slack) == 0
    with pytest.raises(AssertionError, match="scale of activations"):
        check_activations(Activations(by_row.float(), of_row[..., None] * 1.01, by_row=True), exact, slots, slack)
    # The largest of each row between two numbers of bf16: its scale may be that of either, and all codes with it.
    edge = exact.clone()
    edge[..., 0] = 4 + 2.0**-6
    q_up, scale_up = CASTS["fp8_row"][0](edge + 2.0**-12 * (torch.arange(256) == 0))
    q_down, scale_down = CASTS["fp8_row"][0](edge)
    assert bool((scale_up > scale_down * 1.003).all()) and float((q_up.float() != q_down.float()).float().mean()) > 0.04
    for q_edge, at_edge in ((q_up, scale_up), (q_down, scale_down)):
        moved = Activations(q_edge.float(), at_edge[..., None], by_row=True)
        assert check_activations(moved, edge, slots, slack) == 0
    with pytest.raises(AssertionError, match="codes of activations"):
        check_activations(Activations(q_down.float(), scale_up[..., None], by_row=True), edge, slots, slack)
    # Sums of their own: other codes, but no less exact; what is off by 3% is too far.
    for factor, whole in ((1.002, True), (1.03, False)):
        off_q, off_scale = CASTS["fp8_row"][0](exact * factor)
        off = Activations(off_q.float(), off_scale[..., None], by_row=True)
        if whole:
            check_fast(off, exact, slots)
        else:
            with pytest.raises(AssertionError, match="to the exact ones"):
                check_fast(off, exact, slots)
    near = exact * (1 + 1e-4 * randn(6, 2, 256, seed=12))
    flips = check_activations(Activations(casts.cast_1x128(near)[0].float(), scale), exact, slots, slack)
    assert 0 < flips < 0.01
    with pytest.raises(AssertionError, match="scale of activations"):
        check_activations(Activations(codes, scale * 1.01), exact, slots, slack)
    wrong = codes.clone()
    wrong[3, 1, 7] = -wrong[3, 1, 7] + 100
    with pytest.raises(AssertionError, match="times what is allowed"):
        check_activations(Activations(wrong, scale), exact, slots, slack)
    wrong[3, 1, 7] = torch.nan
    with pytest.raises(AssertionError, match="times what is allowed"):
        check_activations(Activations(wrong, scale), exact, slots, slack)
    # A step too far, everywhere: each is allowed, so many are not.
    step = torch.exp2((exact / scale.repeat_interleave(128, -1)).abs().clamp(min=2.0**-6).log2().floor() - 3)
    drifted = torch.where(codes.abs() < 400, codes + step * 0.5, codes)
    with pytest.raises(AssertionError, match="codes of activations differ from the reference"):
        check_activations(Activations(drifted, scale), exact, slots, slack)


@pytest.mark.parametrize("name", ["swiglu", "swiglu_clamped", "geglu", "relu2"])
def test_sums_that_lose_bits_stay_within_the_slack(name: str) -> None:
    """K-blocks' sums off by up to 2^-12 of their terms' magnitudes, a quarter of it as a rule: allowed, 8 times not."""
    activation = Activation(name)
    problem = replace(PROBLEM, hidden=256, activation=activation, num_experts=1, top_k=1, world_size=1)
    rows = problem.w13_rows
    x = casts.dequantise_1x128(*casts.cast_1x128(randn(200, 256, seed=0)))
    w13, w2 = randn(rows, 256, seed=1) / 16, randn(256, problem.intermediate, seed=2)
    slots, ones = torch.zeros(200, 1, dtype=torch.int64), torch.ones(200, 1)
    mid = torch.zeros(200, 1, problem.intermediate)
    twin = layer(
        x, slots, ones, lambda _: Expert(w13, w2), problem=problem, slots_per_rank=1, mid=mid, x_is_rounded=True
    )
    assert twin.slack is not None

    def got(part: float) -> Activations:
        h13 = torch.zeros(200, rows)
        for block in (slice(0, 128), slice(128, 256)):
            magnitudes = x[:, block].abs() @ w13[:, block].abs().T
            lost = (randn(200, rows, seed=block.start) / 4).clamp(-1, 1)
            h13 += x[:, block] @ w13[:, block].T + part * magnitudes * lost
        q, scale = casts.cast_1x128(activation(h13)[:, None])
        return Activations(q.float(), scale)

    check_activations(got(2.0**-12), twin.exact, slots, twin.slack)
    with pytest.raises(AssertionError, match=r"times what is allowed|codes of activations"):
        check_activations(got(2.0**-9), twin.exact, slots, twin.slack)


def test_sums_error_counts_every_k_block() -> None:
    x, w = randn(3, 300, seed=3), randn(5, 300, seed=4)
    want = torch.zeros(3, 5)
    for first in range(0, 300, 128):
        want += (x[:, None, first : first + 128] * w[None, :, first : first + 128]).abs().sum(-1) ** 2
    torch.testing.assert_close(sums_error(x, w), SUMS * want.sqrt())
