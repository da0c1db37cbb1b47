"""``Generator``: one rank's steps, each one call of the model, and ``run``, which keeps the ranks in step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megamoe.generate.kv import KvBatch, pad_left, positions_of
from megamoe.generate.requests import Request
from megamoe.generate.rows import RowBatch
from megamoe.generate.scheduler import Scheduler
from megamoe.lm.world import World


@dataclass(frozen=True)
class Record:
    """One step: what it was, how many tokens it read and how many requests it served, and its time on this rank."""

    kind: str
    tokens: int
    requests: int
    seconds: float


class Generator:
    """One rank's part.

    Args:
        model: a transformers language model in evaluation mode.
        scheduler: this rank's requests.
        make_cache: makes an empty ``DynamicCache``.
        idle: called instead of the model where this rank has nothing to do: lends its experts to the others.
        device: where tokens go.
        temperature: 0 takes the likeliest token; otherwise drawn, with a generator for each request so that a text
            does not depend on what else is in the batch.
        seed: of those generators.
        kv: caches of the running requests, none at first; default a ``KvBatch``.
        check: called after each step (when the device is done with it, unless this rank was idle); raises what the
            device reports.
    """

    def __init__(
        self,
        model: Any,
        scheduler: Scheduler,
        *,
        make_cache: Callable[[], Any],
        idle: Callable[[], None],
        device: torch.device,
        temperature: float = 0.0,
        seed: int = 0,
        kv: KvBatch | RowBatch | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.scheduler = scheduler
        self.kv = KvBatch() if kv is None else kv
        self._check = check
        self._make_cache = make_cache
        self._idle = idle
        self._device = device
        self._temperature = temperature
        self._seed = seed
        self._generators: dict[int, torch.Generator] = {}

    @torch.no_grad()
    def step(self) -> Record:
        """One step: read prompts, go on with what runs, or lend experts."""
        started = time.perf_counter()
        step = self.scheduler.next()
        tokens = 0
        if step.kind == "prefill":
            prompts = [r.prompt for r in step.requests]
            ids, mask = pad_left(prompts, self._device)
            cache = self._make_cache()
            logits = self.call(ids, mask, positions_of(mask), cache)
            tokens = sum(len(p) for p in prompts)
            self.kv.join(cache, mask, [len(p) for p in prompts])
        elif step.kind == "decode":
            logits = self.kv.decode(self.call, [r.last for r in step.requests])
            tokens = len(step.requests)
        else:
            self._idle()
        if step.kind != "idle":
            # Also waits for the device.
            chosen = self._choose(logits, step.requests)
        self._check()
        if step.kind != "idle":
            self.kv.keep(self.scheduler.record(step, chosen))
        return Record(step.kind, tokens, len(step.requests), time.perf_counter() - started)

    @torch.no_grad()
    def call(self, ids: torch.Tensor, mask: Any, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits [B, vocabulary] of each row's last token."""
        result = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = result.logits[:, -1]
        return logits

    def _choose(self, logits: torch.Tensor, requests: tuple[Request, ...]) -> list[int]:
        if self._temperature == 0:
            return [int(t) for t in logits.argmax(-1).tolist()]
        p = (logits.float() / self._temperature).softmax(-1).cpu()
        return [int(torch.multinomial(row, 1, generator=self._of(r))) for row, r in zip(p, requests, strict=True)]

    def _of(self, request: Request) -> torch.Generator:
        if request.id not in self._generators:
            self._generators[request.id] = torch.Generator().manual_seed(self._seed * 1_000_003 + request.id)
        return self._generators[request.id]


def run(
    generator: Generator, world: World, *, agree_every: int = 8, watch: Callable[[Record], None] = lambda _: None
) -> list[Record]:
    """Step until no rank has a request left; every rank makes the same number of steps.

    Whether anyone has is asked ``agree_every`` steps apart, over the CPU, so that up to ``agree_every - 1`` idle steps
    come last.
    """
    records: list[Record] = []
    while _someone(generator.scheduler.pending, world):
        for _ in range(agree_every):
            if world.size == 1 and not generator.scheduler.pending:
                break
            records.append(generator.step())
            watch(records[-1])
    return records


def _someone(pending: bool, world: World) -> bool:
    return bool(world.sum(torch.tensor([int(pending)], device="cpu"), "asking who has requests left").item())
