"""``Router``: the gate as a module. Its logits, scores, weights and losses are fp32 whatever the model's dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megamoe.engines.liveness import naming
from megamoe.router import losses as L
from megamoe.router.config import RouterConfig
from megamoe.router.select import choose, scores_of, weights_of


class Router(nn.Module):
    """Tokens to experts.

    Attributes:
        weight: [E, H] parameter.
        bias: [E] parameter if ``config.linear_bias``, else None.
        expert_bias: [E] fp32 buffer, added for choosing only, if ``config.aux_free``, else None. It stays fp32 when the
            module is cast: steps of 0.001 would vanish in bf16.
        load: [E] int64 buffer, not in state_dict: choices per expert on this rank in training mode since the last
            ``update_bias`` or ``reset_load``. Recomputation under activation checkpointing counts twice, for all
            experts alike.

    Args:
        config: what kind of gate.
        group: ranks whose tokens form one batch for the batch balance loss, the z-loss, the sequence average and
            ``update_bias``; None keeps everything on this rank. Every rank of the group must call ``forward`` equally
            often, with any number of tokens, 0 included.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    expert_bias: torch.Tensor | None
    load: torch.Tensor

    def __init__(
        self,
        config: RouterConfig,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.group = group
        E, H = config.num_experts, config.hidden
        self.weight = nn.Parameter(torch.empty(E, H, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(E, device=device, dtype=dtype)) if config.linear_bias else None
        expert_bias = torch.zeros(E, device=device, dtype=torch.float32) if config.aux_free else None
        self.register_buffer("expert_bias", expert_bias)
        self.register_buffer("load", torch.zeros(E, device=device, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight from N(0, 1/H), biases and load 0."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.config.hidden))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.expert_bias is not None:
            self.expert_bias.zero_()
        self.load.zero_()

    def forward(
        self, x: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Route the tokens of x.

        Args:
            x: [..., S, H] of any floating dtype; S is the sequence for the sequence balance loss. T = product of all
                leading dimensions, 0 allowed.
            token_mask: [..., S] bool, False for padding. Padding visits no expert and counts in no loss and no load.

        Returns:
            topk_idx [T, K] int64, -1 for padding; topk_weights [T, K] fp32, 0 for padding, differentiable with respect
            to ``weight`` and x; losses: for each coefficient that is not 0 the loss times its coefficient, a scalar,
            under ``aux``, ``seq_aux`` or ``z``. With a group, the mean over its ranks is the whole batch's loss.

        Raises:
            ValueError: x without H columns, or a mask that does not fit, with got and expected.
        """
        config = self.config
        if x.dim() < 2 or x.shape[-1] != config.hidden or not x.is_floating_point():
            raise ValueError(f"x must be [..., S, {config.hidden}] floating point, got {tuple(x.shape)} {x.dtype}")
        lead = x.shape[:-1]
        if token_mask is not None and (token_mask.shape != lead or token_mask.dtype != torch.bool):
            raise ValueError(
                f"token_mask must be {tuple(lead)} torch.bool, got {tuple(token_mask.shape)} {token_mask.dtype}"
            )
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            logits = F.linear(x.reshape(-1, config.hidden).float(), self.weight.float(), bias)
            scores = scores_of(logits, config)
            topk_idx = choose(scores, self.expert_bias, config)
            topk_weights = weights_of(logits, scores, topk_idx, config)
            real = logits.new_ones(len(logits), dtype=torch.bool) if token_mask is None else token_mask.reshape(-1)
            losses = self._losses(logits, scores, topk_idx, real, lead)
            if self.training:
                self.load.add_(L.count(topk_idx, real, config.num_experts))
            if token_mask is not None:
                topk_idx = topk_idx.masked_fill(~real.unsqueeze(-1), -1)
                topk_weights = topk_weights.masked_fill(~real.unsqueeze(-1), 0.0)
        return topk_idx, topk_weights, losses

    def _losses(
        self,
        logits: torch.Tensor,
        scores: torch.Tensor,
        topk_idx: torch.Tensor,
        real: torch.Tensor,
        lead: torch.Size,
    ) -> dict[str, torch.Tensor]:
        config = self.config
        if not (config.aux_coef or config.seq_aux_coef or config.z_coef):
            return {}
        shape = (math.prod(lead[:-1]), lead[-1])
        p = L.affinities(scores, config)
        idx = L.chosen_by_score(scores, topk_idx, config)
        # One vector, one collective: choices per expert, real tokens, sequences with a real token.
        here = [L.count(idx, real, config.num_experts), real.sum().view(1), real.view(shape).any(-1).sum().view(1)]
        totals, ranks = self._sum_over_ranks(torch.cat(here))
        counts, tokens, sequences = totals[:-2], totals[-2], totals[-1]
        losses = {}
        if config.aux_coef:
            balance = L.batch_balance(p, real, counts, tokens=tokens, ranks=ranks, top_k=config.top_k)
            losses["aux"] = config.aux_coef * balance
        if config.seq_aux_coef:
            p_BSE, real_BS, idx_BSK = (t.view(*shape, *t.shape[1:]) for t in (p, real, idx))
            balance = L.sequence_balance(p_BSE, real_BS, idx_BSK, sequences=sequences, ranks=ranks)
            losses["seq_aux"] = config.seq_aux_coef * balance
        if config.z_coef:
            losses["z"] = config.z_coef * L.z_loss(logits, real, tokens=tokens, ranks=ranks)
        return losses

    def _sum_over_ranks(self, local: torch.Tensor) -> tuple[torch.Tensor, int]:
        if self.group is None:
            return local, 1
        if torch.compiler.is_compiling():
            dist.all_reduce(local, group=self.group)
        else:
            with naming(self.group, "router balance"):
                dist.all_reduce(local, group=self.group)
        return local, dist.get_world_size(self.group)

    @torch.no_grad()
    def update_bias(self) -> None:
        """b_i += u * sign(mean load - load_i), then load = 0: once per optimiser step (arXiv:2408.15664, algorithm 1).

        The load is summed over the group, so that all ranks keep the same bias: call it on every rank.

        Raises:
            ValueError: the router has no such bias.
        """
        if self.expert_bias is None:
            raise ValueError("update_bias needs a router with aux_free=True, got aux_free=False")
        load, _ = self._sum_over_ranks(self.load.clone())
        self.expert_bias += self.config.bias_update_rate * torch.sign(load.sum() - load * len(load))
        self.load.zero_()

    def reset_load(self) -> None:
        """Start counting ``load`` anew."""
        self.load.zero_()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        """Move as any module, but keep ``expert_bias`` fp32, value and all."""
        before = self.expert_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.expert_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            self.expert_bias = after.float() if before.is_meta else before.to(after.device)
        return self

    def extra_repr(self) -> str:
        """Sizes and kind, for ``print(model)``."""
        c = self.config
        return f"hidden={c.hidden}, num_experts={c.num_experts}, top_k={c.top_k}, score={c.score}"
