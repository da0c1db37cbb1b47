"""Yield hints in machine code: on every second FFMA of a promotion, and nothing else is touched."""

from __future__ import annotations

import dataclasses

import pytest

from megamoe.kernels.gemm.config import Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc, choose
from megamoe.kernels.jit.cache import cache_key, default_cache
from megamoe.kernels.jit.compiler import headers_of
from megamoe.kernels.jit.inspect import instructions, sass
from megamoe.kernels.jit.yields import interleave

_YIELD = 1 << 109  # 0: may yield
_REUSE = 0xF << 122
_FFMA = 0x223


def words(cubin: bytes) -> list[int]:
    """The file, 128 bits at a time: sections of code begin at multiples of 16 bytes."""
    return [int.from_bytes(cubin[at : at + 16], "little") for at in range(0, len(cubin) - 15, 16)]


def test_every_second_ffma_of_a_promotion_yields_and_nothing_else_changes() -> None:
    desc = GemmDesc(scaling=Scaling.BLOCK, grouping="dense", m=8192, n=8192, k=8192)
    source = choose(desc).source()
    assert source.yields
    with_hints = default_cache().get(source).cubin
    plain = default_cache().get(dataclasses.replace(source, yields=False)).cubin
    assert interleave(plain, source.entry) == with_hints and interleave(with_hints, source.entry) == with_hints
    assert instructions(sass(plain, source.entry)) == instructions(sass(with_hints, source.entry))
    before, after = words(plain), words(with_hints)
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert all((before[i] ^ after[i]) & ~(_YIELD | _REUSE) == 0 for i in changed), "only hints may change"
    assert all(after[i] & 0xFFF == _FFMA for i in changed), "only FFMAs may change"
    assert all(after[i] & _REUSE == 0 for i in changed if not after[i] & _YIELD), "what yields keeps no operand"
    assert len(changed) >= 32 and any(not after[i] & _YIELD for i in changed)


def test_kernels_with_and_without_hints_have_keys_of_their_own() -> None:
    source = choose(GemmDesc(scaling=Scaling.BLOCK, grouping="dense", m=512, n=512, k=512)).source()
    headers = headers_of(source)
    assert cache_key(source, headers, "x") != cache_key(dataclasses.replace(source, yields=False), headers, "x")
    bf16 = choose(GemmDesc(scaling=Scaling.NONE, grouping="dense", m=512, n=512, k=512)).source()
    assert not bf16.yields, "nothing is promoted"


def test_what_is_no_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="64-bit ELF"):
        interleave(b"MZ" + bytes(100), "f")
    source = choose(GemmDesc(scaling=Scaling.BLOCK, grouping="dense", m=512, n=512, k=512)).source()
    with pytest.raises(ValueError, match=r"no section \.text\.other"):
        interleave(default_cache().get(source).cubin, "other")
