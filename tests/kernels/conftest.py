"""Fixtures of the cast tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamoe.kernels.quant import casts, scales
from tests.kernels import emulator


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def quant_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the cast kernels run: emulated on CPU tensors, or on the GPU. Every output starts as 0xFF bytes, NaN."""
    real_empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = real_empty(*args, **kwargs)
        if not tensor.is_meta:
            tensor.view(torch.uint8).fill_(0xFF)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    if request.param == "gpu":
        return torch.device("cuda", 0)
    if reason := emulator.why_not():
        pytest.skip(reason)
    for module in (casts, scales):
        monkeypatch.setattr(module, "launch", emulator.Emulator().launch)
        monkeypatch.setattr(module, "arch_of", lambda device: "sm_90a")
        monkeypatch.setattr(module, "runs_kernels", lambda x: True)
    return torch.device("cpu")
