"""How one matrix [N, K] lies in tensors whose names share a stem, ``...experts.7.gate_proj.``: names, dtypes, shapes.

Sources: ``weight_scale_inv``, DeepSeek-V3's and Qwen3's FP8 checkpoints (w = q * scale_inv); int8 with ``scale`` E8M0,
DeepSeek-V4; ``weight_scale_2``, NVIDIA ModelOpt; ``weight_packed`` and reciprocal ``weight_global_scale``,
compressed-tensors (nvfp4-pack-quantized, mxfp4-pack-quantized).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megamoe.kernels.quant.formats import BLOCK, MX_BLOCK, NV_BLOCK, num_blocks
from megamoe.pretrained.files import TensorFiles, TensorInfo
from megamoe.pretrained.matrix import BlockFp8, Form, Matrix, Mxfp4, Nvfp4, Plain

Shape = Callable[[int, int], tuple[tuple[int, ...], ...]]
"""(N, K) -> the shapes a tensor may have."""


@dataclass(frozen=True)
class Field:
    """One tensor of a matrix."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: Shape
    ue8m0: bool = False
    """Whether bytes are codes of UE8M0, of which 255 is NaN."""


@dataclass(frozen=True)
class Encoding:
    """One way to store a matrix. ``fields[0]`` holds the values, ``packing`` of them to an element of its last axis.

    ``decode`` and ``encode`` take and give tensors in the order of ``fields``, ``encode`` from a matrix of ``form``.
    ``passed_over``: suffixes that may stand beside them and say nothing about weights.
    """

    name: str
    form: Form
    fields: tuple[Field, ...]
    decode: Callable[[list[torch.Tensor]], Matrix]
    encode: Callable[[Matrix], list[torch.Tensor]]
    packing: int = 1
    passed_over: tuple[str, ...] = ()

    def suffixes(self) -> set[str]:
        """Of the tensors that must be there."""
        return {field.suffix for field in self.fields}

    def shape(self, files: TensorFiles, stem: str) -> tuple[int, int]:
        """(N, K), from the header. Raises ValueError if the values are not of this encoding."""
        info = files.info(stem + self.fields[0].suffix)
        _check_dtype(info, self.fields[0], self.name)
        if len(info.shape) != 2:
            raise ValueError(f"{info} must be a matrix, got shape {info.shape}")
        return info.shape[0], info.shape[1] * self.packing

    def read(self, files: TensorFiles, stem: str) -> Matrix:
        """The matrix, checked: dtypes, shapes, nothing that is not a finite number."""
        rows, columns = self.shape(files, stem)
        tensors = []
        for field in self.fields:
            info = files.info(stem + field.suffix)
            _check_dtype(info, field, self.name)
            allowed = field.shapes(rows, columns)
            if info.shape not in allowed:
                raise ValueError(
                    f"{info} must have shape {' or '.join(map(str, allowed))} for a matrix of {rows} x {columns} "
                    f"({self.name}), got {info.shape}"
                )
            tensors.append(check_finite(files.read(info.name), info, ue8m0=field.ue8m0))
            if field.shapes is _scalar and not bool((tensors[-1] > 0).all()):
                raise ValueError(f"{info} must be greater than 0, got {float(tensors[-1])}")
        return self.decode(tensors)

    def stored(self, matrix: Matrix) -> Matrix:
        """What a reader gets back of ``matrix``: a global scale may round once more on its way into a file."""
        return self.decode(self.encode(matrix))

    def write(self, matrix: Matrix, stem: str) -> dict[str, torch.Tensor]:
        """Name -> tensor."""
        return {stem + field.suffix: tensor for field, tensor in zip(self.fields, self.encode(matrix), strict=True)}


def check_finite(tensor: torch.Tensor, info: TensorInfo, *, ue8m0: bool = False) -> torch.Tensor:
    """``tensor`` itself; ValueError if it holds NaN or infinity. ``ue8m0``: its bytes are codes of UE8M0."""
    if ue8m0:
        bad = tensor.view(torch.uint8) == 0xFF
    elif tensor.dtype == torch.float8_e4m3fn:
        bad = (tensor.view(torch.uint8) & 0x7F) == 0x7F
    elif tensor.is_floating_point():
        bad = ~tensor.isfinite()
    else:
        return tensor
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{info} holds NaN or infinity, first at {at}: weights must be finite")
    return tensor


def _check_dtype(info: TensorInfo, field: Field, encoding: str) -> None:
    if info.dtype not in field.dtypes:
        raise ValueError(f"{info} must be {' or '.join(field.dtypes)} in format {encoding}, got {info.dtype}")


