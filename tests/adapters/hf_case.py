"""One tiny model of each family that the transformers adapter runs, with weights that make every expert count."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCABULARY = 96
_SHARED = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
_GROUPED = dict(moe_intermediate_size=24, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=0)

# Name of transformers' configuration class, and what makes it tiny.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", dict(intermediate_size=24, num_local_experts=4)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts=4),
    ),
    "qwen3_moe": ("Qwen3MoeConfig", dict(intermediate_size=48, moe_intermediate_size=24, num_experts=4, head_dim=8)),
    "olmoe": ("OlmoeConfig", dict(intermediate_size=24, num_experts=4)),
    "glm4_moe": ("Glm4MoeConfig", dict(intermediate_size=48, head_dim=8, **_GROUPED)),
    "deepseek_v3": ("DeepseekV3Config", dict(intermediate_size=48, **_MLA, **_GROUPED) | dict(num_key_value_heads=4)),
    "gpt_oss": ("GptOssConfig", dict(intermediate_size=24, num_local_experts=4, head_dim=8, sliding_window=16)),
}
# Experts that compute something else: the refusal names it.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "exact_gelu": ("Qwen3MoeConfig", FAMILIES["qwen3_moe"][1] | dict(hidden_act="gelu")),
}


def config(family: str, **changes: Any) -> Any:
    """A configuration of ``FAMILIES`` or ``REFUSED``."""
    import transformers

    name, sizes = (FAMILIES | REFUSED)[family]
    return getattr(transformers, name)(**(_SHARED | sizes | changes))


def model(family: str, *, experts: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The family's language model, the same weights in every process."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(family, **changes), dtype=dtype, experts_implementation=experts)
    widen(made)
    return made.eval()


@torch.no_grad()
def widen(module: nn.Module) -> None:
    """Weights large enough that pre-activations reach gpt-oss's clamps, biases and gates that are not zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if ".experts." in name or ".mlp.gate." in name or ".mlp.router." in name:
            scale = 6.0 if "gate_up_proj" in name else 0.4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / parameter.shape[-1] ** 0.5)


def tokens(rows: int, length: int, *, seed: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_and_grads(
    net: Any, ids: torch.Tensor, call: Callable[..., Any] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of ``ids`` and the gradients of a loss that weighs every logit differently."""
    net.zero_grad()
    logits = (call or net)(input_ids=ids, use_cache=False).logits.float()
    loss_of(logits, ids).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sum over tokens, so that batches' losses add up."""
    weights = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
    return (logits.log_softmax(-1) * weights).sum() * 0.1


def as_torchrun_would(rank: int, world_size: int) -> None:
    """transformers reads these."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
