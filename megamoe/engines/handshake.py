"""One small exchange before each call: do all ranks want the same, did any refuse, who sends how many rows where.

Every rank sends every other a header of fixed length, so bad arguments on one rank never leave the others waiting: all
of them raise, and the next call finds them in step. It is also the only point where ``staged`` waits for the device.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from megamoe.dispatch.plan import SendPlan
from megamoe.engines import liveness
from megamoe.engines.base import Traffic
from megamoe.engines.wire import Wire
from megamoe.errors import RankMismatchError
from megamoe.symm_mem import agree

_MAGIC = 0x6D6567616D6F6501  # "megamoe", then the layout's version
_FIELDS = ("magic", "fingerprint", "refused", "engines", "host", "pid", "life", "rows", "routes")
_AT = {name: i for i, name in enumerate(_FIELDS)}
PHASE = "handshake"
WORKSPACE = 1 << 16
"""Beside the engines' bits: this rank has a sound workspace of the engine mega for the call."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What has to be equal on all ranks, and the engines this rank can offer as bits."""

    terms: dict[str, str]  # "problem" is JSON
    engines: int  # and WORKSPACE

    def fingerprint(self) -> int:
        """63 bits of ``terms``."""
        digest = hashlib.blake2b(json.dumps(self.terms, sort_keys=True).encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 1


def shake(wire: Wire, wish: Wish | None, plan: SendPlan | None, error: Exception | None) -> tuple[Traffic, int]:
    """(traffic of this call, engines that every rank offers).

    Args:
        wire: the group's collectives.
        wish: None if this rank refused the call before it knew.
        plan: what this rank wants to send; None likewise. An index out of range, which only the device knows so far,
            counts as a refusal.
        error: why this rank refuses, if it does.

    Raises:
        ``error`` itself, or the plan's ValueError.
        RankMismatchError: the ranks want different things, or another rank refused; says which and why.
    """
    R = wire.size
    counts = torch.zeros(2 * R + 2, dtype=torch.int64, device="cpu")
    counts[2 * R] = -1
    if plan is not None:
        counts = torch.cat([plan.dst_counts, plan.slot_counts.sum(1), plan.bad_first])
    counts = counts.to(wire.host_device)  # the one wait for the device, if the header goes over the CPU
    own = [
        _MAGIC,
        wish.fingerprint() if wish else 0,
        int(error is not None),
        wish.engines if wish else 0,
        *liveness.own_process(),
        0,  # rows and routes: filled in below
        0,
    ]
    header = torch.tensor(own, device="cpu").repeat(R, 1).to(wire.host_device, non_blocking=True)
    header[:, _AT["refused"]] |= counts[2 * R] >= 0
    header[:, _AT["rows"]] = counts[:R]
    header[:, _AT["routes"]] = counts[R : 2 * R]
    got = wire.host_exchange(header, PHASE)
    flat = torch.cat([got.flatten(), counts]).tolist()  # the one wait for the device, if it goes over NCCL
    headers = [dict(zip(_FIELDS, flat[r * len(_FIELDS) :], strict=False)) for r in range(R)]
    if wire.group is not None:
        liveness.remember(wire.group, [liveness.Process(h["host"], h["pid"], h["life"]) for h in headers])

    if error is None and plan is not None and flat[-2] >= 0:
        error = _error_of(plan)
    agree = all(h["magic"] == _MAGIC and h["fingerprint"] == headers[0]["fingerprint"] for h in headers)
    if not agree or any(h["refused"] for h in headers):
        _refuse(wire, wish, error)
    engines = -1
    for h in headers:
        engines &= h["engines"]
    send = flat[-(2 * R + 2) :]
    traffic = Traffic(
        send_rows=send[:R],
        recv_rows=[h["rows"] for h in headers],
        recv_routes=sum(h["routes"] for h in headers),
        workspaces=bool(engines & WORKSPACE),
    )
    return traffic, engines


def _error_of(plan: SendPlan) -> ValueError | None:
    try:
        plan.check()
    except ValueError as error:
        return error
    return None


def _refuse(wire: Wire, wish: Wish | None, error: Exception | None) -> NoReturn:
    """All ranks are here: tell one another why, then raise."""
    terms: dict[str, Any] = dict(wish.terms) if wish else {}
    if wish:
        terms |= json.loads(terms.pop("problem"))
    mine = {"error": str(error) if error else None, "terms": terms}
    theirs = agree.gather(wire.group, mine, "telling why a call is refused")
    if error is not None:
        raise error
    refused = [f"rank {r} refused the call: {t['error']}" for r, t in enumerate(theirs) if t["error"]]
    if refused:
        raise RankMismatchError("; ".join(refused))
    raise RankMismatchError(f"the ranks of the group asked for different things: {_differences(theirs)}")


def _differences(theirs: list[dict[str, Any]]) -> str:
    terms = [_flatten(t["terms"]) for t in theirs]
    names = sorted({name for t in terms for name in t})
    parts = []
    for name in names:
        values = [t.get(name) for t in terms]
        if any(v != values[0] for v in values):
            parts.append(f"{name} = " + ", ".join(f"{v!r} on rank {r}" for r, v in enumerate(values)))
    return "; ".join(parts)


def _flatten(terms: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in terms.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
