"""``ExpertWeights``: the weights of the experts one rank holds. ``megamoe.pretrained`` reads and writes checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe.problem import Problem


@dataclass(frozen=True)
class ExpertWeights:
    """One rank's experts, in master precision (fp32 or bf16); recipes quantise from here.

    - ``w13`` [S, 2I, H]: gate rows first, then up rows ([S, I, H] if the activation is not gated).
    - ``w2`` [S, H, I].
    - ``b13`` [S, 2I] and ``b2`` [S, H], or None.

    S is the number of local expert slots: E / R under contiguous placement.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None

    @staticmethod
    def cat(*parts: ExpertWeights) -> ExpertWeights:
        """The experts of all ``parts``, in order, copied into one tensor each.

        Raises:
            ValueError: some parts have biases and others have none.
        """
        if len({part.b13 is None for part in parts} | {part.b2 is None for part in parts}) != 1:
            raise ValueError("experts that are put together must all have biases or all have none, got both kinds")
        stacks = zip(*((p.w13, p.w2, *(b for b in (p.b13, p.b2) if b is not None)) for p in parts), strict=True)
        return ExpertWeights(*(torch.cat(stack) for stack in stacks))

    def check(self, problem: Problem, num_slots: int) -> None:
        """Raise ValueError with got and expected if shapes, dtypes or devices do not fit ``problem``."""
        expected: dict[str, tuple[int, ...]] = {
            "w13": (num_slots, problem.w13_rows, problem.hidden),
            "w2": (num_slots, problem.hidden, problem.intermediate),
        }
        if problem.bias:
            expected |= {"b13": (num_slots, problem.w13_rows), "b2": (num_slots, problem.hidden)}
        for name in ("w13", "w2", "b13", "b2"):
            tensor = getattr(self, name)
            if name not in expected:
                if tensor is not None:
                    raise ValueError(f"{name} was given but problem.bias is False")
                continue
            if tensor is None:
                raise ValueError(f"{name} is missing: problem.bias is True")
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(f"{name} must have shape {expected[name]}, got {tuple(tensor.shape)}")
            if tensor.dtype != self.w13.dtype or tensor.device != self.w13.device:
                raise ValueError(
                    f"{name} must be {self.w13.dtype} on {self.w13.device} like w13, "
                    f"got {tensor.dtype} on {tensor.device}"
                )
