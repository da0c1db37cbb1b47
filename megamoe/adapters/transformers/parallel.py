"""Experts of a transformers model spread over ranks: through ``from_pretrained``, or taken from a whole model.

``from_pretrained`` reads only this rank's experts. transformers 5.18 and later have a registry for what then moves the
tokens (``EPImplementation``); before, styles of a tensor-parallel plan do it. ``parallel_arguments`` hides the
difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megamoe.adapters.transformers.experts import Settings, forget, run_experts, state_of
from megamoe.adapters.transformers.forms import is_experts

SHARED = "megamoe"  # the ranks of a tensor-parallel group hold one batch: each takes a slice of it to the experts
OWN = "megamoe_data_parallel"  # every rank brings a batch of its own, whatever the mesh says
_OLD_STYLE = {SHARED: "megamoe_ep_experts", OWN: "megamoe_ep_data_parallel_experts"}
_WHOLE = "megamoe_replicated"  # a style that leaves a module as it is

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def has_implementations() -> bool:
    """Whether this transformers has the registry of EPImplementations."""
    try:
        import transformers.distributed.expert_parallel  # noqa: F401
    except ImportError:
        return False
    return True


def sliced(experts: Experts, mesh: Any) -> Experts:
    """``experts`` for ranks of ``mesh`` that hold the same tokens: each brings its slice, and all get all results.

    Slices are those of ``torch.chunk``; the last ranks' may be short or empty. In backward the slices' gradients are
    gathered, so that every rank has those of the whole batch.
    """

    def part(t: torch.Tensor) -> torch.Tensor:
        whole = DTensor.from_local(t, mesh, [Replicate()], run_check=False)
        mine: torch.Tensor = whole.redistribute(mesh, [Shard(0)]).to_local()
        return mine

    def call(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        y = experts(part(x), part(top_k_index), part(top_k_weights)).contiguous()
        T, H = x.shape
        whole: torch.Tensor = DTensor.from_local(
            y, mesh, [Shard(0)], shape=torch.Size((T, H)), stride=(H, 1)
        ).full_tensor()
        return whole

    return call


def register_parallel(settings: Settings) -> None:
    """Make both ways known to transformers."""
    if has_implementations():
        _register_implementations(settings)
    else:
        _register_styles(settings)


def parallel_arguments(config: Any, ranks: int, *, data_parallel: bool = False) -> dict[str, Any]:
    """Keyword arguments for ``from_pretrained`` that spread the experts over ``ranks`` ranks, the rest on each of them.

    Args:
        config: configuration of a language model (an ``AutoModelForCausalLM``); with 5.23 its tensor-parallel plan is
            replaced, in this object alone.
        ranks: all ranks of torch.distributed, between which rank r holds the r-th part of every layer's experts.
        data_parallel: every rank calls the model with a batch of its own (of any size: what matters is that all call
            equally often). Otherwise all ranks call it with the same batch, and each takes a slice of every layer's
            tokens to the experts.

    Raises:
        ValueError: the model has no expert-parallel plan in this transformers.
    """
    from transformers.distributed import DistributedConfig

    kind = OWN if data_parallel else SHARED
    plan = getattr(config.get_text_config(), "base_model_ep_plan", None)
    if not plan:
        raise ValueError(
            f"transformers has no expert-parallel plan for {type(config).__name__}: load the model whole and call "
            f"megamoe.adapters.transformers.shard_experts"
        )
    text = config.get_text_config()
    if has_implementations():
        # An empty tp_plan means "no tensor parallelism" by its documentation, and is refused by 5.23.
        text.base_model_tp_plan = {"embed_tokens": _WHOLE}
        distributed = DistributedConfig(
            tp_size=ranks, tp_plan={"lm_head": _WHOLE}, ep_size=ranks, ep_implementation=kind
        )
    else:
        styles = {"moe_tp_experts": _OLD_STYLE[kind], "grouped_gemm": "grouped_gemm"}  # and none for the router
        names = {f"model.{name}": styles[style] for name, style in plan.items() if style in styles}
        distributed = DistributedConfig(tp_size=ranks, tp_plan=names)
    return {"config": config, "distributed_config": distributed}


def shard_experts(
    model: nn.Module, group: dist.ProcessGroup | None = None, *, settings: Settings | None = None
) -> nn.Module:
    """Keep this rank's part of every experts module of a whole ``model``, and run them over ``group``; in place.

    Works with every transformers that the adapter works with, for models of any origin: built from a configuration, or
    loaded whole. Afterwards every rank calls the model equally often, with a batch of its own, that may be empty where
    the rest of the model can do without tokens. Gradients of experts are sums over the tokens of all ranks.

    Args:
        model: the same weights on all ranks.
        group: the ranks, default WORLD.
        settings: engine and recipe.

    Raises:
        ValueError: experts that megamoe can't run, or whose number the ranks do not divide; the model is as before.
    """
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("shard_experts needs torch.distributed to be initialised")
    modules = {name: m for name, m in model.named_modules() if is_experts(m)}
    if not modules:
        raise ValueError(
            f"{type(model).__name__} holds no experts that transformers runs through its experts interface"
        )
    for name, module in modules.items():
        state_of(module)
        if int(module.num_experts) % group.size():
            raise ValueError(f"{name} has {module.num_experts} experts, not divisible by {group.size()} ranks")
    for module in modules.values():
        keep_part(module, group.rank(), group.size())
        module.forward = spread(module, group, settings or Settings())
    forget(model)
    return model


def lend_experts(model: nn.Module, *, backward: bool = False) -> None:
    """What a rank without a batch calls where the others call ``model``: its experts work for their tokens.

    Only for experts that are spread with a batch of its own on each rank. Layers are met in the order of
    ``model.modules()``, which is that of the forward pass in all models of the docs.

    Args:
        model: a model whose other ranks run one forward.
        backward: whether the others differentiate; gradients of this rank's experts then stand in ``.grad``.
    """
    modules = [m for m in model.modules() if is_experts(m)]
    with torch.set_grad_enabled(backward):
        x: torch.Tensor | None = None
        for module in modules:
            form = state_of(module).form
            like = getattr(module, form.up)
            if x is None:  # parameters may be DTensors, tokens are not
                x = torch.zeros(0, form.hidden, dtype=like.dtype, device=like.device).requires_grad_(backward)
            top_k = top_k_of(module)
            index = torch.zeros(0, top_k, dtype=torch.int64, device=like.device)
            x = module(x, index, torch.zeros(0, top_k, dtype=torch.float32, device=like.device))
        if backward and x is not None:
            x.sum().backward()  # type: ignore[no-untyped-call]


def top_k_of(module: nn.Module) -> int:
    """Experts a token visits: every rank of a call has to name the same number."""
    config = getattr(module, "config", None)
    value = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    if value is None:
        raise ValueError(f"the configuration of {type(module).__name__} does not say how many experts a token visits")
    return int(value)


def keep_part(module: nn.Module, rank: int, ranks: int) -> None:
    """Shrink the parameters of an experts module to the rank's part of ``ranks``."""
    local = int(module.num_experts) // ranks  # type: ignore[arg-type]
    for key, whole in list(module.named_parameters(recurse=False)):
        part = whole.detach()[rank * local : (rank + 1) * local].clone()
        module.register_parameter(key, nn.Parameter(part, requires_grad=whole.requires_grad))
    module.num_experts = local  # type: ignore[assignment]


