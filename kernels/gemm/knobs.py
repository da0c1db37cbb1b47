"""Run-time knobs of the GEMMs: per call through ``with knobs(...)``, nested as needed, separate for each thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Knobs:
    """``num_sms``: most SMs a GEMM may occupy, None for all. ``pdl``: programmatic dependent launch."""

    num_sms: int | None = None
    pdl: bool = False


_CURRENT: ContextVar[Knobs] = ContextVar("megamoe_gemm_knobs")
_DEFAULT = Knobs()


def current() -> Knobs:
    """The knobs in force in this thread."""
    return _CURRENT.get(_DEFAULT)


@contextlib.contextmanager
def knobs(*, num_sms: int | None = None, pdl: bool | None = None) -> Iterator[Knobs]:
    """GEMMs inside the block use at most ``num_sms`` SMs, and PDL as said; what is None stays as it was.

    With ``pdl`` a GEMM may start while its predecessor in the stream still runs, and waits before it reads. Results do
    not depend on either knob; they are the same bits on every repeat in any case.

    Raises:
        ValueError: ``num_sms`` below 1.
    """
    if num_sms is not None and num_sms < 1:
        raise ValueError(f"num_sms must be at least 1, got {num_sms}")
    now = current()
    changed = replace(now, num_sms=now.num_sms if num_sms is None else num_sms, pdl=now.pdl if pdl is None else pdl)
    token = _CURRENT.set(changed)
    try:
        yield changed
    finally:
        _CURRENT.reset(token)
