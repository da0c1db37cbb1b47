"""megamoe: a mixture-of-experts layer across the GPUs of an NVLink domain."""

from megamoe.activation import Activation
from megamoe.errors import (
    BufferClosedError,
    CompileError,
    EngineUnavailableError,
    MegaMoEError,
    PeerTimeout,
    RankMismatchError,
)
from megamoe.problem import Problem

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "BufferClosedError",
    "CompileError",
    "EngineUnavailableError",
    "MegaMoEError",
    "PeerTimeout",
    "Problem",
    "RankMismatchError",
    "__version__",
]
