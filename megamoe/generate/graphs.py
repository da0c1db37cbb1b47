"""Whether decode steps can be CUDA graphs, and what they need: experts without a handshake, caches of fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megamoe.generate.options import Options
from megamoe.generate.rows import RowBatch
from megamoe.lm.world import World

if TYPE_CHECKING:
    from megamoe.adapters.transformers.direct import DirectExperts
    from megamoe.adapters.transformers.experts import Settings

_COLUMNS = 16  # caches hold a multiple: masks whose rows are aligned have faster attention


@dataclass(frozen=True)
class Captured:
    """A model whose decode steps can be captured; ``width``: tokens that a request may have, prompt and answer."""

    model: Any
    direct: DirectExperts
    device: torch.device
    width: int

    def rows(self, max_rows: int) -> RowBatch:
        """Caches for so many requests at a time."""
        from megamoe.adapters.transformers.row_cache import make_row_cache, row_mask

        config = self.model.config.get_text_config()
        return RowBatch(
            max_rows=max_rows,
            device=self.device,
            make_cache=lambda columns: make_row_cache(config.num_hidden_layers, columns, self.width),
            make_mask=lambda columns: row_mask(config, columns, self.width, self.model.dtype),
            counting=self.direct.counting,
        )


def prepare(
    options: Options, model: Any, world: World, settings: Settings, *, width: int
) -> tuple[Captured | None, str]:
    """What ``--graphs`` asks for, or None, and a sentence about it; collective.

    Raises:
        ValueError: ``--graphs on`` where it can't be, on every rank.
    """
    from megamoe.adapters.transformers.direct import DirectExperts

    if "megamoe" not in options.experts or options.graphs == "off":
        return None, "Decode steps are not captured."
    reasons = world.gather_text(_why_not(model, world, settings) or "", "asking who can capture")
    reason = next((text for text in reasons if text), None)
    if reason is not None:
        if options.graphs == "on":
            raise ValueError(f"--graphs on can't be: {reason}")
        return None, f"Decode steps are not captured: {reason}."
    direct = DirectExperts(model, world.group, world.device, settings)
    width = -(-width // _COLUMNS) * _COLUMNS
    return Captured(model, direct, world.device, width), "Our decode steps are CUDA graphs."


def _why_not(model: Any, world: World, settings: Settings) -> str | None:
    from megamoe.adapters.transformers.direct import why_not_direct
    from megamoe.adapters.transformers.row_cache import why_no_rows

    return why_not_direct(model, world.group, world.device, settings) or why_no_rows(model.config.get_text_config())
