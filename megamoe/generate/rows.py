"""``RowBatch``: caches of all running requests in fixed memory, and decode steps as CUDA graphs over them.

Each request has a slot: a row of every layer's keys and values, filled from column 0. Slots 0 to n - 1 are in use; when
a request leaves, the last one moves into its slot. A graph decodes the first 1, 2, 4, ... slots; those beyond the
requests that run are computed on leftovers and kept from the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from megamoe.generate.kv import Call


def sizes_for(max_rows: int) -> list[int]:
    """Powers of two below ``max_rows``, then itself."""
    return [n for n in (1 << i for i in range(max_rows.bit_length())) if n < max_rows] + [max_rows]


class RowBatch:
    """What ``KvBatch`` is, for at most ``max_rows`` requests of ``width`` tokens each, prompt and answer.

    Args:
        make_cache: columns (int64 [max_rows] on the device: where each slot's next token goes) -> an empty cache whose
            layers have ``keys`` and ``values`` [max_rows, heads, width, dim], made by ``lazy_initialization``.
        make_mask: columns of the first n slots -> what they see, as the model's ``attention_mask``.
        counting: a context in which only the first ``count`` (int32 [1] on the device) tokens of a call are routed.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        device: torch.device,
        make_cache: Callable[[torch.Tensor], Any],
        make_mask: Callable[[torch.Tensor], Any],
        counting: Callable[[torch.Tensor], AbstractContextManager[None]],
    ) -> None:
        self._device = device
        self._columns = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._ids = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._count = torch.zeros(1, dtype=torch.int32, device=device)
        self._cache = make_cache(self._columns)
        self._make_mask, self._counting = make_mask, counting
        self._sizes = sizes_for(max_rows)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._slots: list[int] = []  # of each request, in the order of the scheduler's rows
        self._order: torch.Tensor | None = None  # the same on the device; None: slot i is row i

    def __len__(self) -> int:
        return len(self._slots)

    def join(self, cache: Any, mask: torch.Tensor, lengths: Sequence[int]) -> None:
        """Append rows whose prompts have just been read into ``cache``, W' columns aligned at their ends."""
        first, n, width = len(self), len(lengths), mask.shape[1]
        longest = max(lengths)
        ends = torch.tensor(lengths, device="cpu").to(self._device)
        # Row r's tokens stand in the last ends[r] of W' columns; here they start at column 0, leftovers behind them.
        source = (width - ends[:, None] + torch.arange(longest, device=self._device)).clamp(max=width - 1)
        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
            for kept, new in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                index = source[:, None, :, None].expand(n, new.shape[1], longest, new.shape[3])
                kept[first : first + n, :, :longest] = new.gather(2, index)
        self._columns[first : first + n] = ends
        self._slots += range(first, first + n)
        self._reorder()

    def decode(self, call: Call, last: Sequence[int]) -> torch.Tensor:
        """One step: the newest token of each row -> logits [rows, vocabulary], good until the next step."""
        n = len(self)
        by_slot = [0] * n
        for slot, token in zip(self._slots, last, strict=True):
            by_slot[slot] = token
        self._ids[:n] = torch.tensor(by_slot, device="cpu").to(self._device, non_blocking=True)
        self._count.fill_(n)
        size = next(s for s in self._sizes if s >= n)
        if size in self._graphs:
            graph, logits = self._graphs[size]
            graph.replay()
        else:
            logits = self._step(call, size)
        return logits[:n] if self._order is None else logits[self._order]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows."""
        if len(rows) == len(self):
            return
        slots = [self._slots[row] for row in rows]
        n = len(rows)
        holes = sorted(set(range(n)) - set(slots))
        moved = dict(zip(sorted(s for s in slots if s >= n), holes, strict=True))
        if moved:
            old, new = (torch.tensor(list(part), device="cpu").to(self._device) for part in (moved, moved.values()))
            for layer in self._cache.layers:
                for tensor in (layer.keys, layer.values):
                    tensor[new] = tensor[old]
            self._columns[new] = self._columns[old]
        self._columns[n:] = 0
        self._slots = [moved.get(s, s) for s in slots]
        self._reorder()

    @torch.no_grad()
    def capture(self, call: Call) -> None:
        """Graphs of all sizes, after some requests were served without. Every rank of the experts calls it together.

        Each size runs once, with no token for any expert, so that what is made on first use is made.
        """
        assert not self._slots, "requests are running"
        pool = None
        for size in self._sizes:
            self._count.fill_(0)
            self._step(call, size)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = self._step(call, size)
            pool = graph.pool()
            self._graphs[size] = graph, logits
        self._columns.zero_()

    def _step(self, call: Call, size: int) -> torch.Tensor:
        columns = self._columns[:size]
        with self._counting(self._count):
            logits = call(self._ids[:size, None], self._make_mask(columns), columns[:, None].clone(), self._cache)
        columns.add_(1).clamp_(max=self._width() - 1)  # slots without a request count on
        return logits

    def _width(self) -> int:
        return int(self._cache.layers[0].get_max_length())

    def _reorder(self) -> None:
        straight = self._slots == list(range(len(self._slots)))
        self._order = None if straight else torch.tensor(self._slots, device="cpu").to(self._device)
