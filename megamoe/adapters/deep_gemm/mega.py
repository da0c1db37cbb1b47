"""DeepGEMM's fused MoE by name. The engine behind them is not part of this version: each says so when it is called."""

from __future__ import annotations

from typing import Any, NoReturn

from megamoe.errors import EngineUnavailableError


def fp8_mega_moe(*args: Any, **keywords: Any) -> NoReturn:
    """y, (w13, sf13), (w2, sf2), buffer, ... in DeepGEMM."""
    _unavailable("fp8_mega_moe")


def bf16_mega_moe(*args: Any, **keywords: Any) -> NoReturn:
    """y, w13, w2, buffer, ... in DeepGEMM."""
    _unavailable("bf16_mega_moe")


def get_symm_buffer_for_mega_moe(*args: Any, **keywords: Any) -> NoReturn:
    """group, num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden, ... in DeepGEMM."""
    _unavailable("get_symm_buffer_for_mega_moe")


def mega_moe_pre_dispatch_sm90(*args: Any, **keywords: Any) -> NoReturn:
    """x, topk_idx, topk_weights and the buffer's views in DeepGEMM."""
    _unavailable("mega_moe_pre_dispatch_sm90")


def transform_weights_for_mega_moe_sm90(*args: Any, **keywords: Any) -> NoReturn:
    """(w13, sf13), (w2, sf2) in DeepGEMM."""
    _unavailable("transform_weights_for_mega_moe_sm90")


def _unavailable(name: str) -> NoReturn:
    raise EngineUnavailableError(
        f"{name} needs the engine mega, which is not part of this version of megamoe; megamoe.mega_moe runs the same "
        "layer through collectives"
    )
