"""Counters from which the CTAs of a grouped GEMM draw their units of work (gemm/layout.cuh).

A launch finds its two words 0 and leaves them so. Launches of one stream run one after the other and share a counter;
those captured into a graph may run beside any stream, and each has one of its own for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

_WORDS = 2  # units drawn, CTAs that have drawn their last
_APART = 32  # words from one counter to the next: 128 bytes, so that no two launches meet in a line of L2
_CAPTURED = 1024  # launches in graphs that get a counter made beforehand
_SPARES: dict[int, Iterator[torch.Tensor]] = {}  # by device: counters for captured launches, handed out once


def of_launch(device: int) -> torch.Tensor:
    """The counter, [2] int32, of a launch on the current stream of the current device ``device``."""
    if not torch._C._cuda_isCurrentStreamCapturing():
        return _of_stream(device, torch._C._cuda_getCurrentRawStream(device))
    spare = next(_SPARES.get(device, iter(())), None)
    # With none left, or none made before the capture began, the graph itself zeroes one.
    return _zeros(device) if spare is None else spare


@cache
def _of_stream(device: int, stream: int) -> torch.Tensor:
    if device not in _SPARES:
        block = _zeros(device, _CAPTURED * _APART)
        torch.cuda.current_stream(device).synchronize()  # once a device: graphs run on any stream
        _SPARES[device] = iter(block.view(_CAPTURED, _APART)[:, :_WORDS].unbind())
    return _zeros(device, _APART)[:_WORDS]


def _zeros(device: int, words: int = _WORDS) -> torch.Tensor:
    return torch.zeros(words, dtype=torch.int32, device=torch.device("cuda", device))
