"""torchtitan's ``RoutedExperts`` through ``mega_moe``, as an override that leaves configurations and checkpoints alone.

Activate it where a job is configured, no code changed (torchtitan 0.3, ``torchtitan/config/override.py``)::

    --override.imports 'megamoe.adapters.torchtitan.megamoe_experts={"recipe": "bf16"}'

Parameters keep their names, shapes and sharding (``inner_experts.w1_EFD``, ``w3_EFD``, ``w2_EDF``; gpt-oss' ``mlp1_*``,
``mlp2_*``), so checkpoints load both ways. The token dispatcher stays in the tree, unused: what it would exchange,
``mega_moe`` does, over the mesh axis "ep"; without one, each rank runs its own experts (under tensor parallelism its
columns of them, whose partial sums torchtitan adds up).

Suffixes are torchtitan's: B batch, L sequence, T = B * L, D model, F intermediate, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from megamoe.activation import Activation
from megamoe.functional import mega_moe
from megamoe.problem import Accumulate, Problem, Recipe
from megamoe.weights import ExpertWeights

_GPT_OSS_ALPHA = 1.702  # swiglu's default in torchtitan/models/gpt_oss/moe.py


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``recipe``, ``accumulate``, ``engine`` as in ``Problem`` and ``mega_moe``; ``max_tokens``: least bound on T."""

    recipe: Recipe = "bf16"
    accumulate: Accumulate = "fp32"
    engine: str = "auto"
    max_tokens: int = 1


@override(  # type: ignore[untyped-decorator]
    target=RoutedExperts.Config, description="Routed experts through megamoe.mega_moe."
)
def megamoe_experts(config: Any, **settings: Any) -> MegaMoERoutedExperts.Config:
    """The override. ``settings`` are the fields of ``Settings``, from JSON behind the name in ``--override.imports``.

    Raises:
        ValueError: experts of a kind that ``mega_moe`` does not compute (low-precision converters, say); give ``fqns``
            that leave them out, or do without one of the two.
    """
    inner = config.inner_experts
    if type(inner) is GroupedExperts.Config:
        replaced = derive(inner, MegaMoEGroupedExperts.Config)
    elif type(inner) is GptOssGroupedExperts.Config:
        replaced = derive(inner, MegaMoEGptOssExperts.Config)
    else:
        raise ValueError(
            f"megamoe_experts takes GroupedExperts and GptOssGroupedExperts, got {type(inner).__qualname__} of "
            f"{type(inner).__module__}"
        )
    top_k = config.token_dispatcher.top_k
    made = derive(
        config,
        MegaMoERoutedExperts.Config,
        inner_experts=replaced,
        settings=Settings(**settings),
    )
    _problem(inner.dim, inner.hidden_dim, inner.num_experts, top_k, 1, made.settings)  # refuse sizes before any build
    return made  # type: ignore[no-any-return]


def _problem(  # noqa: PLR0917
    hidden: int, inter: int, num_experts: int, top_k: int, tokens: int, settings: Settings, **choices: Any
) -> Problem:
    # The same bound for all calls of about this size: torchtitan pads T to be alike on all ranks.
    most = max(settings.max_tokens, 1 << (tokens - 1).bit_length() if tokens else 1)
    return Problem(
        hidden=hidden,
        intermediate=inter,
        num_experts=num_experts,
        top_k=top_k,
        max_tokens=most,
        recipe=settings.recipe,
        accumulate=settings.accumulate,
        **choices,
    )


