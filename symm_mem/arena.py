"""``Arena``: the layout of a symmetric buffer, fields to offsets. Pure arithmetic, the same on every rank.

>>> arena = Arena(Field("x", (4, 8), torch.bfloat16), Field("flags", (3,), torch.int32, align=8))
>>> arena.offsets, arena.num_bytes
({'x': 0, 'flags': 64}, 128)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

MAX_ALIGN = 4096  # every mapping starts on a page, so up to here all ranks see the same low address bits


@dataclass(frozen=True)
class Field:
    """One array of the buffer: contiguous, starting at a multiple of ``align`` bytes.

    Raises:
        ValueError: an empty name, a negative size, or an ``align`` that is not a power of two between the element
            size and ``MAX_ALIGN``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8
    align: int = 128  # a cache line of the GPU: two fields never share one

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if not self.name or any(c.isspace() for c in self.name):
            raise ValueError(f"a field's name must be one word, got {self.name!r}")
        if any(n < 0 for n in self.shape):
            raise ValueError(f"field {self.name}: sizes must be at least 0, got {self.shape}")
        if self.align.bit_count() != 1 or not self.dtype.itemsize <= self.align <= MAX_ALIGN:
            raise ValueError(
                f"field {self.name}: align must be a power of two from {self.dtype.itemsize} (one {self.dtype}) "
                f"to {MAX_ALIGN}, got {self.align}"
            )

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Arena:
    """Fields in the given order, each at the first aligned offset behind the one before.

    Two arenas are equal if all names, shapes, dtypes and alignments are.
    """

    def __init__(self, *fields: Field) -> None:
        if not fields:
            raise ValueError("an arena needs at least one field")
        self.fields: Mapping[str, Field] = {f.name: f for f in fields}
        if len(self.fields) != len(fields):
            names = [f.name for f in fields]
            raise ValueError(f"field names must differ, got {', '.join(names)}")
        self.align = max(f.align for f in fields)
        offsets, end = {}, 0
        for field in fields:
            offsets[field.name] = _round_up(end, field.align)
            end = offsets[field.name] + field.num_bytes
        self.offsets: Mapping[str, int] = offsets
        self.num_bytes = _round_up(max(end, 1), self.align)
        """Bytes of the whole buffer, a multiple of ``align`` and never 0: no allocator can map nothing."""

    def view(self, whole: torch.Tensor, name: str) -> torch.Tensor:
        """Field ``name`` as a tensor of its shape and dtype inside ``whole``, uint8 [num_bytes]."""
        field = self.fields[name]
        assert whole.dtype == torch.uint8 and whole.shape == (self.num_bytes,), (whole.dtype, whole.shape)
        start = self.offsets[name]
        return whole[start : start + field.num_bytes].view(field.dtype).view(field.shape)

    @cached_property
    def text(self) -> str:
        """One line a field with all that ranks must agree on: offset, bytes, dtype, shape, alignment."""
        return "\n".join(
            f"{self.offsets[f.name]:>12} +{f.num_bytes:<12} {f.name} {f.dtype} {list(f.shape)} align {f.align}"
            for f in self.fields.values()
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that differ, in practice, whenever two arenas do."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def explain(self) -> str:
        """A table of the fields with their share of the bytes, to print before anything is allocated."""
        width = max(len(n) for n in (*self.fields, "total"))
        lines = [f"{'field':<{width}} {'offset':>14} {'bytes':>14} {'MiB':>10}  dtype and shape"]
        for f in self.fields.values():
            kind = f"{str(f.dtype).removeprefix('torch.')} {list(f.shape)}"
            lines.append(
                f"{f.name:<{width}} {self.offsets[f.name]:>14} {f.num_bytes:>14} {f.num_bytes / 2**20:>10.2f}  {kind}"
            )
        padding = self.num_bytes - sum(f.num_bytes for f in self.fields.values())
        total = f"{'total':<{width}} {'':>14} {self.num_bytes:>14} {self.num_bytes / 2**20:>10.2f}"
        lines.append(f"{total}  of which padding {padding}")
        return "\n".join(lines)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arena) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Arena({', '.join(self.fields)}; {self.num_bytes} bytes, {self.digest})"


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
