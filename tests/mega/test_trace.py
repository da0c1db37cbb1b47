"""A traced kernel's words become events, ranks get one clock, shares are those of the definitions; files open again."""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megamoe.kernels.jit.source import INCLUDE_ROOT
from megamoe.mega import trace as layout
from megamoe.mega.trace import HEAD, Moment, Spent, Timeline, Track, What, decode, empty
from megamoe.trace import figure, perfetto
from megamoe.trace.clocks import align
from megamoe.trace.shares import shares

HEADER = (INCLUDE_ROOT / "megamoe/mega/trace.cuh").read_text(encoding="utf-8")
ORIGIN, GHZ = 1_800_000_000_000_000_000, 2  # ns of the clock, cycles a ns
CPU = torch.device("cpu")
# (track, spent, begin, end in ns since the start, second GEMM, expert, block, tile)
Written = tuple[Track, Spent, int, int, bool, int, int, int]
MOMENTS = {
    Moment.START: 0, Moment.SORTED: 1000, Moment.PUSHED: 3000, Moment.TOLD_PLAN: 4000, Moment.FIRST_ROWS: 4500,
    Moment.MATH_DONE: 9000, Moment.RESULTS_IN: 9500, Moment.END: 10000,
}  # fmt: skip
WRITTEN: list[Written] = [
    (Track.MATH, Spent.MATH_STAGE, 4000, 5000, False, 0, 0, 1),
    (Track.MATH, Spent.MATH_UP, 5000, 7000, False, 0, 0, 1),
    (Track.MATH, Spent.MATH_STORE_UP, 7000, 7500, False, 0, 0, 1),
    (Track.MATH, Spent.MATH_DOWN, 7500, 9000, True, 3, 70000, 27),
    (Track.MATH_SECOND, Spent.MATH_UP, 5200, 7200, False, 0, 0, 1),
    (Track.LOAD, Spent.LOAD_ROWS, 4000, 4800, False, 0, 0, 1),
    (Track.LOAD, Spent.LOAD_ROWS, 5000, 6000, True, 3, 70000, 27),
    (Track.COPY_FIRST, Spent.COPY_WAIT, 4000, 4500, False, 0, 0, 0),
    (Track.COPY_SECOND, Spent.COPY_PUSH, 4000, 6000, False, -1, -1, -1),
]


def written(
    events: list[Written] = WRITTEN, *, ctas: int = 2, room: int = 8, first_cycle: int = 2**32 - 5000, shift: int = 0
) -> torch.Tensor:
    """Words as the kernel leaves them; every CTA the same, its cycles from ``first_cycle`` on, modulo 2^32."""
    trace = empty(ctas, events=room, device="cpu")
    for cta in trace:
        for moment, ns in MOMENTS.items():
            cta[moment] = ORIGIN + shift + ns
        cycles = len(Moment) + len(Spent)
        cta[cycles] = first_cycle
        cta[cycles + 1] = (first_cycle + GHZ * MOMENTS[Moment.END]) % 2**32
        for track, spent, begin, end, down, expert, block, tile in events:
            index = int(cta[cycles + 2 + track])
            cta[cycles + 2 + track] += 1
            cta[len(Moment) + spent] += GHZ * (end - begin)
            if index >= room:
                continue
            begin_cycle, end_cycle = ((first_cycle + GHZ * t) % 2**32 for t in (begin, end))
            what = spent << 24 | (down << 23 | expert if expert >= 0 else 0x7FFFFF)
            where = block << 12 | tile if block >= 0 else 2**32 - 1
            at = HEAD + (track * room + index) * 2
            for word, low, high in ((at, begin_cycle, end_cycle), (at + 1, what, where)):
                cta[word] = (high << 32 | low) - (high >> 31 << 64)  # two's complement
    return trace


def enum(name: str) -> dict[str, int]:
    """An enum of the header: its names as Python spells them, without those that count."""
    found = re.search(rf"enum {name} : u32 \{{([^}}]*)\}};", HEADER)
    assert found
    names = re.findall(r"\bk(\w+)", re.sub(r"//[^\n]*", "", found.group(1)))[:-1]
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", n.removeprefix("Track")).upper(): i for i, n in enumerate(names)}


