"""``megamoe bench gemm``: our GEMMs beside torch's and DeepGEMM's, on the same data, in one process, with cold L2.

Each row: ``recipe``, ``grouping``, ``groups``, ``rows`` (of A, or the mean of a group), ``m`` (valid rows), ``n``,
``k``, ``layout`` if it is not nt, ``us``, ``us_min``, ``tflops`` and ``gbps`` (of valid rows), ``floor_us`` (the
larger of bytes and operations at an H200's rates in ``megamoe/costs.py``), ``diff`` to the fp32 product of the
dequantised operands, ``config``, ``peers`` {name: us} and ``ratios`` (peer / ours). Beyond d = 1e-5 a case is no row
but a failure. With ``--tries`` also ``tried``: {config: us} of other configurations, each held to the same product.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from importlib import metadata
from pathlib import Path

import torch

from megamoe import costs
from megamoe.bench import gemm_report
from megamoe.bench.gemm_cases import DENSE_M, DENSE_NK, GROUPINGS, LAYOUTS, RECIPES, Case, Spec, cases, make, product
from megamoe.bench.gemm_ours import Contender, chosen, desc_of, likely, ours, with_config
from megamoe.bench.gemm_peers import deep_gemm, peers
from megamoe.bench.results import Row, provenance, save
from megamoe.kernels.gemm.heuristics import choose
from megamoe.kernels.jit.sweep import Case as Kernel
from megamoe.kernels.jit.sweep import summary, sweep
from megamoe.testing.numerics import difference
from megamoe.testing.timing import Timing, time_call

LIMIT = 1e-5  # of ours: one rounding to bf16 gives 1.3e-6
PEER_LIMIT = 1e-3  # a peer beyond this computed something else, in a layout it reads otherwise

Timer = Callable[[Callable[[], object]], Timing]


class WrongResultError(RuntimeError):
    """Our product is not the reference's."""


def measure(
    case: Case, *, timer: Timer = time_call, device: str = "cuda", with_peers: bool = True, tries: int = 0
) -> tuple[Row, list[str]]:
    """One row, without where it comes from, and why peers are missing from it.

    ``tries``: so many of the likeliest configurations are timed besides the chosen one.

    Raises:
        WrongResultError: ours is further than ``LIMIT`` from the fp32 product.
    """
    data = make(case, device)
    with full_fp32():
        expected = product(data)
    mine, config = ours(data), chosen(data)
    others = {other.name: with_config(mine, other) for other in likely(case, tries) if other != config}
    diff = _checked(mine, expected, f"{case.label} ({config.name})")
    for name, other in others.items():
        _checked(other, expected, f"{case.label} ({name})")
    checked: dict[str, Contender] = {}
    notes = []
    for name, build in peers(data) if with_peers else ():
        try:
            peer = build(data)
            off = difference(peer.valid(peer.call()), expected)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError) as error:
            notes.append(f"{name}: {_first_line(error)}")
            continue
        if off <= PEER_LIMIT:
            checked[name] = peer
        else:
            notes.append(f"{name}: not timed, d = {off:.1e}")
    del expected
    timing = timer(mine.call)
    times = {name: timer(peer.call).us for name, peer in checked.items()}
    tried = {name: timer(other.call).us for name, other in others.items()}
    row: Row = {
        "recipe": case.recipe,
        "grouping": case.grouping,
        "groups": case.groups,
        "rows": case.rows,
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "out": "bf16" if case.out == torch.bfloat16 else "f32",
        "us": timing.us,
        "us_min": timing.us_min,
        "tflops": 2 * case.m * case.n * case.k / timing.us / 1e6,
        "gbps": case.num_bytes / timing.us / 1e3,
        "diff": diff,
        "floor_us": floor_us(case),
        "config": config.name,
        "peers": times,
    }
    if case.layout != "nt":
        row["layout"] = case.layout
    if tried:
        row["tried"] = tried
    row["ratios"] = gemm_report.ratios(row)
    return row, notes


def _checked(mine: Contender, expected: torch.Tensor, what: str) -> float:
    """Difference of ours, within the limit; the result is then spoilt, so that the next one cannot pass for it."""
    result = mine.call()
    diff = difference(mine.valid(result), expected)
    if not diff <= LIMIT:  # NaN fails too
        raise WrongResultError(f"{what}: d = {diff:.3e} exceeds {LIMIT:g}")
    result.fill_(float("nan"))
    return diff


def floor_us(case: Case) -> float:
    """Microseconds that an H200 needs at least: for the case's bytes, or for its operations."""
    tflops = costs.H200.bf16_tflops if case.recipe == "bf16" else costs.H200.fp8_tflops
    return max(case.num_bytes / costs.H200.hbm_tb_s, 2 * case.m * case.n * case.k / tflops) / 1e6


