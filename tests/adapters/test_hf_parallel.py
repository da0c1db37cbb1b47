"""Experts over two ranks (gloo): from_pretrained reads this rank's alone, and everything adds up to eager's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers", reason="needs transformers; .ci/client_transformers runs these tests")

from megamoe.adapters import transformers as megamoe_hf
from megamoe.adapters.transformers.forms import is_experts
from megamoe.adapters.transformers.parallel import has_implementations
from megamoe.testing.numerics import assert_close, difference
from tests.adapters import hf_case as case

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3", "gpt_oss"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        case.model(family).save_pretrained(folder / family)
    return folder


def load(path: Path, *, ranks: int, data_parallel: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    megamoe_hf.register()
    config = AutoConfig.from_pretrained(path)
    arguments = megamoe_hf.parallel_arguments(config, ranks, data_parallel=data_parallel)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **arguments).eval()


def local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def grads_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: local(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def assert_grads(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rank: int, ranks: int) -> None:
    """Experts: this rank's part. The rest: the same."""
    assert set(ours) == set(expected)
    for name, grad in expected.items():
        mine = grad.chunk(ranks)[rank] if ".experts." in name else grad
        assert difference(ours[name], mine) < 1e-10, name


def total(*grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: sum(g[name] for g in grads) for name in grads[0]}  # type: ignore[misc]


def _one_batch(rank: int, world_size: int, group: Any, folder: Path) -> None:
    case.as_torchrun_would(rank, world_size)
    for family in FAMILIES:
        model = load(folder / family, ranks=world_size, data_parallel=False)
        for module in model.modules():
            if is_experts(module):
                assert all(len(local(p)) == 2 for p in module.parameters())
        for rows, length in ((3, 7), (1, 1)):  # 21 tokens are 11 and 10; one token is 1 and 0
            ids = case.tokens(rows, length)
            expected, grads = case.logits_and_grads(case.model(family), ids)
            logits, _ = case.logits_and_grads(model, ids)
            assert_close(logits, expected, whole=1e-11, row=1e-10, what=f"{family} logits")
            assert_grads(grads_of(model), grads, rank, world_size)


def test_all_ranks_hold_one_batch(ranks: Any, saved: Path) -> None:
    ranks(2).run(_one_batch, saved)


def _own_batches(rank: int, world_size: int, group: Any, folder: Path) -> None:
    case.as_torchrun_would(rank, world_size)
    for family in FAMILIES:
        model = load(folder / family, ranks=world_size, data_parallel=True)
        _compare_own_batches(model, case.model(family), rank, world_size)


def _compare_own_batches(model: Any, whole: Any, rank: int, world_size: int) -> None:
    batches = [case.tokens(1 + 2 * r, 5 + r, seed=r) for r in range(world_size)]
    results = [case.logits_and_grads(whole, ids) for ids in batches]
    logits, _ = case.logits_and_grads(model, batches[rank])
    assert_close(logits, results[rank][0], whole=1e-11, row=1e-10, what="logits")
    # Experts have seen the tokens of all ranks, everything else this rank's.
    everyone = total(*(grads for _, grads in results))
    mine = results[rank][1]
    expected = {name: everyone[name] if ".experts." in name else mine[name] for name in mine}
    assert_grads(grads_of(model), expected, rank, world_size)

    # A rank without a batch lends its experts, forward and backward.
    expected_logits, expected = case.logits_and_grads(whole, batches[1])
    model.zero_grad()
    if rank == 1:
        logits, _ = case.logits_and_grads(model, batches[1])
        assert_close(logits, expected_logits, whole=1e-11, row=1e-10, what="logits beside an idle rank")
        assert_grads(grads_of(model), expected, rank, world_size)
    else:
        megamoe_hf.lend_experts(model, backward=True)
        assert_grads(grads_of(model), {n: g for n, g in expected.items() if ".experts." in n}, rank, world_size)
    with torch.no_grad():
        if rank == 0:
            assert difference(model(input_ids=batches[0]).logits, results[0][0]) < 1e-10
        else:
            megamoe_hf.lend_experts(model)


def test_each_rank_brings_its_own_batch_or_none(ranks: Any, saved: Path) -> None:
    ranks(2).run(_own_batches, saved)


