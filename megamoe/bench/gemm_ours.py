"""This project's GEMMs as ``megamoe bench gemm`` runs them: what a case asks of the heuristics, and the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megamoe.bench.gemm_cases import Case, Data, spread
from megamoe.kernels.gemm import api
from megamoe.kernels.gemm.checks import Layout
from megamoe.kernels.gemm.config import GemmConfig, Scaling
from megamoe.kernels.gemm.heuristics import GemmDesc, candidates, choose, microseconds
from megamoe.kernels.gemm.knobs import knobs
from megamoe.kernels.gemm.launch import num_sms
from megamoe.kernels.quant import scales

_SCALING = {"bf16": Scaling.NONE, "fp8_block": Scaling.BLOCK, "fp8_row": Scaling.ROW}
HOPPER_SMS = 132  # of an H100 SXM or H200


@dataclass(frozen=True)
class Contender:
    """``call`` queues the product and returns D; ``valid`` picks the valid rows of D, in the order of ``Data.a``."""

    call: Callable[[], torch.Tensor]
    valid: Callable[[torch.Tensor], torch.Tensor] = lambda d: d


Build = Callable[[Data], Contender]


def desc_of(case: Case, *, sms: int = HOPPER_SMS) -> GemmDesc:
    """What ``ours`` asks the heuristics for, on a GPU of so many multiprocessors."""
    scaling = _SCALING[case.recipe]
    if case.grouping == "k":
        direct = case.recipe == "bf16"
        rows = case.m if direct else sum(-(-count // 128) * 128 for count in case.counts)
        return GemmDesc(
            scaling=scaling if direct else Scaling.VECTOR,
            grouping="k",
            m=case.n,
            n=case.k,
            k=max(1, rows // case.groups),
            groups=case.groups,
            out="bf16" if case.out == torch.bfloat16 else "f32",
            a_major="mn" if direct else "k",
            b_major="mn" if direct else "k",
            num_sms=sms,
        )
    return GemmDesc(
        scaling=scaling,
        grouping=case.grouping,
        m=case.groups * case.expected if case.grouping == "masked" else case.m,
        n=case.n,
        k=case.k,
        groups=case.groups,
        a_major="mn" if case.layout[0] == "t" else "k",
        b_major="mn" if case.layout[1] == "n" else "k",
        num_sms=sms,
    )


def chosen(data: Data) -> GemmConfig:
    """The kernel that ``ours`` runs."""
    device = data.a.device
    return choose(desc_of(data.case, sms=num_sms(device.index or 0) if device.type == "cuda" else HOPPER_SMS))


def likely(case: Case, count: int, *, sms: int = HOPPER_SMS) -> list[GemmConfig]:
    """The ``count`` candidates with the least predicted time, best first."""
    desc = desc_of(case, sms=sms)
    return sorted(candidates(desc), key=lambda config: (microseconds(desc, config), config.name))[:count]


def with_config(contender: Contender, config: GemmConfig) -> Contender:
    """``contender``, one of ours, run with ``config`` instead of the heuristics' choice."""

    def call() -> torch.Tensor:
        with knobs(config=config):
            return contender.call()

    return Contender(call, contender.valid)


def ours(data: Data) -> Contender:
    """This project's kernel."""
    case, a, b, sb = data.case, data.a, data.b, data.b_scale
    if case.grouping == "k":
        return _ours_by_k(data)
    if case.grouping == "masked":
        places = data.places([g * case.most for g in range(case.groups)])
        total = case.groups * case.most
        a = spread(a, places, total).view(case.groups, case.most, case.k)
        sa = columns(None if data.a_scale is None else spread(data.a_scale, places, total))
        if sa is not None and sa.dim() == 1:
            sa = sa.view(case.groups, case.most)
        counts = torch.tensor(case.counts, dtype=torch.int32, device=a.device)
        out = out_like(a, case.groups, case.most, case.n)
        return Contender(
            lambda: api.masked_gemm(a, b, counts, a_scale=sa, b_scale=sb, out=out, expected_rows=case.expected),
            lambda d: d.view(total, -1)[places],
        )
    sa, out = columns(data.a_scale), out_like(a, a.shape[0], case.n)
    if case.grouping == "dense":
        return Contender(lambda: api.gemm(a, b, a_scale=sa, b_scale=sb, out=out))
    offsets = data.offsets
    return Contender(lambda: api.grouped_gemm(a, b, offsets, a_scale=sa, b_scale=sb, out=out))


def _ours_by_k(data: Data) -> Contender:
    case, a, b, bounds = data.case, data.a, data.b, data.bounds
    sa, sb = columns(data.a_scale), columns(data.b_scale)
    out = torch.empty(case.groups, case.n, case.k, dtype=case.out, device=a.device)
    layout: Layout = "tn" if sa is None else "nt"
    return Contender(lambda: api.k_grouped_gemm(a, b, bounds, layout=layout, a_scale=sa, b_scale=sb, out=out))


def columns(scale: torch.Tensor | None) -> torch.Tensor | None:
    """Scales of A as Hopper's kernels take them: adjacent rows; those per row stay."""
    return scale if scale is None or scale.dim() == 1 else scales.to_sm90(scale)


def out_like(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=like.device)
