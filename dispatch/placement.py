"""Which rank holds which expert, and which copy of a replicated expert a token goes to.

A *local slot* is one place for one expert's weights on one rank; the *physical slot* of local slot s on rank r is
r * S + s. Without replication there are E slots and ``contiguous`` puts expert e on rank e // (E / R).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class Placement:
    """``slot_to_expert`` [R, S] int64 on the CPU: expert held in local slot s of rank r.

    Every expert stands at least once, and at most once on one rank (a second copy there would balance nothing).
    E is the largest id + 1. Equal tables are equal and hash alike.

    Raises:
        ValueError: an expert is missing, or stands twice on one rank, or the table is not [R, S] int64 on the CPU.
    """

    slot_to_expert: torch.Tensor
    _on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        table = self.slot_to_expert
        if table.dim() != 2 or table.dtype != torch.int64 or table.device.type != "cpu" or table.numel() == 0:
            raise ValueError(
                "slot_to_expert must be a non-empty [ranks, slots] int64 tensor on the CPU, "
                f"got {tuple(table.shape)} {table.dtype} on {table.device}"
            )
        if int(table.min()) < 0:
            raise ValueError(f"slot_to_expert must hold expert ids of at least 0, got {int(table.min())}")
        missing = (torch.bincount(table.flatten()) == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"every expert must stand in some slot; missing: {missing[:8]} of {self.num_experts}")
        ordered = table.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
        if len(twice):
            rank, at = twice[0].tolist()
            raise ValueError(f"expert {int(ordered[rank, at])} stands twice on rank {rank}; copies need other ranks")
        # Made once: torch.compile reads an attribute, where it can't follow json.
        object.__setattr__(self, "_json", json.dumps(table.tolist()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and torch.equal(self.slot_to_expert, other.slot_to_expert)

    def __hash__(self) -> int:
        return hash((self.world_size, tuple(self.slot_to_expert.flatten().tolist())))

    @property
    def world_size(self) -> int:
        """R."""
        return int(self.slot_to_expert.shape[0])

    @property
    def slots_per_rank(self) -> int:
        """S, local slots of each rank."""
        return int(self.slot_to_expert.shape[1])

    @property
    def num_experts(self) -> int:
        """E, distinct experts; R * S minus the redundant copies."""
        return int(self.slot_to_expert.max()) + 1

    def copies(self) -> torch.Tensor:
        """[E] int64: in how many slots each expert stands."""
        return torch.bincount(self.slot_to_expert.flatten(), minlength=self.num_experts)

    def expert_slots(self) -> torch.Tensor:
        """[E, C] int64: physical slots of each expert, ascending, -1 after the last copy; C = most copies of any.

        >>> Placement(torch.tensor([[0, 1], [2, 0]])).expert_slots().tolist()
        [[0, 3], [1, -1], [2, -1]]
        """
        copies = self.copies()
        slots = torch.full((self.num_experts, int(copies.max())), -1, device="cpu")
        experts, order = self.slot_to_expert.flatten().sort(stable=True)
        nth = torch.arange(len(experts), device="cpu") - (copies.cumsum(0) - copies)[experts]
        slots[experts, nth] = order
        return slots

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(``expert_slots``, ``copies``) on ``device``; the first use copies them: do that before graph capture."""
        if device not in self._on_device:
            self._on_device[device] = (self.expert_slots().to(device), self.copies().to(device))
        return self._on_device[device]

    def route(self, experts: torch.Tensor, source_rank: int) -> torch.Tensor:
        """Physical slot of every route of one source rank; no host sync once ``tables`` is on the device.

        Copies take turns: token t of rank r goes to copy (t + r) mod n of an expert with n copies, so the choice
        needs no counts, is the same in every run, and an expert that stands twice in a row stays on one rank.

        Args:
            experts: [T, K] int64, expert ids in [0, E) or -1.
            source_rank: rank that holds the tokens.

        Returns:
            [T, K] int64, physical slots, -1 where ``experts`` is -1.
        """
        slots, copies = self.tables(experts.device)
        expert = experts.clamp(min=0)
        turn = torch.arange(source_rank, source_rank + experts.shape[0], device=experts.device)
        return torch.where(experts >= 0, slots[expert, turn[:, None] % copies[expert]], -1)

    def to_json(self) -> str:
        """Text that ``from_json`` turns into an equal Placement."""
        text: str = self._json  # type: ignore[attr-defined]
        return text

    @staticmethod
    def from_json(text: str) -> Placement:
        """Inverse of ``to_json``."""
        return Placement(torch.tensor(json.loads(text), device="cpu"))


def contiguous(num_experts: int, world_size: int) -> Placement:
    """Expert e on rank e // (E / R), in order. Raises ValueError unless E divides by R."""
    if num_experts % world_size:
        raise ValueError(
            f"num_experts ({num_experts}) must be divisible by the number of ranks ({world_size}), "
            "or a placement must say which rank holds which expert"
        )
    return Placement(torch.arange(num_experts, device="cpu").view(world_size, -1))
