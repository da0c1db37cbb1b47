"""``install``: this facade under the name ``deep_gemm``, for clients that import it themselves."""

from __future__ import annotations

import importlib
import importlib.util
import sys

_FACADE = "megamoe.adapters.deep_gemm"
_SUBMODULES = ("", ".utils", ".utils.layout", ".utils.math")


def install(*, replace: bool = False) -> None:
    """Make ``import deep_gemm`` (and ``deep_gemm.utils``, ``.layout``, ``.math``) find this facade in this process.

    Args:
        replace: do so although DeepGEMM itself is installed or imported; whoever holds its functions keeps them.

    Raises:
        ValueError: DeepGEMM itself is there and ``replace`` is False.
    """
    facade = importlib.import_module(_FACADE)
    there = sys.modules.get("deep_gemm")
    if there is facade:
        return
    if not replace and (there is not None or importlib.util.find_spec("deep_gemm") is not None):
        raise ValueError("deep_gemm itself is installed here; pass replace=True to put megamoe's facade in its place")
    for name in [name for name in sys.modules if name == "deep_gemm" or name.startswith("deep_gemm.")]:
        del sys.modules[name]
    for submodule in _SUBMODULES:
        sys.modules[f"deep_gemm{submodule}"] = importlib.import_module(f"{_FACADE}{submodule}")


def uninstall() -> None:
    """Undo ``install``: the next ``import deep_gemm`` looks for DeepGEMM itself. Nothing happens if it is not ours."""
    if sys.modules.get("deep_gemm") is importlib.import_module(_FACADE):
        for submodule in _SUBMODULES:
            sys.modules.pop(f"deep_gemm{submodule}", None)
