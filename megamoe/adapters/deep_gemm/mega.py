"""DeepGEMM's fused MoE by name, SM90's FP8 form and the bf16 one, over ``MegaRunner``. See docs/deepgemm.md.

As there: tokens, routing and weights of the experts stand in a buffer object; topk weights multiply the activation
before the second GEMM; ranks hold experts in order. Weights keep gate rows before up rows here, so what
``transform_weights_...`` returns is marked, and weights that another library interleaved are refused.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megamoe.activation import Activation
from megamoe.adapters.deep_gemm.knobs import chosen_num_sms
from megamoe.errors import EngineUnavailableError
from megamoe.kernels.quant import casts
from megamoe.mega import runner as mega
from megamoe.mega.tokens import QuantisedTokens
from megamoe.prepared import PreparedWeights
from megamoe.problem import Problem

_BLOCK = 128
_FP8_TYPES = ("fp8xfp4", "fp8xfp8")  # the first is DeepGEMM's default, which its SM90 build ignores
_BF16_TYPE = "bf16xbf16"
Pair = tuple[torch.Tensor, torch.Tensor]


class Transformed(tuple[torch.Tensor, ...]):
    """Weights of one GEMM as the calls of this module take them: (e4m3, fp32 scales), or (bf16,)."""


class SymmBuffer:
    """One rank's buffer.

    Attributes:
        x: [max tokens, H] e4m3, or bf16 for ``bf16_mega_moe``.
        x_sf: fp32 [max tokens, H / 128], None in bf16.
        topk_idx: int64 [max tokens, K] global expert ids, -1 = none; topk_weights: fp32.
        buffer: this rank's symmetric bytes; handle.buffer_ptrs: where each rank's stand.
        group, num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden: as given.
    """

    def __init__(self, group: dist.ProcessGroup, problem: Problem) -> None:
        self.group = group
        self.num_experts, self.num_max_tokens_per_rank = problem.num_experts, problem.max_tokens
        self.num_topk, self.hidden, self.intermediate_hidden = problem.top_k, problem.hidden, problem.intermediate
        device = _device()
        self._problem = problem
        self._runner = mega.MegaRunner.create(problem, device=device, group=group, num_sms=chosen_num_sms())
        # Bounds on the activation are arguments of a launch, so runners of other bounds share the first one's memory.
        self._runners = {problem.activation: self._runner}
        T, fp8 = problem.max_tokens, problem.recipe == "fp8_block"
        self.x = torch.zeros(T, problem.hidden, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16, device=device)
        self.x_sf = torch.zeros(T, problem.hidden // _BLOCK, device=device) if fp8 else None
        self.topk_idx = torch.full((T, problem.top_k), -1, dtype=torch.int64, device=device)
        self.topk_weights = torch.zeros(T, problem.top_k, device=device)
        self.buffer: torch.Tensor | None = self._runner.buffer.whole
        self.handle: Any = SimpleNamespace(buffer_ptrs=self._runner.buffer.pointers)

    def destroy(self) -> None:
        """Give the memory back; later calls with this buffer raise ValueError."""
        if self.buffer is not None:
            self._runner.close()
        self.buffer = self.handle = None
        self._runners.clear()

    def runner_for(self, activation: Activation, recipe: str) -> mega.MegaRunner:
        """Raises ValueError after ``destroy``, or if the buffer was made for the other of fp8 and bf16."""
        if self.buffer is None:
            raise ValueError("this buffer is destroyed")
        if recipe != self._problem.recipe:
            raise ValueError(
                f"the buffer was made for {self._problem.recipe}, the call is {recipe}: mma_type of "
                f"get_symm_buffer_for_mega_moe says which ({_BF16_TYPE} for bf16_mega_moe)"
            )
        if activation not in self._runners:
            self._runners[activation] = self._runner.with_activation(activation)
        return self._runners[activation]


def get_symm_buffer_for_mega_moe(  # noqa: PLR0917 - DeepGEMM's order
    group: dist.ProcessGroup,
    num_experts: int,
    num_max_tokens_per_rank: int,
    num_topk: int,
    hidden: int,
    intermediate_hidden: int,
    num_shared_experts: int = 0,
    use_fp8_dispatch: bool | None = None,
    mma_type: str = _FP8_TYPES[0],
    activation: str = "swiglu",
) -> SymmBuffer:
    """Collective over ``group``: a buffer for calls of at most ``num_max_tokens_per_rank`` tokens on each rank.

    Raises:
        ValueError: sizes or choices that can't be done, with got and expected.
        EngineUnavailableError: no Hopper GPU, or no memory that all ranks address.
    """
    if num_shared_experts:
        raise ValueError(f"num_shared_experts must be 0, got {num_shared_experts}: run them beside this call")
    _check_activation(activation)
    known = (*_FP8_TYPES, _BF16_TYPE)
    if mma_type not in known:
        raise ValueError(f"mma_type must be one of {', '.join(known)} on SM90, got {mma_type}")
    fp8 = mma_type in _FP8_TYPES
    if use_fp8_dispatch is not None and use_fp8_dispatch != fp8:
        raise ValueError(f"use_fp8_dispatch must be {fp8} with mma_type {mma_type}, got {use_fp8_dispatch}")
    if hidden % _BLOCK or intermediate_hidden % _BLOCK:
        raise ValueError(
            f"hidden and intermediate_hidden must be multiples of {_BLOCK}, got {hidden} and {intermediate_hidden}"
        )
    if num_experts % group.size():
        raise ValueError(f"num_experts ({num_experts}) must be divisible by the number of ranks ({group.size()})")
    problem = Problem(
        hidden=hidden,
        intermediate=intermediate_hidden,
        num_experts=num_experts,
        top_k=num_topk,
        world_size=group.size(),
        max_tokens=num_max_tokens_per_rank,
        recipe="fp8_block" if fp8 else "bf16",
        weights_applied="before_down",
    )
    return SymmBuffer(group, problem)


def transform_weights_for_mega_moe_sm90(
    l1_weights: Pair, l2_weights: Pair, shared_l1_weights: Pair | None = None, shared_l2_weights: Pair | None = None
) -> tuple[Transformed, Transformed]:
    """((w13, sf13), (w2, sf2)) as ``fp8_mega_moe`` takes them; nothing is copied that lies right.

    Args:
        l1_weights: e4m3 [S, 2I, H], gate rows first, and fp32 [S, 2I / 128, H / 128].
        l2_weights: e4m3 [S, H, I] and fp32 [S, H / 128, I / 128].

    Raises:
        ValueError: shapes or dtypes that don't fit, with got and expected; shared experts.
    """
    if shared_l1_weights is not None or shared_l2_weights is not None:
        raise ValueError("shared experts are not part of this kernel: run them beside it")
    made = [_scaled(name, *pair) for name, pair in (("l1_weights", l1_weights), ("l2_weights", l2_weights))]
    PreparedWeights(recipe="fp8_block", w13=made[0][0], w13_scale=made[0][1], w2=made[1][0], w2_scale=made[1][1])
    return made[0], made[1]


def transform_weights_for_mega_moe(
    l1_weights: torch.Tensor, l2_weights: torch.Tensor, activation: str = "swiglu"
) -> tuple[Transformed, Transformed]:
    """bf16 w13 [S, 2I, H] (gate rows first) and w2 [S, H, I] as ``bf16_mega_moe`` takes them.

    Raises:
        ValueError: shapes or dtypes that don't fit; pairs with scales, which are SM100's form of this function.
    """
    _check_activation(activation)
    for name, weights in (("l1_weights", l1_weights), ("l2_weights", l2_weights)):
        if not isinstance(weights, torch.Tensor):
            raise ValueError(f"{name} must be a bf16 tensor: with scales it is transform_weights_for_mega_moe_sm90")
    w13, w2 = l1_weights.contiguous(), l2_weights.contiguous()
    PreparedWeights(recipe="bf16", w13=w13, w2=w2)
    return Transformed((w13,)), Transformed((w2,))


def mega_moe_pre_dispatch_sm90(  # noqa: PLR0917 - DeepGEMM's order
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    buf_x: torch.Tensor,
    buf_x_sf: torch.Tensor,
    buf_topk_idx: torch.Tensor,
    buf_topk_weights: torch.Tensor,
    num_tokens: int,
    group_size: int = _BLOCK,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Fill a buffer's views: x bf16 [T, H] cast to e4m3 with scales of 1x128, topk_idx [T, K] and topk_weights times
    ``routed_scaling_factor``; rows from ``num_tokens`` on get no expert.

    Raises:
        ValueError: what doesn't fit, with got and expected.
    """
    if group_size != _BLOCK:
        raise ValueError(f"group_size must be {_BLOCK}, got {group_size}")
    n = num_tokens
    if not 0 <= n <= min(len(x), len(buf_x)):
        raise ValueError(f"num_tokens must be from 0 to {min(len(x), len(buf_x))}, the rows of x and buffer, got {n}")
    if topk_idx.shape[1:] != buf_topk_idx.shape[1:] or topk_weights.shape != topk_idx.shape or len(topk_idx) < n:
        raise ValueError(
            f"topk_idx and topk_weights must be [{n} or more, {buf_topk_idx.shape[1]}], got {tuple(topk_idx.shape)} "
            f"and {tuple(topk_weights.shape)}"
        )
    values, scales = casts.cast_1x128(x[:n])
    buf_x[:n].copy_(values)
    buf_x_sf[:n].copy_(scales)
    buf_topk_idx[:n].copy_(topk_idx[:n])
    buf_topk_idx[n:].fill_(-1)
    torch.mul(topk_weights[:n], routed_scaling_factor, out=buf_topk_weights[:n])


