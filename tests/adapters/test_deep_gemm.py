"""DeepGEMM's names on the CPU twins: the numbers they promise, the keywords of forks, its name in sys.modules."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.adapters import deep_gemm
from megamoe.adapters.deep_gemm import knobs as facade_knobs
from megamoe.errors import EngineUnavailableError
from megamoe.kernels.gemm import api
from megamoe.kernels.gemm.knobs import Knobs, current
from megamoe.kernels.quant import casts
from megamoe.kernels.quant.reference import dequantise_1x128, dequantise_128x128
from megamoe.testing.numerics import assert_close
from tests.repo import ROOT

M, N, K, G = 200, 264, 320, 3
BOUNDS = {"whole": 1e-5, "row": 1e-4}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(facade_knobs, "_settings", facade_knobs._Settings())
    yield
    deep_gemm.uninstall()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def fp8(x: torch.Tensor, *, weight: bool) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """((e4m3, scale), what it stands for in fp32)."""
    cast = deep_gemm.utils.per_block_cast_to_fp8 if weight else deep_gemm.utils.per_token_cast_to_fp8
    q, scale = cast(x)
    return (q, scale), (dequantise_128x128 if weight else dequantise_1x128)(q, scale)


def turn(x: torch.Tensor) -> torch.Tensor:
    raw = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
    return raw.mT.contiguous().view(x.dtype) if raw is not x else raw.mT.contiguous()


@pytest.mark.parametrize("order", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense(order: str, dtype: torch.dtype) -> None:
    a, b = draw(M, K), draw(N, K, seed=1)
    (qa, sa), va = fp8(a, weight=False)
    (qb, sb), vb = fp8(b, weight=True)
    if order[0] == "t":
        a, qa, sa = turn(a), turn(qa), turn(sa)
    if order[1] == "n":
        b, qb, sb = turn(b), turn(qb), turn(sb)
    d = torch.full((M, N), torch.nan, dtype=dtype)
    getattr(deep_gemm, f"fp8_gemm_{order}")((qa, sa), (qb, sb), d)
    assert_close(d.float(), va @ vb.t(), **BOUNDS)
    d.fill_(torch.nan)
    getattr(deep_gemm, f"bf16_gemm_{order}")(a, b, d, compiled_dims="nk")
    assert_close(d.float(), draw(M, K).float() @ draw(N, K, seed=1).float().t(), **BOUNDS)


def test_c_is_added() -> None:
    (a, va), (b, vb) = fp8(draw(M, K), weight=False), fp8(draw(N, K, seed=1), weight=True)
    c = draw(M, N, seed=2).float()
    kept, d = c.clone(), torch.full((M, N), torch.nan)
    deep_gemm.fp8_gemm_nt(a, b, d, c=c, recipe=[1, 128, 128], recipe_a=(1, 128), disable_ue8m0_cast=True)
    assert torch.equal(c, kept)
    assert_close(d, va @ vb.t() + kept, **BOUNDS)
    deep_gemm.fp8_gemm_nt(a, b, c, c)
    assert_close(c, d, **BOUNDS)
    with pytest.raises(ValueError, match="c and d must be float32 of one shape"):
        deep_gemm.fp8_gemm_nt(a, b, d.bfloat16(), c)


def test_scales_in_either_layout() -> None:
    (a, _), (b, _) = fp8(draw(M, K), weight=False), fp8(draw(N, K, seed=1), weight=True)
    plain, adjacent = torch.empty(M, N), torch.empty(M, N)
    deep_gemm.fp8_gemm_nt(a, b, plain)
    moved = deep_gemm.get_mn_major_tma_aligned_tensor(a[1])
    assert moved.stride(0) == 1
    deep_gemm.fp8_gemm_nt((a[0], moved), b, adjacent)
    assert torch.equal(plain, adjacent)
    with pytest.raises(ValueError, match="packed UE8M0, the format of SM100"):
        deep_gemm.fp8_gemm_nt((a[0], a[1].int()), b, plain)


def grouped() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 (A [M, K], B [G, N, K]) and m_indices with padding, in front too, and an empty group."""
    indices = torch.full((M,), -1, dtype=torch.int32)
    indices[3:70] = 0
    indices[128:190] = 2
    return draw(M, K), draw(G, N, K, seed=1), indices


@pytest.mark.parametrize("keyword", ["m_indices", "grouped_layout"])
def test_grouped_contiguous(keyword: str) -> None:
    a, b, indices = grouped()
    (qa, va), (qb, vb) = fp8(a, weight=False), fp8(b, weight=True)
    for call, operands, (x, w) in (
        (deep_gemm.m_grouped_fp8_gemm_nt_contiguous, (qa, qb), (va, vb)),
        (deep_gemm.m_grouped_bf16_gemm_nt_contiguous, (a, b), (a.float(), b.float())),
    ):
        d = torch.full((M, N), torch.nan)
        call(*operands, d, **{keyword: indices})
        expected = torch.zeros(M, N)
        for row in range(M):
            if indices[row] >= 0:
                expected[row] = x[row] @ w[int(indices[row])].t()
        assert not d[indices < 0].any(), "padding is zero"
        assert_close(d, expected, **BOUNDS)