def spread(module: nn.Module, group: dist.ProcessGroup, settings: Settings) -> Experts:
    """The call of ``module``'s experts over ``group``, each rank with its own tokens and global ids."""

    def call(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return run_experts(module, x, top_k_index, top_k_weights, settings=settings, group=group)

    return call


def _register_implementations(settings: Settings) -> None:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    class MegaMoE(EPImplementation):  # type: ignore[misc]
        """The meshes as they are: slices where ranks share a batch."""

        own_batch = False

        def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            state_of(experts)  # refuses here, while the model is made
            run = spread(experts, ep_mesh.get_group(), settings)
            self._run = run if self.own_batch or tp_mesh.size() == 1 else sliced(run, tp_mesh)

        def __call__(
            self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            return self._run(hidden_states, top_k_index, top_k_weights)

    class MegaMoEDataParallel(MegaMoE):
        """A batch of its own on every rank."""

        own_batch = True

    EPImplementationInterface.register(SHARED, MegaMoE)
    EPImplementationInterface.register(OWN, MegaMoEDataParallel)
    ALL_PARALLEL_STYLES.register(_WHOLE, TensorParallelLayer())


def _register_styles(settings: Settings) -> None:
    from transformers.distributed.tensor_parallel import (
        ALL_PARALLEL_STYLES,
        MoeExpertsParallel,
        _use_local_dtensor_params,
    )

    class MegaMoEExperts(MoeExpertsParallel):  # type: ignore[misc]
        """In place of the router's masks and the sum over ranks."""

        def __init__(self, own_batch: bool) -> None:
            super().__init__()
            self.own_batch = own_batch

        def install_forward(self, module: nn.Module, mesh: Any, **_: Any) -> nn.Module:
            state_of(module)
            run = spread(module, mesh.get_group(), settings)
            call = run if self.own_batch else sliced(run, mesh)

            def forward(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
                with _use_local_dtensor_params(module):
                    return call(x, top_k_index, top_k_weights)

            module.forward = forward
            return module

    for kind, name in _OLD_STYLE.items():
        ALL_PARALLEL_STYLES.register(name, MegaMoEExperts(kind == OWN))
