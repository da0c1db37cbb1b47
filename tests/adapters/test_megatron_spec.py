"""Specs, refusals and the pass-through dispatcher, without ranks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("megatron.core", reason="needs megatron-core 0.16 or 0.19 (and triton)", exc_type=ImportError)

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megamoe.adapters.megatron import MegaMoELayer, use_megamoe, why_not
from megamoe.adapters.megatron.dispatcher import to_topk
from megamoe.adapters.megatron.experts import MegaMoEExperts
from megamoe.adapters.megatron.gpt import make_config
from megamoe.adapters.megatron.limits import LIMITS
from megamoe.adapters.megatron.options import Options, parse

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:megatron.*")


def config(**fields: Any) -> TransformerConfig:
    return make_config(Options(), torch.float32, ep=1, **fields)


def module_of(spec: Any) -> Any:
    return spec.func if isinstance(spec, functools.partial) else spec.module


def keywords_of(spec: Any) -> dict[str, Any]:
    return spec.keywords if isinstance(spec, functools.partial) else {"submodules": spec.submodules, **spec.params}


def moe_of(layer: ModuleSpec) -> Any:
    return layer.submodules.mlp


def test_a_layer_spec_gets_our_experts_and_keeps_the_rest() -> None:
    stock = get_gpt_layer_local_spec(num_experts=8)
    ours = use_megamoe(stock, config(), engine="staged", max_tokens=99)
    assert module_of(moe_of(stock)) is MoELayer and module_of(moe_of(ours)) is MegaMoELayer
    before, after = (keywords_of(moe_of(s))["submodules"] for s in (stock, ours))
    assert module_of(before.experts) is SequentialMLP and module_of(after.experts) is MegaMoEExperts
    options = {k: v for k, v in keywords_of(after.experts).items() if k != "submodules"}
    assert options == {"engine": "staged", "max_tokens": 99, "grouped_keys": False}
    assert after.router is before.router and after.shared_experts is before.shared_experts
    assert ours.module is stock.module
    assert ours.submodules.self_attention is stock.submodules.self_attention


def test_a_block_spec_keeps_its_dense_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", 0)  # asks for no group then
    mixed = config(num_layers=3, moe_layer_freq=[0, 1, 1])
    stock = get_gpt_decoder_block_spec(mixed, use_transformer_engine=False)
    ours = use_megamoe(stock, mixed)
    assert [module_of(moe_of(layer)) is MegaMoELayer for layer in ours.layer_specs] == [False, True, True]
    assert ours.layer_specs[0] is stock.layer_specs[0]


def test_the_experts_of_transformer_engine_leave_their_names_in_checkpoints() -> None:
    """The spec's contract alone: Transformer Engine is not installed where this runs."""
    stock = get_gpt_layer_local_spec(num_experts=8)
    submodules = keywords_of(moe_of(stock))["submodules"]
    if isinstance(submodules.experts, functools.partial):
        experts: Any = functools.partial(TEGroupedMLP, submodules=None)
    else:
        experts = ModuleSpec(module=TEGroupedMLP)
    changed = dataclasses.replace(submodules, experts=experts)
    moe = moe_of(stock)
    if isinstance(moe, functools.partial):
        moe = functools.partial(moe.func, submodules=changed)
    else:
        moe = dataclasses.replace(moe, submodules=changed)
    ours = use_megamoe(moe, config())
    assert keywords_of(keywords_of(ours)["submodules"].experts)["grouped_keys"] is True


def test_other_process_groups_reach_the_layer_where_the_version_does_not_hand_them_on() -> None:
    groups = object()
    moe = moe_of(use_megamoe(get_gpt_layer_local_spec(num_experts=8), config(), pg_collection=groups))
    if isinstance(moe, ModuleSpec):
        assert moe.params["pg_collection"] is groups
    else:  # 0.19 hands on the model's own
        assert "pg_collection" not in moe.keywords


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="spec holds no MoE layer"):
        use_megamoe(get_gpt_layer_local_spec(), config())


