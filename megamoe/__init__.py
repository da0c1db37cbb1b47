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
from megamoe.functional import explain_engines, mega_moe
from megamoe.problem import Problem
from megamoe.weights import ExpertWeights

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "BufferClosedError",
    "CompileError",
    "EngineUnavailableError",
    "ExpertWeights",
    "MegaMoEError",
    "PeerTimeout",
    "Problem",
    "RankMismatchError",
    "__version__",
    "explain_engines",
    "mega_moe",
]
