"""Casts to E4M3 in one pass over memory: CUDA kernels for CUDA tensors, the twins of ``reference.py`` for all others.

Arguments, results and errors are those of the twins (their docstrings say which), bit for bit but for activations,
whose exponentials differ in the last digits. In addition, on CUDA:

- x may have any strides that keep its last dimension dense and its rows 16-byte aligned: K must be a multiple of 8 in
  bf16, of 4 in fp32, and so must the stride between rows.
- q's rows start 16-byte aligned: where K is no multiple of 16, q is a view of rows of ``aligned_columns(K)`` bytes, the
  rest zeros, as tensor copies need it.
- All run on the current stream, read no size on the host, and can be captured in a CUDA graph once compiled.
"""

from __future__ import annotations

import torch

from megamoe.kernels.quant import reference
from megamoe.kernels.quant.formats import BLOCK, num_blocks
from megamoe.kernels.quant.launch import CastArgs, CastKernel, arch_of, launch, row_shape, runs_kernels
from megamoe.kernels.quant.layouts import TMA_ALIGNMENT, Layout, aligned_rows, empty_e4m3, empty_scales
from megamoe.kernels.quant.reference import ActivationLike, CastWithTranspose


def cast_1x128(
    x: torch.Tensor,
    *,
    activation: ActivationLike | None = None,
    row_weight: torch.Tensor | None = None,
    power_of_two: bool = False,
    layout: Layout = "row",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., M, K] -> (e4m3 [..., M, K], scale [..., M, ceil(K / 128)] in ``layout``); the twin says more."""
    if not runs_kernels(x):
        return reference.cast_1x128(
            x, activation=activation, row_weight=row_weight, power_of_two=power_of_two, layout=layout
        )
    reference.check_cast(x, activation, row_weight, power_of_two, layout)
    args, columns = _arguments(x, activation, row_weight)
    blocks = num_blocks(columns)
    q = empty_e4m3((*x.shape[:-1], columns), x.device)
    scale = empty_scales((*x.shape[:-1], blocks), layout, x.device)
    if q.numel():
        kernel = CastKernel(
            kind="1x128",
            element=x.dtype,
            activation=activation.name if activation else None,
            power_of_two=power_of_two,
            layout=layout,
            arch=arch_of(x.device),
        )
        groups = args.rows * blocks
        if groups >= 2**31:
            raise ValueError(f"one cast takes up to 2^31 blocks of 128 elements, got {groups}")
        args.q, args.ld_q, args.scale = q.data_ptr(), q.stride(-2), scale.data_ptr()
        args.matrix_rows, args.blocks, args.ld_scale = x.shape[-2], blocks, aligned_rows(x.shape[-2])
        launch(kernel, args, num_blocks(groups, kernel.groups_per_block), x.device)
    return q, scale


def cast_1x128_both(
    x: torch.Tensor,
    *,
    offsets: torch.Tensor | None = None,
    activation: ActivationLike | None = None,
    row_weight: torch.Tensor | None = None,
    power_of_two: bool = False,
    layout: Layout = "row",
) -> CastWithTranspose:
    """``cast_1x128`` of x [M, K] and of its transpose in one pass; the twin says more."""
    if not runs_kernels(x):
        return reference.cast_1x128_both(
            x, offsets=offsets, activation=activation, row_weight=row_weight, power_of_two=power_of_two, layout=layout
        )
    reference.check_cast(x, activation, row_weight, power_of_two, layout)
    reference.check_both(x, offsets)
    args, columns = _arguments(x, activation, row_weight)
    rows, blocks = x.shape[0], num_blocks(columns)
    groups = 0 if offsets is None else len(offsets) - 1
    blocks_t = num_blocks(rows) if offsets is None else rows // BLOCK + groups
    q, q_t = empty_e4m3((rows, columns), x.device), empty_e4m3((columns, rows), x.device)
    if offsets is not None:
        q_t = empty_e4m3((columns, blocks_t * BLOCK), x.device)
    scale = empty_scales((rows, blocks), layout, x.device)
    scale_t = empty_scales((columns, blocks_t), layout, x.device)
    if blocks_t:
        kernel = CastKernel(
            kind="both",
            element=x.dtype,
            activation=activation.name if activation else None,
            power_of_two=power_of_two,
            layout=layout,
            grouped=offsets is not None,
            arch=arch_of(x.device),
        )
        args.q, args.ld_q, args.q_t, args.ld_q_t = q.data_ptr(), q.stride(0), q_t.data_ptr(), q_t.stride(0)
        args.scale, args.blocks, args.ld_scale = scale.data_ptr(), blocks, aligned_rows(rows)
        args.scale_t, args.blocks_t, args.ld_scale_t = scale_t.data_ptr(), blocks_t, aligned_rows(columns)
        if offsets is not None:
            args.offsets, args.num_groups = offsets.data_ptr(), groups
        launch(kernel, args, (blocks, blocks_t, 1), x.device)
    return CastWithTranspose(q, scale, q_t, scale_t)


def cast_128x128(w: torch.Tensor, *, parts: int = 1, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """w [..., N, K] -> (e4m3 [..., N, K], fp32 scale per 128x128 block); the twin says more."""
    if not runs_kernels(w):
        return reference.cast_128x128(w, parts=parts, power_of_two=power_of_two)
    return _cast_128x128(w, parts, power_of_two, transposed=False)[:2]


def cast_128x128_both(w: torch.Tensor, *, parts: int = 1, power_of_two: bool = False) -> CastWithTranspose:
    """``cast_128x128`` and the same numbers transposed, in one pass; the twin says more."""
    if not runs_kernels(w):
        return reference.cast_128x128_both(w, parts=parts, power_of_two=power_of_two)
    return _cast_128x128(w, parts, power_of_two, transposed=True)


def cast_row(
    x: torch.Tensor,
    *,
    activation: ActivationLike | None = None,
    row_weight: torch.Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., M, K] -> (e4m3 [..., M, K], fp32 scale [..., M]); the twin says more."""
    if not runs_kernels(x):
        return reference.cast_row(x, activation=activation, row_weight=row_weight, power_of_two=power_of_two)
    reference.check_cast(x, activation, row_weight, power_of_two, "row")
    args, columns = _arguments(x, activation, row_weight)
    q = empty_e4m3((*x.shape[:-1], columns), x.device)
    scale = empty_scales(tuple(x.shape[:-1]), "row", x.device)
    if q.numel():
        row_threads, steps, one_read = row_shape(columns, x.dtype, activated=activation is not None)
        kernel = CastKernel(
            kind="row",
            element=x.dtype,
            activation=activation.name if activation else None,
            power_of_two=power_of_two,
            row_threads=row_threads,
            steps=steps,
            one_read=one_read,
            arch=arch_of(x.device),
        )
        args.q, args.ld_q, args.scale = q.data_ptr(), q.stride(-2), scale.data_ptr()
        launch(kernel, args, num_blocks(args.rows, kernel.rows_per_block), x.device)
    return q, scale