ASKS: dict[str, Any] = {
    "expert_tensor_parallel_size > 1": {"expert_tensor_parallel_size": 2},
    "expert_gtp_remat_size > 1": {"expert_gtp_remat_size": 2},
    "add_bias_linear": {"add_bias_linear": True},
    "an activation other than SwiGLU": {"activation_func": F.gelu},
    "activation_func_clamp_value with bias_activation_fusion": {
        "activation_func_clamp_value": 7.0,
        "bias_activation_fusion": True,
    },
    "glu_linear_offset": {"glu_linear_offset": 1.0},
    "activation_func_fp8_input_store": {"activation_func_fp8_input_store": True},
    "use_te_activation_func": {"use_te_activation_func": True},
    "moe_mlp_glu_interleave_size": {"moe_mlp_glu_interleave_size": 32},
    "moe_single_grouped_weight": {"moe_single_grouped_weight": True},
    "moe_pad_expert_input_to_capacity": {"moe_pad_expert_input_to_capacity": True},
    "moe_pad_experts_for_cuda_graph_inference": {"moe_pad_experts_for_cuda_graph_inference": True},
    "moe_expert_rank_capacity_factor": {"moe_expert_rank_capacity_factor": 1.5},
    "moe_router_padding_for_quantization": {"moe_router_padding_for_quantization": True},
    "moe_apply_probs_on_input": {"moe_apply_probs_on_input": True},
    "overlap_moe_expert_parallel_comm": {"overlap_moe_expert_parallel_comm": True},
    "moe_shared_expert_overlap": {"moe_shared_expert_overlap": True},
    "moe_paged_stash": {"moe_paged_stash": True},
    "offloading of expert activations": {
        "fine_grained_activation_offloading": True,
        "offload_modules": ["moe_act"],
    },
    'moe_token_dispatcher_type="flex"': {"moe_token_dispatcher_type": "flex"},
    "fp8": {"fp8": "e4m3"},
    "fp4": {"fp4": "e2m1"},
    "fp16": {"fp16": True},
    "enable_autocast": {"enable_autocast": True},
    "cuda_graph_impl": {"cuda_graph_impl": "local"},
    'transformer_impl="inference_optimized"': {"transformer_impl": "inference_optimized"},
    "use_kitchen": {"use_kitchen": True},
    "quant_recipe": {"quant_recipe": object()},
    "these sizes": {"moe_ffn_hidden_size": 20},
}


def test_every_limit_is_tried() -> None:
    assert {option for _, option, _ in LIMITS} | {"these sizes"} == set(ASKS)
    assert why_not(config()) is None


@pytest.mark.parametrize("option", ASKS)
def test_what_we_cannot_do_runs_on_the_stock_layer_and_says_so(option: str) -> None:
    asked = config()
    for name, value in ASKS[option].items():
        setattr(asked, name, value)  # past its own checks, which need parts that are not installed
    reason = why_not(asked)
    assert reason is not None and reason.startswith(f"megamoe's experts can't do {option}: ")
    stock = get_gpt_layer_local_spec(num_experts=8)
    with pytest.warns(UserWarning, match="The stock MoE layer runs instead") as caught:
        assert use_megamoe(stock, asked) is stock
    assert str(caught[0].message).startswith(reason)
    with pytest.raises(ValueError) as refused:
        use_megamoe(stock, asked, fallback=False)
    assert str(refused.value) == reason
    with pytest.raises(ValueError) as built:
        MegaMoELayer(asked)
    assert str(built.value) == reason


def test_routing_maps_become_lists_of_experts() -> None:
    chosen = torch.tensor([[False, True, False, True], [True, False, False, False], [False] * 4])
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75], [0.5, 0.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    idx, weights = to_topk(probs, chosen, 3)
    assert idx.tolist() == [[1, 3, -1], [0, -1, -1], [-1, -1, -1]]
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[0.25, 0.75, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_the_gradient_of_each_weight_reaches_its_probability() -> None:
    torch.manual_seed(0)
    T, E, K = 50, 16, 4
    chosen = torch.zeros(T, E, dtype=torch.bool).scatter(1, torch.rand(T, E).topk(K).indices, True)
    chosen[::5, :8] = False  # dropped
    probs = torch.rand(T, E).masked_fill(~chosen, 0.0).requires_grad_()
    idx, weights = to_topk(probs, chosen, K)
    dense = torch.zeros(T, E + 1).scatter_add(1, torch.where(idx < 0, E, idx), weights)[:, :E]
    assert torch.equal(dense, probs)
    grad = torch.rand(T, K)
    weights.backward(grad)
    assert probs.grad is not None and torch.equal(probs.grad != 0, chosen & (probs.grad != 0))
    for t in range(T):
        experts = [e for e in idx[t].tolist() if e >= 0]
        assert experts == sorted(chosen[t].nonzero().flatten().tolist())
        assert torch.equal(probs.grad[t, experts], grad[t, : len(experts)])


def test_no_tokens() -> None:
    idx, weights = to_topk(torch.empty(0, 8), torch.empty(0, 8, dtype=torch.bool), 2)
    assert idx.shape == weights.shape == (0, 2)


def test_options_are_refused_in_a_sentence() -> None:
    assert parse(["--moe", "stock", "--distributed-optimizer"]) == Options(moe="stock", distributed_optimizer=True)
    with pytest.raises(ValueError, match=r"--hidden \(10\) must be divisible by --heads \(4\)"):
        Options(hidden=10)
    with pytest.raises(ValueError, match=r"--warmup must be between 0 and --steps - 1 \(1\), got 3"):
        Options(steps=2)
    with pytest.raises(
        ValueError, match=r"--batch \(16\) must be divisible by --micro-batch \(4\) times the ranks \(3\)"
    ):
        Options().microbatches(3)
    with pytest.raises(ValueError, match="--steps must be at least 1, got 0"):
        Options(steps=0)
