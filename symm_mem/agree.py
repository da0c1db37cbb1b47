"""Small agreements among the ranks of a group, on the host.

They travel through the key-value store that every torch.distributed group has, not through collectives: the same code
serves gloo and NCCL, no GPU waits, a wait ends after ``MEGAMOE_TIMEOUT_S``, and it can be said WHICH rank did not come.
They cost some round trips to the store (about a millisecond), so they belong to set-up and checks, not to inner loops.

Each is a collective: every rank of the group calls it, in the same order. ``group`` None is a single rank.
Ranks are counted within the group.
"""

from __future__ import annotations

import base64
import datetime
import pickle
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from megamoe import env
from megamoe.errors import PeerTimeout, RankMismatchError


def gather(group: dist.ProcessGroup | None, value: Any, what: str) -> list[Any]:
    """``value`` of every rank, by rank; anything that can be pickled. ``what`` names the wait in a PeerTimeout.

    Raises:
        PeerTimeout: ranks that did not come within ``MEGAMOE_TIMEOUT_S``, or the store is gone.
    """
    if group is None:
        return [value]
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a torch.distributed group that this process is a member of, got {group!r}")
    if group not in _channels:
        _channels[group] = _Channel(group)
    return _channels[group].gather(value, what)


def barrier(group: dist.ProcessGroup | None, what: str) -> None:
    """Return once every rank has come here; raises PeerTimeout as ``gather`` does."""
    gather(group, None, what)


def all_equal(group: dist.ProcessGroup | None, what: str, value: Any) -> None:
    """Raise RankMismatchError on EVERY rank, naming ranks and values, unless ``value`` is equal on all of them.

    Values of several lines are shown without the lines that all ranks have in common.
    """
    values = gather(group, value, what)
    if all(v == values[0] for v in values):
        return
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(_differing_lines([v if isinstance(v, str) else repr(v) for v in values])):
        ranks_of.setdefault(text, []).append(rank)
    told = "; ".join(f"{rank_list(ranks)}: {text}" for text, ranks in ranks_of.items())
    raise RankMismatchError(f"{what} must be equal on all {len(values)} ranks, got {told}")


def first_problem(group: dist.ProcessGroup | None, message: str | None, kind: type[Exception] = ValueError) -> None:
    """If any rank brings a ``message``, raise ``kind`` with it on EVERY rank; the lowest such rank is quoted.

    A rank that has nothing to complain about passes None and still raises if another does: so no rank goes on alone
    into a collective that the others have left.
    """
    messages = gather(group, message, "the check of the arguments")
    bad = [rank for rank, m in enumerate(messages) if m is not None]
    if not bad:
        return
    first = messages[bad[0]]
    if len(bad) == len(messages) and all(m == first for m in messages):
        raise kind(first)
    also = f" ({rank_list(bad[1:])} failed too)" if bad[1:] else ""
    raise kind(f"rank {bad[0]} of {len(messages)}: {first}{also}")


def rank_list(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0, 2``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _differing_lines(texts: list[str]) -> list[str]:
    common = set.intersection(*(set(t.splitlines()) for t in texts))
    cut = [
        "; ".join(" ".join(ln.split()) for ln in t.splitlines() if ln not in common) or "nothing more" for t in texts
    ]
    # Lines in another order, or repeated, leave nothing to show: then show all.
    return cut if len(set(cut)) > 1 else [repr(t) for t in texts]


class _Channel:
    """Numbered exchanges over one group's store: exchange n of rank r stands at ``.../n/r``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._rank, self._size = group.rank(), group.size()
        # A connection of its own: a blocking wait would hold up whoever else in the process uses the store.
        store: Any = _get_process_group_store(group)  # the stubs lack clone()
        self._store = store.clone()
        # A store outlives destroy_process_group; its counter tells the second life of a group's name from the first.
        life = (self._store.add("megamoe/agree/lives", 1) - 1) // self._size
        self._prefix = f"megamoe/agree/{life}"
        self._count = 0

    def gather(self, value: Any, what: str) -> list[Any]:
        count, self._count = self._count, self._count + 1
        keys = [f"{self._prefix}/{count}/{rank}" for rank in range(self._size)]
        timeout_s = env.get("MEGAMOE_TIMEOUT_S")
        try:
            self._store.set(keys[self._rank], base64.b64encode(pickle.dumps(value)).decode())
            try:
                self._store.wait(keys, datetime.timedelta(seconds=timeout_s))
            except RuntimeError:
                absent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                if not absent:
                    raise
                raise PeerTimeout(
                    f"rank {self._rank} of {self._size} waited {timeout_s:g} s (MEGAMOE_TIMEOUT_S) for "
                    f"{rank_list(absent)} at {what}"
                ) from None
            answers = [pickle.loads(base64.b64decode(data)) for data in self._store.multi_get(keys)]
            # All ranks have reached this exchange, hence have read the one before: it can go.
            if count:
                self._store.delete_key(f"{self._prefix}/{count - 1}/{self._rank}")
        except dist.DistNetworkError as error:
            where = f"rank {self._rank} of {self._size} at {what}"
            raise PeerTimeout(f"{where}: the process that keeps the group's store is gone ({error})") from None
        return answers


_channels: WeakKeyDictionary[dist.ProcessGroup, _Channel] = WeakKeyDictionary()
