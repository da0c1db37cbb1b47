"""vLLM's MoE layers through ``mega_moe``: a pass-through prepare/finalize and experts that communicate themselves.

``register()`` puts ``MegaMoEMethod`` in the place of vLLM's ``UnquantizedFusedMoEMethod`` (its out-of-tree mechanism,
``CustomOp.register_oot``). The package's entry point in the group ``vllm.general_plugins`` does so in every process of
vLLM if ``MEGAMOE_VLLM=1``. Layers that ``MegaMoEExperts`` can't run keep vLLM's own kernel; a log line says why.

Written against vLLM 0.33: ``vllm/model_executor/layers/fused_moe/modular_kernel.py`` has the contracts.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.distributed import get_ep_group
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.prepare_finalize.passthrough import PassThroughPrepareAndFinalize
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
    UnquantizedMoeBackend,
)

from megamoe import env
from megamoe.activation import Activation
from megamoe.functional import mega_moe
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights

logger = logging.getLogger(__name__)


def register() -> None:
    """Take over unquantised MoE layers that are built from now on in this process; a second call changes nothing."""
    from vllm.model_executor.custom_op import op_registry_oot

    if op_registry_oot.get("UnquantizedFusedMoEMethod") is not MegaMoEMethod:
        UnquantizedFusedMoEMethod.register_oot(MegaMoEMethod)


def plugin() -> None:
    """vLLM's entry point: ``register()`` if ``MEGAMOE_VLLM=1``, else nothing."""
    if env.get("MEGAMOE_VLLM"):
        register()


def activation_of(config: Any) -> Activation | None:
    """What ``FusedMoEConfig`` asks for between the GEMMs; None if ``mega_moe`` has nothing that computes the same."""
    clamped = config.swiglu_limit is not None
    if config.activation == MoEActivation.SWIGLUOAI_UNINTERLEAVE:
        # gate * sigmoid(alpha * gate) * (up + beta), both clamped: vllm/model_executor/layers/activation.py.
        alpha = 1.0 if config.swiglu_alpha is None else float(config.swiglu_alpha)
        if not clamped or config.swiglu_beta != 1.0:
            return None
        return Activation("swiglu_clamped", limit=float(config.swiglu_limit), alpha=alpha)
    names = {
        MoEActivation.SILU: "swiglu",
        MoEActivation.GELU_TANH: "geglu",
        MoEActivation.RELU2_NO_MUL: "relu2",
    }
    if config.activation == MoEActivation.SILU and clamped:
        # silu(min(gate, limit)) * clamp(up), without alpha and beta: silu_and_mul_with_clamp there.
        return Activation("swiglu_limited", limit=float(config.swiglu_limit))
    name = names.get(config.activation)
    return None if name is None or clamped else Activation(name)  # type: ignore[arg-type]


def replicas(parallel: Any) -> tuple[int, int]:
    """(ranks that hold the same tokens, which of them this one is): tensor-parallel ranks unless sequence parallel.

    vLLM flattens data, prefill-context and tensor ranks, in this order, into expert-parallel ones and then says
    tp_size = 1 (``FusedMoEParallelConfig.make``).
    """
    if not parallel.use_ep or parallel.is_sequence_parallel:
        return 1, 0
    same = parallel.ep_size // (parallel.dp_size * parallel.pcp_size)
    return same, parallel.ep_rank % same


class MegaMoEPrepareAndFinalize(PassThroughPrepareAndFinalize):  # type: ignore[misc]
    """Hands tokens and routing on as they are; the experts do the rest."""

    def __init__(self, parallel: Any) -> None:
        super().__init__()
        self.complete = parallel.tp_size == 1 and replicas(parallel)[0] == 1

    def output_is_reduced(self) -> bool:
        """False where vLLM has to add outputs up: tensor-parallel ranks share tokens, or the columns of experts."""
        return bool(self.complete)


