"""One weight matrix [N, K] as a checkpoint stores it, and conversions between the forms, exact wherever one exists.

| from \\ to | bf16 | fp8_block | fp8_row | mxfp4 | nvfp4 |
|---|---|---|---|---|---|
| the same form | the same bits | the same bits | | the same bits | the same bits |
| mxfp4 | exact | exact where a block's scales spread over at most 14 octaves | the same, of a row | | exact up to 17 |
| fp8_block with powers of two | exact | | exact up to 14 octaves | rounds | rounds |
| everything else | rounds | rounds | rounds | rounds | rounds |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from megamoe.kernels.quant import casts, mxfp4, nvfp4, reference
from megamoe.kernels.quant.formats import BLOCK, ue8m0_to_scale
from megamoe.prepared import PreparedRecipe

_NV_PER_MX = 2  # NVFP4 blocks of 16 in an MXFP4 block of 32
_E4M3_TOP, _E4M3_OCTAVES = 8, 17  # its powers of two run from 2^-9 to 2^8


@dataclass(frozen=True)
class Plain:
    """bf16, fp16 or fp32 [N, K]."""

    values: torch.Tensor

    def dequantise(self) -> torch.Tensor:
        """fp32 [N, K]."""
        return self.values.float()


@dataclass(frozen=True)
class BlockFp8:
    """e4m3 [N, K] with fp32 scales [ceil(N / 128), ceil(K / 128)]."""

    values: torch.Tensor
    scale: torch.Tensor

    def dequantise(self) -> torch.Tensor:
        """fp32 [N, K]."""
        return reference.dequantise_128x128(self.values, self.scale)


@dataclass(frozen=True)
class RowFp8:
    """e4m3 [N, K] with fp32 scales [N]."""

    values: torch.Tensor
    scale: torch.Tensor

    def dequantise(self) -> torch.Tensor:
        """fp32 [N, K]."""
        return reference.dequantise_row(self.values, self.scale)


@dataclass(frozen=True)
class Mxfp4:
    """Packed E2M1 uint8 [N, K / 2] with UE8M0 codes uint8 [N, ceil(K / 32)]."""

    values: torch.Tensor
    scale: torch.Tensor

    def dequantise(self) -> torch.Tensor:
        """fp32 [N, K]."""
        return mxfp4.dequantise_mxfp4(self.values, self.scale)


@dataclass(frozen=True)
class Nvfp4:
    """Packed E2M1 uint8 [N, K / 2] with e4m3 scales [N, ceil(K / 16)] and a global scale, scalar, fp32 or fp64."""

    values: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor

    def dequantise(self) -> torch.Tensor:
        """fp32 [N, K]."""
        return nvfp4.dequantise_nvfp4(self.values, self.scale, self.global_scale)


Form = Literal["bf16", "fp8_block", "mxfp4", "nvfp4"]
"""Forms that checkpoints store."""
Matrix = Plain | BlockFp8 | RowFp8 | Mxfp4 | Nvfp4


def moved(matrix: Matrix, device: torch.device) -> Matrix:
    """The same on another device."""
    return type(matrix)(*(tensor.to(device) for tensor in vars(matrix).values()))


def to_recipe(matrix: Matrix, recipe: PreparedRecipe, *, mxfp4_scales: mxfp4.ScaleChoice = "ceil") -> Matrix:
    """``matrix`` in the form whose values and scales ``PreparedWeights`` of ``recipe`` stacks."""
    if recipe == "bf16":
        return to_bf16(matrix)
    if recipe == "fp8_block":
        return to_fp8_block(matrix)
    if recipe == "fp8_row":
        return to_fp8_row(matrix)
    return to_mxfp4(matrix, scales=mxfp4_scales)


def to_bf16(matrix: Matrix) -> Plain:
    """Nearest bf16."""
    if isinstance(matrix, Plain):
        return Plain(matrix.values.to(torch.bfloat16))
    return Plain(matrix.dequantise().to(torch.bfloat16))


def to_fp8_block(matrix: Matrix) -> BlockFp8:
    """128x128 blocks; from a quantised form, blocks that a power-of-two scale holds exactly get one."""
    if isinstance(matrix, BlockFp8):
        return matrix
    w = matrix.dequantise()
    q, scale = casts.cast_128x128(w)
    if isinstance(matrix, Plain):
        return BlockFp8(q, scale)
    exact_q, exact_scale = casts.cast_128x128(w, power_of_two=True)
    differs = (reference.dequantise_128x128(exact_q, exact_scale) != w).float()
    exact = F.max_pool2d(differs[None, None], BLOCK, ceil_mode=True)[0, 0] == 0
    element = exact.repeat_interleave(BLOCK, 0)[: w.shape[0]].repeat_interleave(BLOCK, 1)[:, : w.shape[1]]
    return BlockFp8(_where_e4m3(element, exact_q, q), torch.where(exact, exact_scale, scale))


def to_fp8_row(matrix: Matrix) -> RowFp8:
    """One scale a row; from a quantised form, rows that a power-of-two scale holds exactly get one."""
    if isinstance(matrix, RowFp8):
        return matrix
    w = matrix.dequantise()
    q, scale = casts.cast_row(w)
    if isinstance(matrix, Plain):
        return RowFp8(q, scale)
    exact_q, exact_scale = casts.cast_row(w, power_of_two=True)
    exact = (reference.dequantise_row(exact_q, exact_scale) == w).all(-1)
    return RowFp8(_where_e4m3(exact.unsqueeze(-1), exact_q, q), torch.where(exact, exact_scale, scale))


def to_mxfp4(matrix: Matrix, *, scales: mxfp4.ScaleChoice = "ceil") -> Mxfp4:
    """E2M1 by 1x32; ``scales`` as in ``cast_mxfp4``. Numbers that are MXFP4 already come out unchanged."""
    return matrix if isinstance(matrix, Mxfp4) else Mxfp4(*mxfp4.cast_mxfp4(matrix.dequantise(), rounding=scales))


def to_nvfp4(matrices: list[Matrix]) -> list[Nvfp4]:
    """E2M1 by 1x16; matrices that are not NVFP4 yet share one global scale, as loaders want of gate and up."""
    kept = [matrix for matrix in matrices if isinstance(matrix, Nvfp4)]
    if len(kept) == len(matrices):
        return kept
    micro = [matrix for matrix in matrices if isinstance(matrix, Mxfp4)]
    if len(micro) == len(matrices) and (exact := _mxfp4_to_nvfp4(micro)):
        return exact
    values = [matrix.dequantise() for matrix in matrices]
    overall = nvfp4.nvfp4_global_scale(torch.stack([w.abs().amax() for w in values]).amax())
    return [Nvfp4(*nvfp4.cast_nvfp4(w, global_scale=overall)) for w in values]


def _mxfp4_to_nvfp4(matrices: list[Mxfp4]) -> list[Nvfp4] | None:
    """The same codes with the scales as powers of two in E4M3; None if they spread too far for that."""
    live = [torch.where(_empty_blocks(m), -1, m.scale.to(torch.int32)) for m in matrices]
    top = max(int(codes.max()) for codes in live)
    least = min((int(codes[codes >= 0].min()) for codes in live if (codes >= 0).any()), default=top)
    if top - _E4M3_TOP < 1 or top - least > _E4M3_OCTAVES:
        return None
    overall = ue8m0_to_scale(torch.tensor(top - _E4M3_TOP, dtype=torch.uint8, device=matrices[0].values.device))
    made = []
    for matrix, codes in zip(matrices, live, strict=True):
        exponent = torch.where(codes < 0, 0, codes - top + _E4M3_TOP)
        scale = ue8m0_to_scale((exponent + 127).to(torch.uint8)).to(torch.float8_e4m3fn)
        blocks = -(-matrix.values.shape[-1] * 2 // 16)
        spread = scale.view(torch.uint8).repeat_interleave(_NV_PER_MX, -1)[..., :blocks].contiguous()
        made.append(Nvfp4(matrix.values, spread.view(torch.float8_e4m3fn), overall))
    return made


def _empty_blocks(matrix: Mxfp4) -> torch.Tensor:
    """Bool [N, ceil(K / 32)]: blocks of zeros, whose scale says nothing."""
    rows, packed = matrix.values.shape
    pad = F.pad(matrix.values & 0x77, (0, matrix.scale.shape[1] * 16 - packed))
    return (pad.reshape(rows, -1, 16) == 0).all(-1)


def _where_e4m3(mask: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    chosen = torch.where(mask, a.view(torch.uint8), b.view(torch.uint8))
    return chosen.view(torch.float8_e4m3fn)
