"""A small MoE of torchtitan, stock or through the override, and its formula in fp64."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

D, F, E, K = 32, 48, 4, 2
TARGET = "megamoe.adapters.torchtitan.megamoe_experts"
KINDS = ("swiglu", "gpt_oss")
LIMIT = 1.0  # of gpt-oss' clamps, low enough that they bite


def config(kind: str = "swiglu", *, ours: dict[str, Any] | None = None) -> Any:
    """``MoE.Config`` as torchtitan's models build it; ``ours``: the override's settings, None for stock experts."""
    from torchtitan.config.override import OverrideConfig, apply_overrides
    from torchtitan.models.common.config_utils import make_moe_config, make_routed_experts_config, make_router_config
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    normal = partial(torch.nn.init.normal_, std=0.3)
    names = ("w1_EFD", "w2_EDF", "w3_EFD", "mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED")
    init = dict.fromkeys(names, normal)
    routed = make_routed_experts_config(
        dim=D, hidden_dim=F, num_experts=E, top_k=K, param_init=init, comm_backend="standard"
    )
    if kind == "gpt_oss":
        routed.inner_experts = GptOssGroupedExperts.Config(
            dim=D, hidden_dim=F, num_experts=E, param_init=init, swiglu_limit=LIMIT
        )
    router = make_router_config(
        dim=D, num_experts=E, gate_param_init={"weight": normal}, top_k=K, score_func="softmax", route_norm=True
    )
    moe = make_moe_config(num_experts=E, router=router, routed_experts=routed, load_balance_coeff=None)
    if ours is not None:
        apply_overrides(OverrideConfig(imports=[(TARGET, ours)]), moe)
    return moe


def build(kind: str = "swiglu", *, ours: dict[str, Any] | None = None) -> Any:
    """The module, the same weights whatever ``ours`` says."""
    module = config(kind, ours=ours).build()
    torch.manual_seed(1)
    module.init_states()
    return module


def tokens(length: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, length, D, generator=torch.Generator().manual_seed(seed))


def formula(kind: str, module: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer token by token in fp64, differentiable, with the module's own router."""
    scores, ids, _ = module.router(x.to(module.router.gate.weight.dtype), None)
    p = {name: t.double() for name, t in module.routed_experts.inner_experts.named_parameters()}
    rows = []
    for token, score, experts in zip(x.reshape(-1, D).double(), scores.reshape(-1, K), ids.reshape(-1, K), strict=True):
        y = torch.zeros(D, dtype=torch.float64)
        for weight, e in zip(score.double(), experts.tolist(), strict=True):
            if kind == "swiglu":
                h = torch.nn.functional.silu(p["w1_EFD"][e] @ token) * (p["w3_EFD"][e] @ token)
                out = p["w2_EDF"][e] @ h
            else:
                both = p["mlp1_weight_EGD"][e] @ token + p["mlp1_bias_EG"][e]
                gate, up = both[0::2].clamp(max=LIMIT), both[1::2].clamp(-LIMIT, LIMIT)
                h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
                out = p["mlp2_weight_EDF"][e] @ h + p["mlp2_bias_ED"][e]
            y = y + weight * out
        rows.append(y)
    return torch.stack(rows).view(x.shape)
