"""One case on one engine, ready to be called with any number of tokens: weights, inputs, workspace of the ranks here.

A process holds one rank, or all of them as virtual ranks that share a GPU, each on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

import torch
import torch.distributed as dist

from megamoe.bench.moe_data import Experts, Tokens
from megamoe.functional import mega_moe
from megamoe.mega.runner import MegaRunner
from megamoe.problem import Problem
from megamoe.testing.mega_activations import Activations, kernel_activations
from megamoe.testing.mega_twin import BOUNDS

Call = Callable[[], list[torch.Tensor]]


class Session(Protocol):
    """What the benchmark asks of an engine. Lists hold one element a rank of this process."""

    problem: Problem
    experts: Experts
    ranks: list[int]
    slots: int
    inputs: list[Tokens]
    bounds: tuple[float, float]
    """How far y may be from the reference (testing/numerics.py): as a whole, and in a row."""

    def call(self, tokens: int, outs: list[torch.Tensor] | None = None) -> Call:
        """A function that queues one forward of every rank here, on the current stream, and returns the ys."""
        ...

    def activations(self, rank: int, at: torch.Tensor, topk_idx: torch.Tensor) -> Activations | None:
        """What the last call's second GEMM read for tokens ``at`` of ``rank``; None if the engine can't tell."""
        ...

    def check(self) -> None:
        """Raise what a call that is complete has reported."""
        ...

    def close(self) -> None:
        """Give memory back; collective."""
        ...


class Mega:
    """The mega-kernel, called as an engine calls it."""

    def __init__(
        self,
        problem: Problem,
        *,
        device: torch.device,
        group: dist.ProcessGroup | None,
        virtual: bool,
        sms: int | None,
        partial_sums: bool | None = None,
    ) -> None:
        self.problem, self.bounds = problem, BOUNDS[problem.accumulate]
        rank = 0 if group is None else group.rank()
        self.ranks = list(range(problem.world_size)) if virtual else [rank]
        if virtual:
            self.runners = MegaRunner.virtual(problem, device=device, num_sms=sms, partial_sums=partial_sums)
        else:
            made = MegaRunner.create(problem, device=device, group=group, num_sms=sms, partial_sums=partial_sums)
            self.runners = [made]
        self.slots = self.runners[0].slots
        self.experts = Experts(problem, device)
        self.weights = [self.experts.prepared(range(r * self.slots, (r + 1) * self.slots)) for r in self.ranks]
        self.inputs = [Tokens.make(problem, r, device) for r in self.ranks]
        # A rank alone stays on the caller's stream: nothing but its kernel stands between the timer's events.
        self._streams = [torch.cuda.Stream(device) for _ in self.ranks] if virtual else []  # type: ignore[no-untyped-call]

    def call(
        self, tokens: int, outs: list[torch.Tensor] | None = None, traces: list[torch.Tensor] | None = None
    ) -> Call:
        """See ``Session.call``; ``traces`` (megamoe.mega.trace.empty, one a rank here) take down what is done when."""
        given = [i.first(tokens) for i in self.inputs]
        ys = outs or [torch.empty_like(i.x) for i in given]

        def one(i: int) -> torch.Tensor:
            x, idx, weights = given[i].x, given[i].topk_idx, given[i].topk_weights
            trace = None if traces is None else traces[i]
            return self.runners[i].forward(x, idx, weights, self.weights[i], out=ys[i], trace=trace)

        def run() -> list[torch.Tensor]:
            if not self._streams:
                return [one(0)]
            main = torch.cuda.current_stream()
            for i, stream in enumerate(self._streams):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    one(i)
            for stream in self._streams:
                main.wait_stream(stream)
            return ys

        return run

    def activations(self, rank: int, at: torch.Tensor, topk_idx: torch.Tensor) -> Activations | None:
        """From every owner's workspace."""
        runner = self.runners[self.ranks.index(rank)]
        views = [runner.buffer.peer(r) for r in range(self.problem.world_size)]
        return kernel_activations(views, runner.workspace, rank, at, topk_idx)

    def check(self) -> None:
        """Raise what a wait that expired has told."""
        for runner in self.runners:
            runner.check()

    def close(self) -> None:
        """See ``Session.close``."""
        with ExitStack() as stack:
            for runner in self.runners:
                stack.callback(runner.close)


class EngineCalls:
    """The engine ``staged`` or ``reference`` through the layer's door, its host's work included."""

    def __init__(self, problem: Problem, *, engine: str, device: torch.device, group: dist.ProcessGroup | None) -> None:
        if problem.recipe != "bf16":
            raise ValueError(f"the engine {engine} is timed in bf16, as its weights are, not in {problem.recipe}")
        self.problem, self._engine, self._group = problem, engine, group
        self.bounds = BOUNDS[problem.accumulate]
        rank = 0 if group is None else group.rank()
        self.ranks = [rank]
        if problem.num_experts % problem.world_size:
            raise ValueError(f"{problem.num_experts} experts can't be spread evenly over {problem.world_size} ranks")
        self.slots = problem.num_experts // problem.world_size
        self.experts = Experts(problem, device)
        self._weights = self.experts.weights(range(rank * self.slots, (rank + 1) * self.slots))
        self.inputs = [Tokens.make(problem, rank, device)]

    def call(self, tokens: int, outs: list[torch.Tensor] | None = None) -> Call:
        """See ``Session.call``; ``outs`` stay as they are, as this engine makes its own."""
        given = self.inputs[0].first(tokens)
        group = "self" if self._group is None else self._group

        def run() -> list[torch.Tensor]:
            x, idx, weights = given.x, given.topk_idx, given.topk_weights
            return [
                mega_moe(x, idx, weights, self._weights, problem=self.problem, group=group, engine=self._engine)  # type: ignore[arg-type]
            ]

        return run

    def activations(self, rank: int, at: torch.Tensor, topk_idx: torch.Tensor) -> Activations | None:
        """None: these engines keep none."""
        return None

    def check(self) -> None:
        """Nothing to ask: they raise at once."""

    def close(self) -> None:
        """Nothing to give back but tensors."""
