"""The layer as a reader would write it down: one token, one k, one expert at a time, in float64 with torch autograd.

Shares nothing with the engines but the activation's formula; knows all ranks' inputs, since cases make them from seeds.
"""

from __future__ import annotations

import torch

from tests.engines.cases import WEIGHT_NAMES, Case


def run(case: Case, world_size: int) -> list[dict[str, torch.Tensor]]:
    """For each rank y and every gradient of sum(y * grad_y) over all ranks, float64. Contiguous placement."""
    problem = case.problem(world_size)
    experts = [[t.double().requires_grad_() for t in case.expert(e)] for e in range(case.experts)]
    leaves, ys = [], []
    loss = torch.zeros((), dtype=torch.float64)
    for rank in range(world_size):
        x, idx, topk_weights, grad_y = case.inputs(rank, world_size)
        x, topk_weights = x.double().requires_grad_(), topk_weights.double().requires_grad_()
        rows = []
        for t in range(len(x)):
            row = torch.zeros(case.hidden, dtype=torch.float64)
            for k in range(case.top_k):
                e = int(idx[t, k])
                if e >= 0:
                    w13, w2, *biases = experts[e]
                    b13, b2 = biases or (0.0, 0.0)
                    a = problem.activation(w13 @ x[t] + b13)
                    row = row + topk_weights[t, k] * (w2 @ a + b2)
            rows.append(row)
        y = torch.stack(rows) if rows else x * 0
        loss = loss + (y * grad_y.double()).sum()
        leaves.append((x, topk_weights))
        ys.append(y.detach())
    flat = [t for pair in leaves for t in pair] + [t for expert in experts for t in expert]
    grads = torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True)
    of = dict(zip(map(id, flat), grads, strict=True))
    local = case.experts // world_size
    results = []
    for rank, (x, topk_weights) in enumerate(leaves):
        result = {"y": ys[rank], "grad x": of[id(x)], "grad topk_weights": of[id(topk_weights)]}
        mine = experts[rank * local : (rank + 1) * local]
        for name, tensors in zip(WEIGHT_NAMES, zip(*mine, strict=True), strict=False):
            result[f"grad {name}"] = torch.stack([of[id(t)] for t in tensors])
        results.append(result)
    return results
