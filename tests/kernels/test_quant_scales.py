"""Scale layouts: conversions (kernels and twins), alignments, and what is refused."""

from __future__ import annotations

import pytest
import torch

from megamoe.kernels.quant import layouts, reference, reference_scales, scales
from megamoe.kernels.quant.launch import row_shape

SHAPES = [(1, 1), (5, 3), (64, 32), (65, 33), (2, 3, 70, 5), (0, 4), (1, 4), (130, 56), (3, 70, 76), (2, 2, 64, 64)]
SHAPES_GPU = [*SHAPES, (8192, 56), (4, 4096, 16), (100001, 7)]


def powers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.randint(-126, 128, shape, generator=generator).float())


def test_packing_by_hand() -> None:
    packed = reference_scales.pack_ue8m0(torch.tensor([[1.0, 2.0, 4.0, 8.0, 0.5]]))
    assert [int(v) & 0xFFFFFFFF for v in packed[0]] == [0x8281807F, 0x0000007E]
    assert reference_scales.unpack_ue8m0(packed, 5).tolist() == [[1.0, 2.0, 4.0, 8.0, 0.5]]


def test_layouts_by_hand() -> None:
    scale = torch.arange(6.0).reshape(3, 2)  # 3 rows, 2 blocks
    adjacent = reference_scales.to_sm90(scale)
    assert adjacent.stride() == (1, 4) and torch.equal(adjacent, scale)
    memory = torch.as_strided(adjacent, (7,), (1,)).tolist()
    assert memory[:3] == [0.0, 2.0, 4.0] and memory[4:7] == [1.0, 3.0, 5.0]
    packed = reference_scales.to_sm100(torch.tensor([[1.0, 2.0], [4.0, 8.0]]))
    assert packed.stride() == (1, 4)
    assert torch.as_strided(packed, (2,), (1,)).tolist() == [0x807F, 0x8281]


@pytest.mark.parametrize("name", ["pack_ue8m0", "to_sm90", "to_sm100"])
def test_conversions_match_their_twins_and_come_back(quant_device: torch.device, name: str) -> None:
    for shape in SHAPES_GPU if quant_device.type == "cuda" else SHAPES:
        scale = powers(*shape).to(quant_device)
        there, twin = getattr(scales, name)(scale), getattr(reference_scales, name)(scale)
        assert torch.equal(there, twin) and there.stride() == twin.stride() and there.dtype == twin.dtype
        inverse = {"pack_ue8m0": "unpack_ue8m0", "to_sm90": "from_sm90", "to_sm100": "from_sm100"}[name]
        blocks = () if name == "to_sm90" else (shape[-1],)
        for module in (scales, reference_scales):
            back = getattr(module, inverse)(there, *blocks)
            assert torch.equal(back, scale) and back.is_contiguous()


def test_strided_scales_are_converted_too(quant_device: torch.device) -> None:
    wide = powers(12, 9).to(quant_device)
    part = wide[::2, 1:6]
    assert torch.equal(scales.to_sm90(part), part)
    assert torch.equal(scales.from_sm90(scales.to_sm90(wide)[2:, 3:]), wide[2:, 3:])
    assert torch.equal(scales.from_sm100(scales.to_sm100(part), 5), part)


def test_scales_that_are_no_powers_of_two_are_refused_or_become_nan(quant_device: torch.device) -> None:
    scale = powers(3, 6).to(quant_device)
    scale[1, 4] = 0.75
    for pack, unpack in ((scales.pack_ue8m0, scales.unpack_ue8m0), (scales.to_sm100, scales.from_sm100)):
        with pytest.raises(ValueError, match=r"powers of two only, got 0.75 at \[1, 4\]"):
            pack(scale)
        back = unpack(pack(scale, check=False), 6)
        assert torch.equal(back.isnan(), scale == 0.75)
        assert torch.equal(back[scale != 0.75], scale[scale != 0.75])


def test_rows_of_weight_blocks() -> None:
    scale = torch.arange(8.0).reshape(1, 4, 2)  # 2 parts of 150 rows: blocks of 128 and 22
    rows = reference_scales.rows_of_128x128(scale, 300, parts=2)
    assert rows.shape == (1, 300, 2)
    assert rows[0, [0, 127, 128, 149, 150, 278, 299], 0].tolist() == [0, 0, 2, 2, 4, 6, 6]


