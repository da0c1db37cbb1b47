"""The mega-kernels of a Problem, for ``python -m megamoe cache precompile``."""

from __future__ import annotations

from collections.abc import Iterable

from megamoe.kernels.jit.sweep import Case
from megamoe.mega.runner import config_for, why_not
from megamoe.problem import Problem

_NEEDS = {"bf16": ("HGMMA", "UTMALDG"), "fp8_block": ("QGMMA", "UTMALDG"), "fp8_row": ("QGMMA", "UTMALDG")}
# Bytes of spilled registers that a kernel may have, hardly more than the worst one has: those of warps that push rows,
# and of epilogues with a bias. Where in the code they are spilled is not checked.
SPILLS = {"bf16": 0, "fp8_block": 20, "fp8_row": 12}
_BIASED = {"bf16": 40, "fp8_block": 116, "fp8_row": 12}


def cases_for(problem: Problem, num_shared: int = 0, *, partial_sums: bool | None = None) -> Iterable[Case]:
    """One kernel for each type of index; none if the kernel can't do ``problem``. Experts are spread evenly.

    ``partial_sums``: as ``MegaRunner`` takes it.
    """
    slots = -(-problem.num_experts // problem.world_size)
    if why_not(problem, slots, num_shared) is not None:
        return
    for index_64 in (True, False):
        config = config_for(problem, slots, index_64=index_64, num_shared=num_shared, partial_sums=partial_sums)
        source = config.source()
        yield Case(source, needs=_NEEDS[problem.recipe], spills=(_BIASED if problem.bias else SPILLS)[problem.recipe])
