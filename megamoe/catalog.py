"""Which kernels a Problem can need: what ``megamoe cache precompile`` compiles and CI sweeps.

Each provider is a module with ``cases_for(problem) -> Iterable[Case]``: the kernels that its heuristics can choose for
the problem, for any number of tokens up to ``max_tokens``, with what its machine code must hold and may spill.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Protocol, cast

from megamoe.kernels.jit.sweep import Case
from megamoe.problem import Problem


class Provider(Protocol):
    """A module of ``PROVIDERS``."""

    def cases_for(self, problem: Problem, /) -> Iterable[Case]:
        """Kernels for ``problem``; none if the recipe is not the provider's."""
        ...


PROVIDERS: tuple[str, ...] = ("megamoe.engines.grouped_kernels", "megamoe.mega.kernels")


def cases_for(problem: Problem) -> list[Case]:
    """Every kernel that ``problem`` can need, each once."""
    modules = [cast(Provider, importlib.import_module(name)) for name in PROVIDERS]
    return list(dict.fromkeys(case for module in modules for case in module.cases_for(problem)))
