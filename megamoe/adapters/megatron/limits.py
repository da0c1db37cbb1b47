"""What a Megatron-Core ``TransformerConfig`` asks of its experts, as a ``Problem``, or a sentence why we can't do it.

Fields differ between versions, so a field that is absent counts as not set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from megamoe.activation import Activation
from megamoe.problem import Problem, Recipe

MAX_TOKENS = 16384

Asks = Callable[[Any], object]


def _on(name: str) -> Asks:
    return lambda config: getattr(config, name, None)


def _more_than_one(name: str) -> Asks:
    return lambda config: (getattr(config, name, None) or 1) > 1


def _clamp(config: Any) -> float | None:
    value = getattr(config, "activation_func_clamp_value", None)
    return None if value is None else float(value)


# (whether the config asks for it, the option as a user knows it, why not)
LIMITS: tuple[tuple[Asks, str, str], ...] = (
    (_more_than_one("expert_tensor_parallel_size"), "expert_tensor_parallel_size > 1", "experts stand whole on a rank"),
    (_more_than_one("expert_gtp_remat_size"), "expert_gtp_remat_size > 1", "experts stand whole on a rank"),
    (_on("add_bias_linear"), "add_bias_linear", "its experts would carry biases"),
    (
        lambda config: config.activation_func is not F.silu or not config.gated_linear_unit,
        "an activation other than SwiGLU",
        "set activation_func=F.silu and gated_linear_unit=True",
    ),
    (
        lambda config: _clamp(config) is not None and config.bias_activation_fusion,
        "activation_func_clamp_value with bias_activation_fusion",
        "Megatron-Core's fused SwiGLU leaves the bound out",
    ),
    (_on("glu_linear_offset"), "glu_linear_offset", "SwiGLU has no offset here"),
    (_on("activation_func_fp8_input_store"), "activation_func_fp8_input_store", "pre-activations are kept as they are"),
    (_on("use_te_activation_func"), "use_te_activation_func", "the activation stands inside our experts"),
    (_on("moe_mlp_glu_interleave_size"), "moe_mlp_glu_interleave_size", "gate rows stand before up rows"),
    (_on("moe_single_grouped_weight"), "moe_single_grouped_weight", "weights are plain parameters"),
    (_on("moe_pad_expert_input_to_capacity"), "moe_pad_expert_input_to_capacity", "nothing is padded here"),
    (_on("moe_expert_rank_capacity_factor"), "moe_expert_rank_capacity_factor", "no rank drops rows here"),
    (_on("moe_pad_experts_for_cuda_graph_inference"), "moe_pad_experts_for_cuda_graph_inference", "no padding here"),
    (_on("moe_router_padding_for_quantization"), "moe_router_padding_for_quantization", "nothing is padded here"),
    (_on("moe_apply_probs_on_input"), "moe_apply_probs_on_input", "probabilities multiply the activation"),
    (_on("overlap_moe_expert_parallel_comm"), "overlap_moe_expert_parallel_comm", "our layer is one call, not stages"),
    (_on("moe_shared_expert_overlap"), "moe_shared_expert_overlap", "our layer has no stage to run them beside"),
    (_on("moe_paged_stash"), "moe_paged_stash", "our layer keeps its own activations"),
    (
        lambda config: getattr(config, "fine_grained_activation_offloading", False)
        and set(getattr(config, "offload_modules", None) or ()) & {"expert_fc1", "moe_act", "fused_group_mlp"},
        "offloading of expert activations",
        "our layer keeps its own activations",
    ),
    (
        lambda config: config.moe_token_dispatcher_type == "flex",
        'moe_token_dispatcher_type="flex"',
        'our layer brings its own dispatch; set "alltoall"',
    ),
    (_on("fp8"), "fp8", "these experts compute in the parameters' precision"),
    (_on("fp4"), "fp4", "these experts compute in the parameters' precision"),
    (lambda config: config.fp16 or config.params_dtype == torch.float16, "fp16", "use bf16 or fp32"),
    (_on("enable_autocast"), "enable_autocast", "the precision is that of the parameters"),
    (
        lambda config: getattr(config, "cuda_graph_impl", "none") != "none",
        "cuda_graph_impl",
        "the staged engine waits for the device, so it can't be captured",
    ),
    (
        lambda config: getattr(config, "transformer_impl", "") == "inference_optimized",
        'transformer_impl="inference_optimized"',
        "it swaps dispatchers at run time",
    ),
    (_on("use_kitchen"), "use_kitchen", "it quantises the experts' own linear layers"),
    (_on("quant_recipe"), "quant_recipe", "it quantises the experts' own linear layers"),
)  # fmt: skip


def why_not(config: Any) -> str | None:
    """None if our experts do what ``config`` (a ``TransformerConfig``) asks for, else a sentence."""
    for asks, option, reason in LIMITS:
        if asks(config):
            return f"megamoe's experts can't do {option}: {reason}"
    try:
        problem_of(config)
    except ValueError as error:
        return f"megamoe's experts can't do these sizes: {error}"
    return None


def problem_of(config: Any, *, ep_size: int = 1, max_tokens: int = MAX_TOKENS) -> Problem:
    """The sizes and choices of one layer's experts.

    Args:
        config: a ``TransformerConfig``; its ``moe_latent_size``, if set, is the hidden size experts see.
        ep_size: ranks of the expert-parallel group.
        max_tokens: bound on the tokens of one rank in one call.

    Raises:
        ValueError: sizes that no engine can do.
    """
    clamp = _clamp(config)
    recipe: Recipe = "bf16" if config.params_dtype == torch.bfloat16 else "fp32"
    return Problem(
        hidden=getattr(config, "moe_latent_size", None) or config.hidden_size,
        intermediate=config.moe_ffn_hidden_size or config.ffn_hidden_size,
        num_experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
        world_size=ep_size,
        max_tokens=max_tokens,
        recipe=recipe,
        weights_applied="before_down",
        activation=Activation() if clamp is None else Activation("swiglu_limited", limit=clamp),
    )
