"""Rows as bytes, so that all that belongs to one token crosses in one collective (and gloo knows no float8)."""

from __future__ import annotations

import torch

from megamoe.engines.saved import answer_bytes, compute_dtype, packet_bytes
from megamoe.problem import Problem


def pack(
    x: torch.Tensor, topk_weights: torch.Tensor, token_idx: torch.Tensor, topk_slot: torch.Tensor, problem: Problem
) -> torch.Tensor:
    """Rows [n, packet_bytes] uint8 of tokens ``token_idx`` [n] with local slots ``topk_slot`` [n, K], -1 = none."""
    rows = torch.zeros(len(token_idx), packet_bytes(problem), dtype=torch.uint8, device=x.device)
    x_part, weight_part, slot_part = _parts(rows, problem)
    x_part.copy_(x.index_select(0, token_idx))
    weight_part.copy_(topk_weights.index_select(0, token_idx))
    slot_part.copy_(topk_slot)
    return rows


def unpack(rows: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of packed rows: x [n, H], weights [n, K] fp32, local slots [n, K] int16."""
    return _parts(rows, problem)


def pack_answer(dx: torch.Tensor, dweights: torch.Tensor, problem: Problem) -> torch.Tensor:
    """dx [n, H] (any float dtype) and dweights [n, K] fp32 -> [n, answer_bytes] uint8."""
    rows = torch.zeros(len(dx), answer_bytes(problem), dtype=torch.uint8, device=dx.device)
    dx_part, weight_part = unpack_answer(rows, problem)
    dx_part.copy_(dx)
    weight_part.copy_(dweights)
    return rows


def unpack_answer(rows: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Views: dx [n, H], dweights [n, K] fp32."""
    dtype, K = compute_dtype(problem), problem.top_k
    at = problem.hidden * dtype.itemsize
    return rows[:, :at].view(dtype), rows[:, at : at + 4 * K].view(torch.float32)


def _parts(rows: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, K = compute_dtype(problem), problem.top_k
    at = problem.hidden * dtype.itemsize
    return (
        rows[:, :at].view(dtype),
        rows[:, at : at + 4 * K].view(torch.float32),
        rows[:, at + 4 * K : at + 6 * K].view(torch.int16),
    )
