"""Which rank holds which expert.

A *physical slot* is one copy of one expert's weights on one rank. Without replication there are E slots and
``contiguous`` puts expert e on rank e // (E / R).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """``slot_to_expert`` [R, S] int64: expert held in local slot s of rank r; every expert stands at least once."""

    slot_to_expert: torch.Tensor

    @property
    def world_size(self) -> int:
        return int(self.slot_to_expert.shape[0])

    @property
    def slots_per_rank(self) -> int:
        return int(self.slot_to_expert.shape[1])


def contiguous(num_experts: int, world_size: int) -> Placement:
    """Expert e on rank e // (E / R), in order. Raises ValueError unless E divides by R."""
    if num_experts % world_size:
        raise ValueError(
            f"num_experts ({num_experts}) must be divisible by the number of ranks ({world_size}), "
            "or a placement must say which rank holds which expert"
        )
    return Placement(torch.arange(num_experts).view(world_size, -1))
