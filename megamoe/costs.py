"""What a layer costs, by arithmetic: bytes of weights and rows, bytes over NVLink, floors in microseconds.

All figures are per rank, for uniform routing (K distinct experts, each equally likely) and the mean rank. A floor is
what whole GEMMs and copies were seen to sustain, not a limit of nature; see docs/dispatch.md for where the rates come
from. Nothing here runs a kernel or reads a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megamoe.problem import Problem, Recipe

_SCALE = 4  # bytes of an fp32 scale
_ELEMENT: dict[Recipe, int] = {"fp32": 4, "bf16": 2, "fp8_block": 1, "fp8_row": 1, "mxfp4": 1}
"""Bytes of an element of x as the recipe stores it."""
_WEIGHT: dict[Recipe, float] = {"fp32": 4, "bf16": 2, "fp8_block": 1 + 4 / 128**2, "fp8_row": 1, "mxfp4": 0.5 + 1 / 32}
"""Bytes of an element of a weight with its share of a block's scale; scales of whole rows are not in it."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Rates one GPU sustains."""

    name: str
    hbm_tb_s: float
    fp8_tflops: float
    bf16_tflops: float
    nvlink_gb_s: float
    """Both ways at once, each way."""
    source: str


H200 = Gpu(
    name="h200",
    hbm_tb_s=4.65,
    fp8_tflops=1400.0,
    bf16_tflops=750.0,
    nvlink_gb_s=366.0,
    source="measured on 2x NVIDIA H200, torch 2.11.0+cu130",
)
GPUS = {
    "h200": H200,
    # Same chip and links as H200. 97% of the data sheet's 3.35 TB/s, the share H200 reaches of its 4.8.
    "h100": Gpu(
        name="h100",
        hbm_tb_s=3.25,
        fp8_tflops=H200.fp8_tflops,
        bf16_tflops=H200.bf16_tflops,
        nvlink_gb_s=H200.nvlink_gb_s,
        source="H100 SXM: H200's rates, HBM scaled by data sheet (not measured)",
    ),
}


def named(device_name: str) -> Gpu | None:
    """Rates of a device by its driver's name ("NVIDIA H200"); None for one that nobody has measured."""
    return next((gpu for name, gpu in GPUS.items() if name in device_name.lower()), None)


