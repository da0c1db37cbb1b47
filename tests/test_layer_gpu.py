"""The layer on GPUs: the CPU's tests once more where the device, NCCL or a compiler for it could make a difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from megamoe.checkpoint import full_state_dict, load_safetensors, save_safetensors
from megamoe.testing.numerics import assert_close, difference
from megamoe.testing.ranks import RankPool
from tests import layer_case as case
from tests.test_layer_fsdp import shard

STEPS = range(3)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    # On CUDA the foreach step refuses DTensors (FSDP's dense parameters) beside plain tensors (the experts).
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, foreach=False)


@pytest.mark.gpu
def test_one_gpu_trains_as_the_cpu(record_property: Any) -> None:
    cpu = case.net()
    gpu = case.net().cuda()
    expected = case.train(cpu, sgd(cpu), STEPS)
    for got, want in zip(case.train(gpu, sgd(gpu), STEPS), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    worst = 0.0
    for name, tensor in gpu.state_dict().items():
        worst = max(worst, difference(tensor.cpu(), cpu.state_dict()[name]))
        assert_close(tensor.cpu(), cpu.state_dict()[name], whole=1e-9, row=1e-8, what=name)
    record_property("diff", worst)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_and_checkpointed(backend: str) -> None:
    layer = case.moe(recipe="bf16", num_shared=1, device="cuda")
    x = torch.randn(2, 40, case.H, device="cuda", requires_grad=True)

    def loss() -> torch.Tensor:
        y, losses = checkpoint(lambda t: layer(t, return_losses=True), x, use_reentrant=False)
        return y.square().mean() + torch.stack(list(losses.values())).sum()

    results = []
    for fn in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        layer.reset_counts()
        value = fn()
        value.backward()
        grads = {name: p.grad.clone() for name, p in layer.named_parameters()} | {"x": x.grad.clone()}
        layer.zero_grad()
        x.grad = None
        results.append((float(value.detach()), layer.expert_counts(running=True), grads))
    (plain, counts, grads), (compiled, compiled_counts, compiled_grads) = results
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert torch.equal(counts, compiled_counts) and int(counts.sum()) == 80 * case.K
    for name, grad in grads.items():
        assert difference(compiled_grads[name], grad) < 1e-4, name


@pytest.mark.gpu
def test_autocast() -> None:
    layer = case.moe(recipe="bf16", num_shared=1, device="cuda")
    x = torch.randn(4, 50, case.H, device="cuda")
    expected = layer(x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32 and difference(y, expected) < 1e-4
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def _train(rank: int, world_size: int, group: Any, wrapper: str, folder: str) -> Any:
    model = case.net({"group": group}).cuda()
    if wrapper == "fsdp":
        wrapped = shard(model, init_device_mesh("cuda", (world_size,)), None)
    else:
        wrapped = case.ddp(model, device_ids=[torch.cuda.current_device()])
    optimizer = sgd(model)
    curve = case.train(wrapped, optimizer, STEPS, rank, world_size)
    save_safetensors(model, folder, optimizer)
    loaded = case.net({"group": group}).cuda()
    load_safetensors(loaded, folder)
    return full_state_dict(wrapped), full_state_dict(loaded), curve


@pytest.mark.multi_gpu
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_gpus_train_as_one_cpu_rank(wrapper: str, tmp_path: Path, record_property: Any) -> None:
    model = case.net()
    optimizer = sgd(model)
    expected = case.train(model, optimizer, STEPS)
    with RankPool(2, backend="cpu:gloo,cuda:nccl") as pool:
        outcomes = pool.run(_train, wrapper, str(tmp_path / "checkpoint"))
    for state, loaded, curve in outcomes:
        for got, want in zip(curve, expected, strict=True):
            assert got == pytest.approx(want, rel=1e-4)
        for name, tensor in model.state_dict().items():
            assert_close(state[name], tensor, whole=1e-9, row=1e-8, what=name)
            assert torch.equal(state[name], loaded[name])
    record_property("diff", max(difference(outcomes[0][0][n], t) for n, t in model.state_dict().items()))
    on_cpu = case.net()
    load_safetensors(on_cpu, tmp_path / "checkpoint", sgd(on_cpu))
    assert all(torch.equal(on_cpu.state_dict()[name], tensor) for name, tensor in outcomes[0][0].items())
