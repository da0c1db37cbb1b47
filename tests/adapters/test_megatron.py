"""Our MoE layer inside Megatron-Core against its own, on CPU ranks in fp32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.testing.ranks import RankPool

pytest.importorskip("megatron.core", reason="needs megatron-core 0.16 or 0.19 (and triton)", exc_type=ImportError)

from tests.adapters import megatron_case as case

pytestmark = pytest.mark.filterwarnings("ignore")  # megatron-core's own, about parts that are not installed


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two ranks of this file's own: megatron-core on a CPU changes torch in the processes it runs in."""
    with RankPool(2, timeout_s=240) as pool:
        yield pool


@pytest.fixture(scope="module")
def pool4() -> Iterator[RankPool]:
    """Four ranks, for two sizes of EP groups with experts apart."""
    with RankPool(4, timeout_s=240) as pool:
        yield pool


def assert_curves_equal(got: Any, want: Any) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
@pytest.mark.parametrize("ep", [1, 2])
def test_twenty_steps_follow_the_stock_layer(pool: RankPool, ep: int, distributed: bool) -> None:
    options = dataclasses.replace(case.TINY, ep=ep, distributed_optimizer=distributed)
    want = pool.run(case.train, dataclasses.replace(options, moe="stock"))[0]
    got = pool.run(case.train, options)[0]
    losses, _ = want
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.05
    assert_curves_equal(got, want)


@pytest.mark.parametrize("recompute", ["full", "moe", "shared_experts"])
def test_recomputation_changes_nothing(pool: RankPool, recompute: str) -> None:
    options = dataclasses.replace(case.TINY, steps=4, shared=16)
    want = pool.run(case.train, dataclasses.replace(options, moe="stock"))[0]
    assert_curves_equal(pool.run(case.train, dataclasses.replace(options, recompute=recompute))[0], want)


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared experts": {"moe_shared_expert_intermediate_size": 16},
    "dropped tokens": {"moe_expert_capacity_factor": 0.5},
    "sigmoid, groups and bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "one expert a token": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "probabilities in fp64": {"moe_router_dtype": "fp64"},
    "fused activation": {"bias_activation_fusion": True},
    "bounded activation": {"activation_func_clamp_value": 0.01},
    "weights from the CPU": {"use_cpu_initialization": True},
}


@pytest.mark.parametrize("mask", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("fields", LAYERS.values(), ids=list(LAYERS))
def test_one_layer_with_different_tokens_on_each_rank(pool: RankPool, fields: dict[str, Any], mask: bool) -> None:
    if mask and "moe_router_enable_expert_bias" in fields:
        pytest.skip("the stock router fails on a padding mask together with expert bias")
    for differences in pool.run(case.compare_layers, fields, 2, mask):
        assert max(differences.values()) <= 1e-5, differences


@pytest.mark.parametrize("ep", [1, 2])
def test_it_starts_with_the_stock_weights_and_marks(pool: RankPool, ep: int) -> None:
    for equal, of_ours, of_stock in pool.run(case.start_and_marks, ep):
        assert equal
        assert len(of_ours) == 2 and of_ours[0]["allreduce"] is (ep == 1)
        assert all(marks == of_stock[0] for marks in (*of_ours, *of_stock))


@pytest.mark.parametrize("engine", ["staged", "reference"])
def test_weight_gradients_can_be_fused_and_delayed(pool: RankPool, engine: str) -> None:
    ways = ["fused", "delayed", "delayed fused"]
    for (want, there), *others in pool.run(case.main_grads, ways, engine):
        assert there
        for way, (got, before) in zip(ways, others, strict=True):
            assert before is ("delayed" not in way), way
            for name, grad in want.items():
                assert torch.equal(got[name], grad), (way, name)


def test_weight_gradients_can_wait_for_the_dispatch(pool: RankPool) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(TransformerConfig, "overlap_dispatch_backward_with_experts_wgrad"):
        pytest.skip("this version has no overlap_dispatch_backward_with_experts_wgrad")
    for (want, _), (got, _) in pool.run(case.main_grads, ["dispatch"], "staged"):
        for name, grad in want.items():
            assert torch.equal(got[name], grad), name


def test_state_dicts_load_both_ways(pool: RankPool) -> None:
    for refused in pool.run(case.local_states):
        text = refused["error"]
        assert "Missing key(s)" in text and '"experts.local_experts.0.linear_fc1.weight"' in text
        assert "Unexpected key(s)" in text and '"experts.local_experts.0.linear_fc1.bias"' in text
        assert "experts.local_experts.1.linear_fc2.weight must have shape (32, 24), got (3, 3)" in text


@pytest.mark.parametrize("singleton", [False, True])
def test_sharded_state_is_the_stock_one(pool: RankPool, singleton: bool) -> None:
    for stock, ours in pool.run(case.sharded_keys, {"singleton_local_shards": singleton}):
        assert len(stock) > 4 * (1 + 2 + 2)
        assert ours == stock


@pytest.mark.parametrize(("distributed", "first"), [(False, "megamoe"), (True, "stock")])
def test_checkpoints_cross_load_bit_for_bit(pool4: RankPool, tmp_path: Path, distributed: bool, first: str) -> None:
    losses = pool4.run(case.cross_load, str(tmp_path), distributed, first)[0]
    continued_by_first, continued_by_other = losses
    assert len(continued_by_first) == 3
    assert continued_by_other == pytest.approx(continued_by_first, rel=1e-5)
