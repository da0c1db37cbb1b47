"""torchtitan's MoE with its routed experts through mega_moe: the stock layer's results, names and checkpoints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan", reason="needs torchtitan; .ci/client_torchtitan runs these tests")

from megamoe.testing.numerics import assert_close, difference
from megamoe.testing.ranks import RankPool
from tests.adapters import titan_case as case
from tests.repo import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # its router asks for fp32


def results(module: Any, x: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output, and gradients of x and every parameter for a fixed gradient of the output."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", case.KINDS)
def test_fp32_is_the_formula(kind: str) -> None:
    module, x = case.build(kind, ours={"recipe": "fp32"}), case.tokens()
    ours = results(module, x, module)
    expected = results(module, x, lambda x: case.formula(kind, module, x))
    assert set(ours) == set(expected) and len(ours) == (6 if kind == "swiglu" else 7)
    for name, tensor in expected.items():
        assert difference(ours[name], tensor) < 1e-11, name


@pytest.mark.parametrize("kind", case.KINDS)
def test_bf16_is_as_near_as_the_stock_layer(kind: str) -> None:
    """Both round to bf16 on the way; neither may be farther from the formula than bf16 explains."""
    x = case.tokens(20).bfloat16()
    stock, module = case.build(kind).bfloat16(), case.build(kind, ours={"recipe": "bf16"}).bfloat16()
    expected = results(module, x, lambda x: case.formula(kind, module, x))
    ours, theirs = results(module, x, module), results(stock, x, stock)
    for name, tensor in expected.items():
        limit = 4 * difference(theirs[name], tensor) + 1e-6
        assert difference(ours[name], tensor) < min(limit, 1e-3), name
        assert ours[name].dtype == theirs[name].dtype


@pytest.mark.parametrize("kind", case.KINDS)
def test_checkpoints_load_both_ways(kind: str) -> None:
    stock, ours = case.build(kind), case.build(kind, ours={})
    assert list(stock.state_dict()) == list(ours.state_dict())
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(0.5)
    stock.load_state_dict(ours.state_dict())
    ours.load_state_dict(stock.state_dict())
    x = case.tokens()
    assert_close(ours(x), case.formula(kind, ours, x), whole=1e-3, row=1e-2)


def test_no_tokens() -> None:
    module = case.build(ours={"recipe": "fp32"})
    assert module(torch.zeros(2, 0, case.D)).shape == (2, 0, case.D)


def _parallel(rank: int, world_size: int, group: Any, kind: str, backend: str, axes: dict[str, int]) -> None:  # noqa: PLR0917
    """A layer over two ranks against the whole one; each rank its own tokens under EP, the same ones under TP."""
    import spmd_types as spmd
    import torchtitan.distributed.parallel_dims
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.moe_sharding import set_moe_sharding_config

    whole = case.build(kind, ours={"recipe": "fp32"})
    made = case.config(kind, ours={"recipe": "fp32"})
    ep = axes["ep"] > 1
    layout = {"w1_EFD": spmd.S(1), "w2_EDF": spmd.S(2), "w3_EFD": spmd.S(1)}
    if kind == "gpt_oss":
        layout = dict.fromkeys(("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED"), spmd.R)
    set_moe_sharding_config(made, enable_ep=ep, enable_sp=False, expert_param_layout=layout)
    module = made.build()
    module.init_states()
    module.load_state_dict(whole.state_dict())
    set_spmd_backend(backend)
    torchtitan.distributed.parallel_dims.device_type = (
        "cpu"  # it takes a machine without accelerators for one with CUDA
    )
    dims = ParallelDims(
        dp_replicate=1,
        cp=1,
        pp=1,
        world_size=world_size,
        spmd_backend=backend,
        **axes,  # type: ignore[arg-type]
    )
    dims.build_mesh()
    module.routed_experts.parallelize(dims)
    x = case.tokens(seed=rank if ep else 0)
    scores, ids, _ = whole.router(x, None)
    counts = torch.bincount(ids.flatten(), minlength=case.E)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    x_ours, x_whole = x.clone().requires_grad_(), x.clone().requires_grad_()
    routed = module.routed_experts
    # The region's inside, on local tensors: what stands around it belongs to torchtitan.
    y = type(routed).forward(routed, x_ours, scores.detach(), ids, counts)
    y.backward(grad)
    expected = whole.routed_experts(x_whole, scores.detach(), ids, counts)
    expected.backward(grad)
    assert x_ours.grad is not None and x_whole.grad is not None
    if ep:
        y_whole, dx = y, x_ours.grad
    else:  # partial sums over the columns of tensor parallelism
        y_whole, dx = y.detach().clone(), x_ours.grad.clone()
        torch.distributed.all_reduce(y_whole, group=group)
        torch.distributed.all_reduce(dx, group=group)
    assert difference(y_whole, expected) < 1e-11
    assert difference(dx, x_whole.grad) < 1e-11
    ours = dict(routed.inner_experts.named_parameters())
    for name, parameter in whole.routed_experts.inner_experts.named_parameters():
        total = parameter.grad
        assert total is not None
        if ep:  # the experts here have seen the tokens of both ranks
            torch.distributed.all_reduce(total, group=group)
            mine = total.chunk(world_size)[rank]
        else:
            mine = total.chunk(world_size, dim=2 if name == "w2_EDF" else 1)[rank]
        local = ours[name].grad
        local = local.to_local() if hasattr(local, "to_local") else local
        assert local.shape == mine.shape
        assert difference(local, mine) < 1e-11, name


@pytest.mark.parametrize("backend", ["spmd_types", "partial_dtensor"])
@pytest.mark.parametrize("kind", case.KINDS)
def test_expert_parallel(ranks: Callable[[int], RankPool], kind: str, backend: str) -> None:
    ranks(2).run(_parallel, kind, backend, {"ep": 2, "tp": 1, "dp_shard": 2})


@pytest.mark.parametrize("backend", ["spmd_types", "partial_dtensor"])
def test_tensor_parallel_without_expert_parallel(ranks: Callable[[int], RankPool], backend: str) -> None:
    ranks(2).run(_parallel, "swiglu", backend, {"ep": 1, "tp": 2, "dp_shard": 1})


def test_gpt_oss_refuses_tensor_parallel(ranks: Callable[[int], RankPool]) -> None:
    with pytest.raises(ValueError, match=r"can't split gpt-oss' experts over tensor-parallel ranks \(tp = 2\)"):
        ranks(2).run(_parallel, "gpt_oss", "spmd_types", {"ep": 1, "tp": 2, "dp_shard": 1})


def _under_fsdp(rank: int, world_size: int, group: Any, kind: str) -> None:
    """Shards of every expert on each rank, gathered around the call of inner_experts, where the forward runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, module = (case.build(kind, ours={"recipe": "fp32"}) for _ in range(2))
    fully_shard(module.routed_experts.inner_experts, mesh=init_device_mesh("cpu", (world_size,)))
    x = case.tokens(seed=rank)
    y, expected = module(x), whole(x)
    assert difference(y, expected) < 1e-11
    y.square().mean().backward()
    expected.square().mean().backward()
    ours = dict(module.routed_experts.inner_experts.named_parameters())
    for name, parameter in whole.routed_experts.inner_experts.named_parameters():
        mean = parameter.grad
        assert mean is not None
        torch.distributed.all_reduce(mean, group=group)
        assert difference(ours[name].grad.full_tensor(), mean / world_size) < 1e-11, name


