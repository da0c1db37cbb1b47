"""``PreparedWeights``: one rank's experts as a recipe's GEMMs read them, quantised once.

| recipe | ``w13`` | ``w13_scale`` |
|---|---|---|
| bf16 | bf16 [S, 2I, H] | None |
| fp8_block | e4m3 [S, 2I, H] | fp32 [S, 2 * ceil(I / 128), ceil(H / 128)] |
| fp8_row | e4m3 [S, 2I, H] | fp32 [S, 2I] |
| mxfp4 | uint8 [S, 2I, H / 2] | uint8 [S, 2I, ceil(H / 32)] |

``w2`` [S, H, I] and ``w2_scale`` are the same with one part: fp8_block [S, ceil(H / 128), ceil(I / 128)], and so on.
2 becomes 1 where the activation is not gated. w13 holds gate rows first, then up rows, and its 128x128 blocks restart
at the boundary between them. MXFP4 packs two E2M1 to a byte, low nibble = even k; scales are UE8M0 codes (bias 127).
A weight is value * scale. Rows of e4m3 start 16-byte aligned on CUDA (``kernels.quant.layouts.empty_e4m3``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from megamoe.kernels.quant import casts, mxfp4, reference
from megamoe.kernels.quant.formats import MX_BLOCK, num_blocks
from megamoe.kernels.quant.layouts import empty_e4m3, scale_shape
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights

PreparedRecipe = Literal["bf16", "fp8_block", "fp8_row", "mxfp4"]
"""Recipes whose weights are stored in a form of their own; fp32 computes with ``ExpertWeights`` themselves."""

_VALUES = {
    "bf16": torch.bfloat16,
    "fp8_block": torch.float8_e4m3fn,
    "fp8_row": torch.float8_e4m3fn,
    "mxfp4": torch.uint8,
}


def quantise_weight(
    w: torch.Tensor, recipe: PreparedRecipe, *, parts: int = 1, mxfp4_scales: mxfp4.ScaleChoice = "ceil"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """fp32 or bf16 [..., N, K] -> (values, scales) as in the table above; kernels for CUDA tensors, twins for others.

    Args:
        parts: 2 for a gated w13: N is gate rows, then up rows, and 128x128 blocks restart between them.
        mxfp4_scales: how MXFP4 scales are chosen, see ``kernels.quant.mxfp4.cast_mxfp4``.

    Raises:
        ValueError: MXFP4 of numbers that are not finite.
    """
    _check_recipe(recipe)
    if recipe == "bf16":
        return w.to(torch.bfloat16), None
    if recipe == "fp8_block":
        return casts.cast_128x128(w, parts=parts)
    if recipe == "fp8_row":
        return casts.cast_row(w)
    return mxfp4.cast_mxfp4(w, rounding=mxfp4_scales)


def dequantise_weight(
    values: torch.Tensor, scale: torch.Tensor | None, recipe: PreparedRecipe, *, parts: int = 1
) -> torch.Tensor:
    """Inverse of ``quantise_weight`` up to rounding: fp32 [..., N, K]."""
    _check_recipe(recipe)
    if scale is None:
        return values.float()
    if recipe == "fp8_block":
        return reference.dequantise_128x128(values, scale, parts=parts)
    if recipe == "fp8_row":
        return reference.dequantise_row(values, scale)
    return mxfp4.dequantise_mxfp4(values, scale)


@dataclass(frozen=True, kw_only=True)
class PreparedWeights:
    """One rank's experts in the form of ``recipe``; see the table at the top of this file for shapes and dtypes.

    ``b13`` fp32 [S, 2I] and ``b2`` fp32 [S, H], or None. S is the number of local expert slots. A tensor that does not
    fit the others is refused on construction, so that whoever holds one of these need not look again.

    Raises:
        ValueError: a shape, dtype or device that does not fit, with got and expected.
    """

    recipe: PreparedRecipe
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check_recipe(self.recipe)
        for name in ("w13", "w2"):
            tensor: torch.Tensor = getattr(self, name)
            if tensor.dim() != 3 or tensor.dtype != _VALUES[self.recipe]:
                raise ValueError(
                    f"{name} of recipe {self.recipe} must be {_VALUES[self.recipe]} with 3 dimensions, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
        slots, rows, hidden, inter = self.num_slots, self.w13.shape[1], self.hidden, self.intermediate
        if self.w2.shape[:2] != (slots, hidden):
            raise ValueError(f"w2 must have shape ({slots}, {hidden}, ...) to fit w13, got {tuple(self.w2.shape)}")
        if inter == 0 or rows not in (inter, 2 * inter):
            raise ValueError(f"w13 must have I or 2I rows for the I = {inter} columns of w2, got {rows}")
        self._check_scale("w13_scale", rows, hidden, self.parts)
        self._check_scale("w2_scale", hidden, inter, 1)
        if (self.b13 is None) != (self.b2 is None):
            raise ValueError("b13 and b2 must be given together or not at all, got one of them")
        if self.b13 is not None and self.b2 is not None:
            _check_tensor("b13", self.b13, torch.float32, (slots, rows), self.device)
            _check_tensor("b2", self.b2, torch.float32, (slots, hidden), self.device)
        if self.w2.device != self.device:
            raise ValueError(f"w2 must be on {self.device} like w13, got {self.w2.device}")

    @property
    def num_slots(self) -> int:
        """S."""
        return int(self.w13.shape[0])

    @property
    def hidden(self) -> int:
        """H."""
        return int(self.w13.shape[2]) * self._packing

    @property
    def intermediate(self) -> int:
        """I."""
        return int(self.w2.shape[2]) * self._packing

    @property
    def parts(self) -> int:
        """Matrices stacked in w13: 2 (gate, up), or 1 where the activation is not gated."""
        return int(self.w13.shape[1]) // self.intermediate

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.w13.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, padding of e4m3 rows not counted."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def _packing(self) -> int:
        return 2 if self.recipe == "mxfp4" else 1

    @staticmethod
    def from_float(
        weights: ExpertWeights, problem: Problem, *, mxfp4_scales: mxfp4.ScaleChoice = "ceil"
    ) -> PreparedWeights:
        """Quantise ``weights`` (fp32 or bf16) to ``problem.recipe``, where they are, one expert at a time.

        The numbers are those of the engine ``reference`` (``engines.recipes.round_weight``) unless ``mxfp4_scales``
        asks for others.

        Raises:
            ValueError: weights that do not fit ``problem``; recipe fp32; MXFP4 of numbers that are not finite.
        """
        weights.check(problem, len(weights.w13))
        recipe = checked_recipe(problem.recipe)
        parts = 2 if problem.activation.gated else 1
        made: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, stack, stacked in (("w13", weights.w13, parts), ("w2", weights.w2, 1)):
                values = empty_values((len(stack), *stack.shape[1:]), recipe, stack.device)
                shape = weight_scale_shape(stack.shape[1], stack.shape[2], recipe, parts=stacked)
                scale = None if shape is None else empty_scale((len(stack), *shape), recipe, stack.device)
                for slot, w in enumerate(stack.detach()):
                    v, s = quantise_weight(w.contiguous(), recipe, parts=stacked, mxfp4_scales=mxfp4_scales)
                    values[slot].copy_(v)
                    if scale is not None and s is not None:
                        scale[slot].copy_(s)
                made[name] = values
                if scale is not None:
                    made[f"{name}_scale"] = scale
            for name in ("b13", "b2"):
                bias = getattr(weights, name)
                if bias is not None:
                    made[name] = bias.detach().float()
        return PreparedWeights(recipe=recipe, **made)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> ExpertWeights:
        """The numbers that the GEMMs multiply, in ``dtype`` (fp32 holds them exactly)."""

        def matrices(values: torch.Tensor, scale: torch.Tensor | None, parts: int) -> torch.Tensor:
            out = torch.empty(*values.shape[:2], values.shape[2] * self._packing, dtype=dtype, device=self.device)
            for slot in range(self.num_slots):
                one = None if scale is None else scale[slot]
                out[slot].copy_(dequantise_weight(values[slot], one, self.recipe, parts=parts))
            return out

        w13, w2 = matrices(self.w13, self.w13_scale, self.parts), matrices(self.w2, self.w2_scale, 1)
        biases = [None if b is None else b.to(dtype) for b in (self.b13, self.b2)]
        return ExpertWeights(w13, w2, *biases)

    def check(self, problem: Problem, num_slots: int) -> None:
        """Raise ValueError with got and expected unless these are ``num_slots`` experts of ``problem``."""
        parts = 2 if problem.activation.gated else 1
        for name, got, expected in (
            ("recipe", self.recipe, problem.recipe),
            ("number of experts", self.num_slots, num_slots),
            ("hidden", self.hidden, problem.hidden),
            ("intermediate", self.intermediate, problem.intermediate),
            ("matrices stacked in w13", self.parts, parts),
            ("bias", self.b13 is not None, problem.bias),
        ):
            if got != expected:
                raise ValueError(f"prepared weights must have {name} {expected} as the problem says, got {got}")

    def to(self, device: torch.device | str) -> PreparedWeights:
        """The same on another device; itself if already there."""
        return self if torch.device(device) == self.device else self._map(lambda t: _moved(t, torch.device(device)))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of all that are not None."""
        names = ("w13", "w13_scale", "w2", "w2_scale", "b13", "b2")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PreparedWeights:
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        return PreparedWeights(recipe=self.recipe, **changed)

    def _check_scale(self, name: str, rows: int, columns: int, parts: int) -> None:
        scale: torch.Tensor | None = getattr(self, name)
        shape = weight_scale_shape(rows, columns, self.recipe, parts=parts)
        if shape is None:
            if scale is not None:
                raise ValueError(f"recipe {self.recipe} has no scales, got {name} {tuple(scale.shape)}")
            return
        if scale is None:
            raise ValueError(f"recipe {self.recipe} needs {name} {(self.num_slots, *shape)}, got None")
        _check_tensor(name, scale, _scale_dtype(self.recipe), (self.num_slots, *shape), self.device)


