"""vLLM's own classes on a CPU: its platform chosen before anything of it is imported, and a small layer."""

from __future__ import annotations

from typing import Any

import torch

H, I, E, K = 64, 48, 8, 2  # noqa: E741
LIMIT, ALPHA = 0.75, 1.702


def on_cpu() -> None:
    """Tell vLLM's CUDA wheel that it is on a CPU (it asks for a build of its own there); before any other import."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()


def config(kind: str = "silu", *, ranks: int = 1, **parallel: Any) -> Any:
    """``FusedMoEConfig`` of one layer; ``parallel``: fields of ``FusedMoEParallelConfig``."""
    import dataclasses

    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    clamped = {"swiglu_limit": LIMIT, "swiglu_alpha": ALPHA, "swiglu_beta": 1.0, "has_bias": True}
    return FusedMoEConfig(
        num_experts=E,
        experts_per_token=K,
        hidden_dim=H,
        intermediate_size=I,
        num_local_experts=E // ranks,
        num_logical_experts=E,
        activation=MoEActivation(kind.removesuffix(" within bounds")),
        device="cpu",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=dataclasses.replace(FusedMoEParallelConfig.make_no_parallel(), **parallel),
        in_dtype=torch.bfloat16,
        max_num_tokens=64,
        **(clamped if kind == "swigluoai_uninterleave" else {}),
        **({"swiglu_limit": LIMIT} if kind == "silu within bounds" else {}),
    )


def weights(kind: str = "silu") -> dict[str, torch.Tensor]:
    """All experts in vLLM's layout: w13 [E, 2I, H], gate first, w2 [E, H, I], biases for the clamped activation."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"w13_weight": (E, 2 * I, H), "w2_weight": (E, H, I)}
    if kind == "swigluoai_uninterleave":
        shapes |= {"w13_bias": (E, 2 * I), "w2_bias": (E, H)}
    return {name: (torch.randn(shape, generator=generator) * 0.2).bfloat16() for name, shape in shapes.items()}


def routed(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x bf16 [T, H], weights fp32 [T, K], ids int32 [T, K])."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(tokens)]).to(torch.int32)
    return x, torch.rand(tokens, K, generator=generator), ids


def formula(kind: str, w: dict[str, torch.Tensor], x: torch.Tensor, gates: torch.Tensor, ids: torch.Tensor) -> Any:
    """fp64 [T, H], token by token."""
    w = {name: t.double() for name, t in w.items()}
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for k in range(K):
            e = int(ids[t, k])
            both = w["w13_weight"][e] @ x[t].double()
            if "w13_bias" in w:
                both = both + w["w13_bias"][e]
            gate, up = both.chunk(2)
            if kind == "silu within bounds":
                h = torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
            elif kind == "silu":
                h = torch.nn.functional.silu(gate) * up
            elif kind == "gelu_tanh":
                h = torch.nn.functional.gelu(gate, approximate="tanh") * up
            else:
                gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
                h = gate * torch.sigmoid(ALPHA * gate) * (up + 1)
            out = w["w2_weight"][e] @ h
            y[t] += gates[t, k].double() * (out + w["w2_bias"][e] if "w2_bias" in w else out)
    return y
