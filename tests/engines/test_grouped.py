"""The ways to a grouped product agree, on the CPU: the loop, torch's grouped GEMM, and the twin of our kernel."""

from __future__ import annotations

import pytest
import torch

from megamoe.engines import grouped
from megamoe.testing.numerics import difference

OFFSETS = torch.tensor([0, 5, 5, 16, 21], dtype=torch.int32)  # the second expert has no rows


def _operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(21, 16, generator=g), torch.randn(21, 24, generator=g)
    return a.bfloat16(), b.bfloat16(), torch.randn(4, 24, 16, generator=g).bfloat16()


@pytest.mark.parametrize("backend", ["torch", "megamoe"])
def test_against_the_loop(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, w = _operands()
    looped = [grouped.mm_nt(a, w, OFFSETS), grouped.mm_nn(b, w, OFFSETS), grouped.mm_tn(b, a, OFFSETS)]
    monkeypatch.setattr(grouped, "backend", lambda device, dtype: backend)
    fused = [grouped.mm_nt(a, w, OFFSETS), grouped.mm_nn(b, w, OFFSETS), grouped.mm_tn(b, a, OFFSETS)]
    for loop, other in zip(looped, fused, strict=True):
        assert loop.dtype == torch.float32
        assert difference(other, loop) < (1e-12 if other.dtype == torch.float32 else 5e-6)
    assert fused[0].dtype == grouped.preact_dtype(a.device, a.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(6))
def test_our_kernels_against_the_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setenv("MEGAMOE_GROUPED_GEMM", "auto")
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, [5, 300][seed % 2], (12,), generator=g)
    rows[torch.rand(12, generator=g) < 0.3] = 0
    total, width, inner = int(rows.sum()), 8 * (30 + seed), 8 * (17 + 3 * seed)
    offsets = torch.tensor([0, *rows]).cumsum(0).int().cuda()
    a, b = (torch.randn(total, columns, generator=g).bfloat16().cuda() for columns in (width, inner))
    w = torch.randn(12, inner, width, generator=g).bfloat16().cuda()
    assert grouped.backend(a.device, a.dtype) == "megamoe"
    ours = [grouped.mm_nt(a, w, offsets), grouped.mm_nn(b, w, offsets), grouped.mm_tn(b, a, offsets)]
    monkeypatch.setattr(grouped, "backend", lambda device, dtype: "loop")
    looped = [grouped.mm_nt(a, w, offsets), grouped.mm_nn(b, w, offsets), grouped.mm_tn(b, a, offsets)]
    for mine, loop in zip(ours, looped, strict=True):
        assert mine.dtype == torch.float32 and difference(mine, loop) < 1e-10


def test_the_loop_against_float64() -> None:
    a, b, w = (t.double() for t in _operands())
    nt, tn = torch.zeros(21, 24).double(), torch.zeros(4, 24, 16).double()
    for m in range(21):
        s = [0] * 5 + [2] * 11 + [3] * 5
        nt[m] = w[s[m]] @ a[m]
        tn[s[m]] += torch.outer(b[m], a[m])
    low = _operands()
    assert difference(grouped.mm_nt(low[0], low[2], OFFSETS), nt) < 1e-12
    assert difference(grouped.mm_tn(low[1], low[0], OFFSETS), tn) < 1e-12


def test_no_rows_at_all() -> None:
    none = torch.zeros(5, dtype=torch.int32)
    a, b, w = _operands()
    assert grouped.mm_nt(a[:0], w, none).shape == (0, 24)
    assert grouped.mm_nn(b[:0], w, none).shape == (0, 16)
    assert not grouped.mm_tn(b[:0], a[:0], none).any()
    assert not grouped.segment_sum(a[:0].float(), none[1:].long()).any()


def test_segment_sum() -> None:
    a = torch.arange(42.0).view(21, 2)
    sums = grouped.segment_sum(a, OFFSETS.diff().long())
    assert torch.equal(sums, torch.stack([a[:5].sum(0), torch.zeros(2), a[5:16].sum(0), a[16:].sum(0)]))