def _cast_128x128(w: torch.Tensor, parts: int, power_of_two: bool, *, transposed: bool) -> CastWithTranspose:
    reference.check_weight(w, parts, transposed=transposed)
    args, columns = _arguments(w, None, None)
    rows = w.shape[-2] // parts
    row_blocks, blocks = num_blocks(rows), num_blocks(columns)
    batch = tuple(w.shape[:-2])
    q = empty_e4m3(tuple(w.shape), w.device)
    scale = empty_scales((*batch, parts * row_blocks, blocks), "row", w.device)
    q_t, scale_t = q, scale  # unused unless transposed
    if transposed:
        q_t = empty_e4m3((*batch, columns, w.shape[-2]), w.device)
        scale_t = empty_scales((*batch, blocks, parts * row_blocks), "row", w.device)
    if q.numel():
        kernel = CastKernel(
            kind="128x128",
            element=w.dtype,
            power_of_two=power_of_two,
            transposed=transposed,
            arch=arch_of(w.device),
        )
        args.q, args.ld_q, args.q_t, args.ld_q_t = q.data_ptr(), q.stride(-2), q_t.data_ptr(), q_t.stride(-2)
        args.scale, args.scale_t, args.rows, args.parts = scale.data_ptr(), scale_t.data_ptr(), rows, parts
        launch(kernel, args, (blocks, row_blocks, q.numel() // (rows * columns)), w.device)
    return CastWithTranspose(q, scale, q_t, scale_t)


def _arguments(
    x: torch.Tensor, activation: ActivationLike | None, row_weight: torch.Tensor | None
) -> tuple[CastArgs, int]:
    """The arguments that describe x, and the columns of what is cast."""
    columns = x.shape[-1] // 2 if activation is not None and activation.gated else x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    per_16_bytes = TMA_ALIGNMENT // x.element_size()
    stride = rows.stride(0) if len(rows) > 1 else rows.shape[1]
    if rows.stride(1) != 1 or stride % per_16_bytes or columns % per_16_bytes or rows.data_ptr() % TMA_ALIGNMENT:
        raise ValueError(
            f"on CUDA a cast reads {TMA_ALIGNMENT} bytes at a time: {x.dtype} needs columns ({columns} here) and row "
            f"strides in multiples of {per_16_bytes}, dense rows and an aligned address, got strides {x.stride()} at "
            f"address 0x{rows.data_ptr():x}"
        )
    args = CastArgs(x=rows.data_ptr(), ld_x=stride, rows=len(rows), columns=columns)
    if activation is not None:
        args.limit, args.alpha = activation.limit, activation.alpha
    args.keep = (rows,)
    if row_weight is not None:
        row_weight = row_weight.contiguous()
        args.row_weight, args.keep = row_weight.data_ptr(), (rows, row_weight)
    return args, columns
