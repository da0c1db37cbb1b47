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
from megamoe.layer import MegaMoE
from megamoe.problem import Problem
from megamoe.router import Router, RouterConfig
from megamoe.weights import ExpertWeights

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "BufferClosedError",
    "CompileError",
    "EngineUnavailableError",
    "ExpertWeights",
    "MegaMoE",
    "MegaMoEError",
    "PeerTimeout",
    "Problem",
    "RankMismatchError",
    "Router",
    "RouterConfig",
    "__version__",
    "explain_engines",
    "mega_moe",
]