def fp8_mega_moe(  # noqa: PLR0917 - DeepGEMM's order
    y: torch.Tensor,
    l1_weights: Transformed,
    l2_weights: Transformed,
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: torch.Tensor | None = None,
    recipe: tuple[int, int, int] = (128, 128, 128),
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
    num_tokens_bound: int | None = None,
) -> None:
    """y [T, H] bf16 of the first T rows of the buffer; a collective call, queued on the current stream.

    Args:
        y: T may be 0, and differ from rank to rank.
        activation_clamp: bound c: silu(min(gate, c)) * clamp(up, -c, c).
        fast_math, num_tokens_bound: hints without influence here; the activation is as exact as ever.

    Raises:
        ValueError: what doesn't fit, with got and expected.
        PeerTimeout: a rank did not come to an earlier call.
    """
    if tuple(recipe) != (_BLOCK,) * 3:
        raise ValueError(f"recipe must be (128, 128, 128), got {recipe}")
    weights = [_taken("fp8_mega_moe", w, 2) for w in (l1_weights, l2_weights)]
    made = PreparedWeights(
        recipe="fp8_block", w13=weights[0][0], w13_scale=weights[0][1], w2=weights[1][0], w2_scale=weights[1][1]
    )
    _run(y, made, sym_buffer, cumulative_local_expert_recv_stats, activation, activation_clamp)


