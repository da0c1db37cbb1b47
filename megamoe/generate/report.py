"""``Report``: the runs of a call, told and kept as rows of benchmark "generate" as soon as each is over."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from megamoe.bench import results
from megamoe.engines.choose import taken
from megamoe.generate.console import Console
from megamoe.generate.measure import Figures
from megamoe.generate.options import Options
from megamoe.lm.world import World
from megamoe.problem import Recipe

Run = tuple[str, int, Figures]  # who ran the experts, batch, figures


class Report:
    """One rank's; rank 0 alone speaks and writes. Making it is collective.

    Args:
        graphs: whether our decode steps are captured.

    Raises:
        ValueError: results are wanted and the commit is not known, on every rank.
    """

    def __init__(
        self, options: Options, loaded: Any, world: World, console: Console, command: str, *, graphs: bool
    ) -> None:
        self._options, self._loaded, self._world, self._console, self._graphs = options, loaded, world, console, graphs
        self._origin: results.Row | None = None
        self.runs: list[Run] = []
        if options.results:
            from megamoe.adapters.transformers.models import version

            self._origin = world.together(
                lambda: results.provenance(command, commit=options.commit or None), "asking which commit is measured"
            )
            self._origin["versions"]["peers"] = {"transformers": version()}

    def add(self, name: str, batch: int, warm_up_s: float, figures: Figures) -> None:
        """A run that is over; rows are written anew, so that a call which ends early leaves what it had."""
        self.runs.append((name, batch, figures))
        self._console.ran(name, batch, warm_up_s, figures)
        if self._origin is not None and self._world.rank == 0:
            results.save(Path(self._options.results), "generate", self._rows(self._origin), machine=self._world.machine)

    def close(self) -> None:
        """All runs side by side, and where rows went."""
        self._console.figures(self.runs)
        if self._origin is not None:
            path = results.path_of(Path(self._options.results), "generate", self._world.machine)
            self._console.say(f"written: {path}")

    def _rows(self, origin: results.Row) -> list[results.Row]:
        """One for each run; "tokens" is the batch of a rank. Ours carry the others of their batch as peers.

        Latencies ``us`` are those of a decode step; the figures' other names as in ``Figures``. ``new_tokens_each`` is
        what a request asks for (random ones: in the mean): short texts join and leave more often, and read prompts
        for a larger part of their time, so rows of another length stand beside these, not in their place.
        """
        peer = f"transformers-{origin['versions']['peers']['transformers']}"
        world, recipe = self._world, cast(Recipe, self._recipe)
        out = []
        for name, batch, figures in self.runs:
            row = asdict(figures) | origin
            row |= {"model": self._loaded.name, "world_size": world.size, "tokens": batch}
            row |= {"new_tokens_each": self._options.new_tokens, "warm_up": self._options.warm_up}
            if name == "megamoe":
                engine = taken(self._options.engine, recipe, world.device, world.group)
                row |= {"engine": engine, "recipe": recipe, "graphs": self._graphs}
                others = {n: f.us for n, b, f in self.runs if b == batch and n != name and f.us is not None}
                row["peers"] = {f"{peer}:{n}": us for n, us in others.items()}
            else:
                row |= {"engine": name, "recipe": self._dtype}
            out.append(row)
        return out

    @property
    def _dtype(self) -> str:
        return "fp32" if next(self._loaded.model.parameters()).dtype == torch.float32 else "bf16"

    @property
    def _recipe(self) -> str:
        return self._dtype if self._options.recipe == "auto" else self._options.recipe
