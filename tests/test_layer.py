"""The MegaMoE layer: its formula, losses, statistics, and what wrappers of torch do with it."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from megamoe import Activation, MegaMoE, RouterConfig
from megamoe.checkpoint import full_state_dict
from megamoe.dispatch.placement import Placement
from megamoe.layer import total_aux_loss
from megamoe.testing.numerics import assert_close, difference
from megamoe.testing.ranks import RankPool
from tests import layer_case as case

Ranks = Callable[[int], RankPool]


def tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, case.H, generator=torch.Generator().manual_seed(seed))


def formula(layer: MegaMoE, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
    """y token by token in float64, from the router's choice."""
    rows = x.reshape(-1, case.H)
    idx, weights, _ = layer.router(x, None if padding is None else ~padding)
    e, act = layer.experts, layer.problem.activation
    y = torch.zeros(rows.shape, dtype=torch.float64)
    for t, row in enumerate(rows.double()):
        for k, expert in enumerate(idx[t].tolist()):
            if expert >= 0:
                h = e.w13[expert].double() @ row + (e.b13[expert].double() if e.b13 is not None else 0)
                out = e.w2[expert].double() @ act(h) + (e.b2[expert].double() if e.b2 is not None else 0)
                y[t] += weights[t, k].double() * out
        if layer.shared is not None:
            s = layer.shared
            h = s.w13.double() @ row + (s.b13.double() if s.b13 is not None else 0)
            y[t] += s.w2.double() @ act(h) + (s.b2.double() if s.b2 is not None else 0)
    return y.view(x.shape)


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamped", "geglu", "relu2"])
@pytest.mark.parametrize(("bias", "num_shared"), [(False, 0), (True, 2)])
def test_formula(activation: Any, bias: bool, num_shared: int) -> None:
    layer = case.moe(activation=activation, bias=bias, num_shared=num_shared)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.rpartition(".")[2].startswith("b"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    x = tokens(3, 4)
    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[0, 2:] = True
    padding[2] = True
    y = layer(x, padding)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert_close(y, formula(layer, x, padding), whole=1e-12, row=1e-11)
    if not num_shared:
        assert not y[padding].any() and y[~padding].abs().min(-1).values.max() > 0
    assert int(layer.expert_counts().sum()) == 6 * case.K


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 1, 3), (0,), (2, 0)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer = case.moe(router=None)
    x = tokens(*shape)
    flat = layer(x.reshape(-1, case.H))
    assert torch.equal(layer(x), flat.view(x.shape))


def test_shared_experts_are_a_sum_of_experts() -> None:
    layer = case.moe(num_shared=3)
    assert layer.shared is not None
    x = tokens(7)
    gate, up = layer.shared.w13.chunk(2)
    one_by_one = sum(
        layer.problem.activation(x @ torch.cat([gate[r], up[r]]).T) @ layer.shared.w2[:, r].T
        for r in (slice(i * case.I, (i + 1) * case.I) for i in range(3))
    )
    assert_close(layer.shared(x), one_by_one, whole=1e-12, row=1e-11)


def test_a_nan_stays_in_its_token() -> None:
    layer = case.moe(num_shared=1)
    x = tokens(2, 6)
    x[1, 2, 5] = torch.nan
    bad = layer(x)
    chosen, _, _ = layer.router(x)
    # Sent where the router sends the NaN, so that every expert multiplies as many rows: with another number of them
    # a BLAS may add in another order.
    layer.router.register_forward_hook(lambda router, arguments, out: (chosen, *out[1:]))
    y = layer(tokens(2, 6))
    assert bad[1, 2].isnan().all() and y.isfinite().all()
    bad[1, 2] = y[1, 2]
    assert torch.equal(bad, y)


def test_losses_belong_to_the_last_call() -> None:
    model = case.net()
    model(tokens(2, 5))
    first, second = model[1].ffn, model[2].ffn
    assert list(first.losses) == ["aux", "seq_aux", "z"]
    assert first.aux_loss.item() == pytest.approx(sum(v.item() for v in first.losses.values()))
    assert total_aux_loss(model).item() == pytest.approx((first.aux_loss + second.aux_loss).item())
    kept = first.losses
    y, losses = first(tokens(2, 5), return_losses=True)
    assert first.losses is kept and losses.keys() == kept.keys() and y.requires_grad
    plain = case.moe(router=None)
    plain(tokens(2, 5))
    assert plain.losses == {} and float(plain.aux_loss) == 0.0


