"""``Experts``: the experts of one layer that this rank holds, as parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megamoe.dispatch.placement import Placement, contiguous
from megamoe.dtensor import draw, store
from megamoe.functional import mega_moe
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights


class Experts(nn.Module):
    """Routed tokens through the experts of all ranks; a module of its own so that FSDP can wrap or skip it.

    Attributes:
        w13, w2, b13, b2: this rank's slots, shapes as in ``ExpertWeights``; biases None without ``problem.bias``.
            If other ranks hold other experts, each parameter carries ``megamoe_expert = True`` and
            ``allreduce = False`` (Megatron-Core's mark), so that data-parallel wrappers can tell it from a replicated
            one. Copying a parameter loses such marks; whoever can see the module asks ``sharded`` instead.

    Args:
        problem: sizes and choices.
        placement: which rank holds which expert.
        group: the expert-parallel ranks; None only where torch.distributed is not initialised.
        engine: as in ``mega_moe``.
    """

    w13: nn.Parameter
    w2: nn.Parameter
    b13: nn.Parameter | None
    b2: nn.Parameter | None

    def __init__(
        self,
        problem: Problem,
        placement: Placement,
        group: dist.ProcessGroup | None,
        *,
        engine: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.problem = problem
        self.placement = placement
        self.group = group
        self.engine = engine
        uneven = problem.num_experts % problem.world_size
        self.contiguous = not uneven and placement == contiguous(problem.num_experts, problem.world_size)
        rank = 0 if group is None else dist.get_rank(group)
        self.local_experts: list[int] = placement.slot_to_expert[rank].tolist()
        S, H, I = placement.slots_per_rank, problem.hidden, problem.intermediate  # noqa: E741 - the paper's letter
        shapes: dict[str, tuple[int, ...]] = {"w13": (S, problem.w13_rows, H), "w2": (S, H, I)}
        if problem.bias:
            shapes |= {"b13": (S, problem.w13_rows), "b2": (S, H)}
        for name in ("w13", "w2", "b13", "b2"):
            shape = shapes.get(name)
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self._mark()

    @property
    def sharded(self) -> bool:
        """Whether other ranks hold other experts, so that these parameters must not be averaged over all ranks."""
        return self.problem.world_size > 1

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float | None = None) -> None:
        """w13 from N(0, 1/H), w2 from N(0, 1/I), or both from N(0, std^2); biases 0.

        Each tensor of expert e is drawn in fp32 from a generator of its own, ``seed + 2e`` and ``seed + 2e + 1``, so it
        starts the same whatever rank holds it, in however many copies. CPU and CUDA generators draw differently.
        """
        for n, weight in enumerate((self.w13, self.w2)):
            whole: torch.Tensor = weight
            if isinstance(weight, DTensor):
                whole = torch.empty(weight.shape, device=weight.device, dtype=weight.dtype)
            for slot, expert in enumerate(self.local_experts):
                generator = torch.Generator(weight.device).manual_seed((seed + 2 * expert + n) % 2**63)
                draw(whole[slot], std or 1 / math.sqrt(weight.shape[-1]), generator)
            if isinstance(weight, DTensor):
                store(weight, whole)
        for bias in (self.b13, self.b2):
            if bias is not None:
                bias.zero_()

    def forward(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], topk_idx [T, K] global ids or -1, topk_weights [T, K] fp32 -> y [T, H] in x's dtype; a collective.

        x of any floating dtype is cast to what the recipe takes.
        """
        y = mega_moe(
            x.to(torch.float32 if self.problem.recipe == "fp32" else torch.bfloat16),
            topk_idx,
            topk_weights,
            ExpertWeights(self.w13, self.w2, self.b13, self.b2),
            problem=self.problem,
            group=self.group,
            engine=self.engine,
            placement=None if self.contiguous else self.placement,
        )
        return y.to(x.dtype)

    def _mark(self) -> None:
        for parameter in self.parameters(recurse=False):
            parameter.megamoe_expert = self.sharded  # type: ignore[attr-defined]
            parameter.allreduce = not self.sharded  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._mark()  # leaving the meta device makes new parameters
        return self

    def _load_from_state_dict(  # noqa: PLR0917 - torch's hook
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict[str, object],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = state_dict.get(prefix + "w13")
        if given is not None and len(given) == self.problem.num_experts != len(self.w13):
            error_msgs.append(
                f"{prefix}w13 holds all {len(given)} experts, but this rank holds {len(self.w13)}: "
                "load a full state with megamoe.checkpoint.load_full_state_dict"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """What is here, for ``print(model)``."""
        p = self.problem
        held = f"{len(self.local_experts)} of {p.num_experts} experts"
        return f"{held}, {p.hidden} x {p.intermediate}, {p.activation.name}{', bias' if p.bias else ''}, {p.recipe}"
