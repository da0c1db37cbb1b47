"""The cast kernels compiled for sm_90a: no spills, 16-byte accesses, conversion in hardware. No GPU needed."""

from __future__ import annotations

import pytest
import torch

from megamoe.kernels.jit import inspect
from megamoe.kernels.jit.compiler import compile_source
from megamoe.kernels.quant.launch import CastKernel, ConvertKernel

BF16, FP32 = torch.bfloat16, torch.float32
CASTS = [
    CastKernel(kind="1x128"),
    CastKernel(kind="1x128", power_of_two=True, layout="sm100"),
    CastKernel(kind="1x128", element=FP32, layout="sm90"),
    CastKernel(kind="1x128", activation="swiglu", layout="sm90"),
    CastKernel(kind="1x128", activation="swiglu_clamped", element=FP32),
    CastKernel(kind="1x128", activation="geglu"),
    CastKernel(kind="1x128", activation="relu2"),
    CastKernel(kind="row", row_threads=128, steps=4),
    CastKernel(kind="row", row_threads=1024, steps=4),
    CastKernel(kind="row", row_threads=256, steps=4, one_read=False),
    CastKernel(kind="row", element=FP32, row_threads=1024, steps=2),
    CastKernel(kind="row", activation="swiglu", row_threads=128),
    CastKernel(kind="row", activation="geglu", element=FP32, row_threads=1024),
    CastKernel(kind="row", activation="swiglu", row_threads=256, one_read=False),
    CastKernel(kind="128x128"),
    CastKernel(kind="128x128", transposed=True),
    CastKernel(kind="128x128", element=FP32, transposed=True),
    CastKernel(kind="both", layout="sm90"),
    CastKernel(kind="both", layout="sm90", grouped=True),
    CastKernel(kind="both", element=FP32, power_of_two=True, layout="sm100"),
    CastKernel(kind="both", activation="swiglu", layout="sm90", grouped=True),
]


@pytest.mark.parametrize("kernel", CASTS, ids=lambda kernel: kernel.source().name)
def test_casts_compile_without_spills_to_wide_accesses(kernel: CastKernel) -> None:
    compiled = compile_source(kernel.source())
    assert not compiled.report.faults()
    assert compiled.report.stack_bytes == 0
    assert compiled.report.registers * kernel.threads <= 65536
    names = inspect.instructions(inspect.sass(compiled.cubin, "cast"))
    loads = [n for n in names if n.startswith("LDG") and ".128" in n]
    stores = [n for n in names if n.startswith("STG") and ".128" in n]
    assert len(loads) >= 2 and stores
    assert sum(n.startswith("F2FP") and "E4M3" in n for n in names) >= 8
    assert not any(n.startswith(("LDL", "STL")) for n in names)


@pytest.mark.parametrize("form", ["fp32_adjacent", "packed_adjacent", "packed_row"])
def test_conversions_compile(form: str) -> None:
    for source, target in (("fp32_row", form), (form, "fp32_row")):
        kernel = ConvertKernel(source_form=source, target_form=target)  # type: ignore[arg-type]
        assert not compile_source(kernel.source()).report.faults()


@pytest.mark.parametrize("form", ["fp32_adjacent", "packed_adjacent", "packed_row"])
def test_conversions_by_pieces_have_all_loads_in_flight(form: str) -> None:
    """Four loads of 16 bytes before anything that waits for one, and as many threads as hide memory."""
    compiled = compile_source(ConvertKernel(source_form="fp32_row", target_form=form, pieces=True).source())  # type: ignore[arg-type]
    assert not compiled.report.faults()
    assert compiled.report.registers <= 40
    names = inspect.instructions(inspect.sass(compiled.cubin, "convert"))
    loads = [i for i, name in enumerate(names) if name.startswith("LDG") and ".128" in name]
    stores = [i for i, name in enumerate(names) if name.startswith(("STS", "STG"))]
    assert len(loads) == 4 and max(loads) < min(stores)