def compile_ours(wanted: Sequence[Case], tries: int) -> int:
    """Put our kernels for the cases into the cache, without a GPU; 1 if one is unfit."""
    configs = dict.fromkeys(config for case in wanted for config in (choose(desc_of(case)), *likely(case, tries)))
    verdicts = sweep([Kernel(config.source(), config.opcodes) for config in configs])
    print(summary(verdicts))
    return int(any(verdict.faults for verdict in verdicts))


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """TF32 off for fp32 products inside the block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def warm(wanted: list[Case], workers: int, seconds: float, *, with_peers: bool) -> None:
    """Call every contender of every case once, in ``workers`` processes, so that caches on disk hold their kernels."""
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    # Dear compilations are spread out: neighbours in the list share most of their kernels.
    order = [case for start in range(workers) for case in wanted[start::workers]]
    futures = [pool.submit(warm_case, case, with_peers) for case in order]
    done, left = wait(futures, timeout=max(0.0, seconds))
    pool.shutdown(wait=False, cancel_futures=True)
    failed = {repr(error) for future in done if (error := future.exception()) is not None}
    print(f"warmed {len(done)} of {len(done) + len(left)} cases", *sorted(failed)[:3], sep="\n  ", flush=True)


def warm_case(case: Case, with_peers: bool) -> None:
    """In a process of its own: one call each, results unseen; what fails here will say so when it is measured."""
    data = make(case, "cuda")
    builds = [ours, *(build for _, build in peers(data))] if with_peers else [ours]
    for build in builds:
        with contextlib.suppress(Exception):
            build(data).call()
    torch.cuda.synchronize()
    del data
    torch.cuda.empty_cache()


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the benchmark to ``megamoe bench``."""
    parser = subparsers.add_parser("gemm", help="dense and grouped GEMMs", description=__doc__)
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=["bf16", "fp8_block"])
    parser.add_argument("--grouping", nargs="+", choices=GROUPINGS, default=list(GROUPINGS))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of bf16; FP8 is nt")
    parser.add_argument("--m", nargs="+", type=int, default=list(DENSE_M), help="rows of dense cases")
    parser.add_argument("--shape", nargs="+", type=_shape, default=list(DENSE_NK), help="NxK of dense cases")
    parser.add_argument("--groups", nargs="+", type=_spec, help="GROUPSxROWSxNxK in place of the usual grouped cases")
    parser.add_argument("--out", type=Path, help="folder of result files to merge into (default: print only)")
    parser.add_argument("--commit", help="what is measured, where this copy has no .git")
    parser.add_argument("--plot", type=Path, help="draw the ratios into this file")
    parser.add_argument("--no-peers", action="store_true", help="time ours alone")
    parser.add_argument(
        "--warm-peers", type=int, default=0, metavar="N", help="first compile all kernels in N processes"
    )
    parser.add_argument("--tries", type=int, default=0, metavar="N", help="time the N likeliest configurations too")
    parser.add_argument("--compile", action="store_true", help="compile our kernels for the cases and stop; no GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before a case that starts later")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and merge into the result file; 1 if a case failed."""
    options = {"ms": arguments.m, "shapes": arguments.shape, "specs": arguments.groups, "layouts": arguments.layout}
    wanted = list(cases(arguments.recipe, arguments.grouping, **options))
    if arguments.compile:
        return compile_ours(wanted, arguments.tries)
    if not torch.cuda.is_available():
        raise ValueError("bench gemm needs a CUDA device, none is visible")
    deadline = time.monotonic() + arguments.seconds
    with_peers = not arguments.no_peers
    source: Row = {}
    if arguments.out:
        command = "python -m megamoe " + shlex.join(sys.argv[1:])
        source = provenance(command, commit=arguments.commit, peers=_distributions() if with_peers else ())
    if arguments.warm_peers:
        warm(wanted, arguments.warm_peers, min(deadline - time.monotonic(), 1e6), with_peers=with_peers)
    rows: list[Row] = []
    failures: list[str] = []
    seen: set[str] = set()
    for done, case in enumerate(wanted):
        if time.monotonic() > deadline:
            print(f"stopped after {done} of {len(wanted)} cases: --seconds {arguments.seconds:g} are over", flush=True)
            break
        try:
            row, notes = measure(case, with_peers=with_peers, tries=arguments.tries)
        except (RuntimeError, ValueError) as error:
            failures.append(f"{case.label}: {_first_line(error)}")
            print(f"FAILED {failures[-1]}", flush=True)
            continue
        rows.append(row)
        ratios = "  ".join(f"{name} {ratio:.3f}" for name, ratio in row["ratios"].items())
        print(f"{case.label:48} {row['us']:9.1f} us {row['tflops']:6.0f} TF  {ratios}", flush=True)
        for note in notes:
            if note not in seen:
                print(f"  without {note}", flush=True)
        seen.update(notes)
        if arguments.out:
            save(arguments.out, "gemm", [{**row, **source}])
        torch.cuda.empty_cache()
    gemm_report.show(rows)
    if arguments.plot and any(row["peers"] for row in rows):
        gemm_report.plot(rows, arguments.plot)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def _distributions() -> list[str]:
    """Distributions of the peers that are not torch's own."""
    return metadata.packages_distributions().get("deep_gemm", []) if deep_gemm() is not None else []


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _shape(text: str) -> tuple[int, int]:
    n, k = _numbers(text, 2, "NxK")
    return n, k


def _spec(text: str) -> Spec:
    groups, rows, n, k = _numbers(text, 4, "GROUPSxROWSxNxK")
    return groups, rows, n, k


def _numbers(text: str, count: int, form: str) -> list[int]:
    parts = text.lower().split("x")
    if len(parts) != count or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be {form} with positive numbers, got {text!r}")
    return [int(part) for part in parts]
