"""What ``megamoe bench moe`` runs on: experts made anew from their numbers on any rank, tokens and their routing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe.prepared import (
    PreparedWeights,
    checked_recipe,
    dequantise_weight,
    empty_scale,
    empty_values,
    quantise_weight,
    weight_scale_shape,
)
from megamoe.problem import Problem
from megamoe.testing import routing
from megamoe.testing.mega_twin import Expert
from megamoe.weights import ExpertWeights


class Experts:
    """Expert e of a problem is a function of e: Gaussian matrices in the recipe, drawn on ``device``.

    Scales of fp8 recipes are multiplied by random numbers from 1/2 to 2, as no model has them all alike.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self.recipe = checked_recipe(problem.recipe)
        self._parts = {"w13": 2 if problem.activation.gated else 1, "w2": 1}

    def dense(self, expert: int) -> Expert:
        """As the GEMMs see it."""
        made = self._make(expert)

        def matrix(name: str) -> torch.Tensor:
            values = made[name]
            assert values is not None
            return dequantise_weight(values, made[f"{name}_scale"], self.recipe, parts=self._parts[name])

        return Expert(matrix("w13"), matrix("w2"), made.get("b13"), made.get("b2"))

    def prepared(self, experts: range) -> PreparedWeights:
        """A rank's weights; one expert at a time, so that memory holds little besides."""
        p, stacks = self.problem, {}
        for name, shape in (("w13", (p.w13_rows, p.hidden)), ("w2", (p.hidden, p.intermediate))):
            stacks[name] = empty_values((len(experts), *shape), self.recipe, self.device)
            scale = weight_scale_shape(*shape, self.recipe, parts=self._parts[name])
            if scale is not None:
                stacks[f"{name}_scale"] = empty_scale((len(experts), *scale), self.recipe, self.device)
        if p.bias:
            stacks["b13"] = torch.empty(len(experts), p.w13_rows, device=self.device)
            stacks["b2"] = torch.empty(len(experts), p.hidden, device=self.device)
        for slot, expert in enumerate(experts):
            for name, tensor in self._make(expert).items():
                if tensor is not None:
                    stacks[name][slot].copy_(tensor)
        return PreparedWeights(recipe=self.recipe, **stacks)

    def weights(self, experts: range) -> ExpertWeights:
        """A rank's weights in bf16, for engines that take them so. Exact for the recipe bf16 alone."""
        made = self.prepared(experts)
        biases = [None if b is None else b.bfloat16() for b in (made.b13, made.b2)]
        return ExpertWeights(made.w13, made.w2, *biases)

    def _make(self, expert: int) -> dict[str, torch.Tensor | None]:
        p = self.problem
        generator = torch.Generator(self.device).manual_seed(expert + 1)
        options = {"generator": generator, "device": self.device}
        made: dict[str, torch.Tensor | None] = {}
        for name, rows, columns in (("w13", p.w13_rows, p.hidden), ("w2", p.hidden, p.intermediate)):
            w = torch.randn(rows, columns, dtype=torch.bfloat16, **options) * columns**-0.5  # type: ignore[call-overload]
            made[name], scale = quantise_weight(w, self.recipe, parts=self._parts[name])
            if scale is not None and scale.dtype == torch.float32:
                scale = scale * torch.exp2(torch.rand(scale.shape, **options) * 2 - 1)  # type: ignore[call-overload]
            made[f"{name}_scale"] = scale
        if p.bias:
            for name, size in (("b13", p.w13_rows), ("b2", p.hidden)):
                # bf16 holds them, so that every engine adds the same.
                made[name] = torch.randn(size, dtype=torch.bfloat16, **options).float()  # type: ignore[call-overload]
        return made


@dataclass(frozen=True)
class Tokens:
    """One rank's input: x bf16 [T, H], topk_idx int64 [T, K], topk_weights fp32 [T, K]."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor

    @staticmethod
    def make(problem: Problem, rank: int, device: torch.device, *, kind: str = "balanced", seed: int = 0) -> Tokens:
        """``problem.max_tokens`` dense Gaussian tokens, routed as ``kind`` of ``routing.KINDS`` says ("balanced": to
        the top k of Gaussian scores); every rank's its own."""
        generator = torch.Generator(device).manual_seed(7919 + rank + 1_000_003 * seed)
        x = torch.randn(problem.max_tokens, problem.hidden, generator=generator, device=device, dtype=torch.bfloat16)
        on_cpu = torch.Generator().manual_seed(104729 + rank + 1_000_003 * seed)
        idx, weights = routing.KINDS[kind](problem.max_tokens, problem.num_experts, problem.top_k, on_cpu)
        return Tokens(x, idx.to(device), weights.to(device))

    def first(self, tokens: int) -> Tokens:
        """The first T of them."""
        return Tokens(self.x[:tokens], self.topk_idx[:tokens], self.topk_weights[:tokens])


def sample(tokens: int, count: int) -> torch.Tensor:
    """int64: numbers of at most ``count`` of T tokens, the first and the last among them, the same on every run."""
    if tokens <= count:
        return torch.arange(tokens)
    inner = torch.randperm(tokens - 2, generator=torch.Generator().manual_seed(tokens))[: count - 2] + 1
    return torch.cat([torch.tensor([0, tokens - 1]), inner]).sort().values
