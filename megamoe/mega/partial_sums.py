"""Whether owners add up a token's rows before they send them back: the caller's choice, the environment's, or ours."""

from __future__ import annotations

from megamoe import costs, env
from megamoe.problem import Problem

_MEASURED_TO_PAY = False
"""On two H200s the variant takes 16 to 67% longer (docs/mega-kernel.md); more ranks have not been timed. Until times
say otherwise, it runs only where it is asked for."""
_SHARE = 0.6
"""Of the other floors: from there on rows on their way back are thought to hold up the GEMMs. A guess: the kernel sends
them while it multiplies, and the link, which carries rows of x and other ranks' results too, is never used whole."""
_LEAST_TOKENS = 256  # fewer: the meeting of all CTAs, some microseconds, is more than what it saves
_MOST_BYTES = 1 << 30  # for the rows that are kept


def partial_sums_pay(problem: Problem) -> bool:
    """Whether partial sums are likely to be faster for ``problem`` at its ``max_tokens``.

    Rates and floors are those of ``megamoe.costs`` (H200, uniform routing; H100 has the same link and tensor cores).
    """
    return _MEASURED_TO_PAY and would_pay(problem)


def would_pay(problem: Problem) -> bool:
    """The arithmetic of ``partial_sums_pay``, whether it has been measured or not.

    Example: qwen3 (H 2048, I 768, K 8) on 8 ranks with 4096 tokens in fp8_block: 28672 rows of 4 KiB a rank cross in
    321 us, and 0.6 of 221 us that the GEMMs take is less: True.
    """
    if problem.recipe == "fp32" or problem.world_size == 1 or problem.max_tokens < _LEAST_TOKENS:
        return False
    if kept_bytes(problem) > _MOST_BYTES or costs.remote_ranks(problem) >= costs.remote_routes(problem):
        return False
    tokens, gpu = problem.max_tokens, costs.H200
    back = tokens * costs.remote_routes(problem) * costs.out_row_bytes(problem) / (gpu.nvlink_gb_s * 1e3)
    floors = costs.floors(problem, tokens, gpu)
    return back > _SHARE * max(floors.memory_us, floors.compute_us)


def kept_bytes(problem: Problem) -> int:
    """Of the rows that a rank keeps at worst, without the padding of blocks: all tokens of all ranks to its experts.

    Example: H 2048, K 8, T 8192, R 2: 131072 rows of 4 KiB, 512 MiB.
    """
    return problem.world_size * problem.max_tokens * problem.top_k * problem.hidden * 2


def chosen(problem: Problem, asked: bool | None = None) -> bool:
    """What is ``asked`` for; if that is None what MEGAMOE_PARTIAL_SUMS says, and ``partial_sums_pay`` under "auto".

    Raises ValueError if ``asked`` is neither.
    """
    if isinstance(asked, bool):
        return asked
    if asked is not None:
        raise ValueError(f"partial_sums must be True, False or None, got {asked!r}")
    choice: str = env.get("MEGAMOE_PARTIAL_SUMS")
    return choice == "on" or (choice == "auto" and partial_sums_pay(problem))