class MegaMoEExperts(mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """Unquantised bf16 experts: dispatch, both GEMMs, activation and combine by ``mega_moe``.

    ``group`` defaults to vLLM's expert-parallel device group, or this rank alone without expert parallelism. A call is
    a collective: vLLM runs dummy batches on data-parallel ranks without requests, so that every rank calls.
    """

    group: dist.ProcessGroup | str | None = None

    @staticmethod
    def activation_format() -> Any:
        """Standard: one row a token."""
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def is_supported_config(
        cls: Any,  # noqa: PLW0211 - vLLM's own name
        moe_config: Any,
        weight_key: Any,
        activation_key: Any,
        activation_format: Any,
    ) -> tuple[bool, str | None]:
        """(True, None), or (False, why), after vLLM's own questions, which ask the methods below."""
        supported, reason = mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        if not supported:
            return False, reason
        if activation_of(moe_config) is None:
            limits = (moe_config.swiglu_limit, moe_config.swiglu_alpha, moe_config.swiglu_beta)
            return False, f"megamoe has no {moe_config.activation} with limit, alpha, beta = {limits}"
        if moe_config.has_bias and moe_config.tp_size > 1:
            return False, "megamoe would add biases on each of the tensor-parallel ranks that share an expert"
        if moe_config.in_dtype != torch.bfloat16:
            return False, f"megamoe takes bfloat16 activations, got {moe_config.in_dtype}"
        try:
            problem_of(moe_config)
        except ValueError as error:
            return False, f"megamoe can't: {error}"
        return True, None

    @staticmethod
    def _supports_current_device() -> bool:
        return True  # ``mega_moe`` has an engine for every device

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        known = ("SILU", "GELU_TANH", "RELU2_NO_MUL", "SWIGLUOAI_UNINTERLEAVE")
        return activation in {getattr(MoEActivation, name) for name in known}

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        """Not where vLLM moves experts about (EPLB), batches tokens by expert, or spreads columns over data ranks."""
        return not (
            moe_parallel_config.enable_eplb
            or moe_parallel_config.use_batched_activation_format
            or (not moe_parallel_config.use_ep and moe_parallel_config.dp_size * moe_parallel_config.pcp_size > 1)
        )

    @property
    def expects_unquantized_inputs(self) -> bool:
        """True: ``mega_moe`` quantises for itself."""
        return True

    def finalize_weight_and_reduce_impl(self) -> Any:
        """Nothing is left to weigh or add."""
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(  # noqa: PLR0917 - vLLM's signature
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """No workspaces of vLLM's; output [M, K]."""
        return (0,), (0,), (M, K)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise ValueError unless this rank holds a contiguous share of the experts, the only placement taken here."""
        parallel = self.moe_config.moe_parallel_config
        expert_map = getattr(layer, "expert_map", None)
        if not parallel.use_ep or expert_map is None:
            return
        local = self.moe_config.num_local_experts
        expected = torch.full_like(expert_map, -1)
        first = parallel.ep_rank * local
        expected[first : first + local] = torch.arange(local, dtype=expert_map.dtype, device=expert_map.device)
        if self.moe_config.num_experts != local * parallel.ep_size or not torch.equal(expert_map, expected):
            raise ValueError(
                f"megamoe needs experts {first} to {first + local - 1} of {self.moe_config.num_experts} on "
                f"expert-parallel rank {parallel.ep_rank} of {parallel.ep_size}: use vLLM's linear expert placement "
                "and a number of experts that divides by the ranks"
            )

    def apply(  # noqa: PLR0917 - vLLM's signature
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write the combined output [M, K] of ``hidden_states`` [M, K]; ids are global, -1 for none."""
        if apply_router_weight_on_input:
            raise ValueError("megamoe applies router weights to outputs, got apply_router_weight_on_input=True")
        same, mine = replicas(self.moe_config.moe_parallel_config)
        if same > 1:  # every rank has all tokens: each answers for every same-th of them, and vLLM sums
            token = torch.arange(topk_ids.shape[0], device=topk_ids.device)
            topk_ids = torch.where((token % same == mine).unsqueeze(1), topk_ids, -1)
        y = mega_moe(
            hidden_states,
            topk_ids,
            topk_weights.float(),
            ExpertWeights(w1, w2, self.w1_bias, self.w2_bias),
            problem=problem_of(self.moe_config),
            group=self._group(),
        )
        output.copy_(y)

    def _group(self) -> Any:
        if self.group is not None:
            return self.group
        return get_ep_group().device_group if self.moe_config.moe_parallel_config.use_ep else "self"


def problem_of(config: Any) -> Problem:
    """``FusedMoEConfig`` as a Problem; ValueError for sizes that ``mega_moe`` doesn't do."""
    return Problem(
        hidden=config.hidden_dim,
        intermediate=config.intermediate_size_per_partition,
        num_experts=config.num_experts,
        top_k=config.experts_per_token,
        world_size=config.moe_parallel_config.ep_size,
        max_tokens=config.max_num_tokens,
        activation=activation_of(config) or Activation(),
        bias=config.has_bias,
    )


class MegaMoEMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """vLLM's method for unquantised layers, with ``MegaMoEExperts`` wherever they can run the layer."""

    def __init__(self, moe: Any) -> None:
        supported, reason = MegaMoEExperts.is_supported_config(
            MegaMoEExperts, moe, None, None, mk.FusedMoEActivationFormat.Standard
        )
        if not supported:
            super().__init__(moe)
            logger.info("an MoE layer keeps vLLM's own kernel: %s", reason)
            return
        # Past the choice among vLLM's backends, which raises where it knows none.
        super(UnquantizedFusedMoEMethod, self).__init__(moe)
        self.experts_cls = MegaMoEExperts
        self.unquantized_backend = UnquantizedMoeBackend.TRITON  # of all, the one that leaves weights as loaded
        self.supports_pre_processed_weights = True

    def _init_moe_kernel(self, layer: Any) -> None:
        if self.experts_cls is not MegaMoEExperts:
            super()._init_moe_kernel(layer)
            return
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        prepare_finalize = MegaMoEPrepareAndFinalize(self.moe.moe_parallel_config)
        self.moe_kernel = mk.FusedMoEKernel(prepare_finalize, MegaMoEExperts(self.moe, self.moe_quant_config))
