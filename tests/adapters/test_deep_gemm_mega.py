"""DeepGEMM's fused MoE by name: what reaches the kernel, what is refused; on GPUs, y against the layer in fp32."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megamoe.activation import Activation
from megamoe.adapters import deep_gemm
from megamoe.adapters.deep_gemm import mega
from megamoe.errors import EngineUnavailableError
from megamoe.kernels.quant import casts
from megamoe.testing.numerics import assert_close
from megamoe.testing.ranks import RankPool

H, I, E, K, T = 256, 128, 4, 2, 24  # noqa: E741 - the paper's letters
CLAMP = 0.75  # reached by many pre-activations


class Group:
    """Two ranks, as far as sizes go."""

    def size(self) -> int:
        return 2


class Runner:
    """Takes down what reaches ``MegaRunner``."""

    calls: list[dict[str, Any]]

    def __init__(self, problem: Any, num_sms: int | None) -> None:
        self.problem, self.num_sms, self.closed = problem, num_sms, False
        whole = torch.zeros(64, dtype=torch.uint8)
        self.buffer = type("Buffer", (), {"whole": whole, "pointers": [whole.data_ptr(), 1]})()

    @classmethod
    def create(cls, problem: Any, *, device: Any, group: Any, num_sms: int | None) -> Runner:
        return cls(problem, num_sms)

    def with_activation(self, activation: Activation) -> Runner:
        return type(self)(dataclasses.replace(self.problem, activation=activation), self.num_sms)

    def forward(self, *args: Any, **keywords: Any) -> None:
        keywords["out"].fill_(3.0)
        type(self).calls.append({"problem": self.problem, "args": args, **keywords})

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    Runner.calls = []
    monkeypatch.setattr(mega.mega, "MegaRunner", Runner)
    monkeypatch.setattr(mega, "_device", lambda: torch.device("cpu"))
    return Runner.calls


def buffer(**changes: Any) -> Any:
    sizes = {"num_experts": E, "num_max_tokens_per_rank": T, "num_topk": K, "hidden": H, "intermediate_hidden": I}
    return deep_gemm.get_symm_buffer_for_mega_moe(Group(), **{**sizes, **changes})  # type: ignore[arg-type]


def drawn(slots: int, seed: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """w13 [S, 2I, H] and w2 [S, H, I], bf16."""
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(slots, 2 * I, H, generator=generator) / H**0.5
    w2 = torch.randn(slots, H, I, generator=generator) / I**0.5
    return w13.to(device, torch.bfloat16), w2.to(device, torch.bfloat16)


def quantised(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return casts.cast_128x128(w)


def given(seed: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H] bf16, topk_idx int32 with a few -1, topk_weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator).bfloat16()
    idx = torch.rand(T, E, generator=generator).topk(K).indices.int()
    idx[::5, 0] = -1
    return x.to(device), idx.to(device), torch.rand(T, K, generator=generator).to(device)


def fill(buf: Any, x: Any, idx: Any, weights: Any, n: int, **changes: Any) -> None:
    deep_gemm.mega_moe_pre_dispatch_sm90(
        x, idx, weights, buf.x, buf.x_sf, buf.topk_idx, buf.topk_weights, num_tokens=n, **changes
    )


def test_what_reaches_the_kernel(calls: list[dict[str, Any]]) -> None:
    w13, w2 = (quantised(w) for w in drawn(E // 2, 1))
    l1, l2 = deep_gemm.transform_weights_for_mega_moe_sm90(w13, w2)
    buf = buffer()
    assert buf.x.dtype == torch.float8_e4m3fn and buf.x.shape == (T, H) and buf.x_sf.shape == (T, H // 128)
    assert buf.topk_idx.dtype == torch.int64 and (buf.topk_idx == -1).all() and buf.topk_weights.shape == (T, K)
    assert buf.num_max_tokens_per_rank == T and len(buf.handle.buffer_ptrs) == 2 and buf.buffer.nbytes == 64
    x, idx, weights = given(2)
    fill(buf, x, idx, weights, 10, routed_scaling_factor=2.5)
    y = torch.zeros(10, H, dtype=torch.bfloat16)
    deep_gemm.fp8_mega_moe(
        y, l1, l2, buf, recipe=(128, 128, 128), activation="swiglu", activation_clamp=CLAMP, fast_math=True
    )
    deep_gemm.fp8_mega_moe(y[:1], l1, l2, buf)
    first, second = calls
    problem = first["problem"]
    assert (problem.recipe, problem.weights_applied, problem.max_tokens) == ("fp8_block", "before_down", T)
    assert problem.activation == Activation("swiglu_limited", limit=CLAMP)
    assert second["problem"].activation == Activation() and len(second["args"][0].values) == 1
    cast, idx64, scaled, made = first["args"]
    values, scales = casts.cast_1x128(x[:10])
    assert torch.equal(cast.values.view(torch.uint8), values.view(torch.uint8)) and torch.equal(cast.scales, scales)
    assert torch.equal(idx64, idx[:10].long()) and torch.equal(scaled, weights[:10] * 2.5)
    assert (buf.topk_idx[10:] == -1).all(), "rows beyond the tokens have no expert"
    assert made.w13 is l1[0] is w13[0] and made.w2_scale is l2[1] and (y == 3).all()
    fill(buf, x[:0], idx[:0], weights[:0], 0)
    assert (buf.topk_idx == -1).all()


def test_bf16_and_the_number_of_sms(calls: list[dict[str, Any]]) -> None:
    deep_gemm.set_num_sms(64)
    try:
        buf = buffer(mma_type="bf16xbf16", use_fp8_dispatch=False)
    finally:
        deep_gemm.knobs._settings.num_sms = None
    assert buf.x.dtype == torch.bfloat16 and buf.x_sf is None and buf._runner.num_sms == 64
    l1, l2 = deep_gemm.transform_weights_for_mega_moe(*drawn(E // 2, 1))
    deep_gemm.bf16_mega_moe(torch.zeros(4, H, dtype=torch.bfloat16), l1, l2, buf, activation_clamp=CLAMP)
    assert calls[0]["problem"].recipe == "bf16" and calls[0]["args"][0].dtype == torch.bfloat16
    runner = buf._runner
    buf.destroy()
    assert runner.closed and buf.buffer is None
    with pytest.raises(ValueError, match="this buffer is destroyed"):
        deep_gemm.bf16_mega_moe(torch.zeros(4, H, dtype=torch.bfloat16), l1, l2, buf)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_shared_experts": 1}, "num_shared_experts must be 0, got 1"),
        ({"mma_type": "mxf4xmxf4"}, "mma_type must be one of fp8xfp4, fp8xfp8, bf16xbf16 on SM90, got mxf4xmxf4"),
        ({"use_fp8_dispatch": False}, "use_fp8_dispatch must be True with mma_type fp8xfp4, got False"),
        ({"activation": "gelu"}, "activation must be swiglu, got gelu"),
        ({"hidden": 192}, "multiples of 128, got 192 and 128"),
        ({"num_experts": 3}, r"num_experts \(3\) must be divisible by the number of ranks \(2\)"),
        ({"num_topk": 0}, "top_k must be"),
    ],
)
def test_buffers_that_are_refused(calls: list[dict[str, Any]], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        buffer(**changes)


def test_calls_that_are_refused(calls: list[dict[str, Any]]) -> None:
    w13, w2 = (quantised(w) for w in drawn(E // 2, 1))
    l1, l2 = deep_gemm.transform_weights_for_mega_moe_sm90(w13, w2)
    bf16 = deep_gemm.transform_weights_for_mega_moe(*drawn(E // 2, 1))
    buf, y = buffer(), torch.zeros(4, H, dtype=torch.bfloat16)
    call = deep_gemm.fp8_mega_moe
    refused: list[tuple[str, Any]] = [
        ("gate rows stand before up rows here", lambda: call(y, w13, l2, buf)),  # type: ignore[arg-type]
        ("transform_weights_for_mega_moe_sm90, got Transformed", lambda: call(y, bf16[0], l2, buf)),
        (r"recipe must be \(128, 128, 128\), got \(1, 1, 32\)", lambda: call(y, l1, l2, buf, recipe=(1, 1, 32))),
        ("does not count received tokens", lambda: call(y, l1, l2, buf, torch.zeros(2, dtype=torch.int32))),
        ("activation must be swiglu, got swigluoai", lambda: call(y, l1, l2, buf, activation="swigluoai")),
        ("y has 25 rows, the buffer holds 24", lambda: call(torch.zeros(25, H), l1, l2, buf)),
        ("the buffer was made for fp8_block, the call is bf16", lambda: deep_gemm.bf16_mega_moe(y, *bf16, buf)),
        (r"fp32 scales \(2, 2, 2\), got", lambda: deep_gemm.transform_weights_for_mega_moe_sm90((w13[0], w2[1]), w2)),
        ("must be e4m3", lambda: deep_gemm.transform_weights_for_mega_moe_sm90((w13[1], w13[1]), w2)),
        ("shared experts are not part", lambda: deep_gemm.transform_weights_for_mega_moe_sm90(w13, w2, w13, w2)),
        ("with scales it is transform_", lambda: deep_gemm.transform_weights_for_mega_moe(w13, w2)),  # type: ignore[arg-type]
        ("num_tokens must be from 0 to 24, .* got 25", lambda: fill(buf, *given(2), 25)),
        ("group_size must be 128, got 32", lambda: fill(buf, *given(2), 4, group_size=32)),
        (r"must be \[4 or more, 2\], got", lambda: fill(buf, given(2)[0], given(2)[1][:, :1], given(2)[2], 4)),
    ]
    for sentence, wrong in refused:
        with pytest.raises(ValueError, match=sentence):
            wrong()
    assert not calls
    call(y, l1, l2, buf)
    assert len(calls) == 1, "the next correct call works"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineUnavailableError, match="needs a CUDA device, none is visible"):
        buffer()


def layer(x: Any, idx: Any, weights: Any, experts: list[Any], *, clamp: float | None, fp8: bool) -> torch.Tensor:
    """y in fp32 of rows x [T, H] fp32 as the experts see them, rounding activations and results as the kernel does."""
    y = torch.zeros(x.shape[0], H, device=x.device)
    for e, (w13, w2) in enumerate(experts):
        rows, columns = (idx == e).nonzero(as_tuple=True)
        gate, up = (x[rows] @ w13.t()).chunk(2, -1)
        if clamp is not None:
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        a = F.silu(gate) * up * weights[rows, columns][:, None]
        if fp8:
            q, s = casts.cast_1x128(a)
            a = q.float() * s.repeat_interleave(128, 1)
        else:
            a = a.bfloat16().float()
        y.index_add_(0, rows, (a @ w2.t()).bfloat16().float())
    return y


def dequantised(pair: Any) -> list[torch.Tensor]:
    values, scales = pair
    return list(values.float() * scales.repeat_interleave(128, 1).repeat_interleave(128, 2))


def run(rank: int, world_size: int, group: dist.ProcessGroup, fp8: bool) -> float:
    """Largest difference of three calls: with a clamp, without, and fp8 codes with scales that are powers of two."""
    deep_gemm.set_pdl(False)
    experts, mine = [], None
    for r in range(world_size):
        w13, w2 = drawn(E // world_size, 10 + r, "cuda")
        if fp8:
            pairs = quantised(w13), quantised(w2)
            experts += list(zip(*(dequantised(pair) for pair in pairs), strict=True))
            made: Any = deep_gemm.transform_weights_for_mega_moe_sm90(*pairs)
        else:
            experts += list(zip(w13.float(), w2.float(), strict=True))
            made = deep_gemm.transform_weights_for_mega_moe(w13, w2)
        mine = made if r == rank else mine
    assert mine is not None
    kind = "fp8xfp4" if fp8 else "bf16xbf16"
    buf = deep_gemm.get_symm_buffer_for_mega_moe(group, E, T, K, H, I, mma_type=kind)
    call = deep_gemm.fp8_mega_moe if fp8 else deep_gemm.bf16_mega_moe
    worst = 0.0
    for turn, clamp in enumerate((CLAMP, None, CLAMP)):
        x, idx, weights = given(20 + 2 * turn + rank, "cuda")
        n = (T, 7)[rank % 2] if turn else T
        if fp8 and turn < 2:
            fill(buf, x, idx, weights, n)
        else:
            buf.topk_idx[:n].copy_(idx[:n])
            buf.topk_weights[:n].copy_(weights[:n])
            if fp8:
                codes, scales = deep_gemm.utils.per_token_cast_to_fp8(x, use_ue8m0=True)
                buf.x[:n].copy_(codes[:n])
                buf.x_sf[:n].copy_(scales[:n])
            else:
                buf.x[:n].copy_(x[:n])
        rows = buf.x[:n].float() * (buf.x_sf[:n].repeat_interleave(128, 1) if fp8 else 1.0)
        y = torch.full((n, H), torch.nan, dtype=torch.bfloat16, device="cuda")
        call(y, *mine, buf, activation_clamp=clamp)
        expected = layer(rows, idx[:n], weights[:n], experts, clamp=clamp, fp8=fp8)
        routed = (idx[:n] >= 0).any(1)
        # An activation between two e4m3 codes may fall either way, which moves its row.
        bounds = {"whole": 1e-4, "row": 1e-3} if fp8 else {"whole": 1e-5, "row": 1e-4}
        assert not y[~routed].any()
        assert_close(y[routed].float(), expected[routed], **bounds, what=f"turn {turn}")
        worst = max(worst, float(((y.float() - expected).norm() / expected.norm()) ** 2 / 2))
    graph, again = torch.cuda.CUDAGraph(), torch.full_like(y, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call(again, *mine, buf, activation_clamp=clamp)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(again, y)
    buf.destroy()
    return worst


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_on_one_gpu(fp8: bool, record_property: Any) -> None:
    with RankPool(1, backend="cpu:gloo,cuda:nccl") as pool:
        record_property("diff", max(pool.run(run, fp8)))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_on_two_gpus(fp8: bool, record_property: Any) -> None:
    with RankPool(2, backend="cpu:gloo,cuda:nccl") as pool:
        record_property("diff", max(pool.run(run, fp8)))
