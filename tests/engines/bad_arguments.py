"""Arguments of ``mega_moe`` with one thing wrong each, and what the refusal has to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megamoe import mega_moe
from megamoe.dispatch.placement import Placement
from tests.engines.cases import Case

Arguments = dict[str, Any]
CASE = Case(experts=6, top_k=2, tokens=(7, 3, 0, 5), kind="masked")


def arguments(case: Case, rank: int, world_size: int) -> Arguments:
    """What ``mega_moe`` takes, without group and engine, on ``case.device``."""
    x, idx, topk_weights, _ = case.inputs(rank, world_size)
    return {
        "x": x.to(case.device),
        "topk_idx": idx.to(case.device),
        "topk_weights": topk_weights.to(case.device),
        "weights": case.local_weights(rank, world_size),
        "problem": case.problem(world_size),
    }


def _with(tensor: torch.Tensor, at: tuple[int, int], value: int) -> torch.Tensor:
    changed = tensor.clone()
    changed[at] = value
    return changed


def _weights(a: Arguments, **changes: torch.Tensor) -> Arguments:
    return {"weights": replace(a["weights"], **changes)}


def _problem(a: Arguments, **changes: Any) -> Arguments:
    return {"problem": replace(a["problem"], **changes)}


# What is wrong (7 tokens, 3 ranks), and what the sentence says.
BAD: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "x dtype": (lambda a: {"x": a["x"].double()}, "x must be torch.float32 for the recipe fp32, got torch.float64"),
    "x columns": (lambda a: {"x": a["x"][:, 1:]}, r"x must have shape \[tokens, 32\].*, got \(7, 31\)"),
    "x dimensions": (lambda a: {"x": a["x"][0]}, r"x must have shape .*, got \(32,\)"),
    "idx shape": (lambda a: {"topk_idx": a["topk_idx"][1:]}, r"topk_idx must be \(7, 2\) int64 .*, got \(6, 2\)"),
    "idx dtype": (lambda a: {"topk_idx": a["topk_idx"].float()}, "topk_idx must be .*, got .*float32"),
    "idx too large": (
        lambda a: {"topk_idx": _with(a["topk_idx"], (1, 1), 6)},
        r"topk_idx must lie in \[-1, 6\), got 6 at token 1, k 1",
    ),
    "idx too small": (
        lambda a: {"topk_idx": _with(a["topk_idx"], (0, 0), -2)},
        r"topk_idx must lie in \[-1, 6\), got -2 at token 0, k 0",
    ),
    "topk_weights shape": (
        lambda a: {"topk_weights": a["topk_weights"][:, :1]},
        r"topk_weights must be \(7, 2\) fp32, got \(7, 1\)",
    ),
    "topk_weights dtype": (
        lambda a: {"topk_weights": a["topk_weights"].bfloat16()},
        "topk_weights must be .*, got .*bfloat16",
    ),
    "w13 device": (
        lambda a: _weights(a, w13=a["weights"].w13.to("meta"), w2=a["weights"].w2.to("meta")),
        "w13 must be on cpu like x, got meta",
    ),
    "w2 shape": (
        lambda a: _weights(a, w2=a["weights"].w2[:, :, 1:]),
        r"w2 must have shape \(2, 32, 24\), got \(2, 32, 23\)",
    ),
    "w13 dtype": (
        lambda a: _weights(a, w13=a["weights"].w13.half(), w2=a["weights"].w2.half()),
        "expert weights must be fp32 or .*, got torch.float16",
    ),
    "unexpected bias": (lambda a: _weights(a, b2=a["weights"].w2[:, :, 0]), "b2 was given but problem.bias is False"),
    "missing bias": (lambda a: _problem(a, bias=True), "b13 is missing: problem.bias is True"),
    "too many tokens": (lambda a: _problem(a, max_tokens=2), "x has 7 tokens, but problem.max_tokens is 2"),
    "world size": (lambda a: _problem(a, world_size=4), "problem.world_size is 4, but the group has 3 ranks"),
    "indivisible": (
        lambda a: _problem(a, num_experts=7),
        r"num_experts \(7\) must be divisible by the number of ranks \(3\)",
    ),
    "engine": (lambda a: {"engine": "fast"}, "engine must be one of auto, reference, staged, mega, got 'fast'"),
    "placement": (
        lambda a: {"placement": Placement(torch.arange(4).view(2, 2))},
        "placement is for 4 experts on 2 ranks, expected 6 on 3",
    ),
    "recipe": (
        lambda a: _problem(a, recipe="fp8_block") | {"engine": "staged", "x": a["x"].bfloat16()},
        "staged computes in bf16 or fp32; the recipe fp8_block needs mega or reference",
    ),
    "no such engine yet": (lambda a: {"engine": "mega"}, 'engine="mega" can\'t run here: '),
}


def attempts(
    rank: int, world_size: int, group: dist.ProcessGroup, name: str, case: Case = CASE
) -> list[Exception | None]:
    """First rank 0 alone is wrong, then all ranks are, then nobody: what each call raised."""
    good = arguments(case, rank, world_size) | {"group": group}
    bad = arguments(case, 0, world_size) | {"group": group}
    bad |= BAD[name][0](bad)
    outcomes: list[Exception | None] = []
    for a in (good if rank else bad, bad, good):
        try:
            mega_moe(**a)
            outcomes.append(None)
        except Exception as error:
            outcomes.append(error)
    return outcomes