class MegaMoERoutedExperts(RoutedExperts):  # type: ignore[misc]
    """``RoutedExperts`` whose experts take the tokens themselves, instead of what a dispatcher brings."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):  # type: ignore[misc]
        settings: Settings = Settings()

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.settings = config.settings
        self.group: dist.ProcessGroup | Literal["self"] = "self"

    def forward(
        self,
        x_BLD: torch.Tensor,
        topk_scores_BLK: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> torch.Tensor:
        """As the original's: [B, L, D] in x's dtype. The counts are not needed."""
        # Inside the call of inner_experts FSDP has the weights together.
        out_BLD: torch.Tensor = self.inner_experts(
            x_BLD, topk_scores_BLK, topk_expert_ids_BLK, group=self.group, settings=self.settings
        )
        return out_BLD

    def parallelize(self, parallel_dims: Any) -> None:
        """Shard parameters as the original does; the dispatcher gets no mesh, and so allocates no buffers."""
        super(RoutedExperts, self).parallelize(parallel_dims)
        mesh = parallel_dims.get_optional_mesh("ep")
        self.group = "self" if mesh is None else mesh.get_group()


class _MegaMoEInner:
    """What both kinds of experts share; ``_weights`` tells them apart."""

    num_experts: int

    def forward(
        self,
        x_BLD: torch.Tensor,
        topk_scores_BLK: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        *,
        group: dist.ProcessGroup | Literal["self"],
        settings: Settings,
    ) -> torch.Tensor:
        """Combined output [B, L, D] of all ranks' experts; scores multiply after down, in fp32."""
        weights, activation = self._weights()
        dtype = torch.float32 if settings.recipe == "fp32" else torch.bfloat16
        y_BLD = mega_moe(
            x_BLD.to(dtype),
            topk_expert_ids_BLK,
            topk_scores_BLK.float(),
            weights,
            problem=_problem(
                weights.w2.shape[1],
                weights.w2.shape[2],
                self.num_experts,
                topk_scores_BLK.shape[-1],
                x_BLD.shape[0] * x_BLD.shape[1],
                settings,
                world_size=1 if isinstance(group, str) else dist.get_world_size(group),
                activation=activation,
                bias=weights.b13 is not None,
            ),
            group=group,
            engine=settings.engine,
        )
        return y_BLD.type_as(x_BLD)

    def _weights(self) -> tuple[ExpertWeights, Activation]:
        raise NotImplementedError


class MegaMoEGroupedExperts(_MegaMoEInner, GroupedExperts):  # type: ignore[misc]
    """SwiGLU experts with gate, up and down apart; every call lays gate on up, a copy of those weights."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):  # type: ignore[misc]
        pass

    def _weights(self) -> tuple[ExpertWeights, Activation]:
        w1_EFD, w3_EFD = _local(self.w1_EFD), _local(self.w3_EFD)
        return ExpertWeights(torch.cat((w1_EFD, w3_EFD), dim=1), _local(self.w2_EDF)), Activation()


class MegaMoEGptOssExperts(_MegaMoEInner, GptOssGroupedExperts):  # type: ignore[misc]
    """gpt-oss: gate and up rows alternate, biases, clamped SwiGLU."""

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):  # type: ignore[misc]
        pass

    def parallelize(self, parallel_dims: Any) -> None:
        """Raises ValueError under tensor parallelism without expert parallelism: each rank would add b2."""
        if parallel_dims.tp > 1 and parallel_dims.get_optional_mesh("ep") is None:
            raise ValueError(
                f"megamoe_experts can't split gpt-oss' experts over tensor-parallel ranks (tp = {parallel_dims.tp}): "
                "use expert parallelism, or the stock experts"
            )
        super().parallelize(parallel_dims)

    def _weights(self) -> tuple[ExpertWeights, Activation]:
        w13_EGD, b13_EG = (
            torch.cat((t[:, 0::2], t[:, 1::2]), dim=1)
            for t in (_local(self.mlp1_weight_EGD), _local(self.mlp1_bias_EG))
        )
        weights = ExpertWeights(w13_EGD, _local(self.mlp2_weight_EDF), b13_EG, _local(self.mlp2_bias_ED))
        return weights, Activation("swiglu_clamped", limit=float(self.swiglu_limit), alpha=_GPT_OSS_ALPHA)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