def _from_whole(rank: int, world_size: int, group: Any) -> None:
    megamoe_hf.register()
    for family in ("qwen3_moe", "gpt_oss"):
        model = megamoe_hf.shard_experts(case.model(family, experts="megamoe"), group)
        assert all(len(p) == 4 // world_size for m in model.modules() if is_experts(m) for p in m.parameters())
        _compare_own_batches(model, case.model(family), rank, world_size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_taken_from_a_whole_model(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(_from_whole)


def _refusals(rank: int, world_size: int, group: Any) -> None:
    model = case.model("mixtral")
    with pytest.raises(ValueError, match=r"mlp\.experts has 4 experts, not divisible by 3 ranks"):
        megamoe_hf.shard_experts(model, group)
    with pytest.raises(ValueError, match="holds no experts"):
        megamoe_hf.shard_experts(torch.nn.Linear(8, 8), group)
    with pytest.raises(ValueError, match="its activation is none of"):
        megamoe_hf.shard_experts(case.model("exact_gelu"), group)
    # Nothing was touched: the model runs on one rank as before.
    case.logits_and_grads(model, case.tokens(1, 3))


def test_what_cannot_be_spread_is_refused(ranks: Any) -> None:
    ranks(3).run(_refusals)


def _under_fsdp(rank: int, world_size: int, group: Any, folder: Path) -> None:
    """transformers shards the dense part with FSDP2 and averages; ours moves the tokens."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    case.as_torchrun_would(rank, world_size)
    megamoe_hf.register()
    for family in ("qwen3_moe", "gpt_oss"):
        distributed = DistributedConfig(fsdp_size=world_size, ep_size=world_size, ep_implementation="megamoe")
        model = AutoModelForCausalLM.from_pretrained(
            folder / family, dtype=torch.float32, distributed_config=distributed
        )
        batches = [case.tokens(2, 5 + r, seed=r) for r in range(world_size)]
        results = [case.logits_and_grads(case.model(family), ids) for ids in batches]
        logits, _ = case.logits_and_grads(model, batches[rank])
        assert_close(logits, results[rank][0], whole=1e-11, row=1e-10, what=f"{family} logits")
        everyone = total(*(grads for _, grads in results))
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            mean = everyone[name] / world_size
            if ".experts." in name:
                assert difference(local(grad), mean.chunk(world_size)[rank]) < 1e-10, name
            else:
                assert difference(grad.full_tensor(), mean) < 1e-10, name


@pytest.mark.skipif(not has_implementations(), reason="transformers 5.17 has no expert parallelism beside FSDP")
def test_beside_fsdp(ranks: Any, saved: Path) -> None:
    ranks(2).run(_under_fsdp, saved)


def _their_all_to_all(rank: int, world_size: int, group: Any, folder: Path) -> None:
    """transformers moves the tokens, megamoe runs this rank's experts on what arrives."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    case.as_torchrun_would(rank, world_size)
    megamoe_hf.register()
    distributed = DistributedConfig(fsdp_size=world_size, ep_size=world_size, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "gpt_oss", dtype=torch.float32, distributed_config=distributed, experts_implementation="megamoe"
    )
    ids = case.tokens(1 + rank, 5, seed=rank)
    expected, _ = case.logits_and_grads(case.model("gpt_oss"), ids)
    logits, _ = case.logits_and_grads(model, ids)
    assert_close(logits, expected, whole=1e-11, row=1e-10, what="logits")


@pytest.mark.skipif(not has_implementations(), reason="transformers 5.17 has no all-to-all")
def test_experts_behind_their_all_to_all(ranks: Any, saved: Path) -> None:
    ranks(2).run(_their_all_to_all, saved)


def test_the_plan_stays_out_of_saved_configurations(saved: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(saved / "mixtral")
    before = config.to_dict()
    megamoe_hf.parallel_arguments(config, 2)
    assert config.to_dict() == before
    assert "megamoe" not in str(AutoConfig.from_pretrained(saved / "mixtral").base_model_ep_plan)
    config.base_model_ep_plan = None
    with pytest.raises(ValueError, match="no expert-parallel plan for MixtralConfig"):
        megamoe_hf.parallel_arguments(config, 2)
