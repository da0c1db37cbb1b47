"""Forward times of other packages on NVIDIA H200s; at 2 ranks from the project's page of numbers (2026-11-22).

Microseconds, dense random data, random routing, the slower rank. DeepGEMM's as ``megamoe bench moe`` times: L2
flushed, ranks lined up, device time of one call, median of 20. LigerCute, FlashInfer and torch without the flush and
with the host's launches inside; FlashInfer's FP8 figures include casting. At 8 ranks: what is published of older Hopper
kernels of DeepGEMM, as the project's targets cite it; how they were timed is not told.
"""

from __future__ import annotations

from megamoe.problem import Recipe

GPU = "NVIDIA H200"
_DEEP_GEMM = "numbers.md:deep_gemm-0.2.5"  # its newest Hopper mega-kernel, as in sgl-deep-gemm 0.2.5
_DEEP_GEMM_WHEEL = "numbers.md:deep_gemm-0.1.4.post1"
_PUSH = "numbers.md:flashinfer-0.7.2-push"
_CAKE = "numbers.md:flashinfer-cake"
_LIGER = "numbers.md:ligercute-0.8.5"
_TORCH = "numbers.md:torch-compiled"
_DEEP_GEMM_8 = "published:deep_gemm-older"

_Times = dict[tuple[str, Recipe], dict[str, dict[int, float]]]  # (case, recipe) -> peer -> T of a rank -> microseconds
_TWO: _Times = {
    ("flash", "fp8_block"): {
        _DEEP_GEMM: {8: 304, 64: 769, 128: 806, 256: 811, 512: 841, 1024: 877, 2048: 954, 4096: 1451, 8192: 2496},
        _PUSH: {128: 1291, 1024: 1379, 8192: 4475},
    },
    ("flash8", "fp8_block"): {
        _DEEP_GEMM: {64: 227, 128: 228, 256: 231, 512: 255, 1024: 371, 2048: 633, 4096: 1143, 8192: 2176},
    },
    ("dsv3-8", "fp8_block"): {
        _DEEP_GEMM: {64: 376, 128: 381, 512: 520, 1024: 788, 2048: 1372, 4096: 2615, 8192: 5154},
    },
    ("pro8", "fp8_block"): {
        _DEEP_GEMM: {64: 784, 128: 788, 512: 844, 1024: 1051, 2048: 1699, 4096: 2950, 8192: 5776},
    },
    ("qwen3", "fp8_block"): {
        _DEEP_GEMM_WHEEL: {8: 90, 128: 144, 512: 188, 4096: 750, 8192: 1423},
        _PUSH: {8: 308, 128: 420, 512: 354, 4096: 1162, 8192: 2015},
    },
    ("qwen3", "bf16"): {
        _LIGER: {512: 715, 4096: 1234, 8192: 1895},
        _CAKE: {512: 412, 4096: 980, 8192: 1798},
        _TORCH: {512: 1270, 4096: 3012, 8192: 4273},
    },
    ("flash", "bf16"): {
        _LIGER: {4096: 4847, 8192: 7855},
        _CAKE: {8192: 5330},
        _TORCH: {4096: 5467, 8192: 9620},
    },
}


_EIGHT: _Times = {
    ("flash", "fp8_block"): {_DEEP_GEMM_8: {128: 269, 8192: 3176}},
    ("pro", "fp8_block"): {_DEEP_GEMM_8: {128: 872, 8192: 7735}},
}
_BY_RANKS = {2: _TWO, 8: _EIGHT}


def published(case: str, recipe: Recipe, tokens: int, *, world_size: int = 2) -> dict[str, float]:
    """Peer -> microseconds of one forward call with ``tokens`` tokens a rank; {} where nobody was measured."""
    peers = _BY_RANKS.get(world_size, {}).get((case, recipe), {})
    return {name: float(times[tokens]) for name, times in peers.items() if tokens in times}


def comparable(case: str, recipe: Recipe, tokens: int, *, machine: str, world_size: int) -> dict[str, float]:
    """``published`` where a time of ``machine`` may stand beside it: the same GPUs, one rank on each."""
    return published(case, recipe, tokens, world_size=world_size) if machine == f"{world_size}x {GPU}" else {}
