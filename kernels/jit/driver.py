"""The CUDA driver as the kernels use it: imported on first use, and its errors turned into sentences."""

from __future__ import annotations

from functools import cache
from typing import Any

from megamoe.errors import EngineUnavailableError, MegaMoEError

# What the bare error does not say.
_HINTS = {
    "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": "all blocks must be resident at once: launch fewer blocks, or wait for "
    "the kernel that holds the multiprocessors",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernel was compiled for another architecture than this GPU's",
    "CUDA_ERROR_INVALID_CLUSTER_SIZE": "the cluster does not fit: fewer blocks a cluster or less shared memory",
}


@cache
def driver() -> Any:
    """``cuda.bindings.driver``. Raises EngineUnavailableError where there is no driver."""
    try:
        from cuda.bindings import driver as module

        (status,) = module.cuInit(0)
    except (ImportError, RuntimeError) as error:
        raise EngineUnavailableError(f"no CUDA driver can be used here: {error}") from error
    if status != module.CUresult.CUDA_SUCCESS:
        raise EngineUnavailableError(f"the CUDA driver cannot start: {status.name}")
    return module


def is_invalid_context(status: Any) -> bool:
    """Whether a call failed because its thread has no CUDA context yet, as autograd's threads may not."""
    return int(status) == int(driver().CUresult.CUDA_ERROR_INVALID_CONTEXT)


def bind_context(device: int) -> None:
    """Make torch's context of ``device`` current in this thread."""
    checked(driver().cuCtxSetCurrent(_primary_context(device)), f"binding the context of device {device}")


@cache
def _primary_context(device: int) -> Any:
    """The context that torch uses too; held from here on."""
    return checked(driver().cuDevicePrimaryCtxRetain(device), f"asking for the context of device {device}")


def checked(result: tuple[Any, ...], doing: str) -> Any:
    """The values of a driver call. Raises MegaMoEError with what was being done and what the driver says."""
    status = result[0]
    if status != 0:
        raise MegaMoEError(f"{doing} failed: {explain(status)}")
    if len(result) == 1:
        return None
    return result[1] if len(result) == 2 else result[1:]


def explain(status: Any) -> str:
    """A driver's error in words."""
    module = driver()
    text = module.cuGetErrorString(status)[1]
    name = getattr(status, "name", str(status))
    words = f"{text.decode() if isinstance(text, bytes) else text} ({name})"
    return f"{words}; {_HINTS[name]}" if name in _HINTS else words
