"""The one table of environment variables, and their only reader.

Every other module asks ``env.get("NAME")``; the README's table is printed from ``TABLE``. This file and
``errors.py`` are leaves: kernels, symm_mem and dispatch may import these two and nothing else of ``megamoe``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EnvVar:
    """One variable: ``parse`` turns its text into a value and raises ValueError on nonsense."""

    name: str
    default: str
    parse: Callable[[str], Any]
    meaning: str


def _positive_float(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise ValueError("must be greater than 0")
    return value


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return parse


TABLE: tuple[EnvVar, ...] = (
    EnvVar(name="MEGAMOE_TIMEOUT_S", default="30", parse=_positive_float,
           meaning="Seconds any wait for another rank may last before PeerTimeout is raised."),
    EnvVar(name="MEGAMOE_ENGINE", default="auto", parse=_one_of("auto", "reference", "staged", "mega"),
           meaning="Engine used where the caller says engine=\"auto\"."),
    EnvVar(name="MEGAMOE_GROUPED_GEMM", default="auto", parse=_one_of("auto", "torch"),
           meaning="Who multiplies for the staged engine: our kernels where they run (auto), or torch."),
    EnvVar(name="MEGAMOE_PARTIAL_SUMS", default="auto", parse=_one_of("auto", "on", "off"),
           meaning="Whether the mega-kernel adds up a token's rows before they cross back, unless the caller says."),
    EnvVar(name="MEGAMOE_SYMM_BACKEND", default="auto", parse=_one_of("auto", "torch", "nvshmem", "local", "shm"),
           meaning="Symmetric-memory backend used where the caller says backend=\"auto\"."),
    EnvVar(name="MEGAMOE_SHM_DIR", default="", parse=str,
           meaning="Folder for the shm backend's file; empty means /dev/shm, or the temporary folder if too small."),
    EnvVar(name="MEGAMOE_CACHE_DIR", default="", parse=str,
           meaning="Folder for compiled kernels; empty means $XDG_CACHE_HOME/megamoe or ~/.cache/megamoe."),
    EnvVar(name="MEGAMOE_COMPILER", default="nvrtc", parse=_one_of("nvrtc", "nvcc"),
           meaning="Compiler for kernels at run time."),
    EnvVar(name="CUDA_HOME", default="", parse=str,
           meaning="Where nvcc stands (in bin/) if MEGAMOE_COMPILER=nvcc; empty means the one on PATH."),
    EnvVar(name="XDG_CACHE_HOME", default="", parse=str,
           meaning="Folder of caches, where MEGAMOE_CACHE_DIR is empty; empty means ~/.cache."),
    EnvVar(name="MEGAMOE_VLLM", default="0", parse=_flag,
           meaning="1 lets the plugin of vLLM's processes take over unquantised MoE layers."),
    EnvVar(name="MEGAMOE_PRINT_HEURISTICS", default="0", parse=_flag,
           meaning="1 prints candidates, scores and the choice each time a kernel configuration is chosen."),
)  # fmt: skip

_BY_NAME = {v.name: v for v in TABLE}


def get(name: str) -> Any:
    """Value of the variable ``name``, parsed. Raises KeyError for a name not in the table, ValueError for bad text."""
    var = _BY_NAME[name]
    text = os.environ.get(name, var.default)
    try:
        return var.parse(text)
    except ValueError as error:
        raise ValueError(f"environment variable {name}={text!r}: {error}. {var.meaning}") from None


def launched() -> bool:
    """Whether torchrun, or one like it, started this process as a rank: RANK and the rest are set."""
    return "RANK" in os.environ


def snapshot() -> dict[str, str]:
    """Text of every variable of the table that is set here; ``restore`` it in another process of the same run."""
    return {name: os.environ[name] for name in _BY_NAME if name in os.environ}


def restore(values: dict[str, str]) -> None:
    """Set the table's variables to ``values`` and unset those that do not stand in it."""
    for name in _BY_NAME:
        os.environ.pop(name, None)
    os.environ.update(values)


def disable_multicast() -> None:
    """Keep NCCL, torch and NVSHMEM off NVLink multicast, which megamoe never uses. Call before the first of them."""
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    os.environ["NVSHMEM_DISABLE_NVLS"] = "1"


def allow_ranks_on_one_gpu() -> None:
    """Let torch's symmetric memory serve ranks that share a GPU, which it refuses by default."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
