"""A small GPT with experts, its optimiser and its checkpoints, built from Megatron-Core's own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from megamoe.adapters.megatron.options import Options
from megamoe.adapters.megatron.spec import use_megamoe

VOCABULARY = 256
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def start(options: Options, *, ep: int) -> None:
    """Megatron's process groups over the initialised default group, and its random states."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # without Transformer Engine, 0.16's router asks for a name it never bound
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)
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
    weights = model.module.sharded_state_dict(metadata=metadata)
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata),
    }


def save(folder: Path, model: DistributedDataParallel, optimizer: Any) -> None:
    """Write weights and optimiser state as a distributed checkpoint, which either layer reads; collective."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(_sharded_state(model, optimizer, loading=False), str(folder))
    torch.distributed.barrier()


def load(folder: Path, model: DistributedDataParallel, optimizer: Any) -> None:
    """Inverse of ``save``, for any number of EP ranks; collective. Raises ValueError if there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"--load must name the folder of a checkpoint, got {str(folder)!r}, which does not exist")
    state = dist_checkpointing.load(_sharded_state(model, optimizer, loading=True), str(folder))
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
