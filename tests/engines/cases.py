"""Cases that ranks build for themselves from a seed, and the comparison of two engines on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megamoe.activation import Activation
from megamoe.dispatch.placement import Placement
from megamoe.functional import mega_moe
from megamoe.problem import Problem
from megamoe.testing import routing
from megamoe.testing.numerics import assert_close
from megamoe.testing.ranks import RankPool
from megamoe.weights import ExpertWeights

# d over the whole tensor, d in every row. fp32 rows share bf16's bound: a row of a weight gradient is one route's inner
# product where an expert has one token, and that may cancel.
BOUNDS = {"fp32": (1e-12, 1e-4), "bf16": (1e-5, 1e-4)}
WEIGHT_NAMES = ("w13", "w2", "b13", "b2")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem with routing; every rank makes its own part from ``seed`` and its rank."""

    experts: int = 8
    top_k: int = 2
    hidden: int = 32
    intermediate: int = 24
    tokens: tuple[int, ...] = (13, 5, 0, 20)  # of rank r: tokens[r % len(tokens)]
    kind: str = "balanced"
    recipe: str = "fp32"
    accumulate: str = "fp32"
    activation: str = "swiglu"
    bias: bool = False
    weights_applied: str = "after_down"
    weight_dtype: str = "float32"
    slots: tuple[tuple[int, ...], ...] | None = None  # a placement's table; None: contiguous
    device: str = "cpu"
    seed: int = 0

    def problem(self, world_size: int) -> Problem:
        return Problem(
            hidden=self.hidden,
            intermediate=self.intermediate,
            num_experts=self.experts,
            top_k=self.top_k,
            world_size=world_size,
            max_tokens=max(64, *self.tokens),
            recipe=self.recipe,  # type: ignore[arg-type]
            accumulate=self.accumulate,  # type: ignore[arg-type]
            activation=Activation(self.activation, limit=1.0),  # type: ignore[arg-type]
            bias=self.bias,
            weights_applied=self.weights_applied,  # type: ignore[arg-type]
        )

    def placement(self) -> Placement | None:
        return None if self.slots is None else Placement(torch.tensor(self.slots))

    def inputs(self, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, topk_idx, topk_weights and a gradient of y, of one rank."""
        g = torch.Generator().manual_seed(1000 * self.seed + rank)
        T = self.tokens[rank % len(self.tokens)]
        dtype = torch.float32 if self.recipe == "fp32" else torch.bfloat16
        idx, weights = routing.KINDS[self.kind](T, self.experts, self.top_k, g)
        x = torch.randn(T, self.hidden, generator=g).to(dtype)
        return x, idx, weights, torch.randn(T, self.hidden, generator=g).to(dtype)

    def expert(self, e: int) -> list[torch.Tensor]:
        """Expert e's w13, w2 and, with bias, b13, b2: the same on whichever rank it stands."""
        g = torch.Generator().manual_seed(7_000_000 + 1000 * self.seed + e)
        p = self.problem(1)
        shapes = [(p.w13_rows, p.hidden), (p.hidden, p.intermediate)]
        shapes += [(p.w13_rows,), (p.hidden,)] if self.bias else []
        return [
            (torch.randn(s, generator=g) / (s[-1] ** 0.5 if len(s) == 2 else 1)).to(getattr(torch, self.weight_dtype))
            for s in shapes
        ]

    def weights(self, rank: int, world_size: int) -> ExpertWeights:
        """The experts of one rank."""
        placement = self.placement()
        local = self.experts // world_size
        ids = list(self.slots[rank]) if placement and self.slots else range(rank * local, (rank + 1) * local)
        return ExpertWeights(*(torch.stack(t) for t in zip(*(self.expert(e) for e in ids), strict=True)))

    def local_weights(self, rank: int, world_size: int) -> ExpertWeights:
        """``weights`` on ``device``."""
        w = self.weights(rank, world_size)
        moved = {n: t.to(self.device) for n in WEIGHT_NAMES if (t := getattr(w, n)) is not None}
        return ExpertWeights(**moved)


def run(
    case: Case, rank: int, world_size: int, group: dist.ProcessGroup | None, engine: str
) -> dict[str, torch.Tensor]:
    """y and every gradient of one rank, by name, on the CPU."""
    x, idx, topk_weights, grad_y = (t.to(case.device) for t in case.inputs(rank, world_size))
    weights = case.local_weights(rank, world_size)
    present = [n for n in WEIGHT_NAMES if getattr(weights, n) is not None]
    leaves: dict[str, Any] = {"x": x, "topk_weights": topk_weights} | {n: getattr(weights, n) for n in present}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    y = mega_moe(
        leaves["x"], idx, leaves["topk_weights"], ExpertWeights(**{n: leaves[n] for n in present}),
        problem=case.problem(world_size), group=group, engine=engine, placement=case.placement(),
    )  # fmt: skip
    y.backward(grad_y)
    return {"y": y.detach().cpu()} | {f"grad {name}": leaf.grad.cpu() for name, leaf in leaves.items()}


def assert_same(pool: RankPool, cases: list[Case]) -> None:
    """staged equals reference on every rank of the pool."""
    wrong = [text for texts in pool.run(compare, cases) for text in texts]
    assert not wrong, "\n".join(wrong)


def compare(rank: int, world_size: int, group: dist.ProcessGroup | None, cases: list[Case]) -> list[str]:
    """staged against reference for each case, on one rank: what is wrong. No rank raises, so none leaves the others."""
    wrong = []
    for case in cases:
        actual = run(case, rank, world_size, group, "staged")
        expected = run(case, rank, world_size, group, "reference")
        try:
            check(case, actual, expected, router_scale(case, rank, world_size))
        except AssertionError as error:
            wrong.append(f"rank {rank} of {world_size}, {case}: {error}")
    return wrong


def check(case: Case, actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], scale: torch.Tensor) -> None:
    """The bounds on every tensor, over the whole and in every row.

    A gradient of a top-k weight is one inner product, <grad_y, expert's output>, and may cancel to nothing; its error
    is held against ``scale`` [T, K] (``router_scale``) beside the value itself.
    """
    whole, row = BOUNDS[case.recipe]
    for name, want in expected.items():
        got = actual[name]
        assert got.dtype == want.dtype, f"{name}: {got.dtype}, expected {want.dtype}"
        if name != "grad topk_weights":
            assert_close(got, want, whole=whole, row=row, what=name)
            continue
        assert torch.equal(got == 0, want == 0), f"{name}: zeros differ"
        error, size = (got - want).double() ** 2, want.double() ** 2 + scale**2
        for d, bound in ((error.sum() / size.sum(), whole), (error.sum(1) / size.sum(1), row)):
            worst = float(d[~d.isnan()].max()) if d[~d.isnan()].numel() else 0.0
            assert worst <= bound, f"{name}: d = {worst:.1e}, bound {bound:.0e}"


def router_scale(case: Case, rank: int, world_size: int) -> torch.Tensor:
    """[T, K] |grad_y| |expert's output| / sqrt(H): how large the inner product of such vectors is; 0 for no expert."""
    x, idx, _, grad_y = case.inputs(rank, world_size)
    problem = case.problem(world_size)
    scale = torch.zeros(idx.shape, dtype=torch.float64)
    for e in range(case.experts):
        w13, w2, *biases = (t.float() for t in case.expert(e))
        b13, b2 = biases or (0.0, 0.0)
        at = idx == e
        y = problem.activation(x.float() @ w13.T + b13) @ w2.T + b2
        scale += at * (grad_y.double().norm(dim=1) * y.double().norm(dim=1))[:, None]
    return scale / case.hidden**0.5
