"""What travels from forward to backward, in one layout for every engine, because torch.library wants it declared."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megamoe.engines.grouped import preact_dtype
from megamoe.problem import Problem

ENGINE_NAMES = ("reference", "staged", "mega")


class Saved(NamedTuple):
    """Tensors that ``backward`` needs beyond the call's inputs.

    - ``rows`` [N, ``packet_bytes``] uint8: the packets that crossed once (see ``packet``); N depends on the routing.
    - ``h13`` [M, w13_rows] ``grouped.preact_dtype``: pre-activations of the M routes that this rank's experts ran.
    - ``meta`` [2 + 2R] int64 on the CPU: engine, M, rows sent to each rank, rows received from each.
    """

    rows: torch.Tensor
    h13: torch.Tensor
    meta: torch.Tensor

    @staticmethod
    def make(
        engine: str,
        problem: Problem,
        device: torch.device,
        *,
        rows: torch.Tensor | None = None,
        h13: torch.Tensor | None = None,
        num_routes: int | None = None,
        send_rows: list[int] | None = None,
        recv_rows: list[int] | None = None,
    ) -> Saved:
        """From the parts; those an engine has no use for are empty. ``num_routes``: M, where h13 is not kept."""
        if rows is None:
            rows = torch.empty(0, packet_bytes(problem), dtype=torch.uint8, device=device)
        if h13 is None:
            h13 = torch.empty(0, problem.w13_rows, dtype=preact_dtype(device, compute_dtype(problem)), device=device)
        none = [0] * problem.world_size
        routes = h13.shape[0] if num_routes is None else num_routes
        meta = [ENGINE_NAMES.index(engine), routes, *(send_rows or none), *(recv_rows or none)]
        return Saved(rows, h13, torch.tensor(meta, device="cpu"))

    @property
    def engine(self) -> str:
        return ENGINE_NAMES[int(self.meta[0])]

    @property
    def num_routes(self) -> int:
        """M."""
        return int(self.meta[1])

    @property
    def send_rows(self) -> list[int]:
        return [int(n) for n in self.meta[2:].chunk(2)[0]]

    @property
    def recv_rows(self) -> list[int]:
        return [int(n) for n in self.meta[2:].chunk(2)[1]]


def compute_dtype(problem: Problem) -> torch.dtype:
    """dtype of x, y and the GEMMs' operands: fp32 for the recipe fp32, else bf16."""
    return torch.float32 if problem.recipe == "fp32" else torch.bfloat16


def packet_bytes(problem: Problem) -> int:
    """Bytes of one row that crosses: x [H], then K fp32 weights, then K int16 local slots; a multiple of 16."""
    return _round_up(problem.hidden * compute_dtype(problem).itemsize + problem.top_k * 6)


def answer_bytes(problem: Problem) -> int:
    """Bytes of one row that goes back in backward: dx [H], then K fp32 gradients of the top-k weights."""
    return _round_up(problem.hidden * compute_dtype(problem).itemsize + problem.top_k * 4)


def _round_up(size: int) -> int:
    return -(-size // 16) * 16
