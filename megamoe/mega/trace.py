"""What a traced mega-kernel writes down (kernels/include/megamoe/mega/trace.cuh): room for it, and its decoding.

trace = empty(runner.num_sms, device=runner.buffer.device)
runner.forward(x, topk_idx, topk_weights, weights, trace=trace)
timeline = decode(trace.cpu(), rank=0)          # after the call is complete
timeline.events(ctas=[0])[0]                    # Event(rank=0, cta=0, track=..., what=..., begin_ns=..., ...)
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch


class Moment(enum.IntEnum):
    """``Moment`` of trace.cuh: nanoseconds of the device's clock at which a CTA had come so far."""

    START = 0
    SORTED = 1
    TOLD_PLAN = 2
    FIRST_ROWS = 3
    PUSHED = 4
    MATH_DONE = 5
    RESULTS_IN = 6
    END = 7


class Spent(enum.IntEnum):
    """``Spent`` of trace.cuh: what a role spends cycles on; sums are those of one of two roles alike."""

    MATH_NOTE = 0
    MATH_UP = 1
    MATH_STORE_UP = 2
    MATH_DOWN = 3
    MATH_STORE_DOWN = 4
    LOAD_EMPTY = 5
    LOAD_ROWS = 6
    LOAD_NOTE = 7
    LEAD_NOTE = 8
    LEAD_SETTLE = 9
    COPY_WAIT = 10
    COPY_ROWS = 11
    MATH_STAGE = 12
    COPY_PLACE = 13
    COPY_PUSH = 14


class Track(enum.IntEnum):
    """``Track`` of trace.cuh, whose lanes write events, and behind them the CTA as a whole."""

    MATH = 0
    MATH_SECOND = 1
    LOAD = 2
    LEAD = 3
    COPY_FIRST = 4
    COPY_SECOND = 5
    ALL = 6  # what all warps do together: from moments


class What(enum.IntEnum):
    """What an event is."""

    SORT = 0  # tokens by expert, routes to their owners
    PUSH = 1  # rows to their owners
    AWAIT_HEADERS = 2  # of all ranks, and the plan made of them
    AWAIT_ROWS = 3  # that sources push
    AWAIT_PLACE = 4  # in the pool
    COPY = 5  # rows from the regions into the pool
    AWAIT_COPIES = 6  # of the rows of a block, before they are loaded
    AWAIT_TILES = 7  # of the first GEMM, before the second is loaded, or its activations are cast
    AWAIT_NOTE = 8  # of the leading warp
    AWAIT_STAGE = 9  # math: the first stage of a tile
    GEMM_1 = 10
    EPILOGUE_1 = 11
    GEMM_2 = 12
    EPILOGUE_2 = 13
    NOTE = 14  # ticket taken, tile noted
    AWAIT_SETTLED = 15  # lead: math warps to be done with a tile
    AWAIT_RESULTS = 16  # of all ranks, those of this one's other CTAs among them
    COMBINE = 17  # rows of results summed into y
    REHEARSAL = 18  # of the first tile's epilogue, while its rows are on their way: no work of the layer
    CAST = 19  # of activations, by copying warps (fp8_row)


