"""``DirectExperts``: a model's experts straight through the mega-kernel, without the handshake before each call.

Nothing waits for the device, so a step of the model can be captured in a CUDA graph. The price: arguments are checked
on this rank alone, and a rank that makes fewer calls than the others is found by their waits (``PeerTimeout``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from megamoe.adapters.transformers.experts import Settings, expert_weights, problem_of, state_of
from megamoe.adapters.transformers.forms import is_experts
from megamoe.adapters.transformers.parallel import top_k_of
from megamoe.engines.choose import best, explain_engines, offered
from megamoe.engines.mega_workspaces import as_read
from megamoe.errors import EngineUnavailableError
from megamoe.prepared import PreparedWeights
from megamoe.problem import Problem

if TYPE_CHECKING:
    from megamoe.mega.runner import MegaRunner


def why_not_direct(
    model: nn.Module, group: dist.ProcessGroup | None, device: torch.device, settings: Settings
) -> str | None:
    """None if this rank could run the experts of ``model`` so, else a sentence. Asks no other rank."""
    modules = [m for m in model.modules() if is_experts(m)]
    if not modules:
        return f"{type(model).__name__} holds no experts that transformers runs through its experts interface"
    problem = _problem(modules[0], group, settings)
    try:
        taken = best(offered(settings.engine, problem, device, group)).name
    except EngineUnavailableError as error:
        return str(error)
    if taken == "mega":
        return None
    reason = dict(explain_engines(problem, device, group))["mega"]
    return reason or f"the engine {taken} is chosen, and only mega runs without the host"


class DirectExperts:
    """The experts modules of ``model``, which are this rank's part, on one workspace for each of their shapes.

    Collective: every rank of ``group`` makes it, and then calls the model (or lends experts) equally often.

    Args:
        model: without gradients; weights count as they are now, quantised ones are kept beside the model's.
        group: the ranks; None: this one alone.
        settings: recipe and bound on the tokens of one rank in one call.

    Raises:
        ValueError: a problem that the kernel can't do, or memory that can't be had, on every rank.
    """

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup | None, device: torch.device, settings: Settings
    ) -> None:
        from megamoe.mega.runner import MegaRunner

        self._runners: dict[Problem, MegaRunner] = {}
        self._count: torch.Tensor | None = None
        self._calls: list[tuple[Any, Any]] = []
        for module in (m for m in model.modules() if is_experts(m)):
            problem = _problem(module, group, settings)
            if problem not in self._runners:
                self._runners[problem] = MegaRunner.create(problem, device=device, group=group)
            with torch.no_grad():
                weights = expert_weights(module)
                made = as_read(weights) if problem.recipe == "bf16" else PreparedWeights.from_float(weights, problem)
            self._calls.append((module, functools.partial(self._call, self._runners[problem], made)))

    def install(self) -> None:
        """Have the modules run so, until their ``forward`` is deleted."""
        for module, call in self._calls:
            module.forward = call

    @contextmanager
    def counting(self, count: torch.Tensor) -> Iterator[None]:
        """Inside, only the first ``count`` tokens of a call go to experts, and y of the others is 0.

        ``count``: int32 [1] on the device, read when the call (or the graph that captured it) runs.
        """
        self._count = count
        try:
            yield
        finally:
            self._count = None

    def check(self) -> None:
        """Raise what the device has reported; after a synchronisation, of all calls so far.

        Raises:
            PeerTimeout: another rank did not come; the workspaces are then of no more use.
        """
        for runner in self._runners.values():
            runner.check()

    def close(self) -> None:
        """Give the workspaces' memory back."""
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
        self._calls.clear()

    def _call(
        self,
        runner: MegaRunner,
        weights: PreparedWeights,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        rows = x.to(torch.bfloat16).contiguous()
        y = runner.forward(
            rows,
            top_k_index.masked_fill(top_k_index == runner.problem.num_experts, -1),
            top_k_weights.float().contiguous(),
            weights,
            out=None if self._count is None else torch.zeros_like(rows),
            num_tokens=self._count,
        )
        return y.to(x.dtype)


def _problem(module: nn.Module, group: dist.ProcessGroup | None, settings: Settings) -> Problem:
    return problem_of(
        module,
        settings,
        ranks=1 if group is None else group.size(),
        top_k=top_k_of(module),
        dtype=getattr(module, state_of(module).form.up).dtype,
        max_tokens=settings.max_tokens,
    )