def test_alignments() -> None:
    assert [layouts.aligned_rows(m) for m in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert [layouts.aligned_columns(k) for k in (16, 24)] == [16, 32]
    for layout in ("sm90", "sm100"):
        empty = layouts.empty_scales((2, 7, 5), layout, torch.device("cpu"))
        assert empty.stride(-2) == 1 and empty.stride(-1) * 4 % layouts.TMA_ALIGNMENT == 0
        assert empty.shape == (2, 7, 5 if layout == "sm90" else 2)


def test_rows_of_the_row_cast_fit_their_threads() -> None:
    assert row_shape(7168, torch.bfloat16, activated=False) == (128, 4, True)
    assert row_shape(2048, torch.bfloat16, activated=False) == (32, 4, True)
    assert row_shape(2048, torch.bfloat16, activated=True) == (128, 1, True)
    for columns in (8, 768, 2880, 14336, 28672, 65536, 70000):
        for element, activated, most in (
            (torch.bfloat16, False, 4),
            (torch.float32, False, 2),
            (torch.bfloat16, True, 1),
        ):
            threads, steps, one_read = row_shape(columns, element, activated=activated)
            assert threads <= 1024 and steps <= most
            assert one_read == (columns <= 1024 * most * 16)
            assert not one_read or threads * steps * 16 >= columns


def refused(scale: torch.Tensor, words: str, **kwargs: object) -> None:
    with pytest.raises(ValueError, match=words):
        layouts.check_scales(scale, rows=256, columns=512, **kwargs)  # type: ignore[arg-type]


def test_what_fits_passes() -> None:
    row = powers(256, 4)
    layouts.check_scales(row, rows=256, columns=512)
    layouts.check_scales(reference_scales.to_sm90(row), rows=256, columns=512, layout="sm90")
    layouts.check_scales(reference_scales.to_sm100(row), rows=256, columns=512, layout="sm100")
    layouts.check_scales(powers(3, 2, 4), rows=256, columns=512, granularity="128x128")
    layouts.check_scales(powers(256), rows=256, columns=512, granularity="row")
    for m, k in ((1, 128), (1, 512), (5, 128), (0, 128)):
        for layout in ("row", "sm90", "sm100"):
            _, scale = reference.cast_1x128(torch.randn(m, k), power_of_two=True, layout=layout)
            layouts.check_scales(scale, rows=m, columns=k, layout=layout)


def test_formats_of_the_other_generation_are_refused() -> None:
    row = powers(256, 4)
    refused(reference_scales.to_sm100(row), "packed UE8M0, the format of SM100: convert with from_sm100", layout="sm90")
    refused(row.to(torch.float8_e8m0fnu), r"UE8M0: convert with .float\(\)")
    refused(row.byte(), "UE8M0 codes: convert with formats.ue8m0_to_scale")
    refused(reference_scales.to_sm90(row), "the format of SM90: convert with to_sm100", layout="sm100")
    refused(row.bfloat16(), "must be fp32, got torch.bfloat16")


def test_wrong_layouts_are_refused() -> None:
    row = powers(256, 4)
    refused(row, "that is row-major: convert with to_sm90", layout="sm90")
    refused(reference_scales.pack_ue8m0(powers(256, 8)), "not packed|shape", layout="sm100")
    refused(reference_scales.to_sm90(row), "rows are adjacent, as in the sm90 layout: convert with from_sm90")
    unaligned = torch.empty(4, 258)[:, :256].t()
    refused(unaligned, "16-byte strides", layout="sm90")
    refused(torch.empty(4, 260)[:, 1:257].t(), "multiple of 16 bytes", layout="sm90")


def test_wrong_granularity_is_recognised() -> None:
    refused(powers(2, 4), "that is one scale per 128x128")
    refused(powers(256), "that is one scale per row")
    refused(powers(256, 1), "that is one scale per row")
    refused(powers(256, 16), "one scale per 1x32, as in MXFP4")
    refused(powers(4, 256), "that is transposed")
    refused(powers(256, 4), "one scale per 1x128", granularity="128x128")
    refused(powers(256, 4).int(), "not packed four to a word", layout="sm100")
    refused(powers(2, 4), "there is no sm90 layout", granularity="128x128", layout="sm90")
    with pytest.raises(ValueError, match="start anew at each of the 2 parts"):
        layouts.check_scales(powers(3, 4), rows=288, columns=512, granularity="128x128", parts=2)