def test_names_are_those_of_the_header() -> None:
    assert enum("Moment") == dict(Moment.__members__)
    assert enum("Spent") == dict(Spent.__members__)
    assert enum("Track") == {name: track for name, track in Track.__members__.items() if name != "ALL"}
    assert (len(Moment) + len(Spent) + 2 + len(Track) - 1 + 1) // 2 * 2 == HEAD
    assert "constexpr u32 kTraceHead = (kTraceCounts + kTracks + 1) / 2 * 2, kEventWords = 2;" in HEADER
    assert "kNoExpert = 0x7fffff, kNoBlock = 0xffffffff" in HEADER


class Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("spent", "begin", "end")),
        *((name, ctypes.c_int32) for name in ("down", "expert", "block", "tile", "rows")),
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the stopwatch for the CPU")
def test_the_header_writes_what_is_decoded(tmp_path: Path) -> None:
    """trace.cuh itself, compiled for the CPU, leaves the words that these tests write by hand."""
    for name in ("memory", "thread", "flags"):  # their instructions stand in stopwatch.cpp
        (tmp_path / "megamoe/ptx").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"megamoe/ptx/{name}.cuh").touch()
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{tmp_path}"]
    source = Path(__file__).parent / "stopwatch/stopwatch.cpp"
    done = subprocess.run(
        [*command, f"-I{INCLUDE_ROOT}", str(source), "-o", str(tmp_path / "stopwatch.so")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = ctypes.CDLL(str(tmp_path / "stopwatch.so")).record
    for room in (8, 2):
        want = written(room=room)
        got = written([], room=room)  # moments and clocks
        first = 2**32 - 5000
        for cta in got:
            for track in [track for track in Track if track != Track.ALL]:
                steps = [
                    Step(
                        spent,
                        *((first + GHZ * ns) % 2**32 for ns in (begin, end)),
                        down,
                        expert,
                        block,
                        tile,
                        expert >= 0,
                    )
                    for at, spent, begin, end, down, expert, block, tile in WRITTEN
                    if at == track
                ]
                for writes in (0, 1):  # lanes that do not count leave nothing
                    head = record(
                        ctypes.c_void_p(cta.data_ptr()),
                        room,
                        int(track),
                        writes,
                        (Step * len(steps))(*steps),
                        len(steps),
                    )
                    assert head == HEAD
        # One of two roles alike stands for both in the sums.
        want[:, len(Moment) + Spent.MATH_UP] = GHZ * 2000
        assert torch.equal(got, want)
    short = written([], room=4)
    quick = [Step(Spent.MATH_UP, 10, 73, 0, 1, 1, 1, 1), Step(Spent.LOAD_EMPTY, 80, 900, 0, 1, 1, 1, 1)]
    record(ctypes.c_void_p(short.data_ptr()), 4, int(Track.LOAD), 1, (Step * 2)(*quick), 2)
    timeline = decode(short, rank=0)
    assert int(timeline.spent[0, Spent.MATH_UP]) == 63 and int(timeline.spent[0, Spent.LOAD_EMPTY]) == 820
    assert set(timeline.what[timeline.track == Track.LOAD].tolist()) == {What.AWAIT_HEADERS}  # from moments
    assert not timeline.dropped.any()


def test_words_become_events() -> None:
    timeline = decode(written(), rank=1)
    assert timeline.num_ctas == 2 and timeline.span_ns == (ORIGIN, ORIGIN + 10000)
    events = timeline.events([1])
    assert {e.rank for e in events} == {1} and {e.cta for e in events} == {1}
    assert len(events) == len(WRITTEN) + 5 and len(timeline.what) == 2 * len(events)
    down = next(e for e in events if e.what == What.GEMM_2)
    assert (down.track, down.expert, down.block, down.tile) == (Track.MATH, 3, 70000, 27)
    assert (down.begin_ns - ORIGIN, down.end_ns - ORIGIN) == (7500, 9000)  # across the wrap of the cycles
    assert [e.what for e in events if e.track == Track.LOAD] == [
        What.AWAIT_HEADERS, What.AWAIT_COPIES, What.AWAIT_TILES
    ]  # fmt: skip
    assert [e.what for e in events if e.track == Track.ALL] == [
        What.SORT, What.AWAIT_RESULTS, What.COMBINE
    ]  # fmt: skip
    push = next(e for e in events if e.track == Track.COPY_SECOND)
    assert (push.what, push.expert, push.block, push.tile) == (What.PUSH, -1, -1, -1)
    for track in Track:
        at = [(e.begin_ns, e.end_ns) for e in events if e.track == track]
        assert at == sorted(at) and all(one[1] <= other[0] for one, other in itertools.pairwise(at))
    assert int(timeline.spent[0, Spent.MATH_UP]) == GHZ * 4000 and not timeline.dropped.any()
    assert len(timeline.only([0]).what) == len(events)


def test_what_has_no_room_is_counted() -> None:
    timeline = decode(written(room=2), rank=0)
    assert timeline.dropped.tolist() == [[2, 0, 0, 0, 0, 0]] * 2
    assert shares(timeline).dropped == 4
    assert len(timeline.what) == 2 * (len(WRITTEN) - 2 + 5)
    assert len(decode(written([], room=0), rank=0).expert) == 2 * 5


def test_refusals_are_sentences() -> None:
    trace = empty(132, events=16, device="cpu")
    assert layout.room(trace, 132, CPU) == 16
    for wrong in (trace[:, 1:], trace.int(), trace[:5], torch.zeros(132, 20, dtype=torch.int64)):
        with pytest.raises(ValueError, match=rf"trace must be contiguous int64 \[132, {HEAD} \+ 12 \* events\] on cpu"):
            layout.room(wrong, 132, CPU)
    with pytest.raises(ValueError, match="CTA 0 of rank 3 has not written its end"):
        decode(trace, rank=3)
    late = written()
    late[1, Moment.END] += 2_000_000_000
    with pytest.raises(ValueError, match=r"took 2\.0 s: trace calls of less than 1 s"):
        decode(late, rank=0)


def test_ranks_get_one_clock() -> None:
    """Clocks that stand milliseconds apart, calls that begin at different times: told before heard, on every rank."""
    r = random.Random(0)
    offsets, begins = [0, 5_000_000, -70_000_000], [0, 2500, 900]
    told = max(begins) + MOMENTS[Moment.SORTED] + 1300
    timelines = []
    for rank, (offset, begin) in enumerate(zip(offsets, begins, strict=True)):
        trace = written(shift=offset + begin)
        for cta in trace:
            cta[Moment.TOLD_PLAN] = ORIGIN + offset + told + r.randint(500, 900)
            cta[Moment.PUSHED] = cta[Moment.TOLD_PLAN] - 100
            cta[Moment.MATH_DONE] = ORIGIN + offset + 20000 + r.randint(0, 300)
            cta[Moment.RESULTS_IN] = ORIGIN + offset + 22000 + r.randint(0, 300)
            cta[Moment.END] = ORIGIN + offset + 30000
        timelines.append(decode(trace, rank=rank))
    aligned = align(timelines, one_device=False)
    for t, begin in zip(aligned.timelines, begins, strict=True):
        assert abs(t.span_ns[0] - ORIGIN - begin) <= aligned.within_ns
    assert aligned.within_ns < 2500
    assert [t.span_ns for t in align(timelines, one_device=True).timelines] == [t.span_ns for t in timelines]
    assert align(timelines[:1], one_device=False).within_ns == 0


def test_shares_are_those_of_the_definitions() -> None:
    found = shares(decode(written(), rank=0))
    # Communication: 1000 to 4000 and on to 6000 (push), 9000 to 10000; math from 5000 to 9000.
    assert found.hidden == pytest.approx(1000 / 6000)
    # Remote: 1000 to 6000, 9000 to 9500; of it without math 1000 to 5000, 9000 to 9500.
    assert found.exposed_us == pytest.approx(4.5)
    # Awaited: headers from the end of the push to 4000, copies to 4800, results 9000 to 9500.
    assert found.awaited_us == pytest.approx(2.3)
    assert found.duration_us == pytest.approx(10)
    assert found.roles[Track.MATH] == pytest.approx(
        {What.PUSH: 0.2, What.AWAIT_STAGE: 0.1, What.GEMM_1: 0.2, What.EPILOGUE_1: 0.05, What.GEMM_2: 0.15}
    )
    assert found.roles[Track.ALL][What.SORT] == pytest.approx(0.1)


def test_casts_are_no_copies() -> None:
    """A copying warp's group of the second GEMM: it awaits tiles, and casts."""
    steps: list[Written] = [
        (Track.COPY_FIRST, Spent.COPY_PLACE, 5000, 5500, False, 0, 0, 0),
        (Track.COPY_FIRST, Spent.COPY_ROWS, 5500, 6000, False, 0, 0, 0),
        (Track.COPY_FIRST, Spent.COPY_PLACE, 6000, 6500, True, 3, 9, 0),
        (Track.COPY_FIRST, Spent.COPY_ROWS, 6500, 7000, True, 3, 9, 0),
    ]
    events = [e for e in decode(written(steps), rank=0).events([0]) if e.track == Track.COPY_FIRST]
    assert [e.what for e in events] == [What.AWAIT_PLACE, What.COPY, What.AWAIT_TILES, What.CAST]


def test_a_rehearsal_is_no_math() -> None:
    """It hides nothing: math idles for rows meanwhile."""
    rehearsal: Written = (Track.MATH, Spent.MATH_STORE_UP, 3200, 3900, False, -1, -1, -1)
    with_it, without = (shares(decode(written(events), rank=0)) for events in ([rehearsal, *WRITTEN], WRITTEN))
    assert with_it.roles[Track.MATH].pop(What.REHEARSAL) == pytest.approx(0.07)
    assert with_it == without


def brute(timeline: Timeline, some: torch.Tensor, other: torch.Tensor) -> tuple[int, int]:
    """Nanosecond by nanosecond."""
    alone = both = 0
    for cta in range(timeline.num_ctas):
        covered = torch.zeros(2, 10001, dtype=torch.bool)
        for row, mask in ((0, some), (1, other)):
            for i in ((timeline.cta == cta) & mask).nonzero()[:, 0].tolist():
                covered[row, int(timeline.begin_ns[i]) - ORIGIN : int(timeline.end_ns[i]) - ORIGIN] = True
        alone, both = alone + int(covered[0].sum()), both + int(covered.all(0).sum())
    return alone, both


@pytest.mark.parametrize("seed", range(5))
def test_overlap_of_any_events(seed: int) -> None:
    from megamoe.trace.shares import _together

    r = random.Random(seed)
    events: list[Written] = []
    for _ in range(40):
        begin = r.randint(0, 9999)
        track = r.choice([track for track in Track if track != Track.ALL])
        events.append((track, r.choice(list(Spent)[:5]), begin, r.randint(begin, 10000), False, 0, 0, 0))
    timeline = decode(written(events, room=64), rank=0)
    some, other = timeline.track < Track.LOAD, timeline.track >= Track.LEAD
    assert _together(timeline, some, other) == brute(timeline, some, other)


def test_files_open_again(tmp_path: Path) -> None:
    timelines = [decode(written(), rank=0), decode(written(shift=700), rank=1)]
    perfetto.save(tmp_path / "deep" / "trace.json", timelines, [1], case="flash8")
    content = json.loads((tmp_path / "deep" / "trace.json").read_text())
    assert content["otherData"] == {"case": "flash8"}
    drawn = [e for e in content["traceEvents"] if e["ph"] == "X"]
    assert len(drawn) == 2 * (len(WRITTEN) + 5) and {e["pid"] for e in drawn} == {0, 1}
    gemm = next(e for e in drawn if e["name"] == "gemm_2" and e["pid"] == 1)
    assert (gemm["ts"], gemm["dur"]) == (8.2, 1.5) and gemm["args"] == {"expert": 3, "block": 70000, "tile": 27}
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in content["traceEvents"] if e["name"] == "thread_name"}
    assert {named[e["pid"], e["tid"]] for e in drawn} >= {"CTA 1 math", "CTA 1 copy_second", "CTA 1 all"}
    figure.save(
        tmp_path / "a.png", timelines, [shares(t) for t in timelines], [(0, 0), (1, 1)], title="flash8", said="so"
    )
    assert (tmp_path / "a.png").stat().st_size > 20_000
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"):
        perfetto.save(tmp_path / "file" / "trace.json", timelines, [1])
