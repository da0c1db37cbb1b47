"""Run-time knobs of the GEMMs: per call through ``with knobs(...)``, nested as needed, separate for each thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

from megamoe.kernels.gemm.config import GemmConfig


@dataclass(frozen=True)
class Knobs:
    """``num_sms``: most SMs a GEMM may occupy, None for all. ``pdl``: programmatic dependent launch.

    ``config``: what every GEMM runs with, whatever the heuristics say; None leaves it to them.
    """

    num_sms: int | None = None
    pdl: bool = False
    config: GemmConfig | None = None


_CURRENT: ContextVar[Knobs] = ContextVar("megamoe_gemm_knobs")
_DEFAULT = Knobs()


def current() -> Knobs:
    """The knobs in force in this thread."""
    return _CURRENT.get(_DEFAULT)


@contextlib.contextmanager
def knobs(*, num_sms: int | None = None, pdl: bool | None = None, config: GemmConfig | None = None) -> Iterator[Knobs]:
    """GEMMs inside the block use at most ``num_sms`` SMs, PDL as said, ``config``; what is None stays as it was.

    With ``pdl`` a GEMM may start while its predecessor in the stream still runs, and waits before it reads. Results do
    not depend on either knob; they are the same bits on every repeat in any case. ``config`` is for measuring:
    unless it is one of the problem's own ``heuristics.candidates`` the result is void.

    Raises:
        ValueError: ``num_sms`` below 1.
    """
    if num_sms is not None and num_sms < 1:
        raise ValueError(f"num_sms must be at least 1, got {num_sms}")
    now = current()
    given = {"num_sms": num_sms, "pdl": pdl, "config": config}
    changed = replace(now, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    token = _CURRENT.set(changed)
    try:
        yield changed
    finally:
        _CURRENT.reset(token)