def test_indices_out_of_order_cannot_pass_for_a_result() -> None:
    a, b, indices = grouped()
    indices[150:160] = 1
    d = torch.zeros(M, N)
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, b, d, indices)
    assert d[150:160].isnan().all() and not d[160:190].isnan().any() and not d[:150].isnan().any()
    with pytest.raises(ValueError, match=r"m_indices must be int32 \[200\], got torch.int64"):
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, b, d, indices.long())
    for both in ({}, {"m_indices": indices, "grouped_layout": indices}):
        with pytest.raises(ValueError, match="needs m_indices, or grouped_layout, and not both"):
            deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, b, d, **both)


def test_masked() -> None:
    a, b = draw(G, 64, K), draw(G, N, K, seed=1)
    counts = torch.tensor([64, 0, 17], dtype=torch.int32)
    (qb, vb) = fp8(b, weight=True)
    pairs = [fp8(rows, weight=False) for rows in a]
    qa = (torch.stack([q.view(torch.uint8) for (q, _), _ in pairs]).view(torch.float8_e4m3fn),
          torch.stack([s for (_, s), _ in pairs]))  # fmt: skip
    va = torch.stack([v for _, v in pairs])
    assert deep_gemm.fp8_m_grouped_gemm_nt_masked is deep_gemm.m_grouped_fp8_gemm_nt_masked
    for call, operands, (x, w) in (
        (deep_gemm.fp8_m_grouped_gemm_nt_masked, (qa, qb), (va, vb)),
        (deep_gemm.m_grouped_bf16_gemm_nt_masked, (a, b), (a.float(), b.float())),
    ):
        d = torch.full((G, 64, N), -7.0)
        call(*operands, d, counts, 27)
        for g, count in enumerate(counts.tolist()):
            assert_close(d[g, :count], x[g, :count] @ w[g].t(), **BOUNDS)
            assert (d[g, count:] == -7).all(), "rows beyond the count are not written"
    with pytest.raises(ValueError, match=r"a's scale must be fp32 \(3, 64, 3\), got .* \(3, 64, 2\)"):
        deep_gemm.fp8_m_grouped_gemm_nt_masked((qa[0], qa[1][..., :2]), qb, d, counts, 27)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"recipe": (1, 1, 128)}, r"recipe must be None or \(1, 128, 128\), got \(1, 1, 128\)"),
        ({"alpha": 0.5}, "alpha must be None or 1.0, got 0.5"),
        ({"epilogue": "relu"}, "epilogue must be None, got 'relu'"),
        ({"colour": 1}, "has no keyword 'colour' here"),
    ],
)
def test_what_would_change_the_result_is_refused(keywords: dict[str, Any], sentence: str) -> None:
    (a, _), (b, _) = fp8(draw(M, K), weight=False), fp8(draw(N, K, seed=1), weight=True)
    d = torch.zeros(M, N)
    with pytest.raises(ValueError, match=sentence):
        deep_gemm.fp8_gemm_nt(a, b, d, **keywords)
    assert not d.any()
    with pytest.raises(ValueError, match="a must be a pair"):
        deep_gemm.fp8_gemm_nt(a[0], b, d)  # type: ignore[arg-type]


def test_knobs_reach_the_gemm_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Knobs] = []
    original: Callable[..., torch.Tensor] = api.gemm

    def spy(*args: Any, **keywords: Any) -> torch.Tensor:
        seen.append(current())
        return original(*args, **keywords)

    monkeypatch.setattr(api, "gemm", spy)
    a, b, d = draw(8, 64), draw(16, 64), torch.empty(8, 16)
    deep_gemm.bf16_gemm_nt(a, b, d)
    deep_gemm.set_num_sms(64)
    deep_gemm.set_pdl(True)
    deep_gemm.set_tc_util(80)
    deep_gemm.bf16_gemm_nt(a, b, d)
    assert seen == [Knobs(), Knobs(num_sms=64, pdl=True)]
    assert current() == Knobs()
    assert (deep_gemm.get_num_sms(), deep_gemm.get_pdl(), deep_gemm.get_tc_util()) == (64, True, 80)
    with pytest.raises(ValueError, match="num_sms must be at least 1, got 0"):
        deep_gemm.set_num_sms(0)
    with pytest.raises(ValueError, match=r"tc_util must lie in \[0, 100\], got 101"):
        deep_gemm.set_tc_util(101)


