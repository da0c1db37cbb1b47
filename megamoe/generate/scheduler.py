"""``Scheduler``: which requests one rank works on in its next step. No tensors, no model.

Continuous batching (Orca, OSDI 2022): after every step finished requests leave, and waiting ones take their rows. A
step is one call of the model: either the prompts of those that join, or one more token for all that run. Joining comes
first, so that rows do not stay empty; in order of arrival, so that no request waits for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megamoe.generate.requests import Request


@dataclass(frozen=True)
class Step:
    """``prefill``: read the prompts of ``requests``; ``decode``: one token for each; ``idle``: nothing to do."""

    kind: Literal["prefill", "decode", "idle"]
    requests: tuple[Request, ...] = ()


class Scheduler:
    """One rank's requests.

    Args:
        max_rows: requests that run at a time.
        max_prefill_tokens: bound on rows times the longest prompt of one prefill; a longer prompt goes alone.
        stop: token ids that end a request; they are part of its output.

    Attributes:
        running: requests in the order of their rows in the cache.
    """

    def __init__(
        self,
        requests: Iterable[Request] = (),
        *,
        max_rows: int,
        max_prefill_tokens: int = 8192,
        stop: Iterable[int] = (),
    ) -> None:
        if max_rows < 1 or max_prefill_tokens < 1:
            raise ValueError(
                f"max_rows and max_prefill_tokens must be at least 1, got {max_rows} and {max_prefill_tokens}"
            )
        self.max_rows = max_rows
        self.max_prefill_tokens = max_prefill_tokens
        self.stop = frozenset(stop)
        self.waiting: deque[Request] = deque(requests)
        self.running: list[Request] = []
        self.finished: list[Request] = []

    def add(self, request: Request) -> None:
        """Have it wait for its turn."""
        self.waiting.append(request)

    @property
    def pending(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def next(self) -> Step:
        """What to do now; requests of a prefill are no longer waiting, and run once ``record`` has their tokens."""
        joining: list[Request] = []
        longest = 0
        while self.waiting and len(self.running) + len(joining) < self.max_rows:
            longest = max(longest, len(self.waiting[0].prompt))
            if joining and longest * (len(joining) + 1) > self.max_prefill_tokens:
                break
            joining.append(self.waiting.popleft())
        if joining:
            return Step("prefill", tuple(joining))
        return Step("decode", tuple(self.running)) if self.running else Step("idle")

    def record(self, step: Step, tokens: Sequence[int]) -> list[int]:
        """Take the new token of each of ``step.requests``.

        Returns:
            Rows that stay, ascending: places in what ``running`` was, those that have just joined behind it.
        """
        assert len(tokens) == len(step.requests)
        rows = self.running + (list(step.requests) if step.kind == "prefill" else [])
        for request, token in zip(step.requests, tokens, strict=True):
            request.output.append(token)
            request.stopped = token in self.stop
        stay = [row for row, request in enumerate(rows) if not request.done]
        self.finished += [request for request in rows if request.done]
        self.running = [rows[row] for row in stay]
        return stay
