"""``KvBatch``: the key-value caches of all running requests as one batch of transformers' ``DynamicCache``.

Rows are aligned at their ends: a request of n tokens fills the last n columns, what stands before is masked. So all
rows write their next token into the same new column, which is what ``DynamicCache`` does, and a row may join or leave
at any time: joining pads the shorter side on the left, leaving drops columns that no row needs any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Call = Callable[[torch.Tensor, Any, torch.Tensor, Any], torch.Tensor]  # ids, mask, positions, cache -> logits [B, V]


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, mask), each [B, longest] int64: prompts at the right, 0 before them."""
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device="cpu")
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device="cpu")
    return ids.to(device), mask.to(device)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """[B, W] mask of a prefill -> position of each token in its row, 0 in the padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class KvBatch:
    """Caches of B requests.

    Attributes:
        cache: transformers' cache with keys [B, heads, W, dim] in each layer, None while there are no rows.
        mask: [B, W] int64, 1 where a row has a token.
        starts: for each row the column of its first token.
    """

    def __init__(self) -> None:
        self.cache: Any = None
        self.mask: torch.Tensor | None = None
        self.starts: list[int] = []

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def width(self) -> int:
        """W, columns of the cache."""
        return 0 if self.mask is None else self.mask.shape[1]

    def join(self, cache: Any, mask: torch.Tensor, lengths: Sequence[int]) -> None:
        """Append rows whose prompts have just been read into ``cache``, W' columns aligned at their ends."""
        width = mask.shape[1]
        starts = [width - length for length in lengths]
        if self.cache is None:
            self.cache, self.mask, self.starts = cache, mask, starts
            return
        assert self.mask is not None
        old, new = max(0, width - self.width), max(0, self.width - width)
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            mine.keys = torch.cat([_wider(mine.keys, old), _wider(theirs.keys, new)])
            mine.values = torch.cat([_wider(mine.values, old), _wider(theirs.values, new)])
        self.mask = torch.cat([F.pad(self.mask, (old, 0)), F.pad(mask, (new, 0))])
        self.starts = [s + old for s in self.starts] + [s + new for s in starts]

    def grow(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Before a decode step: (mask [B, W + 1] with the new column, positions [B, 1] of the new tokens)."""
        assert self.mask is not None
        positions = self.mask.sum(1, keepdim=True)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self.mask, positions

    def decode(self, call: Call, last: Sequence[int]) -> torch.Tensor:
        """One step: the newest token of each row -> logits [rows, vocabulary]."""
        mask, positions = self.grow()
        ids = torch.tensor(last, device="cpu")[:, None].to(mask.device)
        return call(ids, mask, positions, self.cache)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, then columns before the first token of any row."""
        if len(rows) == len(self):
            return
        if not rows:
            self.cache, self.mask, self.starts = None, None, []
            return
        assert self.mask is not None
        self.starts = [self.starts[row] for row in rows]
        first = min(self.starts)
        index = torch.tensor(rows, device="cpu").to(self.mask.device)
        self.cache.batch_select_indices(index)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
        self.mask = self.mask[index, first:]
        self.starts = [s - first for s in self.starts]


def _wider(t: torch.Tensor, columns: int) -> torch.Tensor:
    """[B, heads, W, dim] with zeros before the first column."""
    return F.pad(t, (0, 0, columns, 0)) if columns else t
