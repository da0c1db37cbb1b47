"""How everything here is timed: one call between CUDA events, cold L2, a host that is far ahead.

Before each sample L2 is flushed by writing 512 MiB and the device sleeps, so that the host has queued the call before
the first event is reached: what is measured is the device's time, without launches, and inputs come from memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 512 << 20
SLEEP_CYCLES = 1_000_000  # about 0.5 ms: longer than the host needs to queue a call of a few dozen kernels
WARMUPS, SAMPLES = 5, 20


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, fastest and slowest sample."""

    us: float
    us_min: float
    us_max: float


def time_call(
    call: Callable[[], object],
    *,
    warmups: int = WARMUPS,
    samples: int = SAMPLES,
    before: Callable[[], object] | None = None,
) -> Timing:
    """Time ``call`` on the current CUDA stream.

    Args:
        call: queues the work, on the current stream; what it returns is dropped.
        before: queued before each call and not timed: lining up ranks, restoring inputs.

    Raises:
        ValueError: no CUDA device is visible, or fewer than one sample is asked for.
    """
    if not torch.cuda.is_available():
        raise ValueError("timing needs a CUDA device, none is visible")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    cool = cold_l2()
    events = [(_event(), _event()) for _ in range(samples)]
    for i in range(-warmups, samples):
        cool()
        if before is not None:
            before()
        if i < 0:
            call()
            continue
        start, end = events[i]
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) * 1e3 for start, end in events]
    return Timing(statistics.median(times), min(times), max(times))


def cold_l2() -> Callable[[], None]:
    """A function that queues what comes before a timed call: the flush of L2, and sleep until the host is ahead."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def cool() -> None:
        flush.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]

    return cool


def time_on_host(call: Callable[[], object], *, samples: int = 5, before: Callable[[], object] | None = None) -> Timing:
    """As ``time_call`` for work of the CPU, by the host's clock, after one call to warm up; no cache is flushed."""
    times = []
    for _ in range(samples + 1):
        if before is not None:
            before()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return Timing(statistics.median(times[1:]), min(times[1:]), max(times[1:]))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copy_ceiling_gbps(num_bytes: int = 4 << 30) -> float:
    """GB/s, reads and writes together, of a device copy that moves ``num_bytes`` in all."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return num_bytes / time_call(lambda: target.copy_(source)).us / 1e3