def _weights(rank: int, world_size: int, group: Any, table: list[list[int]] | None) -> Any:
    torch.manual_seed(rank)  # nothing but the generator given may matter
    placement = None if table is None else Placement(torch.tensor(table))
    layer = case.moe(group=group, placement=placement, num_shared=1, bias=True)
    return layer.experts.local_experts, full_state_dict(layer)


@pytest.mark.parametrize(
    ("world_size", "table"),
    [(2, None), (4, None), (2, [[7, 1, 0, 3], [2, 5, 4, 6]]), (2, [[*range(5)], [*range(3, 8)]])],
)
def test_weights_start_the_same_for_any_number_of_ranks(ranks: Ranks, world_size: int, table: Any) -> None:
    expected = case.moe(num_shared=1, bias=True).state_dict()
    outcomes = ranks(world_size).run(_weights, table)
    for _, state in outcomes:
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    held = [e for local, _ in outcomes for e in local]
    assert sorted(set(held)) == list(range(case.E))
    assert len({float(row.double().sum()) for row in expected["experts.w13"]}) == case.E


def test_generator_and_std() -> None:
    layers = [case.moe(seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(layers[0].experts.w2, layers[1].experts.w2)
    assert not torch.equal(layers[0].experts.w2, layers[2].experts.w2)
    assert not torch.equal(layers[0].router.weight, layers[2].router.weight)
    torch.manual_seed(5)
    layer = case.moe(generator=None, init_std=0.02)
    torch.manual_seed(5)
    assert torch.equal(case.moe(generator=None, init_std=0.02).router.weight, layer.router.weight)
    for weight in (layer.router.weight, layer.experts.w13, layer.experts.w2):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert layers[0].experts.w2.std().item() == pytest.approx(case.I**-0.5, rel=0.1)


def _counts(rank: int, world_size: int, group: Any) -> Any:
    layer = case.moe(group=group)
    seen = []
    for call in range(3):
        x = tokens(rank, 4, seed=10 * call + rank)  # rank 0 has none
        layer(x)
        seen.append(torch.bincount(layer.router(x)[0].flatten(), minlength=case.E))
        assert torch.equal(layer.expert_counts(), seen[-1])
    assert torch.equal(layer.expert_counts(running=True), sum(seen))
    everyone = layer.expert_counts(running=True, across=group)
    layer.reset_counts()
    assert not layer.expert_counts(running=True).any() and torch.equal(layer.expert_counts(), seen[-1])
    assert not any("counts" in name or "load" in name for name in layer.state_dict())
    return everyone


def test_load_statistics(ranks: Ranks) -> None:
    first, second = ranks(2).run(_counts)
    assert torch.equal(first, second) and int(first.sum()) == 3 * 4 * case.K


def gradients(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    return found


def _wrapped(rank: int, world_size: int, group: Any, how: str) -> None:
    """Loss, counts and every gradient through a wrapper equal those of a plain call, bit for bit."""
    torch._dynamo.reset()
    layer = case.moe(group=group, num_shared=1) if dist.is_initialized() else case.moe(num_shared=1)
    x = tokens(2, 3 + 2 * rank, seed=rank).requires_grad_()

    def plain() -> torch.Tensor:
        return layer(x).square().mean() + layer.aux_loss

    def checkpointed() -> torch.Tensor:
        y = checkpoint(layer, x, use_reentrant=False)
        return y.square().mean() + layer.aux_loss

    def returned() -> torch.Tensor:
        y, losses = checkpoint(lambda t: layer(t, return_losses=True), x, use_reentrant=False)
        return y.square().mean() + torch.stack(list(losses.values())).sum()

    fn = {"plain": plain, "checkpoint": checkpointed, "returned": returned}[how.removeprefix("compile ")]
    if how.startswith("compile"):
        fn = torch.compile(fn, fullgraph=True, backend="aot_eager")
    results = []
    for again, run in enumerate((plain, fn, fn)):
        layer.reset_counts()
        with torch._dynamo.config.patch(error_on_recompile=again == 2):
            loss = run()
        loss.backward()
        grads = gradients(layer) | {"x": x.grad.clone()}
        x.grad = None
        results.append((loss.detach(), layer.expert_counts(running=True), grads))
    for loss, counts, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(counts, results[0][1]) and int(counts.sum()) == x.shape[1] * 2 * case.K
        assert grads.keys() == results[0][2].keys()
        for name, grad in grads.items():
            assert torch.equal(grad, results[0][2][name]), name


WRAPPERS = ["checkpoint", "compile plain", "compile returned"]


@pytest.mark.parametrize("how", WRAPPERS)
def test_wrappers(how: str) -> None:
    _wrapped(0, 1, None, how)


@pytest.mark.parametrize("how", WRAPPERS)
def test_wrappers_over_ranks(ranks: Ranks, how: str) -> None:
    ranks(2).run(_wrapped, how)


def test_autocast() -> None:
    layer = case.moe(recipe="bf16", num_shared=1)
    x = tokens(4, 5)
    expected = formula(layer, x)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x.to(dtype))
        assert y.dtype == dtype
        assert difference(y, expected) < 1e-4
        y.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    assert layer.aux_loss.dtype == torch.float32


def test_bf16_parameters() -> None:
    layer = case.moe(recipe="bf16", dtype=torch.bfloat16)
    y = layer(tokens(4).bfloat16())
    assert y.dtype == torch.bfloat16
    assert difference(y, formula(layer, tokens(4).bfloat16())) < 1e-4
    assert case.moe().to(torch.bfloat16).last_counts.dtype == torch.int64


def test_deepcopy_and_pickle() -> None:
    layer = case.moe(num_shared=1)
    x = tokens(2, 3)
    y = layer(x)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(x), y)
        with torch.no_grad():
            clone.experts.w13.zero_()
        assert torch.equal(layer(x), y)


def _copied(rank: int, world_size: int, group: Any) -> str:
    model = torch.nn.Sequential(case.moe(group=group))
    x = tokens(2, 3, seed=rank)
    y = model(x)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), y) and clone[0].group is model[0].group
    assert all(p.megamoe_expert and p.allreduce is False for p in clone[0].experts.parameters())
    with pytest.raises(TypeError, match=r"cannot be pickled; save megamoe\.checkpoint"):
        pickle.dumps(model)
    return repr(clone)


