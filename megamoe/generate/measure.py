"""From the records of all ranks to the figures of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from megamoe.generate.loop import Record
from megamoe.lm.world import World


@dataclass(frozen=True)
class Figures:
    """One run over all ranks; latencies are of the rank whose median is slowest, over its decode steps.

    ``tokens_per_second`` counts new tokens over the whole run, prompts' time included; ``decode_rows`` is the mean
    number of requests of a decode step on a rank. Latencies are None where no rank decoded.
    """

    requests: int
    new_tokens: int
    prompt_tokens: int
    seconds: float
    tokens_per_second: float
    steps: int
    decode_steps: int
    idle_steps: int
    decode_rows: float | None
    us: float | None
    us_p90: float | None
    us_p99: float | None
    prefill_tokens_per_second: float | None


def summarise(records: list[Record], seconds: float, world: World) -> Figures:
    """The same figures on every rank; a collective."""
    parts = [
        json.loads(text)
        for text in world.gather_text(json.dumps([[asdict(r) for r in records], seconds]), "gathering figures")
    ]
    ranks = [[Record(**r) for r in part] for part, _ in parts]
    everything = [r for rank in ranks for r in rank]
    decodes = [[r.seconds for r in rank if r.kind == "decode"] for rank in ranks]
    slowest = max((d for d in decodes if d), key=np.median, default=[])
    p50, p90, p99 = (1e6 * np.percentile(slowest, (50, 90, 99))).tolist() if slowest else (None, None, None)
    prefills = [r for r in everything if r.kind == "prefill"]
    prompt_tokens = sum(r.tokens for r in prefills)
    rows = [r.requests for r in everything if r.kind == "decode"]
    new_tokens = sum(r.requests for r in everything)
    whole = max(part_seconds for _, part_seconds in parts)
    return Figures(
        requests=sum(r.requests for r in prefills),
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        seconds=whole,
        tokens_per_second=new_tokens / whole,
        steps=len(records),
        decode_steps=sum(len(d) for d in decodes),
        idle_steps=sum(r.kind == "idle" for r in everything),
        decode_rows=sum(rows) / len(rows) if rows else None,
        us=p50,
        us_p90=p90,
        us_p99=p99,
        prefill_tokens_per_second=prompt_tokens / sum(r.seconds for r in prefills) * world.size if prefills else None,
    )