def test_layout_helpers() -> None:
    assert [deep_gemm.get_tma_aligned_size(n, 4) for n in (1, 4, 5)] == [4, 4, 8]
    assert deep_gemm.get_tma_aligned_size(17, 1) == 32
    assert (
        deep_gemm.get_mk_alignment_for_contiguous_layout() == 128 == deep_gemm.get_m_alignment_for_contiguous_layout()
    )
    assert (deep_gemm.ceil_div(7, 4), deep_gemm.align(7, 4)) == (2, 8)
    powers = torch.tensor([[1.0, 2.0, 4.0, 8.0, 0.5]]).repeat(6, 1)
    packed = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(powers)
    assert packed.shape == (6, 2) and packed.stride() == (1, 8)
    assert packed[0].tolist() == [0x8281807F - 2**32, 126]  # four codes, then 0.5 alone
    scales = torch.rand(M, 3)
    for recipe, is_a in (((1, 128), None), ((1, 128, 128), True)):
        moved = deep_gemm.transform_sf_into_required_layout(scales, M, K, recipe, is_sfa=is_a)
        assert torch.equal(moved, scales) and moved.stride() == (1, 200)
    blocks = torch.rand(G, 3, 3)
    same = deep_gemm.transform_sf_into_required_layout(blocks, N, K, (1, 128, 128), num_groups=G, is_sfa=False)
    assert same is blocks
    for arguments, sentence in (
        ((scales, M, K, (1, 128, 128)), "needs is_sfa"),
        ((scales, M, K, (1, 32)), "per 1x128 or 128x128, got 1x32"),
        ((scales, M + 1, K, (1, 128)), r"sf must be fp32 \(..., 201, 3\)"),
        ((blocks, N, K, (128, 128), G + 1), r"sf must be \[4, ...\] for 4 groups"),
    ):
        with pytest.raises(ValueError, match=sentence):
            deep_gemm.transform_sf_into_required_layout(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gran_k must be 128, got 32"):
        deep_gemm.utils.per_token_cast_to_fp8(scales, False, 32)


def test_install_under_deep_gemms_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    deep_gemm.install()
    deep_gemm.install()
    assert importlib.import_module("deep_gemm") is deep_gemm
    layout = importlib.import_module("deep_gemm.utils.layout")
    assert layout.get_tma_aligned_size is deep_gemm.get_tma_aligned_size
    assert importlib.import_module("deep_gemm.utils") is deep_gemm.utils
    deep_gemm.uninstall()
    assert not [name for name in sys.modules if name.split(".")[0] == "deep_gemm"]
    other = type(sys)("deep_gemm")
    monkeypatch.setitem(sys.modules, "deep_gemm", other)
    with pytest.raises(ValueError, match="pass replace=True"):
        deep_gemm.install()
    deep_gemm.uninstall()
    assert sys.modules["deep_gemm"] is other, "what is not ours stays"
    deep_gemm.install(replace=True)
    assert importlib.import_module("deep_gemm") is deep_gemm


def test_names_without_an_engine_say_so() -> None:
    for name in ("k_grouped_fp8_gemm_nt_contiguous", "k_grouped_bf16_gemm_tn_contiguous"):
        with pytest.raises(EngineUnavailableError, match=f"{name}: GEMMs grouped along K"):
            getattr(deep_gemm, name)()
    assert not hasattr(deep_gemm, "fp8_mqa_logits"), "clients probe for names and take another way"


def test_without_a_device_the_number_of_sms_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineUnavailableError, match="no CUDA device is visible"):
        deep_gemm.get_num_sms()


@pytest.mark.gpu
@pytest.mark.parametrize("call", ["dense", "contiguous", "masked"])
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_on_a_gpu_as_on_the_twins(call: str, kind: str) -> None:
    """The same call on both devices; the kernels' casts give the twins' bits, so that only the GEMM differs."""
    results = []
    for device in ("cpu", "cuda"):
        a, b, indices = (t.to(device) for t in grouped())
        counts = torch.tensor([40, 0, 7], dtype=torch.int32, device=device)
        d = torch.zeros((G, 64, N) if call == "masked" else (M, N), dtype=torch.bfloat16, device=device)
        if call == "masked":
            a = a[: G * 64 // 2].repeat(2, 1).view(G, 64, K)
        if call == "dense":
            b = b[0].contiguous()
        x: Any = a
        w: Any = b
        if kind == "fp8":
            q, scale = deep_gemm.utils.per_token_cast_to_fp8(a.reshape(-1, K))
            x = (q.reshape(a.shape), scale.reshape(*a.shape[:-1], -1))
            w = casts.cast_128x128(b)
        if call == "dense":
            getattr(deep_gemm, f"{kind}_gemm_nt")(x, w, d)
        elif call == "contiguous":
            getattr(deep_gemm, f"m_grouped_{kind}_gemm_nt_contiguous")(x, w, d, indices)
        else:
            getattr(deep_gemm, f"m_grouped_{kind}_gemm_nt_masked")(x, w, d, counts, 16)
        results.append(d.float().cpu())
    assert results[0].any()
    assert_close(results[1].flatten(0, -2), results[0].flatten(0, -2), **BOUNDS)


def test_the_pages_example(tmp_path: Path) -> None:
    page = (ROOT / "docs/deepgemm.md").read_text(encoding="utf-8")
    assert len(re.findall("<!-- example -->", page)) == 1
    script = tmp_path / "example.py"
    script.write_text(re.findall(r"<!-- example -->\n```python\n(.*?)```", page, flags=re.DOTALL)[0], encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) < 1e-5
