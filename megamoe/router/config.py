"""``RouterConfig``: every choice of a top-k gate, checked once, and the settings of well-known models by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """One top-k gate. Coefficients of 0 switch a loss off.

    Args:
        hidden: H, columns of the tokens.
        num_experts: E.
        top_k: K, experts per token.
        score: ``softmax`` over all E logits (Shazeer et al. 2017, arXiv:1701.06538), or ``sigmoid`` of each
            (DeepSeek-V3, arXiv:2412.19437, eq. 15).
        normalize: divide the K chosen scores by their sum. With ``softmax`` this is the softmax over the K chosen
            logits (Mixtral, arXiv:2401.04088, section 2.1).
        scale: factor on the weights after normalising.
        linear_bias: whether the logits carry a learned bias (gpt-oss).
        num_groups, top_groups: keep only the ``top_groups`` best of ``num_groups`` equal, contiguous groups of
            experts, per token (DeepSeek-V2, arXiv:2405.04434, section 2.2.2). 1 and 1 switch this off.
        group_top: a group's score is the sum of its ``group_top`` best experts: 1 in DeepSeek-V2, K / top_groups in
            DeepSeek-V3 (section 2.1.2).
        aux_free: add a per-expert bias to the scores for choosing only (Wang et al. 2024, arXiv:2408.15664).
        bias_update_rate: step u of that bias.
        aux_coef: batch balance loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4, for K experts; global-batch if the
            router has a group, as in Qwen3, arXiv:2501.11873).
        seq_aux_coef: balance loss of each sequence on its own (DeepSeek-V3, eq. 17 to 20).
        z_coef: router z-loss (ST-MoE, arXiv:2202.08906, eq. 5).

    Raises:
        ValueError: a choice that makes no gate, with what was got and what is possible.
    """

    hidden: int
    num_experts: int
    top_k: int
    score: Score = "softmax"
    normalize: bool = True
    scale: float = 1.0
    linear_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_top: int = 1
    aux_free: bool = False
    bias_update_rate: float = 1e-3
    aux_coef: float = 0.0
    seq_aux_coef: float = 0.0
    z_coef: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden", "num_experts", "top_k", "num_groups", "top_groups", "group_top"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("bias_update_rate", "aux_coef", "seq_aux_coef", "z_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        if self.score not in get_args(Score):
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}, got {self.score!r}")
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts ({self.num_experts}) must be divisible by num_groups ({self.num_groups})")
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups must be at most num_groups ({self.num_groups}), got {self.top_groups}")
        if self.group_top > self.group_size:
            raise ValueError(f"group_top must be at most the group's size ({self.group_size}), got {self.group_top}")
        if self.top_k > self.top_groups * self.group_size:
            raise ValueError(
                f"top_k must be at most the experts left by grouping ({self.top_groups} groups of "
                f"{self.group_size}), got {self.top_k}"
            )

    @property
    def group_size(self) -> int:
        """Experts in one group."""
        return self.num_experts // self.num_groups

    @staticmethod
    def preset(name: str, *, hidden: int, **changes: Any) -> RouterConfig:
        """The router of a known model, sizes included, with ``changes`` on top.

        ``RouterConfig.preset("qwen3", hidden=4096)`` has 128 experts, 8 per token.

        Raises:
            ValueError: unknown name; the sentence lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"router preset must be one of {', '.join(sorted(PRESETS))}, got {name!r}")
        return dataclasses.replace(RouterConfig(hidden=hidden, **PRESETS[name]), **changes)


# What each model publishes. Where its training loss is not published, the coefficient is 0.
PRESETS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        # arXiv:2412.19437, sections 2.1.2 and 4.2: 256 routed experts, 4 of 8 nodes, gamma 0.001, alpha 0.0001, x 2.5.
        "deepseek_v3": {
            "num_experts": 256,
            "top_k": 8,
            "score": "sigmoid",
            "scale": 2.5,
            "num_groups": 8,
            "top_groups": 4,
            "group_top": 2,
            "aux_free": True,
            "bias_update_rate": 1e-3,
            "seq_aux_coef": 1e-4,
        },
        # arXiv:2505.09388, section 2, and the released configuration (norm_topk_prob, router_aux_loss_coef 0.001).
        "qwen3": {"num_experts": 128, "top_k": 8, "aux_coef": 1e-3},
        # arXiv:2508.10925, section 2: top-4 of 128 (gpt-oss-120b; 32 in gpt-oss-20b), softmax over the chosen four.
        "gpt_oss": {"num_experts": 128, "top_k": 4, "linear_bias": True},
        # arXiv:2401.04088, section 2.1, and the released configuration (router_aux_loss_coef 0.02).
        "mixtral": {"num_experts": 8, "top_k": 2, "aux_coef": 0.02},
    }
)