def checked_recipe(recipe: str) -> PreparedRecipe:
    """``recipe`` itself; ValueError unless weights can be prepared for it."""
    _check_recipe(recipe)
    return recipe  # type: ignore[return-value]


def weight_scale_shape(rows: int, columns: int, recipe: PreparedRecipe, *, parts: int = 1) -> tuple[int, ...] | None:
    """Shape of the scales of one [rows, columns] weight; None if the recipe has none."""
    if recipe == "bf16":
        return None
    if recipe == "mxfp4":
        return rows, num_blocks(columns, MX_BLOCK)
    return scale_shape(rows, columns, "row" if recipe == "fp8_row" else "128x128", parts=parts)


def empty_values(shape: tuple[int, ...], recipe: PreparedRecipe, device: torch.device) -> torch.Tensor:
    """Uninitialised values of weights [..., N, K], as the table at the top says."""
    if _VALUES[recipe] == torch.float8_e4m3fn and device.type == "cuda":
        return empty_e4m3(shape, device)
    columns = shape[-1] // 2 if recipe == "mxfp4" else shape[-1]
    return torch.empty(*shape[:-1], columns, dtype=_VALUES[recipe], device=device)


def empty_scale(shape: tuple[int, ...], recipe: PreparedRecipe, device: torch.device) -> torch.Tensor:
    """Uninitialised scales of shape [..., *weight_scale_shape]."""
    return torch.empty(shape, dtype=_scale_dtype(recipe), device=device)


def _scale_dtype(recipe: PreparedRecipe) -> torch.dtype:
    return torch.uint8 if recipe == "mxfp4" else torch.float32


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.dtype == torch.float8_e4m3fn and device.type == "cuda":
        return empty_e4m3(tuple(tensor.shape), device).copy_(tensor)
    return tensor.to(device)


def _check_recipe(recipe: str) -> None:
    if recipe not in get_args(PreparedRecipe):
        raise ValueError(f"weights are prepared for {', '.join(get_args(PreparedRecipe))}, got recipe {recipe!r}")


def _check_tensor(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device != device:
        raise ValueError(
            f"{name} must be {dtype} {shape} on {device}, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
