"""``MegaMoEExperts``: this rank's experts as two stacked parameters, with Megatron-Core's manners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    _initialize_affine_weight_cpu,
    _initialize_affine_weight_gpu,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule

from megamoe.adapters.megatron import checkpoint
from megamoe.adapters.megatron.gradients import ExpertsFunction
from megamoe.adapters.megatron.limits import MAX_TOKENS, problem_of
from megamoe.engines.run import Terms
from megamoe.weights import ExpertWeights


class MegaMoEExperts(MegatronModule):  # type: ignore[misc]  # megatron-core carries no types
    """Stands where ``SequentialMLP`` or ``TEGroupedMLP`` stands, behind a ``PassThroughDispatcher``.

    Attributes:
        w13 [S, 2I, H] (gate rows, then up rows), w2 [S, H, I]: the S experts of this rank, from ``first_expert`` on.
            They carry ``allreduce`` and the tensor-parallel marks of a stock expert's weights, start with the numbers
            of ``SequentialMLP`` under the same seed, and appear in state dicts under the stock keys.

    Args:
        num_local_experts: S.
        config: a ``TransformerConfig``.
        pg_collection: process groups; ``ep`` and ``expt_dp`` are used.
        name: ignored; 0.19 passes it.
        engine, max_tokens: as in ``mega_moe`` and ``Problem``.
        grouped_keys: state dicts carry the keys of ``TEGroupedMLP``, else those of ``SequentialMLP``; both are read.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        *,
        pg_collection: Any,
        name: str | None = None,
        engine: str = "auto",
        max_tokens: int = MAX_TOKENS,
        grouped_keys: bool = False,
    ) -> None:
        super().__init__(config=config)
        group = pg_collection.ep
        self.problem = problem_of(config, ep_size=group.size(), max_tokens=max_tokens)
        self.terms = Terms(self.problem.to_json(), group.group_name if group.size() > 1 else "", engine, "")
        self.num_local_experts = num_local_experts
        self.first_expert = group.rank() * num_local_experts
        self.replica_rank = pg_collection.expt_dp.rank()
        self.grouped_keys = grouped_keys
        self.fuses_main_grad = bool(config.gradient_accumulation_fusion)
        self.delays_weight_grads = bool(
            getattr(config, "delay_wgrad_compute", False)
            or getattr(config, "overlap_dispatch_backward_with_experts_wgrad", False)
        )
        self.waiting: list[Callable[[], ExpertWeights]] = []
        self.hooks: list[Callable[[], None]] = []

        S, H, I = num_local_experts, self.problem.hidden, self.problem.intermediate  # noqa: E741 - the paper's letter
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        for name_, shape in (("w13", (S, 2 * I, H)), ("w2", (S, H, I))):
            weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=config.params_dtype))
            self.register_parameter(name_, weight)
        if config.perform_initialization:
            self._draw(config)
        separate = config.expert_model_parallel_size > 1 or (
            config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        for weight, dim in ((self.w13, 1), (self.w2, 2)):
            set_tensor_model_parallel_attributes(tensor=weight, is_parallel=True, dim=dim, stride=1)
            weight.allreduce = not separate
            if self.delays_weight_grads:
                weight.skip_backward_post_hook = True

    def _draw(self, config: Any) -> None:
        """In ``SequentialMLP``'s order, from the same generator: fc1 and fc2 of one expert after another."""
        for s in range(self.num_local_experts):
            for weight, dim, method in (
                (self.w13.data[s], 0, config.init_method),
                (self.w2.data[s], 1, config.output_layer_init_method),
            ):
                if config.use_cpu_initialization:
                    rows, columns = weight.shape
                    _initialize_affine_weight_cpu(
                        weight, rows, columns, weight.shape[dim], dim, method,
                        params_dtype=config.params_dtype, rank=0, world_size=1,
                    )  # fmt: skip
                else:
                    _initialize_affine_weight_gpu(weight, method, partition_dim=dim, is_expert=True)

    def forward(
        self, rows: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """rows [T, H], topk_idx [T, K] global ids or -1, topk_weights [T, K] fp32 -> (y [T, H], None); a collective."""
        tensors = (rows, topk_weights, self.w13, self.w2)
        save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        y = ExpertsFunction.apply(*tensors, topk_idx, self, save)  # type: ignore[no-untyped-call]
        return y, None

    def backward_dw(self) -> None:
        """Compute the weight gradients that backward left, oldest first, and let the optimiser's hooks see them."""
        waiting, self.waiting = self.waiting, []
        for compute in waiting:
            grads = compute()
            for weight, grad in ((self.w13, grads.w13), (self.w2, grads.w2)):
                taken = self.into_main_grad(weight, grad, always=not self.hooks)
                if not taken:
                    weight.grad = grad if weight.grad is None else weight.grad + grad
                elif self.hooks and weight.grad is None:
                    weight.grad = grad  # a dummy that the hook takes away; it asks for one
        for hook in self.hooks if waiting else ():
            hook()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Megatron's DDP: called after ``backward_dw`` for each parameter, as autograd won't."""
        self.hooks.append(hook)

    def into_main_grad(self, weight: torch.nn.Parameter, grad: torch.Tensor, *, always: bool = False) -> bool:
        """Whether ``grad`` was added to ``weight.main_grad``: with gradient accumulation fusion, or ``always``."""
        if not (self.fuses_main_grad or always) or not hasattr(weight, "main_grad"):
            return False
        weight.main_grad.add_(grad)
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # DDP then drops ``grad``
        if getattr(weight, "zero_out_wgrad", False):
            grad.zero_()  # DDP adds it all the same
        return True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update(checkpoint.local_state(self, prefix, keep_vars))

    def _load_from_state_dict(  # noqa: PLR0917 - torch's hook
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, object],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing, unexpected, errors = checkpoint.load_local_state(self, state_dict, prefix)
        if strict:
            missing_keys += missing
            unexpected_keys += unexpected
        error_msgs += errors

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Under the keys, shapes and offsets of ``SequentialMLP`` and ``TEGroupedMLP``, for any number of EP ranks."""
        singleton = bool((metadata or {}).get("singleton_local_shards", False))
        return checkpoint.sharded_state(self, prefix, sharded_offsets, singleton=singleton)
