"""What a user writes today in plain PyTorch, as a session: the baseline beside the mega-kernel.

Routes sorted by expert, ``all_to_all_single`` there (a row a route), ``torch._grouped_mm`` twice, and back. bf16, not
compiled; the host waits once a call, for the sizes of the exchange.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megamoe.bench.moe_data import Experts, Tokens
from megamoe.bench.moe_sessions import Call
from megamoe.problem import Problem
from megamoe.testing.mega_activations import Activations


class PlainTorch:
    """See the module's text and ``moe_sessions.Session``."""

    # bf16 pre-activations and results of routes, which the reference does not round, make a d of 1.2e-5 at any size.
    bounds = (3e-5, 1e-4)

    def __init__(self, problem: Problem, *, device: torch.device, group: dist.ProcessGroup | None) -> None:
        if problem.recipe != "bf16" or problem.bias or problem.weights_applied != "after_down":
            raise ValueError(
                f"the plain PyTorch baseline is bf16, no bias, weights after the second GEMM, got {problem}"
            )
        if problem.num_experts % problem.world_size:
            raise ValueError(f"{problem.num_experts} experts can't be spread evenly over {problem.world_size} ranks")
        self.problem, self._group = problem, group
        rank = 0 if group is None else group.rank()
        self.ranks = [rank]
        self.slots = problem.num_experts // problem.world_size
        self.experts = Experts(problem, device)
        self._weights = self.experts.weights(range(rank * self.slots, (rank + 1) * self.slots))
        self.inputs = [Tokens.make(problem, rank, device)]

    def call(self, tokens: int, outs: list[torch.Tensor] | None = None) -> Call:
        """See ``Session.call``; ``outs`` stay as they are."""
        given = self.inputs[0].first(tokens)
        return lambda: [self._layer(given)]

    def activations(self, rank: int, at: torch.Tensor, topk_idx: torch.Tensor) -> Activations | None:
        """None: autograd would keep them, nobody else does."""
        return None

    def check(self) -> None:
        """Nothing to ask."""

    def close(self) -> None:
        """Nothing to give back but tensors."""

    def _layer(self, given: Tokens) -> torch.Tensor:
        T, K = given.topk_idx.shape
        R, S = self.problem.world_size, self.slots
        experts = given.topk_idx.flatten()
        order = torch.argsort(experts, stable=True)
        counts = torch.zeros(R * S, dtype=torch.int64, device=experts.device)
        counts.scatter_add_(0, experts, torch.ones_like(experts))  # bincount would wait for the device
        theirs = self._exchange(counts, [S] * R, [S] * R)
        sizes = torch.stack([counts.view(R, S).sum(1), theirs.view(R, S).sum(1)]).tolist()  # waits for the device
        there, here = sizes
        rows = self._exchange(given.x.index_select(0, order // K), there, here)
        # Rows come source by source; the GEMMs want them expert by expert.
        expert = torch.arange(S, device=rows.device).repeat(R).repeat_interleave(theirs, output_size=sum(here))
        by_expert = torch.argsort(expert, stable=True)
        ends = theirs.view(R, S).sum(0).cumsum(0).to(torch.int32)
        h = _grouped(rows.index_select(0, by_expert), self._weights.w13, ends)
        a = self.problem.activation(h.float()).to(h.dtype)
        y = _grouped(a, self._weights.w2, ends)
        back = self._exchange(torch.empty_like(y).index_copy_(0, by_expert, y), here, there)
        routes = torch.empty_like(back).index_copy_(0, order, back).view(T, K, -1)
        return (routes.float() * given.topk_weights[..., None]).sum(1).to(given.x.dtype)

    def _exchange(self, rows: torch.Tensor, there: list[int], here: list[int]) -> torch.Tensor:
        """``there[r]`` rows to each rank r, ``here[r]`` from it."""
        if self._group is None:
            return rows
        got = rows.new_empty(sum(here), *rows.shape[1:])
        dist.all_to_all_single(got, rows, here, there, group=self._group)
        return got


def _grouped(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows [M, C], weights [S, N, C] -> [M, N]: rows up to ends[s] by expert s; M may be 0."""
    if not len(rows):
        return rows.new_empty(0, weights.shape[1])
    return torch._grouped_mm(rows, weights.transpose(1, 2), offs=ends)
