"""DeepGEMM's process-wide settings, in force for the GEMMs of this facade only."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from megamoe.errors import EngineUnavailableError
from megamoe.kernels.gemm.knobs import Knobs, knobs


@dataclass
class _Settings:
    num_sms: int | None = None
    pdl: bool = False
    tc_util: int = 100


_settings = _Settings()


def set_num_sms(num_sms: int) -> None:
    """Most SMs a GEMM may occupy. Raises ValueError below 1."""
    if num_sms < 1:
        raise ValueError(f"num_sms must be at least 1, got {num_sms}")
    _settings.num_sms = int(num_sms)


def get_num_sms() -> int:
    """What was set, else all SMs of the current device. Raises EngineUnavailableError without a CUDA device."""
    if _settings.num_sms is not None:
        return _settings.num_sms
    if not torch.cuda.is_available():
        raise EngineUnavailableError("get_num_sms: no CUDA device is visible and set_num_sms was not called")
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def chosen_num_sms() -> int | None:
    """What was set, None if nothing was."""
    return _settings.num_sms


def set_tc_util(percent: int) -> None:
    """Kept for ``get_tc_util``; these kernels do not throttle their tensor cores, and results never depend on it."""
    if not 0 <= percent <= 100:
        raise ValueError(f"tc_util must lie in [0, 100], got {percent}")
    _settings.tc_util = int(percent)


def get_tc_util() -> int:
    """What was set, else 100."""
    return _settings.tc_util


def set_pdl(enabled: bool) -> None:
    """Programmatic dependent launch: a GEMM may start while its predecessor still runs, and waits before it reads."""
    _settings.pdl = bool(enabled)


def get_pdl() -> bool:
    """What was set, else False."""
    return _settings.pdl


def in_force() -> contextlib.AbstractContextManager[Knobs]:
    """The settings as ``kernels.gemm.knobs``, for one call."""
    return knobs(num_sms=_settings.num_sms, pdl=_settings.pdl)