def _whole(rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    return ((rows, columns),)


def _by(block: int) -> Shape:
    return lambda rows, columns: ((rows, num_blocks(columns, block)),)


_packed: Shape = lambda rows, columns: ((rows, columns // 2),)  # noqa: E731
_blocks: Shape = lambda rows, columns: ((num_blocks(rows, BLOCK), num_blocks(columns, BLOCK)),)  # noqa: E731
_scalar: Shape = lambda rows, columns: ((), (1,))  # noqa: E731


def _decode_bf16(tensors: list[torch.Tensor]) -> Matrix:
    return Plain(tensors[0])


def _encode_bf16(matrix: Matrix) -> list[torch.Tensor]:
    assert isinstance(matrix, Plain)
    return [matrix.values]


def _decode_fp8(tensors: list[torch.Tensor]) -> Matrix:
    return BlockFp8(tensors[0], tensors[1].float())


def _encode_fp8(matrix: Matrix) -> list[torch.Tensor]:
    assert isinstance(matrix, BlockFp8)
    return [matrix.values, matrix.scale]


def _decode_deepseek_v4(tensors: list[torch.Tensor]) -> Matrix:
    return Mxfp4(tensors[0].view(torch.uint8), tensors[1].view(torch.uint8))


def _encode_deepseek_v4(matrix: Matrix) -> list[torch.Tensor]:
    assert isinstance(matrix, Mxfp4)
    return [matrix.values.view(torch.int8), matrix.scale.view(torch.float8_e8m0fnu)]


def _decode_modelopt(tensors: list[torch.Tensor]) -> Matrix:
    return Nvfp4(tensors[0], tensors[1], tensors[2].reshape(()))


def _encode_modelopt(matrix: Matrix) -> list[torch.Tensor]:
    assert isinstance(matrix, Nvfp4)
    return [matrix.values, matrix.scale, matrix.global_scale.float()]


def _decode_compressed_nvfp4(tensors: list[torch.Tensor]) -> Matrix:
    # In fp64 a reciprocal of a reciprocal gives the fp32 number back.
    return Nvfp4(tensors[0], tensors[1], tensors[2].reshape(()).double().reciprocal())


def _encode_compressed_nvfp4(matrix: Matrix) -> list[torch.Tensor]:
    assert isinstance(matrix, Nvfp4)
    return [matrix.values, matrix.scale, matrix.global_scale.double().reciprocal().float().reshape(1)]


def _decode_compressed_mxfp4(tensors: list[torch.Tensor]) -> Matrix:
    return Mxfp4(tensors[0], tensors[1].view(torch.uint8))


def _encode_compressed_mxfp4(matrix: Matrix) -> list[torch.Tensor]:
    assert isinstance(matrix, Mxfp4)
    return [matrix.values, matrix.scale]


_E4M3_BY_16 = ("weight_scale", ("F8_E4M3",), _by(NV_BLOCK))
ENCODINGS = (
    Encoding("bf16", "bf16", (Field("weight", ("BF16", "F16", "F32"), _whole),), _decode_bf16, _encode_bf16),
    Encoding(
        "fp8_block",
        "fp8_block",
        (Field("weight", ("F8_E4M3",), _whole), Field("weight_scale_inv", ("F32", "BF16", "F16"), _blocks)),
        _decode_fp8,
        _encode_fp8,
    ),
    Encoding(
        "deepseek_v4",
        "mxfp4",
        (Field("weight", ("I8",), _packed), Field("scale", ("F8_E8M0",), _by(MX_BLOCK), ue8m0=True)),
        _decode_deepseek_v4,
        _encode_deepseek_v4,
        packing=2,
    ),
    Encoding(
        "modelopt_nvfp4",
        "nvfp4",
        (Field("weight", ("U8",), _packed), Field(*_E4M3_BY_16), Field("weight_scale_2", ("F32",), _scalar)),
        _decode_modelopt,
        _encode_modelopt,
        packing=2,
        passed_over=("input_scale",),
    ),
    Encoding(
        "compressed_nvfp4",
        "nvfp4",
        (
            Field("weight_packed", ("U8",), _packed),
            Field(*_E4M3_BY_16),
            Field("weight_global_scale", ("F32",), _scalar),
        ),
        _decode_compressed_nvfp4,
        _encode_compressed_nvfp4,
        packing=2,
        passed_over=("input_global_scale",),
    ),
    Encoding(
        "compressed_mxfp4",
        "mxfp4",
        (Field("weight_packed", ("U8",), _packed), Field("weight_scale", ("U8", "F8_E8M0"), _by(MX_BLOCK), ue8m0=True)),
        _decode_compressed_mxfp4,
        _encode_compressed_mxfp4,
        packing=2,
    ),
)
"""All encodings with one stem a matrix; the first whose suffixes are the ones found is meant."""
