"""A timeline as Chrome's trace events, which Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

Format: "Trace Event Format" (https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU),
complete events ("X") with times in microseconds. A rank is a process, a role of a CTA a thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megamoe.mega.trace import Timeline, Track


def trace_events(timelines: Sequence[Timeline], ctas: Iterable[int]) -> list[dict[str, Any]]:
    """Events of some CTAs of every rank; 0 is when the first CTA of all began."""
    origin, chosen = min(t.span_ns[0] for t in timelines), sorted(set(ctas))
    found: list[dict[str, Any]] = []
    for t in timelines:
        found.append(_named("process_name", t.rank, 0, f"rank {t.rank}"))
        for cta in chosen:
            for track in Track:
                found.append(_named("thread_name", t.rank, _thread(cta, track), f"CTA {cta} {track.name.lower()}"))
        for e in t.events(chosen):
            args = {name: getattr(e, name) for name in ("expert", "block", "tile") if getattr(e, name) >= 0}
            found.append(
                {
                    "ph": "X",
                    "name": e.what.name.lower(),
                    "cat": "wait" if e.what.name.startswith("AWAIT") else "work",
                    "pid": e.rank,
                    "tid": _thread(e.cta, e.track),
                    "ts": (e.begin_ns - origin) / 1e3,
                    "dur": (e.end_ns - e.begin_ns) / 1e3,
                    "args": args,
                }
            )
    return found


def save(path: Path, timelines: Sequence[Timeline], ctas: Iterable[int], **about: Any) -> None:
    """Write them to ``path``; ``about`` stands beside the events. Raises ValueError if it cannot be written."""
    content = {"traceEvents": trace_events(timelines, ctas), "displayTimeUnit": "ns", "otherData": about}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def _thread(cta: int, track: Track) -> int:
    # Threads are shown by number: a CTA's as a whole first.
    return cta * len(Track) + (track + 1) % len(Track)


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
