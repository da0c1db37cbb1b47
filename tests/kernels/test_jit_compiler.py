from __future__ import annotations

import shutil

import pytest

from megamoe import env
from megamoe.errors import CompileError, EngineUnavailableError
from megamoe.kernels.jit import compiler
from megamoe.kernels.jit.compiler import CompilerKind, compile_source
from megamoe.kernels.jit.inspect import instructions, opcodes, sass
from megamoe.kernels.jit.source import KernelSource
from tests.kernels import jit_kernels

KINDS = (
    "nvrtc",
    pytest.param("nvcc", marks=pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_with_tma_and_wgmma_compiles_to_tensor_core_code(kind: CompilerKind) -> None:
    compiled = compile_source(jit_kernels.tile(), kind=kind)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.report.faults() == []
    assert 32 < compiled.report.registers < 100
    text = sass(compiled.cubin, "tile")
    counts = opcodes(text)
    assert counts["QGMMA"] == 4 and counts["UTMALDG"] == 2
    assert counts["LDL"] == counts["STL"] == counts["HGMMA"] == 0
    assert "QGMMA.64x64x32.F32.E4M3.E4M3" in instructions(text)


@pytest.mark.parametrize("kind", KINDS)
def test_spills_are_read_from_the_log_and_seen_in_the_code(kind: CompilerKind) -> None:
    compiled = compile_source(jit_kernels.spilling(), kind=kind)
    report = compiled.report
    assert report.spill_store_bytes > 100 and report.spill_load_bytes > 100 and report.stack_bytes > 100
    assert report.registers == 64
    assert any("spills" in fault for fault in report.faults())
    assert opcodes(sass(compiled.cubin, "spilling"))["STL"] > 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "code"), [("serialised", "C7520"), ("register_clash", "C7508")])
def test_losses_that_ptxas_remarks_on_are_faults(kind: CompilerKind, name: str, code: str) -> None:
    report = compile_source(getattr(jit_kernels, name)(), kind=kind).report
    assert code in report.codes
    assert len(report.faults()) == 1 and code in report.faults()[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_shows_the_line_it_means(kind: CompilerKind) -> None:
    source = KernelSource("broken", '\n\nextern "C" __global__ void k() { int x = nothing; }\n', "k")
    with pytest.raises(CompileError) as caught:
        compile_source(source, kind=kind)
    assert "kernel broken did not compile" in str(caught.value)
    assert '    3 | extern "C" __global__ void k() { int x = nothing; }' in str(caught.value)
    assert 'identifier "nothing" is undefined' in caught.value.log
    assert caught.value.listing.splitlines()[0] == "    1 | "


def test_a_missing_entry_is_named() -> None:
    with pytest.raises(CompileError, match="not of 'absent'"):
        compile_source(KernelSource("other", 'extern "C" __global__ void present() {}', "absent"))


def test_cudas_own_headers_and_options_reach_the_compiler() -> None:
    code = """
#include <cuda_bf16.h>
#include <cuda_fp8.h>
extern "C" __global__ void k(__nv_fp8_e4m3* y, const __nv_bfloat16* x) { *y = __nv_fp8_e4m3((float)*x * FACTOR); }
"""
    compiled = compile_source(KernelSource("casts", code, "k", options=("-DFACTOR=2.0f", "-lineinfo")))
    assert "F2FP" in opcodes(sass(compiled.cubin, "k"))
    assert b".debug_line" in compiled.cubin
    assert set(compiler.headers_of(KernelSource("casts", code, "k")).toolkit) == {"cuda_bf16.h", "cuda_fp8.h"}


def test_compilers_have_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.compiler_id("nvrtc").startswith("nvrtc 13.")
    compiler.compiler_id.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    with pytest.raises(EngineUnavailableError, match="no nvcc"):
        compiler.compiler_id("nvcc")
    assert env.get("MEGAMOE_COMPILER") == "nvrtc"
