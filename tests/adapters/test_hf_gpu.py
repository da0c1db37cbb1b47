"""transformers' experts on GPUs: bf16 through grouped products, fp32 whole models, two GPUs over NCCL."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers; see docs/huggingface.md")

from megamoe.adapters import transformers as megamoe_hf
from megamoe.adapters.transformers.experts import run_experts
from megamoe.adapters.transformers.forms import is_experts
from megamoe.adapters.transformers.parallel import keep_part
from megamoe.testing.numerics import assert_close, difference
from megamoe.testing.ranks import RankPool
from tests.adapters import hf_case as case
from tests.adapters.test_hf_parallel import load

ENGINES = ("staged", "mega")
TOKENS = (50, 0)  # of each rank: one has nothing


def experts_of(model: torch.nn.Module) -> Any:
    return next(m for m in model.modules() if is_experts(m))


def given(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, top-k ids, top-k weights, gradient of y; numbers that bf16 holds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 32, generator=generator).bfloat16().float()
    index = torch.rand(num_tokens, 4, generator=generator).topk(2).indices
    weights = torch.rand(num_tokens, 2, generator=generator).bfloat16().float()
    return x, index, weights, torch.randn(num_tokens, 32, generator=generator).bfloat16().float()


def run(  # noqa: PLR0917
    call: Any, module: Any, device: str, dtype: torch.dtype, seed: int, num_tokens: int
) -> dict[str, torch.Tensor]:
    x, index, weights, grad = given(num_tokens, seed)
    x, weights = x.to(device, dtype).requires_grad_(), weights.to(device, dtype).requires_grad_()
    y = call(module, x, index.to(device), weights)
    y.backward(grad.to(device, dtype))
    results = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad}
    return {n: t.float().cpu() for n, t in (results | {n: p.grad for n, p in module.named_parameters()}).items()}


def exact_module(family: str) -> Any:
    """fp32 on the CPU, with numbers that bf16 holds."""
    return copy.deepcopy(experts_of(case.model(family))).to(torch.bfloat16).float()


def eager(module: Any, *arguments: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = type(module).forward.__wrapped__(module, *arguments)
    return result


def compare(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference. bf16 pre-activations may fall on the other side of gpt-oss's clamp: single rows move."""
    worst = 0.0
    for name, want in expected.items():
        worst = max(worst, difference(results[name], want))
        assert worst < 5e-5, f"{name}: d = {worst:.1e}"
    assert_close(results["y"], expected["y"], whole=2e-5, row=2e-4, what="y")
    return worst


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bf16_on_one_gpu(family: str, engine: str, record_property: Any) -> None:
    exact = exact_module(family)
    expected = run(eager, exact, "cpu", torch.float32, 4, 50)
    exact.zero_grad()

    def ours(module: Any, *arguments: torch.Tensor) -> torch.Tensor:
        return run_experts(module, *arguments, settings=megamoe_hf.Settings(engine=engine), group=None)

    module = exact.to("cuda", torch.bfloat16)
    record_property("diff", compare(run(ours, module, "cuda", torch.bfloat16, 4, 50), expected))


@pytest.mark.gpu
@pytest.mark.parametrize("family", case.FAMILIES)
def test_fp32_models_on_one_gpu(family: str) -> None:
    megamoe_hf.register()
    model, ids = case.model(family), case.tokens(3, 7)
    expected, grads = case.logits_and_grads(model, ids)
    model.cuda().set_experts_implementation("megamoe")
    logits, ours = case.logits_and_grads(model, ids.cuda())
    assert_close(logits.cpu(), expected, whole=1e-9, row=1e-8, what="logits")
    for name, grad in grads.items():
        assert difference(ours[name].cpu(), grad) < 1e-8, name


def _bf16(rank: int, world_size: int, group: Any, family: str, engine: str) -> dict[str, torch.Tensor]:
    module = exact_module(family)
    keep_part(module, rank, world_size)
    module.to("cuda", torch.bfloat16)

    settings = megamoe_hf.Settings(engine=engine, max_tokens=64)

    def ours(module: Any, *arguments: torch.Tensor) -> torch.Tensor:
        return run_experts(module, *arguments, settings=settings, group=group)

    return run(ours, module, "cuda", torch.bfloat16, rank, TOKENS[rank])


def _fp32(rank: int, world_size: int, group: Any, folder: Path, data_parallel: bool) -> Any:
    case.as_torchrun_would(rank, world_size)
    model = load(folder, ranks=world_size, data_parallel=data_parallel)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    logits, _ = case.logits_and_grads(model, batch(rank, data_parallel).cuda())
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    plain = {n: (g.to_local() if hasattr(g, "to_local") else g).cpu() for n, g in grads.items()}
    return logits.cpu(), plain


def batch(rank: int, own: bool) -> torch.Tensor:
    return case.tokens(1 + 2 * rank, 5, seed=rank) if own else case.tokens(3, 7)


def whole_models(pool: RankPool, folder: Path, family: str) -> None:
    """Logits and gradients in fp32 of a model spread over two ranks, with one batch for both and with one for each."""
    case.model(family).save_pretrained(folder / family)
    for own in (False, True):
        results = [case.logits_and_grads(case.model(family), batch(r, own)) for r in range(2)]
        for rank, (logits, grads) in enumerate(pool.run(_fp32, folder / family, own)):
            assert_close(logits, results[rank][0], whole=1e-9, row=1e-8, what=f"{family} logits")
            for name, grad in grads.items():
                want = results[rank][1][name]
                if ".experts." in name:
                    want = sum(g[name] for _, g in results) if own else want
                    want = want.chunk(2)[rank]
                assert difference(grad, want) < 1e-8, name


@pytest.mark.multi_gpu
def test_two_gpus(tmp_path: Path, record_property: Any) -> None:
    """bf16 experts of uneven ranks, one without tokens; then fp32 models loaded both ways."""
    worst = 0.0
    with RankPool(2, backend="cpu:gloo,cuda:nccl") as pool:
        for family in ("qwen3_moe", "gpt_oss"):
            wholes = []
            for rank, num_tokens in enumerate(TOKENS):
                exact = exact_module(family)
                wholes.append(run(eager, exact, "cpu", torch.float32, rank, num_tokens) if num_tokens else None)
            expected = wholes[0]
            assert expected is not None
            for engine in ENGINES:
                parts = pool.run(_bf16, family, engine)
                ours = {n: parts[0][n] for n in ("y", "dx", "dweights")}
                ours |= {n: torch.cat([part[n] for part in parts]) for n in expected if n not in ours}
                worst = max(worst, compare(ours, expected))
            whole_models(pool, tmp_path, family)
    record_property("diff", worst)


@pytest.mark.multi_gpu
def test_models_of_the_other_families_on_two_gpus(tmp_path: Path) -> None:
    with RankPool(2, backend="cpu:gloo,cuda:nccl") as pool:
        for family in case.FAMILIES:
            if family not in ("qwen3_moe", "gpt_oss"):
                whole_models(pool, tmp_path, family)
