"""``Request``: one prompt and what becomes of it; a workload of requests of different lengths."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(kw_only=True, eq=False)
class Request:
    """One prompt to continue.

    Args:
        id: its number in the whole workload, over all ranks.
        prompt: token ids, at least one.
        max_new_tokens: it ends after so many tokens, or at a token that stops.
    """

    id: int
    prompt: list[int]
    max_new_tokens: int
    output: list[int] = field(default_factory=list)
    stopped: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"request {self.id} has an empty prompt: at least one token is needed to go on from")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens of request {self.id} must be at least 1, got {self.max_new_tokens}")

    @property
    def done(self) -> bool:
        """Whether nothing more is to come."""
        return self.stopped or len(self.output) >= self.max_new_tokens

    @property
    def last(self) -> int:
        """The token to go on from."""
        return self.output[-1] if self.output else self.prompt[-1]


def workload(count: int, *, prompt_length: int, new_tokens: int, vocabulary: int, seed: int) -> list[Request]:
    """``count`` requests of random tokens, lengths drawn evenly from half to one and a half times the given ones."""
    generator = torch.Generator().manual_seed(seed)

    def around(mean: int) -> int:
        low, high = max(1, mean - mean // 2), mean + mean // 2
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    return [
        Request(
            id=i,
            prompt=torch.randint(vocabulary, (around(prompt_length),), generator=generator).tolist(),
            max_new_tokens=around(new_tokens),
        )
        for i in range(count)
    ]
