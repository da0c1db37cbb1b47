"""gpt-oss: all experts of a layer in one tensor, MXFP4, rows of gate and up interleaved.

| tensor | shape |
|---|---|
| ``experts.gate_up_proj_blocks`` | uint8 [E, 2I, H / 32, 16], gate rows 0::2, up rows 1::2, low nibble = even k |
| ``experts.gate_up_proj_scales`` | uint8 [E, 2I, H / 32], UE8M0 codes (bias 127) |
| ``experts.gate_up_proj_bias`` | [E, 2I], interleaved likewise |
| ``experts.down_proj_blocks``, ``_scales``, ``_bias`` | [E, H, I / 32, 16], [E, H, I / 32], [E, H] |

Source: openai/gpt-oss on Hugging Face, and its reference implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe.kernels.quant.formats import MX_BLOCK
from megamoe.pretrained.encodings import check_finite
from megamoe.pretrained.files import TensorFiles
from megamoe.pretrained.matrix import Form, Matrix, Mxfp4

GPT_OSS = "gpt_oss"
_BYTES = MX_BLOCK // 2
_SUFFIXES = ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales")
_BIASES = ("gate_up_proj_bias", "down_proj_bias")

Biases = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def is_stacked(suffix: str) -> bool:
    """Whether ``experts.{suffix}`` is a tensor of this format."""
    return suffix in _SUFFIXES + _BIASES


@dataclass(frozen=True)
class GptOss:
    """The format; beside ``Encoding``, which stores one matrix under one stem."""

    name: str = GPT_OSS
    form: Form = "mxfp4"

    def stored(self, matrix: Matrix) -> Matrix:
        """What a reader gets back of ``matrix``: the same."""
        return matrix

    def needed(self, *, bias: bool) -> tuple[str, ...]:
        """Suffixes of the tensors that must be there."""
        return _SUFFIXES + (_BIASES if bias else ())

    def sizes(self, files: TensorFiles, prefix: str, num_experts: int) -> tuple[int, int]:
        """(H, I), once the shapes and dtypes of all four tensors are seen to fit one another."""
        down = files.info(f"{prefix}experts.down_proj_blocks")
        if len(down.shape) != 4:
            raise ValueError(f"{down} must have shape (E, H, I / 32, 16), got {down.shape}")
        hidden, inter = down.shape[1], down.shape[2] * MX_BLOCK
        if hidden % MX_BLOCK:
            raise ValueError(f"{down} says H = {hidden}, which must be a multiple of {MX_BLOCK}")
        for part, rows, columns in (("gate_up_proj", 2 * inter, hidden), ("down_proj", hidden, inter)):
            scales = (num_experts, rows, columns // MX_BLOCK)
            for suffix, shape in (("blocks", (*scales, _BYTES)), ("scales", scales)):
                info = files.info(f"{prefix}experts.{part}_{suffix}")
                if info.shape != shape or info.dtype != "U8":
                    raise ValueError(f"{info} must be U8 {shape} beside down_proj, got {info.dtype} {info.shape}")
        return hidden, inter

    def read(
        self, files: TensorFiles, prefix: str, expert: int, *, bias: bool
    ) -> tuple[tuple[Mxfp4, Mxfp4, Mxfp4], Biases | None]:
        """((gate, up, down), biases) of one expert; only its slices are read."""

        def matrix(part: str) -> Mxfp4:
            scale_name = f"{prefix}experts.{part}_scales"
            scale = check_finite(files.read(scale_name, expert), files.info(scale_name), ue8m0=True)
            return Mxfp4(files.read(f"{prefix}experts.{part}_blocks", expert).flatten(-2), scale)

        both, down = matrix("gate_up_proj"), matrix("down_proj")
        gate, up = (Mxfp4(both.values[k::2].contiguous(), both.scale[k::2].contiguous()) for k in (0, 1))
        if not bias:
            return (gate, up, down), None
        found = []
        for suffix, size in zip(_BIASES, (both.values.shape[0], down.values.shape[0]), strict=True):
            info = files.info(f"{prefix}experts.{suffix}")
            if info.shape[1:] != (size,) or info.shape[0] <= expert:
                raise ValueError(f"{info} must have shape (E, {size}), got {info.shape}")
            found.append(files.read(info.name, expert))
        return (gate, up, down), (found[0][0::2].contiguous(), found[0][1::2].contiguous(), found[1])

    def pack(
        self, prefix: str, experts: list[tuple[tuple[Matrix, Matrix, Matrix], Biases | None]]
    ) -> dict[str, torch.Tensor]:
        """Name -> tensor of all experts of a layer, from Mxfp4 matrices; ValueError unless columns are whole blocks."""
        stacks: dict[str, list[torch.Tensor]] = {suffix: [] for suffix in _SUFFIXES}
        for (gate, up, down), _ in experts:
            for part, matrices in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
                values, scales = [], []
                for matrix in matrices:
                    assert isinstance(matrix, Mxfp4)
                    rows, packed = matrix.values.shape
                    if packed % _BYTES:
                        raise ValueError(
                            f"{GPT_OSS} stores whole blocks of {MX_BLOCK} columns, got {2 * packed} columns"
                        )
                    values.append(matrix.values.reshape(rows, -1, _BYTES))
                    scales.append(matrix.scale)
                stacks[f"{part}_blocks"].append(_interleave(values))
                stacks[f"{part}_scales"].append(_interleave(scales))
        biases = [b for _, b in experts if b is not None]
        if biases:
            stacks["gate_up_proj_bias"] = [_interleave([gate_bias, up_bias]) for gate_bias, up_bias, _ in biases]
            stacks["down_proj_bias"] = [down_bias for _, _, down_bias in biases]
        return {f"{prefix}experts.{suffix}": torch.stack(tensors) for suffix, tensors in stacks.items()}


def _interleave(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Rows 0 of each, rows 1 of each, ..."""
    return torch.stack(tensors, 1).flatten(0, 1)