def bf16_mega_moe(  # noqa: PLR0917 - DeepGEMM's order
    y: torch.Tensor,
    l1_weights: Transformed,
    l2_weights: Transformed,
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: torch.Tensor | None = None,
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
) -> None:
    """As ``fp8_mega_moe`` in bf16: weights of ``transform_weights_for_mega_moe``, a buffer of mma_type bf16xbf16."""
    weights = [_taken("bf16_mega_moe", w, 1) for w in (l1_weights, l2_weights)]
    made = PreparedWeights(recipe="bf16", w13=weights[0][0], w2=weights[1][0])
    _run(y, made, sym_buffer, cumulative_local_expert_recv_stats, activation, activation_clamp)


def _run(  # noqa: PLR0917
    y: torch.Tensor,
    weights: PreparedWeights,
    buffer: SymmBuffer,
    stats: torch.Tensor | None,
    activation: str,
    clamp: float | None,
) -> None:
    _check_activation(activation)
    if stats is not None:
        raise ValueError("cumulative_local_expert_recv_stats must be None: this kernel does not count received tokens")
    chosen = Activation() if clamp is None else Activation("swiglu_limited", limit=float(clamp))
    runner = buffer.runner_for(chosen, weights.recipe)
    T = len(y)
    if buffer.num_max_tokens_per_rank < T:
        raise ValueError(f"y has {T} rows, the buffer holds {buffer.num_max_tokens_per_rank} tokens")
    x = buffer.x[:T] if buffer.x_sf is None else QuantisedTokens(buffer.x[:T], buffer.x_sf[:T])
    runner.forward(x, buffer.topk_idx[:T], buffer.topk_weights[:T], weights, out=y)


def _scaled(name: str, values: torch.Tensor, scales: torch.Tensor) -> Transformed:
    """(values, scales) with rows on 16 bytes; scales as they are or with adjacent rows, as DeepGEMM's layouts have it.

    PreparedWeights holds shapes against one another afterwards.
    """
    if values.dim() != 3 or values.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{name} must be e4m3 with 3 dimensions, got {values.dtype} {tuple(values.shape)}")
    S, N, K = values.shape
    shape = (S, N // _BLOCK, K // _BLOCK)
    if N % _BLOCK or K % _BLOCK or tuple(scales.shape) != shape or scales.dtype != torch.float32:
        raise ValueError(
            f"{name} must have rows and columns in multiples of {_BLOCK} and fp32 scales {shape}, got "
            f"{tuple(values.shape)} and {scales.dtype} {tuple(scales.shape)}"
        )
    return Transformed((values.contiguous(), scales.contiguous()))


def _taken(name: str, weights: Any, count: int) -> Transformed:
    if not isinstance(weights, Transformed) or len(weights) != count:
        source = "transform_weights_for_mega_moe" + ("_sm90" if count == 2 else "")
        raise ValueError(
            f"{name} takes weights from this package's {source}, got {type(weights).__name__}: gate rows stand before "
            "up rows here, where DeepGEMM interleaves them"
        )
    return weights


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise EngineUnavailableError("get_symm_buffer_for_mega_moe needs a CUDA device, none is visible")
    return torch.device("cuda", torch.cuda.current_device())


def _check_activation(activation: str) -> None:
    if activation != "swiglu":
        raise ValueError(f"activation must be swiglu, got {activation}")
