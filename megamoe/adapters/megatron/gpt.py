"""A small GPT with experts, its optimiser and its checkpoints, built from Megatron-Core's own parts."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from megamoe import env
from megamoe.adapters.megatron.options import Options
from megamoe.adapters.megatron.spec import use_megamoe

VOCABULARY = 256
# One tensor a parameter in the optimiser's state, under names that the number of optimisers does not change.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def name_what_is_missing() -> None:
    """Let 0.16 run without Transformer Engine: its router asks whether a name is None that it never bound."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


@contextlib.contextmanager
def model_parallel(options: Options, *, ep: int) -> Iterator[None]:
    """Megatron's process groups over the initialised default group, and its random states.

    Megatron-Core forgets its groups without closing them, and each of gloo's keeps threads; here they are closed.
    """
    before = set(dist.distributed_c10d._world.pg_map)
    name_what_is_missing()
    minutes = math.ceil(env.get("MEGAMOE_TIMEOUT_S") / 60)  # not its own half an hour
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep, distributed_timeout_minutes=minutes)
    seed_everything(options)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        for group in [g for g in dist.distributed_c10d._world.pg_map if g not in before]:  # in one order on all ranks
            dist.destroy_process_group(group)


def seed_everything(options: Options) -> None:
    """Random states as at the start, so that models built after it are alike."""
    torch.manual_seed(options.seed)
    model_parallel_cuda_manual_seed(options.seed)


def make_config(options: Options, dtype: torch.dtype, *, ep: int, **more: Any) -> TransformerConfig:
    """A ``TransformerConfig``; ``more`` overrides its fields."""
    recompute: dict[str, Any] = {}
    if options.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif options.recompute != "none":
        recompute = {"recompute_granularity": "selective", "recompute_modules": [options.recompute]}
    fields: dict[str, Any] = {
        "num_layers": options.layers,
        "hidden_size": options.hidden,
        "ffn_hidden_size": options.intermediate,
        "num_attention_heads": options.heads,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "num_moe_experts": options.experts,
        "moe_ffn_hidden_size": options.intermediate,
        "moe_router_topk": options.top_k,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": options.aux_loss,
        "moe_token_dispatcher_type": "alltoall",
        "moe_shared_expert_intermediate_size": options.shared or None,
        "expert_model_parallel_size": ep,
        "finalize_model_grads_func": finalize_model_grads,
    }
    return TransformerConfig(**{**fields, **recompute, **more})


def make_spec(options: Options, config: TransformerConfig) -> Any:
    """The stock local layer spec, or the same with our experts."""
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization=config.normalization)
    if options.moe == "stock":
        return spec
    return use_megamoe(spec, config, engine=options.engine, fallback=False)


def make_model(options: Options, config: TransformerConfig, device: torch.device) -> DistributedDataParallel:
    """The model in Megatron's DDP, with the optimiser's sharding prepared."""
    model = GPTModel(
        config=config,
        transformer_layer_spec=make_spec(options, config),
        vocab_size=VOCABULARY,
        max_sequence_length=options.length,
        position_embedding_type="rope",
    ).to(device)
    if config.bf16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=options.distributed_optimizer
    )
    return DistributedDataParallel(config, ddp, model)


def make_optimizer(options: Options, config: TransformerConfig, model: DistributedDataParallel) -> Any:
    """Adam with a constant learning rate, weight decay on matrices."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        weight_decay=0.01,
        clip_grad=options.clip,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=options.distributed_optimizer,
    )
    return get_megatron_optimizer(settings, [model])


def _sharded_state(model: DistributedDataParallel, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    metadata = {**METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {"model": model.module.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=metadata)
    return state


@contextlib.contextmanager
def _loading_torch_adam(optimizer: Any) -> Iterator[None]:
    """Let torch's Adam in a distributed optimiser be loaded inside: Megatron-Core's code for it expects Apex or TE.

    - An optimiser that never stepped has no state dict and could not say what it wants to load: it gets zero moments.
    - ``step``, which torch keeps with each parameter, is missing among what is copied there.
    - Afterwards all parameters share one ``step`` tensor, which each of them would advance.
    """
    mended = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if HAVE_APEX_OR_TE or not isinstance(part, DistributedOptimizer):
            continue
        mended.append(part)
        state = part.optimizer.state
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
            if not state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                state[parameter] = {"step": torch.zeros(()), **zeros}
        part._set_main_param_and_optimizer_states = functools.partial(_set_with_step, part)
    yield
    for part in mended:
        del part._set_main_param_and_optimizer_states
        for entry in part.optimizer.state.values():
            entry["step"] = entry["step"].clone()


def _set_with_step(part: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    group, place = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group]["params"][place]
    step = part.optimizer.state[main_param]["step"]
    DistributedOptimizer._set_main_param_and_optimizer_states(part, model_param, {"step": step, **tensors})


def save(folder: Path, model: DistributedDataParallel, optimizer: Any) -> None:
    """Write weights and optimiser state as a distributed checkpoint, which either layer reads; collective."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(_sharded_state(model, optimizer, loading=False), str(folder))
    torch.distributed.barrier()


def load(folder: Path, model: DistributedDataParallel, optimizer: Any) -> None:
    """Inverse of ``save``, for any number of EP ranks; collective. Raises ValueError if there is no such folder.

    ``optimizer`` None reads the weights alone: Megatron-Core has one optimiser at EP 1 and two above, and does not turn
    the state of one into that of the other.
    """
    if not folder.is_dir():
        raise ValueError(f"--load must name the folder of a checkpoint, got {str(folder)!r}, which does not exist")
    with _loading_torch_adam(optimizer) if optimizer is not None else contextlib.nullcontext():
        state = dist_checkpointing.load(_sharded_state(model, optimizer, loading=True), str(folder))
        model.module.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
