"""``MegaMoE``: a router, experts spread over the ranks of a group, and shared experts, as one module."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megamoe.activation import Activation, ActivationName
from megamoe.dispatch.placement import Placement, contiguous
from megamoe.dtensor import draw
from megamoe.experts import Experts
from megamoe.problem import Accumulate, Problem, Recipe, WeightsApplied
from megamoe.router import Router, RouterConfig
from megamoe.shared import SharedExperts


class MegaMoE(nn.Module):
    """A mixture-of-experts feed-forward layer: y = sum over the chosen experts + shared experts.

    A call is a collective of ``group``: every rank calls the same layers in the same order, forward and backward, each
    with its own tokens, 0 included. docs/parallel-training.md says how gradients of experts and of everything else are
    put on one scale.

    Args:
        hidden: H, a multiple of 8.
        intermediate: I of one expert, a multiple of 8.
        num_experts: E over all ranks.
        top_k: K, experts per token.
        router: settings of the gate; a name from ``megamoe.router.PRESETS`` takes a model's settings with this layer's
            sizes. None is softmax top-k without balance losses.
        group: the ranks the experts are spread over; None means the default group, or this rank alone
            where torch.distributed is not initialised.
        data_group: the ranks whose tokens form one batch, for balance losses, the router's bias, and the mean of the
            gradients; ``group`` by default. Larger than ``group`` when several groups of experts train side by side.
        replica_group: with such a larger ``data_group``, the ranks that hold the same experts as this one.
        placement: which rank of ``group`` holds which expert; contiguous by default.
        engine: as in ``mega_moe``.
        recipe, accumulate, weights_applied, max_tokens: as in ``Problem``.
        activation: an ``Activation`` or its name.
        bias: whether experts carry biases.
        num_shared: shared experts, run as one dense MLP of width ``num_shared * intermediate`` on every rank.
        generator: where the seed of this layer's weights is drawn from; the default generator if None. Seed it alike on
            all ranks: then every weight starts the same whatever the number of ranks.
        init_std: standard deviation of all weights; None means 1 / sqrt(columns).

    Attributes:
        losses: the router's losses of the last call, coefficients included, with their graph; recomputation under
            activation checkpointing leaves them alone. ``forward(..., return_losses=True)`` hands them out instead.

    Raises:
        ValueError: sizes or groups that do not fit, with got and expected.
    """

    last_counts: torch.Tensor
    total_counts: torch.Tensor
    losses: dict[str, torch.Tensor]

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int,
        *,
        router: RouterConfig | str | None = None,
        group: dist.ProcessGroup | None = None,
        data_group: dist.ProcessGroup | None = None,
        replica_group: dist.ProcessGroup | None = None,
        placement: Placement | None = None,
        engine: str = "auto",
        recipe: Recipe = "bf16",
        accumulate: Accumulate = "fp32",
        weights_applied: WeightsApplied = "after_down",
        max_tokens: int = 8192,
        activation: Activation | ActivationName = "swiglu",
        bias: bool = False,
        num_shared: int = 0,
        generator: torch.Generator | None = None,
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        world_size = _size(group)
        self.problem = Problem(
            hidden=hidden,
            intermediate=intermediate,
            num_experts=num_experts,
            top_k=top_k,
            world_size=world_size,
            max_tokens=max_tokens,
            recipe=recipe,
            accumulate=accumulate,
            activation=Activation(activation) if isinstance(activation, str) else activation,
            bias=bias,
            weights_applied=weights_applied,
        )
        if num_shared < 0:
            raise ValueError(f"num_shared must be at least 0, got {num_shared}")
        self.group = group
        self.data_group = group if data_group is None else data_group
        self.replica_group = replica_group
        if world_size > 1 and world_size * _size(replica_group) != _size(self.data_group):
            raise ValueError(
                f"group ({world_size} ranks) times replica_group ({_size(replica_group)}) must be data_group "
                f"({_size(self.data_group)} ranks)"
            )
        placement = contiguous(num_experts, world_size) if placement is None else placement
        if (placement.world_size, placement.num_experts) != (world_size, num_experts):
            raise ValueError(
                f"placement must be of {num_experts} experts over {world_size} ranks, got {placement.num_experts} "
                f"over {placement.world_size}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = Router(_router_config(router, self.problem), group=self.data_group, **factory)
        self.experts = Experts(self.problem, placement, group, engine=engine, **factory)
        self.shared: SharedExperts | None = None
        if num_shared:
            width = num_shared * intermediate
            self.shared = SharedExperts(hidden, width, self.problem.activation, bias=bias, **factory)
        # Not in state_dict: figures about this rank's tokens. DDP must not broadcast them (see parallel.ignore_in_ddp).
        for name in ("last_counts", "total_counts"):
            self.register_buffer(name, torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)
        self.losses = {}
        self.init_std = init_std
        where = "cpu" if generator is None else generator.device
        self.seed = int(torch.randint(2**62, (), generator=generator, device=where))
        if not self.router.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All weights anew from this layer's seed, and the statistics to 0; after ``to_empty`` from the meta device.

        Also where FSDP has sharded the parameters.
        """
        self.router.reset_parameters()
        generator = torch.Generator(self.router.weight.device).manual_seed(self.seed)
        draw(self.router.weight, self.init_std or self.problem.hidden**-0.5, generator)
        self.experts.reset_parameters(self.seed + 2, self.init_std)
        if self.shared is not None:
            self.shared.reset_parameters(self.seed + 1, self.init_std)
        self.reset_counts()
        self.last_counts.zero_()

    def forward(
        self, x: torch.Tensor, padding_mask: torch.Tensor | None = None, *, return_losses: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One call with this rank's tokens.

        Args:
            x: [..., S, H]; all leading dimensions together are T tokens, 0 allowed.
            padding_mask: [..., S] bool, True for padding: no expert, no loss, no count; only shared experts see it.
            return_losses: return (y, losses) and leave ``self.losses`` alone. For activation checkpointing inside
                ``torch.compile``, where a module cannot keep anything.

        Returns:
            y in x's shape and dtype, whatever the recipe and autocast compute in.
        """
        token_mask = None if padding_mask is None else ~padding_mask
        topk_idx, topk_weights, losses = self.router(x, token_mask)
        if not _recomputing():
            self._count(topk_idx)
            if not return_losses:
                self.losses = losses
        y: torch.Tensor = self.experts(x.reshape(-1, x.shape[-1]), topk_idx, topk_weights).view(x.shape)
        if self.shared is not None:
            y = y + self.shared(x).to(x.dtype)
        return (y, losses) if return_losses else y

    @property
    def aux_loss(self) -> torch.Tensor:
        """Sum of ``losses`` of the last call, fp32 scalar, to be added to the task's loss; 0 without losses."""
        zero = torch.zeros((), device=self.last_counts.device)
        return torch.stack(list(self.losses.values())).sum() if self.losses else zero

    def expert_counts(self, *, running: bool = False, across: dist.ProcessGroup | None = None) -> torch.Tensor:
        """[E] int64: how many of this rank's (token, k) pairs chose each expert.

        Args:
            running: since the last ``reset_counts`` instead of in the last call.
            across: sum over these ranks, a collective of theirs; this rank's alone if None.
        """
        counts = (self.total_counts if running else self.last_counts).clone()
        if across is not None:
            dist.all_reduce(counts, group=across)
        return counts

    def reset_counts(self) -> None:
        """Start the running counts anew."""
        self.total_counts.zero_()

    @torch.no_grad()
    def _count(self, topk_idx: torch.Tensor) -> None:
        bins = topk_idx.new_zeros(self.problem.num_experts + 1)
        flat = topk_idx.flatten() + 1  # -1 falls into bin 0
        counts = bins.scatter_add(0, flat, torch.ones_like(flat))[1:]
        self.last_counts.copy_(counts)
        self.total_counts.add_(counts)

    def __deepcopy__(self, memo: dict[int, Any]) -> MegaMoE:
        """A copy with weights of its own in the same groups: a process group cannot be copied."""
        for group in (self.group, self.data_group, self.replica_group):
            memo[id(group)] = group
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        clone.experts._mark()  # copies of parameters lose their attributes
        return clone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "losses": {}}  # tensors with a graph can be neither copied nor pickled

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.group is not None or self.data_group is not None:
            raise TypeError(
                "a MegaMoE with a process group cannot be pickled; save megamoe.checkpoint.full_state_dict(module)"
            )
        return super().__reduce_ex__(protocol)

    def extra_repr(self) -> str:
        """Ranks and engine, for ``print(model)``; router and experts tell the rest."""
        return f"ranks={self.problem.world_size}, engine={self.experts.engine}"


def total_aux_loss(module: nn.Module) -> torch.Tensor | float:
    """Sum of ``aux_loss`` of every MegaMoE in ``module``; 0.0 if there is none."""
    return sum((m.aux_loss for m in module.modules() if isinstance(m, MegaMoE)), start=0.0)


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _router_config(router: RouterConfig | str | None, problem: Problem) -> RouterConfig:
    expected = {"hidden": problem.hidden, "num_experts": problem.num_experts, "top_k": problem.top_k}
    if router is None:
        return RouterConfig(**expected)  # type: ignore[arg-type]  # three integers
    if isinstance(router, str):
        return RouterConfig.preset(router, **expected)
    got = {name: getattr(router, name) for name in expected}
    if got != expected:
        raise ValueError(f"router must have the layer's sizes {expected}, got {got}")
    return router


def _recomputing() -> bool:
    """Whether activation checkpointing runs the forward a second time: then it happens inside a backward pass.

    A compiler decides itself what to recompute, and keeps side effects out of it.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
