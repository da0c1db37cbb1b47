"""A parameter in another layout: kept from call to call where that is safe, else made in autograd's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Relaid:
    """``get(parameter)``: ``transform(parameter)``, contiguous.

    Without gradients it is made once, and again when the parameter has changed: its address, the version counter that
    in-place operations raise (optimisers, ``copy_`` under ``no_grad``), shape, strides or dtype. With gradients each
    call makes it in autograd's graph and drops what was kept: a parameter is about to change, and FSDP2 gathers a new
    one into the old storage without raising the counter. Only a write through ``parameter.data``, with no training
    call after it, is not seen: call ``forget`` then.
    """

    def __init__(self, transform: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._transform = transform
        self._key: tuple[Any, ...] | None = None
        self._value: torch.Tensor | None = None

    def get(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter in the other layout; differentiable where autograd is on and the parameter wants it."""
        if torch.is_grad_enabled() and parameter.requires_grad:
            self.forget()
            return self._transform(parameter).contiguous()
        if parameter.is_inference():  # carries no version
            return self._transform(parameter).contiguous()
        key = (
            parameter.data_ptr(),
            parameter._version,
            tuple(parameter.shape),
            parameter.stride(),
            parameter.dtype,
            parameter.device,
        )
        if self._value is None or key != self._key:
            with torch.no_grad():
                self._value = self._transform(parameter.detach()).contiguous()
            self._key = key
        return self._value

    def forget(self) -> None:
        """Make it anew on the next ``get``; frees the copy until then."""
        self._key = self._value = None
