"""How Hugging Face lays out experts, as pure functions to ``ExpertWeights``' layout and back.

E experts, hidden H, intermediate I; shapes of transformers 5 (``integrations/moe.py``, ``use_experts_implementation``):

| flag | ``gate_up_proj`` (``up_proj`` where nothing gates) | ``down_proj`` |
|---|---|---|
| none (Mixtral, Qwen, DeepSeek, ...) | [E, 2I, H], gate rows first | [E, H, I] |
| ``is_transposed`` (gpt-oss) | [E, H, 2I] | [E, I, H] |
| not ``is_concatenated`` (gpt-oss) | gate and up alternate along 2I: gate 0::2, up 1::2 | |

Every function returns a view where the layout allows one; only taking gate and up apart copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Layout:
    """``transposed``: matrices are [in, out]. ``interleaved``: gate and up columns alternate."""

    transposed: bool = False
    interleaved: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing needs to be moved."""
        return not (self.transposed or self.interleaved)

    def to_w13(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``gate_up_proj`` -> w13 [E, 2I, H], gate rows first."""
        return self._apart(gate_up.transpose(1, 2) if self.transposed else gate_up)

    def from_w13(self, w13: torch.Tensor) -> torch.Tensor:
        """Inverse of ``to_w13``."""
        mixed = self._mix(w13)
        return mixed.transpose(1, 2) if self.transposed else mixed

    def to_w2(self, down: torch.Tensor) -> torch.Tensor:
        """``down_proj`` -> w2 [E, H, I]."""
        return down.transpose(1, 2) if self.transposed else down

    def from_w2(self, w2: torch.Tensor) -> torch.Tensor:
        """Inverse of ``to_w2``."""
        return self.to_w2(w2)

    def to_b13(self, bias: torch.Tensor) -> torch.Tensor:
        """``gate_up_proj_bias`` [E, 2I] -> b13 [E, 2I], gate first."""
        return self._apart(bias)

    def from_b13(self, b13: torch.Tensor) -> torch.Tensor:
        """Inverse of ``to_b13``."""
        return self._mix(b13)

    def _apart(self, t: torch.Tensor) -> torch.Tensor:
        """[E, 2I, ...]: g0 u0 g1 u1 ... -> g0 g1 ... u0 u1 ... along the second dimension."""
        return _swapped(t, t.shape[1] // 2, 2) if self.interleaved else t

    def _mix(self, t: torch.Tensor) -> torch.Tensor:
        return _swapped(t, 2, t.shape[1] // 2) if self.interleaved else t


def _swapped(t: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[E, rows * columns, ...] with the second dimension read as a matrix and transposed."""
    return t.reshape(t.shape[0], rows, columns, *t.shape[2:]).transpose(1, 2).flatten(1, 2)