def row_bytes(columns: int, recipe: Recipe) -> int:
    """One row of an activation as the recipe stores and sends it, scales included."""
    scales = {"fp8_block": -(-columns // 128), "mxfp4": -(-columns // 128), "fp8_row": 1}.get(recipe, 0)
    return columns * _ELEMENT[recipe] + scales * _SCALE


def out_row_bytes(problem: Problem) -> int:
    """One row of y, or of a partial sum, as it crosses: bf16, or fp32 for the fp32 recipe."""
    return problem.hidden * (4 if problem.recipe == "fp32" else 2)


def weight_bytes(rows: int, columns: int, recipe: Recipe, *, halves: int = 1) -> int:
    """A [rows, columns] weight as the recipe stores it, scales included.

    ``halves`` is 2 where gate and up rows stand in one matrix: scale blocks restart between them.
    """
    if recipe == "fp8_block":
        return rows * columns + halves * -(-(rows // halves) // 128) * -(-columns // 128) * _SCALE
    if recipe == "fp8_row":
        return rows * columns + rows * _SCALE
    if recipe == "mxfp4":
        return rows * (-(-columns // 2) + -(-columns // 32) + _SCALE)
    return rows * columns * _ELEMENT[recipe]


def expert_bytes(problem: Problem) -> dict[str, int]:
    """Bytes of one expert's tensors by name."""
    w13_rows = problem.w13_rows
    sizes = {
        "w13": weight_bytes(w13_rows, problem.hidden, problem.recipe, halves=2 if problem.activation.gated else 1),
        "w2": weight_bytes(problem.hidden, problem.intermediate, problem.recipe),
    }
    if problem.bias:
        sizes |= {"b13": w13_rows * 4, "b2": problem.hidden * 4}
    return sizes


def slots_per_rank(problem: Problem) -> int:
    """Local slots: ceil(E / R); what E leaves over holds copies."""
    return -(-problem.num_experts // problem.world_size)


def experts_touched(problem: Problem, tokens: int) -> float:
    """Expected local slots that get at least one route when every rank has ``tokens`` tokens."""
    slots = slots_per_rank(problem)
    each = problem.top_k / (problem.world_size * slots)
    return slots * (1 - (1 - each) ** (problem.world_size * tokens))


def remote_ranks(problem: Problem) -> float:
    """Expected ranks other than its own that one token goes to: rows that cross with one crossing per (token, rank)."""
    ranks, experts, top_k = problem.world_size, problem.num_experts, problem.top_k
    if ranks >= experts:
        return top_k * (ranks - 1) / ranks
    local = experts / ranks
    none_here = math.prod(max(experts - local - i, 0) / (experts - i) for i in range(top_k))
    return (ranks - 1) * (1 - none_here)


def remote_routes(problem: Problem) -> float:
    """Expected routes of one token to other ranks."""
    return problem.top_k * (problem.world_size - 1) / problem.world_size


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """NVLink bytes one rank sends (and, on average, receives) in one forward call, both directions of travel."""

    per_route: float
    """A row out and a row back for every route."""
    one_crossing: float
    """A row out once per (token, rank), a row back for every route."""
    partial_sums: float
    """Once per (token, rank) both ways: owners add before they send back."""


def crossings(problem: Problem, rows: float, routes: float) -> Crossings:
    """Bytes for ``rows`` (token, other rank) pairs and ``routes`` routes to other ranks."""
    there, back = row_bytes(problem.hidden, problem.recipe), out_row_bytes(problem)
    return Crossings(
        per_route=routes * (there + back),
        one_crossing=rows * there + routes * back,
        partial_sums=rows * (there + back),
    )


def uniform_crossings(problem: Problem, tokens: int) -> Crossings:
    """``crossings`` of ``tokens`` tokens a rank under uniform routing."""
    return crossings(problem, tokens * remote_ranks(problem), tokens * remote_routes(problem))


@dataclass(frozen=True, kw_only=True)
class Floors:
    """Least microseconds of one forward call."""

    memory_us: float
    compute_us: float
    nvlink_us: float
    """With one crossing per (token, rank), both ways."""

    @property
    def us(self) -> float:
        return max(self.memory_us, self.compute_us, self.nvlink_us)

    @property
    def bound_by(self) -> str:
        times = {"memory": self.memory_us, "compute": self.compute_us, "NVLink": self.nvlink_us}
        return max(times, key=lambda name: times[name])


def weights_us(problem: Problem, tokens: int, gpu: Gpu) -> float:
    """Microseconds to read the two matrices of the experts touched, once; biases and row scales are not counted."""
    elements = problem.hidden * (problem.w13_rows + problem.intermediate)
    return experts_touched(problem, tokens) * elements * _WEIGHT[problem.recipe] / (gpu.hbm_tb_s * 1e6)


def floors(problem: Problem, tokens: int, gpu: Gpu) -> Floors:
    """Floors of a forward call with ``tokens`` tokens on every rank.

    memory: weights of the experts touched, and per route a row of x in, the activation out and in again, the second
    GEMM's row out and in again, all in the operand's element size; compute: 6 T K H I FLOPs (4 if not gated).

    Raises:
        ValueError: the fp32 recipe, which no tensor core runs.
    """
    if problem.recipe == "fp32":
        raise ValueError("recipe fp32 has no floor: it runs on the reference and staged engines only")
    hidden, mid = problem.hidden, problem.intermediate
    routes = tokens * problem.top_k
    activations = routes * _ELEMENT[problem.recipe] * (3 * hidden + 2 * mid)
    flops = 2 * routes * hidden * (problem.w13_rows + mid)
    tflops = gpu.bf16_tflops if problem.recipe == "bf16" else gpu.fp8_tflops
    return Floors(
        memory_us=weights_us(problem, tokens, gpu) + activations / (gpu.hbm_tb_s * 1e6),
        compute_us=flops / (tflops * 1e6),
        nvlink_us=uniform_crossings(problem, tokens).partial_sums / (gpu.nvlink_gb_s * 1e3),
    )