@pytest.mark.parametrize("kind", case.KINDS)
def test_fsdp_around_the_experts(ranks: Callable[[int], RankPool], kind: str) -> None:
    ranks(2).run(_under_fsdp, kind)


def test_what_it_cannot_do_is_refused() -> None:
    from torchtitan.models.common.moe import GroupedExperts

    from megamoe.adapters.torchtitan import megamoe_experts

    class Other(GroupedExperts.Config):  # type: ignore[misc]
        __slots__ = ()

    routed = case.config().routed_experts
    routed.inner_experts = Other(dim=case.D, hidden_dim=case.F, num_experts=case.E)
    with pytest.raises(ValueError, match=r"takes GroupedExperts and GptOssGroupedExperts, got .*Other"):
        megamoe_experts(routed)
    odd = case.config().routed_experts
    odd.inner_experts.hidden_dim = 52
    with pytest.raises(ValueError, match="intermediate must be a multiple of 8"):
        megamoe_experts(odd)
    with pytest.raises(TypeError, match="precision"):
        case.config(ours={"precision": "bf16"})
    with pytest.raises(ValueError, match="recipe must be one of"):
        case.config(ours={"recipe": "fp4"})


def test_the_pages_example(tmp_path: Path) -> None:
    page = (ROOT / "docs/torchtitan.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (distance,) = re.findall(r"^difference ([\d.e+-]+)$", done.stdout, flags=re.MULTILINE)
    assert float(distance) < 1e-3