_WHAT = {
    Spent.MATH_NOTE: What.AWAIT_NOTE,
    Spent.MATH_UP: What.GEMM_1,
    Spent.MATH_STORE_UP: What.EPILOGUE_1,  # REHEARSAL where there is no tile
    Spent.MATH_DOWN: What.GEMM_2,
    Spent.MATH_STORE_DOWN: What.EPILOGUE_2,
    Spent.LOAD_ROWS: What.AWAIT_COPIES,  # AWAIT_TILES in the second GEMM
    Spent.LOAD_NOTE: What.AWAIT_NOTE,
    Spent.LEAD_NOTE: What.NOTE,
    Spent.LEAD_SETTLE: What.AWAIT_SETTLED,
    Spent.COPY_WAIT: What.AWAIT_ROWS,
    Spent.COPY_ROWS: What.COPY,  # CAST in the second GEMM
    Spent.MATH_STAGE: What.AWAIT_STAGE,
    Spent.COPY_PLACE: What.AWAIT_PLACE,  # AWAIT_TILES in the second GEMM
    Spent.COPY_PUSH: What.PUSH,
}
# What all warps of a CTA, its math warps or its helpers do, or wait for, from one moment to another.
_BETWEEN = (
    (Track.ALL, What.SORT, Moment.START, Moment.SORTED),
    (Track.MATH, What.PUSH, Moment.SORTED, Moment.PUSHED),
    (Track.LOAD, What.AWAIT_HEADERS, Moment.SORTED, Moment.TOLD_PLAN),
    (Track.ALL, What.AWAIT_RESULTS, Moment.MATH_DONE, Moment.RESULTS_IN),
    (Track.ALL, What.COMBINE, Moment.RESULTS_IN, Moment.END),
)
_WRITTEN = len(Track) - 1  # tracks of the kernel
_CYCLES = len(Moment) + len(Spent)
_COUNTS = _CYCLES + 2
HEAD = (_COUNTS + _WRITTEN + 1) // 2 * 2
"""Words of a CTA before its events."""
_EVENT_WORDS = 2
_NO_EXPERT, _NO_BLOCK = 0x7FFFFF, 0xFFFFFFFF
_COLUMNS = ("cta", "track", "what", "begin_ns", "end_ns", "expert", "block", "tile")
_LONGEST_NS = 1_000_000_000  # cycles are counted modulo 2^32: about two seconds
EVENTS = 1024
"""Room for events of a track of a CTA, unless asked otherwise: more than any named case fills on whole GPUs."""


def empty(num_sms: int, *, events: int = EVENTS, device: torch.device | str) -> torch.Tensor:
    """Room for the trace of a launch of ``num_sms`` CTAs: int64 [num_sms, words], zeros; 16 bytes an event."""
    return torch.zeros(num_sms, HEAD + _WRITTEN * events * _EVENT_WORDS, dtype=torch.int64, device=device)


def room(trace: torch.Tensor, num_sms: int, device: torch.device) -> int:
    """Events that a track has room for in ``trace``.

    Raises:
        ValueError: ``trace`` is not what ``empty(num_sms)`` gives, with got and expected.
    """
    shape, per_event = tuple(trace.shape), _WRITTEN * _EVENT_WORDS
    fits = len(shape) == 2 and shape[0] == num_sms and shape[1] >= HEAD and (shape[1] - HEAD) % per_event == 0
    if not fits or trace.dtype != torch.int64 or trace.device != device or not trace.is_contiguous():
        raise ValueError(
            f"trace must be contiguous int64 [{num_sms}, {HEAD} + {per_event} * events] on {device} "
            f"(megamoe.mega.trace.empty), got {trace.dtype} {shape} on {trace.device}"
        )
    return (shape[1] - HEAD) // per_event


