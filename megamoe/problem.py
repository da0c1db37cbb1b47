"""``Problem``: every size and choice of one MoE layer, checked once, in one place."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal, get_args

from megamoe.activation import Activation

Recipe = Literal["fp32", "bf16", "fp8_block", "fp8_row", "mxfp4"]
Accumulate = Literal["fp32", "fast"]
WeightsApplied = Literal["after_down", "before_down"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One MoE layer over the ranks of a group.

    Args:
        hidden: H, columns of x and y; a multiple of 8 (16 bytes of bf16).
        intermediate: I, columns between the two GEMMs; a multiple of 8.
        num_experts: E over all ranks, at most 1024; divisible by ``world_size`` unless a placement is given.
        top_k: K, experts per token, 1 to 16 and at most E.
        world_size: R, ranks of the expert-parallel group.
        max_tokens: bound on T, tokens of one rank in one call.
        recipe: precision, see docs/architecture.md. ``fp32`` runs on the reference and staged engines only.
        accumulate: ``fp32`` promotes FP8 partial sums every 128 k; ``fast`` keeps them in the tensor core.
        activation: what stands between the GEMMs.
        bias: whether the experts carry b13 [E, 2I] and b2 [E, H].
        weights_applied: ``after_down`` multiplies the top-k weight onto w2's output (Hugging Face, torchtitan),
            ``before_down`` onto the activation (Megatron-Core, DeepGEMM).

    Raises:
        ValueError: a size or choice that no engine can do, with what was got and what is possible.
    """

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    world_size: int = 1
    max_tokens: int = 8192
    recipe: Recipe = "bf16"
    accumulate: Accumulate = "fp32"
    activation: Activation = field(default_factory=Activation)
    bias: bool = False
    weights_applied: WeightsApplied = "after_down"

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "num_experts", "top_k", "world_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.max_tokens, int) or self.max_tokens < 0:
            raise ValueError(f"max_tokens must be an integer of at least 0, got {self.max_tokens!r}")
        for name in ("hidden", "intermediate"):
            if getattr(self, name) % 8:
                raise ValueError(f"{name} must be a multiple of 8 (16 bytes of bf16), got {getattr(self, name)}")
        if self.num_experts > 1024:
            raise ValueError(f"num_experts must be at most 1024, got {self.num_experts}")
        if self.top_k > min(16, self.num_experts):
            raise ValueError(f"top_k must be at most 16 and at most num_experts ({self.num_experts}), got {self.top_k}")
        for name, choices in (
            ("recipe", get_args(Recipe)),
            ("accumulate", get_args(Accumulate)),
            ("weights_applied", get_args(WeightsApplied)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not isinstance(self.activation, Activation):
            raise ValueError(f"activation must be a megamoe.Activation, got {self.activation!r}")
        # Made once: torch.compile reads an attribute, where it can't follow json.
        object.__setattr__(self, "_json", json.dumps(dataclasses.asdict(self), sort_keys=True))

    @property
    def w13_rows(self) -> int:
        """Rows of one expert's w13: 2I if the activation is gated, else I."""
        return self.intermediate * (2 if self.activation.gated else 1)

    def to_json(self) -> str:
        """Text that ``from_json`` turns into an equal Problem; what torch.library ops carry."""
        text: str = self._json  # type: ignore[attr-defined]
        return text

    @staticmethod
    def from_json(text: str) -> Problem:
        """Inverse of ``to_json``."""
        fields = json.loads(text)
        fields["activation"] = Activation(**fields["activation"])
        return Problem(**fields)