def test_deepcopy_in_a_group(ranks: Ranks) -> None:
    text = ranks(2).run(_copied)[0]
    assert "ranks=2, engine=auto" in text and "4 of 8 experts, 16 x 24, swiglu, fp32" in text


def _meta(rank: int, world_size: int, group: Any) -> bool:
    layer = case.moe(group=group, device="meta")
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.experts.w13.megamoe_expert and not layer.experts.w13.allreduce
    state, expected = layer.state_dict(), case.moe(group=group).state_dict()
    return all(torch.equal(state[name], expected[name]) for name in expected)


def test_meta_device(ranks: Ranks) -> None:
    assert ranks(2).run(_meta) == [True, True]


def test_marks_of_a_single_rank() -> None:
    assert all(p.allreduce and not p.megamoe_expert for p in case.moe().experts.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shared": -1}, "num_shared must be at least 0, got -1"),
        ({"recipe": "fp64"}, "recipe must be one of .*, got 'fp64'"),
        ({"activation": "relu"}, "activation must be one of .*, got 'relu'"),
        ({"activation": 3}, "activation must be a megamoe.Activation, got 3"),
        ({"router": "gpt5"}, "router preset must be one of .*, got 'gpt5'"),
        (
            {"router": RouterConfig(hidden=16, num_experts=4, top_k=2)},
            "must have .*'num_experts': 8.* got .*: 4",
        ),
        (
            {"placement": Placement(torch.arange(4).view(1, 4))},
            "placement must be of 8 experts over 1 ranks, got 4 over 1",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.moe(**changes)


def test_bad_input() -> None:
    layer = case.moe()
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., S, 16\] floating point, got \(3, 8\)"):
        layer(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"token_mask must be \(2, 3\) torch\.bool, got \(3, 2\)"):
        layer(tokens(2, 3), torch.zeros(3, 2, dtype=torch.bool))
    assert layer(tokens(2, 3)).shape == (2, 3, 16)


def test_presets_take_this_layers_sizes() -> None:
    layer = case.moe(router="mixtral", activation=Activation("swiglu"))
    assert (layer.router.config.num_experts, layer.router.config.aux_coef) == (8, 0.02)


def _example(rank: int, world_size: int, group: Any, code: str) -> Any:
    scope: dict[str, Any] = {}
    exec(code, scope)
    return float(scope["loss"].detach()), full_state_dict(scope["model"])


def test_the_documents_example_runs(ranks: Ranks) -> None:
    text = (Path(__file__).parent.parent / "docs" / "layer.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    start = 'dist.init_process_group("gloo")'
    assert start in code
    outcomes = ranks(2).run(_example, code.replace(start, "pass"))  # the pool's ranks have a group already
    assert all(torch.equal(outcomes[0][1][name], tensor) for name, tensor in outcomes[1][1].items())
    assert outcomes[0][0] != outcomes[1][0]