@dataclass(frozen=True)
class Event:
    """What a role of a CTA did from ``begin_ns`` to ``end_ns``; local expert, block, column tile: -1 = none."""

    rank: int
    cta: int
    track: Track
    what: What
    begin_ns: int
    end_ns: int
    expert: int
    block: int
    tile: int


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One rank's events, by CTA and track in order of time. Times: ns of that device's clock.

    Columns are int64 [n]; ``expert``, ``block``, ``tile`` -1 = none. ``moments`` [CTAs, 8]; ``spent`` [CTAs, 15]
    cycles; ``dropped`` [CTAs, 6] events that a track had no room for.
    """

    rank: int
    cta: torch.Tensor
    track: torch.Tensor
    what: torch.Tensor
    begin_ns: torch.Tensor
    end_ns: torch.Tensor
    expert: torch.Tensor
    block: torch.Tensor
    tile: torch.Tensor
    moments: torch.Tensor
    spent: torch.Tensor
    dropped: torch.Tensor

    @property
    def num_ctas(self) -> int:
        return len(self.moments)

    @property
    def span_ns(self) -> tuple[int, int]:
        """When the first CTA began, and when the last one was done."""
        return int(self.moments[:, Moment.START].min()), int(self.moments[:, Moment.END].max())

    def events(self, ctas: Iterable[int]) -> list[Event]:
        """Events of some CTAs."""
        some = self.only(ctas)
        rows = torch.stack([getattr(some, name) for name in _COLUMNS], 1).tolist()
        return [Event(self.rank, row[0], Track(row[1]), What(row[2]), *row[3:]) for row in rows]

    def only(self, ctas: Iterable[int]) -> Timeline:
        """The same with the events of some CTAs alone; moments, sums and counts stay those of all."""
        at = torch.isin(self.cta, torch.tensor(sorted(set(ctas)), dtype=torch.int64))
        return replace(self, **{name: getattr(self, name)[at] for name in _COLUMNS})

    def shifted(self, ns: int) -> Timeline:
        """The same with ``ns`` added to every time; moments that were never reached stay 0."""
        moments = torch.where(self.moments != 0, self.moments + ns, 0)
        return replace(self, begin_ns=self.begin_ns + ns, end_ns=self.end_ns + ns, moments=moments)


def decode(trace: torch.Tensor, *, rank: int) -> Timeline:
    """The timeline of a complete call, from ``trace`` int64 [CTAs, words] on the CPU.

    A CTA's cycles become nanoseconds by its two readings of both clocks, at its first and last moment.

    Raises:
        ValueError: the call is not complete, or took a second or more, which cycles of 32 bits can't tell.
    """
    num_ctas = len(trace)
    events_room = room(trace, num_ctas, torch.device("cpu"))
    moments, spent = trace[:, : len(Moment)].clone(), trace[:, len(Moment) : _CYCLES].clone()
    start, end = moments[:, Moment.START], moments[:, Moment.END]
    if bool((late := (end == 0)).any()):
        first_late = int(late.nonzero()[0])
        raise ValueError(f"CTA {first_late} of rank {rank} has not written its end: the call is not complete")
    if int((end - start).max()) >= _LONGEST_NS:
        raise ValueError(
            f"the call of rank {rank} took {int((end - start).max()) / 1e9:.1f} s: trace calls of less than 1 s"
        )
    counts = trace[:, _COUNTS : _COUNTS + _WRITTEN]
    kept = counts.clamp(max=events_room)
    words = trace[:, HEAD:].reshape(num_ctas, _WRITTEN, events_room, _EVENT_WORDS)
    cta, track, index = (torch.arange(events_room) < kept[..., None]).nonzero(as_tuple=True)
    pairs = words[cta, track, index]
    begin, stop, what, where = (_half(pairs[:, w], high) for w in range(_EVENT_WORDS) for high in (False, True))

    first = trace[:, _CYCLES][cta]
    cycles = (trace[:, _CYCLES + 1] - trace[:, _CYCLES]) % 2**32
    rate = ((end - start).double() / cycles.clamp(min=1))[cta]
    times = [start[cta] + (((c - first) % 2**32) * rate).round().long() for c in (begin, stop)]
    down, expert = (what >> 23 & 1).bool(), what & _NO_EXPERT
    kinds = torch.full((len(Spent),), -1)
    for cause, meaning in _WHAT.items():
        kinds[cause] = meaning
    kind = kinds[what >> 24]
    kind = torch.where(((kind == What.AWAIT_COPIES) | (kind == What.AWAIT_PLACE)) & down, What.AWAIT_TILES, kind)
    kind = torch.where((kind == What.COPY) & down, What.CAST, kind)
    kind = torch.where((kind == What.EPILOGUE_1) & (expert == _NO_EXPERT), What.REHEARSAL, kind)
    nowhere = where == _NO_BLOCK
    columns = [
        cta, track, kind, *times,
        torch.where(expert == _NO_EXPERT, -1, expert),
        torch.where(nowhere, -1, where >> 12),
        torch.where(nowhere, -1, where & 0xFFF),
    ]  # fmt: skip

    every, none = torch.arange(num_ctas), torch.full((num_ctas,), -1)
    for row, meaning, opening, closing in _BETWEEN:
        more = [
            every, torch.full_like(every, row), torch.full_like(every, meaning),
            moments[:, opening], moments[:, closing], none, none, none,
        ]  # fmt: skip
        columns = [torch.cat(pair) for pair in zip(columns, more, strict=True)]
    order = torch.argsort((columns[0] * len(Track) + columns[1]) * 2 * _LONGEST_NS + columns[3] - int(start.min()))
    return Timeline(
        rank=rank,
        moments=moments,
        spent=spent,
        dropped=counts - kept,
        **{name: column[order] for name, column in zip(_COLUMNS, columns, strict=True)},
    )


def _half(words: torch.Tensor, high: bool) -> torch.Tensor:
    """32 bits of each word, as numbers from 0."""
    return (words >> 32 if high else words) & 0xFFFFFFFF
