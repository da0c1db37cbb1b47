"""What an experts module of transformers computes, found out from the module itself, or why megamoe can't do it.

Nothing is known by a model's name: flags give the layout, and the activation is the one of megamoe's that agrees with
the module's own ``_apply_gate`` (``act_fn`` where nothing gates) on numbers on both sides of every clamp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from megamoe.activation import Activation
from megamoe.adapters.transformers.layout import Layout

_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True, kw_only=True)
class Form:
    """One kind of experts: names of its parameters (biases None without), layout, sizes, activation."""

    up: str
    down: str
    up_bias: str | None
    down_bias: str | None
    layout: Layout
    activation: Activation
    hidden: int
    intermediate: int


def is_experts(module: nn.Module) -> bool:
    """Whether transformers runs ``module`` through its experts interface."""
    return all(hasattr(module, name) for name in _FLAGS) and hasattr(module, "_apply_gate")


def form_of(module: nn.Module) -> Form:
    """What ``module`` computes; its parameters may be anywhere, on the meta device too.

    Raises:
        ValueError: megamoe can't do that, and what it can.
    """
    name = type(module).__name__
    if not is_experts(module):
        raise ValueError(
            f"megamoe runs experts that transformers decorates with use_experts_implementation, {name} is not one"
        )
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"megamoe can't run {name}: it normalises each expert's result before the sum")
    gated, biased, transposed = bool(module.has_gate), bool(module.has_bias), bool(module.is_transposed)
    layout = Layout(transposed=transposed, interleaved=gated and not module.is_concatenated)
    up = "gate_up_proj" if gated else "up_proj"
    names = [up, "down_proj", *([f"{up}_bias", "down_proj_bias"] if biased else [])]
    held = dict(module.named_parameters())
    if sorted(held) != sorted(names):
        raise ValueError(f"megamoe can't run {name}: expected the parameters {', '.join(names)}, got {', '.join(held)}")
    for key, tensor in held.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"megamoe can't run {name}: {key} must be float32 or bfloat16, got {tensor.dtype}")
    shapes = {key: tuple(tensor.shape) for key, tensor in held.items()}
    if len(shapes[up]) != 3 or len(shapes["down_proj"]) != 3:
        raise ValueError(f"megamoe can't run {name}: expected matrices stacked by expert, got {shapes}")
    hidden, rows = shapes[up][1:] if transposed else shapes[up][:0:-1]
    intermediate = rows // 2 if gated else rows
    if shapes["down_proj"][1:] != ((intermediate, hidden) if transposed else (hidden, intermediate)):
        raise ValueError(f"megamoe can't run {name}: {up} {shapes[up]} does not fit down_proj {shapes['down_proj']}")
    if hidden % 8 or intermediate % 8:
        raise ValueError(
            f"megamoe can't run {name}: hidden and intermediate sizes must be multiples of 8, "
            f"got {hidden} and {intermediate}"
        )
    return Form(
        up=up,
        down="down_proj",
        up_bias=f"{up}_bias" if biased else None,
        down_bias="down_proj_bias" if biased else None,
        layout=layout,
        activation=_activation(module, rows, layout, held[up].device),
        hidden=hidden,
        intermediate=intermediate,
    )


def _activation(module: nn.Module, rows: int, layout: Layout, device: torch.device) -> Activation:
    """The activation that does what ``module`` does, tried on 64 rows in float64."""
    limit, alpha = getattr(module, "limit", getattr(module, "swiglu_limit", None)), getattr(module, "alpha", None)
    limit = float(limit) if isinstance(limit, int | float) else 7.0
    alpha = float(alpha) if isinstance(alpha, int | float) else 1.702
    h13 = torch.linspace(-2 * limit, 2 * limit, 64 * rows, dtype=torch.float64, device="cpu")
    h13 = h13[torch.randperm(len(h13), generator=torch.Generator().manual_seed(0))].view(64, rows)
    theirs = _their_activation(module, layout, device if device.type != "meta" else torch.device("cpu"))
    candidates = (
        [
            Activation("swiglu"),
            Activation("geglu"),
            Activation("swiglu_limited", limit=limit),
            Activation("swiglu_clamped", limit=limit, alpha=alpha),
        ]
        if module.has_gate
        else [Activation("relu2")]
    )
    try:
        expected = theirs(h13)
    except Exception as error:  # a gate of theirs may want anything
        raise ValueError(f"megamoe can't run {type(module).__name__}: its activation failed alone: {error}") from error
    for candidate in candidates:
        ours = candidate(h13)
        if ours.shape == expected.shape and torch.allclose(ours, expected, rtol=1e-6, atol=1e-9):
            return candidate
    names = ", ".join(c.name for c in candidates)
    raise ValueError(f"megamoe can't run {type(module).__name__}: its activation is none of {names}")


def _their_activation(
    module: nn.Module, layout: Layout, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Theirs as a function of h13 with gate first, float64 on the CPU."""

    def call(h13: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            # from_b13 moves columns of [rows, 2I] as it moves those of [E, 2I].
            given = layout.from_b13(h13).to(device)
            activation: Callable[[torch.Tensor], torch.Tensor]
            activation = module._apply_gate if module.has_gate else module.act_fn  # type: ignore[assignment]
            return activation(given).to("cpu", torch.float64)

    return call
